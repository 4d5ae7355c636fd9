"""Tests of sums of several arrays in one pass."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import sums

WAYS = {
    "of this platform": sums.sums,
    "of CPUs": lambda *parts: sums._together(parts, 1),
    "of accelerators": sums._apart,
}


@pytest.mark.parametrize("shape", [(6, 256), (3, 2, 128), (6, 100), (5, 1)])
@pytest.mark.parametrize("way", WAYS)
def test_each_part_has_its_own_sum(way, shape):
    """Also where the last axis is not a multiple of what is summed at once."""
    parts = np.random.default_rng(2).normal(size=(3, *shape)).astype(np.float32)
    found = jax.jit(WAYS[way])(*parts)
    assert len(found) == 3
    np.testing.assert_allclose(found, parts.sum(axis=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [512, 384])
def test_a_split_axis_is_not_gathered(size):
    """Devices exchange sums alone, also where an axis that is whole on one device is not on two."""
    mesh = sharding.make_mesh(config.MeshConfig(data=1, tensor=2), jax.devices()[:2])
    place = jax.NamedSharding(mesh, PartitionSpec(None, "tensor"))
    parts = [jax.device_put(x, place) for x in np.random.default_rng(2).normal(size=(2, 4, size)).astype(np.float32)]
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(sums.sums, shards=2)).lower(*parts).compile()
    assert f"f32[4,{size}]" not in program.as_text() and f"f32[4,{size // 2}]" in program.as_text()
    np.testing.assert_allclose(program(*parts), np.sum(parts, axis=-1), atol=1e-5, rtol=0)
