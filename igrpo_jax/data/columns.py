"""Which columns of a table are the question and the answer, and how their cells are read.

A column is found by name, in the order of PROMPTS and of ANSWERS. A name with a dot reaches into a nested column, and
names with a plus between them are columns whose texts are put together, such as Alpaca's instruction+input. A question
may be a list of chat messages; where no column holds an answer, their last reply is the answer. Where the answer is a
worked solution, only its final answer is kept: the last `\\boxed{…}`, what follows GSM8K's `####`, or what follows
"the answer is".
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from absl import logging

from igrpo_jax.data import messages, readers
from igrpo_jax.data.readers import Table
from igrpo_jax.errors import InputError
from igrpo_jax.rewards.mathematics import extraction, golds

PROMPTS = ("prompt", "problem", "question", "instruction+input", "input", "instruction", "messages", "conversations")
ANSWERS = ("answer", "solution", "ground_truth", "output", "reward_model.ground_truth")
Read = Callable[[Any], str | None]  # `question` or `answer`
FIX = "config.data.{} names another"


@dataclass(frozen=True)
class Mapping:
    """The names of the columns that are read."""

    prompt: str
    answer: str  # "" = the rows have no answers

    def __str__(self) -> str:
        answers = f"answer from {self.answer!r}" if self.answer else "no answers"
        return f"question from {self.prompt!r}, {answers}"

    def rest(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns that are not the question's, unchanged; nested ones are kept complete.

        The answer's column is kept unless it is the question's too: a reward that was written for TRL asks for it by
        its own name, such as `solution`.
        """
        read = {self.prompt, *self.prompt.split("+")}
        return {name: value for name, value in columns.items() if name not in read}


def choose(
    table: Table, prompt: str, answer: str, source: str, fix: str = FIX, answer_readers: Sequence[str] | None = None
) -> Mapping:
    """Returns the columns of a table that has rows.

    Args:
        prompt: name of the column of the questions; empty = find it by name.
        answer: the same of the answers.
        source: what the error names.
        fix: what the error advises; `{}` stands for the name of the setting, without its section.
        answer_readers: what would have to be set so that rewards need no answers; where that is nothing, a table
            may have none, or a blank column that is found by name. None = answers are needed in any case.

    Raises:
        InputError: there is no such column, and the message lists those that exist; or one column is both, and holds
            no chats that end with a reply.
    """
    question_column, names = choose_prompt(table, prompt, source, fix), _names(table)
    known = tuple(name for name in ANSWERS if name != question_column)
    is_chat = lambda: _has_replies(table, question_column)
    needs_answers = answer_readers is None or bool(answer_readers)
    if not answer and not any(name in names for name in known):
        if is_chat():
            return Mapping(question_column, question_column)
        if not needs_answers:
            return Mapping(question_column, "")
    fix = fix.format("answer_column")
    if answer_readers:
        settings = " and ".join(f"config.rewards.{setting}" for setting in answer_readers)
        fix += f"; training needs no answers with {settings}"
    answer_column = _column(names, answer, known, source, fix, other_than=question_column)
    if answer_column == question_column and not is_chat():
        raise InputError(
            f"{source}: question and answer are both column {answer_column!r}, so the question shows its answer ({fix})"
        )
    if not answer and not needs_answers and _is_blank_throughout(table, answer_column):
        return Mapping(question_column, "")
    return Mapping(question_column, answer_column)


def _is_blank_throughout(table: Table, name: str) -> bool:
    """Returns whether a column of answers has none."""
    return all(is_blank(answer, cell(cells, name)) for _, cells in table)


def choose_prompt(table: Table, prompt: str, source: str, fix: str = FIX) -> str:
    """Returns only the column of the questions, as `choose` finds it."""
    return _column(_names(table), prompt, PROMPTS, source, fix.format("prompt_column"))


def cell(columns: dict[str, Any], name: str) -> Any:
    """Returns the value of a column, None if the row lacks it.

    A dot reaches into a nested column. Where names have a plus between them, the texts that are not blank are joined by
    blank lines.
    """
    if name in columns:
        return columns[name]
    if "+" in name:
        parts = [cell(columns, part) for part in name.split("+")]
        filled = [part for part in parts if isinstance(part, str) and part.strip()]
        other = [part for part in parts if part is not None and part == part and not isinstance(part, str)]
        return other[0] if other else "\n\n".join(filled)
    outer, dot, inner = name.partition(".")
    nested = columns.get(outer) if dot else None
    return cell(nested, inner) if isinstance(nested, dict) else None


def question(value: Any) -> str | None:
    """Returns the text of a question, None if it is blank.

    A question is a string, or one user message that a system message may precede and a reply may follow.

    Raises:
        TypeError: the value is anything else.
    """
    turns = messages.parse(value)
    if turns is not None:
        value = messages.question(turns)
    if value is None or value != value:
        return None
    if not isinstance(value, str):
        raise TypeError("not text")
    return value if value.strip() else None


def answer(value: Any) -> str | None:
    """Returns the reference answer, None if it is blank.

    For a worked solution this is its final answer, for a number its text (27.0 is 27), for messages that of the last
    reply, and for a list the text of `golds.any_of`.

    Raises:
        TypeError: the value is none of these.
    """
    turns = messages.parse(value)
    return golds.gold_text(value if turns is None else messages.reply(turns), _final_answer)


def reply(value: Any) -> str | None:
    """Returns the reply with which a chat ends, None if it has none or the value is no chat."""
    try:
        turns = messages.parse(value)
        return messages.reply(turns) if turns else None
    except TypeError:
        return None


def _final_answer(text: str) -> str | None:
    """Returns the final answer of a worked solution, and other texts as they are; None for a blank one."""
    text = golds.printed_list(text)
    marked = extraction.after_hashes(text)
    if re.search(r"\\(boxed|fbox)\b", text):
        text = extraction.last_box(text) or text
    elif marked:
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", marked)
    else:
        text = extraction.extract(text) or text
    return text.strip() if text.strip() != "[]" else None


def is_blank(read: Read, value: Any) -> bool:
    """Returns whether `read`, which is `question` or `answer`, finds nothing in a cell."""
    try:
        return read(value) is None
    except TypeError:
        return False


def texts(table: Table, reads: Sequence[tuple[str, Read]], source: str) -> list[tuple[int, dict[str, Any], list[str]]]:
    """Returns (number, columns, texts) of each row, with a text for each of `reads`.

    A row with a cell that can't be read, such as a chat of several turns, is left out; a warning counts and names them.

    Args:
        reads: names of columns, each with `question` or `answer`.

    Raises:
        InputError: more than readers.MAX_BROKEN of the rows can't be read, or cells are blank; it names the rows.
    """
    rows: list[tuple[int, dict[str, Any], list[str]]] = []
    unread: list[list[int]] = [[] for _ in reads]  # numbers of rows, for each column
    blank: list[list[int]] = [[] for _ in reads]
    reasons: list[list[str]] = [[] for _ in reads]
    for number, cells in table:
        values = []
        for at, (name, read) in enumerate(reads):
            try:
                values.append(read(cell(cells, name)))
            except TypeError as error:
                unread[at].append(number)
                reasons[at].append(str(error))
                break
            blank[at] += [number] * (values[at] is None)
        else:
            rows.append((number, cells, values))
    is_refused = sum(map(len, unread)) > readers.MAX_BROKEN * len(table)
    for at in sorted(range(len(reads)), key=lambda at: -len(unread[at])):
        if unread[at]:
            what = _counted(unread[at], table, f"no readable {reads[at][0]!r} ({reasons[at][0]})")
            if is_refused:
                raise InputError(f"{source}: {what}; write it as a string")
            logging.warning("%s: %s; left out", source, what)
    for (name, read), numbers in zip(reads, blank, strict=True):
        if numbers:
            fix = "fill them in or take them out"
            if source.startswith("config.data.train") and read is answer:
                fix += ", or set config.data.clean=True"
            raise InputError(f"{source}: {_counted(numbers, table, f'a blank {name!r}')}; {fix}")
    return rows


def _counted(numbers: list[int], table: Table, what: str) -> str:
    """Returns a text that says how many and which rows of a table have the problem `what`."""
    have, word = ("has", "row") if len(numbers) == 1 else ("have", "rows")
    return f"{len(numbers)} of {len(table)} rows {have} {what}: {word} {readers.few(numbers)}"


def _has_replies(table: Table, name: str) -> bool:
    """Returns whether a column holds a chat that ends with a reply."""
    return any(turns[-1].role == "assistant" for turns in _chats(table, name))


def system_turns(table: Table, name: str) -> int:
    """Returns how many chats of a column begin with the text of a system turn."""
    return sum(turns[0].role == "system" and bool(turns[0].text.strip()) for turns in _chats(table, name))


def _chats(table: Table, name: str) -> Iterator[list[messages.Message]]:
    """Yields the chats of a column, without those that hold something other than text."""
    for _, cells in table:
        with contextlib.suppress(TypeError):
            if turns := messages.parse(cell(cells, name)):
                yield turns


def _names(table: Table) -> list[str]:
    """Returns the names of the columns in order, followed by those of nested columns, however deep they lie."""
    top = dict.fromkeys(name for _, columns in table for name in columns)
    nested = dict.fromkeys(name for _, columns in table for name in _nested(columns))
    return [*top, *nested]


def _nested(columns: dict[str, Any]) -> Iterator[str]:
    """Yields the names of the columns that lie in others, as `cell` takes them."""
    for name, value in columns.items():
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in (*value, *_nested(value)))


def _column(names: list[str], wanted: str, known: tuple[str, ...], source: str, fix: str, other_than: str = "") -> str:
    """Returns the first of the wanted or known names that is among the columns.

    Args:
        other_than: columns that hold something else, joined by a plus, which the error does not suggest.

    Raises:
        InputError: no column has one of these names.
    """
    for name in [wanted] if wanted else known:
        if name in names or ("+" in name and all(part in names for part in name.split("+"))):
            return name
    others = [name for name in names if name not in (other_than, *other_than.split("+"))]
    folded = {name.casefold(): name for name in reversed(others)}
    near = [folded[name.casefold()] for name in ([wanted] if wanted else known) if name.casefold() in folded]
    near = near or difflib.get_close_matches(wanted or known[0], others, n=1, cutoff=0.0)
    advice = f"its columns are {', '.join(names)}" if names else "it has none"
    advice += f"; the nearest is {near[0]!r}" if near else ""
    what = f"column {wanted!r}" if wanted else f"column {', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
    raise InputError(f"{source}: has no {what}; {advice} ({fix})")
