"""The loss: one weighted sum over tokens for all objectives, and its gradient for one micro-batch.

    loss = - sum over rows i, tokens t of  w_it (min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) - beta k3_it)
           - entropy_coef / (tokens) sum over the same of  H_it

r is the ratio of the policy to pi_old and A the advantage; k3 = u - log u - 1 with u = pi_ref / pi is the KL
estimate, non-negative and unbiased under samples of pi; H is the policy's entropy at a token, whose mean over tokens is
the bonus. Dual clip replaces the first r by min(r, delta). `objectives` has what differs between objectives, such as A
and w. Weights are normalised over the whole optimizer step, so that micro-batches simply add.

A departure from iGRPO, off by default: for tokens that were sampled from another context (algorithm.refine_credit =
"plain"), p / (p + gamma) A replaces the min, where p is pi of the token: the shaping of Critique-GRPO (2506.03106),
without any clip. Its gradient is gamma p / (p + gamma)^2 A times that of log pi, which is largest at p = gamma.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igrpo_jax.learning.forward import PolicyLogprobs
from igrpo_jax.learning.objectives import ResolvedObjective
from igrpo_jax.learning.packing import TrainBatch
from igrpo_jax.models import decoder

MAX_LOG_RATIO = 20.0  # exp of more is noise, and inf * 0 is NaN


def loss(objective: ResolvedObjective, tokens: "TokenValues") -> "LossSums":
    """Returns the objective on some tokens, to be minimised. Its gradient per token is Eq. 29 of arXiv 2602.09000."""
    log_ratio = objective.functions.log_ratio(tokens.logprob - tokens.old, tokens.mask, tokens.row)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    advantage = tokens.advantage
    too_low = (ratio < 1 - objective.epsilon) & (advantage < 0)
    too_high = (ratio > 1 + objective.epsilon_high) & (advantage > 0)
    # The min of both products, but without ties: at a tie, such as a ratio of 1 with epsilon = 0, jnp.minimum would
    # halve the gradient.
    clipped_ratio = jnp.clip(ratio, 1 - objective.epsilon, 1 + objective.epsilon_high)
    value = jnp.where(too_low | too_high, clipped_ratio, jnp.minimum(ratio, objective.delta)) * advantage
    if tokens.shaped is not None:
        shaped = jax.nn.sigmoid(tokens.logprob - jnp.log(objective.credit_gamma))  # p / (p + gamma)
        value = jnp.where(tokens.shaped, shaped * advantage, value)
    if tokens.correction is not None:
        value = value * tokens.correction
    k3 = jnp.zeros_like(value)
    if tokens.reference is not None:
        log_u = jnp.clip(tokens.reference - tokens.logprob, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        k3 = jnp.exp(log_u) - log_u - 1
        value = value - objective.beta * k3
    counted = tokens.weight > 0
    if tokens.shaped is not None:
        too_low, too_high = too_low & ~tokens.shaped, too_high & ~tokens.shaped

    def total(x: jax.Array | float) -> jax.Array:
        return jnp.sum(jnp.where(counted, x, 0.0))

    bonus = 0.0 if tokens.entropy is None else total(tokens.entropy_weight * tokens.entropy)
    return LossSums(
        loss=-total(tokens.weight * value) - bonus,
        clipped=total((too_low | too_high) * (tokens.weight if objective.functions.by_row else 1.0)),
        kl=total(k3),
        ratio=total(ratio),
        tokens=total(1.0),
    )


class TokenValues(NamedTuple):
    """What the loss reads of each token of S packed sequences, in which the tokens of many completions stand."""

    logprob: jax.Array  # [S, F] float32, log pi
    old: jax.Array  # [S, F] float32, log pi_old
    reference: jax.Array | None  # [S, F] float32, log pi_ref; None where beta = 0
    advantage: jax.Array  # [S, F] float32, of the token's completion
    weight: jax.Array  # [S, F] float32 from `row_weights`, 0 off the completions; such tokens contribute nothing
    mask: jax.Array  # [S, F] bool, the tokens of completions
    row: jax.Array  # [S, F] int32, a number of the token's completion in its packed sequence, at most 2 F
    correction: jax.Array | None = None  # [S, F] float32, importance weights against the sampler; None = 1
    entropy: jax.Array | None = None  # [S, F] float32, in nats, with its gradient; None where entropy_coef = 0
    entropy_weight: jax.Array | None = None  # [S, F] float32 from `entropy_weights`
    shaped: jax.Array | None = None  # [S, F] bool, tokens of another context; None where credit_gamma = 0


class LossSums(NamedTuple):
    """Sums over the tokens given; every field adds over micro-batches."""

    loss: jax.Array  # [] float32
    # [] float32, number of tokens whose ratio is in the clipped region; where rows are counted (`Objective.by_row`) the
    # sum of the weights of these tokens, which is the fraction of clipped rows among all rows of the optimizer step.
    clipped: jax.Array
    kl: jax.Array  # [] float32, sum of k3 over tokens
    ratio: jax.Array  # [] float32, sum of ratios over tokens
    tokens: jax.Array  # [] float32, number of tokens with weight


class MicroBatchSums(NamedTuple):
    """Sums over the completion tokens with weight of micro-batches; all [] float32."""

    loss_sums: LossSums
    entropy: jax.Array  # in nats
    tokens: jax.Array  # number of completion tokens, those without weight too
    mismatch: jax.Array  # sum of |log pi_old - the sampler's log-prob|
    largest_mismatch: jax.Array  # the largest |log pi_old - the sampler's log-prob|

    @classmethod
    def zeros(cls) -> "MicroBatchSums":
        """Returns sums of zero, to which those of micro-batches are added."""
        zero = jnp.float32(0)
        return cls(LossSums(*[zero] * len(LossSums._fields)), zero, zero, zero, zero)

    def add(self, other: "MicroBatchSums") -> "MicroBatchSums":
        """Returns the sums of both."""
        largest = jnp.maximum(self.largest_mismatch, other.largest_mismatch)
        return jax.tree.map(jnp.add, self, other)._replace(largest_mismatch=largest)


@dataclass(frozen=True)
class LossSettings:
    """The settings that the loss of a micro-batch is compiled with."""

    objective: ResolvedObjective
    policy: PolicyLogprobs
    on_policy: bool  # one optimizer step per update: pi_old is the policy itself
    correction_cap: float  # largest importance weight of a token against its sampler; 0 = no correction


def accumulate(
    settings: LossSettings,
    params: decoder.Params,
    grads: decoder.Params,
    sums: MicroBatchSums,
    batch: TrainBatch,
    frozen: decoder.Params,
) -> tuple[decoder.Params, MicroBatchSums]:
    """Returns `grads` and `sums` with those of one micro-batch added, in float32."""
    loss_of = partial(microbatch_loss, settings)
    (_, batch_sums), batch_grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch, frozen)
    sums = sums.add(batch_sums)
    return jax.tree.map(jnp.add, grads, batch_grads), sums


def microbatch_loss(
    settings: LossSettings, params: decoder.Params, batch: TrainBatch, frozen: decoder.Params
) -> tuple[jax.Array, MicroBatchSums]:
    """Returns a micro-batch's part of the loss of an optimizer step, and its sums; `frozen` is what LoRA adapts."""
    objective, mask = settings.objective, batch.mask
    has_bonus = objective.entropy_coef > 0
    logprob, entropy = (
        jnp.where(mask, x, 0.0) for x in settings.policy(params, batch, frozen, entropy_gradient=has_bonus)
    )
    old = jax.lax.stop_gradient(logprob) if settings.on_policy else batch.old_logprob
    drift = jnp.where(mask, jax.lax.stop_gradient(old) - batch.sampler_logprob, 0.0)
    cap = settings.correction_cap
    correction = jnp.minimum(jnp.exp(jnp.minimum(drift, MAX_LOG_RATIO)), cap) if cap else None
    tokens = TokenValues(
        logprob=logprob,
        old=old,
        reference=batch.reference_logprob if objective.beta > 0 else None,
        advantage=batch.advantage,
        weight=batch.weight,
        mask=mask,
        row=batch.segments.segment,
        correction=correction,
        entropy=entropy if has_bonus else None,
        entropy_weight=batch.entropy_weight if has_bonus else None,
        shaped=batch.shaped,
    )
    loss_sums = loss(objective, tokens)
    counted = batch.weight > 0  # no row that was cut, where such rows carry no loss
    mismatch = jnp.where(counted, jnp.abs(drift), 0.0)
    sums = MicroBatchSums(
        loss_sums=loss_sums,
        entropy=jnp.sum(jnp.where(counted, entropy, 0.0)),
        tokens=jnp.sum(mask, dtype=jnp.float32),
        mismatch=jnp.sum(mismatch),
        largest_mismatch=jnp.max(mismatch),
    )
    return loss_sums.loss, sums
