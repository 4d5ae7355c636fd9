"""Settings that must be in place before jax is imported. A GPU run overrides them from outside (JAX_PLATFORMS=cuda)."""

import collections
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import devices
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu would otherwise look for a TPU
os.environ.setdefault("XLA_FLAGS", devices.flags(8))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes of tests share a GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a download
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork and spawn
# PyTorch's and numpy's threads, which wait for each other on so small arrays, take three times as long as one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most of a test's time is XLA's, and its programs run once or twice: machine code that is not optimised, here and in
# subprocesses. The programs stay the same; 0 tests them optimised.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

PROGRAMS = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Several processes, each with whole files, where pytest-xdist is installed and nothing else is asked for.

    One more than there are cores: of two processes on two cores a third of the time is waiting, for subprocesses, time
    limits and disks. Each holds gigabytes, so there are no more than four. One, for a debugger: pytest -n 0.
    """
    options = config.option
    is_worker = hasattr(config, "workerinput")
    if config.pluginmanager.hasplugin("xdist") and options.numprocesses is None and not (is_worker or options.usepdb):
        options.numprocesses = min(4, (os.cpu_count() or 1) + 1)
        options.dist = "loadfile"
        options.loadscopereorder = False  # the order is that of pytest_collection_modifyitems


def pytest_collection_modifyitems(config, items):
    """Leaves proofs out where `-m` does not ask for them, and puts the slowest files first.

    At the end, one of these alone would leave the other processes idle. A slow test counts as 3 seconds, or as what its
    marker says: slow(seconds=60).
    """
    if "proof" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("proof")])
        items[:] = [item for item in items if not item.get_closest_marker("proof")]
    seconds = collections.Counter()
    for item in items:
        if marker := item.get_closest_marker("slow"):
            seconds[item.path] += marker.kwargs.get("seconds", 3)
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


@pytest.fixture(scope="module", autouse=True)
def survivors():
    """Leaves millions of objects that earlier files keep out of garbage collections; each took over a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def interrupts():
    """Lets SIGINT raise KeyboardInterrupt. A job in the background ignores it; a command that was interrupted ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """An uninterrupted run of `whole_runs.CONFIG`, and what it printed. Not to be written to.

    The processes of pytest-xdist share it: the first one that needs it makes it, and another waits until it is there.
    """
    import whole_runs

    base = tmp_path_factory.getbasetemp()
    path = (base.parent if hasattr(pytestconfig, "workerinput") else base) / "whole"
    path.mkdir(exist_ok=True)
    printed = path / "printed.txt"
    with open(path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            flags = whole_runs.command(path, path / "run", "log.profile_steps=(2,)", "log.trackers=('tensorboard',)")
            start = [sys.executable, "-m", "igrpo_jax.main", *flags]
            env, root = devices.environment(1), pytestconfig.rootpath
            done = subprocess.run(start, cwd=root, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            printed.write_text(done.stdout)
    return path / "run", printed.read_text()


@pytest.fixture(scope="session")
def bucket_service(tmp_path_factory):
    """The address of a storage service on localhost, see bucket_server.py."""
    pytest.importorskip("gcsfs", reason="gcsfs is missing; the extra dev brings it")
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is missing; the extra dev brings it")
    import buckets

    buckets.answer_of_control()
    command = [sys.executable, Path(__file__).with_name("bucket_server.py"), tmp_path_factory.mktemp("service")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process.stdout.readline().strip()
        process.kill()


@pytest.fixture
def bucket(bucket_service, monkeypatch, tmp_path):
    """A Bucket that is empty, and no local copies of anything."""
    import buckets

    for name, value in buckets.environment(bucket_service, tmp_path).items():
        monkeypatch.setenv(name, value)
    bucket = buckets.Bucket(bucket_service, tmp_path.name)
    yield bucket
    bucket.fault()


@pytest.fixture(scope="session")
def s3_service():
    """The address of moto's stand-in of S3. There is one, since s3fs keeps the address for the rest of the process."""
    pytest.importorskip("s3fs", reason="s3fs is missing; the extra test brings it")
    moto = pytest.importorskip("moto.server", reason="moto is missing; the extra test brings it")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3_bucket(s3_service, monkeypatch, tmp_path):
    """As `bucket`, in S3."""
    import buckets

    for name, value in buckets.s3_environment(s3_service, tmp_path).items():
        monkeypatch.setenv(name, value)
    bucket = buckets.Bucket(s3_service, tmp_path.name, "s3")
    if not bucket._files.exists("s3://bucket"):
        bucket._files.mkdir("s3://bucket")
    return bucket


@pytest.fixture(scope="module")
def environment():
    """As it was, once the module ends: libtpu is told by variables that no chip is here."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
