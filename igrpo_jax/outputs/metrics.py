"""The metrics of a rollout, computed with numpy from its scored groups: rewards, lengths, and what refining does.

Loss, entropy, timings and the health of the verifier are measured elsewhere, by the code that has them.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.records import VERDICTS, Completion, Group, same_answer


def rollout_metrics(groups: Sequence[Group], config: Config, changes: Sequence[np.ndarray] = ()) -> dict[str, float]:
    """Returns the metrics of one rollout by name. Those of a stage that did not run are absent, not zero.

    The trained completions have TRL's names: `reward`, `reward_std` (mean over groups of the std with ddof = 1),
    `frac_reward_zero_std`, `rewards/<name>/mean`, `completions/mean_length|min_length|max_length` (tokens, EOS
    included), `completions/clipped_ratio` (fraction that was cut at the length limit). With algorithm.group = "prompt",
    the groups of `reward_std` and `frac_reward_zero_std` include the drafts. Prompts without refinements are left out.
    With algorithm.second_stage = "verify" all of these describe the drafts, which are then the answers to the problems;
    the metrics under `draft/` that would repeat them are left out.

    The metrics of drafts are over the groups that have drafts: `draft/reward` and `draft/accuracy` (means),
    `draft/best_reward` (mean over groups of the best draft), `draft/solved_none|some|all` (fractions of groups by how
    many of their drafts are right), `draft/mean_length`, `draft/entropy` (the sampler's, mean over tokens).

    The metrics of refinements are over the groups whose context holds a draft, the kept draft: `draft/kept_reward`
    (mean reward of the kept drafts, which need not be the best ones), `refine/fixed|broken|kept_right|kept_wrong`
    (accuracy of the kept draft against that of each refinement), `refine/gain_vs_best_draft` (reward of a refinement
    minus that of the group's best draft), `refine/copy_ratio` (see `copy_ratio`), `refine/same_answer` (fraction that
    states the kept draft's answer in the same characters, whatever the reasoning), `refine/draft_truncated` (fraction
    of kept drafts that were cut to `refine.max_draft_length`).

    With verifications, the following replace the metrics of refinements, over the prompts that have verifications:
    `verify/prompts` (their number), `verify/accuracy` (fraction with the right verdict), `verify/accuracy_right|wrong`
    (the same over verifications of right and of wrong solutions), `verify/says_right` (fraction that states 1),
    `verify/mean_length`.

    "Right" is accuracy = 1. Without an accuracy reward the metrics that need one are absent. Means of rewards leave out
    NaN, the reward of a completion without a verdict; a mean over no value is NaN, which is written as null.

    Args:
        changes: what is added to the rewards of each group's refinements before advantages are computed, [G] each; none
            for nothing. Only `reward_std` and `frac_reward_zero_std` count it: they say what advantages come from.
    """
    refined = [group for group in groups if group.completions]
    is_verify = config.algorithm.second_stage == "verify"
    answered = [group.of_drafts for group in groups if group.drafts] if is_verify else refined
    samples = [sample for group in groups for sample in (*group.drafts, *group.completions)]
    with_accuracy = any("accuracy" in sample.score.rewards for sample in samples)
    added = [change for change, group in zip(changes, groups, strict=True) if group.completions] if changes else []
    metrics = _completion_metrics(answered, config, [] if is_verify else added) if answered else {}
    drafted = _draft_metrics([group.drafts for group in groups if group.drafts], with_accuracy)
    same = ("draft/reward", "draft/accuracy", "draft/mean_length") if is_verify else ()  # under TRL's names then
    metrics |= {name: value for name, value in drafted.items() if name not in same}
    shown = [group for group in refined if group.kept is not None]
    metrics |= _verify_metrics(shown) if is_verify else _refine_metrics(shown, with_accuracy, config.draft_limit)
    return {name: float(value) for name, value in metrics.items()}


def _completion_metrics(groups: Sequence[Group], config: Config, changes: Sequence[np.ndarray]) -> dict[str, Any]:
    """Returns the metrics of the completions of `groups`, each of which has some; `changes` as in `rollout_metrics`."""
    completions = [completion for group in groups for completion in group.completions]
    group_rewards = [
        np.array([completion.score.reward for completion in group.completions], np.float64) for group in groups
    ]
    compared = [own + change for own, change in zip(group_rewards, changes, strict=True)] if changes else group_rewards
    if config.algorithm.group == "prompt":
        pairs = zip(compared, groups, strict=True)
        compared = [np.concatenate([rewards, group.of_drafts.rewards]) for rewards, group in pairs]
    known = [rewards[~np.isnan(rewards)] for rewards in compared]
    lengths = np.array([len(completion.tokens) for completion in completions])
    metrics: dict[str, Any] = {
        "reward": _mean(np.concatenate(group_rewards)),
        "reward_std": _mean([rewards.std(ddof=1) if len(rewards) > 1 else 0.0 for rewards in known]),
        "frac_reward_zero_std": np.mean([len(rewards) < 2 or np.ptp(rewards) == 0 for rewards in known]),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": np.mean([not completion.finished for completion in completions]),
    }
    for name in sorted({name for completion in completions for name in completion.score.rewards}):
        metrics[f"rewards/{name}/mean"] = _mean([completion.score.of(name) for completion in completions])
    for name in config.rewards.custom_names:
        metrics[f"rewards/{name}/std"] = _std([completion.score.of(name) for completion in completions])
    for name in sorted({name for completion in completions for name in completion.score.logged}):
        values = [value for completion in completions for value in completion.score.logged.get(name, [])]
        metrics[f"custom/{name}"] = _mean(values)
    return metrics


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Returns the mean of the values that are not NaN; NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _std(values: Sequence[float]) -> float:
    """Returns the standard deviation (ddof = 1) of the values that are not NaN; NaN if there are fewer than two."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        return math.nan
    return float(np.std(known, ddof=1)) if np.ptp(known) else 0.0  # exact, where rounding would leave 1e-17


def _best(rewards: Sequence[float]) -> float:
    """Returns the highest reward that is not NaN; NaN if there is none."""
    return max((reward for reward in rewards if not math.isnan(reward)), default=math.nan)


def _draft_metrics(drafts: list[tuple[Completion, ...]], with_accuracy: bool) -> dict[str, float]:
    """Returns the metrics of the drafts, which are given by group."""
    if not drafts:
        return {}
    every = [draft for group in drafts for draft in group]
    metrics: dict[str, Any] = {
        "draft/reward": _mean([draft.score.reward for draft in every]),
        "draft/best_reward": _mean([_best([draft.score.reward for draft in group]) for group in drafts]),
        "draft/mean_length": np.mean([len(draft.tokens) for draft in every]),
        "draft/entropy": sum(draft.entropy for draft in every) / max(sum(len(draft.tokens) for draft in every), 1),
    }
    if with_accuracy:
        metrics["draft/accuracy"] = _mean([draft.score.of("accuracy") for draft in every])
        graded = [[draft.score for draft in group if not np.isnan(draft.score.reward)] for group in drafts]
        solved = [float(np.mean([score.is_right for score in scores])) for scores in graded if scores]
        metrics["draft/solved_none"] = _mean([fraction == 0 for fraction in solved])
        metrics["draft/solved_some"] = _mean([0 < fraction < 1 for fraction in solved])
        metrics["draft/solved_all"] = _mean([fraction == 1 for fraction in solved])
    return metrics


def _refine_metrics(groups: list[Group], with_accuracy: bool, max_draft_length: int) -> dict[str, float]:
    """Returns the metrics of the refinements of `groups`, whose contexts all hold a draft."""
    if not groups:
        return {}
    kept = [group.drafts[group.kept] for group in groups]
    pairs = [(draft, completion) for draft, group in zip(kept, groups, strict=True) for completion in group.completions]
    best_rewards = [_best([draft.score.reward for draft in group.drafts]) for group in groups]
    gain_vs_best_draft = [
        completion.score.reward - best_reward
        for best_reward, group in zip(best_rewards, groups, strict=True)
        for completion in group.completions
    ]
    metrics: dict[str, Any] = {
        "draft/kept_reward": _mean([draft.score.reward for draft in kept]),
        "refine/gain_vs_best_draft": _mean(gain_vs_best_draft),
        "refine/copy_ratio": np.mean([copy_ratio(content(draft), content(completion)) for draft, completion in pairs]),
        "refine/draft_truncated": np.mean([len(content(draft)) > max_draft_length for draft in kept]),
    }
    # A pair of which either has no verdict counts nowhere.
    moves = collections.Counter(
        (draft.score.is_right, completion.score.is_right)
        for draft, completion in pairs
        if not np.isnan(draft.score.reward + completion.score.reward)
    )
    if with_accuracy:
        metrics["refine/same_answer"] = np.mean(
            [same_answer(draft.score.extracted, completion.score.extracted) for draft, completion in pairs]
        )
    if with_accuracy and moves:
        metrics["refine/fixed"] = moves[False, True] / moves.total()
        metrics["refine/broken"] = moves[True, False] / moves.total()
        metrics["refine/kept_right"] = moves[True, True] / moves.total()
        metrics["refine/kept_wrong"] = moves[False, False] / moves.total()
    return metrics


def _verify_metrics(groups: list[Group]) -> dict[str, float]:
    """Returns the metrics of the verifications of `groups`; those over no verification are absent, but for a count."""
    metrics: dict[str, Any] = {"verify/prompts": len(groups)}
    pairs = [(group.drafts[group.kept].score.is_right, x) for group in groups for x in group.completions]
    known = [(is_right, x.score) for is_right, x in pairs if not math.isnan(x.score.reward)]
    if known:
        metrics["verify/accuracy"] = np.mean([score.is_right for _, score in known])
        metrics["verify/says_right"] = np.mean([score.extracted == VERDICTS[True] for _, score in known])
        metrics["verify/mean_length"] = np.mean([len(x.tokens) for _, x in pairs])
    for name, shown in (("right", True), ("wrong", False)):
        of_kind = [score.is_right for is_right, score in known if is_right == shown]
        if of_kind:
            metrics[f"verify/accuracy_{name}"] = np.mean(of_kind)
    return metrics


def copy_ratio(draft: np.ndarray, refinement: np.ndarray) -> float:
    """Returns the fraction of a refinement's tokens that it has in common with the draft, counted from both ends.

    It is (common prefix + common suffix of what is left) / length of the refinement: 1 for an identical text and for a
    draft from which one piece was cut out, 0 where both the first and the last token differ. It is a lower bound of
    what a full alignment would find, at the cost of two vector comparisons. An empty refinement counts as a copy of an
    empty draft only.

    Args:
        draft, refinement: [tokens], of any integer dtype.
    """
    if not len(refinement):
        return float(not len(draft))
    shorter = min(len(draft), len(refinement))
    prefix = _agreement(draft[:shorter], refinement[:shorter])
    left = shorter - prefix
    suffix = _agreement(draft[::-1][:left], refinement[::-1][:left])
    return (prefix + suffix) / len(refinement)


def _agreement(a: np.ndarray, b: np.ndarray) -> int:
    """Returns at how many leading positions two arrays of one length agree."""
    different = np.asarray(a) != np.asarray(b)
    return int(different.argmax()) if different.any() else len(different)


def content(completion: Completion) -> np.ndarray:
    """Returns the tokens of a completion without its EOS."""
    return completion.tokens[:-1] if completion.finished else completion.tokens
