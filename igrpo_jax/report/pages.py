"""A report as files: plots, sample data and the two pages that show them, all in one folder that needs no server.

    index.html         the summary of every run, and the plots
    samples.html       the samples, shown by samples.js from data/
    igrpo_report.json  what it is a report of; tells a later command that the folder is its own

Templates escape all they are given. The pages allow no script and no style but their own files, and no request.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import jinja2

from igrpo_jax import __version__
from igrpo_jax.errors import InputError
from igrpo_jax.outputs.files import write_atomically
from igrpo_jax.report import figures, panels, runs, samples, summary
from igrpo_jax.report.runs import Run

# A file's origin is no origin to some browsers, so 'self' alone would not let a page opened as a file load its own.
POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src 'self' file: data:; "
    "base-uri 'none'; form-action 'none'"
)
MARK = "igrpo_report.json"
OWN = ("index.html", "samples.html", "samples.js", "style.css", "plots", "data")


@dataclass(frozen=True)
class Shown:
    """What index.html shows of a run."""

    name: str
    folder: Path
    summary: summary.Summary
    notes: list[str]
    last_step: int | None  # with samples
    flagged: list[
        tuple[str, int]
    ]  # of that step: names of samples.FLAGS with how many prompts have a sample of the kind


def build(folders: Sequence[Path], out: Path) -> list[Shown]:
    """Writes the report of the runs in `folders` into `out`, in the place of an earlier one.

    Raises:
        InputError: a folder holds no run; `out` holds something else or cannot be written; matplotlib is missing.
    """
    figures.require()
    found = runs.read(list(folders))
    try:
        _claim(out, found)
        written = [samples.write(run, out / "data" / str(place)) for place, run in enumerate(found)]
        index = {run.name: one.index for run, one in zip(found, written, strict=True)}
        samples.write_index(out / "data" / "index.js", index)
        counted = [_with_counts(run, one) for run, one in zip(found, written, strict=True)]
        sections = figures.write(counted, out / "plots")
        who = panels.trained(counted)
        shown = [_shown(run, one, who) for run, one in zip(counted, written, strict=True)]
        _write_pages(out, shown, sections, any(one.index for one in written))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error}); give another folder") from error
    return shown


def _claim(out: Path, found: Sequence[Run]) -> None:
    """Makes `out` an empty folder of ours: what an earlier report wrote goes, anything else is refused."""
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if there and MARK not in there:
        raise InputError(f"--out {out}: holds {there[0]} but no report; give an empty or new folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in OWN:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    about = {"version": __version__, "runs": {run.name: str(run.folder) for run in found}}
    write_atomically(out / MARK, json.dumps(about, indent=2) + "\n")


def _with_counts(run: Run, written: samples.Written) -> Run:
    """The run with what was counted in its samples as metrics, as shares of a step's prompts."""
    counts = {step: one for step, one in written.counts.items() if one.prompts}
    metrics = {}
    for kind in ("right", "wrong", "mixed"):
        metrics[f"samples/equal_{kind}"] = {step: one.equal[kind] / one.prompts for step, one in counts.items()}
    return replace(run, metrics=run.metrics | metrics, notes=[*run.notes, *written.notes])


def _shown(run: Run, written: samples.Written, who: str) -> Shown:
    last = written.index[-1]["step"] if written.index else None
    flagged = written.counts[last].flagged if written.index else {}
    listed = [(name, flagged[name]) for name in samples.FLAGS if name in flagged]
    return Shown(run.name, run.folder, summary.summary(run, who), run.notes, last, listed)


def _compared(shown: Sequence[Shown]) -> dict[str, list[summary.Change | None]]:
    """By name of a change, that of every run; empty where there is one run."""
    if len(shown) == 1:
        return {}
    found = [{change.name: change for change in one.summary.changes} for one in shown]
    names = dict.fromkeys(name for changes in found for name in changes)
    return {name: [changes.get(name) for changes in found] for name in names}


def _write_pages(out: Path, shown: Sequence[Shown], sections: dict[str, list], has_samples: bool) -> None:
    loader = jinja2.PackageLoader("igrpo_jax.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    for name in ("style.css", "samples.js"):
        write_atomically(out / name, loader.get_source(environment, name)[0])
    title = " · ".join(one.name for one in shown)
    width, height = (round(inches * figures.DPI) for inches in (figures.WIDTH, figures.HEIGHT))
    values = {
        "policy": POLICY,
        "title": title,
        "version": __version__,
        "written": f"{datetime.now():%Y-%m-%d %H:%M}",
        "runs": shown,
        "compared": _compared(shown),
        "run_colours": len(figures.RUNS),
        "sections": sections,
        "has_samples": has_samples,
        "width": width,
        "height": height,
    }
    for name in ("samples.html", "index.html"):  # index.html last: when it is there, all that it names is
        write_atomically(out / name, environment.get_template(name).render(values))
