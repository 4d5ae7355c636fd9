"""What several processes need of the insides of JAX and C: it is there in the supported versions, or clearly missed."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from igrpo_jax.config import ClusterConfig
from igrpo_jax.distributed import abort, cluster
from igrpo_jax.errors import RunError

ROOT = Path(__file__).parents[2]


def test_the_installed_jax_has_what_is_used():
    assert not abort.MISSING
    abort.check_supported()
    assert abort.client() is None and abort.coordinator_address() is None  # of one process


def test_the_versions_named_are_those_that_are_installed():
    assert f'"{abort.SUPPORTED}"' in (ROOT / "setup.py").read_text()


def test_a_jax_without_it_runs_one_process_and_refuses_several(monkeypatch, caplog):
    monkeypatch.setattr(abort, "MISSING", "no attribute 'clusters'")
    with cluster.joined(ClusterConfig(), {}):
        assert cluster.gather(b"x") == [b"x"]
    assert re.search(r"single process: JAX [\d.]+ cannot detect a cluster \(no attribute 'clusters'\)", caplog.text)
    address = {"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 0}
    with pytest.raises(RunError, match=r"JAX [\d.]+ lacks .*'clusters'.*pip install 'jax>=0\.10\.2,<0\.13'"):
        cluster._meet(ClusterConfig(), address)


def test_a_jax_whose_insides_moved_is_noticed_at_import():
    program = """
import sys
import jax._src
jax._src.__dict__.pop("clusters", None)
sys.modules["jax._src.clusters"] = None
from igrpo_jax.distributed import abort, cluster
print(abort.MISSING, "|", abort.launcher())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "clusters" in done.stdout.partition("|")[0] and done.stdout.endswith("| None\n")


@pytest.mark.slow
def test_sigabrt_waits_as_long_as_its_number_and_the_handler_is_put_back():
    """6 s; a second signal would not wait for the first, so that one process shows both."""
    program = """
import os, signal, time
from igrpo_jax.distributed import abort
before = abort.delay_abort()
began = time.monotonic()
os.kill(os.getpid(), signal.SIGABRT)
print(5 < time.monotonic() - began < 60, flush=True)
abort.restore_abort(before)
os.kill(os.getpid(), signal.SIGABRT)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n" and done.returncode == -signal.SIGABRT, done.stderr


def test_without_cs_library_nothing_is_delayed(monkeypatch):
    def fails(name):
        raise TypeError("no library without a name")

    monkeypatch.setattr(abort.ctypes, "CDLL", fails)
    assert abort.delay_abort() is None
    abort.restore_abort(None)
