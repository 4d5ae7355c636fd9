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
from collections.abc import Callable, Sequence
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
    if algorithm.group == "prompt":
        joint = _joint(groups, config)
        counts = [len(group.completions) for group in groups]
        refined = [own[:count] for count, own in zip(counts, joint, strict=True)]
        return Advantages(refined, [own[count:] for count, own in zip(counts, joint, strict=True)])
    rewards_of = lambda chosen: trained_rewards(chosen, config)
    refined = _advantages_where(groups, [bool(group.completions) for group in groups], rewards_of, algorithm)
    refined = [own * _has_credit(group, algorithm) for group, own in zip(groups, refined, strict=True)]
    if "draft" not in algorithm.trained_stages:
        return Advantages(refined, [])
    rewards_of = lambda chosen: filtering.rewards_after_filtering([group.of_drafts for group in chosen], config)
    drafted = _advantages_where(groups, [bool(group.drafts) for group in groups], rewards_of, algorithm)
    return Advantages(refined, drafted)


def trained_rewards(groups: Sequence[Group], config: Config) -> np.ndarray:
    """Returns the rewards of refinements that advantages are made of, [P, G] float32; NaN without a verdict."""
    return filtering.rewards_after_filtering(groups, config) + reward_changes(groups, config.algorithm)


def reward_metrics(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """Returns `refine/reward_change`, the mean of what is added to the rewards of refinements; {} if nothing is."""
    algorithm, refined = config.algorithm, [group for group in groups if group.completions]
    if not refined or not (algorithm.improvement_bonus or algorithm.repeat_penalty):
        return {}
    changes = np.ma.masked_invalid(reward_changes(refined, algorithm))  # NaN without a verdict
    return {"refine/reward_change": float(changes.mean()) if changes.count() else math.nan}


def reward_changes(groups: Sequence[Group], algorithm: AlgorithmConfig) -> np.ndarray:
    """Returns what is added to the rewards of refinements, [P, G] float32; 0 if no draft was shown."""
    changes = np.zeros((len(groups), len(groups[0].completions)), np.float32)
    for change, group in zip(changes, groups, strict=True):
        if group.kept is None:
            continue
        draft = group.drafts[group.kept].score
        answers = [completion.score.extracted for completion in group.completions]
        repeats = [not draft.is_right and same_answer(draft.extracted, answer) for answer in answers]
        change += algorithm.improvement_bonus * (group.rewards - np.float32(draft.reward))
        change -= algorithm.repeat_penalty * np.array(repeats, np.float32)
    return changes


def _joint(groups: Sequence[Group], config: Config) -> list[np.ndarray]:
    """Returns the advantages of the refinements and then the drafts of each group, with one baseline, [G + N]."""
    rewards = []
    for group in groups:
        refined = trained_rewards([group], config)[0] if group.completions else group.rewards
        rewards.append(np.concatenate([refined, group.of_drafts.rewards]))
    credited = [
        np.concatenate([_has_credit(group, config.algorithm), np.ones(len(group.drafts), bool)]) for group in groups
    ]
    grouped = _ragged_group_advantages(rewards, config.algorithm)
    return [advantages * mask for advantages, mask in zip(grouped, credited, strict=True)]


def _has_credit(group: Group, algorithm: AlgorithmConfig) -> np.ndarray:
    """Returns which refinements of a group are trained on, [G] bool: all, or those that are right or saw no draft."""
    if algorithm.refine_credit == "context" or algorithm.credit_completions == "all" or group.kept is None:
        return np.ones(len(group.completions), bool)
    return np.array([completion.score.is_right for completion in group.completions], bool)


def _advantages_where(
    groups: Sequence[Group],
    keep: Sequence[bool],
    rewards_of: Callable[[list[Group]], np.ndarray],
    algorithm: AlgorithmConfig,
) -> list[np.ndarray]:
    """Returns the advantages of the groups to `keep`, and an empty float32 array for each of the others.

    Args:
        rewards_of: returns the rewards of the groups that are kept, which have one size.
    """
    kept = [i for i, is_kept in enumerate(keep) if is_kept]
    advantages = [np.zeros(0, np.float32) for _ in groups]
    if kept:
        rewards = rewards_of([groups[i] for i in kept])
        for i, own in zip(kept, _ragged_group_advantages(list(rewards), algorithm), strict=True):
            advantages[i] = own
    return advantages


def _ragged_group_advantages(rewards: Sequence[np.ndarray], algorithm: AlgorithmConfig) -> list[np.ndarray]:
    """Returns the advantages of groups that may differ in size, by their rewards."""
    objective = objectives.resolve(algorithm)
    longest = max(len(own) for own in rewards)
    padded = np.stack([np.pad(own, (0, longest - len(own)), constant_values=np.nan) for own in rewards])
    advantages = objectives.group_advantages(padded, objective.scale_rewards, objective.baseline)
    return [row[: len(own)] for row, own in zip(advantages, rewards, strict=True)]
