r"""Is the answer stated in a text mathematically the reference answer?

    text -> extract -> prediction -> equivalent(prediction, gold) -> score 0 or 1

`equivalent` has three layers, cheapest first:

1. Identical text after `_clean` (spacing, `\left`, `\dfrac`, `$`, degree signs, …).
2. Exact arithmetic for numbers (`fractions.Fraction`): integers, decimals, fractions, mixed numbers, percents,
   thousands, scientific notation, digits in a base; and plain words. Where both sides are numbers this layer decides.
3. math-verify (LaTeX -> sympy), behind bounds on length, nesting and size. A yes between two numbers is confirmed to
   40 relative digits, because math-verify rounds to 6 decimals and so takes 1/2004! for 1/2006!.

Conventions: the last box counts, alone; no answer is looked for in prose without a statement ("the answer is",
"Answer:"); nothing inside `<think>` counts once something follows it; 28% equals both 28 and 0.28 (data sets write the
same answer in all three ways) but not 0.28%; a decimal is exact, so 0.333 is not 1/3; a unit missing on one side is
forgiven, two different units are not.

Not here: time limits and memory limits (`rewards/pool`), and any evaluation of model text as Python: math-verify's
plain-expression extractor runs `sympy.parse_expr`, an `eval`, and is never used. Nothing here imports jax.
"""

import collections
import logging
import re
from fractions import Fraction

MAX_TEXT = 200_000  # characters of a completion that are read, from its end
MAX_ANSWER = 1_000  # characters of an answer; longer ones are not compared (the longest gold of MATH has 159)
MAX_DEPTH = 12  # nested braces and brackets handed to sympy
MAX_DIGITS = 400  # digits in one number literal handed to sympy
MAX_EXPONENT = 10_000  # integer exponents, factorials and binomials beyond this are not expanded

# ---------------------------------------------------------------------------------------------------- extraction

# One pass over boxes, escaped characters (so that \{ does not count) and braces.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,16}\{|\\.|[{}]", re.DOTALL)
_PHRASE = re.compile(r"\banswer\s{0,4}(?:(?:is\b|:|=|\*\*:|:\*\*)\s{0,4}:?|(?=\$|\\\(|\\\[))", re.IGNORECASE)
_MATH = re.compile(r"\s*(?:\*\*)?\s*(?:\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(([^$]*?)\\\)|\\\[([^$]*?)\\\])")
_CLAUSE = re.compile(r"[.!?;]?\s+(?:because|since|so|which|as|for|where|when|therefore)\b|[.!?](?:\s|$)|\n")


def extract(text: str) -> str | None:
    """The final answer stated in `text`, or None where it states none.

    Looked for, in this order: the last `<answer>…</answer>`, the last balanced `\\boxed{…}`, GSM8K's `#### …`, and
    "the answer is …" / "Answer: …". Where something follows `</think>`, only what follows it is read. Linear time;
    of a text beyond MAX_TEXT characters only the end is read.
    """
    text = text[-MAX_TEXT:]
    thought, closed, after = text.rpartition("</think>")
    if closed:
        text = after if after.strip() else thought
    head, closed, _ = text.rpartition("</answer>")
    if closed:
        _, opened, block = head.rpartition("<answer>")
        if opened and block.strip():
            return _last_box(block) or _statement(block) or block.strip()
    return _last_box(text) or _after_hashes(text) or _statement(text)


def _last_box(text: str) -> str | None:
    """Content of the non-empty balanced box that ends last; of nested boxes, the inner one."""
    open_braces: list[int | None] = []  # start of the content for a box, None for any other brace
    best = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and text[start : match.start()].strip():
                nested = best is not None and start < best[0]
                best = best if nested else (start, match.start())
        elif token == "{":
            open_braces.append(None)
        elif token[-1] == "{" and token != "\\{":
            open_braces.append(match.end())
    return text[best[0] : best[1]].strip() if best else None


def _after_hashes(text: str) -> str | None:
    _, found, rest = text.rpartition("####")
    return (rest.strip().split("\n", 1)[0].strip() or None) if found else None


def _statement(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", to the end of its clause."""
    matches = collections.deque(_PHRASE.finditer(text), maxlen=1)
    if not matches:
        return None
    last = matches[0]
    rest = text[last.end() : last.end() + MAX_ANSWER]
    math = _MATH.match(rest)
    if math:
        stated = next(group for group in math.groups() if group is not None)
    else:
        rest = rest.lstrip().lstrip("*").lstrip()
        stated = _CLAUSE.split(rest, maxsplit=1)[0]
    return stated.strip().strip("*").strip() or None


# --------------------------------------------------------------------------------------------------- exact layer

_REMOVED = re.compile(
    r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle)(?![A-Za-z])|(?<!\\)\\!\s*|\^\s*\{?\s*\\(?:circ|degree)\s*\}?|°|\\\$|"
    r"\\(?:degree|limits)(?![A-Za-z])"
)
_SPACES = re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|[\s\u00a0\u2009\u202f]+")
_REPLACED = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|operatorname)\s*\{"), r"\\text{"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\s*(?:\\text\{\s*)?(?:percentage|percent|pct)\b\.?\s*\}?\s*$"), "%"),
    (re.compile(r"\\(?:leq|le)(?![A-Za-z])|<=|≤"), r"\\le "),
    (re.compile(r"\\(?:geq|ge)(?![A-Za-z])|>=|≥"), r"\\ge "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"∞|\binfty\b(?<!\\infty)"), r"\\infty "),
)
_PAIRS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' ]*")
_UNIT = re.compile(
    r"(?<=[\d}%)])\s*(?:\\text\{([^{}]*)\}|(dollars?|cents?|degrees?|units?|[ck]m|mm|inches|feet|miles|hours?|days?"
    r"|minutes?|seconds?|kg))(?:\^\{?([23])\}?)?\s*$"
)
_IDLE_SPACE = re.compile(r"(?<!\d) | (?!\d)")  # not the one in "1 2"
_TEXT_UNIT = re.compile(r"(.*[\w)}\]])\s*\\text\{\s*([A-Za-z ]{1,20})\s*\}(\^\{?[23]\}?)?\s*$")
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d{1,3}(?: \d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_SCIENTIFIC = re.compile(
    rf"({_DECIMAL})(?:[eE]([+-]?\d{{1,3}})|\s*(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*(?:\{{\s*([+-]?\d{{1,3}})\s*\}}|(\d)))?"
)
_SIGNED = rf"[+-]?\s*{_DECIMAL}"
_FRACTION = re.compile(
    rf"(\d+)?\s*\\frac\s*(?:\{{\s*({_SIGNED})\s*\}}|(\d))\s*(?:\{{\s*({_SIGNED})\s*\}}|(\d))|"
    rf"\(?\s*({_SIGNED})\s*\)?\s*/\s*\(?\s*({_SIGNED})\s*\)?"
)
_BASED = re.compile(r"([0-9A-Z]+)_\{?\s*(\d{1,2})\s*\}?")


def equivalent(prediction: str, gold: str) -> bool:
    """True if the two answers (bare, as `extract` returns them) are mathematically the same.

    Symmetric. Anything that cannot be compared (too long, too deep, not parsed) is not equivalent. May be slow on
    hostile input: run it in `rewards/pool`.
    """
    if len(prediction) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return False
    a, b = _clean(prediction), _clean(gold)
    if not a or not b:
        return False
    if _IDLE_SPACE.sub("", a) == _IDLE_SPACE.sub("", b):
        return True
    verdict = _exact(a, b)
    if verdict is None:
        (a, unit_a), (b, unit_b) = _split_unit(a), _split_unit(b)
        units_agree = not unit_a or not unit_b or unit_a == unit_b
        verdict = units_agree and _small_enough(a) and _small_enough(b) and _symbolic(a, b)
    return verdict


def grade(text: str, gold: str) -> tuple[float, str | None, str]:
    """(score 1.0 or 0.0, extracted answer, "ok" or "unparseable") of a whole completion."""
    extracted = extract(text)
    if extracted is None:
        return 0.0, None, "unparseable"
    return float(equivalent(extracted, gold)), extracted, "ok"


def warm_up() -> None:
    """Imports and first-use tables of sympy and its LaTeX parser, which take seconds: once per worker."""
    _symbolic("x+1", "1+x")
    _symbolic(r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}")


def _clean(answer: str) -> str:
    answer = (_last_box(answer) or answer).strip()
    for left, right in _PAIRS:
        if answer.startswith(left) and answer.endswith(right) and len(answer) > len(left) + len(right):
            answer = answer[len(left) : -len(right)].strip()
    for pattern, new in _REPLACED:
        answer = pattern.sub(new, answer)
    answer = _SPACES.sub(" ", _REMOVED.sub("", answer)).strip()
    answer = answer.rstrip(".,;").strip() if not answer.endswith("\\") else answer
    if "$" in answer and "\\text" not in answer:
        answer = answer.replace("$", "").strip()  # money; odd $n$
    whole_text = _TEXT.fullmatch(answer)
    return whole_text[1].strip() if whole_text else answer


def _exact(a: str, b: str) -> bool | None:
    """The verdict where both sides are numbers, both digits in a base, or words; None where this layer cannot say."""
    based_a, based_b = _BASED.fullmatch(a), _BASED.fullmatch(b)
    if based_a and based_b:
        return _in_base(based_a) == _in_base(based_b)
    number_a, number_b = _number(a), _number(b)
    if number_a and number_b:
        (value_a, percent_a, unit_a), (value_b, percent_b, unit_b) = number_a, number_b
        if unit_a and unit_b and unit_a != unit_b:
            return False
        same = value_a == value_b
        if percent_a != percent_b:
            return same or (value_a / 100 == value_b if percent_a else value_b / 100 == value_a)
        return same
    if (based_a or based_b) and (number_a or number_b):
        return False  # 52_8 is neither 52 nor 528
    if (number_a and _is_list(b)) or (number_b and _is_list(a)):
        return False  # math-verify reads "1, 1" as the set {1}, and that as 1
    word_a, word_b = _word(a), _word(b)
    if word_a and word_b and (len(word_a) > 3 or len(word_b) > 3 or len(word_a) == len(word_b) == 1):
        # One letter is a choice or a symbol, whose case matters; three and fewer may be a product of symbols.
        return word_a == word_b if len(word_a) == 1 else word_a.casefold() == word_b.casefold()
    return None


def _split_unit(answer: str) -> tuple[str, str]:
    """Splits off a trailing `\\text{ cm}^2`, which math-verify cannot read."""
    match = _TEXT_UNIT.fullmatch(answer)
    if not match or "\\text" in match[1] or "," in match[1]:
        return answer, ""
    return match[1], match[2].strip() + (match[3] or "").strip("^{}")


def _is_list(answer: str) -> bool:
    """True where a comma stands outside all brackets."""
    depth = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            return True
    return False


def _in_base(match: re.Match) -> tuple[int, ...] | int:
    digits, base = match[1], int(match[2])
    try:
        return int(digits, base)
    except ValueError:  # a digit that the base does not have, or a base that is none
        return (base, *map(ord, digits))


def _word(answer: str) -> str | None:
    answer = _TEXT.sub(r"\1", answer).strip()
    if len(answer) == 3 and answer[0] == "(" and answer[2] == ")":
        answer = answer[1]
    return answer if _WORDS.fullmatch(answer) else None


def _number(answer: str) -> tuple[Fraction, bool, str] | None:
    """(value, whether in percent, unit) of a plain number, None for anything else."""
    unit = ""
    match = _UNIT.search(answer)
    if match:
        unit = (match[1] or match[2] or "").strip().rstrip("s.").casefold() + (match[3] or "")
        answer = answer[: match.start()].strip()
    percent = answer.endswith("%")
    answer = answer.rstrip("%").strip()
    while answer.startswith("(") and answer.endswith(")") and answer.count("(") == 1:
        answer = answer[1:-1].strip()
    sign = -1 if answer.startswith("-") else 1
    answer = answer.lstrip("+-").strip() if answer[:1] in ("+", "-") and answer[1:2] not in ("+", "-") else answer
    match = _SCIENTIFIC.fullmatch(answer)
    if match:
        exponent = int(match[2] or match[3] or match[4] or 0)
        return sign * _decimal(match[1]) * Fraction(10) ** exponent, percent, unit
    match = _FRACTION.fullmatch(answer)
    if match:
        above, below = match[2] or match[3] or match[6], match[4] or match[5] or match[7]
        if _decimal(below) == 0:
            return None
        value = _decimal(above) / _decimal(below) + int(match[1] or 0)
        return sign * value, percent, unit
    return None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", ""))


# ------------------------------------------------------------------------------------------------ symbolic layer

_EXPONENT = re.compile(r"\^\s*\{?\s*[({]*\s*-?(\d+)")
_FACTORIAL = re.compile(r"(\d+)\s*[)}]*\s*!")
_BINOMIAL = re.compile(r"\\[dt]?binom|\\Gamma|\\zeta|\\prod|\\sum|\\int")
_DIGITS = re.compile(r"\d+")
_DOUBLE = re.compile(r"![\s)}\]]*!|\^\s*\{?[\w.]*\}?\s*\^")  # (9!)!, 9^9^9
_ASCII = (
    (re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])sqrt\s*(\d+)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])(pi|sin|cos|tan|ln|log|exp|arcsin|arccos|arctan)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"(?<![\\*])\*(?!\*)"), r"\\cdot "),
    (re.compile(r"(?<=\d)[eE]([+-]?\d{1,3})(?![\w.])"), r"\\cdot 10^{\1}"),
    (re.compile(r"\^\(([^()]*)\)"), r"^{\1}"),
)


def _small_enough(answer: str) -> bool:
    """False for what sympy might expand without end; a deadline still stands behind this."""
    depth = deepest = 0
    for character in answer:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    sizes = [int(d[:9]) for d in _EXPONENT.findall(answer) + _FACTORIAL.findall(answer)]
    if _BINOMIAL.search(answer):
        sizes += [int(d[:9]) for d in _DIGITS.findall(answer)]
    return (
        deepest <= MAX_DEPTH
        and max(sizes, default=0) <= MAX_EXPONENT
        and all(len(d) <= MAX_DIGITS for d in _DIGITS.findall(answer))
        and not _is_tower(answer)
        and not _DOUBLE.search(answer)
        and "__" not in answer
    )


def _is_tower(answer: str) -> bool:
    """True for exponents three deep, or two deep with a number as the inner base, as in 2^{2^{49}}."""
    stack: list[bool] = []  # of open brackets: does it open an exponent?
    previous = ""
    for character in answer:
        if character in "({":
            stack.append(previous == "^")
        elif character in ")}" and stack:
            stack.pop()
        elif character == "^" and (sum(stack) >= 2 or (any(stack) and previous.isdigit())):
            return True
        if not character.isspace() and not (character in "({" and previous == "^"):
            previous = character
    return False


def _symbolic(prediction: str, gold: str) -> bool:
    """math-verify's verdict on two answers, its own alarm switched off (it only works in a main thread)."""
    import latex2sympy2_extended  # these import sympy: seconds, so not at the top
    import math_verify

    # It warns once that nothing stops a slow parse; the pool does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    # Its own removal of units takes 3m for 3.
    reading = latex2sympy2_extended.NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    parsed = []
    for answer in (gold, prediction):
        for pattern, new in _ASCII:
            answer = pattern.sub(new, answer)
        parsed.append(
            math_verify.parse(
                f"${answer}$",
                [math_verify.LatexExtractionConfig(normalization_config=reading)],
                fallback_mode="no_fallback",
                parsing_timeout=None,
            )
        )
    # Both ways round: as a prediction (only), 2x+z=1 would do for 1.
    for one, other in (parsed, reversed(parsed)):
        if not one or not math_verify.verify(one, other, allow_set_relation_comp=True, timeout_seconds=None):
            return False
    return _confirmed(parsed[0][0], parsed[1][0])


def _confirmed(a, b) -> bool:
    """Compares again, to 40 relative digits, two sympy numbers that math-verify found equal within 6 decimals."""
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and a.is_number and b.is_number):
        return True
    if a.is_Rational and b.is_Rational:
        return a == b
    # A decimal among surds carries 15 digits.
    digits = 12 if a.has(sympy.Float) or b.has(sympy.Float) else 40
    a, b = a.evalf(digits + 10), b.evalf(digits + 10)
    scale = max(abs(a), abs(b))
    return bool(abs(a - b) <= scale * sympy.Float(10) ** -digits)
