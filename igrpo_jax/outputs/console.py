"""What a person watching a run sees: a live display with the solve rate first, samples, tables and long phases.

`Console` is how a run speaks; what the model wrote reaches the terminal stripped of escapes. On a terminal:

    solved   0.531   drafts 0.484   fixed 0.052   broken 0.213   copied 0.55   reward 1.531   entropy 0.21
    step     37/240  [===                 ]  left 0:06:40, 1.9 s/step, 0:01:12 so far
    time     rollout 1.1 s   update 0.7 s   waiting for the verifier 0.0 s   1,234 tokens/s
    eval     arithmetic/pass@1 0.710 at step 40, best 0.730 at step 20
    alert    zero variance: 87% of groups have equal rewards and give no gradient
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
import rich.live
import rich.progress
import rich.progress_bar
import rich.table
from rich.text import Text

from igrpo_jax.outputs.alerts import WATCHED, Row, alerts
from igrpo_jax.outputs.metrics import number
from igrpo_jax.records import Completion, Group

REMEMBERED = 50  # steps that the time left is estimated from
SILENT = 5.0  # seconds of a phase before its quarters are worth a line


class Console:
    """What a person watching the run sees. On a terminal a live display under the lines; elsewhere plain lines only.

    Silent on all processes but the first. Lines are plain ASCII of ours plus escaped text of the model, without markup.
    """

    def __init__(self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        quiet = jax.process_index() != 0
        self._out = rich.console.Console(file=file, markup=False, highlight=False, emoji=False, quiet=quiet)
        # Asked of the stream: FORCE_COLOR, which notebooks and CI set, makes everything a terminal to rich.
        self._is_live = self._out.file.isatty() and not self._out.is_dumb_terminal and not quiet
        self._live: rich.live.Live | None = None
        self._phases = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=30),
            rich.progress.TextColumn("{task.fields[count]}", markup=False),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self._out,
        )
        self._clock = clock
        self._total, self._every, self._done = 0, 1, 0
        self._began = self._last = 0.0  # on the clock
        self._seconds: collections.deque[float] = collections.deque(maxlen=REMEMBERED)  # from one step to the next
        self._row: Row = {}
        self._history: list[Row] = []
        self._evaluations: dict[int, Mapping[str, float]] = {}
        self._alerts: list[str] = []  # now
        self._said: set[str] = set()  # names of those printed

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self,
        total_steps: int,
        first_step: int = 0,
        every: int = 1,
        history: Sequence[Row] = (),
        evaluations: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """Begins the count of RL steps: `first_step` are already done, a line is printed every `every` steps.

        Args:
            history: metrics of the steps done, for alerts.
            evaluations: scores by step, of those done.
        """
        self._total, self._every, self._done = total_steps, every, first_step
        self._history = [_watched(row) for row in history]
        self._evaluations |= evaluations or {}
        self._began = self._last = self._clock()
        self._show()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports that `step` steps are done; the line is printed at the log cadence and after the last step.

        An alert is printed when it begins, at the log cadence too, and again when it comes back.
        """
        now = self._clock()
        # What is between two steps counts: evaluations, checkpoints. The first step compiles.
        if self._row:
            self._seconds.append(now - self._last)
        self._last, self._done = now, step
        self._row = {name: number(value) for name, value in metrics.items()}
        watched = _watched(self._row)
        self._alerts = alerts(watched, self._history)
        self._history.append(watched)
        if step % self._every == 0 or step == self._total:
            self.message(step_line(step, self._total, self._row, self._left()))
            named = {alert.partition(":")[0]: alert for alert in self._alerts}
            for name, alert in named.items():
                if name not in self._said:
                    self.message(f"step {step}: alert: {alert}")
            self._said = set(named)
        self._show()

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Reports single-shot scores, beside the best so far."""
        self._evaluations[step] = scores
        for line in evaluation_lines(self._evaluations):
            self.message(line)
        self._show()

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
        if not self._is_live:
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
        at each quarter of a phase that counts and takes longer than SILENT seconds. Yields `update(done, note="")`, for
        a phase that counts from `done` to `total`.
        """
        start, first = self._clock(), done
        if not self._is_live:
            self.message(f"{name} ...")

            said = 4 * done // total if total else 0

            def quarters(done: int, note: str = "") -> None:
                nonlocal said
                if total and 4 * done // total > said:
                    said, passed = 4 * done // total, self._clock() - start
                    left = (total - done) * passed / max(done - first, 1)
                    if passed > SILENT:
                        self.message(f"{name} {done}/{total}  {note}  left {_hours(left)}")

            yield quarters
            return
        count = lambda done: f"{done:,}/{total:,}" if total else ""
        task = self._phases.add_task(plain_text(name), total=total, completed=done, count=count(done))
        self._show()

        def update(done: int, note: str = "") -> None:
            text = plain_text(f"{name}  {note}".rstrip())
            self._phases.update(task, completed=done, description=text, count=count(done))

        try:
            yield update
        finally:
            self._phases.remove_task(task)
        self.message(f"{name}: {self._clock() - start:.1f} s")

    def close(self) -> None:
        """Ends the live display; may be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self) -> float | None:
        """Seconds to the last step, evaluations in between included; None before the first step."""
        known = self._seconds or [self._row.get("perf/step_time")]
        return None if None in known else float(np.mean(known)) * max(self._total - self._done, 0)

    def _show(self) -> None:
        if self._is_live and self._live is None:
            self._live = rich.live.Live(get_renderable=self._display, console=self._out, transient=True)
            self._live.start()

    def _display(self) -> rich.console.RenderableType:
        """What stands under the lines, drawn several times a second by a thread of rich's."""
        parts: list[rich.console.RenderableType] = []
        if self._total:
            parts.append(self._status())
        if self._phases.tasks:
            parts.append(self._phases.get_renderable())
        return rich.console.Group(*parts)

    def _status(self) -> rich.table.Table:
        grid = rich.table.Table.grid(padding=(0, 2), expand=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True, ratio=1)
        if solved := values_text(self._row, _SOLVED):
            grid.add_row("solved", Text(solved, style="bold green"))
        grid.add_row("step", self._progress())
        if times := values_text(self._row, _TIME):
            grid.add_row("time", Text(times))
        for line in evaluation_lines(self._evaluations):
            grid.add_row("eval", Text(plain_text(line.removeprefix("eval/"))))
        for alert in self._alerts:
            grid.add_row("alert", Text(alert, style="bold yellow"))
        return grid

    def _progress(self) -> rich.table.Table:
        left, elapsed = self._left(), self._clock() - self._began
        parts = [] if left is None else [f"left {_hours(left)}"]
        if self._row.get("perf/step_time") is not None:
            parts.append(f"{self._row['perf/step_time']:.1f} s/step")
        text = ", ".join([*parts, f"{_hours(elapsed)} so far"])
        bar = rich.progress_bar.ProgressBar(self._total, self._done, width=20)
        grid = rich.table.Table.grid(padding=(0, 2))
        grid.add_row(Text(f"{self._done}/{self._total}"), bar, Text(text, no_wrap=True, overflow="ellipsis"))
        return grid


def _watched(row: Row) -> Row:
    return {name: row[name] for name in WATCHED if name in row}


# Parts of a text, in order: wording, metric, format. A part without its metric is left out.
Parts = Sequence[tuple[str, str, str]]
_STEP_LINE: Parts = (
    ("solved", "rewards/accuracy/mean", ".3f"),
    ("drafts solved", "draft/accuracy", ".3f"),
    ("reward", "reward", ".3f"),
    ("entropy", "entropy", ".3f"),
    ("length", "completions/mean_length", ".0f"),
    ("draft length", "draft/mean_length", ".0f"),
)
_SOLVED: Parts = (
    ("", "rewards/accuracy/mean", ".3f"),
    ("drafts", "draft/accuracy", ".3f"),
    ("fixed", "refine/fixed", ".3f"),
    ("broken", "refine/broken", ".3f"),
    ("copied", "refine/copy_ratio", ".2f"),
    ("reward", "reward", ".3f"),
    ("entropy", "entropy", ".3f"),
    ("length", "completions/mean_length", ".0f"),
)
_TIME: Parts = (
    ("rollout", "perf/rollout_time", ".1f"),
    ("update", "perf/update_time", ".1f"),
    ("waiting for the verifier", "perf/verify_wait_time", ".1f"),
    ("tokens/s", "perf/tokens_per_second", ",.0f"),
    ("MFU of updates", "perf/mfu", ".0%"),
    ("slots in use", "perf/slot_utilization", ".0%"),
)


def values_text(row: Row, parts: Parts) -> str:
    """The parts of a row with two spaces between them."""
    found = []
    for wording, name, form in parts:
        if name in row:
            value = "not finite" if row[name] is None else format(row[name], form)
            found.append(f"{wording} {value}".strip())
    return "  ".join(found)


def step_line(step: int, total: int, row: Row, left: float | None) -> str:
    """One line of a step: the solve rate first, seconds of the step and time left last."""
    parts = [f"step {step:>{len(str(total))}}/{total}", values_text(row, _STEP_LINE)]
    if row.get("perf/step_time") is not None:
        parts.append(f"{row['perf/step_time']:.1f} s/step")
    if left is not None:
        parts.append(f"left {_hours(left)}")
    return "  ".join(part for part in parts if part)


def evaluation_lines(evaluations: Mapping[int, Mapping[str, float]]) -> list[str]:
    """For each benchmark the newest single-shot pass@1, and the highest so far, the latest of equals."""
    names = {name for scores in evaluations.values() for name in scores if re.fullmatch(r"eval/[^/]+/pass@1", name)}
    lines = []
    for name in sorted(names):
        known = {step: scores[name] for step, scores in evaluations.items() if name in scores}
        best, newest = max(known, key=lambda step: (known[step], step)), max(known)
        beside = f"best {known[best]:.3f} at step {best}" if best != newest else "the best so far"
        lines.append(f"{name} {known[newest]:.3f} at step {newest}" + f", {beside}" * (len(known) > 1))
    return lines


def _hours(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


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
