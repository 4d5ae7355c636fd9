"""Tiny decoders for tests: their shapes, random parameters, and a mesh of one device."""

import jax
import numpy as np
from flax import nnx

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import decoder
from igrpo_jax.models.config import DecoderConfig, MambaConfig
from igrpo_jax.models.mamba2 import Mamba2

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


def mixer_weights(params):
    """The parameters, by name, of the first sublayer of a hybrid decoder, which is Mamba-2."""
    prefix = "blocks/0/mixer/"
    return {path.removeprefix(prefix): x for path, x in params.items() if path.startswith(prefix)}


def mixer(cfg, weights, x, entry):
    """Runs the Mamba-2 mixer that has these parameters: returns its output and what it keeps."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Mamba2(cfg, nnx.Rngs(0))))
    state = nnx.map_state(lambda path, leaf: leaf.replace(weights[path[0]]), state)
    return nnx.merge(graph, state)(x, None, entry)


def one_device():
    """A mesh of the first device."""
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
