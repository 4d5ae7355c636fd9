"""What a person who watches a run sees: a live display with the solve rate first, samples, tables and long phases.

All that a run prints goes through `Console`, which strips terminal escapes from what the model wrote. On a terminal it
shows:

    solved   0.531   drafts 0.484   fixed 0.052   broken 0.213   copied 0.55   reward 1.531   entropy 0.21
    step     37/240  [===                 ]  left 0:06:40, 1.9 s/step, 0:01:12 so far
    time     rollout 1.1 s   update 0.7 s   waiting for the verifier 0.0 s   1,234 tokens/s
    eval     arithmetic/pass@1 0.710 at step 40, best 0.730 at step 20
    alert    zero variance: 87% of groups have equal rewards and give no gradient
"""

import collections
import contextlib
import threading
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

from igrpo_jax.outputs import lines
from igrpo_jax.outputs.alerts import Row, alerts, is_watched
from igrpo_jax.outputs.files import number
from igrpo_jax.outputs.lines import hours, plain_text, printable
from igrpo_jax.records import Group

REMEMBERED = 50  # steps from which the time left is estimated
SILENT = 5.0  # seconds that a phase runs before its quarters are printed
NOTICED = 1.0  # seconds that the run waits for a program before a line says so


class _Out(rich.console.Console):
    """A console of rich that raises BrokenPipeError where rich would end the process without a word."""

    def on_broken_pipe(self) -> None:
        """Prints nothing more, and raises the BrokenPipeError again, which `cli.exits.run` reports."""
        self.quiet = True
        raise


class Console:
    """Prints the progress of a run: on a terminal a live display under the lines, elsewhere plain lines only.

    Only the first process prints. The console's own words are plain ASCII. Text of the model is printed without
    escapes, and nothing is read as markup.
    """

    def __init__(self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        quiet = jax.process_index() != 0
        # Lines are text in a notebook too, where rich would turn each of them into an HTML table.
        self._out = _Out(file=file, markup=False, highlight=False, emoji=False, quiet=quiet, force_jupyter=False)
        # The stream itself is asked, because rich takes every stream for a terminal where FORCE_COLOR is set, as it is
        # in notebooks and CI.
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
        self._waited_for: set[str] = set()  # kinds of programs that a line has said the run waits for
        self._total = 0  # steps of the run
        self._every = 1  # steps from one line to the next
        self._done = 0  # steps that are done
        self._began = 0.0  # reading of the clock when the count began
        self._last = 0.0  # reading of the clock at the end of the last step
        self._seconds: collections.deque[float] = collections.deque(maxlen=REMEMBERED)  # from one step to the next
        self._row: Row = {}
        self._history: list[Row] = []
        self._evaluations: dict[int, Mapping[str, float]] = {}
        self._alerts: list[str] = []  # alerts of the last step
        self._announced: set[str] = set()  # names of the alerts that hold and are printed already

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self,
        total_steps: int,
        resumed_after: int = 0,
        every: int = 1,
        history: Sequence[Row] = (),
        evaluations: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """Begins the count of steps.

        Args:
            total_steps: steps of the run, of RL or of SFT.
            resumed_after: the step whose state the run begins with.
            every: steps from one printed line to the next.
            history: metrics of the steps that are done, which alerts need.
            evaluations: scores of the evaluations that are done, by step.
        """
        self._total = total_steps
        self._every = every
        self._done = resumed_after
        self._history = [_watched(row) for row in history]
        self._evaluations |= evaluations or {}
        self._began = self._clock()
        self._last = self._began
        self._show()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports that `step` steps are done; a line is printed every `every` steps and after the last step.

        An alert is printed with such a line when it begins, and again when it comes back.
        """
        now = self._clock()
        # The time between two steps counts, with its evaluations and checkpoints. The first step is left out because it
        # compiles.
        if self._row:
            self._seconds.append(now - self._last)
        self._last = now
        self._done = step
        self._row = {name: number(value) for name, value in metrics.items()}
        watched = _watched(self._row)
        self._alerts = alerts(watched, self._history)
        self._history.append(watched)
        if step % self._every == 0 or step == self._total:
            self.message(lines.step_line(step, self._total, self._row, self._left()))
            named = {alert.partition(":")[0]: alert for alert in self._alerts}
            for name, alert in named.items():
                if name not in self._announced:
                    self.message(f"step {step}: alert: {alert}")
            self._announced = set(named)
        self._show()

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Prints the single-shot scores of `step` next to the best so far."""
        self._evaluations[step] = scores
        for line in lines.evaluation_lines(self._evaluations):
            self.message(line)
        self._show()

    def sample(self, group: Group, advantages: np.ndarray) -> None:
        """Prints a question, the draft in its prompt, its first completion and the right answer.

        Args:
            advantages: [G] float32, the advantages of the group's completions.
        """
        for title, text in lines.sample_blocks(group, float(advantages[0])):
            self.message(f"--- {title}")
            self.message(text)
        self.message("---")

    def message(self, text: str) -> None:
        """Prints `text` without its terminal escapes; where stdout is not a terminal it is never wrapped."""
        self._out.print(Text(printable(text, self._out.encoding)), soft_wrap=True)

    def table(self, title: str, rows: Sequence[tuple[str, Any]]) -> None:
        """Prints a title and two columns, names and values."""
        if not self._is_live:
            width = max((len(plain_text(str(name))) for name, _ in rows), default=0)
            self.message("\n".join([title] + [f"  {plain_text(str(name)):<{width}}  {value}" for name, value in rows]))
            return
        table = rich.table.Table(title=Text(plain_text(title)), title_justify="left", show_header=False)
        for name, value in rows:
            table.add_row(Text(plain_text(str(name))), Text(plain_text(str(value))))
        self._out.print(table)

    @contextlib.contextmanager
    def phase(
        self, name: str, total: int | None = None, done: int = 0, unit: str = ""
    ) -> Iterator[Callable[..., None]]:
        """Shows that something long runs (compiling, warm start, evaluation).

        On a terminal there is a bar while it lasts, and a line with its seconds after it. Elsewhere there is a line at
        its start, and one at each quarter of a phase that counts and takes longer than SILENT seconds.

        Args:
            total: what the phase counts to; None if it does not count.
            done: what it counts from.
            unit: unit of what it counts, such as MiB; then the lines at its start and end say how much it is.

        Yields:
            `update(done, note="")`, which the phase calls as it counts.
        """
        start, title = self._clock(), f"{name}, {total:,} {unit}" if total and unit else name
        if not self._is_live:
            self.message(f"{title} ...")
            yield self._quarters(name, total, done, unit)
            return
        count = lambda done: f"{done:,}/{total:,} {unit}".rstrip() if total else ""
        task = self._phases.add_task(plain_text(name), total=total, completed=done, count=count(done))
        self._show()

        def update(done: int, note: str = "") -> None:
            text = plain_text(f"{name}  {note}".rstrip())
            self._phases.update(task, completed=done, description=text, count=count(done))

        try:
            yield update
        finally:
            self._phases.remove_task(task)
        self.message(f"{title}: {self._clock() - start:.1f} s")

    @contextlib.contextmanager
    def waiting(self, program: str) -> Iterator[None]:
        """Shows that the run waits for `program`, whose title begins with its kind, to be compiled.

        On a terminal a bar says so in the meantime. Elsewhere a line is printed after NOTICED seconds, but only once
        for each kind.
        """
        title, kind = f"compiling {program}", program.partition(" ")[0]
        if self._is_live:
            task = self._phases.add_task(plain_text(title), total=None, count="")
            self._show()
            try:
                yield
            finally:
                self._phases.remove_task(task)
            return

        def notice() -> None:
            self._waited_for.add(kind)
            self.message(f"{title} ...")

        timer = threading.Timer(NOTICED, notice)
        timer.daemon = True
        if kind not in self._waited_for:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _quarters(self, name: str, total: int | None, first: int, unit: str) -> Callable[..., None]:
        """Returns `update(done, note="")`, which prints a line at each quarter of the way from 0 to `total`."""
        start = self._clock()
        printed = 4 * first // total if total else 0
        counted_from: tuple[float, int] | None = None  # the first update: what was before it may have been compiling

        def update(done: int, note: str = "") -> None:
            nonlocal printed, counted_from
            now = self._clock()
            counted_from = counted_from or (now, done)
            if total and 4 * done // total > printed:
                printed = 4 * done // total
                since, before = counted_from if done > counted_from[1] else (start, first)
                left = (total - done) * (now - since) / max(done - before, 1)
                if now - start > SILENT:
                    counted = f"{done}/{total} {unit}".rstrip()
                    self.message(f"{name} {counted}  {note}  left {hours(left)}")

        return update

    def close(self) -> None:
        """Ends the live display. It may be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self) -> float | None:
        """Returns the seconds to the last step, with the evaluations in between; None until two steps are done."""
        return float(np.mean(self._seconds)) * max(self._total - self._done, 0) if self._seconds else None

    def _show(self) -> None:
        if self._is_live and self._live is None:
            self._live = rich.live.Live(get_renderable=self._display, console=self._out, transient=True)
            self._live.start()

    def _display(self) -> rich.console.RenderableType:
        """Returns what stands under the lines; a thread of rich draws it several times a second."""
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
        if solved := lines.values_text(self._row, lines.SOLVED):
            grid.add_row("solved" if "rewards/accuracy/mean" in self._row else "", Text(solved, style="bold green"))
        grid.add_row("step", self._progress())
        if times := lines.values_text(self._row, lines.TIME):
            grid.add_row("time", Text(times))
        for line in lines.evaluation_lines(self._evaluations):
            grid.add_row("eval", Text(plain_text(line.removeprefix("eval/"))))
        for alert in self._alerts:
            grid.add_row("alert", Text(alert, style="bold yellow"))
        return grid

    def _progress(self) -> rich.table.Table:
        left, elapsed = self._left(), self._clock() - self._began
        parts = [] if left is None else [f"left {hours(left)}"]
        if self._row.get("perf/step_time") is not None:
            parts.append(f"{self._row['perf/step_time']:.1f} s/step")
        text = ", ".join([*parts, f"{hours(elapsed)} so far"])
        bar = rich.progress_bar.ProgressBar(self._total, self._done, width=20)
        grid = rich.table.Table.grid(padding=(0, 2))
        grid.add_row(Text(f"{self._done}/{self._total}"), bar, Text(text, no_wrap=True, overflow="ellipsis"))
        return grid


def _watched(row: Row) -> Row:
    """Returns the metrics that alerts read."""
    return {name: value for name, value in row.items() if is_watched(name)}
