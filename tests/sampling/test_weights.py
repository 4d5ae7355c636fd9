"""The sync of weights as a whole: how many of its programs are in progress at once."""

import jax
import numpy as np
from tiny_models import random_params, tiny_config

from igrpo_jax.config import MeshConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.models import decoder
from igrpo_jax.models.products import as_trained
from igrpo_jax.sampling import weights


def test_few_programs_are_in_progress_and_all_weights_arrive(monkeypatch):
    """Of a model of many layers; with all of them in progress XLA may wait for ever on CPUs."""
    cfg = tiny_config(pattern="*-" * 20)
    mesh, sampler = (sharding.make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor)) for fsdp, tensor in ((8, 1), (4, 2)))
    params = {path: jax.device_put(x, sharding.param_sharding(mesh, path)) for path, x in random_params(cfg).items()}
    sync = weights.WeightSync(cfg, mesh, sampler, "float32")
    in_progress, most, wait = 0, 0, jax.block_until_ready

    def counted(jitted):
        def call(own):
            nonlocal in_progress, most
            in_progress += 1
            most = max(most, in_progress)
            return jitted(own)

        return call

    def waited(own):
        nonlocal in_progress
        in_progress -= 1
        return wait(own)

    sync._jitted = {first: counted(jitted) for first, jitted in sync._jitted.items()}
    monkeypatch.setattr(jax, "block_until_ready", waited)
    synced = sync(params)
    assert most == weights.MAX_IN_FLIGHT + 1
    assert synced.keys() == params.keys()
    assert all(np.array_equal(as_trained(path, synced[path]), x) for path, x in params.items())


def test_the_bytes_that_a_device_receives():
    """Of a weight that is split over eight devices, seven eighths of what a device of a group of two needs."""
    cfg = tiny_config()
    mesh, sampler = (sharding.make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor)) for fsdp, tensor in ((8, 1), (4, 2)))
    sync = weights.WeightSync(cfg, mesh, sampler, "bfloat16")
    expected = 0.0
    for path, shape in decoder.shapes(cfg).items():
        axes = sharding.param_sharding(mesh, path).spec
        expected += 2 * np.prod(shape) / (2 if "tensor" in axes else 1) * (7 / 8 if "fsdp" in axes else 0)
    assert sync.received_bytes == expected > 0
    same = weights.WeightSync(cfg, sampler, sampler, "bfloat16")
    assert 0 < same.received_bytes < sync.received_bytes  # split over four, of which each has one
    alone = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert weights.WeightSync(cfg, alone, alone, "bfloat16").received_bytes == 0
