"""What a person watching a run sees: a progress display with the solve rate first, samples, tables and long phases.

`Console` is how a run speaks; what the model wrote reaches the terminal stripped of escapes.
"""

import collections
import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table
from rich.text import Text

from igrpo_jax.batch import Completion, Group
from igrpo_jax.metrics import number


class Console:
    """What a person watching the run sees. On a terminal a live bar under the lines; elsewhere plain lines only.

    Silent on all processes but the first. Lines are plain ASCII of ours plus escaped text of the model, without markup.
    """

    def __init__(self, file: TextIO | None = None):
        quiet = jax.process_index() != 0
        self._out = rich.console.Console(file=file, markup=False, highlight=False, emoji=False, quiet=quiet)
        self._live = self._out.is_terminal and not self._out.is_dumb_terminal and not quiet
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._total = 0
        self._every = 1
        self._times: collections.deque[float] = collections.deque(maxlen=20)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, total_steps: int, first_step: int = 0, every: int = 1) -> None:
        """Begins the count of RL steps: `first_step` are already done, a line is printed every `every` steps."""
        self._total, self._every = total_steps, every
        if self._live:
            self._task = self._progress().add_task("step", total=total_steps, completed=first_step)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports that `step` steps are done; the line is printed at the log cadence and after the last step."""
        if "perf/step_time" in metrics:
            self._times.append(float(metrics["perf/step_time"]))
        if step % self._every == 0 or step == self._total:
            self.message(step_line(step, self._total, metrics, self._times))
        if self._live and self._task is not None:
            self._progress().update(self._task, completed=step)

    def sample(self, group: Group, advantages: np.ndarray) -> None:
        """Prints a question, the draft it was shown, its first refinement and the right answer; `advantages` is [G]."""
        blocks = [("question", group.prompt.question)]
        if group.best is not None:
            best = group.drafts[group.best]
            blocks.append((f"kept of {len(group.drafts)} drafts, {_score_text(best)}", best.text))
        first = group.completions[0]
        stage = "completion" if group.best is None else "refinement"
        count = len(group.completions)
        advantage = f"advantage {float(advantages[0]):+.2f}"
        blocks.append((f"{stage} 1 of {count}, {_score_text(first)}, {advantage}", first.text))
        blocks.append(("right answer", group.prompt.answer))
        for title, text in blocks:
            self.message(f"--- {title}")
            self.message(_shorten(text))
        self.message("---")

    def message(self, text: str) -> None:
        """Prints `text` as it is, terminal escapes stripped, never wrapped where stdout is no terminal."""
        encoding = self._out.encoding or "utf-8"
        safe = plain_text(text).encode(encoding, "replace").decode(encoding)
        self._out.print(Text(safe), soft_wrap=True)

    def table(self, title: str, rows: Sequence[tuple[str, Any]]) -> None:
        """Prints two columns, names and values."""
        if not self._live:
            width = max((len(plain_text(str(name))) for name, _ in rows), default=0)
            self.message("\n".join([title] + [f"  {plain_text(str(name)):<{width}}  {value}" for name, value in rows]))
            return
        table = rich.table.Table(title=Text(plain_text(title)), title_justify="left", show_header=False)
        for name, value in rows:
            table.add_row(Text(plain_text(str(name))), Text(plain_text(str(value))))
        self._out.print(table)

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None, done: int = 0) -> Iterator[Callable[..., None]]:
        """Shows that something long runs (compiling, warm start, evaluation).

        On a terminal a bar while it lasts and a line with its seconds after it; elsewhere a line at its start, and one
        at each quarter of a phase that counts. Yields `update(done, note="")`, for a phase that counts from `done` to
        `total`.
        """
        start, first = time.monotonic(), done
        if not self._live:
            self.message(f"{name} ...")

            said = 4 * done // total if total else 0

            def quarters(done: int, note: str = "") -> None:
                nonlocal said
                if total and 4 * done // total > said:
                    said = 4 * done // total
                    left = (total - done) * (time.monotonic() - start) / max(done - first, 1)
                    self.message(f"{name} {done}/{total}  {note}  left {_clock(left)}")

            yield quarters
            return
        progress = self._progress()
        task = progress.add_task(plain_text(name), total=total, completed=done)

        def update(done: int, note: str = "") -> None:
            progress.update(task, completed=done, description=plain_text(f"{name}  {note}".rstrip()))

        try:
            yield update
        finally:
            progress.remove_task(task)
        self.message(f"{name}: {time.monotonic() - start:.1f} s")

    def close(self) -> None:
        """Ends the live bar; may be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _progress(self) -> rich.progress.Progress:
        if self._bar is None:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=30),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TimeRemainingColumn(),
                console=self._out,
                transient=True,
            )
            self._bar.start()
        return self._bar


# Parts of a step's line, in order: wording, metric, format. A part without its metric is left out.
_STEP_LINE = (
    ("solved", "rewards/accuracy/mean", ".3f"),
    ("drafts solved", "draft/accuracy", ".3f"),
    ("reward", "reward", ".3f"),
    ("entropy", "entropy", ".3f"),
    ("length", "completions/mean_length", ".0f"),
    ("draft length", "draft/mean_length", ".0f"),
    ("loss", "loss", ".3g"),
)


def step_line(step: int, total: int, metrics: Mapping[str, Any], step_times: Sequence[float] = ()) -> str:
    """One line of a step: the solve rate first, seconds per step and time left (from `step_times`) last."""
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    for wording, name, form in _STEP_LINE:
        if name in metrics:
            value = number(metrics[name])
            parts.append(f"{wording} {'not finite' if value is None else format(value, form)}")
    if step_times:
        # The median: the first steps of a run compile.
        parts.append(f"{step_times[-1]:.1f} s/step")
        parts.append(f"left {_clock(float(np.median(step_times)) * max(total - step, 0))}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    """h:mm:ss."""
    left = round(seconds)
    return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\Z)"  # OSC and other strings: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]"  # the rest
    # Control characters but tab and newline, characters that turn the writing direction, lone surrogates.
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
    re.DOTALL,
)


def plain_text(text: str) -> str:
    """`text` without what a terminal would act on: escape sequences, control and direction characters."""
    return _ESCAPES.sub("", text.replace("\r\n", "\n"))


def _shorten(text: str, limit: int = 2000) -> str:
    """Head and tail of a long text; the answer is at the end."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 4]}\n[... {len(text) - limit} characters ...]\n{text[-(limit - limit // 4) :]}"


def _score_text(completion: Completion) -> str:
    score = completion.score
    if score is None:
        return "not graded"
    if score.status == "invalid":
        return "no verdict"
    parts = [f"{name} {value:g}" for name, value in sorted(score.rewards.items())]
    return f"reward {score.reward:g} ({', '.join(parts)})" if parts else f"reward {score.reward:g}"
