"""Published figures of accelerators, for rooflines: the limits that no program can exceed.

The figures of TPUs are from docs.cloud.google.com/tpu/docs/v5e, v5p and v6e, except those of memory: a program may use
less than the published 16, 95 and 32 GB, and the compiler names how much when a program does not fit. Those of the H100
and H200 are from NVIDIA's data sheets of the SXM5 (dense bfloat16).
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from igrpo_jax.errors import InputError

if TYPE_CHECKING:
    import jax

GIB = 1 << 30
FILL_FRACTION = 0.95  # of a device's memory: arrays leave gaps between them


@dataclass(frozen=True)
class Chip:
    """The peak figures of one kind of chip."""

    name: str
    hbm_bytes: float  # bytes of its memory that a program may use
    flops: float  # peak FLOPs per second in bfloat16
    bandwidth: float  # bytes per second between the chip and its memory
    links: float  # bytes per second that it can receive from other chips of its slice or node, over all links


# By jax.Device.device_kind. Published link bandwidths count both directions.
CHIPS = {
    "TPU v5 lite": Chip("v5e", 15.75 * GIB, 197e12, 819e9, 400e9 / 2),
    "TPU v5": Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 1200e9 / 2),
    "TPU v6 lite": Chip("v6e", 31.25 * GIB, 918e12, 1638e9, 800e9 / 2),
    "NVIDIA H100 80GB HBM3": Chip("H100", 79.1 * GIB, 989e12, 3350e9, 900e9 / 2),
    "NVIDIA H200": Chip("H200", 139.8 * GIB, 989e12, 4800e9, 900e9 / 2),
}


def size(count: float) -> str:
    """Returns a number of bytes as text, in GiB or MiB."""
    return f"{count / GIB:.2f} GiB" if count >= 1 << 27 else f"{count / 2**20:.1f} MiB"


def usable_bytes(device: "jax.Device") -> float:
    """Returns the bytes of memory that a program on `device` may use: `known_bytes`, or a guess.

    For a CPU device the guess is its share of half of the machine's memory, for another device of this process the
    smallest figure in CHIPS.
    """
    import jax  # `aot` imports this module before it sets the variables that jax reads

    known = known_bytes(device)
    if known is not None:
        return known
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 / len(jax.local_devices())
    if device.client is jax.local_devices()[0].client:
        return min(chip.hbm_bytes for chip in CHIPS.values())
    return of(device.device_kind).hbm_bytes  # which refuses it


def known_bytes(device: "jax.Device") -> float | None:
    """Returns the bytes of memory that a program on `device` may use; None where they can only be guessed.

    JAX reports them for the devices of this process, which stand for those of others too, except where CUDA alone
    manages a GPU's memory (XLA_PYTHON_CLIENT_ALLOCATOR=platform). Then, and for a device that is only described, they
    are the figure in CHIPS, if there is one. The memory of CPU devices is that of the machine, and has no bound here.
    """
    import jax

    if device.platform == "cpu":
        return None
    own = jax.local_devices()[0]
    is_there = device.client is own.client  # JAX refuses the statistics of another process's device
    reported = (own.memory_stats() or {}).get("bytes_limit") if is_there else None
    if reported or device.device_kind not in CHIPS:
        return reported
    return CHIPS[device.device_kind].hbm_bytes


def of(device_kind: str) -> Chip:
    """Returns the figures of a kind of device. Raises InputError if they are not known."""
    if device_kind not in CHIPS:
        known = ", ".join(chip.name for chip in CHIPS.values())
        raise InputError(
            f"--topology: no published figures of {device_kind!r} are known here, only of {known}; give the --topology "
            "of one of these, such as v5p:2x2x2"
        )
    return CHIPS[device_kind]
