"""trackio and MLflow: rows, settings, one run per workdir; with the packages where they are installed, else doubles.

The doubles hold what is used of the packages. `pip install trackio mlflow-skinny` runs the same tests on these.
"""

import importlib
import importlib.util
import json
import sqlite3
import sys

import pytest

from igrpo_jax import config as config_lib
from igrpo_jax.errors import InputError
from igrpo_jax.outputs import trackers
from igrpo_jax.outputs.writer import Writer

TRACKIO = """
import json, os, pathlib

class Run:
    def __init__(self, **given):
        self.path = pathlib.Path(os.environ["TRACKIO_DIR"]) / (given["name"] + ".json")
        self.path.parent.mkdir(exist_ok=True)
        assert given["resume"] == "allow"
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else []

    def log(self, metrics, step):
        assert not {"step", "project", "run", "time"} & metrics.keys(), "trackio renames these"
        self.rows.append([step, metrics])

    def finish(self):
        self.path.write_text(json.dumps(self.rows))

def init(**given):
    if "TRACKIO_SPACE_ID" in os.environ:
        raise ValueError("no token\\nhere")
    return Run(**given)
"""
MLFLOW = """
import collections
Metric = collections.namedtuple("Metric", "key value timestamp step")
Param = collections.namedtuple("Param", "key value")
"""
CLIENT = """
import json, pathlib, re, types

class MlflowClient:
    def __init__(self, tracking_uri):
        if not tracking_uri.startswith("file:"):
            raise ImportError("no sqlalchemy")
        self.path = pathlib.Path(tracking_uri.removeprefix("file://")) / "runs.json"
        self.runs = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return name

    def create_run(self, experiment_id, run_name):
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = {"metrics": [], "params": {}, "status": "RUNNING"}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def update_run(self, run_id, status):
        self.runs[run_id]["status"] = status

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100 and all(re.fullmatch(r"[\\w. :/-]+", metric.key) for metric in metrics)
        self.runs[run_id]["params"] |= dict(params)
        self.runs[run_id]["metrics"] += [[metric.step, metric.key, metric.value] for metric in metrics]

    def set_terminated(self, run_id):
        self.runs[run_id]["status"] = "FINISHED"
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.runs))
"""


REAL = {name for name in ("trackio", "mlflow") if importlib.util.find_spec(name)}  # before a double can be found


def installed(name):
    return name in REAL


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Doubles of the packages that are not installed; what they keep lies in tmp_path."""
    files = {}
    if not installed("trackio"):
        files["trackio/__init__.py"] = TRACKIO
    if not installed("mlflow"):
        files |= {"mlflow/__init__.py": "", "mlflow/entities.py": MLFLOW, "mlflow/tracking.py": CLIENT}
    for name, text in files.items():
        (tmp_path / "packages" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "packages" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for name in ("TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in {"trackio", "mlflow"} - REAL]:
        sys.modules.pop(name)


def configured(name):
    tree = config_lib.default()
    tree.log.trackers = (name,)
    return config_lib.freeze(tree)


def trackio_rows(tmp_path):
    """Returns the rows of each run as [step, metrics]."""
    if not installed("trackio"):
        return [json.loads(path.read_text()) for path in sorted((tmp_path / "trackio").glob("*.json"))]
    runs = {}
    for path in (tmp_path / "trackio").glob("igrpo_jax*.db"):
        with sqlite3.connect(path) as database:
            for run, step, text in database.execute("select run_name, step, metrics from metrics order by id"):
                runs.setdefault(run, []).append([step, json.loads(text)])
    return list(runs.values())


def mlflow_runs(tmp_path):
    """Returns (metrics as sorted [step, name, value], parameters, status) of each run."""
    if not installed("mlflow"):
        runs = json.loads((tmp_path / "mlflow" / "runs.json").read_text()).values()
        return [(sorted(run["metrics"]), run["params"], run["status"]) for run in runs]
    client = importlib.import_module("mlflow.tracking").MlflowClient(tracking_uri=f"file://{tmp_path}/mlflow")
    result = []
    for run in client.search_runs([client.get_experiment_by_name("igrpo_jax").experiment_id]):
        history = [client.get_metric_history(run.info.run_id, name) for name in run.data.metrics]
        rows = sorted([point.step, point.key, point.value] for points in history for point in points)
        result.append((rows, run.data.params, run.info.status))
    return result


def run_and_resume(workdir, name):
    """Killed after step 3, resumed from step 1: the tracker has rows 0 to 5, and is given rows 6 and 7 next."""
    with Writer(workdir, configured(name)) as writer:
        writer.write(0, {"warm_start/step": 20, "warm_start/loss": 1.0})
        writer.write(0, {"eval/a b/pass@1": 0.5, "kl": float("nan")})
        for step in range(1, 4):
            writer.write(step, {"loss": step})
    run_id = (workdir / name / "run_id").read_text()
    with Writer(workdir, configured(name), resume_step=1) as writer:
        for step in range(2, 6):
            writer.write(step, {"loss": step})
    assert (workdir / name / "run_id").read_text() == run_id
    with Writer(workdir, configured(name)):  # from nothing: another run
        pass
    assert (workdir / name / "run_id").read_text() != run_id


def test_trackio_has_every_row_once_in_one_run(tmp_path, packages):
    run_and_resume(tmp_path / "my_run", "trackio")
    rows = next(run for run in trackio_rows(tmp_path) if run)
    assert rows[:2] == [[20, {"warm_start/loss": 1.0}], [0, {"eval/a b/pass@1": 0.5}]]
    assert rows[2:] == [[step, {"loss": step}] for step in range(1, 6)]


def test_mlflow_has_every_row_once_in_one_run_with_the_settings(tmp_path, packages):
    run_and_resume(tmp_path / "my_run", "mlflow")
    runs = mlflow_runs(tmp_path)
    assert len(runs) == 2
    rows, params, status = next(run for run in runs if run[0])
    losses = [[step, "loss", step] for step in range(1, 6)]
    assert rows == sorted([[20, "warm_start/loss", 1.0], [0, "eval/a b/pass_at_1", 0.5], *losses])
    assert params["algorithm.num_drafts"] == "4" and params["model.lora.rank"] == "0" and status == "FINISHED"


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [("trackio", "TRACKIO_SPACE_ID", "a/b"), ("mlflow", "MLFLOW_TRACKING_URI", "nonsense://x")],
)
def test_one_that_cannot_start_is_one_line(name, variable, value, tmp_path, packages, monkeypatch):
    if installed(name) and name == "trackio":
        pytest.skip("it would ask the hub for the Space, several times")
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=rf"config.log.trackers = .*: {name} cannot start \(") as error:
        Writer(tmp_path / "run", configured(name))
    assert "\n" not in str(error.value) and variable in str(error.value)


@pytest.mark.parametrize("name", ["trackio", "mlflow"])
def test_one_that_is_not_installed(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "modules", {key: value for key, value in sys.modules.items() if key != name})
    with pytest.raises(InputError, match=rf"{name} is not installed; pip install \"igrpo-jax\[{name}\]\""):
        trackers.check(configured(name).log)
