r"""An exact answer with its decimal in words or parentheses, rewritten with \approx: `3/56 (about 0.0536)`.

    with_sign(r"\frac{3}{56} \text{ (approximately 0.0536)}")  -> r"\frac{3}{56} \approx 0.0536"
    with_sign("3/4 (75%)")                                     -> "3/4 \approx 75%"

Only where the second value is the first one or its rounding: any other stays as it is, as a second guess. Not here:
what is near enough (`leaves.approximation`).
"""

import re

from igrpo_jax.rewards.mathematics import leaves
from igrpo_jax.rewards.mathematics.exact import NoValue
from igrpo_jax.rewards.mathematics.nodes import Choice, Node
from igrpo_jax.rewards.mathematics.tokens import split, tokenize

_TEXT = r"(?:\\(?:text|textrm|mathrm|mbox)\s?\{\s?)?"
_BLANKS = r"(?:[\s~$]|\\[,;:! ]){0,8}"
_ABOUT = r"(?:approximately|approx\.?|about|roughly)"
_END = rf"{_BLANKS}\}}?{_BLANKS}"
_OR_ABOUT = re.compile(rf",?{_BLANKS}{_TEXT},?\s?(?<![A-Za-z])or {_ABOUT}{_END}(?=-?[\\\d.])")
_IN_PARENTHESES = re.compile(
    rf"\({_BLANKS}{_TEXT}(or |=|\\approx|≈|\\simeq|~|(?:or )?{_ABOUT}(?![a-z]))?{_END}"
    rf"(-?[^(){{}}=]{{1,40}}?){_BLANKS}(?:\\right)?\)\s?\}}?[\s.$]{{0,8}}"
)
_BEFORE = re.compile(r"(?:[\s~]|\\[,;:! ]|\\left|\\(?:text|textrm|mathrm|mbox)\s?\{){1,16}\Z")
_NUMERAL = re.compile(r"-?[\d.]+")


def with_sign(answer: str) -> str:
    r"""Returns `3/56 or about 0.0536` and `3/56 (about 0.0536)` as `3/56 \approx 0.0536`; any other answer as it is."""
    exact, decimal = _parts(answer)
    if not exact or not decimal:
        return answer
    sides = split(tokenize(exact), {"="})[0][-1], tokenize(decimal)
    is_rounded = all(sides) and _is_rounded(*map(leaves.leaf, sides))
    return rf"{exact} \approx {decimal}" if is_rounded else answer


def _is_rounded(first: Node, last: Node) -> bool:
    """Returns whether the second value is the first one or its rounding. 3.02 or about 3 are two guesses."""
    try:
        is_near = isinstance(leaves.approximation("", first, last), Choice)
        return is_near and (not _NUMERAL.fullmatch(first.text) or leaves.agree(first, last))
    except NoValue:
        return False


def _parts(answer: str) -> tuple[str, str]:
    """Returns (the exact value, its decimal) as they are written, or two empty texts."""
    if "or " in answer and len(found := list(_OR_ABOUT.finditer(answer))) == 1:
        decimal = answer[found[0].end() :].rstrip(" .")
        return answer[: found[0].start()], decimal.removesuffix("}") if "{" not in decimal else decimal
    opened = answer.rfind("(")
    match = _IN_PARENTHESES.fullmatch(answer, opened) if opened > 0 else None
    if not match:
        return "", ""
    exact = answer[:opened]
    if before := _BEFORE.search(exact, max(0, opened - 40)):
        exact = exact[: before.start()]
    # 12 (0.5) is a product, and 3/4 (75%) is none.
    is_said = match[1] or ("%" in match[2]) != ("%" in exact)
    return (exact, match[2]) if is_said else ("", "")
