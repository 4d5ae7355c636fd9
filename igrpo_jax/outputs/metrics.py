"""What a run leaves in files: the numbers of a rollout, `metrics.jsonl` (and trackers), and `samples/*.jsonl`.

`rollout_metrics` is pure numpy over finished groups. `Writer` owns the files and what a resume does to them.
Loss, entropy, timings and the verifier's health come from those who know them; nothing here computes them.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.records import Completion, Group


def rollout_metrics(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """Metrics of one rollout, from its scored groups. Keys of a stage that did not run are absent, not zero.

    Trained completions, under TRL's names: `reward`, `reward_std` (mean over groups of the std with ddof = 1),
    `frac_reward_zero_std`, `rewards/<name>/mean`, `completions/mean_length|min_length|max_length` (tokens, EOS
    included), `completions/clipped_ratio` (share cut at the length limit).

    Drafts, over groups that have some: `draft/reward` and `draft/accuracy` (means), `draft/best_reward` (mean over
    groups of the best), `draft/kept_reward` (mean of the one that q' shows, which algorithm.draft_selection may choose
    otherwise), `draft/solved_none|some|all` (shares of groups by how many of the drafts drawn are right),
    `draft/mean_length`.

    Refinements, over groups whose context holds a draft: `refine/fixed|broken|kept_right|kept_wrong` (accuracy of the
    kept draft against that of each refinement), `refine/gain_vs_best_draft` (reward), `refine/copy_ratio` (see
    `copy_ratio`), `refine/same_answer` (share that state the kept draft's answer, in the same characters, by whatever
    reasoning), `refine/draft_truncated` (share of kept drafts cut to `refine.max_draft_length`).

    "Right" is accuracy = 1. Without an accuracy reward the keys that need one are absent. Completions without a verdict
    (reward NaN) are left out of means; a mean over none is NaN, which is written as null.
    """
    completions = [completion for group in groups for completion in group.completions]
    if not completions:
        return {}
    group_rewards = [
        np.array([completion.score.reward for completion in group.completions], np.float64) for group in groups
    ]
    known = [rewards[~np.isnan(rewards)] for rewards in group_rewards]
    lengths = np.array([len(completion.tokens) for completion in completions])
    metrics = {
        "reward": _mean(np.concatenate(group_rewards)),
        "reward_std": _mean([rewards.std(ddof=1) if len(rewards) > 1 else 0.0 for rewards in known]),
        "frac_reward_zero_std": np.mean([len(rewards) < 2 or np.ptp(rewards) == 0 for rewards in known]),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": np.mean([not completion.finished for completion in completions]),
    }
    for name in sorted({name for completion in completions for name in completion.score.rewards}):
        metrics[f"rewards/{name}/mean"] = _mean(
            [completion.score.rewards.get(name, np.nan) for completion in completions]
        )
    with_accuracy = "rewards/accuracy/mean" in metrics
    metrics |= _draft_metrics([group.drafts for group in groups if group.drafts], with_accuracy)
    refined = [group for group in groups if group.best is not None]
    metrics |= _refine_metrics(refined, with_accuracy, config.draft_limit)
    return {name: float(value) for name, value in metrics.items()}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _best(rewards: Sequence[float]) -> float:
    return max((reward for reward in rewards if not math.isnan(reward)), default=math.nan)


def _draft_metrics(drafts: list[tuple[Completion, ...]], with_accuracy: bool) -> dict[str, float]:
    if not drafts:
        return {}
    every = [draft for group in drafts for draft in group]
    metrics = {
        "draft/reward": _mean([draft.score.reward for draft in every]),
        "draft/best_reward": _mean([_best([draft.score.reward for draft in group]) for group in drafts]),
        "draft/mean_length": np.mean([len(draft.tokens) for draft in every]),
    }
    if with_accuracy:
        metrics["draft/accuracy"] = np.mean([draft.score.rewards.get("accuracy", 0.0) for draft in every])
        solved = [np.mean([_right(draft) for draft in group]) for group in drafts]
        metrics["draft/solved_none"] = np.mean([share == 0 for share in solved])
        metrics["draft/solved_some"] = np.mean([0 < share < 1 for share in solved])
        metrics["draft/solved_all"] = np.mean([share == 1 for share in solved])
    return metrics


def _refine_metrics(groups: list[Group], with_accuracy: bool, max_draft_length: int) -> dict[str, float]:
    if not groups:
        return {}
    kept = [group.drafts[group.best] for group in groups]
    pairs = [(draft, completion) for draft, group in zip(kept, groups, strict=True) for completion in group.completions]
    best = [_best([draft.score.reward for draft in group.drafts]) for group in groups]
    gains = [
        completion.score.reward - reward
        for reward, group in zip(best, groups, strict=True)
        for completion in group.completions
    ]
    metrics = {
        "draft/kept_reward": _mean([draft.score.reward for draft in kept]),
        "refine/gain_vs_best_draft": _mean(gains),
        "refine/copy_ratio": np.mean(
            [copy_ratio(_content(draft), _content(completion)) for draft, completion in pairs]
        ),
        "refine/draft_truncated": np.mean([len(_content(draft)) > max_draft_length for draft in kept]),
    }
    if with_accuracy:
        metrics["refine/same_answer"] = np.mean(
            [same_answer(d.score.extracted, completion.score.extracted) for d, completion in pairs]
        )
        moves = collections.Counter((_right(draft), _right(completion)) for draft, completion in pairs)
        metrics["refine/fixed"] = moves[False, True] / len(pairs)
        metrics["refine/broken"] = moves[True, False] / len(pairs)
        metrics["refine/kept_right"] = moves[True, True] / len(pairs)
        metrics["refine/kept_wrong"] = moves[False, False] / len(pairs)
    return metrics


def copy_ratio(draft: np.ndarray, refinement: np.ndarray) -> float:
    """Share of a refinement's tokens that it shares with the draft, counted from both ends.

    (common prefix + common suffix of what is left) / length of the refinement: 1 for an identical text, for a draft cut
    anywhere in one piece, 0 where the first and the last token differ. A lower bound of what a full alignment would
    find, at the cost of two vector comparisons. An empty refinement counts as a copy of an empty draft only.
    """
    if not len(refinement):
        return float(not len(draft))
    shorter = min(len(draft), len(refinement))
    prefix = _agreement(draft[:shorter], refinement[:shorter])
    left = shorter - prefix
    suffix = _agreement(draft[::-1][:left], refinement[::-1][:left])
    return (prefix + suffix) / len(refinement)


def same_answer(draft: str | None, refinement: str | None) -> bool:
    """Whether both texts state an answer, and the same one."""
    return draft is not None and draft == refinement


def _agreement(a: np.ndarray, b: np.ndarray) -> int:
    """Leading positions at which two arrays of one length agree."""
    different = np.asarray(a) != np.asarray(b)
    return int(different.argmax()) if different.any() else len(different)


def _content(completion: Completion) -> np.ndarray:
    return completion.tokens[:-1] if completion.finished else completion.tokens


def _right(completion: Completion) -> bool:
    return completion.score.rewards.get("accuracy", 0.0) >= 1.0
