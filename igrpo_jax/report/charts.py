"""Writes the curves of the panels as data that plots.js draws in the page: values under the pointer, and zoom.

    data/plots.js   one call with all panels in the order of the page; JSON in ASCII, which is JavaScript

The page inserts names as text. The curves and their running means are those of the PNG files.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_jax.report.figures import RUNS, curves, labels, smooth, smoothing
from igrpo_jax.report.plots import Line, Panel
from igrpo_jax.report.runs import Curve, RecordedRun

POINTS = 4000  # the most of a line; a longer one shows one step for each stretch, the one farthest from its median


def write(path: Path, sections: dict[str, list[Panel]], runs: Sequence[RecordedRun]) -> None:
    """Writes data/plots.js for the panels of `panels(runs)`."""
    listed = [{"name": label} for label in labels(runs)]
    drawn = [_panel(panel, runs) for panels in sections.values() for panel in panels]
    text = json.dumps({"colours": len(RUNS), "runs": listed, "panels": drawn}, separators=(",", ":"))
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"plotsLoaded({text})\n", encoding="ascii")


def _panel(panel: Panel, runs: Sequence[RecordedRun]) -> dict[str, Any]:
    limit = runs[0].setting(panel.limit) if panel.limit and len(runs) == 1 else None
    found = [curves(panel, run) for run in runs]
    lines = [
        {
            "label": line.label,
            "role": line.role,
            "runs": [_points(panel, line, run, of_run[place]) for run, of_run in zip(runs, found, strict=True)],
        }
        for place, line in enumerate(panel.lines)
    ]
    return {
        "title": panel.title,
        "percent": panel.scale == 100,
        "stacked": panel.stacked,
        "cut": panel.cut,
        "limit": limit if isinstance(limit, int | float) else None,
        "lines": lines,
    }


def _points(panel: Panel, line: Line, run: RecordedRun, curve: Curve) -> dict[str, Any]:
    """Returns the steps and values of a line, the running means of one that is smoothed, and the ends of intervals."""
    if line.band is None:
        places = np.arange(len(curve.steps)) if panel.stacked else thinned(curve.values, POINTS)
        points = {"x": curve.steps[places].tolist(), "y": _rounded(panel.scale * curve.values[places])}
        if (over := smoothing(line, curve)) > 1:  # of all values: those that are left show their extremes
            points |= {"over": over, "mean": _rounded(panel.scale * smooth(curve.values, over)[places])}
        return points
    ends = [[run.metrics.get(name, {}).get(step) for step in curve.steps.tolist()] for name in line.band]
    low, high = ([None if end is None else _rounded([panel.scale * end])[0] for end in part] for part in ends)
    return {"x": curve.steps.tolist(), "y": _rounded(panel.scale * curve.values), "low": low, "high": high}


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Returns at most `most` rising indices of `values` [S]: in each stretch, the value farthest from its median."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), most + 1).astype(int)
    return np.array(
        [
            start + int(np.argmax(np.abs(values[start:end] - np.median(values[start:end]))))
            for start, end in itertools.pairwise(edges)
        ]
    )


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    """Returns the values with six digits, which is more than a screen shows."""
    return [float(f"{value:.6g}") for value in values]
