"""How a worker of a pool begins: as a fork of a server that holds what all of them need.

The server (`worker_image`) is an interpreter of its own without devices or threads, so a fork of it is as good as a new
interpreter, takes milliseconds instead of seconds, and shares its memory. Before a worker asks for its first item:

- All accelerators are hidden from it, because it must never claim the TPU or GPU of its parent. Its memory is bounded.
- It imports its modules. An import that fails is left to the item that needs it, which can say so.
- SIGTERM kills it at once, even while C code runs, and Ctrl-C is left to its parent.
"""

import contextlib
import itertools
import multiprocessing
import multiprocessing.context
import os
import pkgutil
import resource
import signal
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

from pebble.common import CONSTS

_STARTS = 3  # times that the server is asked for a worker at most
_IMAGE = "igrpo_jax.rewards.worker_image"  # module that the server imports
_LOCK_TIMEOUT = 10.0  # seconds that a worker waits for the lock under which an item is taken or a result is given

BLANK = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "ROCR_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "TPU_VISIBLE_CHIPS": "",
    "TPU_VISIBLE_DEVICES": "",
    # A file that is no library, so that libtpu can't be loaded. Of what is no file, such as /dev/null, jax warns as it
    # is imported, and takes the installed libtpu in its place.
    "TPU_LIBRARY_PATH": __file__,
    "PJRT_DEVICE": "CPU",
    # A thread pool of the linear algebra library per worker would eat the address space on machines with many cores.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class _Process(multiprocessing.context.ForkServerProcess):
    """A fork of the server; where the server was killed, of another one."""

    def start(self) -> None:
        for attempt in itertools.count(1):
            try:
                return super().start()
            except (OSError, EOFError):  # it died after it was seen alive
                if attempt == _STARTS:
                    raise
                time.sleep(0.1)


class _Forking(multiprocessing.context.ForkServerContext):
    Process = _Process


def context() -> multiprocessing.context.BaseContext:
    """Returns how workers are started, and starts their server where none runs.

    A server of another library, if one runs already, is as good but slower. So is a new interpreter for each worker,
    where no server can be made, as with a path of the temporary folder that is too long for a socket.
    """
    multiprocessing.set_forkserver_preload([_IMAGE])
    try:
        with without_interrupts():
            forkserver.ensure_running()
    except OSError:
        return multiprocessing.get_context("spawn")
    return _Forking()


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Keeps Ctrl-C from the processes and threads that the block starts; this thread gets it when the block ends.

    A terminal sends SIGINT to the workers too, and each would print a traceback while it imports `__main__`: pebble
    makes workers ignore SIGINT only after that. The server and pebble's threads, which replace workers, pass this on.
    """
    resource_tracker.ensure_running()  # its own start would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _allowed(most: int) -> int:
    """Returns `most` bytes of address space, or what this process may have at most (`ulimit -v`) where that is less."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    return most if hard == resource.RLIM_INFINITY else min(most, hard)


def begin(memory_gib: float | None, preload: tuple[str, ...], environment: dict[str, str]) -> None:
    """Prepares a new worker, before it asks for an item.

    Args:
        memory_gib: address space that it may use, in GiB; None = no limit.
        environment: environment of the parent, which may have changed since the server was started.
    """
    os.environ.clear()
    os.environ.update(environment | BLANK)
    if memory_gib is not None:
        most = _allowed(int(memory_gib * 2**30))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A worker that is killed while it holds the lock keeps it. After twice this time the others end too, and the pool
    # is replaced; with pebble's 60 s nothing would be graded for two minutes.
    CONSTS.channel_lock_timeout = _LOCK_TIMEOUT
    # pebble installs a Python handler, which waits for the C call in progress to end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for name in preload:
        with contextlib.suppress(Exception):  # it would end the worker, and the next one, and so on
            found = pkgutil.resolve_name(name)
            if ":" in name:
                found()
