"""The programs that XLA compiles: ahead of time by key, counted while a run is under way, kept on disk between runs."""

import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax

from igrpo_jax.distributed import watchdog

Key = tuple[Any, ...]  # what kind of program, then its shape
_asked_for: ContextVar[str] = ContextVar("asked for", default="")  # key of the program that is being compiled


def use_disk_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` ("" = nowhere); the JAX_COMPILATION_CACHE_DIR of the environment wins."""
    if folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        # JAX's own threshold of 1 s leaves out the many small programs of a small model.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class Programs:
    """Programs of fixed shapes by key, each compiled once: ahead of time by `compile`, or when first asked for.

    Args:
        lower: from a key to the traced program; raises KeyError for a key it doesn't know.
    """

    def __init__(self, lower: Callable[[Key], jax.stages.Lowered]):
        self._lower, self._compiled = lower, {}

    def __getitem__(self, key: Key) -> jax.stages.Compiled:
        watchdog.running(_text(key))
        if key not in self._compiled:
            token = _asked_for.set(_text(key))
            try:
                self._compiled[key] = self._lower(key).compile()
            finally:
                _asked_for.reset(token)
        return self._compiled[key]

    def compile(self, keys: Sequence[Key], report: Callable[[int], None] = lambda done: None) -> None:
        """Compiles what is missing of `keys`, several at a time; `report` is given the number done so far."""
        missing = [key for key in keys if key not in self._compiled]
        report(len(keys) - len(missing))
        with ThreadPoolExecutor(max(2, min(16, (os.cpu_count() or 2) // 2))) as pool:
            # Tracing is Python and stays in this thread; XLA's compiler runs beside it.
            futures = {pool.submit(self._lower(key).compile): key for key in missing}
            for done, future in enumerate(as_completed(futures), len(keys) - len(missing) + 1):
                watchdog.running(_text(futures[future]))
                self._compiled[futures[future]] = future.result()
                report(done)

    def peak_bytes(self, kinds: Collection[str]) -> int:
        """Bytes on each device of the largest program so far whose key begins with one of `kinds`."""
        return max((program_bytes(made) for key, made in self._compiled.items() if key[0] in kinds), default=0)


def _text(key: Key) -> str:
    return " ".join(map(str, key))


def program_bytes(program: jax.stages.Compiled) -> int:
    """Bytes on each device while `program` runs, by the compiler's own count; donated ones count once."""
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def device_bytes() -> int | None:
    """What JAX may use of the memory of a device; None where it does not say, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def tree_bytes(tree: Any) -> int:
    """Bytes on each device of arrays, or of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that gets the name of every program that XLA compiles, or loads from disk, meanwhile.

    It is the key, kind first, where the program is one of `Programs`; of others the name of the function.
    """
    seen: list[str] = []

    def listen(event: str, seconds: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(_asked_for.get() or str(details.get("fun_name", "a program")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


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
