"""Runs the commands of a study for matched_budget.py: several at a time, each on its own cores, for a limited time."""

import fcntl
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from igrpo_jax.distributed.preemption import EXIT_CODE

ROOT = Path(__file__).resolve().parent.parent


class OutOfTime(Exception):
    """The time of a study is over before its end; the same command goes on from there."""


def main_command(config: Path, workdir: Path, settings: dict[str, Any]) -> list[str]:
    """Returns the command of a run in `workdir` with these settings."""
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "igrpo_jax.main", "--config", str(config), "--workdir", str(workdir), *flags]


def call(command: list[str], log: Path, cores: list[int] | None = None, stop_at: float = math.inf) -> None:
    """Runs a command with its output in `log`, which is locked while it runs.

    Args:
        cores: the cores on which it may run; None for all.
        stop_at: when the command gets SIGTERM, at which a run saves a checkpoint and ends; by time.monotonic().

    Raises:
        OutOfTime: the command was stopped before its end, or would have begun after `stop_at`.
        SystemExit: the command failed; the message has the end of its output.
    """
    if time.monotonic() >= stop_at:
        raise OutOfTime
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        _lock(file)
        pin = (lambda: os.sched_setaffinity(0, cores)) if cores and hasattr(os, "sched_setaffinity") else None
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
        process = subprocess.Popen(command, stdout=file, stderr=file, preexec_fn=pin, env=environment)
        code = _wait(process, stop_at)
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)}\nended with exit code {code}; the end of {log}:\n{tail}")


def _wait(process: subprocess.Popen, stop_at: float) -> int:
    """Returns the exit code of a process that ends by itself.

    Raises:
        OutOfTime: it was stopped, here or by whoever takes the machine away.
    """
    stopped = False
    try:
        code = process.wait(None if math.isinf(stop_at) else max(0.0, stop_at - time.monotonic()))
    except subprocess.TimeoutExpired:
        stopped = True
        process.terminate()
        code = process.wait()
    except BaseException:
        process.kill()
        raise
    if code == EXIT_CODE or (stopped and code == -signal.SIGTERM):  # the latter before it listens for SIGTERM
        raise OutOfTime
    return code


def _lock(log: TextIO) -> None:
    """Waits until no other process locks `log`. Children inherit the lock and keep it if this process is killed."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"waiting for other processes that still write {log.name} ...", flush=True)
        fcntl.flock(log, fcntl.LOCK_EX)


def in_parallel(jobs: int, work: Callable[[Any, list[int] | None], None], items: Sequence[Any]) -> None:
    """Calls `work(item, cores)` for all items, `jobs` at a time, each with its own cores; the first error ends it.

    Raises:
        OutOfTime: no call failed, and at least one raised it.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    free_cores = queue.SimpleQueue()
    for job in range(jobs):
        free_cores.put(cores[job::jobs] if jobs > 1 else None)
    failed = threading.Event()

    def work_on(item: Any) -> None:
        own_cores = free_cores.get()
        try:
            if not failed.is_set():
                work(item, own_cores)
        except BaseException:
            failed.set()
            raise
        finally:
            free_cores.put(own_cores)

    with ThreadPoolExecutor(jobs) as pool:
        errors = [error for future in [pool.submit(work_on, item) for item in items] if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, OutOfTime)):  # failures first
        raise error
