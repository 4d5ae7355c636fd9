"""Processes that have imported the package already: each is forked from one that has, which spares it some seconds.

The parent of all of them never touches a device, so that a fork is as good as a new interpreter. That `python -m
igrpo_jax.main` starts by itself is shown by the run of the fixture `whole`, which is an ordinary process.
"""

import contextlib
import multiprocessing.context
import os
import socket
import subprocess
import sys
import tempfile
import unittest.mock
from multiprocessing import forkserver, popen_forkserver
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = forkserver.ForkServer()  # another than that of the verifier's workers, which begin without jax
SERVER.set_forkserver_preload(["igrpo_jax.main", "igrpo_jax.train"])


class _Process(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process):
        with unittest.mock.patch.object(forkserver, "connect_to_new_process", SERVER.connect_to_new_process):
            return popen_forkserver.Popen(process)


def free_port() -> int:
    """Returns a port of this machine that nothing listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Started:
    """A process that runs the statements `program` with `sys.argv`, in the environment that is given."""

    def __init__(self, program: str, argv: list, env: dict[str, str]):
        self._folder = tempfile.TemporaryDirectory(prefix="igrpo_jax_")
        self.args = [str(argument) for argument in argv]
        self._process = _Process(target=_become, args=(program, self.args, env, self._folder.name))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal, or None while the process runs."""
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def ended(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Waits for the end, and returns the exit code and what was printed; kills the process after `timeout` s."""
        self._process.join(timeout)
        if late := self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        texts = [(Path(self._folder.name) / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        assert not late, f"ran for more than {timeout} s: {texts}"
        return subprocess.CompletedProcess(self.args, self._process.exitcode, *texts)


def ended(processes: list[Started], timeout: float = 300) -> list[subprocess.CompletedProcess]:
    """Returns how each of `processes` ended; where one is late, all of them are killed."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        return [process.ended(timeout) for process in processes]


def _become(program: str, argv: list[str], env: dict[str, str], folder: str) -> None:
    """Makes a fork of the server the process that was asked for."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [str(ROOT), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = argv
    os.chdir(ROOT)
    import jax

    jax.config.update("jax_platforms", env.get("JAX_PLATFORMS"))  # JAX read this variable in the server
    if "STORAGE_EMULATOR_HOST" in env:
        import buckets

        buckets.answer_of_control()
    exec(program, {"__name__": "igrpo_jax_test"})
