"""Trackers: what TensorBoard and wandb are given, and that a resumed run goes on in the same wandb run."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from igrpo_jax import config as config_lib
from igrpo_jax.errors import InputError
from igrpo_jax.outputs import lines, trackers
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
        wandb_run = type(writer._trackers[0]._tracker._run)
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


def events(path):
    """The events of a file: each is its length, a checksum of that, itself, and its own checksum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def scalars(path):
    values = [(event.step, value) for event in events(path) for value in event.summary.value]
    return [(step, value.tag, value.simple_value) for step, value in values if not value.HasField("tensor")]


def texts(path):
    values = [(event.step, value) for event in events(path) for value in event.summary.value]
    return {
        (step, value.tag): value.tensor.string_val[0].decode() for step, value in values if value.HasField("tensor")
    }


def starts(path):
    from tensorboardX.proto.event_pb2 import SessionLog

    return [event.step for event in events(path) if event.session_log.status == SessionLog.START]


@pytest.fixture
def board():
    tree = config_lib.default()
    tree.log.trackers = ("tensorboard",)
    tree.data.instruction = "<b>Think</b>"
    return config_lib.freeze(tree)


def test_tensorboard_keeps_names_and_hides_what_a_resume_writes_again(tmp_path, board):
    with Writer(tmp_path, board) as writer:
        writer.write(1, {"loss": 0.5, "kl": float("nan"), "eval/a b/pass@1": 0.25})
    (first,) = (tmp_path / "tensorboard").iterdir()
    assert scalars(first) == [(1, "loss", 0.5), (1, "eval/a b/pass@1", 0.25)]
    with Writer(tmp_path, board, resume_step=7):
        pass
    (second,) = set((tmp_path / "tensorboard").iterdir()) - {first}
    assert starts(first) == [0] and starts(second) == [8]


def test_tensorboard_has_the_warm_start_by_its_own_steps(tmp_path, board):
    """In a run of its own: a resume from step 7 hides all steps after it, which the warm start's 2000 would be too."""
    with Writer(tmp_path, board) as writer:
        writer.write(0, {"warm_start/step": 20, "warm_start/loss": 1.5})
        writer.write(0, {"warm_start/step": 40, "warm_start/loss": 1.25})
        writer.write(1, {"loss": 0.5})
    (start,) = (tmp_path / "tensorboard" / "warm_start").iterdir()
    assert scalars(start) == [(20, "warm_start/loss", 1.5), (40, "warm_start/loss", 1.25)] and starts(start) == [0]
    (steps,) = (path for path in (tmp_path / "tensorboard").iterdir() if path.is_file())
    assert scalars(steps) == [(1, "loss", 0.5)]
    with Writer(tmp_path, board, resume_step=1):
        pass
    assert [path.name for path in (tmp_path / "tensorboard" / "warm_start").iterdir()] == [start.name]


def test_tensorboard_shows_settings_and_samples_as_text_without_markup(tmp_path, board, two_groups):
    with Writer(tmp_path, board) as writer:
        writer.samples(3, two_groups, np.full((2, 2), 0.5, np.float32))
    (path,) = (tmp_path / "tensorboard").iterdir()
    told = texts(path)
    settings = told[0, "settings/text_summary"]
    assert '"instruction": "<b>Think</b>"' in settings
    sample = told[3, "sample/text_summary"]
    for title, text in lines.sample_blocks(two_groups[0], 0.5):
        assert f"    [{title}]" in sample and f"    {text}".rstrip() in sample
    for text in (settings, sample):
        assert all(line.startswith("    ") for line in text.split("\n"))  # all code to Markdown


def test_model_text_cannot_leave_its_block(tmp_path, board):
    tracker = trackers.TensorBoard(tmp_path, board, None)
    tracker.sample(1, [("completion", "a\n<script>x</script>\r\n\x1b[31m# b\ud800\u2028c")])
    tracker.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    sample = texts(path)[1, "sample/text_summary"]
    assert sample.split("\n") == ["    [completion]", "    a", "    <script>x</script>", "    # bc"]


def test_wandb_gets_no_samples(tmp_path, fake, config, two_groups):
    with Writer(tmp_path / "run", config) as writer:
        writer.write(1, {"loss": 1.0})
        writer.samples(1, two_groups, np.zeros((2, 2), np.float32))
    assert known(tmp_path / "run")["rows"] == [[0, {"step": 1, "loss": 1.0}]]


def test_trackers_of_the_configuration_are_those_there_are():
    for chosen in ((), ("wandb", "tensorboard"), (*trackers.TRACKERS, "my.module:Tracker")):
        tree = config_lib.default()
        tree.log.trackers = chosen
        assert config_lib.freeze(tree).log.trackers == chosen
    for wrong in (("comet",), ("wandb", "wandb"), ("module:",)):
        tree = config_lib.default()
        tree.log.trackers = wrong
        with pytest.raises(InputError, match=r"each must be tensorboard, wandb, trackio, mlflow or module:Class, once"):
            config_lib.freeze(tree)


OWN = """
class Tracker:
    def __init__(self, workdir, config, resume_step):
        if config.seed == 9:
            raise KeyError("no\\nkey")
        self.file, self.fails = open(workdir / "own.txt", "a"), config.seed == 7
        print("start", resume_step, file=self.file)

    def write(self, number, row):
        if self.fails:
            raise ZeroDivisionError("mine")
        row["mine"] = 1  # the run's own row stays as it is
        print("row", number, row["step"], row["loss"], file=self.file)

    def sample(self, step, blocks):
        print("sample", step, blocks[0][0], file=self.file)

    def close(self):
        print("end", file=self.file)
        self.file.close()

class Half:
    def write(self, number, row): ...

text = "no class"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Returns configurations with trackers of a user's module, by the name in it and the seed."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "my_trackers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "my_trackers", raising=False)

    def configured(name="Tracker", seed=0):
        tree = config_lib.default()
        tree.log.trackers, tree.seed = (f"my_trackers:{name}",), seed
        return config_lib.freeze(tree)

    yield configured
    sys.modules.pop("my_trackers", None)


def test_a_tracker_of_the_users_own_is_given_rows_samples_and_the_end(tmp_path, own, two_groups):
    trackers.check(own().log)
    with Writer(tmp_path, own()) as writer:
        writer.write(1, {"loss": 0.5})
        writer.samples(1, two_groups, np.zeros((2, 2), np.float32))
    with Writer(tmp_path, own(), resume_step=1) as writer:
        writer.write(2, {"loss": float("nan")})
    told = (tmp_path / "own.txt").read_text().splitlines()
    title = lines.sample_blocks(two_groups[0], 0.0)[0][0]
    assert told == ["start None", "row 0 1 0.5", f"sample 1 {title}", "end", "start 1", "row 1 2 None", "end"]
    (tracker,), row = trackers.open_trackers(tmp_path, own(), None), {"step": 3, "loss": 1.0}
    tracker.write(0, row)
    tracker.close()
    assert row == {"step": 3, "loss": 1.0}


def test_a_tracker_of_the_users_own_that_raises_is_reported_and_ends_no_run(tmp_path, own, caplog):
    with Writer(tmp_path, own(seed=7)) as writer:
        for step in range(trackers.REPORTED + 1):
            writer.write(step, {"loss": 1.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == trackers.REPORTED + 1
    told = [record.getMessage() for record in caplog.records]
    assert told == ["my_trackers:Tracker lacks a row that metrics.jsonl has (ZeroDivisionError: mine)"] * 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Nothing", "cannot be imported .AttributeError: .*; write it as module:Class"),
        ("text", "must be a function, not str"),
        ("Half", "my_trackers:Half has no sample, close; see Trackers in docs/your_own.md"),
    ],
)
def test_what_is_no_tracker_is_refused_before_any_device_work(own, name, says):
    with pytest.raises(InputError, match=rf"^config.log.trackers = \('my_trackers:{name}',\): {says}"):
        trackers.check(own(name).log)


def test_a_tracker_of_the_users_own_that_cannot_start_is_one_line(tmp_path, own):
    with pytest.raises(InputError, match=r"my_trackers:Tracker cannot start \(KeyError: 'no\\nkey'\)") as error:
        Writer(tmp_path, own(seed=9))
    assert "\n" not in str(error.value)
