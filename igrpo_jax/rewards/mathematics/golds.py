r"""Reference answers as data sets write them: numbers, several right answers, and lists that were printed into a text.

Not here: where the final answer stands in a worked solution (`extraction`), and the comparison (`grader`).
"""

import decimal
import json
import re
from collections.abc import Callable
from typing import Any

ANY_OF = "any of "  # begins the text of several reference answers, any of which is right
MAX_WORDS = 8  # of a gold; a longer one is prose that no answer repeats

_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_ITEM = rf"(?:{_QUOTED}|[-+]?\d[\d./]*)"
# What str() or json.dumps made of a list, a tuple or a numpy array. One without quotes is an interval or a point.
_LIST = re.compile(
    rf"(?:array\(\s*)?[\[(]\s*({_ITEM}(?:(?:\s*,\s*|\s+){_ITEM})*)\s*,?\s*[\])](?:\s*,\s*dtype=[\w'<>]+)?\s*\)?",
    re.DOTALL,
)
_RAW = re.compile(r"(?<!\\)(?:\\\\)*\\[A-Za-z]{2}")  # a command of LaTeX whose backslash was not doubled
_UNICODE = re.compile(r"\\u([0-9a-fA-F]{4})")
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")
_NEXT_SENTENCE = re.compile(r"[\w$})\]][.!?:]\s+[^\W\d_a-z]")
_NEXT_IDEOGRAPHIC = re.compile(r"[。！？；]\s*\w")
_LETTERED = re.compile(r"\s*\(?[A-Z][).:]")  # the beginning of a choice, as in "(D) It is 12"
_CONNECTIVE = r"[Ss]o|[Tt]herefore|[Tt]hus|[Hh]ence|[Bb]ecause"
_VERB = "is|are|was|were|has|have|had|gets?|got|needs?|pays?|paid|costs?|takes?|took|makes?|made|equals?"
_SENTENCE = re.compile(
    rf"(?:.*(?<![\\\w]))?(?:{_CONNECTIVE}),?\s.*"
    rf"|\s*(?i:it|we|he|she|they|there|this|that)\s(?i:{_VERB})\s+\\?\$?\d.*"
    rf"|\s*[^\W\d_]+(?:\s+[^\W\d_]+){{0,4}}\s(?i:{_VERB})\s+\\?\$?\d[\d.,]*\s*",
    re.DOTALL,
)
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def gold_text(value: Any, read: Callable[[str], str | None] = str.strip) -> str | None:
    """Returns a reference answer as the text that the grader takes, None if it is blank.

    A number becomes its digits (27.0 is 27, 1e-07 is 0.0000001). Of a list any item is right, and its text is that of
    `any_of`. A list in a list is refused: it may be one answer, such as a matrix, or more alternatives.

    Args:
        value: text, a number, or a list of these.
        read: what becomes of a text.

    Raises:
        TypeError: the value is anything else.
    """
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple) for item in value):
            raise TypeError("a list in a list; write each right answer as one text")
        golds = [text for text in (gold_text(item, read) for item in value) if text]
        return any_of([gold for text in golds for gold in alternatives(text)]) if golds else None
    if value is None or value != value:
        return None
    if isinstance(value, int | float | decimal.Decimal):
        return _number_text(value)
    if not isinstance(value, str):
        raise TypeError("not text")
    return read(value) or None


def any_of(golds: list[str]) -> str:
    """Returns one text for reference answers any of which is right; `alternatives` is its inverse."""
    distinct = list(dict.fromkeys(golds))
    return distinct[0] if len(distinct) == 1 else ANY_OF + json.dumps(distinct, ensure_ascii=False)


def alternatives(gold: str) -> list[str]:
    """Returns the reference answers in a gold, any of which is right; usually the gold itself alone."""
    if not gold.startswith(ANY_OF + "["):
        return [gold]
    try:
        golds = json.loads(gold.removeprefix(ANY_OF))
    except (ValueError, RecursionError):
        return [gold]
    return golds if golds and all(isinstance(item, str) for item in golds) else [gold]


def printed_list(text: str) -> str:
    r"""Returns what a list that was printed into a text holds, joined by commas; other texts as they are.

    `['58']` is 58, `["\\frac{1}{2}"]` is \frac{1}{2}, and `['2', '-2']` is 2, -2. Backslashes that printing doubled
    are single again.
    """
    bare = text.strip()
    if not bare.startswith(("[", "(", "array")) or not ("'" in bare or '"' in bare):
        return text
    match = _LIST.fullmatch(bare)
    if not match:
        return text
    return ", ".join(_unquoted(item[0]).strip() for item in re.finditer(_ITEM, match[1], re.DOTALL))


def is_prose(gold: str) -> bool:
    """Returns whether a gold is a text of sentences, such as a whole solution, or a question: no final answer equals
    it.
    """
    words = len(_WORD.findall(gold))
    several = bool(_NEXT_IDEOGRAPHIC.search(gold)) or (words >= 4 and bool(_NEXT_SENTENCE.search(gold)))
    is_question = words >= 3 and gold.rstrip().endswith("?") and not _LETTERED.match(gold)
    return words > MAX_WORDS or several or is_question


def stated_number(gold: str) -> str:
    """Returns the last number of a gold that is one sentence, such as "2x = 24, so x = 12" or "It is 12"; else ""."""
    is_sentence = len(_WORD.findall(gold)) >= 2 and not _LETTERED.match(gold) and _SENTENCE.fullmatch(gold)
    return (_NUMBER.findall(gold) or [""])[-1] if is_sentence else ""


def _unquoted(item: str) -> str:
    if item[0] not in "'\"":
        return item
    text = re.sub(r"\\(['\"/])" if _RAW.search(item) else r"\\(['\"/\\])", r"\1", item[1:-1])
    return _UNICODE.sub(lambda match: chr(int(match[1], 16)), text)


def _number_text(value: float | decimal.Decimal) -> str:
    """Returns the digits of a number, without an exponent and without zeros at the end of a fraction."""
    if isinstance(value, int):
        return str(value)
    digits = f"{decimal.Decimal(str(value or 0)):f}"  # or -0.0 would be -0
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
