"""The objectives side by side: each is a record of pure functions, from which `loss` computes its one loss.

1. Advantages (Eq. 1 of arXiv 2602.09000): rewards of one group, less their mean, over their std. The baseline may be
   the mean of the others (RLOO), the scale that of the batch, or none.
2. Token weights: computed once on all rows of an optimizer step, so that micro-batches simply add.
3. Ratio of the policy to pi_old: per token, or per sequence (GSPO).

What is not here: the draft stage, which changes the prompt and not the objective; DAPO's dynamic sampling, which
changes the groups (`rollout`); its soft over-long penalty, which is a reward (`rewards/format`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from igrpo_jax.config import AlgorithmConfig
from igrpo_jax.errors import InputError

ADVANTAGE_EPSILON = 1e-4  # delta of Eq. 1, TRL's value


@dataclass(frozen=True)
class Objective:
    """One objective. Its clips and scale are the defaults of its paper; the configuration overrides them."""

    row_weight: Callable[[np.ndarray, int], np.ndarray]  # (lengths [R], L_max) -> weight of each token of a row [R]
    # (log pi - log pi_old, mask, number of the token's row), all [S, F] -> [S, F]
    log_ratio: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    scale_rewards: str = "group"
    # All tokens of a row have one ratio; clipped rows are counted instead of tokens, as in TRL. The weights of a row
    # must add up to 1 / rows.
    by_row: bool = False


def _sequence_mean(lengths: np.ndarray, max_completion: int) -> np.ndarray:
    """Returns 1 / (rows |o_i|): the mean over rows of the mean over tokens."""
    return 1.0 / (len(lengths) * np.maximum(lengths, 1))


def _constant(lengths: np.ndarray, max_completion: int) -> np.ndarray:
    """Returns 1 / (rows L_max): long completions are not discounted (2503.20783)."""
    return np.full(len(lengths), 1.0 / (len(lengths) * max_completion))


def _token_mean(lengths: np.ndarray, max_completion: int) -> np.ndarray:
    """Returns 1 / (all tokens): every token of the batch counts the same (2503.14476)."""
    return np.full(len(lengths), 1.0 / max(lengths.sum(), 1))


def _token_log_ratio(difference: jax.Array, mask: jax.Array, row: jax.Array) -> jax.Array:
    return difference


def _sequence_log_ratio(difference: jax.Array, mask: jax.Array, row: jax.Array) -> jax.Array:
    """Returns the mean over the tokens of a row, the same at each of them (2507.18071)."""

    def of_sequence(difference, mask, row):
        rows = 2 * row.shape[0] + 1  # no sequence has more segments, because only prefixes may be empty; 0 is padding
        total = jax.ops.segment_sum(jnp.where(mask, difference, 0.0), row, rows)
        return (total / jnp.maximum(jax.ops.segment_sum(mask.astype(jnp.float32), row, rows), 1))[row]

    return jax.vmap(of_sequence)(difference, mask, row)


def _sequence_token_log_ratio(difference: jax.Array, mask: jax.Array, row: jax.Array) -> jax.Array:
    """Returns the sequence mean in value, with the gradient of the token's own log-prob (Eq. 14 of 2507.18071).

    With one advantage for all tokens of a row it equals GSPO; advantages or weights that differ between tokens act on
    their own tokens.
    """
    mean = _sequence_log_ratio(difference, mask, row)
    return jax.lax.stop_gradient(mean) + (difference - jax.lax.stop_gradient(difference))


OBJECTIVES = {
    "grpo": Objective(_sequence_mean, _token_log_ratio),
    "dr_grpo": Objective(_constant, _token_log_ratio, scale_rewards="none"),
    "dapo": Objective(_token_mean, _token_log_ratio, epsilon_high=0.28),
    "gspo": Objective(_sequence_mean, _sequence_log_ratio, epsilon=3e-4, epsilon_high=4e-4, by_row=True),
    "gspo_token": Objective(_sequence_mean, _sequence_token_log_ratio, epsilon=3e-4, epsilon_high=4e-4, by_row=True),
}


@dataclass(frozen=True)
class ResolvedObjective:
    """An objective with the configuration's choices applied."""

    functions: Objective
    epsilon: float
    epsilon_high: float
    delta: float  # upper bound of the ratio where A < 0; infinite = none
    scale_rewards: str
    baseline: str
    beta: float
    entropy_coef: float
    mask_truncated: bool
    plain_credit: bool = False  # refinements are scored and trained on after the plain prompt
    credit_gamma: float = 0.0  # gamma of p / (p + gamma), which replaces the clipped ratio of refinements; 0 = off

    @property
    def needs_advantage(self) -> bool:
        """Whether a row with an advantage of 0 has no gradient, and so needs no backward pass."""
        return self.beta == 0 and self.entropy_coef == 0


def resolve(config: AlgorithmConfig) -> ResolvedObjective:
    """Returns the configured objective; None in `config` means the objective's own value.

    Raises:
        InputError: delta is within the clip range, where it would change the loss of A > 0 too.
    """
    own = OBJECTIVES[config.loss_type]
    low = own.epsilon if config.epsilon is None else config.epsilon
    high = own.epsilon_high if config.epsilon is None else low
    high = high if config.epsilon_high is None else config.epsilon_high
    delta = math.inf if config.delta is None else config.delta
    if config.delta is not None and delta <= 1 + high:
        raise InputError(f"config.algorithm.delta = {delta:g}: must be above 1 + epsilon_high = {1 + high:g}")
    return ResolvedObjective(
        functions=own,
        epsilon=low,
        epsilon_high=high,
        delta=delta,
        scale_rewards=config.scale_rewards or own.scale_rewards,
        baseline=config.baseline,
        beta=config.beta,
        entropy_coef=config.entropy_coef,
        mask_truncated=config.mask_truncated_completions,
        plain_credit=config.refine_credit == "plain",
        credit_gamma=config.credit_gamma if config.refine_credit == "plain" else 0.0,
    )


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """Returns whether the rewards of each group differ, [P] bool; rewards are [P, G] float32, NaN without a verdict."""
    values = np.asarray(rewards, np.float64)  # a user's reward may be an integer
    known = np.isfinite(values)
    return values.max(1, where=known, initial=-np.inf) > values.min(1, where=known, initial=np.inf)


def group_advantages(rewards: np.ndarray, scale: str, baseline: str = "mean") -> np.ndarray:
    """Returns group-relative advantages.

    Args:
        rewards: [P, G] float32; NaN if there is no verdict.
        scale: divide by the std (ddof = 1) of each "group", of the whole "batch", or by nothing ("none").
        baseline: subtract the "mean" of the group, or "leave_one_out": the mean of its other completions, unbiased
            where the scale is "none" (RLOO, 2402.14740). What comes out is G / (G - 1) times as large.

    Returns:
        [P, G] float32; exactly 0 in groups whose rewards are all equal, and where there is no verdict.
    """
    known = np.ma.masked_invalid(rewards)
    centred = known - known.mean(axis=1, keepdims=True)
    if baseline == "leave_one_out":
        count = known.count(axis=1)[:, None]
        centred = centred * (count / np.maximum(count - 1, 1))
    if scale == "group":
        centred = centred / (known.std(axis=1, ddof=1, keepdims=True) + ADVANTAGE_EPSILON)
    elif scale == "batch":
        centred = centred / (known.std(ddof=1) + ADVANTAGE_EPSILON)
    return np.where(has_signal(rewards)[:, None], centred.filled(0.0), 0.0).astype(np.float32)


def row_weights(
    objective: ResolvedObjective, lengths: np.ndarray, finished: np.ndarray, max_completion: int
) -> np.ndarray:
    """Returns the weight [R] float32 of each token of each row, computed over all rows of one optimizer step.

    Args:
        lengths: [R] int, completion tokens. With mask_truncated, truncated rows count as 0 tokens and have weight 0.
        finished: [R] bool, ended by EOS.
        max_completion: L_max, the tokens of the longest completion.
    """
    counted = _counted(objective, lengths, finished)
    return np.where(counted > 0, objective.functions.row_weight(counted, max_completion), 0.0).astype(np.float32)


def entropy_weights(objective: ResolvedObjective, lengths: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """Returns the weight [R] float32 of each token's entropy: entropy_coef over all tokens that carry loss, as in TRL.

    The arguments are those of `row_weights`. The mean is over tokens whatever the objective, so that the coefficient
    means the same.
    """
    counted = _counted(objective, lengths, finished)
    return np.where(counted > 0, objective.entropy_coef * _token_mean(counted, 0), 0.0).astype(np.float32)


def _counted(objective: ResolvedObjective, lengths: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """Returns the tokens [R] that carry loss: with mask_truncated none of a truncated row."""
    return np.where(finished, lengths, 0) if objective.mask_truncated else lengths
