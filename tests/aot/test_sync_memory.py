"""Large matrices come to the sampler's mesh with little beside them on a TPU, however it lays them out."""

import jax
import pytest

from igrpo_jax.aot.slices import topology
from igrpo_jax.config import MeshConfig
from igrpo_jax.distributed import sharding, teams
from igrpo_jax.sampling.row_sync import RowSync

pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.parametrize("columns", [8 * 19_008, 8 * 18_944])  # 148.5 and 148 tiles of 128 for each device
def test_a_head_is_filled_in_where_it_lies(columns):
    mesh = sharding.make_mesh(MeshConfig(), topology("v5p:2x2x2"))
    copy = sharding.param_sharding(teams.sampler_mesh(mesh, 8), "lm_head", gathered=True)
    shape, pieces = (1024, columns), 8
    sync = RowSync("lm_head", shape, mesh, copy, "bfloat16", pieces)
    x = jax.ShapeDtypeStruct(shape, "float32", sharding=sharding.param_sharding(mesh, "lm_head"))
    memory = sync.program(x).program.lower("lm_head").compile().memory_analysis()
    result = 2 * shape[0] * columns / 8
    assert memory.alias_size_in_bytes >= result
    assert memory.temp_size_in_bytes < 2.5 * result / pieces
