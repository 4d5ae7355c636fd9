"""SIGTERM, which a scheduler sends before it takes a machine back: the run saves and ends with "run me again".

    with preemption.noticed(grace):
        preemption.check()     # at each place where the run can be left: raises Preempted after the notice

A rollout is left between two calls of the sampler and its step is dropped, an update is finished. Where the run has
not ended `grace` seconds after the notice it ends all the same: the checkpoint before it is what a resume goes on from.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

EXIT_CODE = 75  # EX_TEMPFAIL: the same command goes on from where this one was

_notice = threading.Event()


class Preempted(Exception):
    """The machine is about to be taken away; what could be saved is saved."""


def check() -> None:
    """Raises Preempted if the notice has come."""
    if _notice.is_set():
        raise Preempted("preempted before there was anything new to save")


@contextlib.contextmanager
def noticed(grace: float) -> Iterator[None]:
    """Takes SIGTERM for a notice while it lasts; only in the main thread, elsewhere nothing changes.

    Args:
        grace: seconds from the notice after which the process ends, whatever it does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(grace, _give_up, [grace])
    timer.daemon = True

    def notice(*_: object) -> None:
        if not _notice.is_set():
            _notice.set()
            timer.start()
            os.write(2, b"igrpo_jax: SIGTERM: saving, then ending; a second one changes nothing\n")

    _notice.clear()
    before = signal.signal(signal.SIGTERM, notice)
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _give_up(grace: float) -> None:
    text = f"igrpo_jax: not saved within config.checkpoint.preemption_grace = {grace:g} s of SIGTERM; the same command "
    os.write(sys.__stderr__.fileno(), (text + "goes on from the checkpoint before\n").encode())
    os._exit(EXIT_CODE)
