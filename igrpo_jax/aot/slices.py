"""Describes slices of TPUs that need not be there, so that libtpu, the compiler of TPUs, compiles programs for them.

jax is imported inside the functions, because environment variables that it reads are set here first.
"""

import math
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from igrpo_jax.distributed import chips
from igrpo_jax.errors import InputError

if TYPE_CHECKING:
    import jax

# Chips per host, by layout, where they are not 2 x 2: slices of v5e and v6e that have one host.
HOSTS = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}
# None of the chips is in this machine. Without these variables libtpu would look for them, ask the cloud about the
# machine (any answer will do), and keep other processes from compiling in the meantime.
QUIET = {
    **{"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-16"},
    **{"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    # Without a chip a program can be written into JAX's cache, but not read from it.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
# Dimensions and most chips of a slice, by its kind. libtpu would take other shapes, and take for ever over huge ones.
LARGEST = {"v4": (3, 4096), "v5e": (2, 256), "v5p": (3, 8960), "v6e": (2, 256)}


def check(name: str | None, slices: int = 1) -> None:
    """Raises InputError for a topology that no slice has, or several slices without one; libtpu refuses others."""
    if name is None and slices > 1:
        raise InputError(f"--slices {slices}: needs --topology too, such as --topology v5p:2x2x2")
    if name is None:
        return
    kind, _, layout = name.partition(":")
    if kind not in LARGEST or not re.fullmatch(r"\d+(x\d+)*", layout):
        return
    (dimensions, most), sizes = LARGEST[kind], [int(size) for size in layout.split("x")]
    if len(sizes) != dimensions:
        example = f"{kind}:{'x'.join(['2'] * dimensions)}"
        raise InputError(
            f"--topology {name}: a slice of {kind} has {dimensions} dimensions; give one such as {example}"
        )
    if math.prod(sizes) > most:
        raise InputError(
            f"--topology {name}: a slice of {kind} has at most {most:,} chips; give a smaller one, and several of them "
            "as --slices N"
        )


def topology(name: str | None, slices: int = 1) -> "list[jax.Device]":
    """Returns the devices of `slices` slices, which need not exist here; without a name, the devices of this machine.

    Raises:
        InputError: as `check`; libtpu is not installed, or knows no such slices.
    """
    check(name, slices)
    if name is None:
        import jax

        return jax.devices()
    layout = name.rpartition(":")[2]
    host = {"chips_per_host_bounds": HOSTS[layout]} if layout in HOSTS else {}
    several = {"num_slices": slices} if slices > 1 else {}
    return _described(name, **host, **several)


def alone(mesh: "jax.sharding.Mesh") -> "jax.sharding.Mesh":
    """Returns a mesh like `mesh` over a described slice that has no other chips than those of `mesh`.

    libtpu (0.0.42) aborts when it compiles a program with collectives for a part of the chips of a described slice that
    does not begin with the first chip. A team of processes samples on such a part. If its chips do not fill a box,
    `mesh` itself is returned.
    """
    import jax

    devices = mesh.devices.ravel().tolist()
    places = np.array([device.coords for device in devices])
    first, box = places.min(0), np.ptp(places, axis=0) + 1
    if box.prod() != mesh.size:
        return mesh
    host = np.ptp([device.coords for device in devices if device.process_index == devices[0].process_index], axis=0) + 1
    kind = chips.of(devices[0].device_kind).name
    shape = box if kind == "v5p" else box[:2]
    described = _described(f"{kind}:{'x'.join(map(str, shape))}", chips_per_host_bounds=tuple(host.tolist()))
    at = {tuple(device.coords): device for device in described}
    same = np.array([at[tuple(place)] for place in (places - first).tolist()])
    return jax.sharding.Mesh(same.reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)


def _described(name: str, **settings: Any) -> "list[jax.Device]":
    """Returns the devices that libtpu describes. Raises InputError if it is missing or refuses."""
    os.environ.update(QUIET)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        fix = 'pip install "igrpo-jax[tpu]"'
        raise InputError(f"--topology {name}: needs the compiler of TPUs, libtpu; {fix}") from error
    import jax
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **settings).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        message = str(error).splitlines()[0][:200]
        raise InputError(f"--topology {name}: {message}; give a slice such as v5e:1x1, v6e:2x4 or v5p:2x2x2") from error
