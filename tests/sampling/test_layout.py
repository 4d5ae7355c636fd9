"""Sampling on a mesh of its own: token ids whatever the mesh, and what its programs exchange."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
import tiny_models
from tiny_models import one_device

from igrpo_jax import config
from igrpo_jax.aot.collectives import collectives
from igrpo_jax.distributed import sharding
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.scoring import stage_key
from igrpo_jax.sampling.state import Sampling

EOS = (0, 17)
KEY = stage_key(0, 1, 1)
SIZES = {"slots": 8, "max_context": 40, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 4}


def training_mesh():
    return sharding.make_mesh(config.MeshConfig(fsdp=8), jax.devices()[:8])


def put(params, mesh):
    return {path: sharding.to_global(x, sharding.param_sharding(mesh, path)) for path, x in params.items()}


def prompt(length):
    return np.random.default_rng(length).integers(1, 64, length).astype(np.int32)


def sample(engine, params, sampling):
    scheduler = Scheduler(engine, 0)
    scheduler.start(params, sampling)
    for length in (5, 33, 40):
        scheduler.submit(Request(prompt(length), length, 4, KEY, 8))
    samples = {(one.request.index, one.sample_id): one for one in scheduler.drain()}
    scheduler.finish()
    return samples


MODELS = {
    "2 kv heads": tiny_models.tiny_config(num_heads=6, intermediate_size=64),
    "4 kv heads": tiny_models.tiny_config(num_heads=12, num_kv_heads=4, intermediate_size=64, qk_norm=True),
    "hybrid": dataclasses.replace(
        tiny_models.hybrid_config(),
        intermediate_size=64,
        mamba=dataclasses.replace(tiny_models.hybrid_config().mamba, num_heads=16, num_groups=8),
    ),
}


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_do_not_depend_on_the_layout(name):
    cfg = MODELS[name]
    host = tiny_models.random_params(cfg)
    for sampling in (Sampling(0.8), Sampling(0.8, top_p=0.9, top_k=20), Sampling(0.0)):
        expected = sample(Engine(cfg, one_device(), EOS, **SIZES), put(host, one_device()), sampling)
        for tensor in (1, 2, 4, 8):
            engine = Engine(cfg, training_mesh(), EOS, tensor=tensor, **SIZES)
            assert engine.mesh.shape["tensor"] == tensor and engine.shard_slots == tensor
            ours = sample(engine, put(host, training_mesh()), sampling)
            assert ours.keys() == expected.keys()
            for key, one in expected.items():
                np.testing.assert_array_equal(ours[key].tokens, one.tokens, err_msg=f"{tensor} {key}")
                np.testing.assert_allclose(ours[key].logprobs, one.logprobs, atol=2e-5, rtol=0)
                np.testing.assert_allclose(ours[key].entropy, one.entropy, atol=1e-3, rtol=0)
