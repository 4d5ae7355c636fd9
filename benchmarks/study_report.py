"""Writes the tables and plots of a study for matched_budget.py: results.json, tables.md, GROUP.png."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import study_findings
import study_runs
from study_findings import Arm, Results, cell, pairs
from study_runs import MOVES, interval

from igrpo_jax.outputs.files import write_atomically


def write(out: Path, results: Results) -> None:
    """Writes all files of the report, each whole or not at all."""
    write_atomically(out / "results.json", json.dumps(results, indent=None, default=str) + "\n")
    write_atomically(out / "tables.md", tables(results))
    for group, names in results["groups"].items():
        plot(out / f"{group}.png", {name: results["arms"][name] for name in _with_reference(results, names)})


def last_line(results: Results) -> str:
    """Returns one JSON object with the means of every arm over its seeds."""
    arms = {}
    for name, arm in results["arms"].items():
        runs = arm["seeds"].values()
        arms[name] = {key: round(interval([run[key] for run in runs])[0], 4) for key in ("before", "after", "area")}
        arms[name]["seeds"] = len(runs)
        found = pairs(results, name)
        if found:
            mean, width = interval([run["after"] - other["after"] for run, other in found])
            arms[name] |= {"against": arm["against"], "difference": round(mean, 4), "half_width": _or_none(width)}
    return json.dumps({"setting": results["setting"], "steps": results["steps"], "arms": arms})


def _or_none(value: float) -> float | None:
    """Returns a finite value with 4 decimals, None for any other."""
    return round(value, 4) if math.isfinite(value) else None


def _with_reference(results: Results, names: Sequence[str]) -> list[str]:
    """Returns the arms of a group, preceded by the arms outside it with which they are compared."""
    others = dict.fromkeys(results["arms"][name]["against"] for name in names)
    return [name for name in others if name and name not in names and name in results["arms"]] + list(names)


def tables(results: Results) -> str:
    """Returns the tables of all groups as Markdown."""
    parts = []
    for group, names in results["groups"].items():
        arms = {name: results["arms"][name] for name in _with_reference(results, names)}
        parts += [f"## {group}", _learning(arms), _differences(results, names), _dynamics(arms), _drafts(arms)]
        parts.append(_cost(arms))
    parts += [study_findings.predictions(results), study_findings.contrasts(results)]
    parts += [study_findings.each_run(results), study_findings.first_steps(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


Column = tuple[str, Callable[[dict], float | None], str]  # heading, function from a run to its value, format


def _percent(name: str) -> Callable[[dict], float | None]:
    """Returns a function from a run to one of its fractions in percent, None where the run lacks it."""
    return lambda run: None if name not in run else 100 * run[name]


def _table(arms: dict[str, Arm], columns: Sequence[Column], with_interval: bool = True) -> str:
    """Returns a Markdown table with one line per arm: means over the seeds."""
    lines = ["| arm | seeds | " + " | ".join(heading for heading, _, _ in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, arm in arms.items():
        cells = []
        for _, read, form in columns:
            values = [value for value in map(read, arm["seeds"].values()) if value is not None]
            cells.append(cell(values, form, with_interval) if values else "")
        lines.append(f"| {name} | {len(arm['seeds'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _learning(arms: dict[str, Arm]) -> str:
    """Returns the table of pass@1 before and after."""
    columns: list[Column] = [
        ("pass@1 before", _percent("before"), ".1f"),
        ("pass@1 after", _percent("after"), ".1f"),
        ("area", _percent("area"), ".1f"),
        ("answer length before", lambda run: run["length_before"], ".1f"),
        ("answer length after", lambda run: run["length"], ".1f"),
    ]
    return "Single shot, in percent; area is the mean height of the pass@1 curve.\n\n" + _table(arms, columns)


def _differences(results: Results, names: Sequence[str]) -> str:
    """Returns the table of differences between paired runs; "" where there are no pairs."""
    lines = [
        "Differences of pairs: single-shot pass@1 in percentage points (at the end, of the area, and where both have",
        "sampled or trained on as many tokens) and entropy in nats (at the end, and where both trained on as many).",
        "",
        "| arm | against | pairs | pass@1 | area | at equal sampled | at equal trained | entropy | at equal trained |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        found = pairs(results, name)
        if not found:
            continue
        cells = [name, results["arms"][name]["against"], str(len(found))]
        gaps = [[(run[key], other[key]) for run, other in found] for key in ("after", "area")]
        gaps += [[study_runs.at_equal(axis, *pair) for pair in found] for axis in ("sampled", "trained")]
        cells += [cell([100 * (first - second) for first, second in gap], ".1f", True, "+") for gap in gaps]
        cells += _entropy_differences(found)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 5 else ""


def _entropy_differences(pairs: Sequence[tuple[dict, dict]]) -> list[str]:
    """Returns the cells of entropy, at the end and at equal trained tokens; of the pairs where both have it."""
    known = [pair for pair in pairs if all("entropy_100" in run for run in pair)]
    if not known:
        return ["", ""]
    gaps = [[(run["entropy_100"], other["entropy_100"]) for run, other in known]]
    gaps += [[study_runs.entropies_at_equal(*pair) for pair in known]]
    return [cell([first - second for first, second in gap], ".3f", True, "+") for gap in gaps]


def _dynamics(arms: dict[str, Arm]) -> str:
    """Returns the table of entropy and of groups with equal rewards."""
    columns: list[Column] = [
        *((f"entropy at {k} %", lambda run, k=k: run.get(f"entropy_{k}"), ".3f") for k in (10, 30, 100)),
        ("equal groups", _percent("zero_variance"), ".0f"),
        ("where the draft was right", _percent("zero_variance_right_draft"), ".0f"),
        ("where it was wrong", _percent("zero_variance_wrong_draft"), ".0f"),
    ]
    title = "Entropy in nats per token; groups whose rewards are all equal and give no gradient, in percent.\n\n"
    return title + _table(arms, columns)


def _drafts(arms: dict[str, Arm]) -> str:
    """Returns the table of what refinements make of drafts; "" where no arm has drafts."""
    shown = {name: arm for name, arm in arms.items() if any("fixed" in run for run in arm["seeds"].values())}
    if not shown:
        return ""
    columns: list[Column] = [(name.replace("_", " "), _percent(name), ".1f") for name in MOVES]
    columns += [("copied", _percent("copy_ratio"), ".0f"), ("copied at the end", _percent("copy_ratio_end"), ".0f")]
    columns += [("same answer", _percent("same_answer"), ".0f")]
    title = "What refinements made of the draft they were shown, in percent of refinements; tokens shared with it.\n\n"
    return title + _table(shown, columns, with_interval=False)


def _cost(arms: dict[str, Arm]) -> str:
    """Returns the table of tokens and seconds."""
    columns: list[Column] = [
        ("completions", lambda run: run["completions"], ",.0f"),
        ("sampled tokens", lambda run: run["sampled_tokens"], ",.0f"),
        ("trained tokens", lambda run: run["trained_tokens"], ",.0f"),
        ("seconds", lambda run: run["seconds"], ".0f"),
        ("of them rollout", lambda run: run["rollout_seconds"], ".0f"),
        ("update", lambda run: run["update_seconds"], ".0f"),
    ]
    return "What a run cost (seconds of all steps, compilation included).\n\n" + _table(arms, columns, False)


PANELS = (  # title, series
    ("reward of trained completions", "reward"),
    ("entropy (nats per token)", "entropy"),
    ("groups with equal rewards", "zero_variance"),
    ("tokens copied from the draft", "copy_ratio"),
)


def plot(path: Path, arms: dict[str, Arm]) -> None:
    """Plots pass@1 by step and by trained tokens, and the series by step: means over seeds with bands of 95 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13.5, 7), layout="constrained")
    panels = axes.ravel()
    for number, (name, arm) in enumerate(arms.items()):
        runs, look = list(arm["seeds"].values()), {"label": name, "color": f"C{number}"}
        look["alpha"] = 0.18 if len(arms) < 4 else 0.07  # opacity of the bands, of which many would hide the lines
        curves = [run["curve"] for run in runs]
        heights = [curve["pass@1"] for curve in curves]
        _line(panels[0], curves[0]["step"], heights, look)
        _line(panels[1], np.mean([curve["trained"] for curve in curves], axis=0) / 1e3, heights, look)
        for panel, (_, series) in zip(panels[2:], PANELS, strict=True):
            if all(series in run["series"] for run in runs):
                each = [_smooth(run["series"][series]) for run in runs]
                _line(panel, each[0][0], [values for _, values in each], look)
    panels[0].set_title("single-shot pass@1, by step")
    panels[1].set_title("single-shot pass@1, by thousands of trained tokens")
    for panel, (title, _) in zip(panels[2:], PANELS, strict=True):
        panel.set_title(title + ", by step")
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=90)
    pyplot.close(figure)
    temporary.replace(path)


def _line(panel, x: Sequence[float], each: Sequence[Sequence[float]], look: dict[str, Any]) -> None:
    """Draws the mean of values [runs, points], none of which is negative, and its band."""
    mean, width = (np.array(part) for part in zip(*map(interval, zip(*each, strict=True)), strict=True))
    panel.plot(x, mean, linewidth=1.6, label=look["label"], color=look["color"])
    if np.isfinite(width).all():
        low = np.maximum(mean - width, 0)
        panel.fill_between(x, low, mean + width, alpha=look["alpha"], color=look["color"], linewidth=0)


def _smooth(values: Sequence[float], over: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps, and means over `over` steps at a time for a smoother line; short runs keep all their steps."""
    over = over if len(values) >= 4 * over else 1
    count = len(values) // over
    cut = lambda x: np.reshape(x[: count * over], (count, over)).mean(axis=1)
    return cut(range(1, len(values) + 1)), cut(values)
