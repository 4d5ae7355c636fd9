"""The files that a run writes step by step: `metrics.jsonl`, `samples/*.jsonl` and `nonfinite/*.jsonl`.

`Writer` owns these files, hands each row of metrics to the trackers, and decides what a resume drops.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging

from igrpo_jax.config import Config
from igrpo_jax.outputs import trackers
from igrpo_jax.outputs.files import number, write_atomically, write_rows, writing
from igrpo_jax.records import Completion, Group


class Writer:
    """Writes `metrics.jsonl`, `samples/` and what trackers keep under `workdir`; only process 0 does, others are idle.

    `resume_step` is the step of the checkpoint that was restored, None where the run starts from nothing. Rows and
    sample files of later steps are dropped, since the resumed run writes them again; a last line torn by a kill is
    dropped as well. With None, whatever an earlier start left is dropped.

    Attributes:
        rows: rows now in `metrics.jsonl`, what a checkpoint stores as the metrics cursor.
        history: the rows of RL steps that a resumed run found there.
    """

    def __init__(self, workdir: Path, config: Config, resume_step: int | None = None):
        self.rows, self.history = 0, []
        self._file: TextIO | None = None
        self._trackers: list[trackers.Tracker] = []
        if jax.process_index() != 0:
            return
        workdir = Path(workdir)
        keep = -math.inf if resume_step is None else resume_step
        self._path, self._samples = workdir / "metrics.jsonl", workdir / "samples"
        self._samples.mkdir(parents=True, exist_ok=True)
        for path in self._samples.iterdir():
            match = re.fullmatch(r"step_(\d+)\.jsonl(\.tmp)?", path.name)
            if match and (match[2] or int(match[1]) > keep):
                path.unlink()
        rows = _rows_until(self._path, keep)
        self.rows = len(rows)
        self.history = [row for row in map(json.loads, rows) if "loss" in row]
        write_atomically(self._path, "".join(rows))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        with writing(workdir):
            self._trackers = trackers.open_trackers(workdir, config, resume_step)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row; values are Python, numpy or jax scalars. A non-finite one is written as null and logged."""
        if self._file is None:
            return
        row = {"step": int(step)} | {name: number(value) for name, value in metrics.items()}
        bad = [name for name, value in row.items() if value is None]
        if bad:
            logging.warning("step %d: %s not finite, written as null", step, ", ".join(bad))
        with writing(self._path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            for tracker in self._trackers:
                tracker.write(self.rows, row)
        self.rows += 1

    def samples(self, step: int, groups: Sequence[Group], advantages: np.ndarray) -> None:
        """Writes `samples/step_000123.jsonl`, one row per draft and completion; `advantages` is [P, G] float32."""
        if self._file is None:
            return
        write_rows(self._samples / f"step_{step:06d}.jsonl", (row for row, _, _ in _sample_rows(groups, advantages)))

    def nonfinite(self, step: int, groups: Sequence[Group], advantages: np.ndarray) -> None:
        """Writes the batch of a step that was skipped to `nonfinite/step_000123.jsonl`: rows as of `samples`, with the
        tokens of context and completion and the sampler's log-probs (null where not finite)."""
        if self._file is None:
            return
        rows = []
        for row, group, completion in _sample_rows(groups, advantages):
            context = group.prompt.tokens if completion.stage == "draft" else group.context
            row |= {"context": context.tolist(), "tokens": completion.tokens.tolist()}
            rows.append(row | {"logprobs": [number(value) for value in completion.logprobs]})
        folder = self._samples.with_name("nonfinite")
        with writing(folder):
            folder.mkdir(exist_ok=True)
        write_rows(folder / f"step_{step:06d}.jsonl", rows)

    def sync(self) -> None:
        """Returns when the rows so far are on disk: a checkpoint that counts on them may follow."""
        if self._file is not None:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes all, also where one of them cannot be; may be called twice."""
        if self._file is not None:
            closing = [self._file, *self._trackers]
            self._file, self._trackers = None, []
            with writing(self._path), contextlib.ExitStack() as stack:
                for one in closing:
                    stack.callback(one.close)


def _sample_rows(groups: Sequence[Group], advantages: np.ndarray) -> Iterator[tuple[dict, Group, Completion]]:
    """Rows of drafts and completions, each with what it is of."""
    for group, group_advantages in zip(groups, np.asarray(advantages), strict=True):
        for draft in group.drafts:
            yield _sample_row(group, draft, None, None), group, draft
        parent = None if group.best is None else group.drafts[group.best].sample_id
        for completion, advantage in zip(group.completions, group_advantages, strict=True):
            yield _sample_row(group, completion, parent, number(advantage)), group, completion


def _sample_row(group: Group, completion: Completion, parent: int | None, advantage: float | None) -> dict[str, Any]:
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
        "answer": group.prompt.answer,
        "advantage": advantage,
    }


def _rows_until(path: Path, last_step: float) -> list[str]:
    """Whole lines of a metrics file with step <= last_step; anything that is not a whole row is dropped."""
    if not path.exists():
        return []
    kept, torn = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
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
