"""The objectives, side by side: each is a record of pure functions, and the loss is one weighted sum for all of them.

    loss = - sum over rows i, tokens t of  w_it (min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) - beta k3_it)
           - entropy_coef / (tokens) sum over the same of  H_it

1. Advantages (Eq. 1 of arXiv 2602.09000): rewards of one group, less their mean, over their std. The baseline may be
   the mean of the others (RLOO), the scale that of the batch, or none.
2. Token weights w: computed once on all rows of an optimizer step, so that micro-batches simply add.
3. Ratio r: per token, or per sequence (GSPO). Dual clip puts min(r, delta) in the place of the first r.
4. k3 = rho - log rho - 1 with rho = pi_ref / pi: the KL estimate, non-negative and unbiased under samples of pi.
5. H: the entropy of the policy at a token, whose mean over tokens is the bonus.

Not here: the draft stage, which changes the prompt and not the objective; DAPO's dynamic sampling, which changes the
groups (`rollout`); its soft over-long penalty, which is a reward (`rewards/format`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igrpo_jax.config import AlgorithmConfig
from igrpo_jax.errors import InputError

ADVANTAGE_EPSILON = 1e-4  # delta of Eq. 1, TRL's value
MAX_LOG_RATIO = 20.0  # exp of more is noise, and inf * 0 is NaN


class Loss(NamedTuple):
    """Sums over the rows given; every field adds over micro-batches."""

    loss: jax.Array  # [] float32
    clipped: jax.Array  # [] float32, number of tokens whose ratio is in the clipped region
    kl: jax.Array  # [] float32, sum of k3 over tokens
    ratio: jax.Array  # [] float32, sum of ratios over tokens
    tokens: jax.Array  # [] float32, number of tokens with weight


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """Whether the rewards of each group differ, [P] bool; rewards [P, G] float32, NaN where there is no verdict."""
    known = np.ma.masked_invalid(rewards)
    return (known.max(axis=1) != known.min(axis=1)).filled(False)


def group_advantages(rewards: np.ndarray, scale: str, baseline: str = "mean") -> np.ndarray:
    """Group-relative advantages.

    Args:
        rewards: [P, G] float32; NaN where there is no verdict.
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


def _sequence_token_log_ratio(logprob: jax.Array, old: jax.Array, mask: jax.Array) -> jax.Array:
    """That mean in value, the token's own log-prob in gradient (Eq. 14 of 2507.18071).

    With one advantage for all tokens of a row it is the same as GSPO; weights of single tokens stay with their tokens.
    """
    mean = _sequence_log_ratio(logprob, old, mask)
    return jax.lax.stop_gradient(mean) + (logprob - jax.lax.stop_gradient(logprob))


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
    "gspo_token": Objective(_sequence_mean, _sequence_token_log_ratio, epsilon=3e-4, epsilon_high=4e-4),
}


@dataclass(frozen=True)
class Resolved:
    """An objective with the configuration's choices applied."""

    objective: Objective
    epsilon: float
    epsilon_high: float
    delta: float  # upper bound of the ratio where A < 0; infinite = none
    scale_rewards: str
    baseline: str
    beta: float
    entropy_coef: float
    mask_truncated: bool

    @property
    def needs_advantage(self) -> bool:
        """Whether the advantage is all that gives a gradient: without it rows need no backward pass."""
        return self.beta == 0 and self.entropy_coef == 0


def resolve(settings: AlgorithmConfig) -> Resolved:
    """The configured objective; None in `settings` means the objective's own value.

    Raises:
        InputError: delta is within the clip range, where it would change the loss of A > 0 too.
    """
    own = OBJECTIVES[settings.loss_type]
    low = own.epsilon if settings.epsilon is None else settings.epsilon
    high = own.epsilon_high if settings.epsilon is None else low
    high = high if settings.epsilon_high is None else settings.epsilon_high
    delta = math.inf if settings.delta is None else settings.delta
    if delta <= 1 + high:
        raise InputError(f"config.algorithm.delta = {delta:g}: must be above 1 + epsilon_high = {1 + high:g}")
    return Resolved(
        objective=own,
        epsilon=low,
        epsilon_high=high,
        delta=delta,
        scale_rewards=settings.scale_rewards or own.scale_rewards,
        baseline=settings.baseline,
        beta=settings.beta,
        entropy_coef=settings.entropy_coef,
        mask_truncated=settings.mask_truncated_completions,
    )


def _counted(r: Resolved, lengths: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """Tokens [R] that carry loss: with mask_truncated none of a row that was cut."""
    return np.where(finished, lengths, 0) if r.mask_truncated else lengths


def row_weights(r: Resolved, lengths: np.ndarray, finished: np.ndarray, budget: int) -> np.ndarray:
    """Weight [R] float32 of each token of each row, computed over all rows of one optimizer step.

    Args:
        lengths: [R] int, completion tokens. With mask_truncated rows that were cut count as 0 tokens and weigh 0.
        finished: [R] bool, ended by EOS.
        budget: L_max, the generation budget in tokens.
    """
    counted = _counted(r, lengths, finished)
    return np.where(counted > 0, r.objective.row_weight(counted, budget), 0.0).astype(np.float32)


def entropy_weights(r: Resolved, lengths: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """Weight [R] float32 of each token's entropy: entropy_coef over all tokens that carry loss, as TRL has it.

    Args as in `row_weights`. The mean is over tokens whatever the objective, so that the coefficient means the same.
    """
    counted = _counted(r, lengths, finished)
    return np.where(counted > 0, r.entropy_coef * _token_mean(counted, 0), 0.0).astype(np.float32)


def loss(
    r: Resolved,
    logprob: jax.Array,
    old: jax.Array,
    reference: jax.Array | None,
    advantage: jax.Array,
    weight: jax.Array,
    mask: jax.Array,
    correction: jax.Array | None = None,
    entropy: jax.Array | None = None,
    entropy_weight: jax.Array | None = None,
) -> Loss:
    """The objective on some rows, to be minimised. Its gradient per token is Eq. 29 of the paper.

    Args:
        logprob, old, reference: [R, T] float32 log-probs under pi, pi_old and pi_ref (None where beta = 0).
        advantage: [R] float32.
        weight: [R, T] float32 from `row_weights`, 0 off the completion; tokens of weight 0 contribute nothing.
        mask: [R, T] bool, the tokens of each completion.
        correction: [R, T] float32, importance weights of the tokens against their sampler; None = 1.
        entropy: [R, T] float32, of the policy in nats, with its gradient; None where entropy_coef = 0.
        entropy_weight: [R] float32 from `entropy_weights`.
    """
    log_ratio = r.objective.log_ratio(logprob, old, mask)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    gain = advantage[:, None]
    clipped_ratio = jnp.clip(ratio, 1 - r.epsilon, 1 + r.epsilon_high)
    value = jnp.minimum(jnp.minimum(ratio, r.delta) * gain, clipped_ratio * gain)
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

    bonus = 0.0 if entropy is None else total(entropy_weight[:, None] * entropy)
    return Loss(-total(weight * value) - bonus, total(outside), total(k3), total(ratio), total(1.0))
