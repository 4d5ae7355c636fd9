"""What a plot of a report is: a panel with lines, each a sum of metrics.

The role of a line says whose numbers it shows (drafts, best draft, trained completions, single shot). A role has the
same colour in all plots and pages.
"""

from dataclasses import dataclass

from igrpo_jax.report.runs import Curve, RecordedRun


@dataclass(frozen=True)
class Line:
    """A sum of metrics, drawn in the colour of its role."""

    label: str
    role: str  # a key of figures.COLOURS[theme]
    metrics: tuple[str, ...]
    less: tuple[str, ...] = ()  # metrics that are subtracted from the sum
    band: tuple[str, str] | None = None  # metrics of the lower and upper end of an interval

    @property
    def names(self) -> tuple[str, ...]:
        """Returns all metrics that the line needs."""
        return (*self.metrics, *self.less, *(self.band or ()))

    def of(self, run: RecordedRun) -> Curve:
        """Returns the values of the line in a run, empty if the run lacks a metric."""
        return run.curve(*self.metrics, less=self.less)


@dataclass(frozen=True)
class Panel:
    """One plot."""

    file: str  # name without .png
    title: str
    unit: str
    caption: str  # how to read it, on the page
    lines: tuple[Line, ...]
    scale: float = 1.0  # factor of the values: 100 for percent
    stacked: bool = False  # lines are parts of a whole, where one run is shown
    compared: tuple[Line, ...] = ()  # drawn instead of `lines` where there are several runs, or where a part is missing
    limit: str = ""  # a setting that is drawn as a dashed line where the only run comes near it
    drawn: bool = True  # whether it is a PNG too
    cut: bool = False  # whether the highest few values may leave the plot, which then names the peak
