"""Supervised fine-tuning: it learns, goes on exactly where it stopped, is exported, and is no run of main."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from model_files import HYBRID, edit_tensors, error_of, save_byte_model

from igrpo_jax import config, export
from igrpo_jax.data import order
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.learning.learner import Learner
from igrpo_jax.outputs import weights
from igrpo_jax.outputs import workdir as workdirs
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.writer import rows_until
from igrpo_jax.session import opening, sft
from igrpo_jax.session.progress import Progress
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


OF_TABLE = {"examples": [], "total_steps": 1, "notes": [], "policy": SimpleNamespace(cfg=SimpleNamespace(num_params=1))}


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
    asked = replace(settings.evaluation, every=1, benchmarks=("arithmetic",))
    sft.train_sft(replace(settings, evaluation=asked), tmp_path / "cut")
    assert losses(tmp_path / "cut") == before
    assert re.search(r"evaluation +none in SFT; afterwards python -m igrpo_jax.evaluate --m", capsys.readouterr().out)
    with pytest.MonkeyPatch.context() as patch:  # one that has ended says so, and reads no checkpoint
        patch.setattr(sft.Checkpointer, "restore", None)
        sft.train_sft(settings, tmp_path / "cut")
    export.export(tmp_path / "cut", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind
    assert (tmp_path / "out" / "model.safetensors").exists()
    message = error_of(opening.open_run, settings, RunContext(tmp_path / "run", None, None))
    assert "holds an SFT run; export it, and train the export (model.path) in another --workdir" in message


def test_the_table_says_what_sft_does_not_do(settings):
    changed = replace(
        settings,
        evaluation=replace(settings.evaluation, every=1, benchmarks=("arithmetic",)),
        checkpoint=replace(settings.checkpoint, export=True),
        sft=replace(settings.sft, draft_fraction=0.0),
    )
    tables = [sft._overview(SimpleNamespace(config=c, **OF_TABLE), "DIR") for c in (settings, changed)]
    assert {"evaluation", "export", "without effect"}.isdisjoint(dict(tables[0]))
    said = dict(tables[1])
    assert said["evaluation"] == "none in SFT; afterwards python -m igrpo_jax.evaluate --model DIR --workdir OUT"
    assert said["export"] == "none in SFT; afterwards python -m igrpo_jax.export --workdir DIR --out HF_DIR"
    assert said["without effect"] == "sft.draft_column: needs sft.draft_fraction above 0"


@pytest.mark.slow
def test_lines_are_printed_as_often_as_set_also_after_a_resume(settings, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(Console, "start", lambda self, *args: started.append(args))
    settings = replace(settings, steps=2, log=replace(settings.log, every=7))
    sft.train_sft(settings, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    sft.train_sft(settings, tmp_path)
    assert started[0] == (2, 0, 7, []) and started[1][:3] == (2, 1, 7)
    assert [row["sft/loss"] for row in started[1][3]] == losses(tmp_path)[:1]


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


@pytest.mark.parametrize("part", ["prompt", "solution", "draft", "verdict"])
def test_a_resume_needs_the_same_examples(settings, part):
    inputs = sft.open_sft(settings)
    first, *others = inputs.examples
    (draft,) = first.drafts
    other = np.append(first.target, 1)
    changed = {
        "prompt": replace(first, prompt=replace(first.prompt, tokens=other)),
        "solution": replace(first, target=other),
        "draft": replace(first, drafts=(draft._replace(tokens=other),)),
        "verdict": replace(first, drafts=(draft._replace(is_right=not draft.is_right),)),
    }[part]
    assert replace(inputs, examples=[first, *others]).fingerprint == inputs.fingerprint
    assert replace(inputs, examples=[changed, *others]).fingerprint != inputs.fingerprint


def test_the_lengths_of_examples_are_bounded_to_the_token(settings, tmp_path):
    """Solutions by their limit; the longest prompt, with a draft in it, and a solution by the model's positions."""
    inputs = sft.open_sft(settings)
    longest = max(len(example.target) for example in inputs.examples)
    limited = lambda limit, **more: replace(settings, rollout=config.RolloutConfig(max_completion_length=limit), **more)
    assert len(sft.open_sft(limited(longest)).examples) == 20
    shorter = sft.open_sft(limited(longest - 1))
    assert [example.prompt.index for example in shorter.examples] == list(range(9))  # the sums of one digit
    assert ("too long", "11 of 20, left out") in shorter.notes
    with_draft = lambda x, draft: inputs.renderer.with_draft(x.prompt.question, draft.tokens, draft.is_right)
    contexts = [with_draft(example, draft) for example in inputs.examples for draft in example.drafts]
    undrafted = sft.open_sft(replace(settings, sft=config.SftConfig()))
    assert undrafted.longest_prompt == max(len(example.prompt.tokens) for example in inputs.examples)
    assert inputs.longest_prompt >= max(map(len, contexts)) > undrafted.longest_prompt
    save_byte_model(tmp_path / "model", max_positions=inputs.longest_prompt + 70)
    model = replace(settings.model, path=str(tmp_path / "model"))
    sft.open_sft(limited(70, model=model))
    assert "limit" not in (message := error_of(sft.open_sft, limited(71, model=model)))
    assert f"exceeds the model's context of {inputs.longest_prompt + 70}" in message


def test_a_problem_keeps_its_solution_where_others_are_left_out(settings, tmp_path):
    """The first one for its long question, the second one for its long solution."""
    rows = [("2 + 2, and nothing else at all?", "four"), ("1 + 1?", "two " * 20), ("2 + 1?", "three"), ("0?", "none")]
    lines = [json.dumps({"question": question, "solution": solution}) + "\n" for question, solution in rows]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    data = replace(settings.data, train=str(tmp_path / "train.jsonl"), max_prompt_length=40)
    inputs = sft.open_sft(replace(settings, data=data, sft=config.SftConfig(), prompts_per_step=1))
    assert [each.prompt.question for each in inputs.examples] == ["2 + 1?", "0?"]
    for each, (_, solution) in zip(inputs.examples, rows[2:], strict=True):
        assert f"<answer>{solution}</answer>" in inputs.policy.tokenizer.decode(each.target)
    assert ("too long", "2 of 4, left out") in inputs.notes


def test_a_step_imitates_the_examples_that_seed_and_step_choose(settings):
    """All of a set that is read twice are eight steps; every example is imitated alike."""
    assert sft.open_sft(replace(settings, steps=0, epochs=2.0)).total_steps == 8
    seen, written = [], []
    names = ("grad_norm", "learning_rate", "nonfinite_steps", "entropy", "perf/padding_frac")
    learned = {"sampling/sampling_logp_difference/mean": 1.5} | dict.fromkeys(names, 0.0)
    writer = SimpleNamespace(write=lambda step, row: written.append((step, row["sft/loss"])))

    def update(state, groups, advantages, step):
        seen.append(([group.prompt.index for group in groups], [own.tolist() for own in advantages], step))
        return state + 1, learned

    for seed in (0, 1):
        inputs = sft.open_sft(replace(settings, seed=seed))
        learner, console = SimpleNamespace(update=update), SimpleNamespace(step=lambda step, row: None)
        assert sft._step(inputs, learner, 5, 2, Progress(), writer, console) == 6
        chosen, advantages, step = seen.pop()
        assert chosen == order.step_indices(1, 5, 20, seed) and advantages == [[1.0]] * 5 and step == 2
    assert written == [(2, 1.5)] * 2


def test_what_a_resume_takes_from_its_checkpoint(settings, tmp_path, monkeypatch):
    """Steps that were skipped before are not told again; an end that is behind it is refused."""
    monkeypatch.setattr(sft, "Learner", lambda *_, **__: None)
    inputs, printed = sft.open_sft(settings), io.StringIO()
    workdirs.prepare_workdir(tmp_path, inputs.config)
    state = SimpleNamespace(skipped=5)
    store = SimpleNamespace(restore=lambda abstract: (2, state, {"total_steps": 6, "bad_steps": 1}))
    with Console(printed) as console, contextlib.ExitStack() as stack:
        place = SimpleNamespace(state=None), store, 2, RunContext(tmp_path, console, stack)
        begun = sft._begin(inputs, *place)
        with pytest.raises(InputError, match=r"ends after step 1, but the run in .* has already reached step 2"):
            sft._begin(replace(inputs, total_steps=1), *place)
    assert (begun.resumed_after, begun.state) == (2, state)
    assert (begun.progress.skipped_optimizer_steps, begun.progress.skipped_in_a_row) == (5, 1)
    assert "3 steps instead of 6: the learning rate rises" in " ".join(printed.getvalue().split())


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
