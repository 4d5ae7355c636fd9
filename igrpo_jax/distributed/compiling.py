"""When the programs of a run are compiled.

- **Several processes**: before the first step. Each compiles the same programs in the same order, so that none waits in
  the middle of a step for another that compiles, and compilers that talk to each other, as those of GPUs do, meet.
- **One process with an accelerator**: in threads while the run continues, beginning with the programs that the first
  dispatch needs. The host has little else to do.
- **One process on the CPU**: those that the first dispatch needs in threads, while weights are read; the others when
  they are first called. A training run compiles what is left in its first step. Before that, threads would take the
  cores that the programs themselves need. But a warm start has no use for all cores, so all are compiled in the
  meantime.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import jax

from igrpo_jax.distributed import watchdog
from igrpo_jax.distributed.programs import Program, Shape, leave_uncounted

ProgramShapes = Sequence[tuple[Program, Shape]]  # programs, each with a shape that it may be called with
Phase = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[int], None]]]

_tracing = threading.Lock()  # one thread of a pool traces at a time: several would starve the main thread


@contextlib.contextmanager
def compiling(
    first: ProgramShapes,
    own: ProgramShapes,
    joint: Callable[[], ProgramShapes] | None,
    phase: Phase,
    then: Callable[[], object],
    warms_up: bool = False,
) -> Iterator[None]:
    """Compiles programs before the block or while it runs, as the docstring of this module says.

    Args:
        first: those of `own` that the first dispatch needs, the slowest to compile first.
        own: programs only on the devices of this process.
        joint: returns the programs on the devices of all processes; it may compile some to find out which. None
            where there are none.
        phase: a context that shows a phase, given its name and number of parts; yields a function of the number done.
        then: called once all programs are compiled, perhaps in another thread; never with one process on the CPU, where
            some may never be compiled.
        warms_up: whether the block begins with a warm start.
    """
    if jax.process_count() > 1:
        with phase("compiling the sampler", len(own)) as update:
            compile_all(own, update)
        if joint:
            with phase("compiling the update", None):
                for program, shape in joint():
                    program.compiled(*shape)
        then()
        yield
        return
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and not warms_up:
        with compiling_ahead(first):
            yield
        return
    rest = [each for each in own if each not in first]
    with compiling_ahead([*first, *rest], joint or tuple, (lambda: None) if on_cpu else then):
        yield


def all_shapes(programs: Sequence[Program]) -> ProgramShapes:
    """Returns the programs with each of their shapes."""
    return [(program, shape) for program in programs for shape in program.shapes]


def compile_all(program_shapes: ProgramShapes, report: Callable[[int], None] = lambda done: None) -> None:
    """Compiles those of `program_shapes` that are not compiled yet, several at a time.

    Args:
        report: is given the number done so far.
    """
    missing = [(program, shape) for program, shape in program_shapes if not program.is_ready(*shape)]
    report(len(program_shapes) - len(missing))
    with _pool() as pool:
        futures = {pool.submit(_compile, program, shape): program.title(*shape) for program, shape in missing}
        for done, future in enumerate(as_completed(futures), len(program_shapes) - len(missing) + 1):
            watchdog.running(futures[future])
            future.result()
            report(done)


@contextlib.contextmanager
def compiling_ahead(
    program_shapes: ProgramShapes, more: Callable[[], ProgramShapes] = tuple, then: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Compiles `program_shapes` in threads while the block runs.

    A program that is called before its turn is compiled by the caller. An error of a thread is left to the caller that
    needs the program. The end of the block waits for what is being compiled, and leaves out the rest.

    Args:
        more: returns more programs, and is called by one of the threads.
        then: is called by one of the threads once all are compiled.
    """
    left, lock = len(program_shapes) + 1, threading.Lock()

    def count(future: Future) -> None:
        nonlocal left
        if future.cancelled() or future.exception():
            return
        with lock:
            left -= 1
            is_last = left == 0
        if is_last:
            then()

    def compile_more() -> None:
        nonlocal left
        further = more()
        with lock:
            left += len(further)
        for program, shape in further:
            with contextlib.suppress(RuntimeError):  # the block has ended, and nothing more is taken
                pool.submit(_compile, program, shape).add_done_callback(count)

    with _pool(leave_uncounted) as pool:
        for program, shape in program_shapes:
            pool.submit(_compile, program, shape).add_done_callback(count)
        pool.submit(compile_more).add_done_callback(count)
        try:
            yield
        finally:
            pool.shutdown(cancel_futures=True)


def _pool(begin: Callable[[], object] | None = None) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(2, min(16, (os.cpu_count() or 2) // 2)), "compile", begin)


def _compile(program: Program, shape: Shape) -> None:
    program.compile(*shape, tracing=_tracing)
