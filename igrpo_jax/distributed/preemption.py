"""SIGTERM, which a scheduler sends before it takes a machine back: the run saves and ends with "run me again".

    with preemption.noticed(grace):
        preemption.check()     # wherever the run can be left: raises Preempted after the notice

A rollout is left between two calls of the sampler, and its step is dropped; an update is finished. Where the run has
not ended `grace` seconds after the notice, the process ends all the same, and a resume continues from the checkpoint
before. Of several processes, each hears of a notice to any other (`peers`), and all leave after the same step. The
command `evaluate` is left in the same way, between two calls of the sampler.

A command that resumes calls `listen` first. Then SIGTERM also ends it with "run me again" before the block, while JAX
is imported or other processes are waited for, and changes nothing after a notice, until the process has ended.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

EXIT_CODE = 75  # EX_TEMPFAIL: the same command resumes from where this one was

_notice = threading.Event()
_staying = threading.Event()  # this process is done, and waits for the others
_ending = threading.RLock()  # a signal may come while the main thread holds it
_timers: list[threading.Timer] = []  # what ends the process after the grace


class Preempted(Exception):
    """The machine is about to be taken away; what could be saved is saved."""

    def __init__(self, text: str = "preempted before there was anything new to save"):
        super().__init__(text)


def noted() -> bool:
    """Returns whether the notice has come, within `noticed`."""
    return bool(_timers) and _notice.is_set()


def is_told() -> bool:
    """Returns whether other processes are to hear of a notice: also when this one has left `noticed` before they do."""
    return _notice.is_set()


def check() -> None:
    """Raises Preempted if the notice has come."""
    if noted():
        raise Preempted


def notice(source: str) -> None:
    """Takes note of a notice from `source`; only the first one counts."""
    if noted() or not _timers:
        return
    _notice.set()
    with contextlib.suppress(RuntimeError):  # a signal came in between and started it
        _timers[0].start()
    os.write(2, f"igrpo_jax: {source}: saving, then ending; a second one changes nothing\n".encode())


def listen() -> None:
    """Takes SIGTERM for the order to end at once with EXIT_CODE, outside of `noticed` and where no notice has come.

    A thread listens too, because the main thread runs no handler while it is in a call such as
    jax.distributed.initialize, which returns when all processes are there.
    """
    incoming, outgoing = os.pipe()
    os.set_blocking(outgoing, False)
    signal.signal(signal.SIGTERM, lambda *_: notice("SIGTERM") if _timers else _end())
    signal.set_wakeup_fd(outgoing, warn_on_full_buffer=False)  # gets the number of every signal
    threading.Thread(target=_listen, args=(incoming,), name="sigterm", daemon=True).start()


def _listen(incoming: int) -> None:
    while number := os.read(incoming, 1):
        if number[0] == signal.SIGTERM:
            _end()


def stay() -> None:
    """From now on a SIGTERM is a notice for the other processes alone, whose end this one waits for."""
    _staying.set()


def _end() -> None:
    """Ends the process, unless it is within `noticed`, waits for others, or ends because of a notice already."""
    # The main thread and the one that listens both come here. The second waits for the first, since a main thread that
    # goes on can end the process with another code.
    with _ending:
        if _timers or _notice.is_set():
            return
        if not _staying.is_set():
            os.write(2, b"igrpo_jax: SIGTERM: ended, with nothing new to save; the same command resumes\n")
            os._exit(EXIT_CODE)
        _notice.set()
        os.write(2, b"igrpo_jax: SIGTERM: told the other processes, which this one waits for\n")


@contextlib.contextmanager
def noticed(grace: float) -> Iterator[None]:
    """Takes SIGTERM for a notice within the block; outside of the main thread nothing changes.

    Args:
        grace: seconds from the notice after which the process ends, whatever it does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(grace, _give_up, [grace])
    timer.daemon = True
    _notice.clear()
    _timers[:] = [timer]
    before = signal.signal(signal.SIGTERM, lambda *_: notice("SIGTERM"))
    try:
        yield
    finally:
        timer.cancel()
        _timers.clear()
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _give_up(grace: float) -> None:
    text = f"igrpo_jax: not saved within config.checkpoint.preemption_grace = {grace:g} s of SIGTERM; the same command "
    os.write(2, (text + "resumes from what was saved before\n").encode())
    os._exit(EXIT_CODE)
