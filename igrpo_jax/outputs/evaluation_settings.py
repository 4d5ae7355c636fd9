"""Where a run writes its evaluations, the settings that each records, and those by which two of a model differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The settings that say which model answered, and those that only the rounds of draft -> refine depend on.
MODEL = ("model", "step", "weights_written", "chat_template", "tokenizer")
ROUNDS = ("refine_instruction", "max_draft_length")


def evaluation_folder(workdir: Path, step: int) -> Path:
    """Returns the folder of the evaluation that the run in `workdir` makes at a step."""
    return workdir / "evaluations" / f"step_{step:06d}"


def last_evaluation(folder: Path) -> Path:
    """Returns the folder of the last complete evaluation of the run in `folder`, or `folder` where it holds none."""
    return max((path.parent for path in folder.glob("evaluations/step_*/summary.json")), default=folder)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Returns what the evaluation.json in `folder` records, None if it cannot be read."""
    try:
        settings = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def changed(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> dict[str, tuple[str, str]]:
    """Returns the settings of the single shot that both record with different values, as text, by name.

    Those that name the model are left out: it is what is compared.
    """
    first, second = first or {}, second or {}
    names = [name for name in first if name in second and name not in (*MODEL, *ROUNDS)]
    return {name: (cell(first, name), cell(second, name)) for name in names if first[name] != second[name]}


def cell(settings: Mapping[str, Any], name: str) -> str:
    """Returns a setting as text, which says so where it is not recorded."""
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not recorded"
