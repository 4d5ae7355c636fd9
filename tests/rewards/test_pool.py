"""igrpo_jax.rewards.pool: deadlines that hold whatever an item does, one outcome per item, nothing left behind.

Workers import this file, so it must not import jax.
"""

import ctypes
import itertools
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

import pytest
from pebble.common import CONSTS

from igrpo_jax.errors import InputError
from igrpo_jax.rewards import worker_start
from igrpo_jax.rewards.pool import Pool, _run

TIMEOUT = 3.0  # long enough for what is quick to be so on a busy machine
SLACK = 20.0  # seconds past the deadline; benchmarks/verifier.py measures how prompt it is


def work(kind, value=None):
    """What one item does; by name, so that items can be mixed."""
    if kind == "echo":
        return value
    if kind == "pid":
        return os.getpid()
    if kind == "loop":
        while True:
            pass
    if kind == "hang_in_c":  # one endless C call: Python-level signal handlers do not run during it
        return sum(itertools.repeat(0))
    if kind == "ignore_sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if kind == "exit":
        os._exit(3)
    if kind == "killed":  # from outside, as many times as the file `value` has lines
        path, counts = pathlib.Path(value), pathlib.Path(value).read_text().splitlines()
        if counts:
            path.write_text("\n".join(counts[1:]))
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"
    if kind == "sys_exit":
        sys.exit(3)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "raise":
        raise ValueError(value)
    if kind == "raise_unpicklable":
        raise _NeedsTwo(1, 2)
    if kind == "return_unpicklable":
        return lambda: value
    if kind == "memory":
        return len(bytearray(value))
    if kind == "variable":
        return os.environ.get(value)
    if kind == "environment":
        return {name: os.environ.get(name) for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS")}
    if kind == "blocked":
        return signal.pthread_sigmask(signal.SIG_BLOCK, [])
    if kind == "modules":
        return sorted(name for name in sys.modules if re.fullmatch(r"jax(lib)?|flax|sympy|wave", name))
    raise AssertionError(kind)


class _NeedsTwo(Exception):
    """Pickles, but does not unpickle: an exception of this kind breaks a naive pool."""

    def __init__(self, a, b):
        super().__init__("needs two")


@pytest.fixture(scope="module")
def pool():
    with Pool(work, workers=2, timeout=TIMEOUT, preload=("wave",), memory_gib=4.0) as pool:
        yield pool


def settle(futures, within=30.0):
    end = time.monotonic() + within
    return [future.result(timeout=max(end - time.monotonic(), 0.01)) for future in futures]


def test_values_in_order_once_each(pool):
    outcomes = settle([pool.submit("echo", i) for i in range(500)])
    assert [outcome.value for outcome in outcomes] == list(range(500))
    assert {outcome.status for outcome in outcomes} == {"ok"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("loop", marks=pytest.mark.proof), "hang_in_c", "ignore_sigterm"])
def test_killed_at_the_deadline_while_others_go_on(pool, kind, monkeypatch):
    if kind != "ignore_sigterm":
        monkeypatch.setattr(CONSTS, "term_timeout", 30)  # SIGTERM must do; there is no waiting for SIGKILL
    settle([pool.submit("echo", 1) for _ in range(4)])  # both workers are up
    start = time.monotonic()
    stuck = pool.submit(kind)
    others = settle([pool.submit("echo", i) for i in range(30)])
    assert not stuck.done(), "the other worker should have done all of these meanwhile"
    assert [outcome.value for outcome in others] == list(range(30))
    outcome = stuck.result(timeout=TIMEOUT + SLACK)
    assert outcome.status == "timeout"
    assert TIMEOUT <= time.monotonic() - start < TIMEOUT + SLACK
    # Both workers of a pool may hang at once; new ones take their place.
    assert [o.status for o in settle([pool.submit(kind), pool.submit(kind), pool.submit("echo")])] == [
        "timeout",
        "timeout",
        "ok",
    ]


@pytest.mark.parametrize(
    ("kind", "value", "detail"),
    [
        ("exit", None, "code 3"),
        ("segfault", None, "code -11"),
        ("sys_exit", None, "SystemExit"),
        ("raise", "what went wrong", "what went wrong"),
        ("raise_unpicklable", None, "needs two"),
        ("return_unpicklable", None, "code 1"),  # it ends the worker
        ("memory", 5 << 30, "MemoryError"),
    ],
)
def test_a_failure_is_an_error_of_its_item_only(pool, kind, value, detail):
    futures = [pool.submit(kind, value) if i in (5, 12) else pool.submit("echo", i) for i in range(30)]
    outcomes = settle(futures)
    assert [i for i, outcome in enumerate(outcomes) if outcome.status == "error"] == [5, 12]
    assert Counter(outcome.status for outcome in outcomes) == {"ok": 28, "error": 2}
    assert detail in outcomes[5].detail


def test_the_alarm_against_orphans_ends_with_its_item():
    """It would end a worker that waits for the next one."""
    assert _run(len, ("ab",), 600.0).value == 2 and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert _run(int, ("ab",), 600.0).status == "error" and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("times, status", [(1, "ok"), (2, "ok"), (3, "error")])
def test_an_item_whose_worker_is_killed_is_sent_again(pool, tmp_path, times, status):
    """Twice: the kernel kills whom it likes when memory is short, and the item need not be at fault."""
    path = tmp_path / "kills"
    path.write_text("\n".join("x" * times))
    outcomes = settle([pool.submit("killed", str(path)), *(pool.submit("echo", i) for i in range(10))])
    assert [outcome.value for outcome in outcomes[1:]] == list(range(10))
    assert outcomes[0].status == status and outcomes[0].value == ("done" if status == "ok" else None)


def test_arguments_that_cannot_be_pickled(pool):
    outcome = settle([pool.submit("echo", threading.Lock())])[0]
    assert outcome.status == "error"
    assert "pickle" in outcome.detail


@pytest.mark.slow
def test_an_idle_worker_that_dies_does_not_break_the_pool(pool):
    # As the kernel's out-of-memory killer does it. pebble by itself refuses all items from then on.
    victim = settle([pool.submit("pid")])[0].value
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.5)
    outcomes = settle([pool.submit("echo", i) for i in range(20)])
    assert [outcome.value for outcome in outcomes] == list(range(20))


@pytest.mark.proof
def test_a_worker_that_dies_with_the_lock_stops_the_others_for_seconds_only():
    """Red with pebble's own time-out: it would take two minutes."""
    with Pool(work, workers=2, timeout=TIMEOUT) as pool:
        settle([pool.submit("echo", 1)])
        assert pool._pool._pool_manager.worker_manager.workers_channel.mutex.acquire(timeout=5)
        outcomes = settle([pool.submit("echo", i) for i in range(4)], within=60)
    assert [outcome.value for outcome in outcomes] == list(range(4))


def test_environment_and_modules_of_a_worker(pool):
    environment, modules = settle([pool.submit("environment"), pool.submit("modules")])
    assert environment.value == {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TPU_VISIBLE_CHIPS": ""}
    assert modules.value == ["sympy", "wave"]  # of the server and preloaded; no jax


@pytest.mark.filterwarnings("error")
def test_a_worker_that_imports_jax_has_no_libtpu_and_no_warning_of_it(pool, monkeypatch):
    """A script that imports jax is imported by every worker, and each warned of a path that the user had not set."""
    from jax._src import cloud_tpu_init  # not above, because workers import this file

    (found,) = settle([pool.submit("variable", "TPU_LIBRARY_PATH")])
    monkeypatch.setenv("TPU_LIBRARY_PATH", found.value)
    assert cloud_tpu_init.get_tpu_library_path() == found.value  # and not the installed one
    with pytest.raises(OSError):
        ctypes.CDLL(found.value)


@pytest.mark.slow
def test_workers_get_the_present_environment_and_outlive_their_server(monkeypatch):
    """A server that is killed, as by a signal to all processes of a job, is replaced; no item is lost."""
    with Pool(work, workers=1, timeout=TIMEOUT) as pool:  # the server runs from here on at the latest
        settle([pool.submit("echo", 1)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "set later")
    monkeypatch.setenv("SET_LATER", "too")
    with Pool(work, workers=2, timeout=TIMEOUT, max_tasks=2) as pool:
        before = settle([pool.submit("variable", name) for name in ("CUDA_VISIBLE_DEVICES", "SET_LATER")])
        assert [outcome.value for outcome in before] == ["", "too"]
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        outcomes = settle([pool.submit("echo", i) for i in range(12)])
        assert [outcome.value for outcome in outcomes] == list(range(12))


def test_ctrl_c_does_not_reach_a_worker_and_still_reaches_the_parent():
    """From its first moment on: while a worker imports, it would print a traceback. Workers that replace it too."""
    with Pool(work, workers=1, timeout=TIMEOUT, max_tasks=1) as pool:
        outcomes = settle([pool.submit("blocked") for _ in range(3)])
    assert [outcome.value for outcome in outcomes] == [{signal.SIGINT}] * 3
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_from_many_threads(pool):
    results = {}

    def submit(thread):
        results[thread] = [outcome.value for outcome in settle([pool.submit("echo", (thread, i)) for i in range(50)])]

    threads = [threading.Thread(target=submit, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {thread: [(thread, i) for i in range(50)] for thread in range(8)}


@pytest.mark.slow
def test_the_clock_starts_after_the_imports(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import time\ntime.sleep(2.0)\ndef warm_up():\n    time.sleep(2.0)\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Pool(work, workers=1, timeout=TIMEOUT, preload=("slow_to_import:warm_up",)) as pool:
        assert settle([pool.submit("echo", 1)])[0].status == "ok"


def test_a_worker_that_a_dying_server_does_not_start_is_started_by_the_next(monkeypatch):
    start, failures = worker_start._Process._Popen, [EOFError("unexpected EOF"), ConnectionRefusedError()]

    def started(process):
        if failures:
            raise failures.pop()
        return start(process)

    monkeypatch.setattr(worker_start._Process, "_Popen", staticmethod(started))
    with Pool(work, workers=1, timeout=TIMEOUT) as pool:
        assert settle([pool.submit("echo", 1)])[0].status == "ok"
    assert not failures


@pytest.mark.slow
def test_workers_start_below_a_limit_of_the_shell(tmp_path):
    """As `ulimit -v` sets it, or a batch system: a process may not raise its own above it."""
    program = tmp_path / "below.py"
    program.write_text(
        "import os\nfrom igrpo_jax.rewards.pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    with Pool(os.getppid, workers=1, timeout=20.0, memory_gib=8.0) as pool:\n"
        "        print(pool.submit().result().status)\n"
    )
    command = ["bash", "-c", f"ulimit -v {6 << 20} && exec {sys.executable} {program}"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ok\n", done.stderr


def test_where_no_worker_starts_any_more_items_fail(monkeypatch):
    """Red if the thread that replaces a broken pool ends there: nobody would answer the item."""

    def fails(_):
        raise EOFError("unexpected EOF")

    with Pool(work, workers=1, timeout=TIMEOUT) as pool:
        worker = settle([pool.submit("pid")])[0].value
        monkeypatch.setattr(worker_start._Process, "_Popen", staticmethod(fails))
        os.kill(worker, signal.SIGKILL)
        outcome = settle([pool.submit("echo", 1)])[0]
    assert (outcome.status, outcome.detail) == ("error", "the worker pool broke 3 times")


@pytest.mark.slow
def test_where_no_server_can_be_made_workers_are_spawned(tmp_path):
    """The path of a socket has 107 bytes at most."""
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    program = tmp_path / "program.py"
    program.write_text(
        "import os\nfrom igrpo_jax.rewards.pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    with Pool(os.getppid, workers=1, timeout=20.0) as pool:\n"
        "        print(pool.submit().result().value == os.getpid())\n"
    )
    env = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == "True\n", done.stderr


def test_an_import_that_fails_is_left_to_the_item_that_needs_it():
    with Pool(work, workers=1, timeout=TIMEOUT, preload=("no_such_module", "wave:no_such_function")) as pool:
        assert settle([pool.submit("echo", 1)])[0].status == "ok"


def test_workers_are_recycled_and_no_item_is_lost():
    with Pool(work, workers=1, timeout=5, max_tasks=5) as pool:
        outcomes = settle([pool.submit("pid") for _ in range(12)])
    assert {outcome.status for outcome in outcomes} == {"ok"}
    assert sorted(Counter(outcome.value for outcome in outcomes).values()) == [2, 5, 5]


@pytest.mark.slow
def test_close_with_work_left_leaves_no_process_and_answers_every_item():
    before = set(multiprocessing.active_children())
    pool = Pool(work, workers=2, timeout=60)
    settle([pool.submit("echo", 1)])
    # More than a pipe holds, so that the thread that feeds the workers is blocked when the pool is closed.
    futures = [pool.submit(kind) for kind in ("hang_in_c", "ignore_sigterm")]
    time.sleep(0.3)
    futures += [pool.submit("echo", "x" * 100_000) for _ in range(20)]
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 30  # the two that hang would go on for 60
    assert {outcome.status for outcome in settle(futures, within=1)} == {"error"}
    assert settle([pool.submit("echo", 1)], within=1)[0].status == "error"
    assert set(multiprocessing.active_children()) <= before
    for worker in workers:
        assert not Path(f"/proc/{worker.pid}").exists()


def test_a_program_that_imports_jax_in_main_has_workers_without_it(tmp_path):
    # Spawned workers import the parent's __main__ again. `jax` here is a stand-in that only leaves its name behind.
    (tmp_path / "jax.py").write_text("", encoding="utf-8")
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""
            import sys
            from igrpo_jax.rewards.pool import Pool

            def has_jax():
                return "jax" in sys.modules

            def main():
                import jax
                with Pool(has_jax, workers=1, timeout=5) as pool:
                    print(has_jax(), pool.submit().result().value)

            if __name__ == "__main__":
                main()
        """),
        encoding="utf-8",
    )
    package_root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{package_root}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


CALLS = """
from igrpo_jax.errors import InputError
from igrpo_jax.rewards.pool import Pool
import igrpo_jax

def calls():
    for call in (
        lambda: Pool(print, 1, 5.0).close(),
        lambda: igrpo_jax.train_model(None, "runs/x"),
        lambda: igrpo_jax.evaluate_model(None, "model", "out"),
        lambda: igrpo_jax.generate_answers(None, "model", ["q"]),
    ):
        try:
            call()
        except InputError as error:  # a program that is not refused begins, and then its configuration is
            print("began" if "config = None" in str(error) else error)
        else:
            print("done")

"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "command", "said"),
    [
        ("calls()", "{0}", 'put its calls under `if __name__ == "__main__":`'),
        pytest.param(
            *("if True:\n    calls()", "-m program", 'put its calls under `if __name__ == "__main__":`'),
            marks=pytest.mark.proof,
        ),
        ("calls()", "- < {0}", "<stdin>: is not a file, so the verifier's processes can't import it; run"),
        ('if __name__ == "__main__":\n    calls()', "{0}", ""),
        pytest.param("calls()", '-c "$(cat {0})"', "", marks=pytest.mark.proof),
        pytest.param('if __name__ == "__main__":\n    calls()', "-m program", "", marks=pytest.mark.proof),
        pytest.param("calls()", "-m folder", "", marks=pytest.mark.proof),
    ],
)
def test_a_program_that_workers_can_not_import_is_refused_before_any_work(tmp_path, end, command, said):
    (tmp_path / "folder").mkdir()
    for name in ("program.py", "folder/__main__.py"):
        (tmp_path / name).write_text(CALLS + end)
    line = f"{sys.executable} {command.format(tmp_path / 'program.py')}"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])}
    shell = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    printed = shell.stdout.splitlines()
    assert "Traceback" not in shell.stderr and len(printed) == 4, shell
    assert all(said in text for text in printed) if said else printed == ["done", "began", "began", "began"]


def test_a_worker_whose_import_of_the_program_opens_a_pool_says_so(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(InputError, match="put its calls under"):
        Pool(work, 1, TIMEOUT)
