"""Runs a command: its errors become one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 3 does not fit (aot), 69 another process of the run is gone and 75
preempted (after both the same command resumes), 130 interrupted.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from igrpo_jax import __version__
from igrpo_jax.distributed import preemption, watchdog
from igrpo_jax.errors import InputError, RunError, one_line

GOES_ON = "the same command resumes from what was saved, if anything was"

# Read by transformers when it is first imported: without PyTorch, which nothing here needs, it prints advice to install
# it. Its warnings are not affected.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def run(command: Callable[[list[str]], None], resumes: bool = False) -> None:
    """Runs `command(sys.argv)`, and ends the process with an exit code where it fails. --version prints the version.

    Errors that need no traceback are printed as one line. All others are printed with their traceback; below that of an
    error of JAX, one line names the phase in which it occurred and what to change.

    Args:
        resumes: whether the same command goes on after a SIGTERM, which then ends it with 75 from the first line on.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.unraisablehook = _not_raised
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's job in the background ignores it
        signal.signal(signal.SIGINT, _interrupt)
    if resumes:
        preemption.listen()
    try:
        if {"--version", "-V"} & {*sys.argv[1:]}:
            print(__version__)
        else:
            command(sys.argv)
        if sys.stdout:  # None if the command was started with a stdout that is closed
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        _exit(_print_error(f"stdout was closed by the command that it is piped into; {GOES_ON}", 1))
    except (InputError, RunError) as error:
        _exit(_print_error("; ".join([str(error), *_notes(error)]), 2 if isinstance(error, InputError) else 1))
    except preemption.Preempted as error:
        _exit(_said(f"{error}; the same command resumes from there", preemption.EXIT_CODE))
    except KeyboardInterrupt as error:
        _end_interrupted(error)
    except Exception as error:
        if isinstance(error, ImportError) and _interrupted.is_set():  # C code that was importing turned it into this
            _end_interrupted(error)
        # Another file's error has its name, and a line end more does no harm where stdout can be written after all.
        if isinstance(error, OSError) and not error.filename and (reason := _stdout_failure("\n")):
            fix = f"free some space, or send it elsewhere; {GOES_ON}"
            _exit(_print_error(f"stdout: cannot be written ({reason}); {fix}", 1))
        traceback.print_exc()
        # By name: jax.errors is not imported before a command needs it.
        is_of_jax = type(error).__name__ == "JaxRuntimeError"
        _exit(_print_error(_device_error(str(error)), 1) if is_of_jax else 1)


_interrupted = threading.Event()  # Ctrl-C has come


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Raises KeyboardInterrupt as Python's own handler does."""
    _interrupted.set()
    raise KeyboardInterrupt


def _end_interrupted(error: BaseException) -> NoReturn:
    """Ends the process after Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends exit handlers that wait
    # A run has noted what it has saved, and where.
    code = _said(f"interrupted; {'; '.join(_notes(error)) or GOES_ON}", 130)
    is_second = isinstance(error, KeyboardInterrupt) and isinstance(error.__context__, KeyboardInterrupt)
    if is_second:  # during the clean-up of the first
        os._exit(code)
    _exit(code)


def _notes(error: BaseException) -> list[str]:
    """Returns what was added to an error on its way, such as what a run has saved, without what JAX adds.

    JAX adds to every error of a traced function that it has shortened the traceback, which is not printed here.
    """
    return [note for note in getattr(error, "__notes__", []) if "JAX_TRACEBACK_FILTERING" not in note]


def _stdout_failure(text: str = "") -> str:
    """Writes `text` and what stdout still holds; returns why this fails, and drops it then, or "" if it does not."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        _drop_stdout()
        return error.strerror or type(error).__name__
    return ""


def _drop_stdout() -> None:
    """Sends what is left to nowhere. Else Python would try again at exit to write it, and report another error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _not_raised(unraisable: Any) -> None:
    """Repeats a Ctrl-C that came where Python drops every exception, and reports other such errors as Python does.

    Such places are destructors and callbacks of the garbage collector; jax has one of the latter.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        # Not sooner: a signal between Python's last look at signals and a system call that waits stops nothing before
        # that call ends, and a busy machine may hold the thread just there.
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _exit(code: int) -> NoReturn:
    """Ends the process. One of several ends at once, because JAX's exit handlers would wait for the others in vain."""
    _stdout_failure()
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def _device_error(text: str) -> str:
    """Returns one line about an error of JAX: the phase with its shapes, its message, and what to change."""
    phase = watchdog.current() or "no phase of a run"
    message = one_line(text.partition("\n")[0])[:300]
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return (
            f"JAX failed in {phase}: {message}; if it happens again while a program is compiled, try "
            "learner.attention = xla, or another version of jax"
        )
    smaller = next((fields for name, fields in watchdog.SMALLER.items() if name in phase), "the sizes of what runs")
    return (
        f"out of device memory in {phase}: lower {smaller}; more devices on mesh.fsdp or mesh.tensor hold smaller "
        f"parts of the weights ({message})"
    )


def _print_error(message: str, code: int) -> int:
    """Prints an error; returns the exit code."""
    return _said(f"error: {message}", code)


def _said(message: str, code: int) -> int:
    """Prints why the command ends, to stderr; returns the exit code."""
    with contextlib.suppress(OSError):  # stderr may go into the pipe that is closed, or to the disk that is full
        print(f"igrpo_jax: {message}", file=sys.stderr, flush=True)
    return code
