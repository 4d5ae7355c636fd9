"""Answers that a model gave before, as drafts that SFT may show: from the files of a run and others.

These are the drafts and, without a draft stage, the completions in the samples of a run, and the single-shot answers of
`igrpo_jax.evaluate` and `igrpo_jax.probe`. Their rows say whether an answer is right. Answers are matched to problems
by the text of the question, because the same number means another problem in another file. Not here: drafts in a column
(`solutions`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo_jax.data import readers
from igrpo_jax.errors import InputError
from igrpo_jax.rewards.failures import FAILED
from igrpo_jax.storage import reading


@dataclass(frozen=True)
class Draft:
    """An answer to a problem."""

    text: str
    is_right: bool | None  # None if this is not known


def answers_of(address: str, source: str) -> dict[str, tuple[Draft, ...]]:
    """Returns the answers in the folder of a run, an evaluation or a probe, or in one of their files, by question.

    Args:
        address: a folder, or a file in JSON Lines; also in a bucket.
        source: the field and its value, with which errors begin.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    place = reading.local(source, address, _may_hold_answers)
    if not place.exists():
        raise InputError(f"{source}: no such file or folder; give the --workdir of a run, an evaluation or a probe")
    files = sorted(_files(place)) if place.is_dir() else [place]
    answers: dict[str, list[Draft]] = {}
    for file in files:
        for _, row in readers.read(str(file), source):
            if _is_single_shot(row):
                answers.setdefault(row["prompt"].strip(), []).append(Draft(row["text"], is_right(row)))
    if not answers:
        raise InputError(
            f"{source}: holds no answers; give the --workdir of a run, an evaluation or a probe, or one of their files "
            "in JSON Lines"
        )
    return {question: tuple(drafts) for question, drafts in answers.items()}


def _may_hold_answers(name: str) -> bool:
    """Returns whether a file below a folder may hold answers: one of an evaluation or a probe, or samples of a run."""
    folder, _, file = name.rpartition("/")
    return file.endswith(".jsonl") and (folder == "samples" or (not folder and file != "metrics.jsonl"))


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*.jsonl") if _may_hold_answers(file.relative_to(folder).as_posix())]


def _is_single_shot(row: dict[str, Any]) -> bool:
    """Returns whether a row is an answer to the plain prompt."""
    if not all(isinstance(row.get(name), str) and row[name].strip() for name in ("prompt", "text")):
        return False
    if "stage" in row:  # samples of a run
        return row["stage"] == "draft" or row.get("parent_draft_id") is None
    return row.get("drafts") == []


def is_right(row: dict[str, Any]) -> bool | None:
    """Returns the verdict on a recorded answer; None without an accuracy reward, and where no verdict came.

    An answer without a verdict may have an accuracy, as where the judge did not reply.
    """
    accuracy = row["accuracy"] if "accuracy" in row else (row.get("rewards") or {}).get("accuracy")
    return None if accuracy is None or row.get("status") in FAILED else accuracy >= 1
