"""The mesh, one table from logical axes to mesh axes, and the way from host arrays to global ones and back.

Mesh axes: `data` (replicas), `fsdp` (weights and batch sharded), `tensor` (heads, ffn and vocabulary sharded). The
batch is split over `data` and `fsdp` together. All axes are Auto: the compiler places the collectives.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from igrpo_jax.config import MeshConfig
from igrpo_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")

RULES = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # of weights
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "groups": "tensor",  # of Mamba-2
    "state": None,
    "width": None,
    "time": None,
    "features": None,  # of activations: the batch already uses fsdp
}

# Logical axes of every parameter, by the last part of its path.
PARAMS = {
    "embedding": ("vocab", "embed"),
    "lm_head": ("embed", "vocab"),
    "q_proj": ("embed", "heads", "head_dim"),
    "k_proj": ("embed", "kv_heads", "head_dim"),
    "v_proj": ("embed", "kv_heads", "head_dim"),
    "o_proj": ("heads", "head_dim", "embed"),
    "q_bias": ("heads", "head_dim"),
    "k_bias": ("kv_heads", "head_dim"),
    "v_bias": ("kv_heads", "head_dim"),
    "gate_proj": ("embed", "ffn"),
    "up_proj": ("embed", "ffn"),
    "down_proj": ("ffn", "embed"),
    "scale": ("features",),
    # Of Mamba-2, beside o_proj; x, z and dt are per head, B and C per group.
    "x_proj": ("embed", "heads", "head_dim"),
    "z_proj": ("embed", "heads", "head_dim"),
    "b_proj": ("embed", "groups", "state"),
    "c_proj": ("embed", "groups", "state"),
    "dt_proj": ("embed", "heads"),
    "x_conv": ("width", "heads", "head_dim"),
    "b_conv": ("width", "groups", "state"),
    "c_conv": ("width", "groups", "state"),
    "x_conv_bias": ("heads", "head_dim"),
    "b_conv_bias": ("groups", "state"),
    "c_conv_bias": ("groups", "state"),
    "dt_bias": ("heads",),
    "a_log": ("heads",),
    "skip": ("heads",),
    "gated_scale": ("heads", "head_dim"),
}


def make_mesh(settings: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """Mesh over `devices` (default: all), with the one size of -1 filled in.

    Neighbours in the mesh are neighbours in the torus of a TPU slice. Where that would tear the part of a process to
    pieces, which samples on its own devices, the devices of a process stay together instead.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [settings.data, settings.fsdp, settings.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed:
        raise InputError(
            f"config.mesh = {tuple(sizes)} (data, fsdp, tensor): {fixed} does not divide the {len(devices)} devices"
        )
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"config.mesh = {tuple(sizes)} (data, fsdp, tensor): uses {math.prod(sizes)} of {len(devices)} devices; "
            "set one axis to -1 (the rest of the devices)"
        )
    return jax.sharding.Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(sizes: list[int], devices: list) -> np.ndarray:
    """`devices` as an array of these sizes (data, fsdp, tensor)."""
    whole = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    owners = _owners(whole)
    processes, each = np.unique(owners, return_counts=True)
    data, fsdp, tensor = sizes
    if all(_box(owners == process) for process in processes) or set(each % tensor) != {0} or len(set(each)) != 1:
        return whole
    inner_fsdp = math.gcd(fsdp, each[0] // tensor)
    inner_data = each[0] // tensor // inner_fsdp
    if data % inner_data:
        return whole
    inner, outer = (inner_data, inner_fsdp, tensor), (data // inner_data, fsdp // inner_fsdp, 1)
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=True, allow_split_physical_axes=True
    )


def _owners(devices: np.ndarray) -> np.ndarray:
    """Index of the process of each device."""
    return np.vectorize(lambda device: device.process_index)(devices)


def _box(own: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """Index of the part of a mesh where `own` [data, fsdp, tensor] is true; None where that is not whole replicas."""
    box = np.ix_(*(np.flatnonzero(own.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)))
    return box if own[box].all() and own[box].shape[2] == own.shape[2] else None


def spec(logical: tuple[str | None, ...]) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes; two that land on one mesh axis are an error."""
    axes = [RULES[name] if name else None for name in logical]
    used = [part for axis in axes for part in _parts(axis)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical} put two dimensions on one mesh axis: {axes}")
    return PartitionSpec(*axes)


def is_linear(path: str) -> bool:
    """Whether the parameter at `path` is a sublayer's weight, which maps inputs to outputs, one of them the model's
    width."""
    name = path.rpartition("/")[2]
    return "embed" in PARAMS[name] and name not in ("embedding", "lm_head")


def input_axes(path: str) -> int:
    """How many of the first axes of the weight at `path` are inputs; the others are outputs."""
    axes = PARAMS[path.rpartition("/")[2]]
    return 1 if axes[0] == "embed" else len(axes) - 1


def logical_axes(path: str) -> tuple[str | None, ...]:
    """Logical axes of the parameter at `path`; of LoRA's those of its weight's inputs or outputs, and the rank."""
    weight, _, name = path.rpartition("/")
    if name not in ("lora_a", "lora_b"):
        return PARAMS[name]
    axes, cut = PARAMS[weight.rpartition("/")[2]], input_axes(weight)
    return (*axes[:cut], None) if name == "lora_a" else (None, *axes[cut:])


def param_sharding(mesh: jax.sharding.Mesh, path: str, gathered: bool = False) -> NamedSharding:
    """Sharding of the parameter at `path`; `gathered` keeps only the tensor axis, as the sampler wants its weights."""
    partition = spec(logical_axes(path))
    if gathered:
        partition = PartitionSpec(*(axis if axis == "tensor" else None for axis in partition))
    return NamedSharding(mesh, partition)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """`x` with a sharding constraint by logical axes, wherever a mesh is set (also on virtual CPU devices).

    Inside `shard_map` the axes that it splits are no longer the compiler's, and are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = tuple(None if _parts(axis) & set(mesh.manual_axes) else axis for axis in spec(logical))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def _parts(axis: str | tuple[str, ...] | None) -> set[str]:
    return {axis} if isinstance(axis, str) else set(axis or ())


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
    """Sharding of an array whose dimension `axis` is the batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES["batch"]))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """How many ways the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The part of `mesh` that this process owns; `mesh` itself where that is all.

    Raises:
        InputError: a replica of the weights, or an irregular part of the mesh, is spread over processes.
    """
    own = _owners(mesh.devices) == jax.process_index()
    if own.all():
        return mesh
    box = _box(own)
    if box is None:
        raise InputError(
            f"config.mesh.tensor = {mesh.shape['tensor']}: each process samples with weights of its own, and its "
            f"{own.sum()} devices hold no whole replica; lower mesh.tensor to a divisor of {own.sum()}"
        )
    return jax.sharding.Mesh(mesh.devices[box], mesh.axis_names, axis_types=mesh.axis_types)


def local_view(tree: dict[str, jax.Array], places: dict[str, NamedSharding]) -> dict[str, jax.Array]:
    """Global arrays that are whole on this process as arrays of its own part of the mesh; nothing is copied."""

    def view(x: jax.Array, place: NamedSharding) -> jax.Array:
        pieces = {piece.device: piece.data for piece in x.addressable_shards}
        on = [pieces[device] for device in place.mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(x.shape, place, on)

    return {path: view(x, places[path]) for path, x in tree.items()}


def to_global(tree, sharding: NamedSharding):
    """Global arrays of `sharding` from host arrays that every process holds whole."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index, x=x: np.asarray(x)[index]), tree
    )


def to_host(tree):
    """Whole numpy arrays of a tree of arrays that this process can address."""
    return jax.device_get(tree)


def check_divides(mesh: jax.sharding.Mesh, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises InputError where a mesh axis does not divide the dimension of a parameter that it shards."""
    for path, shape in shapes.items():
        logical = PARAMS[path.rpartition("/")[2]]
        for name, size in zip(logical, shape, strict=True):
            axis = RULES[name]
            if axis and size % mesh.shape[axis]:
                raise InputError(
                    f"config.mesh.{axis} = {mesh.shape[axis]}: does not divide the model's {name} dimension of {size} "
                    f"({path}); choose a divisor of {size}"
                )
