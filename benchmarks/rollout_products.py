"""The matrix products of a decode step alone, on the engine's own weights: what a step of it takes beside them."""

import functools

import models


def ratios(bench, repeats: int = 10) -> dict[str, float]:
    """Returns the seconds of a decode step of all slots, those of its products alone, and their ratio.

    All run the steps of a dispatch in one loop on the device, in turns, and the median of the ratios is taken. The
    products are also timed with the weights as they are trained: on CPUs the engine's lie by outputs.

    Args:
        bench: a `rollout.Bench` on one device.
    """
    import jax
    import jax.numpy as jnp
    import rollout

    from igrpo_jax.models.products import as_trained

    engine, cfg = bench.engine, bench.cfg
    rows, steps = engine.shard_slots, engine.sizes.steps_per_dispatch
    filled = rollout.Filled(engine, bench.params, bench.prompts[0], rows)

    @functools.partial(jax.jit, donate_argnums=1)
    def products(params, x):
        return jax.lax.fori_loop(0, steps, lambda i, x: _once(cfg, params, x), x)

    def alone(params):
        x = jnp.full((rows, 1, cfg.hidden_size), 0.01, engine.dtype)
        return models.timed(lambda: jax.block_until_ready(products(params, x + 0)), 1)[0] / steps

    plain = {path: as_trained(path, weight) for path, weight in bench.params.items()}
    filled.step_seconds()
    timed = [(filled.step_seconds(), alone(bench.params), alone(plain)) for _ in range(repeats)]
    whole, own, trained = (models.median([seconds[i] for seconds in timed]) for i in range(3))
    over = lambda i: round(models.median([seconds[0] / seconds[i] for seconds in timed]), 3)
    return {
        "step_seconds": whole,
        "products_seconds": own,
        "step_over_products": over(1),
        "plain_products_seconds": trained,
        "step_over_plain_products": over(2),
    }


def _once(cfg, params, x):
    """Returns [B, 1, D] from x [B, 1, D] after all products of one step, each of which needs the one before."""
    import jax.numpy as jnp
    from flax import nnx

    from igrpo_jax.models import decoder
    from igrpo_jax.models.products import product

    for number, kind in enumerate(cfg.pattern):
        weight = lambda name, number=number: nnx.Param(params[f"blocks/{number}/mixer/{name}_proj"])
        if kind == "*":
            q, k, v = (product("BTD,DNH->BTNH", x, weight(name)) for name in "qkv")
            mixed = q + jnp.repeat(k + v, q.shape[2] // k.shape[2], axis=2)
            x = x + 1e-3 * product("BTNH,NHD->BTD", mixed, weight("o"))
        else:
            hidden = sum(product("BTD,DF->BTF", x, weight(name)) for name in ("gate", "up"))
            x = x + 1e-3 * product("BTF,FD->BTD", hidden, weight("down"))
    logits = decoder.logits(cfg, params, x[:, 0])
    return (0.5 * x + 1e-3 * logits[:, None, : x.shape[2]]).astype(x.dtype)
