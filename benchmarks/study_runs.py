"""Computes the numbers of a run of a study from the run's files, and combines the numbers of several seeds.

matched_budget.py uses it. Nothing here runs or samples anything.
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

from igrpo_jax.outputs.files import write_atomically
from igrpo_jax.records import same_answer
from igrpo_jax.report.runs import whole_rows
from igrpo_jax.report.samples import groups as groups_of

# Metrics that are kept by step for the plots: name here -> name in metrics.jsonl.
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
    """Returns the rows of a JSON Lines file, without lines that a kill tore; none where there is no file."""
    return [row for row in whole_rows(path) if row is not None]


FIGURES = "figures.json"  # in the folder of a finished run: its numbers, which are enough without its other files


def finished(run: Path, steps: int, benchmark: str) -> bool:
    """Returns whether the run in this folder was evaluated after its last step."""
    if _written(run, benchmark, steps):
        return True
    rows = read_rows(run / "metrics.jsonl")
    return any(row["step"] == steps and f"eval/{benchmark}/pass@1" in row for row in rows)


def write_figures(run: Path, benchmark: str, row: dict[str, Any]) -> None:
    """Writes the numbers of a finished run into its folder."""
    write_atomically(run / FIGURES, json.dumps({benchmark: row}) + "\n")


def figures(run: Path, steps: int, benchmark: str) -> dict[str, Any]:
    """Returns the numbers of a finished run of so many steps: those in its folder, or else see `computed_figures`."""
    return _written(run, benchmark, steps) or computed_figures(run, benchmark)


def _written(run: Path, benchmark: str, steps: int) -> dict[str, Any] | None:
    """Returns the numbers that `write_figures` wrote for a run of so many steps; None where there are none."""
    try:
        row = json.loads((run / FIGURES).read_text(encoding="utf-8")).get(benchmark)
    except FileNotFoundError:
        return None
    return row if row and row["curve"]["step"][-1] == steps else None


@functools.cache  # a study asks for all its finished runs again after each further run
def computed_figures(run: Path, benchmark: str) -> dict[str, Any]:
    """Returns the numbers of a finished run that the study reports, from the run's metrics and samples.

    Fractions are between 0 and 1, entropy is in nats per token, and lengths are in tokens.

    Returns:
        `curve` holds lists over the evaluations: `step`, `pass@1` (single shot), `length`, and what had been spent by
        then: `sampled` and `trained` tokens, `completions` sampled, `seconds` of rollout and update.
        `series` holds the metrics of SERIES as lists over the steps, where every step has one.
        All other entries are single numbers: `before`, `after` (pass@1), `area` (mean height of the pass@1 curve over
        the steps), where every step has an entropy `entropy_10`, `entropy_30`, `entropy_100` (means of the 5 steps that
        end at this percentage of the run), `sampled_tokens`, `trained_tokens`, `completions`, `seconds`,
        `rollout_seconds`, `update_seconds`, `length` (single shot, at the end), and `zero_variance` and the moves as
        means over all steps.
    """
    rows = read_rows(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    evaluations = {row["step"]: row for row in rows if f"eval/{benchmark}/pass@1" in row}
    algorithm = json.loads((run / "config.json").read_text())["algorithm"]
    groups = [group for row in steps for group in read_groups(run, row["step"])]

    drafts = np.array([row.get("perf/draft_tokens", 0) for row in steps])
    refined = np.array([row["perf/completion_tokens"] for row in steps])
    spent = {
        "sampled": np.cumsum(drafts + refined),
        "trained": np.cumsum(_trained(groups, len(steps), algorithm)),
        "completions": np.cumsum(_counts(groups, len(steps), algorithm)),
        "seconds": np.cumsum([row["perf/step_time"] for row in steps]),
    }
    curve: dict[str, list] = {"step": sorted(evaluations)}
    curve["pass@1"] = [evaluations[at][f"eval/{benchmark}/pass@1"] for at in curve["step"]]
    curve["length"] = [evaluations[at][f"eval/{benchmark}/mean_length"] for at in curve["step"]]
    for name, values in spent.items():
        total = np.concatenate([[0], values])
        curve[name] = [round(float(total[at]), 1) for at in curve["step"]]
    known = {name: _known(steps, key) for name, key in SERIES.items()}
    series = {name: [*map(_rounded, values)] for name, values in known.items() if len(values) == len(steps)}
    result = {
        "before": curve["pass@1"][0],
        "after": curve["pass@1"][-1],
        "area": area(curve["step"], curve["pass@1"]),
        "length_before": curve["length"][0],
        "length": curve["length"][-1],
        "sampled_tokens": int(spent["sampled"][-1]),
        "trained_tokens": int(spent["trained"][-1]),
        "completions": int(spent["completions"][-1]),
        "seconds": float(spent["seconds"][-1]),
        "rollout_seconds": sum(row["perf/rollout_time"] for row in steps),
        "update_seconds": sum(row["perf/update_time"] for row in steps),
        "overlong": float(np.mean(_known(steps, "completions/clipped_ratio"))),
        **zero_variance(groups),
        **{name: float(np.mean(values)) for name, values in _moves(steps).items()},
    }
    same = [group.same_answer for group in groups if group.same_answer is not None]
    if "entropy" in series:  # it is that of refinements, which a step may lack
        result |= {f"entropy_{percent}": _ending(series["entropy"], percent) for percent in (10, 30, 100)}
    if same and len(known["copy_ratio"]):  # some prompts have refinements of a draft, and not verifications
        result["same_answer"] = float(np.mean(same))
        result["copy_ratio"] = float(np.mean(known["copy_ratio"]))
        result["copy_ratio_end"] = _ending(known["copy_ratio"], 100)
    return {name: _rounded(value) for name, value in result.items()} | {"curve": curve, "series": series}


@dataclass(frozen=True)
class GroupRow:
    """The counts of one prompt's samples in one step."""

    step: int
    sampled: int  # drafts and completions together
    draft_tokens: int
    tokens: int  # of the completions
    draft_right: bool | None  # None where no draft was shown
    same_answer: float | None  # fraction of completions that state the draft's answer; None where no draft was shown
    equal: bool  # the refinements have no advantage, or the drafts where there are no refinements


def read_groups(run: Path, step: int) -> list[GroupRow]:
    """Returns the groups of one step, from samples/step_N.jsonl."""
    rows = read_rows(run / "samples" / f"step_{step:06d}.jsonl")
    return [_group(step, group) for group in groups_of(rows)]


def _group(step: int, rows: Sequence[dict]) -> GroupRow:
    """Returns the counts of the rows of one prompt."""
    refined = [row for row in rows if row["stage"] != "draft"]
    trained = refined or rows
    parent = trained[0]["parent_draft_id"]
    drafts = {row["sample_id"]: row for row in rows if row["stage"] == "draft"}
    right = None if parent is None else drafts[parent]["rewards"]["accuracy"] >= 1
    same = None if parent is None else [same_answer(drafts[parent]["extracted"], row["extracted"]) for row in trained]
    same_fraction = None if same is None else float(np.mean(same))
    # The files of the study have no advantages of drafts, so that these are told by their rewards.
    differs = any(row["advantage"] for row in refined) if refined else len({row["reward"] for row in rows} - {None}) > 1
    draft_tokens, tokens = (sum(row["token_count"] for row in part) for part in (drafts.values(), refined))
    return GroupRow(step, len(rows), draft_tokens, tokens, right, same_fraction, equal=not differs)


def zero_variance(groups: Sequence[GroupRow]) -> dict[str, float]:
    """Returns the fractions of groups whose completions all earn the same reward.

    The three fractions are those of all groups, of groups that saw a right draft, and of groups that saw a wrong draft.
    """
    kinds = {"": groups}
    kinds["_right_draft"] = [group for group in groups if group.draft_right]
    kinds["_wrong_draft"] = [group for group in groups if group.draft_right is False]
    return {
        f"zero_variance{name}": float(np.mean([group.equal for group in kind])) for name, kind in kinds.items() if kind
    }


def _counts(groups: Sequence[GroupRow], steps: int, algorithm: dict[str, Any]) -> list[int]:
    """Returns how many drafts and completions were sampled in each step.

    Where every draft is refined, the files have the refinements of the kept draft alone.
    """
    left_out = 0
    if algorithm["draft_selection"] == "refined":
        left_out = (algorithm["num_drafts"] - 1) * algorithm["num_generations"]
    counts: collections.Counter[int] = collections.Counter()
    for group in groups:
        counts[group.step] += group.sampled + left_out
    return [counts[step] for step in range(1, steps + 1)]


def _trained(groups: Sequence[GroupRow], steps: int, algorithm: dict[str, Any]) -> list[int]:
    """Returns how many tokens each step trained on, by the files, which lack the refinements that are not kept."""
    counts: collections.Counter[int] = collections.Counter()
    for group in groups:
        counts[group.step] += group.tokens + algorithm["train_drafts"] * group.draft_tokens
    return [counts[step] for step in range(1, steps + 1)]


def _known(steps: Sequence[dict], key: str) -> list[float]:
    """Returns a metric by step, of the steps that have a value of it."""
    return [row[key] for row in steps if row.get(key) is not None]


def _moves(steps: Sequence[dict]) -> dict[str, list[float]]:
    """Returns the metrics of MOVES by step, of the steps that have refinements; empty for a run without drafts."""
    moves = {name: _known(steps, f"refine/{name}") for name in MOVES}
    return {name: values for name, values in moves.items() if values}


def _ending(values: Sequence[float], percent: float) -> float:
    """Returns the mean of the 5 values that end at this percentage of the run."""
    end = max(5, round(len(values) * percent / 100))
    return float(np.mean(values[end - 5 : end]))


def area(steps: Sequence[float], values: Sequence[float]) -> float:
    """Returns the mean height of the piecewise linear curve through these points."""
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95 % interval, by Student's t over the seeds.

    The width is NaN where there is a single value.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    width = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(width)


def at_equal(axis: str, run: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Returns pass@1 of two runs at equal spending: as much as the run that spent less has spent in total.

    Args:
        axis: what is spent, a name in `curve`, such as "trained".
    """
    curves = [run["curve"], other["curve"]]
    most = min(curve[axis][-1] for curve in curves)
    first, second = (float(np.interp(most, curve[axis], curve["pass@1"])) for curve in curves)
    return first, second


def entropies_at_equal(run: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Returns the entropy of two runs after equally many trained tokens: the total of the run that trained on fewer."""
    most = min(each["curve"]["trained"][-1] for each in (run, other))

    def entropy(figures: dict[str, Any]) -> float:
        curve = figures["curve"]
        percent = 100 * np.interp(most, curve["trained"], curve["step"]) / curve["step"][-1]
        return _ending(figures["series"]["entropy"], percent)

    return entropy(run), entropy(other)


def _rounded(value: float) -> float:
    """Returns a float with 5 significant digits; an integer stays as it is."""
    return value if isinstance(value, int) else float(f"{value:.5g}")
