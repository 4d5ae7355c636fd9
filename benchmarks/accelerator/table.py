"""The Markdown page of results: the machine, one table for each part, and what failed or is missing."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.accelerator import plan
from benchmarks.accelerator.results import Results

GB = 1e9


class Column(NamedTuple):
    """A column: its title, the figure that it shows, and how it is written."""

    title: str
    figure: str
    text: Callable[[Any], str] = str


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _seconds(value: float) -> str:
    return f"{value:.3g}"


def _gigabytes(value: float) -> str:
    return f"{value / GB:.2f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:.3g}"


DECODE = (
    Column("shape", "shape"),
    Column("tokens/s", "tokens_per_second", _count),
    Column("ms a step", "decode_step_seconds", _milliseconds),
    Column("of memory roofline", "roofline_fraction", _percent),
    Column("slots in use", "slot_utilization", _percent),
    Column("peak GB", "peak_memory_bytes", _gigabytes),
    Column("compiled while measured", "recompiles"),
)
COLUMNS: dict[str, Sequence[Column]] = {
    "decode": DECODE,
    "decode7b": DECODE,
    "update": (
        Column("shape", "shape"),
        Column("s", "update_seconds", _seconds),
        Column("tokens/s", "tokens_per_second", _count),
        Column("MFU", "mfu", _percent),
        Column("padding", "padding_fraction", _percent),
        Column("attention", "attention"),
        Column("remat", "remat"),
        Column("predicted GB", "predicted_memory_bytes", _gigabytes),
        Column("peak GB", "peak_memory_bytes", _gigabytes),
        Column("peak / predicted", "peak_over_predicted"),
        Column("programs", "programs"),
        Column("compiling or loading s", "compile_seconds", _seconds),
        Column("compiled while measured", "recompiles"),
    ),
    "step": (
        Column("shape", "shape"),
        Column("step s", "step_seconds", _seconds),
        Column("rollout s", "rollout_seconds", _seconds),
        Column("update s", "update_seconds", _seconds),
        Column("tokens/s", "tokens_per_second", _count),
        Column("waiting for the verifier s", "verify_wait_seconds", _seconds),
        Column("solved", "solved", _percent),
        Column("compiled while measured", "recompiles"),
    ),
    "peers": (
        Column("peer", "peer"),
        Column("shape", "shape"),
        Column("tokens/s", "tokens_per_second", _count),
        Column("s", "update_seconds", _seconds),
        Column("ours / peer", "ours_over_peer"),
        Column("peak GB", "peak_memory_bytes", _gigabytes),
    ),
    "profile": (
        Column("span ms", "span_ms"),
        Column("busy ms", "busy_ms"),
        Column("gaps", "gap_fraction", _percent),
        Column("longest gap ms", "longest_gaps_ms", lambda gaps: str(gaps[0]) if gaps else "0"),
        Column("operations", "operations"),
    ),
}


def page(results: Results) -> str:
    """Returns the page of all results that are there."""
    cases = {name: results.cases(name) for name in plan.NAMES}
    for case, figures in cases["peers"].items():
        figures |= _compared(figures, cases["decode"].get(case) or cases["update"].get(case) or {})
    lines = ["# Measurements on an accelerator", "", *_machine(results.device() or {})]
    if checks := cases["correctness"] | cases["float32"]:
        lines += ["", *_checks(checks)]
    for name, columns in COLUMNS.items():
        if cases[name]:
            lines += ["", f"## {name}", "", *_table(columns, cases[name])]
    for case, figures in cases["profile"].items():
        if "top" in figures:
            lines += ["", f"Most time in the {case}:", "", *_top(figures["top"])]
    lines += ["", "## Parts", "", "| part | end | expected s | used s | |", "|---|---|---|---|---|"]
    for name, end in results.ends().items():
        why = _cell(end.get("why", ""))
        lines.append(f"| {name} | {end['end']} | {end['expected']:.0f} | {end['seconds']:.1f} | {why} |")
    return "\n".join(lines) + "\n"


def failed_checks(results: Results) -> list[str]:
    """Returns the names of the checks of correctness that failed."""
    checks = results.cases("correctness") | results.cases("float32")
    return [case for case, figures in checks.items() if not figures["passed"]]


def _compared(figures: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Returns the rate of ours over the peer's, where both measured the same work."""
    reduced = "reduced" in figures or "reduced" in ours
    if reduced or figures.get("shape") != ours.get("shape") or "tokens_per_second" not in figures:
        return {}
    return {"ours_over_peer": round(ours["tokens_per_second"] / figures["tokens_per_second"], 2)}


def _machine(device: dict[str, Any]) -> list[str]:
    """Returns the lines about the machine."""
    if not device:
        return ["The device was not measured."]
    memory = device.get("memory_bytes")
    parts = [
        f"{device['devices']} x {device['device_kind']} ({device['platform']})",
        *([f"{memory / GB:.1f} GB each"] if memory else []),
        f"{device['bf16_tflops']} TFLOP/s bfloat16, {device['fp32_tflops']} float32, {device['bandwidth_gb']} GB/s",
        *([f"driver: {device['driver']}"] if device.get("driver") else []),
        ", ".join(f"{name} {version}" for name, version in device["versions"].items()),
    ]
    return [f"- {_cell(part)}" for part in parts]


def _checks(cases: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the table of the checks of correctness."""
    wrong = sum(not figures["passed"] for figures in cases.values())
    title = f"{wrong} of {len(cases)} checks FAILED" if wrong else f"all {len(cases)} checks passed"
    lines = ["## correctness", "", f"{title}.", "", "| check | | figures (most allowed) |", "|---|---|---|"]
    for case, figures in cases.items():
        allowed = figures.get("tolerances", {})
        shown = [f"{name} {figures[name]:.2g} ({most:g})" for name, most in allowed.items()]
        shown += [
            f"{name} {figures[name]}" for name in ("other_tokens", "deterministic") if name in figures.keys() - allowed
        ]
        text = _cell(figures.get("error", ", ".join(shown)))
        lines.append(f"| {case} | {'pass' if figures['passed'] else 'FAIL'} | {text} |")
    return lines


def _table(columns: Sequence[Column], cases: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a table of the figures; a note of a case stands in the last column."""
    lines = [f"| case | {' | '.join(column.title for column in columns)} | |", "|---" * (len(columns) + 2) + "|"]
    for case, figures in cases.items():
        cells = [column.text(figures[column.figure]) if _has(figures, column) else "-" for column in columns]
        note = figures.get("skipped") or figures.get("reduced") or ""
        lines.append(f"| {case} | {' | '.join(cells)} | {_cell(note)} |")
    return lines


def _has(figures: dict[str, Any], column: Column) -> bool:
    return figures.get(column.figure) is not None


def _top(operations: list[dict[str, Any]]) -> list[str]:
    lines = ["| operation | ms | runs | of all |", "|---|---|---|---|"]
    return lines + [
        f"| `{_cell(row['name'])}` | {row['ms']} | {row['runs']} | {row['fraction']:.1%} |" for row in operations
    ]


def _cell(text: Any) -> str:
    """Returns a text that is safe inside a cell of a table."""
    return str(text).replace("|", "\\|").replace("\n", " ")
