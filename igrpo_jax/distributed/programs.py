"""The programs that XLA compiles: one object for each kind, compiled once for each shape, kept on disk between runs.

A `Program` is called like the function that it compiles. It also knows the shapes that a run may need, so that all of
them can be compiled ahead of time, and what a call costs.
"""

import contextlib
import math
import os
import resource
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from igrpo_jax.distributed import watchdog

Shape = tuple[Hashable, ...]  # what tells the compiled programs of one kind apart, such as (rows, positions to read)
_being_compiled: ContextVar[str] = ContextVar("being compiled", default="")  # title of the program, "" for any other


@dataclass(frozen=True)
class Cost:
    """The work of one call on one device: floating point operations, and bytes that cross the device's memory."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)


class Program:
    """One function on the devices, compiled once for each shape: ahead of time, or when it is first called.

        decode = Program("decode", jax.jit(steps.decode, ...), arguments, mesh, shapes=[(64, 256), (64, 512)], ...)
        state, status = decode(weights, state, least, sampling, shape=(64, 256))

    Args:
        name: the kind of program in messages.
        jitted: the function under `jax.jit`.
        arguments: maps the entries of a shape to the abstract arguments of `jitted` (shapes, dtypes and shardings).
        mesh: the mesh that `jitted` is traced on.
        shapes: all shapes that a run may need; () is the only one where there is nothing to tell apart.
        largest: those of `shapes` that need most memory, for predictions; None = the last.
        static: keywords of `jitted` that the entries of a shape are passed as, because they must be known when it is
            traced.
        cost: maps the entries of a shape to the work of one call.
    """

    def __init__(
        self,
        name: str,
        jitted: jax.stages.Wrapped,
        arguments: Callable[..., tuple],
        mesh: jax.sharding.Mesh,
        *,
        shapes: Sequence[Shape] = ((),),
        largest: Sequence[Shape] | None = None,
        static: Sequence[str] = (),
        cost: Callable[..., Cost] | None = None,
    ):
        self.name = name
        self.jitted = jitted
        self.shapes = list(shapes)
        self.largest = list(self.shapes[-1:] if largest is None else largest)
        self.cost = cost
        self._arguments = arguments
        self._mesh = mesh
        self._static = static
        self._compiled: dict[Shape, jax.stages.Compiled] = {}

    def __call__(self, *arguments: Any, shape: Shape = ()) -> Any:
        """Runs the program of `shape` and returns what `jitted` returns."""
        return self.compiled(*shape)(*arguments)

    def compiled(self, *shape: Hashable) -> jax.stages.Compiled:
        """Returns the compiled program of `shape`, which is compiled now where it was not before."""
        title = self.title(*shape)
        watchdog.running(title)
        if shape not in self._compiled:
            token = _being_compiled.set(title)
            try:
                self._compiled[shape] = self.lower(*shape).compile()
            finally:
                _being_compiled.reset(token)
        return self._compiled[shape]

    def lower(self, *shape: Hashable) -> jax.stages.Lowered:
        """Returns the traced program of `shape`, for a caller that compiles it by itself."""
        static = dict(zip(self._static, shape, strict=True)) if self._static else {}
        with jax.set_mesh(self._mesh):
            return self.jitted.lower(*self._arguments(*shape), **static)

    def title(self, *shape: Hashable) -> str:
        """Returns the name with the shape, such as "decode 64 256"."""
        return " ".join(map(str, (self.name, *shape)))

    @property
    def peak_bytes(self) -> int:
        """Bytes on each device while the largest shape compiled so far runs; 0 where none is compiled."""
        return max(map(program_bytes, self._compiled.values()), default=0)


def compile_all(programs: Sequence[Program], report: Callable[[int], None] = lambda done: None) -> None:
    """Compiles those shapes of `programs` that are not compiled yet, several at a time.

    Args:
        report: is given the number done so far.
    """
    wanted = [(program, shape) for program in programs for shape in program.shapes]
    missing = [(program, shape) for program, shape in wanted if shape not in program._compiled]
    report(len(wanted) - len(missing))
    with ThreadPoolExecutor(max(2, min(16, (os.cpu_count() or 2) // 2))) as pool:
        # Tracing is Python and stays in this thread; XLA's compiler runs beside it.
        futures = {pool.submit(program.lower(*shape).compile): (program, shape) for program, shape in missing}
        for done, future in enumerate(as_completed(futures), len(wanted) - len(missing) + 1):
            program, shape = futures[future]
            watchdog.running(program.title(*shape))
            program._compiled[shape] = future.result()
            report(done)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list that gets the name of every program that XLA compiles, or loads from disk, meanwhile.

    The name is the title of a `Program`, kind first, or the name of any other function.
    """
    seen: list[str] = []

    def listen(event: str, seconds: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(_being_compiled.get() or str(details.get("fun_name", "a program")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def use_disk_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` ("" = nowhere); the JAX_COMPILATION_CACHE_DIR of the environment wins."""
    if folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        # JAX's own threshold of 1 s leaves out the many small programs of a small model.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def program_bytes(program: jax.stages.Compiled) -> int:
    """Returns the bytes on each device while `program` runs, by the compiler's own count; donated ones count once."""
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def device_bytes() -> int | None:
    """Returns what JAX may use of the memory of a device; None where it does not say, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_memory() -> dict[str, float]:
    """Returns metrics in GiB: the most memory that a device and this process took since the start.

    That of the device is absent where JAX does not count it, as on a CPU.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    metrics = {"perf/peak_host_memory": peak / 2**30}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    taken = [part["peak_bytes_in_use"] for part in stats if "peak_bytes_in_use" in part]
    return metrics | ({"perf/peak_device_memory": max(taken) / 2**30} if taken else {})


def tree_bytes(tree: Any) -> int:
    """Returns the bytes on each device of arrays, or of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def length_buckets(longest: int, smallest: int) -> tuple[int, ...]:
    """Returns lengths in tokens from `smallest`, each 1.5 or 1.33 times the one before, the last one `longest`.

    A program is compiled for each of them that is used, and at most a third of a row is padding. For example 64 up to
    200: 64, 96, 128, 192, 200.
    """
    sizes = []
    while smallest < longest:
        sizes += [smallest, smallest + smallest // 2]
        smallest *= 2
    return (*(size for size in sizes if size < longest), longest)


def pick_bucket(buckets: tuple[int, ...], length: int) -> int:
    """Returns the smallest bucket that holds `length`."""
    return next(bucket for bucket in buckets if bucket >= length)
