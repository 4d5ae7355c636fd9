"""The optimizer: AdamW behind a global-norm clip, with a linear warm-up and then a cosine."""

import optax

from igrpo_jax.config import OptimizerConfig
from igrpo_jax.models import decoder


def make_optimizer(
    config: OptimizerConfig, total_optimizer_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of a run of `total_optimizer_steps`, and the learning rate by the number of steps made."""
    schedule = make_schedule(config, total_optimizer_steps)

    def decays(params: decoder.Params) -> dict[str, bool]:
        return {path: not path.endswith(("scale", "_bias", "a_log", "skip")) for path in params}

    adamw = optax.adamw(
        schedule,
        config.b1,
        config.b2,
        weight_decay=config.weight_decay,
        mask=decays,
        mu_dtype=config.mu_dtype,
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw), schedule


def make_schedule(config: OptimizerConfig, total_optimizer_steps: int) -> optax.Schedule:
    """Returns the learning rate by the number of optimizer steps made: a linear warm-up, then a cosine down to
    min_lr_ratio of the peak."""
    warmup = min(round(config.warmup_ratio * total_optimizer_steps), max(total_optimizer_steps - 1, 0))
    peak = config.learning_rate
    # The warm-up begins above 0 and reaches the peak at its last step, so that the first step already learns.
    rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    falling = optax.cosine_decay_schedule(peak, max(total_optimizer_steps - warmup, 1), alpha=config.min_lr_ratio)
    return optax.join_schedules([rising, falling], [warmup])
