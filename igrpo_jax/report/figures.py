"""Draws the panels of a report with matplotlib into PNG files, each in a light and a dark theme.

With one run, the lines of a panel have the colours of their roles. With several runs, a colour stands for a run and a
dash pattern for a kind of line. The label of the x axis says over how many values a line is smoothed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from igrpo_jax.errors import InputError
from igrpo_jax.report.panels import panels
from igrpo_jax.report.plots import Line, Panel
from igrpo_jax.report.runs import Curve, RecordedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of the roles by theme, the same as on the page (style.css).
COLOURS = {
    "light": {
        "paper": "#ffffff",
        "ink": "#1f2328",
        "muted": "#656d76",
        "grid": "#e4e7eb",
        "draft": "#d99a1c",
        "best": "#c2410c",
        "trained": "#2563eb",
        "single": "#0f8b6d",
        "good": "#0d9488",
        "calm": "#a7d8cf",
        "bad": "#dc4a26",
        "idle": "#cfd4da",
    },
    "dark": {
        "paper": "#171b21",
        "ink": "#e6e9ee",
        "muted": "#98a2ae",
        "grid": "#2c323b",
        "draft": "#e8b84f",
        "best": "#fb8b4f",
        "trained": "#6ea8fe",
        "single": "#3fcf9f",
        "good": "#2fb7a8",
        "calm": "#29635e",
        "bad": "#f0714e",
        "idle": "#454d58",
    },
}
RUNS = ("trained", "best", "single", "draft", "bad", "calm", "muted")  # roles whose colours tell several runs apart
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
SMOOTHED = 30  # the running mean of a line is over about a thirtieth of its values
WIDTH, HEIGHT, DPI = (
    4.8,
    3.1,
    160,
)  # inches, inches and dots per inch; a laptop shows three plots side by side, a phone one
SMALL = 9.5  # size in points of all text but the title
ROW = 0.08  # height of a row of the legend, as a fraction of the height of the figure
LABEL = 60  # characters that fit side by side in a row of the legend
GAP = 5  # characters that the line next to a legend entry takes


def write(runs: Sequence[RecordedRun], folder: Path) -> dict[str, list[Panel]]:
    """Writes PANEL.png and PANEL.dark.png for the panels that have data, and returns all these panels by section.

    Raises:
        InputError: matplotlib is missing.
    """
    require()
    folder.mkdir(parents=True, exist_ok=True)
    sections = panels(runs)
    for panel in (panel for table in sections.values() for panel in table if panel.drawn):
        for theme in COLOURS:
            path = folder / (f"{panel.file}.png" if theme == "light" else f"{panel.file}.dark.png")
            figure = draw(panel, runs, theme)
            figure.savefig(path, dpi=DPI, facecolor=figure.get_facecolor())
    return sections


def require() -> None:
    """Raises InputError if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError("report: plots need matplotlib; pip install 'igrpo-jax[report]'") from error


def draw(panel: Panel, runs: Sequence[RecordedRun], theme: str = "light") -> "Figure":
    """Returns the plot of one panel of `panels(runs)`."""
    from matplotlib.figure import Figure

    colours = COLOURS[theme]
    figure = Figure((WIDTH, HEIGHT), facecolor=colours["paper"])
    axes = figure.add_subplot(facecolor=colours["paper"])
    if panel.stacked:
        heights = _stack(axes, panel, runs[0], colours)
    elif len(runs) == 1:
        looks = [{"color": colours[line.role], "label": line.label} for line in panel.lines]
        drawn = [_line(axes, panel, line, runs[0], **look) for line, look in zip(panel.lines, looks, strict=True)]
        heights = np.concatenate(drawn)
    else:
        heights = _overlay(axes, panel, runs, colours)
    cut = _cut(axes, panel, heights)
    if len(runs) == 1:
        _limit(axes, panel, runs[0], colours)
    listed = [zip(panel.lines, curves(panel, run), strict=True) for run in runs]
    overs = [smoothing(line, curve) for pairs in listed for line, curve in pairs if curve]
    _dress(figure, axes, panel, colours, cut, overs, len(runs) if len(runs) > 1 else 0)
    return figure


def curves(panel: Panel, run: RecordedRun) -> list[Curve]:
    """Returns the curve of each line of a panel; the parts of a stack at the steps that have them all, at least 0."""
    found = [line.of(run) for line in panel.lines]
    if not panel.stacked:
        return found
    shared = list(set(found[0].steps.tolist()).intersection(*(curve.steps.tolist() for curve in found)))
    chosen = [np.isin(curve.steps, shared) for curve in found]
    return [Curve(curve.steps[at], np.maximum(curve.values[at], 0)) for curve, at in zip(found, chosen, strict=True)]


def smoothing(line: Line, curve: Curve) -> int:
    """Returns how many values of a line its running mean is over, an odd number; 1 for evaluations, which are few.

    Some metrics are not measured at every step, so a mean over so many steps would flatten them.
    """
    if any(name.startswith("eval/") for name in line.names):
        return 1
    return len(curve.steps) // SMOOTHED // 2 * 2 + 1


def labels(runs: Sequence[RecordedRun]) -> list[str]:
    """Returns the names of several runs in legends, with the steps of each where these differ."""
    spans = [f"steps {run.steps[0]:,} to {run.steps[-1]:,}" if run.steps else "no steps" for run in runs]
    return [run.name if len(set(spans)) == 1 else f"{run.name}: {span}" for run, span in zip(runs, spans, strict=True)]


def smooth(values: np.ndarray, over: int) -> np.ndarray:
    """Returns centred running means [S] float64 of `values` [S]; near the ends they are over the points that exist.

    Args:
        over: points of a mean, an odd number; fewer are taken where there are fewer.
    """
    kernel = np.ones(min(over, (len(values) - 1) // 2 * 2 + 1))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _line(axes: "Axes", panel: Panel, line: Line, run: RecordedRun, faint: bool = True, **look) -> np.ndarray:
    """Draws a line and returns its values [S], an empty array where the run lacks it."""
    curve = line.of(run)
    values, over = panel.scale * curve.values, smoothing(line, curve)
    if not curve:
        return values
    if line.band:  # evaluations are few, and have an interval instead of a running mean
        axes.plot(curve.steps, values, marker="o", markersize=3.5, linewidth=1.6, **look)
        low, high = (run.metrics.get(name, {}) for name in line.band)
        ends = [[panel.scale * part.get(step, np.nan) for step in curve.steps.tolist()] for part in (low, high)]
        axes.fill_between(curve.steps, *ends, color=look["color"], alpha=0.18, linewidth=0)
        return values
    if over > 1 and faint:
        axes.plot(curve.steps, values, linewidth=0.7, alpha=0.28, color=look["color"])
    marker = "o" if len(values) == 1 else ""
    axes.plot(curve.steps, smooth(values, over), linewidth=1.7, marker=marker, markersize=3.5, **look)
    return values


def _stack(axes: "Axes", panel: Panel, run: RecordedRun, colours: dict[str, str]) -> np.ndarray:
    """Draws the lines as stacked areas and returns the heights of the stack, [S]."""
    found = curves(panel, run)
    steps, over = found[0].steps.tolist(), smoothing(panel.lines[0], found[0])
    parts = [panel.scale * curve.values for curve in found]
    looks = [{"color": colours[line.role], "label": line.label} for line in panel.lines]
    bottom = np.zeros(len(steps))
    for part, look in zip([smooth(part, over) for part in parts], looks, strict=True):
        if len(steps) == 1:  # an area over one step has no width
            axes.bar(steps, part, bottom=bottom, width=0.5, **look)
        else:
            axes.fill_between(steps, bottom, bottom + part, linewidth=0, **look)
        bottom = bottom + part
    return np.sum(parts, axis=0)


def _overlay(axes: "Axes", panel: Panel, runs: Sequence[RecordedRun], colours: dict[str, str]) -> np.ndarray:
    """Draws all runs over each other and returns all their values.

    A colour stands for a run and a dash pattern for a kind of line. The legend explains both.
    """
    heights = []
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        colour = colours[RUNS[number % len(RUNS)]]
        # matplotlib leaves a label out that begins with an underscore.
        axes.plot([], [], color=colour, linewidth=3, label=f" {label}" if label.startswith("_") else label)
        for kind, line in enumerate(panel.lines):
            dash = DASHES[kind % len(DASHES)]
            heights.append(_line(axes, panel, line, run, False, color=colour, linestyle=dash))
    for kind, line in enumerate(panel.lines if len(panel.lines) > 1 else ()):
        axes.plot([], [], color=colours["muted"], linestyle=DASHES[kind % len(DASHES)], label=line.label)
    return np.concatenate(heights)


def _cut(axes: "Axes", panel: Panel, heights: np.ndarray) -> str:
    """Sets the top of the y axis; returns the text that names the peak where a few values are above it, else ""."""
    top = axes.get_ylim()[1]
    if panel.scale == 100:
        axes.set_ylim(0, min(top, 102) if heights.any() else 100)
        return ""
    most = 1.6 * np.quantile(heights, 0.95)
    if panel.cut and 0 < most < heights.max():
        axes.set_ylim(0, most)
        return f"; peak {heights.max():.3g}"
    axes.set_ylim(min(0, heights.min()), top)
    return ""


def _limit(axes: "Axes", panel: Panel, run: RecordedRun, colours: dict[str, str]) -> None:
    """Draws a setting as a horizontal line where the values come near it."""
    limit, top = run.setting(panel.limit) if panel.limit else None, axes.get_ylim()[1]
    if isinstance(limit, int | float) and limit <= 1.5 * top:
        look = {"color": colours["muted"], "linewidth": 1, "linestyle": DASHES[1]}
        axes.axhline(limit, label=f"limit {limit:g}", **look)
        axes.set_ylim(top=max(top, 1.05 * limit))


def _dress(
    figure: "Figure", axes: "Axes", panel: Panel, colours: dict[str, str], cut: str, overs: Sequence[int], several: int
) -> None:
    """Adds titles, ticks and a legend, whose first `several` entries are runs."""
    from matplotlib.ticker import MaxNLocator

    ink, muted = colours["ink"], colours["muted"]
    over = " and ".join(str(values) for values in dict.fromkeys(overs) if values > 1)
    look = {
        "fontsize": 12,
        "fontweight": "bold",
        "color": ink,
        "parse_math": False,
    }  # names may hold dollar signs, which are not formulas
    axes.set_title(panel.title, loc="left", pad=8, **look)
    axes.set_title(panel.unit + cut, loc="right", fontsize=SMALL, color=muted, pad=8)
    axes.set_xlabel(f"step (means of {over} values)" if over else "step", fontsize=SMALL, color=muted)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(colors=muted, labelsize=SMALL, length=0)
    axes.grid(color=colours["grid"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) == 1:
        handles, labels = [], []
    rows = 0
    for entries in (slice(several, None), slice(several)):  # from below: kinds of lines, then runs
        rows += _legend(figure, handles[entries], [label[:LABEL] for label in labels[entries]], rows, ink)
    figure.subplots_adjust(left=0.105, right=0.97, top=0.87, bottom=0.2 + ROW * max(rows, 1))


def _legend(figure: "Figure", handles: list, labels: list[str], row: int, ink: str) -> int:
    """Puts a legend at the foot of the figure, on `row` counted from below, and returns how many rows it takes."""
    if not handles:
        return 0
    columns = len(labels)
    if sum(map(len, labels)) + GAP * columns > LABEL:
        columns = max(1, min(columns, LABEL // (max(map(len, labels)) + GAP)))
    look = {"fontsize": SMALL, "frameon": False, "labelcolor": ink, "handlelength": 1.4, "columnspacing": 1.2}
    legend = figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, ROW * row), ncols=columns, **look)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return math.ceil(len(labels) / columns)
