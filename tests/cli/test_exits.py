"""What a command that fails prints, and the code with which it ends."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import igrpo_jax
from igrpo_jax import __main__, config
from igrpo_jax.cli import exits
from igrpo_jax.distributed import preemption, watchdog
from igrpo_jax.errors import InputError, RunError

ROOT = Path(__file__).parents[2]
HIDDEN = """
import sys
sys.modules["torch"] = None  # as where it is not installed
{first}
import transformers
transformers.logging.get_logger("transformers").warning("a real warning")
"""


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("first", ["from igrpo_jax.cli import exits", "from igrpo_jax import export", "pass"])
def test_without_pytorch_transformers_gives_no_advice_and_still_warns(first):
    """The third shows that there is advice, and that the test would see it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    start = [sys.executable, "-c", HIDDEN.format(first=first)]
    done = subprocess.run(start, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "a real warning" in done.stderr
    assert ("PyTorch was not found" in done.stderr) == (first == "pass")


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore",
            "out of device memory in update (step 3), last program accumulate 8192: lower "
            "learner.tokens_per_microbatch or learner.logprob_chunk",
        ),
        (
            "INTERNAL: the compiler gave up\nmore",
            "JAX failed in update (step 3), last program accumulate 8192: INTERNAL: the compiler gave up",
        ),
    ],
)
def test_what_jax_raises_is_named_with_its_phase_and_shapes(monkeypatch, capsys, text, words):
    def command(_):
        with watchdog.watching(config.WatchdogConfig()), watchdog.phase("update", "step 3"):
            watchdog.running("accumulate 8192")
            raise jax.errors.JaxRuntimeError(text)

    with pytest.raises(SystemExit) as stop:
        exits.run(command)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "Traceback" in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("igrpo_jax: error: ") and words in last


@pytest.mark.parametrize(
    "error, code, line",
    [
        (RunError("the disk is full"), 1, "error: the disk is full"),
        (preemption.Preempted("step 3 is saved"), 75, "step 3 is saved; the same command resumes from there"),
        (InputError("config.seed = x"), 2, "error: config.seed = x"),
    ],
)
@pytest.mark.parametrize("traces", [False, True])  # JAX adds notes to errors that leave a traced function
def test_exit_codes(capsys, error, code, line, traces):
    def command(_):
        raise error

    with pytest.raises(SystemExit) as stop:
        exits.run((lambda _: jax.jit(command)(0)) if traces else command)
    assert stop.value.code == code and capsys.readouterr().err == f"igrpo_jax: {line}\n"


# A command to which Ctrl-C comes in a place of its own.
DROPPED = """
import gc, signal, time
from igrpo_jax.cli import exits

class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)

def command(_):
    {}
    time.sleep(30)

exits.run(command)
"""


GARBAGE = (
    "gc.callbacks.append(lambda phase, _: phase == 'start' and Dropped.__del__(0)), gc.collect(), gc.callbacks.clear()"
)


@pytest.mark.parametrize("where", ["Dropped()", GARBAGE], ids=["destructor", "garbage"])
def test_ctrl_c_is_not_lost_where_python_drops_exceptions(where):
    """In a destructor, and in a callback of the garbage collector, of which jax has one."""
    done = subprocess.run([sys.executable, "-c", DROPPED.format(where)], capture_output=True, text=True, timeout=25)
    assert done.returncode == 130 and done.stderr.startswith("igrpo_jax: interrupted;"), done.stderr
    assert done.stderr.count("\n") == 1


IMPORTED = """
import signal
from igrpo_jax.cli import exits

def command(_):
    {}
    print("begun")
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("numpy._core.multiarray failed to import") from None

exits.run(command)
"""


@pytest.mark.parametrize("first, code", [("pass", 130), ("raise ImportError('jax')", 1)])
def test_ctrl_c_while_c_code_imports_is_no_failed_import(first, code):
    """An import that fails by itself still is one."""
    done = subprocess.run([sys.executable, "-c", IMPORTED.format(first)], capture_output=True, text=True, timeout=25)
    assert done.returncode == code and ("Traceback" in done.stderr) == (code == 1)
    assert done.stdout == "begun\n" * (code == 130)  # which a pipe gets at the end alone
    assert code == 1 or done.stderr.startswith("igrpo_jax: interrupted;")


# A command with an exit handler, which Ctrl-C ends while it cleans up, or while its exit handler runs.
TWICE = """
import atexit, os, signal, time
from igrpo_jax.cli import exits

atexit.register(lambda: (os.write(1, b"exit handler"), signal.raise_signal(signal.SIGINT), time.sleep(20)))

def command(_):
    try:
        raise KeyboardInterrupt
    finally:
        {}

exits.run(command)
"""


@pytest.mark.parametrize(
    "meanwhile, code, printed", [("raise KeyboardInterrupt", 130, ""), ("pass", -signal.SIGINT, "exit handler")]
)
def test_a_second_ctrl_c_ends_the_process_at_once_and_without_a_traceback(meanwhile, code, printed):
    done = subprocess.run([sys.executable, "-c", TWICE.format(meanwhile)], capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stdout) == (code, printed)
    assert done.stderr.startswith("igrpo_jax: interrupted;") and done.stderr.count("\n") == 1


def test_a_pipe_that_is_closed_is_named():
    code = "from igrpo_jax.cli import exits; exits.run(lambda _: print(100_000 * 'text'))"
    done = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()
    said = done.stderr.read()
    assert done.wait(timeout=60) == 1 and said.count("\n") == 1
    assert said.startswith("igrpo_jax: error: stdout was closed by the command that it is piped into")


LINES = "print('text')"
CONSOLE = "__import__('igrpo_jax.outputs.console').outputs.console.Console().message('text')"
UNBUFFERED = "print('text'), print('more')"
FAILS = "(print('text'), [][1])"
WRONG = "(print('text'), exec('raise exits.InputError(1)'))"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "command, code, words",
    [
        (LINES, 1, "error: stdout: cannot be written (No space left on device); free some space"),
        (f"{LINES}, print(100_000 * 'text')", 1, "error: stdout: cannot be written (No space left on device)"),
        (UNBUFFERED, 1, "error: stdout: cannot be written (No space left on device)"),
        (CONSOLE, 1, "error: stdout: cannot be written (No space left on device)"),
        (FAILS, 1, "IndexError: list index out of range"),
        (WRONG, 2, "error: 1"),
    ],
    ids=["end", "middle", "unbuffered", "console", "other", "input"],
)
def test_a_full_disk_under_stdout_is_named(command, code, words):
    start = [sys.executable, "-c", f"from igrpo_jax.cli import exits; exits.run(lambda _: ({command}))"]
    env = os.environ | {"PYTHONUNBUFFERED": "1" if command == UNBUFFERED else ""}
    with open("/dev/full", "w") as full:
        done = subprocess.run(start, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=env)
    assert done.returncode == code and words in done.stderr
    assert "Exception ignored" not in done.stderr
    assert ("Traceback" in done.stderr) == (command == FAILS)


@pytest.mark.parametrize("command", sorted(__main__.COMMANDS))
def test_every_command_prints_the_version(monkeypatch, capsys, command):
    module = importlib.import_module(f"igrpo_jax.{command}" + ".__main__" * (command in ("aot", "probe", "report")))
    for flag in ("--version", "-V"):
        monkeypatch.setattr(sys, "argv", ["igrpo_jax", flag])
        if command == "rewards.grade":
            with pytest.raises(SystemExit) as stop:
                module.main()
            assert not stop.value.code
        else:
            exits.run(module.main)
        assert __main__.main() == 0
        assert capsys.readouterr().out == f"{igrpo_jax.__version__}\n" * 2
