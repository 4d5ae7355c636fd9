"""The programs that XLA compiles: one object for each kind, compiled once for each shape, kept on disk between runs.

A `Program` is called like the function that it compiles. It also knows the shapes that a run may need, so that they can
be compiled ahead of time, and what a call costs. A shape that was not compiled ahead is compiled when it is first
called. Whoever asks for a shape while another thread compiles it waits for that thread.
"""

import contextlib
import math
import resource
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax

from igrpo_jax.distributed import watchdog

# Operations carry the names of their scopes, but no lines of Python. XLA for TPUs (libtpu 0.0.42) looks lines up in a
# wrong table while it determines the trip count of a loop, and hangs if that table happens to contain a cycle.
jax.config.update("jax_traceback_in_locations_limit", 0)

Shape = tuple[Hashable, ...]  # what tells the compiled programs of one kind apart, such as (rows, positions to read)
ShowWait = Callable[[str], contextlib.AbstractContextManager]  # gets the title of the program that is waited for

_NO_LOCK = contextlib.nullcontext()
_being_compiled: ContextVar[str] = ContextVar("being compiled", default="")  # title of the program, "" for any other
_is_uncounted: ContextVar[bool] = ContextVar("is uncounted", default=False)
_show_wait: ContextVar[ShowWait] = ContextVar("show wait", default=contextlib.nullcontext)


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
        state, status = decode(weights, state, rows, sampling, shape=(64, 256))

    Args:
        name: the kind of program in messages.
        jitted: the function under `jax.jit`.
        arguments: maps the entries of a shape to the abstract arguments of `jitted` (shapes, dtypes and shardings).
        mesh: the mesh that `jitted` is traced on.
        shapes: all shapes that a run may need; () is the only one where there is nothing to tell apart.
        largest: those of `shapes` that need most memory, for predictions; None = the last.
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
        cost: Callable[..., Cost] | None = None,
    ):
        self.name = name
        self.jitted = jitted
        self.shapes = list(shapes)
        self.largest = list(self.shapes[-1:] if largest is None else largest)
        self.cost = cost
        self._arguments = arguments
        self.mesh = mesh
        self._lock = threading.Lock()
        self._compiled: dict[Shape, Future[jax.stages.Compiled]] = {}  # also of shapes that are being compiled

    def __call__(self, *arguments: Any, shape: Shape = ()) -> Any:
        """Runs the program of `shape` and returns what `jitted` returns."""
        return self.compiled(*shape)(*arguments)

    def compiled(self, *shape: Hashable) -> jax.stages.Compiled:
        """Returns the compiled program of `shape`, and compiles it now if it was not compiled before.

        `showing_waits` says how the wait is shown.
        """
        title, known = self.title(*shape), self._compiled.get(shape)
        watchdog.running(title)
        if known is not None and known.done():
            return known.result()
        with _show_wait.get()(title):
            return self.compile(*shape)

    def compile(self, *shape: Hashable, tracing: contextlib.AbstractContextManager = _NO_LOCK) -> jax.stages.Compiled:
        """Returns the compiled program of `shape`, for a thread that only prepares it.

        The first thread that asks compiles, the others wait. If compiling fails, all of them get the error, and the
        next thread that asks tries again.

        Args:
            tracing: is entered while the program is traced.
        """
        with self._lock:
            is_first = shape not in self._compiled
            future = self._compiled.setdefault(shape, Future())
        if is_first:
            token = _being_compiled.set(self.title(*shape))
            try:
                with tracing:
                    lowered = self.lower(*shape)
                future.set_result(lowered.compile())
            except BaseException as error:
                with self._lock:
                    del self._compiled[shape]
                future.set_exception(error)
            finally:
                _being_compiled.reset(token)
        return future.result()

    def is_ready(self, *shape: Hashable) -> bool:
        """Returns whether the program of `shape` is compiled."""
        future = self._compiled.get(shape)
        return future is not None and future.done()

    def lower(self, *shape: Hashable) -> jax.stages.Lowered:
        """Returns the traced program of `shape`, for a caller that compiles it by itself."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*self._arguments(*shape))

    def title(self, *shape: Hashable) -> str:
        """Returns the name with the shape, such as "prefill 2048" or "decode 64 x 256"."""
        return f"{self.name} {' x '.join(map(str, shape))}".strip()

    @property
    def peak_bytes(self) -> int:
        """Bytes on each device while the largest shape compiled so far runs; 0 if none is compiled."""
        return max(map(program_bytes, self._done), default=0)

    @property
    def code_bytes(self) -> int:
        """Bytes on each device of the machine code of the largest shape compiled so far; 0 if none is compiled."""
        return max((program.memory_analysis().generated_code_size_in_bytes for program in self._done), default=0)

    @property
    def _done(self) -> list[jax.stages.Compiled]:
        """The compiled programs."""
        return [future.result() for future in list(self._compiled.values()) if future.done()]


@contextlib.contextmanager
def showing_waits(show: ShowWait) -> Iterator[None]:
    """Makes each wait within the block for a program that is not compiled yet run in the context `show(title)`."""
    token = _show_wait.set(show)
    try:
        yield
    finally:
        _show_wait.reset(token)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list that gets the name of every program that XLA compiles, or loads from disk, while the block runs.

    Programs of threads that called `leave_uncounted` are left out, because nobody waits for them. The name is the title
    of a `Program`, kind first, or the name of any other function.
    """
    seen: list[str] = []

    def listen(event: str, seconds: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and not _is_uncounted.get():
            seen.append(_being_compiled.get() or str(details.get("fun_name", "a program")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def leave_uncounted() -> None:
    """Makes `compilations` ignore what this thread compiles from now on."""
    _is_uncounted.set(True)


def program_bytes(program: jax.stages.Compiled) -> int:
    """Returns the bytes on each device while `program` runs, by the compiler's own count; donated ones count once."""
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def is_refused(error: jax.errors.JaxRuntimeError) -> bool:
    """Returns whether a compiler refuses a program that needs more memory than there is."""
    return "RESOURCE_EXHAUSTED" in str(error)


def peak_memory() -> dict[str, float]:
    """Returns metrics in GiB: the most memory that a device and this process took since it began.

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

    A program is compiled for each of them that is used. Above `smallest`, at most a third of a row is padding. For
    example 64 up to 200: 64, 96, 128, 192, 200.
    """
    sizes = []
    while smallest < longest:
        sizes += [smallest, smallest + smallest // 2]
        smallest *= 2
    return (*(size for size in sizes if size < longest), longest)


def pick_bucket(buckets: tuple[int, ...], length: int) -> int:
    """Returns the smallest bucket that holds `length`."""
    return next(bucket for bucket in buckets if bucket >= length)
