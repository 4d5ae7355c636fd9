r"""Numbers in expressions: decimals, mixed numbers such as 2\frac12 and "2 1/2", and repeating decimals."""

from fractions import Fraction

from igrpo_jax.rewards.mathematics import functions
from igrpo_jax.rewards.mathematics.cursor import Cursor
from igrpo_jax.rewards.mathematics.exact import NoValue, Value

_REPEATING = frozenset(("overline", "bar", "dot", "dots"))


def bare_number(cursor: Cursor) -> Value | None:
    """Reads one number token without braces, as in x^10, whatever follows it. Returns None where there is none."""
    if cursor.kind() != "number":
        return None
    cursor.at += 1
    return Value.number(_decimal(cursor.tokens[cursor.at - 1].text))


def number(cursor: Cursor) -> Value:
    """Reads a decimal, a mixed number or a repeating decimal."""
    text = cursor.tokens[cursor.at].text
    cursor.at += 1
    if "." in text and cursor.kind() == "command" and cursor.peek() in _REPEATING and cursor.peek(1) == "{":
        digits = cursor.peek(2)
        if digits.isdecimal() and cursor.peek(3) == "}":
            cursor.at += 4
            return Value.number(_decimal(text) + Fraction(int(digits), 10 ** _places(text) * (10 ** len(digits) - 1)))
    value = _decimal(text)
    if text.isdecimal():
        value += _mixed(cursor)
    return Value.number(value)


def _mixed(cursor: Cursor) -> Fraction:
    """Reads the fraction of a mixed number: proper and of plain integers. Returns 0 where there is none."""
    top = bottom = ""
    texts = [cursor.peek(ahead) for ahead in range(7)]
    if texts[0] == "frac" and (texts[1], texts[3], texts[4], texts[6]) == ("{", "}", "{", "}"):
        top, bottom, length = texts[2], texts[5], 7
    elif texts[1] == "/" and cursor.kind() == "number" and cursor.tokens[cursor.at].spaced:
        top, bottom, length = texts[0], texts[2], 3
    if not (top.isdecimal() and bottom.isdecimal()) or int(top) >= int(bottom):
        return Fraction(0)
    if cursor.peek(length) in ("^", "!"):
        return Fraction(0)
    cursor.at += length
    return Fraction(int(top), int(bottom))


def _decimal(text: str) -> Fraction:
    """Returns the exact value of a number token."""
    digits, _, exponent = text.casefold().partition("e")
    if exponent:
        power = int(exponent)
        if abs(power) > functions.MAX_EXPONENT:
            raise NoValue("exponent too large")
        return Fraction(digits) * Fraction(10) ** power
    return Fraction(digits)


def _places(text: str) -> int:
    """Returns the number of decimal places."""
    return len(text.partition(".")[2])
