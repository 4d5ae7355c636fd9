"""The parts of the command, the most important first, and which of them fit into the time that is left."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from igrpo_jax.errors import InputError

# A part is stopped after so many times its expected seconds, and not before so many seconds.
PATIENCE, LEAST = 2.5, 120
# Seconds by the scale of the sizes: an accelerator's, those that a CPU can run, and those of --tiny.
SCALES = ("full", "small", "tiny")


@dataclass(frozen=True)
class Part:
    """One part. `seconds` is what it is expected to take, by the scale of the sizes."""

    name: str
    seconds: dict[str, float]
    module: str  # of benchmarks.accelerator, whose function `run` measures it
    peers: bool = False  # whether it runs only with --peers
    gpu_flags: str = ""  # added to XLA_FLAGS on a GPU


def _part(name: str, module: str, full: float, small: float, tiny: float, **options: Any) -> Part:
    return Part(name, dict(zip(SCALES, (full, small, tiny), strict=True)), module, **options)


# XLA tries dozens of Triton kernels for each matmul. In float32 they take minutes to compile for one model.
LIBRARY_MATMULS = "--xla_gpu_enable_triton_gemm=false"


PARTS = (
    _part("device", "device", 15, 15, 10),
    _part("correctness", "correctness", 110, 160, 20),
    _part("decode", "decoding", 200, 120, 10),
    _part("update", "updating", 120, 120, 15),
    _part("float32", "correctness", 200, 160, 20, gpu_flags=LIBRARY_MATMULS),
    _part("step", "stepping", 200, 180, 15),
    _part("peers", "peers", 400, 180, 30, peers=True),
    _part("profile", "tracing", 45, 60, 10),
    _part("decode7b", "decoding", 90, 120, 10),
)
NAMES = tuple(part.name for part in PARTS)


def chosen(only: Sequence[str], peers: bool, done: Iterable[str]) -> list[Part]:
    """Returns the parts to run, in the order of importance.

    `device` is always among them, because the others need its figures, unless it is done.

    Args:
        only: names of the parts that are asked for; all where it is empty.
        peers: whether parts that measure other libraries were asked for.
        done: names of the parts whose results are there.

    Raises:
        InputError: `only` names no part.
    """
    if unknown := [name for name in only if name not in NAMES]:
        raise InputError(f"--only {' '.join(unknown)}: no such part; parts are {', '.join(NAMES)}")
    finished = set(done)
    wanted = [part for part in PARTS if (part.name in only if only else peers or not part.peers)]
    return [part for part in PARTS if (part in wanted or part.name == "device") and part.name not in finished]


def limit(part: Part, scale: str, left: float) -> float | None:
    """Returns the seconds that `part` may take; None where it is not expected to fit into the seconds that are left."""
    expected = part.seconds[scale]
    return min(max(PATIENCE * expected, LEAST), left) if expected <= left else None
