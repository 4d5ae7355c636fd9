"""The tables of a study that cut across its groups: predictions, further pairs, single runs, and the first steps."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from study_arms import CONTRASTS, PREDICTIONS, Prediction
from study_runs import interval

Results = dict[str, Any]
Arm = dict[str, Any]


def pairs(results: Results, name: str, against: str = "") -> list[tuple[dict, dict]]:
    """Returns, for each seed that both have, the run of an arm and that of another, its reference unless named."""
    arm = results["arms"][name]
    other = results["arms"].get(against or arm["against"], {"seeds": {}})["seeds"]
    return [(run, other[seed]) for seed, run in arm["seeds"].items() if seed in other]


def cell(values: Sequence[float], form: str, with_interval: bool, sign: str = "") -> str:
    """Returns the mean of values as text, with its 95 % interval if it has one."""
    mean, width = interval(values)
    text = format(mean, sign + form)
    return f"{text} ± {format(width, form)}" if with_interval and math.isfinite(width) else text


def predictions(results: Results) -> str:
    """Returns the table of what was predicted and what came; "" where no such arm has pairs."""
    lines = [
        "## predictions",
        "",
        "pass@1 at the end, less that of the same seeds with GRPO, in percentage points. A prediction holds where the",
        "whole interval lies in its range, and is falsified where none of it does.",
        "",
        "| arm | predicted | pairs | observed | verdict |",
        "|---|---|---|---|---|",
    ]
    for prediction in PREDICTIONS:
        found = pairs(results, prediction.arm) if prediction.arm in results["arms"] else []
        if len(found) > 1:
            gaps = [100 * (run["after"] - other["after"]) for run, other in found]
            cells = [prediction.arm, prediction.words, str(len(found)), cell(gaps, ".1f", True, "+")]
            lines.append("| " + " | ".join([*cells, verdict(prediction, gaps)]) + " |")
    return "\n".join(lines) if len(lines) > 7 else ""


def verdict(prediction: Prediction, gaps: Sequence[float]) -> str:
    """Returns whether a prediction holds, is falsified, or is open, by the 95 % interval of the differences."""
    mean, width = interval(gaps)
    low, high = mean - width, mean + width
    if prediction.low <= low and high <= prediction.high:
        return "held"
    return "falsified" if high < prediction.low or low > prediction.high else "open"


def contrasts(results: Results) -> str:
    """Returns the differences between arms that are not each other's reference; "" where there are none."""
    lines = [
        "## further pairs",
        "",
        "pass@1 at the end, less that of the same seeds with another arm, in percentage points.",
        "",
        "| arm | less | pairs | pass@1 |",
        "|---|---|---|---|",
    ]
    for name, other in CONTRASTS:
        found = pairs(results, name, other) if name in results["arms"] else []
        if len(found) > 1:
            gaps = [100 * (run["after"] - reference["after"]) for run, reference in found]
            lines.append(f"| {name} | {other} | {len(found)} | {cell(gaps, '.1f', True, '+')} |")
    return "\n".join(lines) if len(lines) > 6 else ""


def each_run(results: Results) -> str:
    """Returns the last pass@1 of every run of the arms with more than three seeds; "" where there are none."""
    lines = ["## runs", "", "pass@1 at the end of each run, in percent, in order.", ""]
    lines += ["| arm | runs |", "|---|---|"]
    for name, arm in results["arms"].items():
        if len(arm["seeds"]) > 3:
            ends = sorted(100 * run["after"] for run in arm["seeds"].values())
            lines.append(f"| {name} | {', '.join(format(end, '.1f') for end in ends)} |")
    return "\n".join(lines) if len(lines) > 6 else ""


FIRST = (1, 5), (6, 10), (11, 15), (16, 20)  # steps
# Those from which plain answers are right often enough to see a difference.
FIRST_STARTS = ("dense", "ignoring", "x60", "x23")


def first_steps(results: Results) -> str:
    """Returns the success of plain answers to training prompts in the first steps; "" without such runs."""
    lines = [
        "## first steps",
        "",
        "Plain answers to training prompts that are right, in percent: iGRPO's drafts, and GRPO's completions. Beside",
        "them iGRPO's refinements that are right, and the tokens that these share with their draft.",
        "",
        "| start | steps | drafts | GRPO (8) | GRPO (4) | less GRPO (8) | less GRPO (4) | refinements | copied |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for start in FIRST_STARTS:
        arms = [results["arms"].get(f"{start}_{name}") for name in ("igrpo", "grpo", "grpo_4")]
        if None not in arms:
            lines += ["| " + " | ".join([start, *_first(arms, *steps)]) + " |" for steps in FIRST]
    return "\n".join(lines) if len(lines) > 7 else ""


def _first(arms: Sequence[Arm], first: int, last: int) -> list[str]:
    """Returns the cells of the steps from first to last, of iGRPO, GRPO (8) and GRPO (4)."""

    def means(arm: Arm, metric: str) -> dict[str, float]:
        return {
            seed: 100 * float(np.mean(run["series"][metric][first - 1 : last])) for seed, run in arm["seeds"].items()
        }

    igrpo, *others = arms
    drafts = means(igrpo, "draft_accuracy")
    plain = [means(arm, "accuracy") for arm in others]
    gaps = [[drafts[seed] - other[seed] for seed in drafts if seed in other] for other in plain]
    cells = [f"{first} to {last}", *(cell([*one.values()], ".1f", False) for one in (drafts, *plain))]
    cells += [cell(gap, ".1f", True, "+") for gap in gaps]
    return cells + [cell([*means(igrpo, metric).values()], ".1f", False) for metric in ("accuracy", "copy_ratio")]
