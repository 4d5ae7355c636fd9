r"""Numbers in expressions: decimals, mixed numbers such as 2\frac12 and "2 1/2", and repeating decimals."""

from fractions import Fraction

from igrpo_jax.rewards.mathematics import functions
from igrpo_jax.rewards.mathematics.exact import NoValue, Value
from igrpo_jax.rewards.mathematics.tokens import Cursor

_REPEATING = frozenset(("overline", "bar", "dot", "dots"))


def bare_number(cursor: Cursor) -> Value | None:
    """Reads one number token without braces, as in x^10, whatever follows it. Returns None if there is none."""
    if cursor.kind() != "number":
        return None
    return Value.number(_decimal(cursor.next()))


def is_hidden(cursor: Cursor) -> bool:
    """Returns whether a number comes next in braces or in \\text{…}, which nobody sees: 2{2} looks like 22."""
    ahead = 0
    while cursor.peek(ahead) == "{":
        ahead += 1
    if cursor.kind(ahead) == "text":
        return cursor.tokens[cursor.at + ahead].text.lstrip(" {")[:1].isdecimal()
    is_mixed = ahead > 0 and cursor.kind(-1) == "number" and cursor.peek(ahead) == "frac"  # 2{\frac12}
    return is_mixed or cursor.kind(ahead) == "number"


def number(cursor: Cursor) -> Value:
    """Reads a decimal, a mixed number or a repeating decimal."""
    text, digits = cursor.next(), cursor.peek(2)
    value = _decimal(text)
    if text.isdecimal():
        return Value.number(value + _mixed(cursor))
    if (
        "." in text
        and cursor.peek() in _REPEATING
        and digits.isdecimal()
        and cursor.take(cursor.peek(), "{", digits, "}")
    ):
        places = len(text.partition(".")[2])
        return Value.number(value + Fraction(int(digits), 10**places * (10 ** len(digits) - 1)))
    return Value.number(value)


def _mixed(cursor: Cursor) -> Fraction:
    """Reads the fraction of a mixed number, of plain integers. Returns 0 where there is none.

    Raises NoValue for 3\\frac{5}{3}, which is not a mixed number and hardly a product.
    """
    top = bottom = ""
    texts = [cursor.peek(ahead) for ahead in range(7)]
    if texts[0] == "frac" and (texts[1], texts[3], texts[4], texts[6]) == ("{", "}", "{", "}"):
        top, bottom, length = texts[2], texts[5], 7
    elif texts[1] == "/" and cursor.kind() == "number" and cursor.tokens[cursor.at].spaced:
        top, bottom, length = texts[0], texts[2], 3
    if not (top.isdecimal() and bottom.isdecimal()) or _has_operation(cursor, length):
        return Fraction(0)
    if int(top) >= int(bottom):
        raise NoValue("an improper mixed number")
    cursor.at += length
    return Fraction(int(top), int(bottom))


def _has_operation(cursor: Cursor, ahead: int) -> bool:
    """Returns whether a power or a factorial follows, and no degree sign, which is that of the whole number."""
    if cursor.peek(ahead) != "^":
        return cursor.peek(ahead) == "!"
    return cursor.peek(ahead + 1 + (cursor.peek(ahead + 1) == "{")) != "circ"


def _decimal(text: str) -> Fraction:
    """Returns the exact value of a number token."""
    digits, _, exponent = text.casefold().partition("e")
    power = int(exponent or 0)
    if abs(power) > functions.MAX_EXPONENT:
        raise NoValue("exponent too large")
    return Fraction(digits) * Fraction(10) ** power if power else Fraction(digits)
