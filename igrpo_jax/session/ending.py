"""The end of a run: a record of it, from which the same command sees at once that there is nothing left to do."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from igrpo_jax.config import Config, to_dict
from igrpo_jax.distributed import cluster
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.files import write_atomically
from igrpo_jax.outputs.workdir import check_settings, recorded_date
from igrpo_jax.session import overview, resuming
from igrpo_jax.session.progress import Progress
from igrpo_jax.storage.reading import read_bytes

FILE = "finished.json"  # in the folder of a run


def write_finished(workdir: Path, config: Config, step: int, metrics_rows: int, progress: Progress) -> None:
    """Records that the run of `config` in `workdir` ended after `step`, its last, with all its files written."""
    if jax.process_index() == 0:
        seen = {"step": step, "asked": _asked(config), "metrics_rows": metrics_rows, "progress": progress.meta()}
        write_atomically(workdir / FILE, json.dumps(seen, indent=2) + "\n")


def remove_finished(workdir: Path) -> None:
    """Removes what `write_finished` wrote, because the run continues."""
    if jax.process_index() == 0:
        (workdir / FILE).unlink(missing_ok=True)


def is_finished(workdir: Path, config: Config, console: Console) -> bool:
    """Returns whether the run of `config` in `workdir` has ended; if so, prints the final table.

    Neither the model nor the problems are read.

    Raises:
        InputError: the folder holds a finished run with other settings.
    """
    seen = cluster.from_first(functools.partial(_read_finished, workdir, config))
    if seen is None:
        return False
    step, progress = seen["step"], Progress.from_meta(seen["progress"], 0)
    resuming.tell_lost_rows(_count_lines(workdir / "metrics.jsonl"), seen["metrics_rows"], step, console)
    console.table("Done", overview.after(workdir, progress, config.checkpoint.best_metric, step, step))
    return True


def _read_finished(workdir: Path, config: Config) -> dict[str, Any] | None:
    """Returns what `write_finished` wrote; None if that is nothing, if settings of `_asked` differ, or if results lack.

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
    settings = to_dict(config)
    return {name: settings[name] for name in ("steps", "evaluation", "checkpoint")}


def _count_lines(file: Path) -> int:
    try:
        return len(read_bytes(file).splitlines())
    except FileNotFoundError:
        return 0
