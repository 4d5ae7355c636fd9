"""Reads the folder of a run for a report: settings, curves and sample files, and notes on what is missing or torn.

A run may still be under way, or may have crashed in the middle of a line. Nothing here raises an error for files that
such a run leaves; they become notes that the report shows.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_jax.errors import InputError, one_line
from igrpo_jax.storage import reading

LOSS = "sft/loss"  # the metric of a step of SFT, which has no `loss`
PARTS = ("config.json", "metrics.jsonl", "samples", "evaluations")  # what a report reads in the folder of a run


@dataclass(frozen=True)
class Curve:
    """The values of a metric at the steps that have it."""

    steps: np.ndarray  # [S] int, rising
    values: np.ndarray  # [S] float64, finite

    def __bool__(self) -> bool:
        return len(self.steps) > 0


@dataclass(frozen=True)
class RecordedRun:
    """The contents of a run's folder."""

    name: str  # name of the folder, made unique where several runs are shown
    folder: Path
    config: dict[str, Any]  # the contents of config.json; empty if there is none
    steps: list[int]  # steps of training that have a row, rising
    metrics: dict[str, dict[int, float]]  # values by name, then by step; a null in the file is absent here
    nulls: dict[str, list[int]]  # by name the steps at which the metric was not finite
    samples: dict[int, Path]  # files of samples by step, rising
    notes: list[str]  # sentences on what is missing or was left out

    def curve(self, *names: str, less: Sequence[str] = ()) -> Curve:
        """Returns the sum of the metrics `names` minus the metrics `less`, at the steps that have them all.

        The curve is empty if the run lacks one of the metrics.
        """
        plus, minus = ([self.metrics.get(name, {}) for name in wanted] for wanted in (names, less))
        steps = sorted(set(plus[0]).intersection(*plus[1:], *minus))
        values = [sum(part[step] for part in plus) - sum(part[step] for part in minus) for step in steps]
        return Curve(np.array(steps, int), np.array(values, float))

    def setting(self, path: str) -> Any:
        """Returns a field of config.json by its dotted name, None if it is missing."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    @property
    def is_sft(self) -> bool:
        """Whether it is supervised fine-tuning (`igrpo_jax.sft`), which samples nothing."""
        return LOSS in self.metrics

    @property
    def benchmarks(self) -> list[str]:
        """Returns the names of the benchmarks that were evaluated, in alphabetical order."""
        matches = [re.fullmatch(r"eval/([^/]+)/pass@1", name) for name in self.metrics]
        return sorted(match[1] for match in matches if match)


def local_copy(folder: str | Path) -> Path:
    """Returns the folder of a run: itself where it is local, else a copy of what a report reads of one in a bucket."""
    return reading.local(f"--workdir {folder}", folder, lambda name: name.partition("/")[0] in PARTS)


def read(folders: list[Path]) -> list[RecordedRun]:
    """Returns the runs in `folders`, in this order, with names that differ.

    Raises:
        InputError: a folder does not exist, holds no run, or is given twice.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"--workdir {folder}: no such folder; give the --workdir of a run")
        if not any((folder / name).exists() for name in ("metrics.jsonl", "samples")) and not _has_settings(folder):
            raise InputError(
                f"--workdir {folder}: holds no config.json of a run, metrics.jsonl or samples; give the folder of a run"
            )
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        twice = next(folder for folder in folders if resolved.count(folder.resolve()) > 1)
        raise InputError(f"--workdir {twice}: given twice; name each run once")
    names = [folder.name for folder in resolved]
    if len(set(names)) < len(names):
        names = ["/".join(folder.parts[-2:]) for folder in resolved]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return [_read(folder, name) for folder, name in zip(resolved, names, strict=True)]


def _read(folder: Path, name: str) -> RecordedRun:
    notes: list[str] = []
    config = _config(folder / "config.json", notes)
    steps: set[int] = set()
    metrics: dict[str, dict[int, float]] = {}
    nulls: dict[str, list[int]] = {}
    path = folder / "metrics.jsonl"
    torn = 0
    for row in whole_rows(path):
        if row is None or type(row.get("step")) is not int:
            torn += 1
            continue
        step = row["step"]
        if "loss" not in row and (own := number(row.get("warm_start/step"))) is not None:
            step = int(own)  # the warm start counts steps of its own
        if "loss" in row or LOSS in row:
            steps.add(step)
        for key, value in row.items():
            if value is None:
                nulls.setdefault(key, []).append(step)
            elif key != "step" and (known := number(value)) is not None:
                metrics.setdefault(key, {})[step] = known
    if not path.exists():
        notes.append("metrics.jsonl is missing, so there are no curves")
    elif torn:
        notes.append(f"metrics.jsonl: {counted(torn, 'line')} left out that are not whole rows, as a kill leaves them")
    if not steps:
        notes.append("no training step is finished yet")
    samples = _samples(folder / "samples")
    without = [step for step in sorted(steps) if step not in samples]
    if without and LOSS not in metrics:
        notes.append(f"samples are missing of {counted(len(without), 'step')}: {_ranges(without)}")
    skipped = sorted(set(range(min(steps), max(steps))) - steps) if steps else []
    if skipped:
        notes.append(f"metrics.jsonl has no row of {counted(len(skipped), 'step')}: {_ranges(skipped)}")
    run = RecordedRun(name, folder, config, sorted(steps), metrics, nulls, samples, notes)
    if run.setting("algorithm.beta") == 0:  # rows have a 0 that was not measured
        for metric in [metric for metric in metrics if metric.rpartition("/")[2] == "kl"]:
            del metrics[metric]
    return run


def whole_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yields the rows of a JSON Lines file, and None for each line that is not a JSON object.

    Yields nothing where there is no file. Bytes that are not UTF-8 are read as U+FFFD.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8", errors="replace"))
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def number(value: Any) -> float | None:
    """Returns a value of a row as a finite float, None if it is anything else."""
    try:
        known = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return known if math.isfinite(known) else None


def counted(count: int, thing: str) -> str:
    """Returns a count with its noun, for example "1 step" or "3 steps"."""
    return f"{count:,} {thing}" + ("s" if count != 1 else "")


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    """Returns the contents of config.json; where they cannot be read, adds a note and returns an empty dict."""
    try:
        config = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        if isinstance(config, dict):
            return config
        notes.append("config.json holds no settings")
    except FileNotFoundError:
        notes.append("config.json is missing, so settings are not shown")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"config.json cannot be read ({one_line(error)})")
    return {}


def _has_settings(folder: Path) -> bool:
    """Returns whether there is a config.json in `folder` that is not that of a Hugging Face model."""
    file = folder / "config.json"
    return file.exists() and "model_type" not in _config(file, [])


def _samples(folder: Path) -> dict[int, Path]:
    """Returns the files of samples in `folder` by step, rising."""
    files = {}
    for path in folder.glob("step_*.jsonl") if folder.is_dir() else ():
        step = path.stem.removeprefix("step_")
        if step.isdecimal():
            files[int(step)] = path
    return dict(sorted(files.items()))


def _ranges(steps: list[int], most: int = 4) -> str:
    """Returns the first `most` ranges of rising numbers as text, for example "3, 7 to 9"."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [f"{a}" if a == b else f"{a} to {b}" for a, b in ranges[:most]]
    return ", ".join(shown) + (", …" if len(ranges) > most else "")
