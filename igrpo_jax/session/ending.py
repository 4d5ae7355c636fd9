"""The end of a run: a record of it, from which the same command sees at once that there is nothing left to do."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from igrpo_jax.config import Config, to_dict
from igrpo_jax.distributed import cluster
from igrpo_jax.errors import InputError
from igrpo_jax.learning.optimizer import make_schedule
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.files import write_atomically
from igrpo_jax.outputs.workdir import check_settings, recorded_date
from igrpo_jax.session import overview
from igrpo_jax.session.progress import Progress
from igrpo_jax.storage.reading import read_bytes

FILE = "finished.json"  # in the folder of a run


def note(workdir: Path, config: Config, step: int, metrics_rows: int, progress: Progress) -> None:
    """Records that the run of `config` in `workdir` ended after `step`, its last, with all its files written."""
    if jax.process_index() == 0:
        seen = {"step": step, "asked": _asked(config), "metrics_rows": metrics_rows, "progress": progress.meta()}
        write_atomically(workdir / FILE, json.dumps(seen, indent=2) + "\n")


def check(config: Config, total_steps: int, workdir: Path, done: int) -> None:
    """Raises InputError if `config` would end a run before the step that it has already reached.

    Args:
        total_steps: the step at which `config` ends the run.
        done: the step of the checkpoint that the run is resumed from.
    """
    if done <= total_steps:
        return
    asked = f"config.steps = {config.steps}" if config.steps else f"config.epochs = {config.epochs:g}"
    raise InputError(
        f"{asked}: ends after step {total_steps}, and the run in {workdir} has come to step {done}; ask for at least "
        "as many steps, or start a new run with another --workdir"
    )


def last_rate(rows: Sequence[Mapping[str, Any]], done: int) -> float | None:
    """Returns the learning rate that step `done` had, by `rows` of metrics.jsonl; None if its row was lost."""
    return next((row.get("learning_rate") for row in reversed(rows) if row["step"] == done), None)


def new_schedule(config: Config, steps: int, done: int, per_step: int, rate: float | None) -> str:
    """Returns the message on a learning rate that changes because the run gets another number of steps; "" for none.

    Args:
        steps: config.steps before the resume; 0 if it followed from config.epochs.
        done: the step that the run is resumed from.
        per_step: optimizer steps of a step.
        rate: `last_rate` of that step. Where it is None, the rate is that of a run of `steps`, which may be those of a
            resume that was killed before it saved anything.
    """
    if not (steps and config.steps and done) or steps == config.steps:
        return ""
    before, now = (make_schedule(config.optimizer, total * per_step) for total in (steps, config.steps))
    was = float(before(done * per_step - 1)) if rate is None else rate
    becomes = float(now(done * per_step))
    return (
        f"config.steps: {steps} -> {config.steps}: the learning rate rises and falls as in a run of {config.steps} "
        f"steps from now on; it was {was:.3g} at the end of step {done}, and is {becomes:.3g} in step {done + 1}"
    )


def forget(workdir: Path) -> None:
    """Removes what `note` wrote, since the run goes on."""
    if jax.process_index() == 0:
        (workdir / FILE).unlink(missing_ok=True)


def is_finished(workdir: Path, config: Config, console: Console) -> bool:
    """Returns whether the run of `config` in `workdir` has ended; if so, prints the final table.

    Neither the model nor the problems are read.

    Raises:
        InputError: the folder holds a finished run with other settings.
    """
    seen = cluster.from_first(functools.partial(_read, workdir, config))
    if seen is None:
        return False
    step, progress = seen["step"], Progress.from_meta(seen["progress"], 0)
    tell_lost_rows(_count_lines(workdir / "metrics.jsonl"), seen["metrics_rows"], step, console)
    console.table("Done", overview.after(workdir, progress, config.checkpoint.best_metric, step, step))
    return True


def tell_lost_rows(rows: int, expected: int, step: int, console: Console) -> None:
    """Prints a message if metrics.jsonl has fewer rows up to `step` than were written."""
    if rows < expected:
        console.message(
            f"metrics.jsonl has {rows} rows up to step {step}, {expected} were written: rows were lost, and stay so"
        )


def _read(workdir: Path, config: Config) -> dict[str, Any] | None:
    """Returns what `note` wrote; None if it wrote nothing, if settings of `_asked` differ, or if results are missing.

    Raises:
        InputError: the folder holds a finished run with other settings.
    """
    try:
        seen = json.loads(read_bytes(workdir / FILE))
        parts = [
            workdir / "checkpoints" / str(seen["step"]),
            *[workdir / "export"] * bool(config.checkpoint.export or config.checkpoint.push),
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if seen["asked"] != _asked(config) or not all(part.is_dir() for part in parts):
        return None
    date = config.data.template_date or recorded_date(workdir) or ""
    check_settings(workdir, replace(config, data=replace(config.data, template_date=date)))
    return seen


def _asked(config: Config) -> dict[str, Any]:
    """Returns the settings that may change on a resume and may then leave a finished run with more to do."""
    settings = json.loads(json.dumps(to_dict(config)))
    return {name: settings[name] for name in ("steps", "evaluation", "checkpoint")}


def _count_lines(file: Path) -> int:
    try:
        return len(read_bytes(file).splitlines())
    except FileNotFoundError:
        return 0
