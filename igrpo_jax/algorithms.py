"""The objectives, side by side: each is a record of pure functions, and the loss is one weighted sum for all of them.

    loss = - sum over rows i, tokens t of  w_it (min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) - beta k3_it)

1. Advantages (Eq. 1 of arXiv 2602.09000): rewards of one group, less their mean, over their std.
2. Token weights w: computed once on all rows of an optimizer step, so that micro-batches simply add.
3. Ratio r: per token, or per sequence (GSPO).
4. k3 = rho - log rho - 1 with rho = pi_ref / pi: the KL estimate, non-negative and unbiased under samples of pi.

The draft stage is not here: it changes the prompt, not the objective.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igrpo_jax import config

ADVANTAGE_EPSILON = 1e-4  # delta of Eq. 1, TRL's value
MAX_LOG_RATIO = 20.0  # exp of more is noise, and inf * 0 is NaN


class Loss(NamedTuple):
    """Sums over the rows given; every field adds over micro-batches."""

    loss: jax.Array  # [] float32
    clipped: jax.Array  # [] float32, number of tokens whose ratio is in the clipped region
    kl: jax.Array  # [] float32, sum of k3 over tokens
    ratio: jax.Array  # [] float32, sum of ratios over tokens
    tokens: jax.Array  # [] float32, number of tokens with weight


def advantages(rewards: np.ndarray, scale: str) -> np.ndarray:
    """Group-relative advantages.

    Args:
        rewards: [P, G] float32; NaN where there is no verdict.
        scale: divide by the std (ddof = 1) of each "group", of the whole "batch", or by nothing ("none").

    Returns:
        [P, G] float32; exactly 0 in groups whose rewards are all equal, and where there is no verdict.
    """
    known = np.ma.masked_invalid(rewards)
    centred = known - known.mean(axis=1, keepdims=True)
    if scale == "group":
        centred = centred / (known.std(axis=1, ddof=1, keepdims=True) + ADVANTAGE_EPSILON)
    elif scale == "batch":
        centred = centred / (known.std(ddof=1) + ADVANTAGE_EPSILON)
    equal = (known.max(axis=1, keepdims=True) == known.min(axis=1, keepdims=True)).filled(True)
    return np.where(equal, 0.0, centred.filled(0.0)).astype(np.float32)


def _sequence_mean(lengths: np.ndarray, budget: int) -> np.ndarray:
    """1 / (rows |o_i|): the mean over rows of the mean over tokens."""
    return 1.0 / (len(lengths) * np.maximum(lengths, 1))


def _constant(lengths: np.ndarray, budget: int) -> np.ndarray:
    """1 / (rows L_max): long completions are not discounted (2503.20783)."""
    return np.full(len(lengths), 1.0 / (len(lengths) * budget))


def _token_mean(lengths: np.ndarray, budget: int) -> np.ndarray:
    """1 / (all tokens): every token of the batch counts the same (2503.14476)."""
    return np.full(len(lengths), 1.0 / max(lengths.sum(), 1))


def _token_log_ratio(logprob: jax.Array, old: jax.Array, mask: jax.Array) -> jax.Array:
    return logprob - old


def _sequence_log_ratio(logprob: jax.Array, old: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over a row's tokens, the same at each of them (2507.18071)."""
    total = jnp.sum((logprob - old) * mask, axis=-1, keepdims=True)
    mean = total / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
    return jnp.broadcast_to(mean, logprob.shape)


@dataclass(frozen=True)
class Objective:
    """One objective. Clips and scale are its own paper's and give way to the configuration."""

    row_weight: Callable[[np.ndarray, int], np.ndarray]  # (lengths [R], L_max) -> weight of each token of a row [R]
    log_ratio: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (logprob, old, mask), all [R, T] -> [R, T]
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    scale_rewards: str = "group"


OBJECTIVES = {
    "grpo": Objective(_sequence_mean, _token_log_ratio),
    "dr_grpo": Objective(_constant, _token_log_ratio, scale_rewards="none"),
    "dapo": Objective(_token_mean, _token_log_ratio, epsilon_high=0.28),
    "gspo": Objective(_sequence_mean, _sequence_log_ratio, epsilon=3e-4, epsilon_high=4e-4),
}


@dataclass(frozen=True)
class Resolved:
    """An objective with the configuration's choices applied."""

    objective: Objective
    epsilon: float
    epsilon_high: float
    scale_rewards: str
    beta: float
    mask_truncated: bool


def resolve(settings: config.Algorithm) -> Resolved:
    """The configured objective; None in `settings` means the objective's own value."""
    own = OBJECTIVES[settings.loss_type]
    low = own.epsilon if settings.epsilon is None else settings.epsilon
    high = own.epsilon_high if settings.epsilon is None else low
    return Resolved(
        objective=own,
        epsilon=low,
        epsilon_high=high if settings.epsilon_high is None else settings.epsilon_high,
        scale_rewards=settings.scale_rewards or own.scale_rewards,
        beta=settings.beta,
        mask_truncated=settings.mask_truncated_completions,
    )


def row_weights(r: Resolved, lengths: np.ndarray, finished: np.ndarray, budget: int) -> np.ndarray:
    """Weight [R] float32 of each token of each row, computed over all rows of one optimizer step.

    Args:
        lengths: [R] int, completion tokens. With mask_truncated rows that were cut count as 0 tokens and weigh 0.
        finished: [R] bool, ended by EOS.
        budget: L_max, the generation budget in tokens.
    """
    counted = np.where(finished, lengths, 0) if r.mask_truncated else lengths
    return np.where(counted > 0, r.objective.row_weight(counted, budget), 0.0).astype(np.float32)


def loss(
    r: Resolved,
    logprob: jax.Array,
    old: jax.Array,
    reference: jax.Array | None,
    advantage: jax.Array,
    weight: jax.Array,
    mask: jax.Array,
    correction: jax.Array | None = None,
) -> Loss:
    """The objective on some rows, to be minimised. Its gradient per token is Eq. 29 of the paper.

    Args:
        logprob, old, reference: [R, T] float32 log-probs under pi, pi_old and pi_ref (None where beta = 0).
        advantage: [R] float32.
        weight: [R, T] float32 from `row_weights`, 0 off the completion; tokens of weight 0 contribute nothing.
        mask: [R, T] bool, the tokens of each completion.
        correction: [R, T] float32, importance weights of the tokens against their sampler; None = 1.
    """
    log_ratio = r.objective.log_ratio(logprob, old, mask)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    gain = advantage[:, None]
    clipped_ratio = jnp.clip(ratio, 1 - r.epsilon, 1 + r.epsilon_high)
    value = jnp.minimum(ratio * gain, clipped_ratio * gain)
    if correction is not None:
        value = value * correction
    k3 = jnp.zeros_like(value)
    if reference is not None:
        log_rho = jnp.clip(reference - logprob, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        k3 = jnp.exp(log_rho) - log_rho - 1
        value = value - r.beta * k3
    counted = weight > 0
    outside = ((ratio < 1 - r.epsilon) & (gain < 0)) | ((ratio > 1 + r.epsilon_high) & (gain > 0))

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counted, x, 0.0))

    return Loss(-total(weight * value), total(outside), total(k3), total(ratio), total(1.0))
