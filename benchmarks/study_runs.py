"""The numbers of one run, from the files it left, and how numbers of several seeds are put together.

Used by matched_budget.py. Nothing here runs or samples anything.
"""

import collections
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from igrpo_jax.outputs.metrics import same_answer
from igrpo_jax.report.runs import whole_rows
from igrpo_jax.report.samples import groups as groups_of

# Kept by step, for the plots: name here -> name in metrics.jsonl.
SERIES = {
    "reward": "reward",
    "entropy": "entropy",
    "zero_variance": "frac_reward_zero_std",
    "copy_ratio": "refine/copy_ratio",
    "length": "completions/mean_length",
    "draft_accuracy": "draft/accuracy",
    "accuracy": "rewards/accuracy/mean",
}
MOVES = ("fixed", "broken", "kept_right", "kept_wrong")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSON Lines file; none where there is no file. A line torn by a kill is left out."""
    return [row for row in whole_rows(path) if row is not None]


def finished(run: Path, steps: int, benchmark: str) -> bool:
    """Whether the run in this folder was evaluated after its last step."""
    rows = read_rows(run / "metrics.jsonl")
    return any(row["step"] == steps and f"eval/{benchmark}/pass@1" in row for row in rows)


@functools.cache  # a study reads its finished runs after each further one
def figures(run: Path, benchmark: str) -> dict[str, Any]:
    """What the study reports of a finished run; shares are of 1, entropy is in nats per token, lengths in tokens.

    Returns:
        `curve`: lists over the evaluations: `step`, `pass@1` (single shot), `length`, and what had been spent by then:
        `sampled` and `trained` tokens, `completions` sampled, `seconds` of rollout and update.
        `series`: the metrics of SERIES, lists over the steps.
        And one number each: `before`, `after` (pass@1), `area` (mean height of the pass@1 curve over the steps),
        `entropy_10`, `entropy_30`, `entropy_100` (over the 5 steps that end there, in percent of the run),
        `sampled_tokens`, `trained_tokens`, `completions`, `seconds`, `rollout_seconds`, `update_seconds`, `length`
        (single-shot, at the end), and of `zero_variance` and the moves those over all steps.
    """
    rows = read_rows(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    evaluations = {row["step"]: row for row in rows if f"eval/{benchmark}/pass@1" in row}
    trains_drafts = json.loads((run / "config.json").read_text())["algorithm"]["train_drafts"]
    groups = [group for row in steps for group in read_groups(run, row["step"])]

    drafts = np.array([row.get("perf/draft_tokens", 0) for row in steps])
    refined = np.array([row["perf/completion_tokens"] for row in steps])
    spent = {
        "sampled": np.cumsum(drafts + refined),
        "trained": np.cumsum(refined + trains_drafts * drafts),
        "completions": np.cumsum(_counts(groups, len(steps))),
        "seconds": np.cumsum([row["perf/step_time"] for row in steps]),
    }
    curve: dict[str, list] = {"step": sorted(evaluations)}
    curve["pass@1"] = [evaluations[at][f"eval/{benchmark}/pass@1"] for at in curve["step"]]
    curve["length"] = [evaluations[at][f"eval/{benchmark}/mean_length"] for at in curve["step"]]
    for name, values in spent.items():
        total = np.concatenate([[0], values])
        curve[name] = [round(float(total[at]), 1) for at in curve["step"]]
    series = {name: [_rounded(row[key]) for row in steps] for name, key in SERIES.items() if key in steps[0]}
    result = {
        "before": curve["pass@1"][0],
        "after": curve["pass@1"][-1],
        "area": area(curve["step"], curve["pass@1"]),
        **{f"entropy_{share}": _ending(series["entropy"], share) for share in (10, 30, 100)},
        "length_before": curve["length"][0],
        "length": curve["length"][-1],
        "sampled_tokens": int(spent["sampled"][-1]),
        "trained_tokens": int(spent["trained"][-1]),
        "completions": int(spent["completions"][-1]),
        "seconds": float(spent["seconds"][-1]),
        "rollout_seconds": sum(row["perf/rollout_time"] for row in steps),
        "update_seconds": sum(row["perf/update_time"] for row in steps),
        "overlong": float(np.mean([row["completions/clipped_ratio"] for row in steps])),
        **zero_variance(groups),
        **{name: float(np.mean(values)) for name, values in _moves(steps).items()},
    }
    if "copy_ratio" in series:
        result["same_answer"] = float(np.mean([one.same_answer for one in groups if one.same_answer is not None]))
        result["copy_ratio"] = float(np.mean(series["copy_ratio"]))
        result["copy_ratio_end"] = _ending(series["copy_ratio"], 100)
    return {name: _rounded(value) for name, value in result.items()} | {"curve": curve, "series": series}


@dataclass(frozen=True)
class GroupRow:
    """What is read of one prompt's samples in one step."""

    step: int
    sampled: int  # drafts and completions
    draft_right: bool | None  # None where no draft was shown
    same_answer: float | None  # share of completions that state the draft's answer; None where no draft was shown
    equal: bool  # all rewards of the trained completions are the same: their advantages are 0


def read_groups(run: Path, step: int) -> list[GroupRow]:
    """The groups of one step, from samples/step_N.jsonl."""
    rows = read_rows(run / "samples" / f"step_{step:06d}.jsonl")
    return [_group(step, some) for some in groups_of(rows)]


def _group(step: int, rows: Sequence[dict]) -> GroupRow:
    trained = [row for row in rows if row["stage"] != "draft"]
    parent = trained[0]["parent_draft_id"]
    drafts = {row["sample_id"]: row for row in rows if row["stage"] == "draft"}
    right = None if parent is None else drafts[parent]["rewards"]["accuracy"] >= 1
    same = None if parent is None else [same_answer(drafts[parent]["extracted"], row["extracted"]) for row in trained]
    share = None if same is None else float(np.mean(same))
    return GroupRow(step, len(rows), right, share, equal=not any(row["advantage"] for row in trained))


def zero_variance(groups: Sequence[GroupRow]) -> dict[str, float]:
    """Shares of groups whose completions all earn the same: of all, of those shown a right draft, and a wrong one."""
    kinds = {"": groups}
    kinds["_right_draft"] = [group for group in groups if group.draft_right]
    kinds["_wrong_draft"] = [group for group in groups if group.draft_right is False]
    return {
        f"zero_variance{name}": float(np.mean([group.equal for group in some])) for name, some in kinds.items() if some
    }


def _counts(groups: Sequence[GroupRow], steps: int) -> list[int]:
    counts: collections.Counter[int] = collections.Counter()
    for group in groups:
        counts[group.step] += group.sampled
    return [counts[step] for step in range(1, steps + 1)]


def _moves(steps: Sequence[dict]) -> dict[str, list[float]]:
    return {name: [row[f"refine/{name}"] for row in steps] for name in MOVES if f"refine/{name}" in steps[0]}


def _ending(values: Sequence[float], percent: float) -> float:
    """Mean of the 5 values that end at this place of the run."""
    end = max(5, round(len(values) * percent / 100))
    return float(np.mean(values[end - 5 : end]))


def area(steps: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of the piecewise linear curve through these points."""
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, by Student's t over the seeds; NaN of a single one."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    width = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(width)


def at_equal(axis: str, run: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """pass@1 of two runs where both have spent as much as the one that spent less in all; `axis` is of the curve."""
    most = min(run["curve"][axis][-1], other["curve"][axis][-1])
    first, second = (float(np.interp(most, one["curve"][axis], one["curve"]["pass@1"])) for one in (run, other))
    return first, second


def entropies_at_equal(run: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Entropy of two runs where both have trained on as many tokens as the one that trained on less in all."""
    most = min(one["curve"]["trained"][-1] for one in (run, other))
    percent = [100 * np.interp(most, one["curve"]["trained"], one["curve"]["step"]) for one in (run, other)]
    first, second = (
        _ending(one["series"]["entropy"], at / one["curve"]["step"][-1])
        for one, at in zip((run, other), percent, strict=True)
    )
    return first, second


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")
