"""The warm start of the built-in model: the same on a mesh, where each device has its part of the moments."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models
import whole_runs

from igrpo_jax import config as config_lib
from igrpo_jax.data.builtin import TASKS
from igrpo_jax.errors import InputError
from igrpo_jax.learning import warm_start as module
from igrpo_jax.learning.packing import Unit
from igrpo_jax.learning.supervised import imitated
from igrpo_jax.models import decoder
from igrpo_jax.models.splash import MOST_TOKENS
from igrpo_jax.session.run_inputs import open_inputs


@pytest.mark.slow(seconds=6)
def test_moments_lie_where_their_parameters_do_and_a_mesh_changes_nothing(tmp_path, monkeypatch):
    seen, results = [], []

    class Watched(module.Program):
        def __call__(self, params, opt_state, batch, **shape):
            seen.append({x.sharding.spec for x in jax.tree.leaves(opt_state) if x.ndim > 1})
            return super().__call__(params, opt_state, batch, **shape)

    monkeypatch.setattr(module, "Program", Watched)
    for sizes in ((1, 1), (1, 2)):
        mesh = config_lib.MeshConfig(data=sizes[0], fsdp=sizes[1])
        settings = dataclasses.replace(whole_runs.settings(**{"warm_start.steps": 3}), mesh=mesh)
        monkeypatch.setattr(jax, "devices", lambda *_, count=sizes[1]: jax.local_devices()[:count])
        inputs = open_inputs(settings)
        with jax.set_mesh(inputs.mesh):
            params = decoder.init(inputs.policy.cfg, jax.random.key(0), inputs.mesh)
            problems, _ = TASKS[settings.data.task].problems(settings)
            encode = inputs.policy.encode_completion
            losses = []
            args = settings, inputs.policy.cfg, inputs.mesh, params, problems, inputs.renderer, encode
            trained = module.warm_start(*args, lambda step, loss, losses=losses: losses.append(loss))
            specs = {x.sharding.spec for x in params.values() if x.ndim > 1}
            results.append((losses, {path: np.asarray(x) for path, x in trained.items()}))
        assert len(seen) == 3 and all(each == specs for each in seen)
        seen.clear()
    (losses, alone), (split_losses, split) = results
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    for path, x in alone.items():
        np.testing.assert_allclose(split[path], x, atol=1e-4, err_msg=path)


def test_a_batch_that_the_kernel_cannot_index_is_refused():
    long = Unit(np.zeros(MOST_TOKENS // 2, np.int32), (imitated(np.ones(8, np.int32)),), np.zeros(1))
    cfg = tiny_models.tiny_config(attention="splash")
    with pytest.raises(InputError, match=r"config.warm_start.batch_size = 2: .* attention = splash .*65,536"):
        module._pack(cfg, [long, long], 1)
    module._pack(cfg, [long, long], 2)
