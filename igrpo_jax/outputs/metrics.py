"""What a run leaves in files: the numbers of a rollout, `metrics.jsonl` (and trackers), and `samples/*.jsonl`.

`rollout_metrics` is pure numpy over finished groups. `Writer` owns the files and what a resume does to them.
Loss, entropy, timings and the verifier's health come from those who know them; nothing here computes them.
"""

import collections
import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging

from igrpo_jax.config import Config
from igrpo_jax.errors import RunError
from igrpo_jax.outputs import trackers
from igrpo_jax.records import Completion, Group


def rollout_metrics(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """Metrics of one rollout, from its scored groups. Keys of a stage that did not run are absent, not zero.

    Trained completions, under TRL's names: `reward`, `reward_std` (mean over groups of the std with ddof = 1),
    `frac_reward_zero_std`, `rewards/<name>/mean`, `completions/mean_length|min_length|max_length` (tokens, EOS
    included), `completions/clipped_ratio` (share cut at the length limit).

    Drafts, over groups that have some: `draft/reward` and `draft/accuracy` (means), `draft/best_reward` (mean over
    groups of the best), `draft/kept_reward` (mean of the one that q' shows, which algorithm.draft_selection may choose
    otherwise), `draft/solved_none|some|all` (shares of groups by how many of the drafts drawn are right),
    `draft/mean_length`.

    Refinements, over groups whose context holds a draft: `refine/fixed|broken|kept_right|kept_wrong` (accuracy of the
    kept draft against that of each refinement), `refine/gain_vs_best_draft` (reward), `refine/copy_ratio` (see
    `copy_ratio`), `refine/same_answer` (share that state the kept draft's answer, in the same characters, by whatever
    reasoning), `refine/draft_truncated` (share of kept drafts cut to `refine.max_draft_length`).

    "Right" is accuracy = 1. Without an accuracy reward the keys that need one are absent. Completions without a verdict
    (reward NaN) are left out of means; a mean over none is NaN, which is written as null.
    """
    completions = [completion for group in groups for completion in group.completions]
    if not completions:
        return {}
    group_rewards = [
        np.array([completion.score.reward for completion in group.completions], np.float64) for group in groups
    ]
    known = [rewards[~np.isnan(rewards)] for rewards in group_rewards]
    lengths = np.array([len(completion.tokens) for completion in completions])
    metrics = {
        "reward": _mean(np.concatenate(group_rewards)),
        "reward_std": _mean([rewards.std(ddof=1) if len(rewards) > 1 else 0.0 for rewards in known]),
        "frac_reward_zero_std": np.mean([len(rewards) < 2 or np.ptp(rewards) == 0 for rewards in known]),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": np.mean([not completion.finished for completion in completions]),
    }
    for name in sorted({name for completion in completions for name in completion.score.rewards}):
        metrics[f"rewards/{name}/mean"] = _mean(
            [completion.score.rewards.get(name, np.nan) for completion in completions]
        )
    with_accuracy = "rewards/accuracy/mean" in metrics
    metrics |= _draft_metrics([group.drafts for group in groups if group.drafts], with_accuracy)
    refined = [group for group in groups if group.best is not None]
    metrics |= _refine_metrics(refined, with_accuracy, config.draft_limit)
    return {name: float(value) for name, value in metrics.items()}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _best(rewards: Sequence[float]) -> float:
    return max((reward for reward in rewards if not math.isnan(reward)), default=math.nan)


def _draft_metrics(drafts: list[tuple[Completion, ...]], with_accuracy: bool) -> dict[str, float]:
    if not drafts:
        return {}
    every = [draft for group in drafts for draft in group]
    metrics = {
        "draft/reward": _mean([draft.score.reward for draft in every]),
        "draft/best_reward": _mean([_best([draft.score.reward for draft in group]) for group in drafts]),
        "draft/mean_length": np.mean([len(draft.tokens) for draft in every]),
    }
    if with_accuracy:
        metrics["draft/accuracy"] = np.mean([draft.score.rewards.get("accuracy", 0.0) for draft in every])
        solved = [np.mean([_right(draft) for draft in group]) for group in drafts]
        metrics["draft/solved_none"] = np.mean([share == 0 for share in solved])
        metrics["draft/solved_some"] = np.mean([0 < share < 1 for share in solved])
        metrics["draft/solved_all"] = np.mean([share == 1 for share in solved])
    return metrics


def _refine_metrics(groups: list[Group], with_accuracy: bool, max_draft_length: int) -> dict[str, float]:
    if not groups:
        return {}
    kept = [group.drafts[group.best] for group in groups]
    pairs = [(draft, completion) for draft, group in zip(kept, groups, strict=True) for completion in group.completions]
    best = [_best([draft.score.reward for draft in group.drafts]) for group in groups]
    gains = [
        completion.score.reward - reward
        for reward, group in zip(best, groups, strict=True)
        for completion in group.completions
    ]
    metrics = {
        "draft/kept_reward": _mean([draft.score.reward for draft in kept]),
        "refine/gain_vs_best_draft": _mean(gains),
        "refine/copy_ratio": np.mean(
            [copy_ratio(_content(draft), _content(completion)) for draft, completion in pairs]
        ),
        "refine/draft_truncated": np.mean([len(_content(draft)) > max_draft_length for draft in kept]),
    }
    if with_accuracy:
        metrics["refine/same_answer"] = np.mean(
            [same_answer(d.score.extracted, completion.score.extracted) for d, completion in pairs]
        )
        moves = collections.Counter((_right(draft), _right(completion)) for draft, completion in pairs)
        metrics["refine/fixed"] = moves[False, True] / len(pairs)
        metrics["refine/broken"] = moves[True, False] / len(pairs)
        metrics["refine/kept_right"] = moves[True, True] / len(pairs)
        metrics["refine/kept_wrong"] = moves[False, False] / len(pairs)
    return metrics


def copy_ratio(draft: np.ndarray, refinement: np.ndarray) -> float:
    """Share of a refinement's tokens that it shares with the draft, counted from both ends.

    (common prefix + common suffix of what is left) / length of the refinement: 1 for an identical text, for a draft cut
    anywhere in one piece, 0 where the first and the last token differ. A lower bound of what a full alignment would
    find, at the cost of two vector comparisons. An empty refinement counts as a copy of an empty draft only.
    """
    if not len(refinement):
        return float(not len(draft))
    shorter = min(len(draft), len(refinement))
    prefix = _agreement(draft[:shorter], refinement[:shorter])
    left = shorter - prefix
    suffix = _agreement(draft[::-1][:left], refinement[::-1][:left])
    return (prefix + suffix) / len(refinement)


def same_answer(draft: str | None, refinement: str | None) -> bool:
    """Whether both texts state an answer, and the same one."""
    return draft is not None and draft == refinement


def _agreement(a: np.ndarray, b: np.ndarray) -> int:
    """Leading positions at which two arrays of one length agree."""
    different = np.asarray(a) != np.asarray(b)
    return int(different.argmax()) if different.any() else len(different)


def _content(completion: Completion) -> np.ndarray:
    return completion.tokens[:-1] if completion.finished else completion.tokens


def _right(completion: Completion) -> bool:
    return completion.score.rewards.get("accuracy", 0.0) >= 1.0


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


def number(value: Any) -> float | None:
    """A Python float, None where it is not finite."""
    value = float(np.asarray(value).astype(np.float64).reshape(()))
    return value if math.isfinite(value) else None


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


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines, whole or not at all."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk, or one that cannot be written any more, in one line.

    Raises:
        RunError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); make it possible and run the same command again"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Writes `path` so that a kill leaves either the old file or the whole new one.

    Raises:
        RunError: it cannot be written.
    """
    # A lone surrogate in model text becomes \udXXX, which is also how JSON spells it.
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
