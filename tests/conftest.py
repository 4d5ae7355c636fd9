"""Settings that must be in place before jax is imported. A GPU run overrides them from outside (JAX_PLATFORMS=cuda)."""

import os
import shutil
import tempfile

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

import numpy as np
import pytest


def pytest_unconfigure():
    """Deletes the compiled programs in the process that made their folder, which is the last one to end."""
    if PROGRAMS:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny():
    """A DecoderConfig of two layers, and its parameters on the host: all random, biases and scales too."""
    from igrpo_jax.models.config import DecoderConfig

    c = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        pattern="*-*-",
        rope_theta=1000.0,
        rms_norm_eps=1e-5,
        qkv_bias=True,
        tie_embeddings=False,
        max_position_embeddings=256,
    )
    return c, _random(c)


@pytest.fixture(scope="session")
def hybrid():
    """As `tiny`, of Mamba-2, attention without positions, and MLPs without a gate."""
    from igrpo_jax.models.config import DecoderConfig, MambaConfig

    c = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        pattern="M-*M",
        rope_theta=None,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
        max_position_embeddings=256,
        mlp="relu2",
        mamba=MambaConfig(
            4, 8, num_groups=2, state_size=8, conv_size=4, chunk_size=8, time_step_limit=(0.0, float("inf"))
        ),
    )
    return c, _random(c)


def _random(c):
    from igrpo_jax.models import decoder

    draw = np.random.default_rng(0).normal
    params = {path: draw(path.endswith("scale"), 0.2, shape) for path, shape in decoder.shapes(c).items()}
    return {path: value.astype(np.float32) for path, value in params.items()}


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
