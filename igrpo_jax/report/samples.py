"""The samples of a run as data files that the sample page loads one at a time, and what is counted on the way.

    data/index.js          of every run and step: its parts, and for every prompt which FLAGS its samples have
    data/RUN/STEP_PART.js  some prompts of a step with their drafts and refinements, about PART_BYTES of text

A page opened as a file may not fetch, but may load scripts, so each file is one call with JSON as its argument; JSON in
ASCII is JavaScript. Everything that stands in it is data to the page, which inserts it as text.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_jax.outputs.metrics import copy_ratio
from igrpo_jax.report.runs import Run, counted, number, whole_rows

Row = dict[str, Any]

PART_BYTES = 1 << 20  # of text in a data file, about: a part is read whole to show one prompt of it
COPIED = 0.9  # share of its characters from which a refinement counts as a copy of the draft
# What a sample can be filtered by; a sample's flags are a sum of 1 << place, a prompt's those of any of its samples.
FLAGS = ("fixed", "broken", "copied", "truncated", "unparseable")


@dataclass
class Counts:
    """Prompts of one step."""

    prompts: int = 0
    equal: Counter[str] = field(default_factory=Counter)  # whose completions all earned the same: right, wrong, mixed
    flagged: Counter[str] = field(default_factory=Counter)  # that have a sample with this flag


@dataclass(frozen=True)
class Written:
    """What was found in the samples of a run."""

    index: list[Row]  # of every step, for data/index.js
    counts: dict[int, Counts]  # by step
    notes: list[str]  # what could not be read


def write(run: Run, folder: Path) -> Written:
    """Writes the data files of a run into `folder`, which is made."""
    folder.mkdir(parents=True)
    index, every, notes = [], {}, []
    for step, path in run.samples.items():
        try:
            rows = list(whole_rows(path))
        except OSError as error:  # a resumed run may take it away under our hands
            notes.append(f"samples of step {step} cannot be read ({error.strerror})")
            continue
        readable = [row for row in rows if row is not None and _is_sample(row)]
        if not rows:
            notes.append(f"samples of step {step}: the file is empty")
        if len(readable) < len(rows):
            lost = counted(len(rows) - len(readable), "line")
            notes.append(f"samples of step {step}: {lost} left out that are no whole row; the step may lack samples")
        counts, prompts = Counts(), [_prompt(rows) for rows in groups(readable)]
        flags = [_count(prompt, counts) for prompt in prompts]
        parts = _parts([json.dumps(prompt) for prompt in prompts])
        for place, part in enumerate(parts):
            name = f"{step:06d}_{place}"
            call = f'samplesLoaded("{folder.name}/{name}",[{",".join(part)}])\n'
            (folder / f"{name}.js").write_text(call, encoding="ascii")
        index.append({"step": step, "parts": [len(part) for part in parts], "flags": flags})
        every[step] = counts
    return Written(index, every, notes)


def write_index(path: Path, runs: dict[str, list[Row]]) -> None:
    """Writes data/index.js of the runs by name; the folder of the n-th is data/n."""
    listed = [{"name": name, "steps": steps} for name, steps in runs.items()]
    text = json.dumps({"flags": FLAGS, "copied": COPIED, "runs": listed}, separators=(",", ":"))
    path.write_text(f"samplesIndex({text})\n", encoding="ascii")


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of a step by prompt; a prompt's drafts stand before its completions, each in order of sample_id."""
    found: list[list[Row]] = []
    for row in rows:
        last = found[-1][-1] if found else None
        goes_on = last is not None and last["prompt_id"] == row["prompt_id"]
        if goes_on and last["stage"] == row["stage"]:
            goes_on = last["sample_id"] < row["sample_id"]
        elif goes_on:
            goes_on = row["stage"] != "draft"
        if goes_on:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def is_right(row: Row) -> bool | None:
    """Whether a sample's answer is right; None where there is no accuracy reward."""
    accuracy = row["rewards"].get("accuracy")
    return None if accuracy is None else accuracy >= 1


def _is_sample(row: Row) -> bool:
    names = all(isinstance(row.get(name), str) for name in ("prompt_id", "stage", "prompt", "text"))
    return names and type(row.get("sample_id")) is int


def _prompt(rows: list[Row]) -> Row:
    """A group as the page reads it: the question once, then its drafts and completions."""
    first = rows[0]
    for row in rows:
        rewards = row.get("rewards")
        row["rewards"] = {name: number(value) for name, value in rewards.items()} if isinstance(rewards, dict) else {}
    drafts = [row for row in rows if row["stage"] == "draft"]
    completions = [row for row in rows if row["stage"] != "draft"]
    kept = completions[0].get("parent_draft_id") if completions else None
    shown = next((row for row in drafts if row["sample_id"] == kept), None)
    return {
        "id": first["prompt_id"],
        "question": first["prompt"],
        "answer": _text(first.get("answer")),
        "kept": kept if shown is not None else None,
        "drafts": [_sample(row, None) for row in drafts],
        "completions": [_sample(row, shown) for row in completions],
    }


def _sample(row: Row, shown: Row | None) -> Row:
    """What the page shows of a sample; `shown` is the draft in its prompt. Rewards are pairs: names are not ours."""
    return {
        "sample": row["sample_id"],
        "text": row["text"],
        "tokens": number(row.get("token_count")),
        "rewards": sorted(row["rewards"].items()),
        "reward": number(row.get("reward")),
        "right": is_right(row),
        "status": _text(row.get("status")),  # not in the samples of runs before it was written
        "extracted": _text(row.get("extracted")),
        "advantage": number(row.get("advantage")),
        "flags": sum(1 << FLAGS.index(name) for name in _flags(row, shown)),
    }


def _flags(row: Row, shown: Row | None) -> Iterable[str]:
    if shown is not None:
        before, after = is_right(shown), is_right(row)
        if before is not None and after is not None and before != after:
            yield "fixed" if after else "broken"
        if _copied(shown["text"], row["text"]) >= COPIED:
            yield "copied"
    if row.get("finished") is False:
        yield "truncated"
    # An older run has no status; there only the missing answer tells.
    if row.get("status") == "unparseable" or ("status" not in row and row.get("extracted") is None):
        yield "unparseable"


def _copied(draft: str, refinement: str) -> float:
    """`metrics.copy_ratio` over characters, since samples hold no tokens."""
    characters = [text.encode("utf-32-le", "surrogatepass") for text in (draft, refinement)]
    return copy_ratio(*(np.frombuffer(part, "<u4") for part in characters))


def _count(prompt: Row, counts: Counts) -> int:
    """Counts a prompt, and returns its flags."""
    flags = 0
    for sample in (*prompt["drafts"], *prompt["completions"]):
        flags |= sample["flags"]
    counts.prompts += 1
    counts.flagged.update(name for place, name in enumerate(FLAGS) if flags >> place & 1)
    trained = [sample for sample in prompt["completions"] if sample["advantage"] is not None]
    if trained and not any(sample["advantage"] for sample in trained):
        kinds = {sample["right"] for sample in trained}
        counts.equal["right" if kinds == {True} else "wrong" if kinds == {False} else "mixed"] += 1
    return flags


def _parts(texts: list[str]) -> list[list[str]]:
    """Prompts in order, so many to a part that it reaches PART_BYTES."""
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
