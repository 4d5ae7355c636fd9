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
    another, because groups of neighbours sample together (`teams`). Where the order of the torus would scatter the
    devices of a process over the mesh, they are kept together instead. Each of several TPU slices holds complete
    replicas of the weights: only the axis `data` crosses slices and, where possible, GPU processes.

    Raises:
        InputError: the sizes do not multiply to the number of devices, or `data` is not a multiple of the TPU slices.
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
    """Returns `devices` as an array of these sizes (data, fsdp, tensor), slice by slice on `data` if it can."""
    grid, (data, *inner) = np.array(devices, object), sizes
    numbers = slice_of(grid)
    slices = [list(grid[numbers == number]) for number in np.unique(numbers)]
    if data % len(slices) and devices[0].platform == "tpu":
        raise InputError(
            f"config.mesh.data = {data}: must be a multiple of the {len(slices)} slices, because each holds complete "
            f"replicas of the weights; set mesh.data to {len(slices)} and mesh.fsdp to -1"
        )
    if data % len(slices):
        return _of_slice(sizes, devices)
    return np.concatenate([_of_slice([data // len(slices), *inner], own) for own in slices])


def _of_slice(sizes: list[int], devices: list) -> np.ndarray:
    """Returns the `devices` of a slice as an array of these sizes (data, fsdp, tensor)."""
    by_neighbours = _grouped(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True))
    owner = owners(by_neighbours)
    processes, each = np.unique(owner, return_counts=True)
    data, fsdp, tensor = sizes
    is_together = all(_is_box(owner == process) and _is_run(owner == process) for process in processes)
    if is_together or set(each % tensor) != {0} or len(set(each)) != 1:
        return by_neighbours
    inner_fsdp = math.gcd(fsdp, each[0] // tensor)
    inner_data = each[0] // tensor // inner_fsdp  # divides `data`, because data x fsdp is a multiple of each / tensor
    inner, outer = (inner_data, inner_fsdp, tensor), (data // inner_data, fsdp // inner_fsdp, 1)
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=True, allow_split_physical_axes=True
    )


def _grouped(devices: np.ndarray) -> np.ndarray:
    """Returns `devices` reordered along the axis `fsdp` so that places of the same processes are adjacent."""
    of_place = [tuple(place.flat) for place in owners(devices).swapaxes(0, 1)]
    return devices[:, sorted(range(len(of_place)), key=lambda place: of_place.index(of_place[place]))]


def owners(devices: np.ndarray) -> np.ndarray:
    """Returns the index of the process of each device, in the shape of `devices`."""
    return np.vectorize(lambda device: device.process_index)(devices)


def processes(mesh: jax.sharding.Mesh) -> int:
    """Returns how many processes have devices in `mesh`."""
    return len(set(owners(mesh.devices).flat))


def slice_of(devices: np.ndarray) -> np.ndarray:
    """Returns the number of the slice of each device, in the shape of `devices`; the GPUs of a process are a slice."""
    return np.vectorize(_slice, otypes=[int])(devices)


def _slice(device: jax.Device) -> int:
    number = getattr(device, "slice_index", None)  # absent from devices of a single slice
    return number if number is not None else device.process_index if device.platform == "gpu" else 0


def _is_box(own: np.ndarray) -> bool:
    """Returns whether the part of a mesh where `own` [data, fsdp, tensor] bool is true is a box.

    It must also span the whole axis `tensor`.
    """
    box = np.ix_(*(np.flatnonzero(own.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)))
    return bool(own[box].all()) and own[box].shape[2] == own.shape[2]


def _is_run(own: np.ndarray) -> bool:
    """Returns whether the places where `own` is true are consecutive in the flattened mesh."""
    return bool((np.diff(np.flatnonzero(own)) == 1).all())


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


def matrix_inputs(path: str) -> int | None:
    """Returns how many of the first axes of a weight of a sublayer, or of a factor of LoRA, are its inputs.

    None for what is not such a matrix: embedding, head, convolutions, norms and biases.
    """
    weight, _, name = path.rpartition("/")
    if name == "lora_a":
        return input_axes(weight)
    if name == "lora_b":
        return 1
    return input_axes(path) if is_linear(path) else None


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


def abstract_params(
    mesh: jax.sharding.Mesh, shapes: dict[str, tuple[int, ...]], dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns parameters of these shapes by path as abstract arrays, each with its sharding on `mesh`."""
    return {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=param_sharding(mesh, path)) for path, shape in shapes.items()
    }


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


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first dimension is the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Returns into how many shards the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def to_global(tree, sharding: NamedSharding):
    """Returns global arrays with `sharding` from host arrays that every process holds completely."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index, x=x: np.asarray(x)[index]), tree
    )


def to_global_batch(tree, mesh: jax.sharding.Mesh):
    """Returns global arrays from host arrays whose first dimension is the batch; scalars are replicated."""
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
        section: the settings that define the mesh, for errors.
        only: the mesh axis that is checked; all if it is empty.

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
