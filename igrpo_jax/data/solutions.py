"""Worked solutions to imitate, from the same rows as the problems: texts that SFT trains the model on.

The text is config.sft.completion with the row's solution and final answer filled in. A solution is a text, or the reply
with which a chat ends: that of the question itself, where the question is such a chat. Rows without a solution are left
out and counted, and `data.clean` leaves out of the others what it leaves out of a run. Blank drafts are left out. Not
here: tokens, prompts and batches.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.data import columns, drafts, problems
from igrpo_jax.data.drafts import Draft
from igrpo_jax.data.problems import Row
from igrpo_jax.errors import InputError, one_line
from igrpo_jax.rewards.format import opens_thinking
from igrpo_jax.rewards.mathematics import golds
from igrpo_jax.schema.fields import refusal

SOLUTIONS = ("solution", "generation", "response", "completion", "output", "answer")


@dataclass(frozen=True)
class Solution:
    """A problem with the text that is imitated, and drafts that its prompt may show."""

    row: Row
    text: str
    drafts: tuple[Draft, ...]  # may be empty


def load_solutions(config: Config, opening: str = "") -> tuple[list[Solution], list[tuple[str, str]]]:
    """Returns the solutions of config.data.train, and notes about them for the table that a run prints.

    Args:
        opening: what the chat template writes for the assistant; a "<think>" in it is not imitated once more.

    Raises:
        InputError: as `problems.load_rows`; no column of solutions, or none of drafts where they are asked for; no row
            has a solution; `data.clean` leaves none; a text has tags of a reasoning that the template has closed, or
            has them twice.
    """
    source = f"config.data.train = {config.data.train!r}"
    rows, mapping, told = problems.load_rows(config.data)
    name = _solution_column(rows, config.sft.solution_column, mapping.prompt, source)
    drafts_of = _drafts(config, rows, source)
    found = []
    for row in rows:
        value = columns.cell(row.columns, name)
        text = row.reply if name == mapping.prompt else columns.reply(value) or value
        if isinstance(text, str) and text.strip():
            found.append(Solution(row, _imitated(config, row, text, opening), drafts_of(row)))
    if not found:
        raise InputError(f"{source}: none of its {len(rows)} rows has a text in {name!r}; name another column")
    notes = [("columns", f"{mapping}, solution from {name!r}"), *told]
    if len(found) < len(rows):
        notes.append(("problems without a solution", f"{len(rows) - len(found):,} of {len(rows):,}, left out"))
    # A solution is not a reward, so answers that no completion can match are not errors otherwise.
    if config.data.clean:
        kept, cleaned = problems.cleaned(config, [each.row for each in found], problems.evaluation_rows(config))
        indices = {row.index for row in kept}
        found, notes = [each for each in found if each.row.index in indices], notes + cleaned
    return found, notes + (_draft_notes(config, found) if config.sft.draft_fraction else [])


def _drafts(config: Config, rows: Sequence[Row], source: str) -> Callable[[Row], tuple[Draft, ...]]:
    """Returns a function that gives the drafts of a row.

    Raises:
        InputError: there is no such column, or there are no such answers.
    """
    if not config.sft.draft_fraction:
        return lambda row: ()
    if config.sft.drafts_from:
        answers = drafts.answers_of(config.sft.drafts_from, _drafts_source(config))
        return lambda row: answers.get(row.question.strip(), ())
    name = _column(rows, config.sft.draft_column, (), f"{source}: has no column of drafts", "draft")
    return lambda row: tuple(Draft(text, None) for text in _texts(columns.cell(row.columns, name)))


def _drafts_source(config: Config) -> str:
    field = "drafts_from" if config.sft.drafts_from else "draft_column"
    return f"config.sft.{field} = {getattr(config.sft, field)!r}"


def _draft_notes(config: Config, found: Sequence[Solution]) -> list[tuple[str, str]]:
    """Returns notes about the drafts.

    Raises:
        InputError: there is none.
    """
    every = [draft for solution in found for draft in solution.drafts]
    if not every:
        raise InputError(f"{_drafts_source(config)}: has no draft for any of the {len(found)} problems; give others")
    known = [draft.is_right for draft in every if draft.is_right is not None]
    right = f", {np.mean(known):.0%} of {len(known):,} right" if known else ""
    notes = [("drafts", f"{len(every):,} from {config.sft.drafts_from or config.sft.draft_column!r}{right}")]
    if without := sum(not solution.drafts for solution in found):
        notes.append(("problems without a draft", f"{without:,}, never shown with one"))
    return notes


def _imitated(config: Config, row: Row, solution: str, opening: str) -> str:
    """Returns config.sft.completion filled in for a row. A solution's own {answer} or the like stays as it is."""
    has_tags = lambda text: "<think>" in text or "</think>" in text
    if has_tags(solution) and has_tags(config.sft.completion):
        fix = f"the solutions have tags of reasoning themselves (row {row.id}); set it to {{solution}}"
        raise refusal("sft.completion", config.sft.completion, fix)
    values = {"solution": solution.strip(), "answer": golds.alternatives(row.answer)[0]}
    text = re.sub(r"\{(solution|answer)\}", lambda match: values[match[1]], config.sft.completion)
    if opens_thinking(opening):
        return text.removeprefix("<think>").lstrip("\n")
    if opening and has_tags(text):
        fix = (
            f"the chat template closes the reasoning before a reply ({one_line(opening)}), but what is to be imitated "
            f"has tags of reasoning (row {row.id}); leave them out, or let data.template_kwargs turn reasoning on"
        )
        raise refusal("sft.completion", config.sft.completion, fix)
    return text


def _texts(value: Any) -> tuple[str, ...]:
    """Returns the texts of a cell, which holds one or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text for text in values if isinstance(text, str) and text.strip())


def _solution_column(rows: Sequence[Row], wanted: str, prompt: str, source: str) -> str:
    """Returns the column of the solutions: that of the questions (`prompt`) where these are chats with replies.

    Raises:
        InputError: there is none, or not the wanted one.
    """
    if wanted in ("", prompt) and any(row.reply.strip() for row in rows):
        return prompt
    return _column(rows, wanted, SOLUTIONS, f"{source}: has no column of solutions", "solution")


def _column(rows: Sequence[Row], wanted: str, known: tuple[str, ...], problem: str, kind: str) -> str:
    """Returns the wanted column, or the first of the known ones, that any row has."""
    names = [wanted] if wanted else list(known)
    for name in names:
        if any(columns.cell(row.columns, name) is not None for row in rows):
            return name
    there = ", ".join(dict.fromkeys(name for row in rows for name in row.columns))
    asked = f" {wanted!r}" if wanted else ""
    raise InputError(f"{problem}{asked}; its other columns are {there or 'none'} (config.sft.{kind}_column names one)")
