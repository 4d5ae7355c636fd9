"""The files of TensorBoard, which `tensorboard --logdir DIR` shows."""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igrpo_jax.config import Config, to_dict
from igrpo_jax.outputs.alerts import Row
from igrpo_jax.outputs.lines import plain_text


class TensorBoard:
    """Writes scalars, settings and sample texts to `workdir/tensorboard`, which `tensorboard --logdir DIR` shows.

    The warm start is a run of its own there, `warm_start`, because it has its own count of steps. Names are those of
    metrics.jsonl. A SummaryWriter is not used: its thread ends when the disk is full, and whoever then adds to its
    queue waits for ever; and it replaces "@" by "_" in names.
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
    """A file of events in `folder`. TensorBoard hides what earlier launches wrote for step `purge` and later ones."""

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
        """Writes a text that is shown as it is: to Markdown an indented line is code, in which nothing is markup."""
        lines = plain_text(text).split("\n")
        self._add(step, self._text(name, "\n".join(f"    {line}" for line in lines)))
        self.flush()

    def _add(self, step: int, summary: Any) -> None:
        self._events.write_event(self._event(step=step, wall_time=time.time(), summary=summary))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()
