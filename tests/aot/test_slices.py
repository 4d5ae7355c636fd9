"""A team's chips, described as a slice of their own: libtpu aborts the process where it gets them as a part of one."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from igrpo_jax import config
from igrpo_jax.aot import slices
from igrpo_jax.distributed import sharding, teams
from igrpo_jax.errors import InputError

pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
pytestmark = pytest.mark.usefixtures("environment")


def team_mesh(name, tensor):
    """Returns the part of the sampler's mesh that process 0 samples on, and the whole of it."""
    whole = teams.sampler_mesh(sharding.make_mesh(config.MeshConfig(), slices.topology(name)), tensor)
    return teams.team_mesh(whole, teams.team_of(whole)), whole


@pytest.mark.parametrize(
    ("name", "tensor", "size"),
    [("v6e:4x4", 4, 4), ("v5e:4x4", 2, 4), ("v5e:4x4", 8, 8), ("v5p:2x2x4", 8, 8), ("v5p:4x4x4", 4, 4)],
)
def test_a_team_is_described_by_itself(name, tensor, size):
    team, whole = team_mesh(name, tensor)
    own = slices.alone(team)
    assert (team.size, own.shape, own.axis_names) == (size, team.shape, whole.axis_names)
    assert sorted(device.id for device in own.devices.flat) == list(range(size))
    places = lambda mesh: np.array([device.coords for device in mesh.devices.flat])
    np.testing.assert_array_equal(places(own), places(team) - places(team).min(0))
    processes = lambda mesh: np.unique([device.process_index for device in mesh.devices.flat], return_inverse=True)[1]
    np.testing.assert_array_equal(processes(own), processes(team))


def test_chips_that_fill_no_box_stay_as_they_are():
    mesh = sharding.make_mesh(config.MeshConfig(), slices.topology("v5e:2x2"))
    some = jax.sharding.Mesh(mesh.devices.reshape(-1)[:3].reshape(3, 1, 1), mesh.axis_names)
    assert slices.alone(some) is some


@pytest.mark.parametrize(
    ("largest", "larger"),
    [("v5e:16x16", "v5e:16x20"), ("v6e:16x16", "v6e:16x20"), ("v4:16x16x16", "v4:16x16x20"),
     ("v5p:16x20x28", "v5p:16x24x24")],
)  # fmt: skip
def test_the_largest_slices(largest, larger):
    slices.check(largest)
    with pytest.raises(InputError, match=f"--topology {larger}: .* has at most"):
        slices.check(larger)


def test_nothing_is_read_from_a_cache_of_programs(tmp_path, monkeypatch):
    """What is compiled for a slice that is not here can be written there, and not read: JAX would warn."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    code = (
        "from igrpo_jax.aot import slices; device = slices.topology('v5e:1x1')[0]; import jax; "
        "one = jax.sharding.SingleDeviceSharding(device); x = jax.ShapeDtypeStruct((8, 128), 'float32', sharding=one); "
        "jax.jit(lambda x: x + 1).lower(x).compile()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "programs").exists()


def test_what_a_team_exchanges_is_compiled():
    team, _ = team_mesh("v6e:4x4", 4)
    own = slices.alone(team)
    assert [device.id for device in team.devices.flat] != list(range(4))
    split, whole = (NamedSharding(own, PartitionSpec(*axes)) for axes in (("tensor",), ()))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=split)
    assert "all-gather" in jax.jit(lambda x: 2 * x, out_shardings=whole).lower(x).compile().as_text()
