"""Tiny decoders for tests: their shapes, random parameters, and a mesh of one device."""

import jax
import numpy as np

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import decoder
from igrpo_jax.models.config import DecoderConfig, MambaConfig

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "pattern": "*-*-",
    "rope_theta": 1000.0,
    "rms_norm_eps": 1e-5,
    "qkv_bias": True,
    "tie_embeddings": False,
    "max_position_embeddings": 256,
}
NO_LIMIT = (0.0, float("inf"))


def tiny_config(**changes):
    """A DecoderConfig of two dense layers, with the fields in `changes`."""
    return DecoderConfig(**TINY | changes)


def hybrid_config():
    """A DecoderConfig of Mamba-2, attention without positions, and MLPs without a gate."""
    mamba = MambaConfig(4, 8, num_groups=2, state_size=8, conv_size=4, chunk_size=8, time_step_limit=NO_LIMIT)
    return tiny_config(pattern="M-*M", rope_theta=None, qkv_bias=False, mlp="relu2", mamba=mamba)


def random_params(cfg, seed=0):
    """Float32 parameters on the host: all are random, biases and scales too. numpy draws without compiling anything."""
    draw = np.random.default_rng(seed).normal
    params = {path: draw(path.endswith("scale"), 0.2, shape) for path, shape in decoder.shapes(cfg).items()}
    return {path: value.astype(np.float32) for path, value in params.items()}


def one_device():
    """A mesh of the first device."""
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
