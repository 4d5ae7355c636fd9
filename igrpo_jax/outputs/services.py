"""Trackers with a package of their own: Weights & Biases, trackio and MLflow. Each is imported when it is opened.

A workdir is one run in each service, even after a resume: the run's id is in `workdir/NAME/run_id`. Rows that a resumed
run writes again are not sent, because these services keep the rows that they have been given. Samples are not sent:
problems and the model's text stay on this machine. Every method may raise any error; `trackers` reports them.
"""

import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from igrpo_jax.config import Config, to_dict
from igrpo_jax.errors import InputError, one_line
from igrpo_jax.outputs.alerts import Row
from igrpo_jax.outputs.files import write_atomically


class WandB:
    """Sends rows to Weights & Biases.

    Account, project and mode are wandb's own settings: `wandb login`, WANDB_PROJECT, WANDB_MODE=offline. The printed
    lines are not sent, because they hold the problems and the model's text.
    """

    def __init__(self, workdir: Path, config: Config, resume_step: int | None):
        import wandb

        run_id, _ = _run_id(workdir / "wandb", resume_step)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "igrpo_jax"),
                name=os.environ.get("WANDB_NAME", workdir.absolute().name),
                id=run_id,
                resume="allow",
                dir=str(workdir),
                config=to_dict(config),
                allow_val_change=True,  # some settings may change on resume
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            fix = "log in with `wandb login`, set WANDB_MODE=offline, or leave wandb out"
            raise _cannot_start(config, "wandb", error, fix) from error
        _keep_id(workdir / "wandb", run_id)
        # Rows have the numbers that they have in metrics.jsonl, because several rows may belong to one step. Plots have
        # the step as their axis.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("warm_start/*", step_metric="warm_start/step")

    def write(self, number: int, row: Row) -> None:
        if number >= self._run.step:  # wandb takes no row twice, and would warn about each
            self._run.log({name: value for name, value in row.items() if value is not None}, step=number)

    def sample(self, step: int, blocks: Sequence[tuple[str, str]]) -> None:
        """Sends nothing."""

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Sends rows to trackio, which keeps them on this machine or in a Space of the hub.

    Where they are kept is trackio's own setting: TRACKIO_DIR, or TRACKIO_SPACE_ID. The project is TRACKIO_PROJECT, or
    igrpo_jax. A run is named after its folder and an id, because trackio finds runs by name.
    """

    def __init__(self, workdir: Path, config: Config, resume_step: int | None):
        import trackio

        self._folder = workdir / "trackio"
        run_id, self._rows = _run_id(self._folder, resume_step)
        try:
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "igrpo_jax"),
                name=f"{workdir.absolute().name}-{run_id}",
                config=to_dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        except Exception as error:  # trackio, the hub and sqlite share no base
            raise _cannot_start(config, "trackio", error, "unset TRACKIO_SPACE_ID, or leave it out") from error
        _keep_id(self._folder, run_id)

    def write(self, number: int, row: Row) -> None:
        if number >= self._rows:
            self._run.log(_values(row), step=_step(row))
            _keep_rows(self._folder, number + 1)

    def sample(self, step: int, blocks: Sequence[tuple[str, str]]) -> None:
        """Sends nothing."""

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Sends rows to MLflow: to MLFLOW_TRACKING_URI, else to `workdir/mlflow/mlflow.db`.

    The experiment is MLFLOW_EXPERIMENT_NAME, or igrpo_jax. MLflow allows few characters in names: `pass@1` is
    `pass_at_1`. Settings are the parameters of the run; those that change on resume keep their first value, as MLflow
    demands.
    """

    def __init__(self, workdir: Path, config: Config, resume_step: int | None):
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._metric = entities.Metric
        self._folder = workdir / "mlflow"
        known, self._rows = _run_id(self._folder, resume_step)
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{self._folder.absolute()}/mlflow.db")
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._id = self._resumed(known) or self._created(workdir.absolute().name, config, entities.Param)
        except Exception as error:  # mlflow, its database and the network share no base
            raise _cannot_start(config, "mlflow", error, "set MLFLOW_TRACKING_URI, or leave it out") from error
        _keep_id(self._folder, self._id)

    def _resumed(self, run_id: str) -> str:
        """Returns the id of the run to resume, "" if there is none."""
        if not self._rows:
            return ""
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _created(self, name: str, config: Config, param: Any) -> str:
        """Creates a run with the settings as its parameters, and returns its id."""
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "igrpo_jax")
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else self._client.create_experiment(experiment)
        run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
        params = [param(path, str(value)[:6000]) for path, value in _flat(to_dict(config))]
        for first in range(0, len(params), 100):  # at most 100 in one request
            self._client.log_batch(run_id, params=params[first : first + 100])
        return run_id

    def write(self, number: int, row: Row) -> None:
        if number < self._rows:
            return
        now, step = int(1000 * time.time()), _step(row)
        allowed = {re.sub(r"[^\w. :/-]", "_", name.replace("@", "_at_")): value for name, value in _values(row).items()}
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, now, step) for name, value in allowed.items()]
        )
        _keep_rows(self._folder, number + 1)

    def sample(self, step: int, blocks: Sequence[tuple[str, str]]) -> None:
        """Sends nothing."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _step(row: Row) -> int:
    """Returns the step of a row; rows of the warm start have their own count."""
    return int(row.get("warm_start/step") or row["step"] or 0)


def _values(row: Row) -> dict[str, float]:
    """Returns the metrics of a row that have a value, without its steps."""
    return {name: value for name, value in row.items() if value is not None and name not in ("step", "warm_start/step")}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and the value of each setting."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _run_id(folder: Path, resume_step: int | None) -> tuple[str, int]:
    """Returns the id of the resumed run and the number of rows that were sent; for a new run, a new id and 0."""
    folder.mkdir(parents=True, exist_ok=True)
    if resume_step is None or not (folder / "run_id").exists():
        (folder / "rows").unlink(missing_ok=True)
        return secrets.token_hex(8), 0
    rows = (folder / "rows").read_text(encoding="utf-8") if (folder / "rows").exists() else "0"
    return (folder / "run_id").read_text(encoding="utf-8").strip(), int(rows) if rows.strip().isdecimal() else 0


def _keep_id(folder: Path, run_id: str) -> None:
    write_atomically(folder / "run_id", run_id + "\n")


def _keep_rows(folder: Path, count: int) -> None:
    write_atomically(folder / "rows", f"{count}\n")


def _cannot_start(config: Config, name: str, error: Exception, fix: str) -> InputError:
    return InputError(f"config.log.trackers = {config.log.trackers!r}: {name} cannot start ({one_line(error)}); {fix}")
