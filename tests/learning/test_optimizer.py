"""The optimizer and its learning rate, against numbers derived by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from igrpo_jax import config
from igrpo_jax.learning.optimizer import make_optimizer


def test_the_learning_rate():
    """Peak 1e-3, 10 steps, of which 2 rise: half, all, then a cosine to a tenth: at step 6 halfway, 5.5e-4."""
    settings = config.OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.2, min_lr_ratio=0.1)
    _, schedule = make_optimizer(settings, 10)
    expected = {0: 5e-4, 1: 1e-3, 2: 1e-3, 4: 1e-4 + 9e-4 * (2 + np.sqrt(2)) / 4, 6: 5.5e-4, 10: 1e-4, 99: 1e-4}
    for step, rate in expected.items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(rate, rel=1e-5), step
    flat = make_optimizer(config.OptimizerConfig(learning_rate=2e-3, warmup_ratio=0.0, min_lr_ratio=1.0), 10)[1]
    assert {float(flat(jnp.int32(step))) for step in range(12)} == {np.float32(2e-3)}
    one = make_optimizer(config.OptimizerConfig(learning_rate=2e-3, warmup_ratio=1.0), 1)[1]
    assert float(one(jnp.int32(0))) == pytest.approx(2e-3)  # a run of one step learns at the peak


def test_the_schedule_is_what_the_optimizer_uses():
    """Adam moves a lone parameter by the learning rate while its gradient stays the same."""
    settings = config.OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.5, min_lr_ratio=0.1, weight_decay=0.0)
    optimizer, schedule = make_optimizer(settings, 4)
    params = {"q_proj": jnp.ones((1,))}
    state = optimizer.init(params)
    for step in range(5):
        updates, state = optimizer.update({"q_proj": jnp.full((1,), 0.3)}, state, params)
        assert float(updates["q_proj"][0]) == pytest.approx(-float(schedule(jnp.int32(step))), rel=1e-4)
