"""Killable worker processes that run a function on items. Each item has a wall-clock deadline, and no future raises.

    submit(*args) -> Future[Outcome]; Outcome.status is "ok", "timeout" (worker killed and replaced) or "error"

`pebble.ProcessPool` does the work: it sends one acknowledgement and one result per item, kills workers at the deadline,
replaces those that die, and recycles them after a number of items. An item costs about 0.1 ms of scheduling on two
cores with two workers, so items are sent one by one, each with its own deadline. This module adds what pebble lacks:

- Workers have no devices, bounded memory, and their imports done when they ask for their first item, so none of this
  counts against a deadline (`worker_start`).
- A worker whose parent was killed ends itself.
- An item whose worker is killed (by the kernel's out-of-memory killer) is sent again, a few times at most, because the
  item may not be at fault.
- pebble stops for good when an idle worker dies. A new pool then replaces it and gets the items without a result.

Workers import the parent's `__main__` again: a program that uses this pool must import jax inside `main()`, behind
`if __name__ == "__main__"`; `main_guard` refuses one that does without. Not here: what is graded (`verifier`), order,
retries of slow items.
"""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import pebble
from pebble.common import CONSTS

from igrpo_jax.rewards import worker_start
from igrpo_jax.rewards.main_guard import check_main

MAX_TASKS = 10_000  # items after which a worker is replaced, against slow leaks in what it runs
ATTEMPTS = 3  # times an item is sent at most, where its worker is killed or the pool itself breaks
_ORPHAN_GRACE = 10.0  # seconds past the deadline after which a worker that nobody killed ends itself


@dataclass(frozen=True)
class Outcome:
    """The result of one item. Every item gets exactly one, whatever happens."""

    status: str  # "ok", "timeout" or "error"
    value: Any = None  # what the function returned, where status is "ok"
    detail: str = ""  # describes the failure, for the log
    seconds: float = 0.0  # wall time in the worker; for a failure, since the item was sent


@dataclass
class _Item:
    args: tuple
    future: Future
    timeout: float  # seconds
    attempts: int = 0
    sent: float = 0.0


class Pool:
    """`workers` processes that run `function(*args)`; a context manager, usable from any thread.

    Args:
        function: importable by name and, like its arguments and results, picklable.
        workers: number of processes. They start at once and warm up while the caller continues.
        timeout: seconds that one item may run, unless `submit` gives it another number. The worker is killed within
            about 0.2 s after that, or 0.7 s if it ignores SIGTERM.
        preload: what a worker imports before its first item: names of modules, or of functions without arguments as
            "module:function", which it calls then.
        max_tasks: items after which a worker is replaced.
        memory_gib: address space of a worker in GiB; an item that wants more ends in MemoryError. None = no limit.

    Raises:
        InputError: as `check_main`.
    """

    def __init__(
        self,
        function: Callable,
        workers: int,
        timeout: float,
        preload: tuple[str, ...] = (),
        max_tasks: int = MAX_TASKS,
        memory_gib: float | None = None,
    ):
        check_main()
        # Between SIGTERM and SIGKILL pebble checks no other deadline; its default of 3 s would delay the others.
        CONSTS.term_timeout = 0.5
        self._function = function
        self._timeout = timeout
        self._options = {
            "max_workers": workers,
            "max_tasks": max_tasks,
            "initializer": worker_start.begin,
            "initargs": (memory_gib, preload, dict(os.environ)),
            "context": worker_start.context(),
        }
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._unanswered: dict[int, _Item] = {}
        self._closed = threading.Event()
        self._pool = self._start()
        self._watcher = threading.Thread(target=self._watch, name="verifier_pool_watcher", daemon=True)
        self._watcher.start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, *args, timeout: float | None = None) -> Future:
        """Returns a future of the Outcome. Does not block; the future never raises.

        Args:
            timeout: seconds that this item may run; None for those of the pool.
        """
        item = _Item(args, Future(), self._timeout if timeout is None else timeout)
        item.future.set_running_or_notify_cancel()  # so that nobody can cancel it and then wait for ever
        with self._lock:
            number = next(self._numbers)
            self._unanswered[number] = item
            if not self._closed.is_set():
                self._send(number, item)
        if self._closed.is_set():
            self._answer(number, Outcome("error", detail="the pool is closed"))
        return item.future

    def close(self) -> None:
        """Ends all workers, including busy ones. Items without a result get the status "error". Safe to call twice."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        self._watcher.join()
        self._end(self._pool)
        for number in list(self._unanswered):
            self._answer(number, Outcome("error", detail="the pool was closed"))

    def _start(self) -> pebble.ProcessPool:
        pool = pebble.ProcessPool(**self._options)
        with worker_start.without_interrupts():
            _ = pool.active  # reading it starts the workers
        return pool

    @staticmethod
    def _end(pool: pebble.ProcessPool) -> None:
        pool.stop()
        pool.join()

    def _send(self, number: int, item: _Item) -> None:
        item.attempts += 1
        item.sent = time.monotonic()
        pool = self._pool
        call = (self._function, item.args, item.timeout + _ORPHAN_GRACE)
        try:
            task = pool.schedule(_run, args=call, timeout=item.timeout)
        except RuntimeError:  # the pool broke; the watcher sends the item again
            return
        task.add_done_callback(lambda done: self._receive(pool, number, item, done))

    def _receive(self, pool: pebble.ProcessPool, number: int, item: _Item, task: Future) -> None:
        """Answers an item or sends it again. pebble calls this in its own thread when an item ends in any way."""
        with self._lock:
            if pool is not self._pool:
                return  # the item was sent again
        waited = time.monotonic() - item.sent
        error = CancelledError() if task.cancelled() else task.exception()
        if error is None:
            outcome = task.result()
        elif isinstance(error, BrokenProcessPool | CancelledError):
            return  # the watcher sends it again, or `close` answers it
        elif isinstance(error, TimeoutError):
            outcome = Outcome("timeout", detail=f"no result within {item.timeout} s", seconds=item.timeout)
        elif isinstance(error, pebble.ProcessExpired):
            status = "timeout" if error.exitcode == -signal.SIGALRM else "error"
            if error.exitcode == -signal.SIGKILL and self._send_again(number, item):
                return  # killed from outside, as the kernel does when memory is short
            outcome = Outcome(status, detail=f"the worker ended with code {error.exitcode}", seconds=waited)
        else:  # arguments or a result that cannot be pickled
            outcome = Outcome("error", detail=f"{type(error).__name__}: {error}"[:500], seconds=waited)
        self._answer(number, outcome)

    def _send_again(self, number: int, item: _Item) -> bool:
        """Sends an item whose worker died again. Returns False where no attempt is left or the pool is closed."""
        with self._lock:
            if item.attempts >= ATTEMPTS or self._closed.is_set():
                return False
            self._send(number, item)
            return True

    def _answer(self, number: int, outcome: Outcome) -> None:
        item = self._unanswered.pop(number, None)  # atomic: only the call that gets the item answers it
        if item is not None:
            item.future.set_result(outcome)

    def _watch(self) -> None:
        """Replaces a broken pool while items wait for a result."""
        while not self._closed.wait(0.2):
            if not self._unanswered or self._pool.active:
                continue
            given_up = []
            with self._lock:
                broken = self._pool
                with contextlib.suppress(BrokenProcessPool):  # no worker starts; the next round is the next attempt
                    self._pool = self._start()
                for number, item in list(self._unanswered.items()):
                    if item.attempts < ATTEMPTS:
                        self._send(number, item)
                    else:
                        given_up.append(number)
            for number in given_up:
                self._answer(number, Outcome("error", detail=f"the worker pool broke {ATTEMPTS} times"))
            if broken is not self._pool:
                self._end(broken)


def _run(function: Callable, args: tuple, orphan_after: float) -> Outcome:
    """Calls the function, in the worker.

    Failures are returned as text: some exceptions cannot be unpickled, which would break the pool.
    """
    signal.setitimer(signal.ITIMER_REAL, orphan_after)  # the kernel kills this process, in case the parent is gone
    start = time.perf_counter()
    try:
        outcome = Outcome("ok", function(*args), seconds=time.perf_counter() - start)
    except BaseException as error:  # SystemExit and MemoryError too: whatever it is, only this item fails
        notes = [note[:1000] for note in getattr(error, "__notes__", ())]  # the custom reward's says where it failed
        detail = " ".join([f"{type(error).__name__}: {error}"[:500], *notes])
        outcome = Outcome("error", detail=detail, seconds=time.perf_counter() - start)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome
