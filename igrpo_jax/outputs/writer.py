"""The files that a run writes step by step: `metrics.jsonl`, `samples/*.jsonl` and `nonfinite/*.jsonl`.

`Writer` owns these files, hands each row of metrics to the trackers, and decides what a resume drops.
"""

import contextlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from igrpo_jax.config import Config
from igrpo_jax.outputs import lines, trackers
from igrpo_jax.outputs.files import number, write_rows, writing
from igrpo_jax.records import Completion, Group
from igrpo_jax.storage.addresses import make_folder, names
from igrpo_jax.storage.reading import read_bytes
from igrpo_jax.storage.writing import Lines, Spool


class Writer:
    """Writes `metrics.jsonl`, `samples/` and the files of trackers under `workdir`; only process 0 writes.

    Args:
        resume_step: the step of the checkpoint that was restored; None if the run starts from the beginning. Rows and
            sample files of later steps are dropped, because the resumed run writes them again. With None, all that an
            earlier launch left is dropped. A line that a kill cut short is dropped as well.
        nullable: metrics that may be without a value, and are then written as null without a warning.

    Attributes:
        rows: how many rows `metrics.jsonl` has now, which a checkpoint stores as the metrics cursor.
        history: the rows of training steps that `metrics.jsonl` had when it was opened.
        scores: the metrics of its evaluations, by step.
    """

    def __init__(self, workdir: Path, config: Config, resume_step: int | None = None, nullable: Collection[str] = ()):
        self._workdir = workdir
        self.rows = 0
        self.history: list[dict[str, Any]] = []
        self.scores: dict[int, dict[str, float]] = {}
        self._file: Lines | None = None
        self._without_value = set(nullable)  # names of metrics whose null is nothing new
        self._trackers: list[trackers.Tracker] = []
        if jax.process_index() != 0:
            return
        keep = -math.inf if resume_step is None else resume_step
        self._path = workdir / "metrics.jsonl"
        self._samples = workdir / "samples"
        with writing(workdir):
            make_folder(self._samples)
            for name in names(self._samples):
                match = re.fullmatch(r"step_(\d+)\.jsonl(\.tmp)?", name)
                if match and (match[2] or int(match[1]) > keep):
                    (self._samples / name).unlink()
            rows = rows_until(self._path, keep)
            self.rows = len(rows)
            read = [*map(json.loads, rows)]
            self.history = [row for row in read if row.keys() & {"loss", "sft/loss"}]
            self.scores = {row["step"]: scores for row in read if (scores := _scores(row))}
            self._file = Lines(self._path, "".join(rows))
            self._spool = Spool(workdir, trackers.KEPT)
            self._trackers = trackers.open_trackers(self._spool.folder, config, resume_step)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends a row to `metrics.jsonl` and hands it to the trackers.

        Args:
            metrics: Python, numpy or jax scalars by name. A value that is not finite is written as null, with a
                warning where it is the first one of its name, unless it is `nullable`.

        Raises:
            RunError: the row cannot be written.
        """
        if self._file is None:
            return
        row = {"step": int(step)} | {name: number(value) for name, value in metrics.items()}
        new = [name for name, value in row.items() if value is None and name not in self._without_value]
        if new:
            self._without_value.update(new)
            logging.warning(
                "step %d: no finite value of %s, written as null; later steps will not mention it", step, ", ".join(new)
            )
        with writing(self._path):
            self._file.add(json.dumps(row, allow_nan=False))
            for tracker in self._trackers:
                tracker.write(self.rows, row)
        self.rows += 1

    def samples(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[np.ndarray],
        draft_advantages: Sequence[np.ndarray] = (),
    ) -> None:
        """Writes `samples/step_000123.jsonl`, with one row per draft and completion.

        Trackers get the first group that has completions.

        Args:
            advantages: advantages of the completions of each group, [G] float32.
            draft_advantages: those of the drafts of each group, [N] float32, if drafts are trained on.

        Raises:
            RunError: the file cannot be written.
        """
        if self._file is None:
            return
        path = self._samples / f"step_{step:06d}.jsonl"
        write_rows(path, (row for row, _, _ in _sample_rows(groups, advantages, draft_advantages)))
        with writing(path):
            first = next((i for i, group in enumerate(groups) if group.completions), None)
            if first is None:
                return
            for tracker in self._trackers:
                tracker.sample(step, lines.sample_blocks(groups[first], float(advantages[first][0])))

    def nonfinite(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[np.ndarray],
        draft_advantages: Sequence[np.ndarray] = (),
    ) -> Path:
        """Writes the batch of a step whose update was skipped to `nonfinite/step_000123.jsonl`, and returns that file.

        The rows are those of `samples`, each with the tokens of its context, its own tokens and the sampler's log-probs
        (null where they are not finite).

        Args:
            advantages: advantages of the completions of each group, [G] float32.
            draft_advantages: those of the drafts of each group, [N] float32, if drafts are trained on.

        Raises:
            RunError: the file cannot be written.
        """
        file = self._workdir / "nonfinite" / f"step_{step:06d}.jsonl"
        if self._file is None:
            return file
        rows = []
        for row, group, completion in _sample_rows(groups, advantages, draft_advantages):
            context = group.prompt.tokens if completion.stage == "draft" else group.context
            row |= {"context": context.tolist(), "tokens": completion.tokens.tolist()}
            rows.append(row | {"logprobs": [number(value) for value in completion.logprobs]})
        with writing(file.parent):
            make_folder(file.parent)
        write_rows(file, rows)
        return file

    def sync(self) -> None:
        """Returns when the rows so far are on disk or in the bucket, so that a checkpoint that counts on them may
        follow; what trackers and the profiler have written is uploaded too."""
        if self._file is not None:
            with writing(self._path):
                self._file.sync()
                self._spool.push()

    def close(self) -> None:
        """Closes the file and the trackers, each of them even if closing another fails. It may be called twice."""
        if self._file is not None:
            closing: list[Lines | trackers.Tracker] = [self._file, *self._trackers]
            self._file = None
            self._trackers = []
            with writing(self._path), contextlib.ExitStack() as stack:
                stack.callback(self._spool.push)  # is called last
                for output in closing:
                    stack.callback(output.close)


def _sample_rows(
    groups: Sequence[Group], advantages: Sequence[np.ndarray], draft_advantages: Sequence[np.ndarray]
) -> Iterator[tuple[dict, Group, Completion]]:
    """Yields a row for each draft and each completion, with its group and the completion itself."""
    drafted = draft_advantages or [np.full(len(group.drafts), np.nan) for group in groups]
    for group, group_advantages, of_drafts in zip(groups, advantages, drafted, strict=True):
        for draft, advantage in zip(group.drafts, of_drafts, strict=True):
            yield _sample_row(group, draft, None, number(advantage)), group, draft
        parent = None if group.kept is None else group.drafts[group.kept].sample_id
        for completion, advantage in zip(group.completions, group_advantages, strict=True):
            yield _sample_row(group, completion, parent, number(advantage)), group, completion


def _sample_row(group: Group, completion: Completion, parent: int | None, advantage: float | None) -> dict[str, Any]:
    """Returns the row of a draft or completion; `parent` is the sample_id of the draft in its context."""
    score = completion.score
    return {
        "prompt_id": group.prompt.id,
        "stage": completion.stage,
        "sample_id": completion.sample_id,
        "parent_draft_id": parent,
        "prompt": group.prompt.question,
        "text": completion.text,
        "token_count": len(completion.tokens),
        "finished": bool(completion.finished),
        "rewards": None if score is None else {name: number(value) for name, value in score.rewards.items()},
        "reward": None if score is None else number(score.reward),
        "status": None if score is None else score.status,
        "extracted": None if score is None else score.extracted,
        "answer": group.reference_answer(completion),
        "advantage": advantage,
        **({"extra": score.extra} if score and score.extra else {}),  # only where a custom reward gave something
    }


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of an evaluation that a row holds."""
    return {name: value for name, value in row.items() if name.startswith("eval/") and value is not None}


def rows_until(path: Path, last_step: float) -> list[str]:
    """Returns the lines of a metrics file with step <= last_step; a line that is not a complete row is dropped."""
    try:
        text = read_bytes(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    kept = []
    torn = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            step = json.loads(line)["step"]
            if step <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            torn += 1
    if torn:
        logging.warning("%s: dropped %d unreadable line(s), as a killed run leaves them", path, torn)
    return kept
