"""Writes the samples of a run as data files that the sample page loads one at a time, and counts them on the way.

    data/index.js          the parts of every run and step, and for every prompt the FLAGS that its samples have
    data/RUN/STEP_PART.js  some prompts of a step with their drafts and refinements, about PART_BYTES of text

A page that is opened as a file may not fetch data but may load scripts. So each file is one function call with JSON as
its argument; JSON in ASCII is JavaScript. The page inserts all of it as text.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_jax.data.drafts import is_right
from igrpo_jax.outputs.metrics import copy_ratio
from igrpo_jax.report.runs import RecordedRun, counted, number, whole_rows

Row = dict[str, Any]

PART_BYTES = 1 << 20  # about the bytes of text in a data file; the page reads all of it to show one prompt
COPIED = 0.9  # a refinement counts as a copy where it has this fraction of its characters in common with its draft
# The kinds by which samples can be filtered. The flags of a sample are the sum of 1 << (index of its kind); a prompt
# has every flag that one of its samples has.
FLAGS = ("fixed", "broken", "copied", "truncated", "unparseable")


@dataclass
class Counts:
    """Counts of the prompts of one step."""

    prompts: int = 0  # all
    equal: Counter[str] = field(default_factory=Counter)  # those with equal rewards, by "right", "wrong", "mixed"
    flagged: Counter[str] = field(default_factory=Counter)  # those that have a sample with a flag, by flag


@dataclass(frozen=True)
class Written:
    """What was written and counted of the samples of a run."""

    index: list[Row]  # one entry per step, for data/index.js
    counts: dict[int, Counts]  # by step
    notes: list[str]  # sentences on what could not be read


def write(run: RecordedRun, folder: Path) -> Written:
    """Makes `folder` and writes the data files of a run into it."""
    folder.mkdir(parents=True)
    index: list[Row] = []
    counts_by_step: dict[int, Counts] = {}
    notes: list[str] = []
    verifies = run.setting("algorithm.second_stage") == "verify"
    trains_drafts = bool(run.setting("algorithm.train_drafts"))
    for step, path in run.samples.items():
        try:
            rows = list(whole_rows(path))
        except OSError as error:  # a resumed run may remove it at any moment
            notes.append(f"samples of step {step} cannot be read ({error.strerror})")
            continue
        readable = [row for row in rows if row is not None and _is_sample(row)]
        if not rows:
            notes.append(f"samples of step {step}: the file is empty")
        if len(readable) < len(rows):
            lost = counted(len(rows) - len(readable), "line")
            notes.append(f"samples of step {step}: {lost} left out that are not whole rows; the step may lack samples")
        counts, prompts = Counts(), [_prompt(rows) for rows in groups(readable)]
        flags = [
            _count(prompt, counts, verifies or (trains_drafts and not prompt["completions"])) for prompt in prompts
        ]
        parts = _parts([json.dumps(prompt) for prompt in prompts])
        for part_number, part in enumerate(parts):
            name = f"{step:06d}_{part_number}"
            call = f'samplesLoaded("{folder.name}/{name}",[{",".join(part)}])\n'
            (folder / f"{name}.js").write_text(call, encoding="ascii")
        index.append({"step": step, "parts": [len(part) for part in parts], "flags": flags})
        counts_by_step[step] = counts
    return Written(index, counts_by_step, notes)


def write_index(path: Path, runs: dict[str, list[Row]]) -> None:
    """Writes data/index.js.

    Args:
        runs: the `Written.index` of every run by its name; the data of run n (from 0) is in data/n.
    """
    listed = [{"name": name, "steps": steps} for name, steps in runs.items()]
    text = json.dumps({"flags": FLAGS, "copied": COPIED, "runs": listed}, separators=(",", ":"))
    path.write_text(f"samplesIndex({text})\n", encoding="ascii")


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Splits the rows of a step into one list per prompt.

    Drafts of a prompt stand before its completions, and both are in the order of sample_id.
    """
    prompts: list[list[Row]] = []
    for row in rows:
        last = prompts[-1][-1] if prompts else None
        goes_on = last is not None and last["prompt_id"] == row["prompt_id"]
        if goes_on and last["stage"] == row["stage"]:
            goes_on = last["sample_id"] < row["sample_id"]
        elif goes_on:
            goes_on = row["stage"] != "draft"
        if goes_on:
            prompts[-1].append(row)
        else:
            prompts.append([row])
    return prompts


def _is_sample(row: Row) -> bool:
    """Returns whether a row has the fields without which it cannot be shown."""
    names = all(isinstance(row.get(name), str) for name in ("prompt_id", "stage", "prompt", "text"))
    return names and type(row.get("sample_id")) is int


def _prompt(rows: list[Row]) -> Row:
    """Returns a group as the page reads it: the question once, then its drafts and completions."""
    first = rows[0]
    for row in rows:
        rewards = row.get("rewards")
        row["rewards"] = {name: number(value) for name, value in rewards.items()} if isinstance(rewards, dict) else {}
    drafts = [row for row in rows if row["stage"] == "draft"]
    completions = [row for row in rows if row["stage"] != "draft"]
    kept = completions[0].get("parent_draft_id") if completions else None
    shown = next((row for row in drafts if row["sample_id"] == kept), None)
    is_verified = any(row["stage"] == "verify" for row in completions)
    return {
        "id": first["prompt_id"],
        "question": first["prompt"],
        "answer": _text(first.get("answer")),
        "kept": kept if shown is not None else None,
        "verified": is_verified,
        "drafts": [_sample(row, None) for row in drafts],
        "completions": [_sample(row, None if is_verified else shown) for row in completions],
    }


def _sample(row: Row, shown: Row | None) -> Row:
    """Returns a sample as the page reads it; `shown` is the draft in its prompt, None for a verification.

    Rewards are pairs and not an object, because users choose their names.
    """
    return {
        "sample": row["sample_id"],
        "text": row["text"],
        "tokens": number(row.get("token_count")),
        "rewards": sorted(row["rewards"].items()),
        "reward": number(row.get("reward")),
        "right": is_right(row),
        "status": _text(row.get("status")),  # samples of old runs lack it
        "extracted": _text(row.get("extracted")),
        "advantage": number(row.get("advantage")),
        "flags": sum(1 << FLAGS.index(name) for name in _flags(row, shown)),
    }


def _flags(row: Row, shown: Row | None) -> Iterable[str]:
    """Yields the names of the sample's flags; `shown` is the draft in its prompt."""
    if shown is not None:
        before, after = is_right(shown), is_right(row)
        if before is not None and after is not None and before != after:
            yield "fixed" if after else "broken"
        if _copied(shown["text"], row["text"]) >= COPIED:
            yield "copied"
    if row.get("finished") is False:
        yield "truncated"
    # Samples of old runs have no status; there a missing answer is the only sign.
    if row.get("status") == "unparseable" or ("status" not in row and row.get("extracted") is None):
        yield "unparseable"


def _copied(draft: str, refinement: str) -> float:
    """Returns `metrics.copy_ratio` over characters, because samples hold no tokens."""
    characters = [text.encode("utf-32-le", "surrogatepass") for text in (draft, refinement)]
    return copy_ratio(*(np.frombuffer(part, "<u4") for part in characters))


def _count(prompt: Row, counts: Counts, by_drafts: bool) -> int:
    """Adds a prompt to `counts`, and returns its flags.

    Args:
        by_drafts: its group is that of its drafts, as with algorithm.second_stage = "verify", or where drafts are
            trained and the prompt was not refined.
    """
    flags = 0
    for sample in (*prompt["drafts"], *prompt["completions"]):
        flags |= sample["flags"]
    counts.prompts += 1
    counts.flagged.update(name for bit, name in enumerate(FLAGS) if flags >> bit & 1)
    trained = [sample for sample in prompt["completions"] if sample["advantage"] is not None]
    is_equal = bool(trained) and not any(sample["advantage"] for sample in trained)
    if by_drafts:  # old runs have no advantages of drafts
        trained = [sample for sample in prompt["drafts"] if sample["reward"] is not None]
        is_equal = len({sample["reward"] for sample in trained}) < 2
    if is_equal:
        kinds = {sample["right"] for sample in trained} - {None}
        counts.equal["right" if kinds == {True} else "wrong" if kinds == {False} else "mixed"] += 1
    return flags


def _parts(texts: list[str]) -> list[list[str]]:
    """Splits the texts of prompts, in order, into parts of at least PART_BYTES; the last part may be smaller."""
    parts: list[list[str]] = []
    size = PART_BYTES
    for text in texts:
        if size >= PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(text)
        size += len(text)
    return parts


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
