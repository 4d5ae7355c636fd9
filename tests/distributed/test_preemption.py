"""SIGTERM is a notice: noticed at the next check; and the end after the grace, whatever the process does."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from igrpo_jax.distributed import preemption


def test_the_notice_is_seen_at_the_next_check_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.noticed(60):
        preemption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the second changes nothing
        with pytest.raises(preemption.Preempted):
            preemption.check()
    assert signal.getsignal(signal.SIGTERM) == before
    assert preemption.is_told() and not preemption.noted()  # others of the run may not have heard of it yet
    preemption.check()  # of what the same program does next, such as an evaluation
    with preemption.noticed(60):
        preemption.check()  # of a later run
    preemption.notice("another process")  # which hears of it when this run is over
    assert not preemption.is_told()


def test_a_run_that_saves_in_time_is_not_ended_after_the_grace():
    before = set(threading.enumerate())
    with preemption.noticed(60):
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.noted()
        (timer,) = (thread for thread in set(threading.enumerate()) - before if isinstance(thread, threading.Timer))
    assert timer.finished.is_set()


def test_in_another_thread_nothing_changes():
    seen = []

    def run():
        with preemption.noticed(60):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_a_run_that_cannot_save_in_time_ends():
    program = """
import os, signal, time
from igrpo_jax.distributed import preemption
with preemption.noticed(0.3):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75
    assert "not saved within config.checkpoint.preemption_grace = 0.3 s of SIGTERM" in done.stderr


OUTSIDE = """
import ctypes, os, signal, sys, threading
from igrpo_jax.cli import exits
from igrpo_jax.distributed import preemption

kill = lambda: os.kill(os.getpid(), signal.SIGTERM)

def waits_in_c(_):
    threading.Timer(0.2, kill).start()
    ctypes.CDLL(None).sleep(20)  # as jax.distributed.initialize does for other processes

def starts(_):
    kill()

def waits_for_others(_):
    preemption.stay()
    kill()
    preemption.is_told() and print("told")
    raise preemption.Preempted("step 3 is saved")

def ends(_):
    with preemption.noticed(60):
        kill()
        preemption.noted() and print("noted")
    kill()
    threading.Timer(0.2, kill).start()
    ctypes.CDLL(None).sleep(1)
    raise preemption.Preempted("step 3 is saved")

exits.run({}, resumes={})
"""


@pytest.mark.parametrize(
    "command, line",
    [
        ("waits_in_c", "SIGTERM: ended, with nothing new to save; the same command resumes"),
        ("starts", "SIGTERM: ended, with nothing new to save; the same command resumes"),
        ("ends", "step 3 is saved; the same command resumes from there"),
        ("waits_for_others", "step 3 is saved; the same command resumes from there"),
    ],
)
def test_a_command_that_resumes_says_so_from_its_first_line_to_its_last(command, line):
    """Before a run takes notices, also in a call that returns late; and after it, where a second SIGTERM comes."""
    run = lambda resumes: subprocess.run(
        [sys.executable, "-c", OUTSIDE.format(command, resumes)], capture_output=True, text=True, timeout=60
    )
    done = run(True)
    lines = done.stderr.splitlines()
    assert done.returncode == 75 and lines[-1] == f"igrpo_jax: {line}" and lines.count(lines[-1]) == 1, done.stderr
    assert run(False).returncode == -signal.SIGTERM
