"""What a run does between two updates."""

import io
import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from builders import run_config

from igrpo_jax.config import Config
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.evaluation_settings import evaluation_folder
from igrpo_jax.session import run as run_module
from igrpo_jax.session.progress import Progress
from igrpo_jax.session.run import Run, throughput


def test_rows_wait_for_the_checkpoint_that_counts_on_them():
    """The checkpointer alone decides whether one is due: a save that is not due uploads nothing in a bucket."""
    synced, asked = [], []
    run = SimpleNamespace(
        config=Config(),
        inputs=SimpleNamespace(total_steps=9, fingerprint="", reward_sources={"mine": "a hash"}),
        progress=Progress(),
        check_lock=lambda: None,
        writer=SimpleNamespace(sync=lambda: synced.append("rows"), rows=3),
        checkpointer=SimpleNamespace(save=lambda step, state, meta, **how: asked.append((step, meta, how))),
    )
    Run.save(run, 5, None)
    ((step, meta, how),) = asked
    assert meta["rewards"] == {"mine": "a hash"}
    assert (meta["step"], meta["total_steps"], meta["metrics_rows"]) == (5, 9, 3)
    assert step == 5 and synced == [] and how["before"] is run.writer.sync


@pytest.mark.parametrize(
    ("step", "given", "forced"), [(0, False, True), (1, False, False), (9, False, True), (1, True, True)]
)
def test_the_first_and_the_last_state_are_always_saved(step, given, forced):
    """Each save asks first whether the folder is still the run's own."""
    asked = []
    run = SimpleNamespace(
        config=Config(),
        inputs=SimpleNamespace(total_steps=9, fingerprint="", reward_sources={}),
        progress=Progress(scores={3: {"eval/x": 0.5}}),
        check_lock=lambda: asked.append("ours"),
        writer=SimpleNamespace(sync=None, rows=0),
        checkpointer=SimpleNamespace(save=lambda *_, force, **how: asked.append(force)),
    )
    Run.save(run, step, None, force=given)
    assert asked == ["ours", forced]


@pytest.mark.parametrize(
    ("changed", "problems", "is_kept"),
    [
        ({}, "some", True),
        ({}, "others", False),
        ({"evaluation.temperature": 0.9}, "some", False),
        ({"evaluation.rounds": 3}, "some", False),
    ],
)
def test_answers_of_an_evaluation_that_was_preempted(monkeypatch, tmp_path, changed, problems, is_kept):
    """They are kept where the next launch asks the same; what was evaluated whole claims none of them."""
    monkeypatch.setattr(run_module.summaries, "flat", lambda scores: scores)
    ends, found, written = [False], [], []

    def evaluated(params, out, head):
        found.append((out / "answers").exists())
        (out / "answers").touch()
        if not ends[0]:
            raise Preempted
        return {"eval/x": 0.5}

    def evaluate(progress, asked, **fields):
        run = SimpleNamespace(
            config=run_config(**fields),
            workdir=tmp_path,
            learner=SimpleNamespace(rollout_params=lambda params: params),
            evaluator=SimpleNamespace(plan=SimpleNamespace(max_new_tokens=8, fingerprint=asked), run=evaluated),
            writer=SimpleNamespace(write=lambda step, row: written.append((step, row["eval/x"]))),
            progress=progress,
            console=SimpleNamespace(evaluation=lambda step, scores: None),
        )
        Run.evaluate(run, {}, 4)

    (evaluation_folder(tmp_path, 4)).mkdir(parents=True)
    (evaluation_folder(tmp_path, 4) / "answers").touch()  # of a run that was killed in it
    progress = Progress()
    with pytest.raises(Preempted):
        evaluate(progress, "some")
    assert not progress.scores and not written
    progress = Progress.from_meta(json.loads(json.dumps(progress.meta())), 0)
    ends[0] = True
    evaluate(progress, problems, **changed)
    assert found == [False, is_kept] and written == [(4, 0.5)]
    assert (progress.scores, progress.evaluating) == ({4: {"eval/x": 0.5}}, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_export_at_the_end_of_a_run(monkeypatch, tmp_path, dtype):
    """The weights as they are sampled with, in the place of an earlier export; the moments are freed before."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "of_fewer_steps").touch()
    state = SimpleNamespace(params={"final_norm/scale": jnp.float32([1 + 2**-10])}, opt_state=[jnp.zeros(3)])
    saved, printed = [], io.StringIO()

    def save(out, params, progress, dtype):
        assert not out.exists() and state.opt_state[0].is_deleted()
        saved.append(({path: x.tolist() for path, x in params.items()}, dtype))
        return "the same"

    monkeypatch.setattr(run_module.hf_write, "model_bytes", lambda cfg, dtype: 1 << 20)
    with Console(printed) as console:
        run = SimpleNamespace(
            config=run_config(**{"model.dtype": dtype, "checkpoint.export": True}),
            workdir=tmp_path,
            learner=SimpleNamespace(rollout_params=lambda params: params),
            inputs=SimpleNamespace(policy=SimpleNamespace(cfg=None, save=save)),
            console=console,
        )
        Run._export(run, state)
    assert saved == [({"final_norm/scale": [1.0 if dtype == "bfloat16" else 1 + 2**-10]}, dtype)]
    assert f"the export is {dtype}; read back, the same" in " ".join(printed.getvalue().split())


def test_tokens_per_second_are_those_of_both_stages():
    metrics = {"perf/draft_tokens": 30, "perf/completion_tokens": 50, "perf/step_time": 4.0}
    assert throughput(metrics, [SimpleNamespace(device_kind="cpu")]) == {"perf/tokens_per_second": 20.0}
