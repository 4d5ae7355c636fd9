"""Summaries of benchmarks as tables in Markdown, in percent."""

import re
from typing import Any


def markdown(benchmarks: dict[str, dict[str, Any]]) -> str:
    """Returns tables of summaries, in percent: the single shot, its subjects, and the rounds of draft -> refine."""
    lines = _single_shot(benchmarks)
    if any(summary.get("subjects") for summary in benchmarks.values()):
        lines += _subjects(benchmarks)
    if any(summary["rounds"] for summary in benchmarks.values()):
        lines += _rounds(benchmarks)
    return "\n".join(lines) + "\n"


def _single_shot(benchmarks: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of the table of the single shot."""
    lines = [
        "Single shot, in percent and tokens; intervals are 95 %, by bootstrap over problems, and exact where all "
        "problems score the same.",
        "",
        "| benchmark | problems | samples | pass@1 | interval | pass@k | maj@k | length (right, wrong) "
        "| cut | no answer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, summary in benchmarks.items():
        shot, samples = summary["single_shot"], summary["samples"]
        cells = [name, summary["problems"], samples, percent(shot["pass@1"])]
        cells.append(f"{percent(shot['pass@1_low'])} to {percent(shot['pass@1_high'])}")
        for measure in ("pass", "maj"):
            ks = sorted(int(key.partition("@")[2]) for key in shot if re.fullmatch(rf"{measure}@(?!1$)\d+", key))
            cells.append(f"{percent(shot[f'{measure}@{ks[-1]}'])} (k = {ks[-1]})" if ks else "")
        lengths = [f"{shot[x]:.0f}" if x in shot else "-" for x in ("solved_length", "unsolved_length")]
        cells.append(f"{shot['mean_length']:.0f} ({', '.join(lengths)})")
        cells += [percent(shot["clipped_ratio"]), percent(shot["unparseable_frac"])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _subjects(benchmarks: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of the table of the subjects."""
    lines = ["", "Single shot by subject, in percent.", "", "| benchmark | subject | problems | pass@1 | interval |"]
    lines.append("|---|---|---|---|---|")
    for name, summary in benchmarks.items():
        for subject, values in summary.get("subjects", {}).items():
            cell = subject.replace("|", "\\|")
            interval = f"{percent(values['pass@1_low'])} to {percent(values['pass@1_high'])}"
            lines.append(f"| {name} | {cell} | {values['problems']} | {percent(values['pass@1'])} | {interval} |")
    return lines


def _rounds(benchmarks: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of the table of the rounds."""
    lines = [
        "",
        "Draft -> refine, in percent. The draft is chosen by majority vote; by oracle, which knows the answer, for "
        "comparison only.",
        "",
        "| benchmark | round | draft by | right | pass@1 | interval | fixed | broken | kept right | kept wrong |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, summary in benchmarks.items():
        for number, chains in enumerate(summary["rounds"], 1):
            for chain, values in chains.items():
                cells = [percent(values[x]) for x in ("draft_accuracy", "pass@1")]
                cells.append(f"{percent(values['pass@1_low'])} to {percent(values['pass@1_high'])}")
                cells += [percent(values[x]) for x in ("fixed", "broken", "kept_right", "kept_wrong")]
                lines.append("| " + " | ".join([name, str(number), chain, *cells]) + " |")
    return lines


def percent(fraction: float) -> str:
    """Returns a fraction in percent, with two digits."""
    return f"{100 * fraction:.2f}"
