r"""Derivatives, each of which is one symbol: \frac{d^2 x}{d t^2}, dx/dt, \frac{\mathrm{d}x}{\mathrm{d}t}, \dot x.

A dot stands for the derivative by t: \dot{x} is dx/dt. Not here: derivatives that are to be worked out, as
\frac{d}{dx}(x^2).
"""

import re

from igrpo_jax.rewards.mathematics.exact import UNIT, Value
from igrpo_jax.rewards.mathematics.tokens import FUNCTIONS, GREEK, Cursor, Token, Unreadable, latex

_DOTS = {"dot": 1, "ddot": 2}
_MAX_TOKENS = 24  # of a derivative
_NAMES = FUNCTIONS | GREEK
_D = "(?P<{}>d|partial)"
_ORDER = r"(?: \^(?: \{{)? (?P<{0}>\d)(?: \}})?)?"
_VARIABLE = rf"(?:[A-Za-z]|{'|'.join(GREEK)})(?: _ (?:\w+|\{{(?: \w+)* \}}))?"
_TOP = rf"{_D.format('sign')}{_ORDER.format('order')} (?P<of>{_VARIABLE})"
_BOTTOM = rf"(?P=sign) (?P<by>{_VARIABLE}){_ORDER.format('again')}"
_FRACTION = re.compile(rf"\{{ {_TOP} \}} \{{ {_BOTTOM} \}} ")
_QUOTIENT = re.compile(rf"{_TOP} / {_BOTTOM} ")
_LATEX_D = r"(?:d|\\partial |\\text\{d\})"
_UNREAD = re.compile(
    rf"\\frac ?\{{{_LATEX_D}((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}"
    rf"\{{(?:{_LATEX_D} ?(?:([A-Za-z])|\\[A-Za-z]+ )(?:\^(?:\d|\{{\d\}}))?)+\}}"
)
_NAMED = re.compile(r"d(?P<order>[123])/d(?P<by>[a-z])(?P=order) (?P<of>\w+)")  # as `_symbol` names them
_SYMBOL = re.compile(r"(?<!\\)\b[A-Za-z]+")


def fraction(cursor: Cursor) -> str | None:
    r"""Reads the two arguments of \frac. Returns the derivative's symbol, None (without moving) for anything else.

    Raises Unreadable for a derivative of another form.
    """
    if not _may_begin(cursor.tokens[cursor.at + 1 : cursor.at + 2]):
        return None
    symbol = _read(cursor, _FRACTION)
    if not symbol and _UNREAD.match(latex(cursor.tokens[cursor.at - 1 : cursor.at + _MAX_TOKENS])):
        raise Unreadable
    return symbol


def quotient(cursor: Cursor) -> str | None:
    """Reads dx/dt. Returns the derivative's symbol, None (without moving) for anything else."""
    return _read(cursor, _QUOTIENT) if _may_begin(cursor.tokens[cursor.at : cursor.at + 1]) else None


def dotted(accent: str, variable: str) -> str:
    r"""Returns the symbol of \dot{x} or \ddot{x}, and of other accents, such as \hat{x}, a symbol of their own."""
    return _symbol("d", _DOTS[accent], "t", variable) if accent in _DOTS else f"{accent} {variable}"


def primed(value: Value, others: set[str]) -> Value:
    """Returns an equation with y' instead of dy/dt, if it may be compared with one in y' that has the other symbols.

    All derivatives must be by one variable, and y' = 2x, which is likely dy/dx, is not compared with dy/dt.
    """
    found = {name: match for name in value.symbols() if (match := _NAMED.fullmatch(name))}
    variables = {match["by"] for match in found.values()}
    if len(variables) != 1 or not (variables <= others or others.isdisjoint({"x", "t"} - variables - _of(found))):
        return value
    names = {name: match["of"] + "'" * int(match["order"]) for name, match in found.items()}
    renamed = lambda symbols: tuple(sorted((names.get(name, name), power) for name, power in symbols))
    top, bottom = (
        {(imaginary, roots, renamed(symbols)): c for (imaginary, roots, symbols), c in part.items()}
        for part in (value.numerator, value.denominator)
    )
    return Value(top, UNIT if value.denominator is UNIT else bottom, value.opaque)


def _of(found: dict[str, re.Match]) -> set[str]:
    """Returns what is differentiated."""
    return {match["of"] for match in found.values()}


def is_misread(answer: str) -> bool:
    r"""Returns whether LaTeX holds a derivative that computer algebra would take for 0.

    It works out \frac{d}{dx}x^2, but dy/dx is 0 there: any symbol beside x is a constant.
    """
    symbols = set("".join(_SYMBOL.findall(answer))) - {"d"}
    return any(match[1] or symbols != {match[2]} for match in _UNREAD.finditer(answer))


def _symbol(sign: str, order: int, by: str, of: str) -> str:
    """Returns one name for all notations. What is differentiated stands last: a subscript or a prime may follow it."""
    return f"{sign}{order}/{sign}{by}{order} {of}"


def _may_begin(tokens: list[Token]) -> bool:
    return any(token.text.lstrip()[:1] == "d" or token.text == "partial" for token in tokens)


def _read(cursor: Cursor, pattern: re.Pattern) -> str | None:
    text, ends = "", {}  # ends: how long the text is behind a token -> the position of the next token
    for at, token in enumerate(cursor.tokens[cursor.at : cursor.at + _MAX_TOKENS], start=cursor.at + 1):
        text += " ".join(_pieces(token)) + " "
        ends[len(text)] = at
    match = pattern.match(text)
    if not match or match["order"] != match["again"] or match.end() not in ends:
        return None
    cursor.at = ends[match.end()]
    of, by = (re.sub(r"[ {}]", "", match[name]) for name in ("of", "by"))
    return _symbol(match["sign"], int(match["order"] or 1), by, of)


def _pieces(token: Token) -> list[str]:
    """Returns the letters of a run of letters, and any other token as it is."""
    text = token.text.strip()
    if token.kind in ("letters", "text") and text.isalpha() and text not in _NAMES:
        return list(text)
    return [text if token.kind != "text" else "?"]
