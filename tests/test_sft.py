"""A supervised start as a whole: it learns, goes on exactly where it stopped, is exported, and is no run of main."""

import json
import shutil

import pytest
from model_files import error_of, save_byte_model

from igrpo_jax import config, export
from igrpo_jax.outputs import workdir as workdirs
from igrpo_jax.outputs.writer import rows_until
from igrpo_jax.session import opening, supervised


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


def losses(workdir):
    return [row["sft/loss"] for row in map(json.loads, rows_until(workdir / "metrics.jsonl", 99))]


@pytest.mark.slow(seconds=12)
def test_it_learns_goes_on_where_it_stopped_and_is_exported(settings, tmp_path):
    supervised.train_supervised(settings, tmp_path / "run")
    before = losses(tmp_path / "run")
    assert len(before) == 3 and before[2] < before[1] < before[0]
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "3")
    supervised.train_supervised(settings, tmp_path / "cut")
    assert losses(tmp_path / "cut") == before
    export.export(tmp_path / "cut", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    message = error_of(opening.open_run, settings, tmp_path / "run", None, None)
    assert "holds a supervised start; export it, and train the export (model.path) in another --workdir" in message


def test_what_a_supervised_start_needs(settings, tmp_path):
    import dataclasses

    bare = dataclasses.replace(settings, model=config.ModelConfig(), data=config.DataConfig())
    assert "needs a model and solutions" in error_of(supervised.open_supervised, bare)
    short = dataclasses.replace(settings, rollout=config.RolloutConfig(max_completion_length=8))
    assert "all 20 solutions are longer" in error_of(supervised.open_supervised, short)
    task = supervised.open_supervised(settings)
    (tmp_path / "of_a_run" / "samples").mkdir(parents=True)
    (tmp_path / "of_a_run" / "config.json").write_text("{}")
    assert "holds a run that is no supervised start" in error_of(supervised._claim, tmp_path / "of_a_run", task)
    # One that was killed as soon as it had written its settings.
    workdirs.prepare_workdir(tmp_path / "killed", task.config)
    assert supervised._claim(tmp_path / "killed", task) == (True, [])
    tree = config.default()
    tree.sft.draft_fraction = 0.5
    assert "config.sft.draft_column = ''" in error_of(config.freeze, tree)
