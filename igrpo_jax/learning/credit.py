"""Computes the rewards that a step trains on, and the advantages of its completions from these rewards.

1. The verifier's rewards, without those that dynamic sampling filters out (`filtering`).
2. Changes of a refinement's reward by the draft that it was shown: algorithm.improvement_bonus adds
   alpha (R(refinement) - R(draft)), as SCoRe does (2409.12917), and algorithm.repeat_penalty subtracts a constant from
   a refinement that states the answer of a wrong draft.
3. Advantages in groups (`objectives`): the refinements of a prompt, and its drafts where they are trained on; or both
   together with one baseline (algorithm.group = "prompt").
4. With algorithm.refine_credit = "plain" a wrong refinement has no advantage (algorithm.credit_completions = "right"):
   the policy would not have sampled it from the plain prompt, so there is no need to train against it there. Its reward
   stays in the baseline.

The paper has neither 2 nor 4, and its only groups are those of the refinements. All of this is off by default.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from igrpo_jax.config import AlgorithmConfig, Config
from igrpo_jax.learning import filtering, objectives
from igrpo_jax.records import Group, same_answer


class Advantages(NamedTuple):
    """What the samples of each group are trained with, one array for each group; empty if it has no such samples."""

    refinements: list[np.ndarray]  # [G] float32
    drafts: list[np.ndarray]  # [N] float32; no array at all where drafts are not trained on


def advantages(groups: Sequence[Group], config: Config) -> Advantages:
    """Returns the advantages of a step's refinements, and of its drafts where they are trained on."""
    algorithm = config.algorithm
    rewards = [trained_rewards(group, config) for group in groups]
    if algorithm.group == "prompt":
        both = [np.concatenate([own, group.of_drafts.rewards]) for group, own in zip(groups, rewards, strict=True)]
        joint = _ragged_group_advantages(both, algorithm)
        refined = [own[: len(group.completions)] for group, own in zip(groups, joint, strict=True)]
        drafted = [own[len(group.completions) :] for group, own in zip(groups, joint, strict=True)]
    else:
        refined, drafted = _ragged_group_advantages(rewards, algorithm), []
        if "draft" in algorithm.trained_stages:
            rewards = [filtering.rewards_after_filtering(group.of_drafts, config) for group in groups]
            drafted = _ragged_group_advantages(rewards, algorithm)
    credited = [own * _has_credit(group, algorithm) for group, own in zip(groups, refined, strict=True)]
    return Advantages(credited, drafted)


def trained_rewards(group: Group, config: Config) -> np.ndarray:
    """Returns the rewards of refinements that advantages are made of, [G] float32; NaN without a verdict."""
    return filtering.rewards_after_filtering(group, config) + reward_changes(group, config.algorithm)


def reward_metrics(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """Returns `refine/reward_change`, the mean of what is added to the rewards of refinements; {} if nothing is."""
    algorithm, refined = config.algorithm, [group for group in groups if group.completions]
    if not refined or not (algorithm.improvement_bonus or algorithm.repeat_penalty):
        return {}
    changes = np.concatenate([reward_changes(group, algorithm) for group in refined])
    known = np.ma.masked_invalid(changes)  # NaN without a verdict
    return {"refine/reward_change": float(known.mean()) if known.count() else math.nan}


def reward_changes(group: Group, algorithm: AlgorithmConfig) -> np.ndarray:
    """Returns what is added to the rewards of refinements, [G] float32; 0 if no draft was shown."""
    if group.kept is None:
        return np.zeros(len(group.completions), np.float32)
    draft = group.drafts[group.kept].score
    answers = [completion.score.extracted for completion in group.completions]
    repeats = [not draft.is_right and same_answer(draft.extracted, answer) for answer in answers]
    improvement = algorithm.improvement_bonus * (group.rewards - np.float32(draft.reward))
    return improvement - algorithm.repeat_penalty * np.array(repeats, np.float32)


def _has_credit(group: Group, algorithm: AlgorithmConfig) -> np.ndarray:
    """Returns which refinements of a group are trained on, [G] bool: all, or those that are right or saw no draft."""
    if algorithm.refine_credit == "context" or algorithm.credit_completions == "all" or group.kept is None:
        return np.ones(len(group.completions), bool)
    return np.array([completion.score.is_right for completion in group.completions], bool)


def _ragged_group_advantages(rewards: Sequence[np.ndarray], algorithm: AlgorithmConfig) -> list[np.ndarray]:
    """Returns the advantages of groups that may differ in size or be empty, by their rewards."""
    objective = objectives.resolve(algorithm)
    longest = max(map(len, rewards))
    padded = np.stack([np.pad(own, (0, longest - len(own)), constant_values=np.nan) for own in rewards])
    advantages = objectives.group_advantages(padded, objective.scale_rewards, objective.baseline)
    return [row[: len(own)] for row, own in zip(advantages, rewards, strict=True)]
