"""Where a run's rows go beside `metrics.jsonl`: TensorBoard and Weights & Biases, by the names in config.log.trackers.

A tracker is opened for a workdir by process 0 and takes rows as they are written. What a resumed run writes again
replaces what was there (TensorBoard) or is left out (wandb, which keeps what it has been given).
"""

import contextlib
import importlib.util
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from absl import logging

from igrpo_jax.config import Config, LogConfig, to_dict
from igrpo_jax.errors import InputError, one_line

Row = Mapping[str, float | None]  # with "step"; None where a value is not finite


class Tracker(Protocol):
    def write(self, number: int, row: Row) -> None:
        """Takes row `number` of metrics.jsonl, counted from 0. May raise OSError."""

    def close(self) -> None:
        """Hands everything on; no write comes after it."""


class TensorBoard:
    """Scalars in `workdir/tensorboard`.

    Not by a SummaryWriter: its thread ends where the disk is full, and whoever then adds to its queue waits for ever.
    """

    def __init__(self, workdir: Path, config: Config, resume_step: int | None):
        from tensorboardX.event_file_writer import EventsWriter  # half a second, only where it is wanted
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder, purge = workdir / "tensorboard", 0 if resume_step is None else resume_step + 1
        folder.mkdir(exist_ok=True)
        self._event, self._scalar = Event, scalar
        self._events = EventsWriter(str(folder / "events"), f".from{purge}")
        # From here on what an earlier start wrote of these steps is not shown.
        start = Event(step=purge, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        self._events.write_event(start)

    def write(self, number: int, row: Row) -> None:
        step, now = int(row["step"]), time.time()
        for name, value in row.items():
            if name != "step" and value is not None:
                self._events.write_event(self._event(step=step, wall_time=now, summary=self._scalar(name, value)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class WandB:
    """One run of Weights & Biases for a workdir, however often it is resumed: its id is in `workdir/wandb/run_id`.

    Account, project and mode are wandb's own: `wandb login`, WANDB_PROJECT, WANDB_MODE=offline. What is printed is not
    sent: it holds the problems and the model's text. A wandb that fails later (its service was killed) ends no run.
    """

    def __init__(self, workdir: Path, config: Config, resume_step: int | None):
        import wandb

        kept = workdir / "wandb" / "run_id"
        kept.parent.mkdir(parents=True, exist_ok=True)
        resumes = resume_step is not None and kept.exists()
        run_id = kept.read_text(encoding="utf-8").strip() if resumes else secrets.token_hex(8)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "igrpo_jax"),
                name=os.environ.get("WANDB_NAME", workdir.absolute().name),
                id=run_id,
                resume="allow",
                dir=str(workdir),
                config=to_dict(config),
                allow_val_change=True,  # of what may change on resume
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            said = one_line(error)
            raise InputError(
                f"config.log.trackers = {config.log.trackers!r}: wandb cannot start ({said}); log in with "
                "`wandb login`, set WANDB_MODE=offline, or leave wandb out"
            ) from error
        kept.write_text(run_id + "\n", encoding="utf-8")
        # Rows are numbered as in metrics.jsonl, because several of them may be of one step; plots are over the step.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("warm_start/*", step_metric="warm_start/step")

    def write(self, number: int, row: Row) -> None:
        with self._spared():
            if number >= self._run.step:  # wandb takes no row twice, and would say so of each
                self._run.log({name: value for name, value in row.items() if value is not None}, step=number)

    def close(self) -> None:
        with self._spared():
            self._run.finish()

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a program of its own, whose end shows as one of many
            said = one_line(f"{type(error).__name__}: {error}")
            logging.log_every_n(logging.WARNING, "wandb lacks a row that metrics.jsonl has (%s)", 100, said)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def check(settings: LogConfig) -> None:
    """Raises InputError where a tracker of config.log.trackers is not installed."""
    if "wandb" not in settings.trackers:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder called wandb, such as that of a run, is no package
        raise InputError(
            f"config.log.trackers = {settings.trackers!r}: wandb is not installed; "
            'pip install "igrpo-jax[wandb]", or leave it out'
        )


def open_trackers(workdir: Path, config: Config, resume_step: int | None) -> list[Tracker]:
    """The trackers of config.log.trackers; `resume_step` is the step that the run goes on from, None from nothing."""
    return [TRACKERS[name](workdir, config, resume_step) for name in config.log.trackers]
