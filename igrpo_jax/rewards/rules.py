"""What a worker computes from one completion alone: its rewards by rules, their weights, and their sum.

    accuracy   the stated answer equals the reference answer                           0 or 1
    format     one think block, then one answer block, nothing else                    0 or 1
    overlong   the soft over-long penalty of DAPO                                      -1 to 0

Accuracy and format read opening + completion, because a chat template may open `<think>` in the prompt. A reward of
weight 0 is neither computed nor reported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from igrpo_jax.config import RewardsConfig
from igrpo_jax.records import Candidate, Score
from igrpo_jax.rewards.format import format_reward, overlong_penalty
from igrpo_jax.rewards.mathematics import grader


@dataclass(frozen=True)
class Rules:
    """The rewards that a worker computes from a single completion, and their weights in the sum."""

    weights: dict[str, float]  # of the rewards in use, by name; without the judge and custom rewards
    max_completion: int = 0  # the most tokens that a completion may have, for the over-long penalty
    overlong_cache: int = 0  # the number of last tokens over which the penalty grows


def _accuracy(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    return grader.grade(candidate.opening + candidate.text, candidate.answer)


def _format(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    return format_reward(candidate.opening + candidate.text), None, "ok"


def _overlong(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    length = len(candidate.tokens)
    return overlong_penalty(length, rules.max_completion, rules.overlong_cache), None, "ok"


# Name -> function of (candidate, rules) that returns (unweighted reward, extracted answer, status).
REWARDS: dict[str, Callable] = {"accuracy": _accuracy, "format": _format, "overlong": _overlong}


def rules_of(settings: RewardsConfig, max_completion: int = 0) -> Rules:
    """Returns the rules that `settings` ask for."""
    weights = {name: getattr(settings, name) for name in REWARDS}
    used = {name: weight for name, weight in weights.items() if weight != 0}
    return Rules(used, max_completion, settings.overlong_cache)


def score(candidate: Candidate, rules: Rules) -> Score:
    """Grades one completion in this process, without a deadline. Exceptions are raised, and `seconds` stays 0."""
    rewards, extracted, status = {}, None, "ok"
    for name in rules.weights:
        rewards[name], answer, reward_status = REWARDS[name](candidate, rules)
        extracted = answer if answer is not None else extracted
        status = reward_status if reward_status != "ok" else status
    return total(Score(0.0, rewards, extracted, status), rules.weights)


def total(partial: Score, weights: dict[str, float]) -> Score:
    """Returns `partial` with its reward: the weighted sum of what was not skipped, or NaN if all was skipped.

    A reward of weight 0, which only a custom one can have, does not count: it alone is not a verdict.
    """
    counting = {name: weight for name, weight in weights.items() if weight}
    known = {name: value for name, value in partial.rewards.items() if name in counting and not math.isnan(value)}
    counted = [counting[name] * value for name, value in known.items()]
    if counted or not counting:
        return replace(partial, reward=float(sum(counted)))
    return replace(partial, reward=math.nan, status="invalid", detail="every reward function returned None")
