r"""Numbers and operations in English words, rewritten as the mathematics that they say.

    "two and a half" -> "2\frac{1}{2}"    "5 eighths" -> "\frac{5}{8}"    "1.5 million" -> "1500000"
    "negative 5" -> "-5"    "5 squared" -> "5^2"    "5 out of 8" -> "5/8"    "3 to 4" -> "3:4"

What is not understood stays as it is: `units` then refuses it as a unit, so that "5 fifth" is never 5. Not here: bases
(`leaves`), units (`units`).
"""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction

_SMALL_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
_PART_WORDS = (
    "third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth "
    "seventeenth eighteenth nineteenth"
)
_SMALL, _TENS = _SMALL_WORDS.split(), _TENS_WORDS.split()
_VALUES = {word: number for number, word in enumerate(_SMALL)} | {word: 20 + 10 * at for at, word in enumerate(_TENS)}
_POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES = {"hundred": 100, "dozen": 12, "lakh": 10**5, "crore": 10**7, **_POWERS}
_PARTS = {"half": 2, "quarter": 4, "hundredth": 100, "thousandth": 10**3, "millionth": 10**6}
_PARTS |= {word: number for number, word in enumerate(_PART_WORDS.split(), start=3)}
_PARTS |= {f"{word[:-1]}ieth": 20 + 10 * at for at, word in enumerate(_TENS)} | {
    "billionth": 10**9,
    "trillionth": 10**12,
}
_PLURALS = {"halves": "half", "tens": "ten"} | {word + "s": word for word in [*_PARTS, *_SCALES]}
NUMBER_WORDS = frozenset([*_VALUES, *_SCALES, *_PARTS, *_PLURALS])
OPERATION_WORDS = frozenset(
    ("negative", "minus", "positive", "plus", "times", "multiplied", "divided", "over", "squared", "cubed", "factorial")
) | {"out", "to", "power", "point"}
_KEPT = NUMBER_WORDS | OPERATION_WORDS | {"a", "an", "and", "or", "by", "of", "the", "per", "cent"}


def _either(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(sorted(words, key=len, reverse=True))})"


_TRIGGERING = _either([*NUMBER_WORDS, *OPERATION_WORDS, "per cent"])
_TRIGGER = re.compile(rf"(?<![\\A-Za-z]){_TRIGGERING}(?![A-Za-z]|-digit)", re.I)  # not that of "two-digit"
_TEXT = re.compile(r"\\(?:text\w*|mbox|hbox|mathrm|mathbf|rm|bf)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"\\[,;:! ]|~")
_HYPHENED = _either(NUMBER_WORDS | {"and", "a"})
_HYPHEN = re.compile(rf"((?<![A-Za-z]){_HYPHENED}|\d)-(?={_HYPHENED}(?![A-Za-z]))", re.I)  # not that of "non-zero"
_BELOW_100 = rf"(?:{_either(_TENS)}(?:\s+{_either(_SMALL[1:10])})?|{_either(_SMALL)})"
_BELOW_1000 = rf"{_BELOW_100}(?:\s+hundred(?:\s+(?:and\s+)?{_BELOW_100})?)?"
_WHOLE = rf"(?<![\\A-Za-z]){_BELOW_1000}(?:\s+{_either(_POWERS)}(?:\s+(?:and\s+)?{_BELOW_1000})?)*(?![A-Za-z])"
_NUMBER = r"(?<![\w.,/^}\\-])(\d+(?:\.\d+)?)"
_PART = rf"({_either([*_PARTS, *(word for word in _PLURALS if _PLURALS[word] in _PARTS)])})(?![A-Za-z])"
_SCALE = rf"({_either([*_SCALES, *(word for word in _PLURALS if word[:-1] in _SCALES or word == 'tens')])})(?![A-Za-z])"
_OPERAND = r"(?!an? )(?=[\d({]|\\frac|\\sqrt|\\pi|[A-Za-z](?![A-Za-z]))"


def rewritten(answer: str) -> str:
    """Returns the answer with numbers and operations in words rewritten as mathematics."""
    if not _TRIGGER.search(answer):
        return answer
    answer = _HYPHEN.sub(r"\1 ", _TEXT.sub(_opened, _SPACES.sub(" ", answer)))
    for pattern, write in _RULES:
        answer = pattern.sub(write, answer)
    return answer


def _opened(match: re.Match) -> str:
    r"""Takes numbers and the words about them out of \text{…}; other words keep a \text of their own."""
    if not _TRIGGER.search(match[1]):
        return match[0]
    words = re.split(r"([A-Za-z']+)", match[1])
    kept = (w if at % 2 == 0 or w.casefold() in _KEPT else f"\\text{{{w}}}" for at, w in enumerate(words))
    return f" {''.join(kept)} "


def _whole(words: str) -> int:
    """Returns the value of a whole number in words."""
    total = group = 0
    for word in words.casefold().split():
        if word in _POWERS:
            total, group = total + group * _POWERS[word], 0
        else:
            group = group * 100 if word == "hundred" else group + _VALUES.get(word, 0)
    return total + group


def _restated(match: re.Match) -> str:
    """Drops the second of "9 (nine)" and "nine (9)"."""
    values = [int(text) if text.isdecimal() else _whole(text) for text in match.groups()]
    return str(values[0]) if values[0] == values[1] and not (match[1] + match[2]).isdecimal() else match[0]


def _scaled(match: re.Match) -> str:
    """Multiplies a number, or a formula that ends in a brace, as "1.5 million" says."""
    word = match[2].casefold()
    factor = _SCALES.get(_PLURALS.get(word, word), 10)
    if match[1] == "}":
        return rf"}}\cdot {factor}"
    value = Fraction(match[1]) * factor
    return str(value) if value.denominator == 1 else match[0]


def _part(match: re.Match) -> str:
    """Writes "5 eighths" and "a third" as fractions, and "and a half" behind a whole number as part of it."""
    part = match["part"].casefold()
    count = int(match["count"]) if match["count"].isdecimal() else 1
    bottom = _PARTS[_PLURALS.get(part, part)]
    if (part in _PLURALS) == (count == 1) or (match["mixed"] and count >= bottom):
        return match[0]
    return rf"{match['mixed'] or ''}\frac{{{count}}}{{{bottom}}}"


_COUNT = rf"(?P<count>\d+|an?)\s+{_PART.replace('(', '(?P<part>', 1)}"
_WRITTEN: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (rf"((?<![\w.,/^}}\\-])\d+|{_WHOLE})\s*\(\s*(\d+|{_WHOLE})\s*\)", _restated),
    (_WHOLE, lambda match: str(_whole(match[0]))),
    (r"(\d)\s+point((?:\s+\d)+)(?![\w.])", lambda match: f"{match[1]}.{''.join(match[2].split())}"),
    (rf"(?:(?<![\w.,/}}\\-])(?P<mixed>\d+)\s+and\s+|(?<![\w.,/^}}\\]))(?<!\d\s){_COUNT}", _part),
    (r"(?<![A-Za-z\\])(?<![\d}]\s)half(?![A-Za-z]|\s+(?:past|to)\b)(?:\s+an?(?![A-Za-z]))?", r"\\frac{1}{2}"),
    (rf"(?<![A-Za-z\\])(?<![\d}}]\s)an?\s+{_SCALE}", r"1 \1"),
    *[(rf"(\}}|(?<![\w.,/^}}\\])\d+(?:\.\d+)?)\s*{_SCALE}", _scaled)] * 2,
    (
        r"((?:^|[=+])\s*(?:\d+|[a-z]))\s+(squared|cubed|factorial)(?=\s*(?:$|[+=-]|plus|minus))",
        lambda match: match[1] + {"s": "^2", "c": "^3", "f": "!"}[match[2][0].casefold()],
    ),
    (r"(?<![A-Za-z\\])plus or minus(?![A-Za-z])", r"\\pm "),
    (rf"(?<![A-Za-z\\])(?:minus|(?<![\d}}]\s)negative)\s+{_OPERAND}", "-"),
    (rf"(?<![A-Za-z\\])plus\s+{_OPERAND}", "+"),
    (r"^\s*positive\s+(?=\d)", ""),
    (rf"([\d}})])\s+(?:times|multiplied\s+by)\s+{_OPERAND}", r"\1*"),
    (rf"{_NUMBER}\s+(?:divided\s+by|over|out\s+of)\s+(?=\d)", r"\1/"),
    (rf"{_NUMBER}\s+(?:raised\s+)?to\s+the\s+power\s+(?:of\s+)?(?=[\d-])", r"\1^"),
    (r"^[\s$]*\d+(?:\.\d+)?(?:\s+to\s+\d+(?:\.\d+)?)+[\s$.]*$", lambda match: match[0].replace("to", ":")),
    (r"(\S)\s+per\s+cent(?![A-Za-z])", r"\1\\%"),
]
_RULES = [(re.compile(pattern, re.IGNORECASE), write) for pattern, write in _WRITTEN]
