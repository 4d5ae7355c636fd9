"""Settings that must be in place before jax is imported. A GPU run overrides them from outside (JAX_PLATFORMS=cuda)."""

import collections
import os
import shutil
import subprocess
import sys
import tempfile

import devices
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu would otherwise look for a TPU
os.environ.setdefault("XLA_FLAGS", devices.flags(8))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes of tests share a GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a download
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork and spawn
# Most of a test's time is XLA's, and its programs run once or twice: machine code that is not optimised, here and in
# subprocesses. The programs stay the same; 0 tests them optimised.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

PROGRAMS = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two processes, each with whole files, where pytest-xdist is installed and nothing else is asked for.

    One process, for example with a debugger: pytest -n 0.
    """
    options = config.option
    is_worker = hasattr(config, "workerinput")
    if config.pluginmanager.hasplugin("xdist") and options.numprocesses is None and not (is_worker or options.usepdb):
        options.numprocesses = 2
        options.dist = "loadfile"
        options.loadscopereorder = False  # the order is that of pytest_collection_modifyitems


def pytest_collection_modifyitems(items):
    """Puts the slowest files first: at the end, one of them alone would leave the other process idle.

    A slow test counts as 5 seconds, or as what its marker says: slow(seconds=60).
    """
    seconds = collections.Counter()
    for item in items:
        if marker := item.get_closest_marker("slow"):
            seconds[item.path] += marker.kwargs.get("seconds", 5)
    items.sort(key=lambda item: -seconds[item.path])


def pytest_configure(config):
    """Lets all tests, their workers and their subprocesses share compiled programs, in one folder per session.

    A JAX_COMPILATION_CACHE_DIR of the environment wins, and is kept. JAX's own thresholds would leave out the small
    programs, which are most of ours.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.stash[PROGRAMS] = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="igrpo_jax_")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_unconfigure(config):
    """Deletes the compiled programs in the process that made their folder, which is the last one to end."""
    if PROGRAMS in config.stash:
        shutil.rmtree(config.stash[PROGRAMS], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny():
    """A DecoderConfig of two layers, and its parameters on the host: all random, biases and scales too."""
    import tiny_models

    cfg = tiny_models.tiny_config()
    return cfg, tiny_models.random_params(cfg)


@pytest.fixture(scope="session")
def hybrid():
    """As `tiny`, of Mamba-2, attention without positions, and MLPs without a gate."""
    import tiny_models

    cfg = tiny_models.hybrid_config()
    return cfg, tiny_models.random_params(cfg)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, pytestconfig):
    """An uninterrupted run of `whole_runs.CONFIG`, and what it printed. Not to be written to."""
    import whole_runs

    path = tmp_path_factory.mktemp("whole")
    flags = whole_runs.command(path, path / "run", "log.profile_steps=(2,)", "log.trackers=('tensorboard',)")
    start = [sys.executable, "-m", "igrpo_jax.main", *flags]
    environment = os.environ | {"XLA_FLAGS": devices.flags(1)}
    done = subprocess.run(
        start, cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return path / "run", done.stdout
