"""Settings that must be in place before jax is imported. A GPU run overrides them from outside (JAX_PLATFORMS=cuda)."""

import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu would otherwise look for a TPU
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes of tests share a GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a download
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork and spawn
# Compiled programs are shared by all tests, their workers and their subprocesses, in one folder per session, or in the
# folder that the environment names. JAX's own thresholds would leave out the small programs, which are most of ours.
PROGRAMS = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="igrpo_jax_programs_")
if PROGRAMS:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_unconfigure():
    """Deletes the compiled programs in the process that made their folder, which is the last one to end."""
    if PROGRAMS:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


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


@pytest.fixture(scope="module")
def compile_fast():
    """Machine code that is not optimised, for modules whose programs run once or twice. The programs stay the same."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An uninterrupted run of `whole_runs.CONFIG`, and what it printed. Not to be written to."""
    import whole_runs

    path = tmp_path_factory.mktemp("whole")
    return path / "run", whole_runs.run(path, path / "run")
