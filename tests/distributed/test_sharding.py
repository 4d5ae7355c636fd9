"""The mesh and the axis table: parameters lie where the table says, and where they lie changes no number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_models import one_device, tiny_config

from igrpo_jax import config
from igrpo_jax.distributed import sharding, teams
from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder

TINY = tiny_config(vocab_size=48, hidden_size=16, intermediate_size=40, pattern="*-", max_position_embeddings=64)


def cube():
    return sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))


def test_the_suite_has_eight_devices():
    assert len(jax.devices()) >= 8, "set XLA_FLAGS=--xla_force_host_platform_device_count=8"


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1, -1, 1), (1, 8, 1)), ((-1, 2, 2), (2, 2, 2)), ((2, 1, -1), (2, 1, 4)), ((1, 4, 2), (1, 4, 2))],
)
def test_minus_one_is_the_rest_of_the_devices(sizes, expected):
    mesh = sharding.make_mesh(config.MeshConfig(*sizes), jax.devices()[:8])
    assert tuple(mesh.shape[axis] for axis in sharding.AXES) == expected
    assert sharding.batch_shards(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((3, -1, 1), "(3, -1, 1) (data, fsdp, tensor): 3 does not divide the 8 devices"),
        ((1, 16, 1), "16 does not divide the 8 devices"),
        ((1, 2, 2), "uses 4 of 8 devices; set one axis to -1"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices(sizes, said):
    with pytest.raises(InputError) as caught:
        sharding.make_mesh(config.MeshConfig(*sizes), jax.devices()[:8])
    assert str(caught.value).startswith("config.mesh = ")
    assert said in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip that is not there, as JAX and the mesh look at it."""

    id: int
    coords: tuple[int, int, int]
    process_index: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0


def chips(slices):
    """Slices of 2 x 2 x 2 chips on two hosts each, in an order in which the slices alternate."""
    places = [(x, y, z) for z in range(2) for y in range(2) for x in range(2)]
    return [
        Chip(8 * number + i, place, 2 * number + place[2], number)
        for i, place in enumerate(places)
        for number in reversed(range(slices))
    ]


@pytest.mark.parametrize("sizes", [(2, -1, 1), (2, 2, -1), (4, -1, 1), (-1, 4, 1)])
def test_only_the_axis_data_crosses_slices(sizes):
    mesh = sharding.make_mesh(config.MeshConfig(*sizes), chips(2))
    numbers = sharding.slice_of(mesh.devices)
    assert mesh.size == len(set(mesh.devices.flat)) == 16
    for number, own in enumerate(np.split(numbers, 2)):
        assert (own == number).all()
    alone = sharding.make_mesh(config.MeshConfig(*[mesh.shape["data"] // 2, *sizes[1:]]), chips(1))
    assert [device.coords for device in mesh.devices[-1:].flat] == [device.coords for device in alone.devices[-1:].flat]
    assert max(teams.tensors(mesh)) == 8


@pytest.mark.parametrize("sizes", [(1, -1, 1), (4, -1, 1), (-1, 1, 1), (1, -1, 4)])
def test_the_devices_of_a_host_come_one_after_another(sizes):
    """Of a slice of 4 x 4 chips, 2 x 2 on each host, which the order of the torus alone would scatter."""
    places = [(x, y, 0) for y in range(4) for x in range(4)]
    owner = lambda x, y, _: 2 * (y // 2) + x // 2
    hosts = [Chip(i, place, owner(*place), 0, device_kind="TPU v5 lite") for i, place in enumerate(places)]
    mesh = sharding.make_mesh(config.MeshConfig(*sizes), hosts)
    owners = sharding.owners(mesh.devices).reshape(4, 4)
    assert (owners == owners[:, :1]).all() and set(owners[:, 0]) == {0, 1, 2, 3}


def test_slices_that_do_not_divide_the_axis_data_are_refused():
    with pytest.raises(InputError, match=r"config\.mesh\.data = 1: must be a multiple of the 2 slices.*data to 2"):
        sharding.make_mesh(config.MeshConfig(), chips(2))
    gpus = [dataclasses.replace(chip, platform="gpu", device_kind="a GPU") for chip in chips(2)]
    assert sharding.make_mesh(config.MeshConfig(), gpus).shape["fsdp"] == 16  # weights may be split over nodes


def test_two_logical_axes_on_one_mesh_axis_are_an_error():
    for logical in (("heads", "ffn"), ("batch", "embed"), ("embed", "time", "embed")):
        with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
            sharding.spec(logical)
    assert sharding.spec(("batch", "time", "heads", None)) == PartitionSpec(("data", "fsdp"), None, "tensor", None)


@pytest.mark.slow
def test_parameters_lie_where_the_table_says():
    """By hand, of the sizes of TINY: embed 16 over fsdp = 2; heads 4, kv heads 2, ffn 40, vocab 48 over tensor = 2."""
    params = decoder.init(TINY, jax.random.key(0), cube())
    shards = {
        "embedding": (24, 8),
        "lm_head": (8, 24),
        "norm/scale": (16,),
        "blocks/0/norm/scale": (16,),
        "blocks/0/mixer/q_proj": (8, 2, 8),
        "blocks/0/mixer/k_proj": (8, 1, 8),
        "blocks/0/mixer/v_proj": (8, 1, 8),
        "blocks/0/mixer/o_proj": (2, 8, 8),
        "blocks/0/mixer/q_bias": (2, 8),
        "blocks/0/mixer/k_bias": (1, 8),
        "blocks/0/mixer/v_bias": (1, 8),
        "blocks/1/norm/scale": (16,),
        "blocks/1/mixer/gate_proj": (8, 20),
        "blocks/1/mixer/up_proj": (8, 20),
        "blocks/1/mixer/down_proj": (20, 8),
    }
    for path, shape in shards.items():
        assert {shard.data.shape for shard in params[path].addressable_shards} == {shape}, path
    assert set(params) == set(shards)


def test_gathered_weights_keep_the_tensor_axis_only():
    shapes = decoder.shapes(TINY)
    local = {p: sharding.param_sharding(cube(), p, gathered=True).shard_shape(shape) for p, shape in shapes.items()}
    assert local["blocks/0/mixer/q_proj"] == (16, 2, 8)
    assert local["blocks/1/mixer/down_proj"] == (20, 16)


@pytest.mark.slow
def test_logits_and_gradients_of_a_2x2x2_mesh_equal_those_of_one_device():
    tokens = np.random.default_rng(0).integers(0, 48, (8, 10), np.int32)
    positions = np.broadcast_to(np.arange(10, dtype=np.int32), tokens.shape)
    draw = np.random.default_rng(1).normal
    host = {path: draw(0.3, 0.3, shape).astype(np.float32) for path, shape in decoder.shapes(TINY).items()}

    def loss(params, tokens, positions):
        logits = decoder.logits(TINY, params, decoder.apply(TINY, params, tokens, positions, remat="full")[0])
        return jnp.mean(logits**2), logits

    def run(mesh):
        params = {path: sharding.to_global(x, sharding.param_sharding(mesh, path)) for path, x in host.items()}
        batch = sharding.to_global((tokens, positions), sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            out = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *batch)
        return sharding.to_host(out)

    (one_loss, one_logits), one = run(one_device())
    (cube_loss, cube_logits), many = run(cube())
    np.testing.assert_allclose(cube_logits, one_logits, atol=1e-5, rtol=0)
    np.testing.assert_allclose(cube_loss, one_loss, rtol=1e-5)
    for path in one:
        np.testing.assert_allclose(many[path], one[path], atol=1e-5 * np.abs(one[path]).max(), rtol=0, err_msg=path)


def test_constrain_holds_on_virtual_devices_and_is_idle_without_a_mesh():
    x = np.zeros((8, 3, 4), np.float32)
    assert sharding.constrain(x, "batch", "time", "heads") is x
    with jax.set_mesh(cube()):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", "time", "heads"))(x)
    assert y.addressable_shards[0].data.shape == (2, 3, 2)


def test_host_arrays_go_to_the_mesh_and_come_back():
    mesh = cube()
    tree = {"a": np.arange(48).reshape(8, 2, 3), "b": np.ones((4, 2), np.int32)}
    there = sharding.to_global(tree, sharding.batch_sharding(mesh))
    assert there["a"].addressable_shards[0].data.shape == (2, 2, 3)
    back = sharding.to_host(there)
    for name in tree:
        np.testing.assert_array_equal(back[name], tree[name])
    assert sharding.to_global(np.float32(1), sharding.replicated(mesh)).sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((1, 1, 8), "config.mesh.tensor = 8: does not divide the model's "),
        ((2, 1, 4), "config.mesh.tensor = 4: does not divide the model's kv_heads dimension of 2"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(sizes, said):
    mesh = sharding.make_mesh(config.MeshConfig(*sizes), jax.devices()[:8])
    with pytest.raises(InputError) as caught:
        sharding.check_divides(mesh, decoder.shapes(TINY))
    assert said in str(caught.value)
    sharding.check_divides(cube(), decoder.shapes(TINY))
