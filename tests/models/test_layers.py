"""Tests of the parts of a sublayer that have a gradient of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igrpo_jax.models.layers import rms_norm


def plain(x, scale, eps):
    """The definition, whose gradient is JAX's."""
    x32 = x.astype(jnp.float32)
    return (x32 / jnp.sqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)).astype(x.dtype) * scale


@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 5, 3, 8)])
@pytest.mark.parametrize(("dtype", "close"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_the_gradient_of_a_norm_is_that_of_its_definition(shape, dtype, close):
    """Also per head, and where eps is as large as the squares."""
    draw = np.random.default_rng(4).normal
    x, gradient = (jnp.asarray(0.1 * draw(size=shape), dtype) for _ in range(2))
    scale = jnp.asarray(draw(size=shape[-1:]), dtype)
    expected, of_expected = jax.vjp(lambda *args: plain(*args, 0.01), x, scale)
    found, of_found = jax.vjp(lambda *args: rms_norm(*args, 0.01), x, scale)
    for one, other in zip((found, *of_found(gradient)), (expected, *of_expected(gradient)), strict=True):
        assert one.dtype == other.dtype == dtype and one.shape == other.shape
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=close * np.abs(other).max(), rtol=0)
