"""Published figures of accelerators, for rooflines: the limits that no program can exceed.

TPUs: docs.cloud.google.com/tpu/docs/v5e, v5p and v6e. A program may use less of the memory than the published 16, 95
and 32 GB; the figures here are from the compiler's message where a program does not fit. H100: NVIDIA's data sheet of
the SXM5 (dense bfloat16).
"""

from dataclasses import dataclass

from igrpo_jax.errors import InputError

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    name: str
    hbm_bytes: float  # of its memory, as much as a program may use
    flops: float  # per second, bfloat16
    bandwidth: float  # of its memory, bytes per second
    links: float  # bytes per second that it can receive from other chips of its slice or node, over all links


# By jax.Device.device_kind. Published link bandwidths count both directions.
CHIPS = {
    "TPU v5 lite": Chip("v5e", 15.75 * GIB, 197e12, 819e9, 400e9 / 2),
    "TPU v5": Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 1200e9 / 2),
    "TPU v6 lite": Chip("v6e", 31.25 * GIB, 918e12, 1638e9, 800e9 / 2),
    "NVIDIA H100 80GB HBM3": Chip("H100", 79.1 * GIB, 989e12, 3350e9, 900e9 / 2),
}


def size(count: float) -> str:
    """Returns a count of bytes as people read it."""
    return f"{count / GIB:.2f} GiB" if count >= 1 << 27 else f"{count / 2**20:.1f} MiB"


def of(device_kind: str) -> Chip:
    """Returns the figures of a kind of device. Raises InputError where they are not known."""
    if device_kind not in CHIPS:
        known = ", ".join(chip.name for chip in CHIPS.values())
        raise InputError(
            f"--topology: no published figures of {device_kind!r} are known here, only of {known}; give the --topology "
            "of one of these, such as v5p:2x2x2"
        )
    return CHIPS[device_kind]
