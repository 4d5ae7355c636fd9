"""Writes a report: plots, sample data and the two pages that show them, all in one folder that needs no server.

    index.html         the summary of every run, its settings, and the plots, which plots.js draws from data/plots.js
    samples.html       the samples, which samples.js shows from data/
    igrpo_report.json  the runs of the report; it tells a later command that the folder holds a report

Templates escape every value. The pages allow no scripts and no styles but those in their own files, and no requests.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import jinja2

from igrpo_jax import __version__
from igrpo_jax.errors import InputError
from igrpo_jax.outputs.files import write_atomically
from igrpo_jax.report import charts, figures, panels, runs, samples, settings, summary, versus
from igrpo_jax.report.plots import Panel
from igrpo_jax.report.runs import RecordedRun
from igrpo_jax.storage.addresses import is_remote, names, path_of, refusing
from igrpo_jax.storage.writing import remove_tree, upload_folder

# Some browsers give a file no origin, so 'self' alone would not let a page that is opened as a file load its files.
POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src 'self' file: data:; "
    "base-uri 'none'; form-action 'none'"
)
LOADER = jinja2.PackageLoader("igrpo_jax.report")
TEMPLATES = jinja2.Environment(loader=LOADER, autoescape=True, undefined=jinja2.StrictUndefined)
MARK = "igrpo_report.json"
OWN = ("index.html", "samples.html", "samples.js", "plots.js", "style.css", "plots", "data")


@dataclass(frozen=True)
class Shown:
    """The parts of a run that index.html shows."""

    name: str
    folder: Path
    summary: summary.Summary
    settings: list[settings.Setting]
    notes: list[str]
    last_step: int | None  # last step with samples
    flagged: list[tuple[str, int]]  # names of samples.FLAGS, and how many prompts of the last step have such a sample
    versus: list[str]  # sentences that compare it with the first run of the report


def build(folders: str | Path | Sequence[str | Path], out: str | Path | None = None) -> list[Shown]:
    """Writes the report of the runs in `folders` into `out`, where it replaces an earlier report.

    Args:
        folders: the folder of a run, or several folders, whose runs are drawn over each other.
        out: None for the folder `report` in the first of them.

    Raises:
        InputError: a folder holds no run; `out` holds something else or cannot be written; matplotlib is missing.
    """
    figures.require()
    named = [folders] if isinstance(folders, (str, Path)) else folders
    out = path_of(f"--out {out}", out) if out else path_of(f"--workdir {named[0]}", named[0]) / "report"
    recorded = runs.read([runs.local_copy(folder) for folder in named])
    if not is_remote(out):
        return _write(out, recorded)
    with refusing(f"--out {out}"), tempfile.TemporaryDirectory() as folder:
        if (present := names(out)) and MARK not in present:
            raise InputError(f"--out {out}: holds {min(present)} but no report; give an empty or new folder")
        shown = _write(Path(folder, "report"), recorded)
        remove_tree(out)
        upload_folder(Path(folder, "report"), out, last=("index.html",))
    return shown


def _write(out: Path, recorded: list[RecordedRun]) -> list[Shown]:
    """Writes the report into the local folder `out`."""
    try:
        _claim(out, recorded)
        written = [samples.write(run, out / "data" / str(number)) for number, run in enumerate(recorded)]
        index = {run.name: sampled.index for run, sampled in zip(recorded, written, strict=True)}
        samples.write_index(out / "data" / "index.js", index)
        counted = [_with_counts(run, sampled) for run, sampled in zip(recorded, written, strict=True)]
        sections = figures.write(counted, out / "plots")
        charts.write(out / "data" / "plots.js", sections, counted)
        trained = panels.trained(counted)
        shown = [_shown(run, sampled, trained, counted[0]) for run, sampled in zip(counted, written, strict=True)]
        _write_pages(out, counted, shown, sections, any(sampled.index for sampled in written))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error}); give another folder") from error
    return shown


def _claim(out: Path, recorded: Sequence[RecordedRun]) -> None:
    """Makes the folder `out`, or removes an earlier report from it.

    Raises:
        InputError: `out` holds files but no report.
    """
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if names and MARK not in names:
        raise InputError(f"--out {out}: holds {names[0]} but no report; give an empty or new folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in OWN:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    about = {"version": __version__, "runs": {run.name: str(run.folder) for run in recorded}}
    write_atomically(out / MARK, json.dumps(about, indent=2) + "\n")


def _with_counts(run: RecordedRun, written: samples.Written) -> RecordedRun:
    """Returns the run with the counts of its samples as additional metrics, in fractions of a step's prompts."""
    counts = {step: count for step, count in written.counts.items() if count.prompts}
    metrics = {}
    for kind in ("right", "wrong", "mixed"):
        metrics[f"samples/equal_{kind}"] = {step: count.equal[kind] / count.prompts for step, count in counts.items()}
    return replace(run, metrics=run.metrics | metrics, notes=[*run.notes, *written.notes])


def _shown(run: RecordedRun, written: samples.Written, trained: str, first: RecordedRun) -> Shown:
    """Returns the parts of a run that index.html shows.

    Args:
        trained: name of the trained completions.
        first: the first run of the report.
    """
    last = written.index[-1]["step"] if written.index else None
    flagged = written.counts[last].flagged if written.index else {}
    listed = [(name, flagged[name]) for name in samples.FLAGS if name in flagged]
    told, against = summary.summary(run, trained), [] if run is first else versus.sentences(first, run)
    return Shown(run.name, run.folder, told, settings.of(run), run.notes, last, listed, against)


def _compared(shown: Sequence[Shown], recorded: Sequence[RecordedRun]) -> dict[str, list[summary.Change | None]]:
    """Returns by name the change of every run, None if a run lacks it; empty if there is only one run."""
    if len(shown) == 1:
        return {}
    rows = [[*of.summary.changes, *versus.totals(run)] for of, run in zip(shown, recorded, strict=True)]
    by_run = [{change.name: change for change in changes} for changes in rows]
    names = dict.fromkeys(name for changes in by_run for name in changes)
    return {name: [changes.get(name) for changes in by_run] for name in names}


def _write_pages(
    out: Path,
    recorded: Sequence[RecordedRun],
    shown: Sequence[Shown],
    sections: dict[str, list[Panel]],
    has_samples: bool,
) -> None:
    """Writes the two pages and the files that they load."""
    for name in ("style.css", "samples.js", "plots.js"):
        write_asset(out, name)
    title = " · ".join(run.name for run in shown)
    width, height = (round(inches * figures.DPI) for inches in (figures.WIDTH, figures.HEIGHT))
    values = {
        "policy": POLICY,
        "title": title,
        "version": __version__,
        "written": f"{datetime.now():%Y-%m-%d %H:%M}",
        "runs": shown,
        "compared": _compared(shown, recorded),
        "trained": panels.trained(recorded),
        "differing": settings.differing(recorded),
        "run_colours": len(figures.RUNS),
        "sections": sections,
        "has_samples": has_samples,
        "width": width,
        "height": height,
    }
    for name in ("samples.html", "index.html"):  # index.html comes last, after all files that it names
        write_page(out, name, values)


def write_asset(out: Path, name: str) -> None:
    """Writes a file of the templates into `out` as it is."""
    write_atomically(out / name, LOADER.get_source(TEMPLATES, name)[0])


def write_page(out: Path, name: str, values: Mapping[str, object]) -> None:
    """Writes the page of a template into `out`; every value is escaped."""
    write_atomically(out / name, TEMPLATES.get_template(name).render(values))
