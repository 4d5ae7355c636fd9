"""Alerts: numbers of a run that should worry the person who watches it, from one table of limits.

A limit is compared with the mean of the last RECENT steps, so that one odd step with few prompts raises no alert, while
a state that lasts raises one from the first step on. Each alert begins with its name, and docs/troubleshooting.md has a
section for each name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = Mapping[str, float | None]  # metrics of a step by name; None if a value is not finite

RECENT = 5  # steps
MANY = 20  # steps after which a constant reward raises an alert


def _mean(rows: Sequence[Row], *names: str) -> float | None:
    """Returns the mean over rows of the sum of `names`; None if no row has all of them."""
    sums = [sum(row[name] for name in names) for row in rows if all(row.get(name) is not None for name in names)]
    return float(np.mean(sums)) if sums else None


def _recent(*names: str) -> Callable[[Sequence[Row]], float | None]:
    """Returns a measure: the mean over the recent steps of the sum of `names`."""
    return lambda rows: _mean(rows[-RECENT:], *names)


def _all_zero(rows: Sequence[Row]) -> float | None:
    """Returns the fraction of the recent steps in which every completion earned 0."""
    known = [row for row in rows[-RECENT:] if row.get("reward") is not None]
    zero = [row["reward"] == 0 and row.get("frac_reward_zero_std") == 1 for row in known]
    return float(np.mean(zero)) if zero else None


def _entropy_lost(rows: Sequence[Row]) -> float | None:
    """Returns the fraction of the first steps' entropy that is gone; None in SFT, which is meant to lower it."""
    if all(row.get("reward") is None for row in rows):
        return None
    first, now = _mean(rows[:RECENT], "entropy"), _mean(rows[-RECENT:], "entropy")
    return 1 - now / first if first and now is not None and len(rows) > RECENT else None


def _still_compiling(rows: Sequence[Row]) -> float | None:
    """Returns the fraction of the recent steps that compiled a program; None in the first steps, which must compile."""
    if len(rows) <= 2 * RECENT:
        return None
    return float(np.mean([(row.get("perf/recompiles") or 0) > 0 for row in rows[-RECENT:]]))


def _skipped(rows: Sequence[Row]) -> float | None:
    """Returns how many updates were skipped in the recent steps; the metric counts those since the run's start."""
    counts = [row["nonfinite_steps"] for row in rows[-RECENT - 1 :] if row.get("nonfinite_steps") is not None]
    return counts[-1] - counts[0] if len(counts) > 1 else None


class Limit(NamedTuple):
    """A measure of a run, the highest value that raises no alert, and the alert's text."""

    name: str
    measure: Callable[[Sequence[Row]], float | None]  # takes all rows, the newest last; returns None where not known
    most: float  # a measure above it raises the alert
    message: str  # {} stands for the measure


LIMITS = (
    Limit("zero reward", _all_zero, 0.99, "every completion earns 0"),
    Limit(
        "truncation",
        _recent("completions/clipped_ratio"),
        0.5,
        "{:.0%} of completions are cut at rollout.max_completion_length",
    ),
    Limit(
        "unparseable",
        _recent("verifier/unparseable_frac"),
        0.3,
        "{:.0%} of samples state no answer that could be graded",
    ),
    Limit(
        "zero variance",
        _recent("frac_reward_zero_std"),
        0.8,
        "{:.0%} of groups have equal rewards and give no gradient",
    ),
    Limit("entropy collapse", _entropy_lost, 0.9, "{:.0%} of the entropy at the start is gone"),
    Limit(
        "verifier errors",
        _recent("verifier/error_frac", "verifier/timeout_frac"),
        0.01,
        "{:.1%} of gradings fail or time out",
    ),
    Limit("recompiles", _still_compiling, 0.5, "{:.0%} of steps still compile programs"),
    Limit("not finite", _skipped, 0, "{:.0f} updates were skipped: loss or gradient was not finite"),
)


def _custom_rewards(row: Row) -> list[str]:
    """Returns the names of the custom rewards, the only ones with a standard deviation of their own."""
    matches = [re.fullmatch(r"rewards/(\w+)/std", name) for name in row]
    return [match[1] for match in matches if match]


def _silent(rows: Sequence[Row], name: str) -> bool:
    """Returns whether a reward has had no value for any completion of the recent steps."""
    return all(row.get(f"rewards/{name}/mean") is None for row in rows[-RECENT:])


def _constant(rows: Sequence[Row], name: str) -> bool:
    """Returns whether a reward has had one and the same value for all completions of many steps."""
    recent = rows[-MANY:]
    means = [row.get(f"rewards/{name}/mean") for row in recent]
    if len(recent) < MANY or any(row.get(f"rewards/{name}/std") != 0 for row in recent) or None in means:
        return False
    return bool(np.ptp(means) <= 1e-9 * np.abs(means).max())  # the mean of equal values may be rounded


class RewardLimit(NamedTuple):
    """A state that no custom reward should be in, and the alert's text."""

    name: str
    holds: Callable[[Sequence[Row], str], bool]  # takes all rows, the newest last, and the name of a reward
    message: str  # {} stands for the names of the rewards


REWARD_LIMITS = (
    RewardLimit("no value", _silent, "{} gave None for every completion"),
    RewardLimit("constant reward", _constant, f"{{}} gave the same value in all {MANY} steps"),
)
WATCHED = (
    "reward",
    "entropy",
    "frac_reward_zero_std",
    "completions/clipped_ratio",
    "verifier/unparseable_frac",
    "verifier/error_frac",
    "verifier/timeout_frac",
    "perf/recompiles",
    "nonfinite_steps",
)  # names of all metrics that LIMITS read


def is_watched(name: str) -> bool:
    """Returns whether alerts read the metric `name`."""
    return name in WATCHED or re.fullmatch(r"rewards/\w+/(mean|std)", name) is not None


def alerts(metrics: Mapping[str, Any], history: Sequence[Row] = ()) -> list[str]:
    """Returns the alerts at a step as "name: message", in the order of LIMITS and then of REWARD_LIMITS.

    Args:
        metrics: the step's numbers by name, None if one is not finite. Only names that `is_watched` are read, and
            any of them may be missing.
        history: the metrics of the steps before it, the oldest first.
    """
    rows = [*history, metrics]
    messages = []
    for limit in LIMITS:
        measure = limit.measure(rows)
        if measure is not None and measure > limit.most:
            messages.append(f"{limit.name}: {limit.message.format(measure)}")
    for state in REWARD_LIMITS:
        if names := [name for name in _custom_rewards(metrics) if state.holds(rows, name)]:
            messages.append(f"{state.name}: {state.message.format(', '.join(names))}")
    return messages
