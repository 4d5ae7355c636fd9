"""A folder belongs to one run: claimed by its settings, locked while the run lasts, left as it was otherwise."""

import json
import os
import pathlib

import pytest

from igrpo_jax import config as config_lib
from igrpo_jax.errors import InputError
from igrpo_jax.outputs import workdir as workdirs


def configured(**overrides):
    tree = config_lib.default()
    tree.update_from_flattened_dict(overrides)
    return config_lib.freeze(tree)


def claim(workdir, config):
    """What a run does when it starts, up to the end of its claim."""
    workdirs.check_workdir(workdir, config)
    with workdirs.locked(workdir):
        return workdirs.prepare_workdir(workdir, config)


def refused(workdir, config, message):
    with pytest.raises(InputError, match=message) as caught:
        claim(workdir, config)
    assert str(caught.value).startswith(f"--workdir {workdir}: ") and "\n" not in str(caught.value)


def test_a_new_folder_then_a_resume_that_may_change_some_fields(tmp_path):
    workdir = tmp_path / "runs" / "a"
    config = configured()
    assert claim(workdir, config) == (False, [])
    assert json.loads((workdir / "config.json").read_text()) == config_lib.to_dict(config)
    longer = configured(**{"steps": 9, "log.every": 5, "checkpoint.keep": 1})
    assert claim(workdir, longer) == (True, [])
    assert json.loads((workdir / "config.json").read_text()) == config_lib.to_dict(config)  # it may be refused yet
    workdirs.record_settings(workdir, longer)
    assert json.loads((workdir / "config.json").read_text()) == config_lib.to_dict(longer)
    assert sorted(os.listdir(workdir)) == [".lock", "config.json"]


@pytest.mark.parametrize("result", ["checkpoints/0", "damaged_checkpoints/0.1", "samples/step_000001.jsonl"])
def test_a_run_with_other_settings_is_refused_by_name(tmp_path, result):
    claim(tmp_path, configured())
    (tmp_path / result).mkdir(parents=True)
    before = (tmp_path / "config.json").read_bytes()
    other = configured(**{"seed": 1, "optimizer.learning_rate": 2e-6, "steps": 9})
    refused(
        tmp_path,
        other,
        r"other settings \(optimizer.learning_rate: 1e-06 -> 2e-06, seed: 0 -> 1\); give another --workdir, or the old",
    )
    assert (tmp_path / "config.json").read_bytes() == before and (tmp_path / result).exists()


def test_a_run_that_ended_before_its_first_checkpoint_is_replaced(tmp_path):
    """What it left is gone: the weights that it adapted would be taken for those of the new run."""
    claim(tmp_path, configured())
    for folder in ("checkpoints/0.orbax-checkpoint-tmp-7", "reference/checkpoints/0", "evaluations/step_000000"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "samples").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    other = configured(seed=1)
    with workdirs.locked(tmp_path):
        refused(tmp_path, other, "a run is under way there")
    assert (tmp_path / "reference").exists()
    assert claim(tmp_path, other) == (False, ["seed: 0 -> 1"])
    assert workdirs.read_config(tmp_path) == other
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "notes.txt", "samples"]
    assert claim(tmp_path, other) == (True, [])


def test_a_folder_that_a_process_sees_late_is_shared_and_one_that_it_never_sees_is_not(tmp_path, monkeypatch):
    """NFS may say for half a minute that a folder does not exist, which another host has created."""
    monkeypatch.setattr(workdirs.time, "sleep", lambda _: (tmp_path / "config.json").touch())
    workdirs.check_shared(tmp_path)
    monkeypatch.setattr(workdirs, "SEEN_WITHIN", 0.0)
    with pytest.raises(InputError, match="process 0 created it, but this process cannot see it; give a folder that"):
        workdirs.check_shared(tmp_path / "elsewhere")


def test_the_folder_of_a_hugging_face_model_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(InputError, match=r"holds no run \(its config\.json is not that of one\)"):
        workdirs.read_config(tmp_path)


def test_the_day_and_the_variables_of_the_template_are_the_runs(tmp_path):
    """A run of a version that wrote neither goes on, and may be given its day; a run with a day keeps it."""
    variables = {"data.template_kwargs": {"enable_thinking": False}}
    assert workdirs.recorded_date(tmp_path) is None
    claim(tmp_path, configured(**{"data.template_date": "2026-11-25"}))
    assert workdirs.recorded_date(tmp_path) is None  # the run has nothing to lose, and one that begins now replaces it
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000001.jsonl").write_text("")
    assert workdirs.recorded_date(tmp_path) == "2026-11-25"
    old = config_lib.to_dict(configured())
    del old["data"]["template_kwargs"], old["data"]["template_date"], old["data"]["system_prompt"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert workdirs.recorded_date(tmp_path) == ""
    assert workdirs.read_config(tmp_path) == configured()
    refused(
        tmp_path, configured(**variables), r"other settings \(data.template_kwargs.enable_thinking: None -> False\)"
    )
    dated = configured(**{"data.template_date": "2026-11-26"})
    assert claim(tmp_path, dated) == (True, [])
    workdirs.record_settings(tmp_path, dated)
    assert workdirs.recorded_date(tmp_path) == "2026-11-26"
    refused(
        tmp_path,
        configured(**{"data.template_date": "2026-11-27"}),
        r"other settings \(data.template_date: '2026-11-26' -> '2026-11-27'\); give another --workdir, or the old",
    )


def test_foreign_files_and_what_is_no_config_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "thesis").mkdir()
    refused(tmp_path, configured(), r"holds notes.txt and 1 more but no config.json")
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "thesis"]  # no lock either
    for text in ("{", "[1]", '"x"', "\udcff"):
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        refused(tmp_path, configured(), r"config.json is not that of a run")


def test_a_file_or_an_unwritable_folder_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    refused(file, configured(), r"cannot be written \(.*\); give a folder that can")
    refused(file / "below", configured(), r"cannot be written \(Not a directory\)")
    assert file.read_text() == "mine"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(workdirs, "open", full, raising=False)
        refused(tmp_path / "new" / "run", configured(), r"cannot be written \(No space left on device\)")
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".lock").symlink_to("/dev/full")
    refused(tmp_path / "full", configured(), r"cannot be written \(")
    monkeypatch.setattr(workdirs.os, "replace", full)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", configured(), r"cannot be written")
    assert os.listdir(tmp_path / "empty") == [".lock"]
    monkeypatch.undo()
    assert claim(tmp_path / "empty", configured()) == (False, [])


def test_a_config_half_written_by_a_kill_is_no_obstacle(tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"seed"')
    assert claim(pathlib.Path(tmp_path), configured()) == (False, [])
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json"]


def test_one_run_at_a_time(tmp_path):
    refusal = pytest.raises(InputError, match=f"a run is under way there .process {os.getpid()} on ")
    with workdirs.locked(tmp_path), refusal, workdirs.locked(tmp_path):
        pass
    with workdirs.locked(tmp_path):
        pass


def test_a_run_under_way_keeps_its_config(tmp_path):
    config, longer = configured(), configured(steps=9)
    claim(tmp_path, config)
    with workdirs.locked(tmp_path):
        refused(tmp_path, longer, f"a run is under way there .process {os.getpid()} on ")
        assert json.loads((tmp_path / "config.json").read_text()) == config_lib.to_dict(config)
    assert claim(tmp_path, longer) == (True, [])
