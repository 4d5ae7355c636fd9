"""What several processes need from JAX and C beyond their public interfaces, such as parts of `jax._src`.

1. `launcher`: what has started this process as one of several. JAX acts on it, but does not report it.
2. `client`, `coordinator_address`: the key-value store of jax.distributed, through which processes say that they live.
3. `delay_abort`: six seconds between JAX's decision to abort and the end of the process, in which it can say why.

Where JAX lacks the names of 1 and 2 (`MISSING`), a process without --coordinator runs as a single process, with a
warning, and one with it ends with a RunError that names the versions which have them. Where C's library cannot be
loaded, 3 does nothing, and JAX's own message is the last one.
"""

import ctypes
import signal
from typing import Any

import jax
from absl import logging

from igrpo_jax.errors import RunError, one_line

SUPPORTED = "jax>=0.10.2,<0.13"  # as in setup.py: the versions that have what is used here

try:
    from jax._src import clusters, distributed

    _LAUNCHERS = (clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
    _STATE = distributed.global_state
    MISSING = ", ".join(name for name in ("client", "coordinator_address") if not hasattr(_STATE, name))
except (ImportError, AttributeError) as error:
    MISSING = one_line(error)


def launcher() -> str | None:
    """Returns the name of JAX's class for what has started several processes, such as "SlurmCluster"; None if nothing.

    Also returns None, with a warning, if the metadata server of a TPU machine does not answer, or JAX cannot be asked.
    """
    if MISSING:
        logging.warning("running as a single process: JAX %s cannot detect a cluster (%s)", jax.__version__, MISSING)
        return None
    try:
        here = next((kind for kind in _LAUNCHERS if kind.is_env_present()), None)
        return None if here is None or here.get_process_count() == 1 else here.__name__
    except Exception as error:  # what requests raises, and others
        logging.warning("running as a single process: cannot find out whether this machine is part of a pod: %s", error)
        return None


def check_supported() -> None:
    """Raises RunError if JAX lacks what several processes need."""
    if MISSING:
        raise RunError(
            f"JAX {jax.__version__} lacks what several processes need ({MISSING}); pip install '{SUPPORTED}', or start "
            "one process"
        )


def client() -> Any:
    """Returns the client of the key-value store that process 0 keeps; None before jax.distributed.initialize."""
    check_supported()
    return _STATE.client


def coordinator_address() -> str | None:
    """Returns the HOST:PORT at which the processes meet; None before jax.distributed.initialize."""
    check_supported()
    return _STATE.coordinator_address


def delay_abort() -> int | None:
    """Makes SIGABRT wait for six seconds; returns the previous handler, for `restore_abort`.

    JAX aborts in a thread of its own, within milliseconds after process 0 has ended, and runs no Python code before
    that. With C's `sleep` as its handler, SIGABRT sleeps as many seconds as its number says, which is 6.
    """
    if (library := _c_library()) is None:
        return None
    return library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def restore_abort(handler: int | None) -> None:
    """Sets the handler of SIGABRT that `delay_abort` returned; None is the system's default."""
    if (library := _c_library()) is not None:
        library.signal(signal.SIGABRT, handler)


def _c_library() -> ctypes.CDLL | None:
    """Returns C's library, with `signal` declared; None if it cannot be loaded."""
    try:
        library = ctypes.CDLL(None)
        library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        library.signal.restype = ctypes.c_void_p
    except (OSError, TypeError, AttributeError):  # TypeError: Windows has no library without a name
        return None
    return library
