"""The mesh, the table from logical axes to mesh axes, and the conversion of host arrays to global arrays and back.

The mesh axes are `data` (replicas), `fsdp` (weights and batch are sharded) and `tensor` (heads, ffn and vocabulary are
sharded). The batch is split over `data` and `fsdp` together. All axes are Auto: the compiler inserts the collectives.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from igrpo_jax.config import MeshConfig
from igrpo_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # the model's width in weights
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "groups": "tensor",  # groups of heads in Mamba-2
    "state": None,
    "width": None,
    "time": None,
    "features": None,  # the model's width in activations, whose batch already uses fsdp
}

# The logical axes of every parameter, by the last part of its path.
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
    # The parameters of Mamba-2, which also has an o_proj. x, z and dt are per head, B and C per group.
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
    """Returns the mesh over `devices` (default: all). The size that is -1 becomes what the other sizes leave.

    Neighbours in the mesh are neighbours in the torus of a TPU slice, and the devices of a process come one after
    another, because each process samples on its own ones (`sampler_mesh`). Where neighbourhood would split these over
    separate parts of the mesh, the devices of a process stay together instead.

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
    """Returns `devices` as an array of these sizes (data, fsdp, tensor)."""
    by_neighbours = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    owners = _owners(by_neighbours)
    processes, each = np.unique(owners, return_counts=True)
    data, fsdp, tensor = sizes
    if all(_box(owners == process) for process in processes) or set(each % tensor) != {0} or len(set(each)) != 1:
        return _grouped(by_neighbours)
    inner_fsdp = math.gcd(fsdp, each[0] // tensor)
    inner_data = each[0] // tensor // inner_fsdp
    if data % inner_data:
        return _grouped(by_neighbours)
    inner, outer = (inner_data, inner_fsdp, tensor), (data // inner_data, fsdp // inner_fsdp, 1)
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=True, allow_split_physical_axes=True
    )


def _grouped(devices: np.ndarray) -> np.ndarray:
    """Returns `devices` with those places on the axis `fsdp` that belong to the same processes next to each other."""
    owners = [tuple(place.flat) for place in _owners(devices).swapaxes(0, 1)]
    return devices[:, sorted(range(len(owners)), key=lambda place: owners.index(owners[place]))]


def _owners(devices: np.ndarray) -> np.ndarray:
    """Returns the index of the process of each device, in the shape of `devices`."""
    return np.vectorize(lambda device: device.process_index)(devices)


def _box(own: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """Returns an index of the part of a mesh where `own` [data, fsdp, tensor] bool is true.

    Returns None where that part is no box, or does not hold complete replicas of the weights.
    """
    box = np.ix_(*(np.flatnonzero(own.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)))
    return box if own[box].all() and own[box].shape[2] == own.shape[2] else None


def spec(logical: tuple[str | None, ...]) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical axes.

    Raises:
        ValueError: two of its dimensions would be sharded over one mesh axis.
    """
    axes = [RULES[name] if name else None for name in logical]
    used = [part for axis in axes for part in _parts(axis)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical} put two dimensions on one mesh axis: {axes}")
    return PartitionSpec(*axes)


def is_linear(path: str) -> bool:
    """Returns whether the parameter at `path` is a weight of a sublayer that maps from or to the model's width."""
    name = path.rpartition("/")[2]
    return "embed" in PARAMS[name] and name not in ("embedding", "lm_head")


def input_axes(path: str) -> int:
    """Returns how many of the first axes of the weight at `path` are inputs; the other axes are outputs."""
    axes = PARAMS[path.rpartition("/")[2]]
    return 1 if axes[0] == "embed" else len(axes) - 1


def logical_axes(path: str) -> tuple[str | None, ...]:
    """Returns the logical axes of the parameter at `path`.

    A LoRA parameter has the axes of its weight's inputs, or those of its outputs, and the rank, which is not sharded.
    """
    weight, _, name = path.rpartition("/")
    if name not in ("lora_a", "lora_b"):
        return PARAMS[name]
    axes, cut = PARAMS[weight.rpartition("/")[2]], input_axes(weight)
    return (*axes[:cut], None) if name == "lora_a" else (None, *axes[cut:])


def param_sharding(mesh: jax.sharding.Mesh, path: str, gathered: bool = False) -> NamedSharding:
    """Returns the sharding of the parameter at `path`.

    With `gathered` only the tensor axis is sharded, which is how the sampler holds its weights.
    """
    partition = spec(logical_axes(path))
    if gathered:
        partition = PartitionSpec(*(axis if axis == "tensor" else None for axis in partition))
    return NamedSharding(mesh, partition)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Returns `x` with a sharding constraint by logical axes, wherever a mesh is set (also on virtual CPU devices).

    Inside `shard_map` the mesh axes that it splits are left out, because the compiler does not manage them there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = tuple(None if _parts(axis) & set(mesh.manual_axes) else axis for axis in spec(logical))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def _parts(axis: str | tuple[str, ...] | None) -> set[str]:
    """Returns the mesh axes over which a dimension is sharded."""
    return {axis} if isinstance(axis, str) else set(axis or ())


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding of an array whose dimension `axis` is the batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES["batch"]))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Returns into how many shards the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def sampler_mesh(mesh: jax.sharding.Mesh, tensor: int) -> jax.sharding.Mesh:
    """Returns the devices of `mesh` in their order, with groups of `tensor` neighbours on the axis `tensor`.

    The order is the same so that one program can take weights from the one mesh to the other. Where `mesh` has groups
    of this size already, it is returned itself.

    Raises:
        InputError: `tensor` does not divide the number of devices.
    """
    if tensor == mesh.shape["tensor"]:
        return mesh
    if mesh.size % tensor:
        raise InputError(
            f"config.rollout.mesh.tensor = {tensor}: does not divide the {mesh.size} devices; choose a divisor of "
            f"{mesh.size}"
        )
    return jax.sharding.Mesh(mesh.devices.reshape(-1, 1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def process_tensors(mesh: jax.sharding.Mesh) -> list[int]:
    """Returns the sizes of the axis `tensor` of a sampler's mesh whose groups each lie within one process."""
    sizes = [size for size in range(1, mesh.size + 1) if mesh.size % size == 0]
    owners = _owners(mesh.devices).reshape(-1)
    return [size for size in sizes if (np.diff(owners.reshape(-1, size), axis=1) == 0).all()]


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Returns the part of a sampler's `mesh` whose devices belong to this process; `mesh` itself where all of them do.

    Raises:
        InputError: the devices of this process hold no complete replica of the weights, or are no box of the mesh.
    """
    own = _owners(mesh.devices) == jax.process_index()
    if own.all():
        return mesh
    box = _box(own)
    if box is None:
        raise InputError(
            f"config.rollout.mesh.tensor = {mesh.shape['tensor']}: each process samples with weights of its own, and "
            f"its {own.sum()} devices hold no whole replica; set rollout.mesh.tensor to a divisor of {own.sum()}"
        )
    return jax.sharding.Mesh(mesh.devices[box], mesh.axis_names, axis_types=mesh.axis_types)


def local_view(tree: dict[str, jax.Array], shardings: dict[str, NamedSharding]) -> dict[str, jax.Array]:
    """Returns global arrays as arrays on this process's part of the mesh, without a copy.

    Args:
        tree: arrays by path, each of which this process's devices hold completely.
        shardings: by path the sharding of the result, on the mesh of `local_mesh`.
    """

    def view(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        by_device = {shard.device: shard.data for shard in x.addressable_shards}
        shards = [by_device[device] for device in sharding.mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    return {path: view(x, shardings[path]) for path, x in tree.items()}


def to_global(tree, sharding: NamedSharding):
    """Returns global arrays with `sharding` from host arrays that every process holds completely."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index, x=x: np.asarray(x)[index]), tree
    )


def to_global_batch(tree, mesh: jax.sharding.Mesh):
    """Returns `to_global` of host arrays whose first dimension is split over the batch; numbers are replicated."""
    return jax.tree.map(lambda x: to_global(x, batch_sharding(mesh) if np.ndim(x) else replicated(mesh)), tree)


def to_host(tree):
    """Returns a tree of complete numpy arrays from a tree of arrays that this process can address."""
    return jax.device_get(tree)


def check_divides(
    mesh: jax.sharding.Mesh, shapes: dict[str, tuple[int, ...]], section: str = "config.mesh", only: str = ""
) -> None:
    """Checks that every mesh axis divides the dimensions of the parameters that it shards.

    Args:
        shapes: shapes of the parameters by path.
        section: of the settings that the mesh follows from, for errors.
        only: the mesh axis that is checked; all where it is empty.

    Raises:
        InputError: a mesh axis does not divide a dimension.
    """
    for path, shape in shapes.items():
        logical = PARAMS[path.rpartition("/")[2]]
        for name, size in zip(logical, shape, strict=True):
            axis = RULES[name]
            if axis and only in ("", axis) and size % mesh.shape[axis]:
                raise InputError(
                    f"{section}.{axis} = {mesh.shape[axis]}: does not divide the model's {name} dimension of {size} "
                    f"({path}); choose a divisor of {size}"
                )
