"""The matrix products of a decode step alone, on the engine's own weights: what a step of it takes beside them."""

import functools

import models


def ratio(bench, repeats: int = 10) -> dict[str, float]:
    """Returns the seconds of a decode step of all slots, those of its products alone, and their ratio.

    Both run the steps of a dispatch in one loop on the device, in turns, and the median of the ratios is taken.

    Args:
        bench: a `rollout.Bench` on one device.
    """
    import jax
    import jax.numpy as jnp
    import rollout

    engine, cfg = bench.engine, bench.model
    rows, steps = engine.shard_slots, engine.sizes.steps_per_dispatch
    filled = rollout.Filled(engine, bench.params, bench.prompts[0], rows)
    reads = engine.programs.reads[rows]
    read = next(size for size in reads if size >= engine.sizes.max_context + steps)

    @functools.partial(jax.jit, donate_argnums=1)
    def products(params, x):
        return jax.lax.fori_loop(0, steps, lambda i, x: _once(cfg, params, x), x)

    def alone():
        x = jnp.full((rows, 1, cfg.hidden_size), 0.01, engine.dtype)
        return models.timed(lambda: jax.block_until_ready(products(bench.params, x + 0)), 1)[0] / steps

    filled.step_seconds(read)
    pairs = [(filled.step_seconds(read), alone()) for _ in range(repeats)]
    whole, part = (models.median([pair[i] for pair in pairs]) for i in (0, 1))
    over = models.median([step / product for step, product in pairs])
    return {"step_seconds": whole, "products_seconds": part, "step_over_products": round(over, 3)}


def _once(cfg, params, x):
    """Returns [B, 1, D] from x [B, 1, D] after all products of one step, each of which needs the one before."""
    import jax.numpy as jnp

    from igrpo_jax.models import decoder

    for number, kind in enumerate(cfg.pattern):
        weight = lambda name, number=number: params[f"blocks/{number}/mixer/{name}_proj"]
        if kind == "*":
            q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, weight(name)) for name in "qkv")
            mixed = q + jnp.repeat(k + v, q.shape[2] // k.shape[2], axis=2)
            x = x + 1e-3 * jnp.einsum("BTNH,NHD->BTD", mixed, weight("o"))
        else:
            hidden = sum(jnp.einsum("BTD,DF->BTF", x, weight(name)) for name in ("gate", "up"))
            x = x + 1e-3 * jnp.einsum("BTF,FD->BTD", hidden, weight("down"))
    logits = decoder.logits(cfg, params, x[:, 0])
    return (0.5 * x + 1e-3 * logits[:, None, : x.shape[2]]).astype(x.dtype)
