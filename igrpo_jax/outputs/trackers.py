"""Trackers, which take a run's rows beside `metrics.jsonl`: TensorBoard and Weights & Biases, by config.log.trackers.

Process 0 opens a tracker for a workdir and hands it each row as it is written. Rows that a resumed run writes again
replace the earlier ones in TensorBoard, and are left out for wandb, which keeps the rows that it has been given.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import logging

from igrpo_jax.config import Config, LogConfig, to_dict
from igrpo_jax.errors import InputError, one_line
from igrpo_jax.outputs.lines import plain_text

Row = Mapping[str, float | None]  # with "step"; None where a value is not finite


class Tracker(Protocol):
    def write(self, number: int, row: Row) -> None:
        """Takes row `number` of metrics.jsonl, counted from 0.

        Raises:
            OSError: the row cannot be written.
        """

    def sample(self, step: int, blocks: Sequence[tuple[str, str]]) -> None:
        """Takes titles and texts of a question, its kept draft and its first refinement, as the console prints them.

        Raises:
            OSError: they cannot be written.
        """

    def close(self) -> None:
        """Flushes all rows. `write` is not called afterwards."""


class TensorBoard:
    """Writes scalars, settings and sample texts to `workdir/tensorboard`, which `tensorboard --logdir DIR` shows.

    The supervised start is a run of its own there, `warm_start`, because it counts steps of its own. Names are those of
    metrics.jsonl. It does not use a SummaryWriter, whose thread ends where the disk is full: whoever then adds to its
    queue waits for ever; and whose names have "_" for "@".
    """

    def __init__(self, workdir: Path, config: Config, resume_step: int | None):
        self._folder = workdir / "tensorboard"
        self._purge = 0 if resume_step is None else resume_step + 1
        self._steps = _Events(self._folder, self._purge)
        self._warm_start: _Events | None = None  # a resumed run has none
        self._steps.text(self._purge, "settings", json.dumps(to_dict(config), indent=2))

    def write(self, number: int, row: Row) -> None:
        step = row["step"]
        events = self._steps
        if "warm_start/step" in row:
            if self._warm_start is None:
                self._warm_start = _Events(self._folder / "warm_start", 0)
            events, step = self._warm_start, row["warm_start/step"]
        for name, value in row.items():
            if name not in ("step", "warm_start/step") and value is not None:
                events.scalar(int(step or 0), name, value)
        events.flush()

    def sample(self, step: int, blocks: Sequence[tuple[str, str]]) -> None:
        self._steps.text(step, "sample", "\n\n".join(f"[{title}]\n{text}" for title, text in blocks))

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for events in filter(None, (self._steps, self._warm_start)):
                stack.callback(events.close)


class _Events:
    """A file of events in `folder`; of what earlier starts wrote, TensorBoard hides step `purge` and later ones."""

    def __init__(self, folder: Path, purge: int):
        from tensorboardX.event_file_writer import EventsWriter  # this import takes half a second
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.summary import text

        folder.mkdir(exist_ok=True)
        self._event, self._summary, self._text = event_pb2.Event, summary_pb2.Summary, text
        self._events = EventsWriter(str(folder / "events"), f".from{purge}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.write_event(event_pb2.Event(step=purge, wall_time=time.time(), session_log=start))

    def scalar(self, step: int, name: str, value: float) -> None:
        tag = plain_text(name)
        self._add(step, self._summary(value=[self._summary.Value(tag=tag, simple_value=value)]))

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text that is shown as it is: an indented line is code to Markdown, which has no markup."""
        lines = plain_text(text).split("\n")
        self._add(step, self._text(name, "\n".join(f"    {line}" for line in lines)))
        self.flush()

    def _add(self, step: int, summary: Any) -> None:
        self._events.write_event(self._event(step=step, wall_time=time.time(), summary=summary))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class WandB:
    """Sends rows to one run of Weights & Biases per workdir, also when the workdir's run is resumed.

    The id of that run is in `workdir/wandb/run_id`. Account, project and mode are wandb's own settings: `wandb login`,
    WANDB_PROJECT, WANDB_MODE=offline. The printed lines are not sent, because they hold the problems and the model's
    text. Where wandb fails later, for example because its service was killed, the training run goes on.
    """

    def __init__(self, workdir: Path, config: Config, resume_step: int | None):
        import wandb

        id_file = workdir / "wandb" / "run_id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        resumes = resume_step is not None and id_file.exists()
        run_id = id_file.read_text(encoding="utf-8").strip() if resumes else secrets.token_hex(8)
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
            raise InputError(
                f"config.log.trackers = {config.log.trackers!r}: wandb cannot start ({one_line(error)}); log in with "
                "`wandb login`, set WANDB_MODE=offline, or leave wandb out"
            ) from error
        id_file.write_text(run_id + "\n", encoding="utf-8")
        # Rows have the numbers that they have in metrics.jsonl, because several rows may belong to one step. Plots have
        # the step as their axis.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("warm_start/*", step_metric="warm_start/step")

    def write(self, number: int, row: Row) -> None:
        with self._ignoring_errors():
            if number >= self._run.step:  # wandb takes no row twice, and would warn about each
                self._run.log({name: value for name, value in row.items() if value is not None}, step=number)

    def sample(self, step: int, blocks: Sequence[tuple[str, str]]) -> None:
        """Sends nothing: problems and the model's text stay on this machine."""

    def close(self) -> None:
        with self._ignoring_errors():
            self._run.finish()

    @contextlib.contextmanager
    def _ignoring_errors(self) -> Iterator[None]:
        """Turns every error of wandb into a warning, so that it ends no training run."""
        try:
            yield
        except Exception as error:  # wandb's service is a process of its own; its end shows as many kinds of error
            cause = one_line(f"{type(error).__name__}: {error}")
            logging.log_every_n(logging.WARNING, "wandb lacks a row that metrics.jsonl has (%s)", 100, cause)


TRACKERS: dict[str, Callable[[Path, Config, int | None], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check(settings: LogConfig) -> None:
    """Raises InputError where a tracker of config.log.trackers is not installed."""
    if "wandb" not in settings.trackers:
        return
    module = importlib.util.find_spec("wandb")
    if module is None or module.origin is None:  # a folder called wandb, such as that in a workdir, is no package
        raise InputError(
            f"config.log.trackers = {settings.trackers!r}: wandb is not installed; "
            'pip install "igrpo-jax[wandb]", or leave it out'
        )


def open_trackers(workdir: Path, config: Config, resume_step: int | None) -> list[Tracker]:
    """Opens the trackers of config.log.trackers.

    Args:
        resume_step: the step from which the run goes on; None where it starts from nothing.
    """
    return [TRACKERS[name](workdir, config, resume_step) for name in config.log.trackers]
