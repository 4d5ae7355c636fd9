"""Supervised fine-tuning: it learns, goes on exactly where it stopped, is exported, and is no run of main."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from model_files import HYBRID, edit_tensors, error_of, save_byte_model

from igrpo_jax import config, export
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.learning.learner import Learner
from igrpo_jax.outputs import weights
from igrpo_jax.outputs import workdir as workdirs
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.writer import rows_until
from igrpo_jax.session import opening, sft
from igrpo_jax.session.run_context import RunContext
from igrpo_jax.storage import lease as leases
from igrpo_jax.storage import writing
from igrpo_jax.storage.addresses import path_of


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Those of three steps of a micro model that has no chat template, on sums with drafts, one in two shown."""
    folder = tmp_path_factory.mktemp("sft")
    save_byte_model(folder / "model")
    rows = [{"question": f"{i} + 1?", "solution": f"It is \\boxed{{{i + 1}}}", "old": [f"{i}"]} for i in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = config.default()
    tree.model.path, tree.model.dtype, tree.data.train = str(folder / "model"), "float32", str(folder / "train.jsonl")
    tree.steps, tree.prompts_per_step, tree.rollout.max_completion_length = 3, 5, 70
    tree.data.instruction, tree.log.trackers, tree.learner.remat = "", (), "none"
    tree.optimizer.learning_rate, tree.checkpoint.every, tree.compilation_cache = 3e-3, 1, ""
    tree.sft.draft_fraction, tree.sft.draft_column, tree.learner.microbatch_sizes = 0.5, "old", (1.0,)
    return config.freeze(tree)


def with_hybrid(settings, path):
    """The settings with a Nemotron-H, which is written to `path`."""
    save_byte_model(path, **HYBRID)
    return replace(settings, model=replace(settings.model, path=str(path)))


def losses(workdir):
    return [row["sft/loss"] for row in map(json.loads, rows_until(workdir / "metrics.jsonl", 99))]


@pytest.mark.slow(seconds=12)
@pytest.mark.parametrize("kind", ["llama", pytest.param("nemotron_h", marks=pytest.mark.proof)])
def test_it_learns_goes_on_where_it_stopped_and_is_exported(settings, tmp_path, capsys, kind):
    settings = settings if kind == "llama" else with_hybrid(settings, tmp_path / "model")
    sft.train_sft(settings, tmp_path / "run")
    before, shown = losses(tmp_path / "run"), capsys.readouterr().out
    assert re.search(
        rf"step 3/3  loss {before[-1]:.4f}  with a draft \d.\d\d  entropy [\d.]+  .* s/step  left 0:00:00", shown
    )
    assert "evaluation" not in shown
    assert len(before) == 3 and before[2] < before[1] < before[0]
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "3")
    # SFT evaluates nothing, and says so where it is asked to.
    asked = replace(settings.evaluation, every=1, benchmarks=("arithmetic",), drafts=2)
    sft.train_sft(replace(settings, evaluation=asked), tmp_path / "cut")
    assert losses(tmp_path / "cut") == before
    shown = capsys.readouterr().out
    assert re.search(r"evaluation +none in SFT; afterwards python -m igrpo_jax.evaluate", shown)
    assert re.search(r"without effect +evaluation.drafts: needs evaluation.rounds above 0", shown)
    with pytest.MonkeyPatch.context() as patch:  # one that has ended says so, and reads no checkpoint
        patch.setattr(sft.Checkpointer, "restore", None)
        sft.train_sft(settings, tmp_path / "cut")
    export.export(tmp_path / "cut", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind
    assert (tmp_path / "out" / "model.safetensors").exists()
    message = error_of(opening.open_run, settings, RunContext(tmp_path / "run", None, None))
    assert "holds an SFT run; export it, and train the export (model.path) in another --workdir" in message


def test_a_step_does_not_hold_an_example_twice(settings, tmp_path):
    message = error_of(sft.train_sft, replace(settings, prompts_per_step=21), tmp_path)
    assert "config.prompts_per_step = 21: there are 20 training problems, so a step would hold some" in message


@pytest.mark.slow(seconds=8)
def test_more_steps_and_another_base_are_noticed(settings, tmp_path, capsys):
    """More steps change the learning rate from there on; adapters belong to the weights that they adapt."""
    folder = Path(shutil.copytree(settings.model.path, tmp_path / "model"))
    model = replace(settings.model, path=str(folder), lora=config.LoraConfig(rank=2, alpha=4.0))
    settings = replace(settings, model=model, steps=1)
    sft.train_sft(settings, tmp_path / "run")
    sft.train_sft(replace(settings, steps=2), tmp_path / "run")
    told = "2 steps instead of 1: the learning rate rises and falls as in a run of 2 steps from now on"
    assert told in capsys.readouterr().out
    edit_tensors(folder, lambda tensors: tensors.update({name: -x for name, x in tensors.items()}))
    message = error_of(sft.train_sft, replace(settings, steps=3), tmp_path / "run")
    assert f"config.model.path = '{folder}': the weights differ" in message


@pytest.mark.slow
def test_steps_that_are_not_finite_are_counted_across_a_resume(settings, tmp_path, monkeypatch):
    settings = replace(settings, learner=replace(settings.learner, max_nonfinite_steps=3))
    update, killed_in = Learner.update, 2

    def not_finite(self, state, groups, advantages, step):
        if step == killed_in:
            raise KeyboardInterrupt
        return update(self, state, groups, [one * np.float32("nan") for one in advantages], step)

    monkeypatch.setattr(Learner, "update", not_finite)
    with pytest.raises(KeyboardInterrupt):
        sft.train_sft(settings, tmp_path)
    killed_in = None
    with pytest.raises(RunError, match=r"steps 1 to 3: loss or gradient was not finite, .* = 3 times in a row"):
        sft.train_sft(settings, tmp_path)
    assert [path.name for path in sorted((tmp_path / "nonfinite").iterdir())] == [
        f"step_{step:06d}.jsonl" for step in (1, 2, 3)
    ]


def uploads(monkeypatch):
    """Returns the list to which the name of each file is added that is uploaded, where nothing is after a time, except
    for those of checkpoints."""
    monkeypatch.setattr(leases, "SETTLED", 0.01)
    monkeypatch.setattr(writing, "EVERY", 1e9)
    uploaded, upload = [], writing.upload
    add = lambda path: uploaded.append(path.name) if "checkpoints" not in str(path) else None
    monkeypatch.setattr(writing, "upload", lambda file, path: add(path) or upload(file, path))
    return uploaded


@pytest.mark.slow(seconds=10)
@pytest.mark.proof
@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_a_start_in_a_bucket_goes_on_and_equals_one_in_a_folder(settings, tmp_path, kind, request, monkeypatch):
    """All weights in one kind of bucket, and LoRA's alone in the other."""
    bucket = request.getfixturevalue(kind)
    lora = config.LoraConfig(rank=2 if kind == "s3_bucket" else 0, alpha=4.0)
    settings = replace(settings, model=replace(settings.model, lora=lora))
    uploaded = uploads(monkeypatch)
    settings = replace(settings, checkpoint=config.CheckpointConfig(every=2))
    sft.train_sft(settings, tmp_path / "run")
    sft.train_sft(settings, bucket / "run")
    assert uploaded == ["metrics.jsonl"] * 2  # with the checkpoints of steps 2 and 3, and none of step 1
    for name in [name for name in bucket.names() if name.startswith("run/checkpoints/3/")]:
        bucket.remove(name)
    sft.train_sft(settings, bucket / "run")
    assert losses(path_of("", bucket / "run")) == losses(tmp_path / "run")
    assert uploaded == ["metrics.jsonl"] * 3 and "run/.lock" not in bucket.names()
    mine, theirs = (saved(settings, path) for path in (path_of("", bucket / "run"), tmp_path / "run"))
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.proof
def test_a_start_in_a_bucket_is_saved_on_sigterm(settings, tmp_path, bucket, monkeypatch):
    uploaded = uploads(monkeypatch)
    settings = replace(settings, checkpoint=config.CheckpointConfig(every=99))
    step = sft._step

    def interrupted(inputs, learner, state, number, *rest):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(inputs, learner, state, number, *rest)

    monkeypatch.setattr(sft, "_step", interrupted)
    with pytest.raises(Preempted, match=r"preempted: step 2 of 3 is saved in gs://bucket/"):
        sft.train_sft(settings, bucket / "run")
    assert uploaded == ["metrics.jsonl"] and "run/.lock" not in bucket.names()
    assert len(losses(path_of("", bucket / "run"))) == 2 and "run/checkpoints/2/commit_success.txt" in bucket.names()
    monkeypatch.setattr(sft, "_step", step)
    for place in (bucket / "run", tmp_path / "run"):
        sft.train_sft(settings, place)
    assert losses(path_of("", bucket / "run")) == losses(tmp_path / "run")


def saved(settings, workdir):
    """The parameters of the last checkpoint, by path, on the host."""
    inputs = sft.open_sft(settings)
    with jax.set_mesh(inputs.mesh), Console() as console:
        params, step = weights.saved(inputs.config, inputs.policy, workdir, inputs.mesh, console, None, "float32")
    assert step == 3
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.proof
@pytest.mark.parametrize("kind, rank", [("llama", 0), ("llama", 2), ("nemotron_h", 0)])
def test_a_start_on_a_mesh_equals_one_on_a_device(settings, tmp_path, kind, rank, monkeypatch):
    """All weights, and LoRA's alone, with two replicas of weights that four devices share."""
    settings = settings if kind == "llama" else with_hybrid(settings, tmp_path / "model")
    lora = config.LoraConfig(rank=rank, alpha=4.0)
    settings = replace(settings, model=replace(settings.model, lora=lora), mesh=config.MeshConfig(data=2))
    sft.train_sft(settings, tmp_path / "mesh")
    alone = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: alone)
    sft.train_sft(settings, tmp_path / "alone")
    mine, theirs = losses(tmp_path / "mesh"), losses(tmp_path / "alone")
    np.testing.assert_allclose(mine, theirs, rtol=2e-5)
    assert mine[2] < mine[0]


def test_a_start_says_that_it_replaces_one_without_a_checkpoint(settings, tmp_path, monkeypatch, capfd):
    workdirs.prepare_workdir(tmp_path, sft.open_sft(settings).config)

    def over(*_):
        raise InputError("over")

    monkeypatch.setattr(sft, "Checkpointer", over)
    assert error_of(sft.train_sft, replace(settings, seed=1), tmp_path) == "over"
    said = " ".join("".join(capfd.readouterr()).split())
    assert "ended before its first checkpoint; this one takes its place, with other settings (seed: 0 -> 1)" in said


def test_what_evaluations_ask_is_no_example_and_a_resume_asks_the_same(settings, tmp_path):
    """With data.clean; other benchmarks mean other examples, and the refusal says so."""
    (tmp_path / "mine.jsonl").write_text('{"prompt": "3 + 1?", "answer": "4"}\n')
    asked = config.EvaluationConfig(benchmarks=("mine",), data_dir=str(tmp_path))
    settings = replace(settings, data=replace(settings.data, clean=True), evaluation=asked)
    inputs = sft.open_sft(settings)
    assert len(inputs.examples) == 19 and ("training problems like mine's", "1 of 20, left out") in inputs.notes
    (tmp_path / "run").mkdir()
    sft._claim(inputs, tmp_path / "run", inputs.config)
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    other = sft.open_sft(replace(settings, evaluation=config.EvaluationConfig()))
    message = error_of(sft._claim, other, tmp_path / "run", other.config)
    assert "restore the problems, config.evaluation.benchmarks and config.evaluation.data_dir" in message


def test_what_sft_needs(settings, tmp_path):
    bare = replace(settings, model=config.ModelConfig(), data=config.DataConfig())
    assert "needs a model and solutions" in error_of(sft.open_sft, bare)
    short = replace(settings, rollout=config.RolloutConfig(max_completion_length=8))
    assert "all 20 solutions are longer" in error_of(sft.open_sft, short)
    inputs = sft.open_sft(settings)
    (tmp_path / "of_a_run" / "samples").mkdir(parents=True)
    (tmp_path / "of_a_run" / "config.json").write_text("{}")
    assert "holds a run that is not of SFT" in error_of(sft._claim, inputs, tmp_path / "of_a_run", inputs.config)
    # One that was killed as soon as it had written its settings.
    (tmp_path / "killed").mkdir()
    workdirs.prepare_workdir(tmp_path / "killed", inputs.config)
    assert sft._claim(inputs, tmp_path / "killed", inputs.config) == (True, [])
    tree = config.default()
    tree.sft.draft_fraction = 0.5
    assert "config.sft.draft_column = ''" in error_of(config.freeze, tree)
    tree.sft.draft_column, tree.sft.drafts_from = "old", "runs/before"
    assert "config.sft.drafts_from = 'runs/before'" in error_of(config.freeze, tree)
