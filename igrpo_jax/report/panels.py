"""The choice of the panels of a report: those of the table that have data, and one for every other metric."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import replace

from igrpo_jax.report.plots import Line, Panel
from igrpo_jax.report.runs import RecordedRun
from igrpo_jax.report.table import LEARNING, OTHER, PANELS

REWARD = re.compile(r"rewards/([^/]+)/mean")
AXES = ("warm_start/step", "perf/wall_time")  # metrics that are not curves: an axis, and the time of a row


def evaluation(name: str) -> Panel:
    """Returns the panel of a benchmark: single-shot pass@1, and pass@1 after a round of refining where measured."""
    lines = [
        _with_interval("single shot", "single", f"eval/{name}/pass@1"),
        _with_interval("after a round of refining", "trained", f"eval/{name}/refine_1/pass@1"),
    ]
    file = f"evaluation_{_file_name(name)}"
    caption = "Held-out problems, plain prompt, no draft: what was learned. Bands are 95 % intervals over problems."
    return Panel(file, f"Single shot: {name}", "pass@1, %", caption, tuple(lines), 100)


def _with_interval(label: str, role: str, metric: str) -> Line:
    return Line(label, role, (metric,), band=(f"{metric}_low", f"{metric}_high"))


def reward(name: str) -> Panel:
    """Returns the panel of one reward, before its weight."""
    line = Line("refinements", "trained", (f"rewards/{name}/mean",))
    caption = "Mean of this reward alone, before its weight."
    return Panel(f"reward_{_file_name(name)}", f"Reward: {name}", "mean", caption, (line,))


def other(metric: str) -> Panel:
    """Returns the panel of a metric that no other panel shows; the page draws it, and it has no PNG."""
    return Panel(f"other_{_file_name(metric)}", metric, "", "", (Line(metric, "trained", (metric,)),), drawn=False)


def _file_name(name: str) -> str:
    """Returns a name as a part of a file's name; two names that look alike after that are told apart by their hash."""
    plain = re.sub(r"[^A-Za-z0-9.-]", "_", name)
    return plain if plain == name else f"{plain[:80]}-{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"


def panels(runs: Sequence[RecordedRun]) -> dict[str, list[Panel]]:
    """Returns by section the panels that have data in at least one run. The solve rate comes first.

    Every metric of the runs but AXES is in a panel: the last section has those that no other panel shows.
    """
    benchmarks = sorted({name for run in runs for name in run.benchmarks})
    rewards = sorted({match[1] for run in runs for name in run.metrics if (match := REWARD.fullmatch(name))})
    extra = [*map(evaluation, benchmarks), *(reward(name) for name in rewards if name != "accuracy")]
    sections = {}
    for section, table in PANELS.items():
        candidates = [table[0], *extra, *table[1:]] if section == LEARNING else list(table)
        fitted = [_fitted(panel, runs) for panel in candidates]
        sections[section] = [panel for panel in fitted if panel.lines]
    shown = {name for table in sections.values() for panel in table for line in panel.lines for name in line.names}
    left = sorted({name for run in runs for name, values in run.metrics.items() if values and name not in shown})
    sections[OTHER] = [other(name) for name in left if name not in AXES]
    return {section: with_data for section, with_data in sections.items() if with_data}


def trained(runs: Sequence[RecordedRun]) -> str:
    """Returns the name of trained completions: "refinements", "completions", or "trained" where the runs have both."""
    refine = [bool(run.curve("refine/copy_ratio")) for run in runs]
    return "refinements" if all(refine) else "trained" if any(refine) else "completions"


def _fitted(panel: Panel, runs: Sequence[RecordedRun]) -> Panel:
    """Returns the panel with the lines for which these runs have data."""
    lines, stacked = panel.lines, panel.stacked and len(runs) == 1
    if panel.compared and (not stacked or not all(line.of(runs[0]) for line in lines)):
        lines, stacked = panel.compared, False
    lines = tuple(line for line in lines if any(line.of(run) for run in runs))
    lines = tuple(replace(line, label=line.label.replace("refinements", trained(runs))) for line in lines)
    return replace(panel, lines=lines, stacked=stacked)
