"""Multiple-choice questions as problems: the choices stand below the question, and the answer is a letter.

Where a data set gives the right choice in a separate column, the choices are sorted by a hash of the question and the
choice. So their order depends on neither the order of the rows nor the seed, and every evaluation asks the same prompt.
In files of a user's own, a column that lists choices is found by its name. Where the right one is certain, the question
shows them too; else the file is refused, because nobody can be right about choices that are not shown.
Not here: which benchmarks have choices (`catalog`), and grading (`rewards/mathematics/grader`, as for all answers).
"""

import hashlib
import re
import string
from typing import Any, NamedTuple

from igrpo_jax.data import columns, readers
from igrpo_jax.data.catalog import Choices, Hub
from igrpo_jax.data.columns import Mapping
from igrpo_jax.data.readers import Table
from igrpo_jax.errors import InputError
from igrpo_jax.rewards.mathematics import golds

OPTIONS = ("choices", "options")  # names, in either case, of columns that list choices
LETTERS = string.ascii_uppercase
REQUEST = "The final answer is the letter of the right choice alone."
NO_CHOICE = "N/A"  # fills up shorter lists of choices in a version of MMLU-Pro
PROMPT, ANSWER = "question with choices", "letter"  # columns that `lettered` and `shown` add


def lettered(table: Table, hub: Hub, given: Choices, source: str) -> Table:
    """Returns the rows with the columns PROMPT and ANSWER added: question with lettered choices, and the right letter.

    Args:
        source: what errors begin with.

    Raises:
        InputError: a question, a choice or the right one is missing; it names the rows.
    """
    rows, broken = [], []
    for number, cells in table:
        asked = _ask(cells, hub, given)
        if asked is None:
            broken.append(number)
        else:
            rows.append((number, cells | {PROMPT: asked[0], ANSWER: asked[1]}))
    if broken:
        names = ", ".join(map(repr, (hub.prompt, hub.answer, *given.columns)))
        raise InputError(
            f"{source}: {len(broken)} of {len(table)} rows lack a question, its choices or the right one ({names}): "
            f"row {readers.few(broken)}; fill them in or take them out"
        )
    return rows


def _ask(cells: dict[str, Any], hub: Hub, given: Choices) -> tuple[str, str] | None:
    """Returns the question with its choices, and the letter of the right one; None where something is missing."""
    question, right = cells.get(hub.prompt), cells.get(hub.answer)
    options = cells.get(given.options) if given.options else [right, *(cells.get(name) for name in given.wrong)]
    texts = [question, right, *(options if isinstance(options, list | tuple) else [None])]
    if len(texts) == 2 or any(not isinstance(text, str) or not text.strip() for text in texts):
        return None
    choices = [text.strip() for text in options if text.strip() != NO_CHOICE]
    if given.options:
        letters = [right.strip()]
    else:
        choices.sort(key=lambda choice: hashlib.sha256(f"{question}\n{choice}".encode()).digest())
        letters = [letter for letter, choice in zip(LETTERS, choices, strict=False) if choice == right.strip()]
    if not letters or len(choices) > len(LETTERS) or letters[0] not in LETTERS[: len(choices)]:
        return None
    return _listed(question, choices), golds.any_of(letters)


def _listed(question: str, choices: list[str]) -> str:
    """Returns the question with its choices below it; choices that have their letters already keep them."""
    pairs = list(zip(LETTERS, choices, strict=False))
    has_letters = all(re.match(rf"\(?{letter}[).:]", choice) for letter, choice in pairs)
    lines = choices if has_letters else [f"{letter}) {choice}" for letter, choice in pairs]
    return "\n\n".join([question.strip(), "\n".join(lines), REQUEST])


class _Asked(NamedTuple):
    """A question of a user's own file with the choices in a column next to it."""

    question: str  # "" if there is none
    options: list[str]  # empty if the cell is not a list of choices
    letters: list[str]  # of the choices that may be the right one
    number: int | None  # the answer, where it is a number that is not a choice's text

    @property
    def is_shown(self) -> bool:
        """Whether the question holds the choices, and the answer does not count them."""
        return bool(self.options) and self.number is None and all(option in self.question for option in self.options)


def shown(table: Table, mapping: Mapping, source: str, setting: str) -> tuple[Table, Mapping]:
    """Returns the rows and the columns to read where a column of OPTIONS lists choices that the questions do not show.

    The columns PROMPT and ANSWER are added then, as by `lettered`. Other rows are returned as they are. The right
    choice is given by its letter, its text, or its number from 0; numbers of which none is 0 may count from 1. Of rows
    without answers any choice may be right, and only PROMPT is added.

    Args:
        source: what errors begin with.
        setting: the field that names the column of the questions.

    Raises:
        InputError: it is not certain which choice is right; the message names the column and the rows.
    """
    names = dict.fromkeys(name for _, cells in table for name in cells if cells[name])
    name = next((name for name in names if name.casefold() in OPTIONS), "")
    if not name or name in (mapping.prompt, mapping.answer):
        return table, mapping
    asked = [_asked(cells, mapping, name) for _, cells in table]
    if all(each.is_shown for each in asked):
        return table, mapping
    is_clear = lambda each: each.question and (len(each.letters) == 1 if mapping.answer else each.options)
    broken = [row for (row, _), each in zip(table, asked, strict=True) if not is_clear(each)]
    numbers = {each.number for each in asked} - {None}
    if broken or (numbers and 0 not in numbers):
        why = f"in {len(broken)} of {len(table)} rows: row {readers.few(broken)}"
        why = why if broken else "from numbers of which none is 0: they may count from 0 or from 1"
        unclear, fix = "it is not clear what they are", "write them as a list of texts"
        if mapping.answer:
            unclear = "it is not clear which of them is right"
            fix = f"write its letter into {mapping.answer!r}, A for the first"
        raise InputError(
            f"{source}: the questions do not show the choices in {name!r}, and {unclear} {why}; {fix}, or ask without "
            f"the choices by {setting}={mapping.prompt}"
        )
    added = [
        {PROMPT: _listed(each.question, each.options), **({ANSWER: each.letters[0]} if mapping.answer else {})}
        for each in asked
    ]
    listed = [(row, cells | new) for (row, cells), new in zip(table, added, strict=True)]
    return listed, Mapping(PROMPT, ANSWER if mapping.answer else "")


def _asked(cells: dict[str, Any], mapping: Mapping, name: str) -> _Asked:
    """Returns the question of a row with the choices in the column `name`."""
    right, listed = columns.cell(cells, mapping.answer), cells.get(name)
    options = [str(option).strip() for option in listed] if isinstance(listed, list | tuple) else []
    if not 1 < len(options) <= len(LETTERS) or not all(options):
        options = []
    try:
        question, answer = columns.question(columns.cell(cells, mapping.prompt)) or "", columns.answer(right)
    except TypeError:
        return _Asked("", options, [], None)
    letters = [letter for letter, option in zip(LETTERS, options, strict=False) if answer in (letter, option)]
    number = right if type(right) is int else None
    if number in range(len(options)) and LETTERS[number] not in letters:
        letters.append(LETTERS[number])
    return _Asked(question, options, letters, None if answer in options else number)
