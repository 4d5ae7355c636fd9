"""The embedding and the head, brought to the sampler's mesh some rows at a time."""

import jax
import numpy as np
import pytest

from igrpo_jax.config import MeshConfig
from igrpo_jax.distributed import sharding, teams
from igrpo_jax.distributed.programs import tree_bytes
from igrpo_jax.sampling.row_sync import RowSync

SHAPES = {"embedding": (1664, 512), "lm_head": (512, 1664)}
# data, fsdp and tensor of the training, and the devices of a group of the sampler
MESHES = [
    ((1, 8, 1), 4),
    ((1, 8, 1), 8),
    ((1, 4, 2), 4),
    ((2, 4, 1), 2),
    ((2, 2, 2), 8),
    ((2, 4, 1), 8),
    ((1, 4, 2), 1),
]


def sync_of(path: str, shape: tuple[int, int], sizes: tuple[int, int, int], group: int, pieces: int) -> RowSync:
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    copy = sharding.param_sharding(teams.sampler_mesh(mesh, group), path, gathered=True)
    return RowSync(path, shape, mesh, copy, "bfloat16", pieces)


def trained(path: str, shape: tuple[int, int], sizes: tuple[int, int, int]) -> jax.ShapeDtypeStruct:
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    return jax.ShapeDtypeStruct(shape, "float32", sharding=sharding.param_sharding(mesh, path))


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize(("sizes", "group"), MESHES)
def test_the_copy_has_every_row(path, sizes, group):
    """Three pieces divide a block unevenly, so that the last one covers rows of the one before."""
    shape = SHAPES[path]
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    copied = sync_of(path, shape, sizes, group, 3)(jax.device_put(values, trained(path, shape, sizes).sharding))
    np.testing.assert_array_equal(copied, values.astype(copied.dtype))
    mesh = teams.sampler_mesh(sharding.make_mesh(MeshConfig(*sizes)), group)
    assert copied.sharding.is_equivalent_to(sharding.param_sharding(mesh, path, gathered=True), 2)


@pytest.mark.parametrize("path", SHAPES)
def test_a_piece_is_exchanged_within_groups_and_filled_in_where_the_copy_lies(path):
    sizes, shape, group = (1, 8, 1), SHAPES[path], 4
    program, calls, held = sync_of(path, shape, sizes, group, 4).program(trained(path, shape, sizes))
    compiled = program.compile(path)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text.count(" all-to-all(") == 1 and text.count(" all-gather(") == 1
    copy = held - tree_bytes(trained(path, shape, sizes))
    assert calls == 4 and memory.alias_size_in_bytes == copy
