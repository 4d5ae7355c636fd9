"""Which draft of a prompt is kept, when that is certain, and which prompts have a Stage 2. `stages` acts on it."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from igrpo_jax.config import AlgorithmConfig, RewardsConfig
from igrpo_jax.learning import filtering
from igrpo_jax.records import Completion

# Index of the draft to keep among the rewards [K] of those with a verdict; the first one where several are equal.
_SELECT: dict[str, Callable[[np.ndarray, np.random.Generator], int]] = {
    "best": lambda rewards, rng: int(np.argmax(rewards)),
    "worst": lambda rewards, rng: int(np.argmin(rewards)),
    "first": lambda rewards, rng: 0,
    "random": lambda rewards, rng: int(rng.integers(len(rewards))),
    "refined": lambda rewards, rng: int(np.argmax(rewards)),  # where nothing is refined yet
    "balanced": lambda rewards, rng: int(rng.integers(len(rewards))),  # among those that `select_draft` leaves
}


def select_draft(
    drafts: Sequence[Completion], selection: str, rng: np.random.Generator, metric: str = "reward"
) -> int | None:
    """Returns the index of the draft that q' shows, by algorithm.draft_selection; None if no draft has a verdict.

    Args:
        metric: what is compared (algorithm.draft_metric); a draft that lacks this reward has no verdict.
    """
    rewards = np.array([filtering.value(draft, metric) for draft in drafts])
    (known,) = np.nonzero(~np.isnan(rewards))
    if selection == "balanced":
        is_right = np.array([draft.score.is_right for draft in drafts])[known]
        wanted = is_right == (rng.random() < 0.5)
        known = known[wanted] if wanted.any() else known
    return int(known[_SELECT[selection](rewards[known], rng)]) if len(known) else None


def largest_value(rewards: RewardsConfig, metric: str) -> float:
    """Returns the largest value of `metric` that a draft can have; infinite where no bound is known.

    Args:
        metric: as in `select_draft`. Rewards of your own have no bound, and neither has a sum in which they count.
    """
    if metric == "reward":
        return math.inf if any(rewards.custom_weights.values()) else rewards.largest
    return 1.0 if metric in {"accuracy", "format", "judge"}.difference(rewards.custom_names) else math.inf


def best_is_known(drafts: Mapping[int, Completion], metric: str, largest: float) -> bool:
    """Returns whether the best draft is certain although others may be still to come: one has the largest possible
    value, and all before it are scored. Of several that are equally good the first one is the best.

    Args:
        drafts: those that are scored, by their number.
        metric: what is compared, as in `select_draft`.
        largest: what `largest_value` returns for `metric`.
    """
    in_order = itertools.takewhile(drafts.__contains__, itertools.count())
    return any(filtering.value(drafts[number], metric) >= largest for number in in_order)  # NaN is not a success


def is_solved(drafts: Collection[Completion], algorithm: AlgorithmConfig) -> bool:
    """Returns whether a prompt has as many right drafts as algorithm.solved_fraction asks for, of N; at least one.

    Args:
        drafts: those that are scored; one without a verdict is not right.
    """
    right = sum(draft.score.is_right for draft in drafts)
    return right > 0 and right >= algorithm.solved_fraction * algorithm.num_drafts


def needs_verification(drafts: Collection[Completion]) -> bool:
    """Returns whether algorithm.second_stage = "verify" verifies a prompt.

    It does where, of the prompt's drafts with a verdict, some are right and some are wrong. Self-Verification
    (2506.01369) gives all other prompts the weight 0.
    """
    return len({draft.score.is_right for draft in drafts if not np.isnan(draft.score.reward)}) == 2
