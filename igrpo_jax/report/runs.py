"""A run's folder as a report reads it: settings, curves, sample files, and what of these is missing or torn.

A run may still be going on, or have crashed in the middle of a line. Nothing here raises for what such a run leaves; it
becomes a note that the report shows.
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


@dataclass(frozen=True)
class Curve:
    """One metric over the steps that have it."""

    steps: np.ndarray  # [S] int, rising
    values: np.ndarray  # [S] float64, finite

    def __bool__(self) -> bool:
        return len(self.steps) > 0


@dataclass(frozen=True)
class Run:
    name: str  # of the folder, made unique where several runs are shown
    folder: Path
    config: dict[str, Any]  # config.json; empty where there is none
    steps: list[int]  # RL steps with a row, rising
    metrics: dict[str, dict[int, float]]  # by name, then by step; what is null in the file is absent
    nulls: dict[str, list[int]]  # by name the steps at which it was not finite
    samples: dict[int, Path]  # by step, rising
    notes: list[str]  # what is missing or was left out, for people

    def curve(self, *names: str, less: Sequence[str] = ()) -> Curve:
        """The sum of metrics, `less` others, over the steps that have them all; empty where the run lacks one."""
        plus, minus = ([self.metrics.get(name, {}) for name in some] for some in (names, less))
        steps = sorted(set(plus[0]).intersection(*plus[1:], *minus))
        values = [sum(part[step] for part in plus) - sum(part[step] for part in minus) for step in steps]
        return Curve(np.array(steps, int), np.array(values, float))

    def setting(self, path: str) -> Any:
        """A field of config.json by its dotted name, None where it is not there."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    @property
    def benchmarks(self) -> list[str]:
        """Names of those that were evaluated, in alphabetical order."""
        found = [re.fullmatch(r"eval/([^/]+)/pass@1", name) for name in self.metrics]
        return sorted(match[1] for match in found if match)


def read(folders: list[Path]) -> list[Run]:
    """The runs in `folders`, in this order, with names that differ.

    Raises:
        InputError: a folder is none, holds no run, or is given twice.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"--workdir {folder}: no such folder; give the --workdir of a run")
        if not any((folder / name).exists() for name in ("config.json", "metrics.jsonl", "samples")):
            raise InputError(
                f"--workdir {folder}: holds no config.json, metrics.jsonl or samples; give the --workdir of a run"
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


def _read(folder: Path, name: str) -> Run:
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
        if "loss" in row:
            steps.add(step)
        for key, value in row.items():
            if value is None:
                nulls.setdefault(key, []).append(step)
            elif key != "step" and (known := number(value)) is not None:
                metrics.setdefault(key, {})[step] = known
    if not path.exists():
        notes.append("metrics.jsonl is missing, so there are no curves")
    elif torn:
        notes.append(f"metrics.jsonl: {counted(torn, 'line')} left out that are no whole row, as a kill leaves them")
    if not steps:
        notes.append("no training step is finished yet")
    samples = _samples(folder / "samples")
    without = [step for step in sorted(steps) if step not in samples]
    if without:
        notes.append(f"samples are missing of {counted(len(without), 'step')}: {_ranges(without)}")
    skipped = sorted(set(range(min(steps), max(steps))) - steps) if steps else []
    if skipped:
        notes.append(f"metrics.jsonl has no row of {counted(len(skipped), 'step')}: {_ranges(skipped)}")
    return Run(name, folder, config, sorted(steps), metrics, nulls, samples, notes)


def whole_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of a JSON Lines file, None in the place of a line that is no JSON object; none where there is no file.

    Bytes that are no UTF-8 are read as U+FFFD.
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
    """A value of a row as a finite float, None where it is anything else."""
    try:
        known = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return known if math.isfinite(known) else None


def counted(count: int, thing: str) -> str:
    """For example "1 step" and "3 steps"."""
    return f"{count:,} {thing}" + ("s" if count != 1 else "")


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
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


def _samples(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob("step_*.jsonl") if folder.is_dir() else ():
        number = path.stem.removeprefix("step_")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))


def _ranges(steps: list[int], most: int = 4) -> str:
    """For example "3, 7 to 9"; the first few ranges of rising numbers."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [f"{a}" if a == b else f"{a} to {b}" for a, b in ranges[:most]]
    return ", ".join(shown) + (", …" if len(ranges) > most else "")
