"""Which columns of a table are the question and the answer, and how their cells are read.

A column is found by name, in this order: `prompt`, `problem`, `question`, `input`; `answer`, `solution`,
`ground_truth`, `output`, and then verl's nested `reward_model.ground_truth`. A name with a dot reaches into a nested
column. A question may be a list of chat messages. Where the answer is a worked solution, only its final
answer is kept: the last `\\boxed{…}`, or what follows GSM8K's `####`.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from igrpo_jax.data.readers import Table
from igrpo_jax.errors import InputError
from igrpo_jax.rewards.mathematics import extraction

PROMPTS = ("prompt", "problem", "question", "input")
ANSWERS = ("answer", "solution", "ground_truth", "output", "reward_model.ground_truth")
FIX = "config.data.{} names another"


@dataclass(frozen=True)
class Mapping:
    """The names of the columns that are read."""

    prompt: str
    answer: str

    def __str__(self) -> str:
        return f"question from {self.prompt!r}, answer from {self.answer!r}"

    def rest(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Returns the other columns; nested ones are kept complete."""
        return {name: value for name, value in columns.items() if name not in (self.prompt, self.answer)}


def choose(table: Table, prompt: str, answer: str, source: str, fix: str = FIX) -> Mapping:
    """Returns the columns of a table that has rows.

    Args:
        prompt: name of the column of the questions; empty = find it by name.
        answer: the same of the answers.
        source: what the error names.
        fix: what the error advises; `{}` stands for the name of the setting, without its section.

    Raises:
        InputError: there is no such column; the message lists those that exist.
    """
    question_column = choose_prompt(table, prompt, source, fix)
    return Mapping(question_column, _column(_names(table), answer, ANSWERS, source, fix.format("answer_column")))


def choose_prompt(table: Table, prompt: str, source: str, fix: str = FIX) -> str:
    """Returns the column of the questions alone, as `choose` finds it."""
    return _column(_names(table), prompt, PROMPTS, source, fix.format("prompt_column"))


def cell(columns: dict[str, Any], name: str) -> Any:
    """Returns the value of a column, None where the row lacks it. A dot reaches into a nested column."""
    if name in columns:
        return columns[name]
    outer, dot, inner = name.partition(".")
    nested = columns.get(outer) if dot else None
    return cell(nested, inner) if isinstance(nested, dict) else None


def question(value: Any) -> str | None:
    """Returns the text of a question, None where it is blank.

    A question is a string, or one user message that a system message may precede.

    Raises:
        TypeError: the value is anything else.
    """
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        roles = [message.get("role") for message in value]
        if roles not in (["user"], ["system", "user"]):
            raise TypeError(f"messages of the roles {', '.join(map(str, roles))}, where one of a user is read")
        parts = [message.get("content") for message in value]
        if not all(isinstance(part, str) for part in parts):
            raise TypeError("a message whose content is not text")
        value = "\n\n".join(part for part in parts if part.strip())
    if value is None or value != value:
        return None
    if not isinstance(value, str):
        raise TypeError("not text")
    return value if value.strip() else None


def answer(value: Any) -> str | None:
    """Returns the reference answer, None where it is blank.

    For a worked solution this is its final answer, for a number its text (27.0 is 27).

    Raises:
        TypeError: the value is neither text nor a number.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise TypeError("not text")
    marked = extraction.after_hashes(value)
    if re.search(r"\\(boxed|fbox)\b", value):
        value = extraction.last_box(value) or value
    elif marked:
        value = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", marked)
    return value.strip() or None


def is_blank(read: Callable[[Any], str | None], value: Any) -> bool:
    """Returns whether `read`, which is `question` or `answer`, finds nothing in a cell."""
    try:
        return read(value) is None
    except TypeError:
        return False


def texts(table: Table, name: str, read: Callable[[Any], str | None], source: str) -> list[str]:
    """Returns a column as text, each cell as `read` (`question` or `answer`) gives it.

    Raises:
        InputError: some cells are blank or no text; its message names their rows.
    """
    values, blank, other, reason = [], [], [], ""
    for number, cells in table:
        try:
            values.append(read(cell(cells, name)))
            if values[-1] is None:
                blank.append(number)
        except TypeError as error:
            reason = reason or str(error)
            other.append(number)
    fix = "fill them in or take them out"
    if source.startswith("config.data.train") and read is answer:
        fix += ", or set config.data.clean=True"
    for rows, what, advice in (
        (blank, f"a blank {name!r}", fix),
        (other, f"a {name!r} that can't be read ({reason})", "write it as a string"),
    ):
        if rows:
            have, word = ("has", "row") if len(rows) == 1 else ("have", "rows")
            named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            raise InputError(f"{source}: {len(rows)} of {len(table)} rows {have} {what}: {word} {named}; {advice}")
    return values


def _names(table: Table) -> list[str]:
    """Returns the names of the columns in order, followed by those of nested columns."""
    top = dict.fromkeys(name for _, columns in table for name in columns)
    nested = dict.fromkeys(
        f"{name}.{inner}"
        for _, columns in table
        for name, value in columns.items()
        if isinstance(value, dict)
        for inner in value
    )
    return [*top, *nested]


def _column(names: list[str], wanted: str, known: tuple[str, ...], source: str, fix: str) -> str:
    """Returns the first of the wanted or known names that is among the columns; raises InputError without any."""
    for name in [wanted] if wanted else known:
        if name in names:
            return name
    near = difflib.get_close_matches(wanted or known[0], names, n=1, cutoff=0.0)
    advice = f"its columns are {', '.join(names)}; the nearest is {near[0]!r}" if near else "it has none"
    what = f"column {wanted!r}" if wanted else f"column {', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
    raise InputError(f"{source}: has no {what}; {advice} ({fix})")
