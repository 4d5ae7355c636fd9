"""Signs of life between the processes of a run: each writes that it lives, and ends when another one has ended.

Process 0 keeps the key-value store through which they communicate. Its key `alive/I` holds what process I writes every
second, `over` holds why they all end, because of which process and with which exit code, and `told/I` says that process
I has read that. See `cluster` for the consequences.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

from igrpo_jax.distributed import abort, preemption, watchdog
from igrpo_jax.errors import one_line

_ALIVE, _TOLD, _OVER = "igrpo_jax/alive/", "igrpo_jax/told/", "igrpo_jax/over"  # keys; the first two by process
_INTERVAL = 1.0  # seconds between two signs of life, and between two looks at the others
LOST = 69  # exit code, EX_UNAVAILABLE: another process is gone without an error; the same command on all resumes
_NOTICE = 10.0  # seconds that the others are given to take note of the end
FOREVER = 1 << 30  # ms


class Peers:
    """Tells the other processes that this one lives, and ends it when another one has failed or is missing.

    Args:
        silence: seconds without a sign of life after which a process is taken for ended.
    """

    def __init__(self, silence: float):
        self._silence = silence
        self._client = abort.client()
        self._process = jax.process_index()
        self._processes = jax.process_count()
        # Seconds that `_look` has counted. Time in which this process was stopped is not among them: it could not have
        # heard the others.
        self._clock = 0.0
        self._last_beat = time.monotonic()  # when process 0 last took a sign of life
        self._heard = {i: (f"process {i}", "", 0.0) for i in range(self._processes)}  # name, phase, time on `_clock`
        self._numbers = dict.fromkeys(self._heard, -1)  # number of the last sign of life of each process
        self._done = threading.Event()  # the block has ended without a failure, or has told the others of one
        self._failing = threading.Event()  # this process ends because of an error of its own
        self._over = threading.Event()  # this process ends because of another one
        self._ending = threading.Lock()
        self._abort_handler = abort.delay_abort()  # `_listen` then has the time to say who has ended
        loops = (self._beat, self._look, self._listen)
        self._threads = [threading.Thread(target=loop, name=loop.__name__, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def wait_for_end(self) -> None:
        """Waits until all processes have come here, and parts from them; after that, the end of one is no failure."""
        preemption.stay()
        self._client.wait_at_barrier("igrpo_jax/end", FOREVER)
        # One that was killed while it waited has come too. Here it is missing, and `_look` finds it.
        self._client.wait_at_barrier("igrpo_jax/done", FOREVER)
        self._stop()
        # Process 0 keeps the store until this has reached each of the others, and none of them aborts when it ends.
        jax.distributed.shutdown()

    def close(self) -> None:
        """Ends the threads, and no longer delays an abort."""
        self._stop()
        abort.restore_abort(self._abort_handler)

    def _stop(self) -> None:
        """Ends the threads."""
        if self._done.is_set():
            return
        self._done.set()
        if self._process == 0:
            self._publish(0, "")  # where nothing was published before: all then stop listening
        for thread in self._threads:
            thread.join(2 * _INTERVAL)  # a thread that asks a process 0 which is gone gets no answer

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process ends. Does not return where another process is the reason."""
        reason = f"{type(error).__name__}: {one_line(error)[:500]}".removesuffix(": ")
        if may_follow(error):
            say(f"{reason}; checking whether another process has ended")
            if self._over.wait(1.5 * self._silence):
                self._threads[-1].join()  # `_listen` ends this process
        self._failing.set()
        phase = watchdog.current() and f" in {watchdog.current()}"
        self._publish(self._process, f"process {self._process} ({socket.gethostname()}) failed{phase}: {reason}")
        self._notice(culprit=self._process)

    def _publish(self, culprit: int, text: str, code: int = 1) -> None:
        """Tells all processes why they end, because of which process, and with which exit code."""
        with contextlib.suppress(RuntimeError):  # another was first, or process 0 is gone
            self._client.key_value_set(_OVER, json.dumps({"culprit": culprit, "text": text, "code": code}))

    def _notice(self, culprit: int) -> None:
        """Says that this process knows; process 0, which keeps the store, gives the others time to read it and end."""
        with contextlib.suppress(RuntimeError):
            if self._process:
                self._client.key_value_set(f"{_TOLD}{self._process}", "", allow_overwrite=True)
                return
            others, deadline = self._processes - 1 - (culprit != 0), time.monotonic() + _NOTICE
            while len(self._client.key_value_dir_get(_TOLD)) < others and time.monotonic() < deadline:
                time.sleep(_INTERVAL / 10)
            time.sleep(3 * _INTERVAL)

    def _beat(self) -> None:
        """Writes that this process lives, and reads what the others wrote."""
        number = 0
        while not self._done.is_set():
            number += 1
            sign = {"host": socket.gethostname(), "phase": watchdog.current(), "preempted": preemption.is_told()}
            text = json.dumps(sign | {"number": number})
            with contextlib.suppress(RuntimeError):
                self._client.key_value_set(f"{_ALIVE}{self._process}", text, allow_overwrite=True)
                self._last_beat = time.monotonic()
                for key, text in self._client.key_value_dir_get(_ALIVE):
                    self._hear(int(key.rpartition("/")[2]), json.loads(text))
            self._done.wait(_INTERVAL)

    def _hear(self, process: int, sign: Mapping[str, Any]) -> None:
        """Takes note of a sign of life, if it is a new one; a notice of preemption in it counts here too."""
        if sign["number"] == self._numbers[process]:
            return
        self._numbers[process] = sign["number"]
        name = f"process {process} ({sign['host']})"
        self._heard[process] = (name, sign["phase"], self._clock)
        if sign["preempted"]:
            preemption.notice(f"SIGTERM of {name}")

    def _look(self) -> None:
        """Ends this process, or all, when another has been silent for too long, or process 0 is gone.

        `_listen` may not learn that process 0 is gone, because JAX aborts in the thread that would tell it. So if
        process 0 takes no signs of life, this checks its address, while `abort.delay_abort` still delays the end.
        """
        last = time.monotonic()
        while not self._done.wait(_INTERVAL):
            now = time.monotonic()
            self._clock += min(now - last, 2 * _INTERVAL)
            last = now
            if self._process and now - self._last_beat > 2 * _INTERVAL and _is_refused(abort.coordinator_address()):
                self._end_without_first()
            for process, (name, _, heard) in self._heard.items():
                silent = self._clock - heard
                if process != self._process and silent > self._silence:
                    text = f"{name} has not been heard from for {silent:.0f} s; {self._was_in(process)}"
                    if process == 0:  # nothing reaches the others without it
                        self._end(text, LOST)
                    self._publish(process, text, LOST)

    def _listen(self) -> None:
        """Ends this process when another has failed, or process 0 is gone.

        It always keeps a request open at process 0, because an open request fails at once when process 0 ends, while a
        new one would wait.
        """
        over = None
        while over is None:
            try:
                over = json.loads(self._client.blocking_key_value_get(_OVER, FOREVER))
            except RuntimeError as error:
                if self._done.is_set():
                    return
                if "DEADLINE_EXCEEDED" not in str(error):
                    self._end_without_first()
        if over["text"] and not self._done.is_set():  # without a text, all are done
            self._follow(over)

    def _follow(self, over: Mapping[str, Any]) -> None:
        """Ends this process too, unless it is about to end by itself: each process reports an error that all have."""
        self._over.set()
        self._notice(over["culprit"])
        if not self._failing.wait(2 * _INTERVAL):
            self._end(over["text"], over["code"])

    def _end_without_first(self) -> NoReturn:
        time.sleep(_INTERVAL)  # JAX prints a stack of its own now, and the reason should be the last line
        self._end(f"{self._heard[0][0]} has ended or cannot be reached; {self._was_in(0)}", LOST)

    def _was_in(self, process: int) -> str:
        return f"it was in {self._heard[process][1] or 'no phase of a run'}"

    def _end(self, text: str, code: int) -> NoReturn:
        if self._done.is_set():  # meanwhile
            sys.exit()  # of this thread only
        self._ending.acquire()  # never released: the first text is the one that is printed
        say(f"{text}. This process ends too; the same command on all resumes from what was saved")
        os._exit(code)


def _is_refused(address: str | None) -> bool:
    """Returns whether nothing listens at HOST:PORT any more; False where this cannot be seen."""
    host, _, port = (address or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_INTERVAL).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False


def say(message: str) -> None:
    """Prints an error to stderr, after what is still to be printed to stdout."""
    sys.stdout.flush()
    sys.stderr.write(f"igrpo_jax: error: {message}\n")
    sys.stderr.flush()


def may_follow(error: BaseException | None) -> bool:
    """Returns whether `error`, or a cause of it, is an error of JAX that another process's end may bring about.

    JAX's collectives on the CPU raise ValueErrors whose text begins with a status in capitals, as JAX's own errors do.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or re.match("[A-Z_]{5,}: ", str(error)):
            return "RESOURCE_EXHAUSTED" not in str(error)
        error = error.__cause__ or error.__context__
    return False
