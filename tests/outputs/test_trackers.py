"""Trackers: what TensorBoard and wandb are given, and that a resumed run goes on in the same wandb run."""

import dataclasses
import json
import sys

import pytest

from igrpo_jax import config as config_lib
from igrpo_jax.errors import InputError
from igrpo_jax.outputs import trackers
from igrpo_jax.outputs.writer import Writer

# What is used of wandb, keeping what it was given in a file; a run's step goes on where the server's copy ended.
FAKE = """
import json, os, pathlib

class Error(Exception):
    pass

class Settings:
    def __init__(self, **settings):
        self.settings = settings

class Run:
    def __init__(self, path):
        self.path, self.known = path, json.loads(path.read_text()) if path.exists() else {"rows": [], "axes": {}}

    @property
    def step(self):
        return max((step for step, _ in self.known["rows"]), default=-1) + 1

    def define_metric(self, name, step_metric):
        self.known["axes"][name] = step_metric

    def log(self, row, step):
        assert step >= self.step, "wandb would drop this row, with a warning"
        self.known["rows"].append([step, row])

    def finish(self):
        self.path.write_text(json.dumps(self.known))

def init(**given):
    if os.environ.get("WANDB_MODE") != "offline":
        raise Error("api_key not configured (no-tty).\\n  call wandb.login")
    given["settings"] = given["settings"].settings
    (pathlib.Path(given["dir"]) / "given.json").write_text(json.dumps(given))
    return Run(pathlib.Path(given["dir"]) / f"{given['id']}.json")
"""


@pytest.fixture
def config():
    tree = config_lib.default()
    tree.log.trackers = ("wandb",)
    return config_lib.freeze(tree)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A wandb package without a network, in offline mode."""
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    yield
    sys.modules.pop("wandb", None)


def known(workdir):
    (path,) = set(workdir.glob("*.json")) - {workdir / "given.json"}
    return json.loads(path.read_text())


def test_wandb_is_given_every_row_with_the_step_as_its_axis(tmp_path, fake, config):
    workdir = tmp_path / "my_run"
    with Writer(workdir, config) as writer:
        writer.write(0, {"warm_start/step": 20, "warm_start/loss": 1.0})
        writer.write(0, {"eval/arithmetic/pass@1": 0.5})
        writer.write(1, {"loss": 0.25, "kl": float("nan")})
    rows = known(workdir)["rows"]
    assert rows[1:] == [[1, {"step": 0, "eval/arithmetic/pass@1": 0.5}], [2, {"step": 1, "loss": 0.25}]]
    assert known(workdir)["axes"] == {"*": "step", "warm_start/*": "warm_start/step"}
    given = json.loads((workdir / "given.json").read_text())
    assert (given["project"], given["name"], given["resume"]) == ("igrpo_jax", "my_run", "allow")
    assert given["config"]["algorithm"]["num_drafts"] == 4
    assert given["settings"] == {"console": "off"}  # problems and model text stay here


def test_a_resumed_run_goes_on_in_the_same_wandb_run_without_a_row_twice(tmp_path, fake, config):
    """Killed after step 3, resumed from step 1: wandb has rows 0 to 3, and is given row 4 next."""
    with Writer(tmp_path / "run", config) as writer:
        for step in range(4):
            writer.write(step, {"loss": step})
    first = (tmp_path / "run" / "wandb" / "run_id").read_text()
    with Writer(tmp_path / "run", config, resume_step=1) as writer:
        assert [row["step"] for row in writer.history] == [0, 1]
        for step in range(2, 6):
            writer.write(step, {"loss": step})
    assert (tmp_path / "run" / "wandb" / "run_id").read_text() == first
    assert known(tmp_path / "run")["rows"] == [[step, {"step": step, "loss": step}] for step in range(6)]
    with Writer(tmp_path / "run", config):  # from nothing: another run
        pass
    assert (tmp_path / "run" / "wandb" / "run_id").read_text() != first


def test_wandb_that_cannot_start_is_one_line(tmp_path, fake, config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(InputError, match=r"wandb cannot start \(api_key not configured .*WANDB_MODE=offline") as error:
        Writer(tmp_path, config)
    assert "\n" not in str(error.value)


def test_a_wandb_that_fails_later_ends_no_run(tmp_path, fake, config, monkeypatch, caplog):
    """Its service is a process that may be killed; what its client then raises is often an OSError."""

    def gone(*_, **__):
        raise ConnectionResetError("Connection lost")

    with Writer(tmp_path, config) as writer:
        writer.write(0, {"loss": 1.0})
        wandb_run = type(writer._trackers[0]._run)
        monkeypatch.setattr(wandb_run, "log", gone)
        monkeypatch.setattr(wandb_run, "finish", gone)
        writer.write(1, {"loss": 2.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert "wandb lacks a row that metrics.jsonl has (ConnectionResetError: Connection lost)" in caplog.text


def test_wandb_that_is_not_installed(tmp_path, config, monkeypatch):
    """A folder of that name, as a run's, is what Python takes for a package without a file."""
    (tmp_path / "wandb").mkdir()
    for path in ([], [str(tmp_path)]):
        monkeypatch.setattr(sys, "path", path)
        with pytest.raises(InputError, match=r"wandb is not installed; pip install \"igrpo-jax\[wandb\]\""):
            trackers.check(config.log)
    trackers.check(dataclasses.replace(config.log, trackers=("tensorboard",)))


def test_trackers_of_the_configuration_are_those_there_are():
    for chosen in ((), ("wandb", "tensorboard")):
        tree = config_lib.default()
        tree.log.trackers = chosen
        assert config_lib.freeze(tree).log.trackers == chosen
    for wrong in (("mlflow",), ("wandb", "wandb")):
        tree = config_lib.default()
        tree.log.trackers = wrong
        with pytest.raises(InputError, match=r"config.log.trackers = .*: each must be one of tensorboard, wandb, once"):
            config_lib.freeze(tree)
    assert list(trackers.TRACKERS) == ["tensorboard", "wandb"]
