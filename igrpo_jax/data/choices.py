"""Multiple-choice questions as problems: the choices stand below the question, and the answer is a letter.

Where a data set gives the right choice in a column of its own, the choices are sorted by a hash of the question and the
choice. So their order depends on neither the order of the rows nor the seed, and every evaluation asks the same prompt.
Not here: which benchmarks have choices (`catalog`), and grading (`rewards/mathematics/grader`, as for all answers).
"""

import hashlib
import string
from typing import Any

from igrpo_jax.data import readers
from igrpo_jax.data.catalog import Choices, Hub
from igrpo_jax.data.readers import Table
from igrpo_jax.errors import InputError
from igrpo_jax.rewards.mathematics import golds

LETTERS = string.ascii_uppercase
REQUEST = "The final answer is the letter of the right choice alone."
NO_CHOICE = "N/A"  # fills up shorter lists of choices in a version of MMLU-Pro
PROMPT, ANSWER = "question with choices", "letter"  # columns that `lettered` adds


def lettered(table: Table, hub: Hub, columns: Choices, source: str) -> Table:
    """Returns the rows with the columns PROMPT and ANSWER added: question with lettered choices, and the right letter.

    Args:
        source: what errors begin with.

    Raises:
        InputError: a question, a choice or the right one is missing; it names the rows.
    """
    rows, broken = [], []
    for number, cells in table:
        asked = _ask(cells, hub, columns)
        if asked is None:
            broken.append(number)
        else:
            rows.append((number, cells | {PROMPT: asked[0], ANSWER: asked[1]}))
    if broken:
        names = ", ".join(map(repr, (hub.prompt, hub.answer, *columns.columns)))
        raise InputError(
            f"{source}: {len(broken)} of {len(table)} rows lack a question, its choices or the right one ({names}): "
            f"row {readers.few(broken)}; fill them in or take them out"
        )
    return rows


def _ask(cells: dict[str, Any], hub: Hub, columns: Choices) -> tuple[str, str] | None:
    """Returns the question with its choices, and the letter of the right one; None where something is missing."""
    question, right = cells.get(hub.prompt), cells.get(hub.answer)
    options = cells.get(columns.options) if columns.options else [right, *(cells.get(name) for name in columns.wrong)]
    texts = [question, right, *(options if isinstance(options, list | tuple) else [None])]
    if len(texts) == 2 or any(not isinstance(text, str) or not text.strip() for text in texts):
        return None
    choices = [text.strip() for text in options if text.strip() != NO_CHOICE]
    if columns.options:
        letters = [right.strip()]
    else:
        choices.sort(key=lambda choice: hashlib.sha256(f"{question}\n{choice}".encode()).digest())
        letters = [letter for letter, choice in zip(LETTERS, choices, strict=False) if choice == right.strip()]
    if not letters or len(choices) > len(LETTERS) or letters[0] not in LETTERS[: len(choices)]:
        return None
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question.strip()}\n\n{listed}\n\n{REQUEST}", golds.any_of(letters)
