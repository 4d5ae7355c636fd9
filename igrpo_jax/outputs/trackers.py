"""Trackers, which take a run's rows in addition to `metrics.jsonl`: those that config.log.trackers names.

Process 0 opens a tracker for a workdir and hands it each row as it is written. A tracker of the user's own is a class
like those of `TRACKERS`, named as "module:Class". Rows that a resumed run writes again keep their numbers.

An error of TensorBoard comes from the run's own disk, and ends the run. Any other tracker that fails after its start,
for example because a service was killed, is reported in a warning, and the training run continues.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from absl import logging

from igrpo_jax.config import Config, LogConfig
from igrpo_jax.errors import InputError, one_line
from igrpo_jax.outputs.alerts import Row
from igrpo_jax.outputs.services import MLflow, Trackio, WandB
from igrpo_jax.outputs.tensorboard import TensorBoard
from igrpo_jax.schema import objects

# Files in a workdir that let a resumed run continue a tracker's own run.
KEPT = ("*/run_id", "*/rows", "mlflow/mlflow.db")
REPORTED = 100  # calls that fail for each warning


class Tracker(Protocol):
    """The interface of a tracker, which is constructed with (workdir, config, resume_step).

    `resume_step` is the step from which the run resumes, or None for a run that starts from nothing.
    """

    def write(self, number: int, row: Row) -> None:
        """Takes row `number` of metrics.jsonl, counted from 0: "step" and metrics, None if one is not finite."""

    def sample(self, step: int, blocks: Sequence[tuple[str, str]]) -> None:
        """Takes titles and texts of a question, its kept draft and its first refinement, as the console prints them."""

    def close(self) -> None:
        """Flushes all rows. No other method is called afterwards."""


Open = Callable[[Path, Config, int | None], Tracker]
TRACKERS: dict[str, Open] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow}


class Guarded:
    """Turns the errors of a tracker into warnings, so that none ends a training run."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker, self._failed = name, tracker, 0

    def write(self, number: int, row: Row) -> None:
        self._try("a row that metrics.jsonl has", lambda: self._tracker.write(number, dict(row)))

    def sample(self, step: int, blocks: Sequence[tuple[str, str]]) -> None:
        self._try("a sample", lambda: self._tracker.sample(step, blocks))

    def close(self) -> None:
        self._try("rows that it had not written at its end", self._tracker.close)

    def _try(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a service, or the user's code, may raise any
            if self._failed % REPORTED == 0:
                cause = one_line(f"{type(error).__name__}: {error}")
                logging.warning("%s lacks %s (%s)", self._name, what, cause)
            self._failed += 1


def check(settings: LogConfig) -> None:
    """Raises InputError if a tracker of config.log.trackers is not installed, or can't be imported."""
    for name in settings.trackers:
        if name not in TRACKERS:
            _own(settings, name)
        elif name != "tensorboard":
            module = importlib.util.find_spec(name)
            if module is None or module.origin is None:  # a folder of that name in a workdir is not a package
                raise InputError(
                    f"config.log.trackers = {settings.trackers!r}: {name} is not installed; "
                    f'pip install "igrpo-jax[{name}]", or remove it from log.trackers'
                )


def open_trackers(workdir: Path, config: Config, resume_step: int | None) -> list[Tracker]:
    """Opens the trackers of config.log.trackers.

    Args:
        resume_step: the step from which the run resumes; None if it starts from the beginning.

    Raises:
        InputError: one cannot start.
    """
    opened: list[Tracker] = []
    for name in config.log.trackers:
        if name == "tensorboard":
            opened.append(TensorBoard(workdir, config, resume_step))
            continue
        start = TRACKERS[name] if name in TRACKERS else _started(name, config.log)
        opened.append(Guarded(name, start(workdir, config, resume_step)))
    return opened


def _own(settings: LogConfig, name: str) -> Open:
    """Returns the class that "module:Class" names, with all methods of a Tracker."""
    where = f"config.log.trackers = {settings.trackers!r}"
    own = objects.load(name, where)
    missing = [method for method in ("write", "sample", "close") if not callable(getattr(own, method, None))]
    if missing:
        raise InputError(f"{where}: {name} has no {', '.join(missing)}; see Trackers in docs/your_own.md")
    return own


def _started(name: str, settings: LogConfig) -> Open:
    """Returns a function that opens the tracker of the user's class, and raises its errors at the start as one line."""
    own = _own(settings, name)

    def start(workdir: Path, config: Config, resume_step: int | None) -> Tracker:
        try:
            return own(workdir, config, resume_step)
        except Exception as error:  # whatever the user's class raises
            cause = one_line(f"{type(error).__name__}: {error}")
            raise InputError(
                f"config.log.trackers = {settings.trackers!r}: {name} cannot start ({cause}); fix it, or remove it "
                "from log.trackers"
            ) from error

    return start
