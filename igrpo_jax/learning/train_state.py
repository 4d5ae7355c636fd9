"""The state that training carries, and the optimizer step on it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from igrpo_jax.learning.loss import MicroBatchSums
from igrpo_jax.models import decoder

Trained = tuple[decoder.Params, optax.OptState]


class TrainState(NamedTuple):
    """All that training carries from step to step, on the mesh."""

    params: decoder.Params  # float32 master weights, with LoRA only its adapters
    opt_state: optax.OptState
    step: jax.Array  # [] int32, optimizer steps tried, skipped ones included
    skipped: jax.Array  # [] int32, optimizer steps that changed nothing, because loss or gradient was not finite


def apply(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    grads: decoder.Params,
    sums: dict[str, MicroBatchSums],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one optimizer step, and its metrics.

    Where the loss or the gradient's norm is not finite, parameters and moments stay as they are.
    """
    norm = optax.global_norm(grads)
    # Where the norm is finite, the step is finite too: AdamW and Muon divide by their own moments and an epsilon,
    # Adafactor by means of squares of at least 1e-30. A check of the step itself would keep all of it in memory.
    finite = jnp.isfinite(sum(stage_sums.loss_sums.loss for stage_sums in sums.values())) & jnp.isfinite(norm)

    def step(params: decoder.Params, opt_state: optax.OptState) -> Trained:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    old = state.params, state.opt_state
    params, opt_state = jax.lax.platform_dependent(
        cpu=partial(_branch, finite, step, old), default=partial(_select, finite, step, old)
    )
    skipped = state.skipped + (~finite).astype(jnp.int32)
    metrics = {
        "grad_norm": norm,
        "learning_rate": schedule(state.step - state.skipped),  # Adam counts the steps made
        "nonfinite_steps": skipped,
    }
    return TrainState(params, opt_state, state.step + 1, skipped), metrics


def _branch(finite: jax.Array, step: Callable[..., Trained], old: Trained) -> Trained:
    """Returns `step(*old)` if `finite`, else `old`; with `where` XLA's CPU compiler would copy the moments first."""
    return jax.lax.cond(finite, step, lambda *unchanged: unchanged, *old)


def _select(finite: jax.Array, step: Callable[..., Trained], old: Trained) -> Trained:
    """Returns `step(*old)` if `finite`, else `old`; `cond` would take more memory on a TPU."""
    return jax.tree.map(partial(jnp.where, finite), step(*old), old)
