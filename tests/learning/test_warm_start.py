"""The warm start of the built-in model: the same on a mesh, where each device has its part of the moments."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_models
import whole_runs

from igrpo_jax import config as config_lib
from igrpo_jax.data.builtin import TASKS, is_right
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError
from igrpo_jax.learning import warm_start as module
from igrpo_jax.learning.packing import Unit
from igrpo_jax.learning.supervised import imitated
from igrpo_jax.models import decoder
from igrpo_jax.models.splash import MOST_TOKENS
from igrpo_jax.session.run_inputs import open_inputs


@pytest.mark.slow(seconds=6)
def test_moments_lie_where_their_parameters_do_and_a_mesh_changes_nothing(tmp_path, monkeypatch):
    """Nor does the temperature of rollouts. A fresh model is nearly indifferent between all words."""
    seen, results = [], []

    class Watched(module.Program):
        def __call__(self, params, opt_state, batch, **shape):
            seen.append({x.sharding.spec for x in jax.tree.leaves(opt_state) if x.ndim > 1})
            return super().__call__(params, opt_state, batch, **shape)

    monkeypatch.setattr(module, "Program", Watched)
    for sizes in ((1, 1), (1, 2)):
        mesh = config_lib.MeshConfig(data=sizes[0], fsdp=sizes[1])
        fields = {"warm_start.steps": 3, "rollout.temperature": 0.5 + sizes[1] / 2}
        settings = dataclasses.replace(whole_runs.settings(**fields), mesh=mesh)
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
    assert losses[0] == pytest.approx(np.log(inputs.policy.cfg.vocab_size), rel=0.1)
    for path, x in alone.items():
        np.testing.assert_allclose(split[path], x, atol=1e-4, err_msg=path)


def shown_drafts(monkeypatch, **fields):
    """By batch and example of a warm start: whether the prompt says that its draft is right, None where it has none."""

    class Uncompiled:
        def __init__(self, *_):
            pass

        def __call__(self, params, opt_state, batch, shape):
            return params, opt_state, 0.0

    monkeypatch.setattr(module, "Program", Uncompiled)
    settings = whole_runs.settings(**{"warm_start.steps": 40, "warm_start.batch_size": 8} | fields)
    inputs = open_inputs(settings)
    problems, _ = TASKS[settings.data.task].problems(whole_runs.settings())  # whatever the seed is
    by_question = {problem.question: problem for problem in problems}
    texts, shown, told = {}, [], []

    def encode(text):
        ids = inputs.policy.encode_completion(text)
        texts[ids.tobytes()] = text
        return ids

    def with_draft(question, draft, said):
        assert said == is_right(by_question[question], texts[draft.tobytes()])
        shown[-1] = said
        return np.arange(9, dtype=np.int32)

    plain = lambda question: shown.append(None) or np.arange(4, dtype=np.int32)
    renderer = SimpleNamespace(plain=plain, with_draft=with_draft)
    params = {"final_norm/scale": jax.device_put(np.ones(4, np.float32), sharding.replicated(inputs.mesh))}
    args = settings, inputs.policy.cfg, inputs.mesh, params, problems, renderer, encode
    module.warm_start(*args, lambda *step: told.append(step))
    assert told == [(step, 0.0) for step in range(1, 41)] and len(shown) == 40 * 8
    return [shown[start : start + 8] for start in range(0, len(shown), 8)]


def test_which_batches_of_a_warm_start_show_drafts(monkeypatch):
    """One in four, as the seed decides; with drafts in all of its examples or in none, and without Stage 1 in none."""
    usual = {"warm_start.draft_fraction": 0.25, "warm_start.draft_error_rate": 0.5}
    batches = shown_drafts(monkeypatch, **usual)
    drafted = [batch for batch in batches if None not in batch]
    assert 4 <= len(drafted) <= 17 and all({*batch} == {None} for batch in batches if batch not in drafted)
    assert {said for batch in drafted for said in batch} == {True, False}
    assert batches == shown_drafts(monkeypatch, **usual) != shown_drafts(monkeypatch, **usual, seed=1)
    undrafted = shown_drafts(monkeypatch, **usual, **{"algorithm.num_drafts": 0})
    assert all({*batch} == {None} for batch in undrafted)


def test_a_batch_that_the_kernel_cannot_index_is_refused():
    long = Unit(np.zeros(MOST_TOKENS // 2, np.int32), (imitated(np.ones(8, np.int32)),), np.zeros(1))
    cfg = tiny_models.tiny_config(attention="splash")
    with pytest.raises(InputError, match=r"config.warm_start.batch_size = 2: .* attention = splash .*65,536"):
        module._pack(cfg, [long, long], 1)
    module._pack(cfg, [long, long], 2)
