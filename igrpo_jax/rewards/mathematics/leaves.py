"""Answers that hold no other answers: an expression with its unit, words, digits in a base, a ratio."""

import math
import re
import string
from fractions import Fraction

from igrpo_jax.rewards.mathematics import exact, expression, names, regions, units, words
from igrpo_jax.rewards.mathematics.exact import NoValue, Value
from igrpo_jax.rewards.mathematics.nodes import Choice, Leaf, Node, Ratio, Region, Words
from igrpo_jax.rewards.mathematics.tokens import GREEK, Token, Unreadable, latex, split

_BASES = {"binary": 2, "ternary": 3, "octal": 8, "decimal": 10, "hexadecimal": 16, "hex": 16}
_BASED = re.compile(
    r"(-?)\(?([A-Za-z]*[0-9][0-9A-Za-z]*?)\)?(?:_\{?\(?(?:base\s*)?(\d{1,2})\)?\}?|\s*(?:in\s*)?\(?\s*(?:in\s*)?"
    rf"(?:base\s*-?(\d{{1,2}})|({'|'.join(_BASES)}))\s*\)?)"
)
_IN_BASE = "BASED "  # words of prose are in lower case, so none equal these
_RESIDUE = re.compile(r"(-?\d{1,30})\(?[pb]?mod[({]*([1-9]\d{0,30})[)}]*")


def based(tokens: list[Token], _: int) -> Node | None:
    """Reads digits in a base, as 204_5 or "204 (base 5)". Returns None for anything else."""
    match = _BASED.fullmatch("".join(token.text for token in tokens).strip())
    if not match:
        return None
    base = _BASES[match[5]] if match[5] else int(match[3] or match[4])
    if match[2] != match[2].upper() and base != 16:
        return None  # 2x_1
    try:
        number = int(match[1] + match[2], base or 1)
    except ValueError:  # a digit that the base lacks, or not a base
        return Words(latex(tokens), match[0])
    text = latex(tokens)
    digits = Words(text, f"{_IN_BASE}{number}")
    return Choice(text, Leaf(text, Value.number(number)), digits) if base == 10 else digits


_BEHIND_RATIO = {"ratio": "", "respectively": "", "in the morning": "am"}
_BEHIND_RATIO |= {"in the afternoon": "pm", "in the evening": "pm"}


def ratio(tokens: list[Token], _: int) -> Node | None:
    """Reads a ratio such as 3:5, or a time of day. Returns None for anything else."""
    parts, colons = split(tokens, {":"})
    if not colons or not all(parts):
        return None
    last = parts[-1]
    is_half_of_day = lambda at: last[at].text in ("a", "p") and last[at + 1 : at + 2] and last[at + 1].text == "."
    end = next((at for at in range(1, len(last)) if words.is_word(last[at]) or is_half_of_day(at)), len(last))
    spelled = "".join(" " * token.spaced + token.text for token in last[end:]).strip(" .")
    unit = "" if units.is_remark(spelled) else _BEHIND_RATIO.get(spelled.casefold(), spelled)
    if unit and not units.read(unit):
        return None  # 3:5 more
    parts[-1] = last[:end]
    return Ratio(latex(tokens), tuple(leaf(part) for part in parts), (units.read(unit) or units.NONE).name)


def congruence(tokens: list[Token], _: int) -> Node | None:
    """Reads x ≡ 2 (mod 5). Returns None for anything else, also for a residue or modulus that is not an integer."""
    sides, signs = split(tokens, {"equiv"})
    if len(signs) != 1 or not all(sides):
        return None
    match = _RESIDUE.fullmatch("".join(token.text.replace(" ", "") for token in sides[1]))
    if not match:
        return None
    return Words(latex(tokens), f"{latex(sides[0])} = {int(match[1]) % int(match[2])} mod {match[2]}")


_AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ([^\W\d_]+)(?: ?[.,]| and)*(?: (?=\d)|$)")
_AMOUNTS = re.compile(rf"(?:{_AMOUNT.pattern}){{2,}}")


def compound(tokens: list[Token]) -> Leaf | None:
    """Reads 2 hours 30 minutes, perhaps with a comma or "and", as 150 minutes. Returns None for anything else.

    It is a whole number of each unit but the last, and less of each than one of the unit before. It equals amounts with
    a unit alone: a number such as 150 does not say which of the units it counts.
    """
    if tokens[0].kind != "number" or tokens[-1].kind not in ("letters", "text"):
        return None
    text = " ".join(" ".join(token.text for token in tokens).split())
    total, before = Fraction(0), units.NONE
    for match in _AMOUNT.finditer(text) if _AMOUNTS.fullmatch(text) else ():
        unit = units.read(match[2]) if units.known(match[2]) else None
        if not unit or (before.name and (unit.name != before.name or total.denominator != 1)):
            return None
        number = Fraction(match[1])
        if before.name and number * unit.scale >= before.scale:
            return None
        total, before = total * (before.scale / unit.scale) + number, unit
    return Leaf(str(total), Value.number(total), before, compound=True) if before.name else None


def leaf(tokens: list[Token], from_text: bool = False) -> Node:
    """Reads an expression with its unit, or words where the text is prose."""
    if amount := compound(tokens):
        return amount
    text = latex(tokens)
    phrase = words.words_of(tokens, from_text)
    if phrase in words.REALS:
        return Region(text, "", regions.EVERYTHING)
    if phrase is not None:
        return Words(text, phrase)
    core, unit, percent = words.without_unit(tokens)
    if not core:
        return Words(text, text)
    parser = expression.Parser(core)
    try:
        value = parser.parse()
    except (NoValue, Unreadable) as error:
        named = [at for at, token in enumerate(core) if token.text in ("begin", "end")]
        if any(words.is_prose(token) for at, token in enumerate(core) if at - 2 not in named):
            return Words(text, " ".join(token.text for token in tokens).casefold())
        hopeless = isinstance(error, NoValue)
        return Leaf(text if hopeless else latex(core), None, unit, percent, hopeless)
    if parser.degrees and not unit.name:
        unit = units.read("degrees")
    return Leaf(latex(core), value, unit, percent)


# The number, in scientific notation too, and the symbol of a unit behind it. Other symbols of two letters are read as
# units alone, or look more like products.
_NUMBER = re.compile(r"-?[\d.]+(?:e[+-]?\d+)?(?:\*10)?(?:\^(?:\{-?\d+\}|\d+))?")
_SYMBOL = re.compile(
    rf"(?:[{''.join(sorted(name for name in units.SYMBOLS if name.isascii()))}]|nm|ns|pc)(?:\^(?:\d|\{{\d\}}))?"
    r"|Omega|mu(?:[A-Z]|[gmls])|M_\{?odot\}?"
)


def with_symbol(tokens: list[Token]) -> Node | None:
    """Reads "10 m" as ten metres or as 10 times m, whichever the other answer means. Returns None for anything else.

    There must be a blank before the letter: 10m is a product alone.
    """
    at = next((at for at, token in enumerate(tokens) if token.kind in ("letters", "command", "text")), 0)
    number, symbol = tokens[:at], tokens[at:]
    if not at or not symbol[0].spaced or symbol[0].kind == "text" or len(symbol) > 5:
        return None
    if not _SYMBOL.fullmatch("".join(token.text.strip() for token in symbol)):
        return None
    if not _NUMBER.fullmatch("".join(token.text for token in number)):
        return None
    amount, unit = leaf(number), units.read(words.spelled(symbol))
    if not isinstance(amount, Leaf) or amount.value is None or not unit:
        return None
    return Choice(latex(tokens), leaf(tokens), Leaf(amount.text, amount.value, unit))


def symbols(node: Node) -> set[str] | None:
    """Returns the symbols of an expression, None if the node is not an expression with a value."""
    return node.value.symbols() if isinstance(node, Leaf) and node.value is not None else None


def result(sides: list[list[Token]]) -> Node | None:
    """Returns the last side of a calculation, as 20 cm^2 of 5 cm * 4 cm = 20 cm^2, and None for anything else.

    All sides must be one number, without regard to the units of those before the last.
    """
    end = _number(sides[-1])
    if end is None:
        return None
    for side in sides[:-1]:
        number = _number(side)
        if number is None or exact.same(number, end) is not True:
            return None
    last = based(sides[-1], 0) or leaf(sides[-1])
    return None if isinstance(last, Words) and not last.words.startswith(_IN_BASE) else last


def _number(side: list[Token]) -> Value | None:
    """Returns the value of one side of a calculation, None where it is no number."""
    digits = based(side, 0)
    if digits:
        spelled = digits.long if isinstance(digits, Choice) else digits
        number = spelled.words.partition(_IN_BASE)[2]
        return Value.number(int(number)) if number else None
    bare = words.without_units(side)
    try:
        value = expression.value_of(bare) if bare else None
    except (NoValue, Unreadable):
        return None
    return None if value is None or value.symbols() else value


_SMALL_LETTERS = GREEK | frozenset(string.ascii_lowercase)


def are_side_by_side(sides: list[list[Token]]) -> bool:
    """Returns whether a letter is followed by sides that are a number and, behind a blank, the next one: x = 1 y = 2.

    1 y may be a product as well, but then the blank is not needed. Other names than single small letters are those of
    a chain, as in P = 4 s = 20, AC = 2 AB = 10 and a_1 = 2 b_1 = 6.
    """
    letters = [sides[0], *map(_next_name, sides[1:])]
    found = {name[0].text for name in letters if len(name) == 1 and name[0].is_in(_SMALL_LETTERS)}
    return len(found) == len(sides) > 1


def _next_name(side: list[Token]) -> list[Token]:
    """Returns the y of 1 y, nothing where what stands before a blank and the last token is no number."""
    *value, last = side
    is_behind_value = value and (value[-1].kind == "number" or value[-1].closes or value[-1].is_in(("!", "|", "circ")))
    return [last] if is_behind_value and last.spaced and symbols(leaf(value)) == set() else []


def agree(a: Leaf, b: Leaf) -> bool:
    """Returns whether two values are equal, one of them possibly in percent."""
    scale = {(True, False): 100, (False, True): Fraction(1, 100)}.get((a.percent, b.percent), 1)
    return bool(exact.same(a.value, Value.number(scale) * b.value))


_ROUNDED = re.compile(r"-?(\d+?)(0*)(?:\.(\d*))?(?:\\cdot 10\^\{?(-?\d{1,3})\}?)?")


def _step(node: Leaf, scale: float, digits: float) -> float:
    """Returns how far a numeral may be from what it is rounded from, infinity if the node is no numeral.

    Decimals may be cut off. An integer is rounded: to hundreds if it ends in two zeros behind at least so many digits.
    """
    match = _ROUNDED.fullmatch(node.text)
    if not match:
        return math.inf
    decimals = len(match[3] or "")
    zeros = len(match[2]) if len(match[1]) >= digits else 0
    exponent = int(match[4] or 0) + (-decimals if decimals else zeros)
    return scale * 10.0 ** min(exponent, 300) * (0.99 if decimals else 0.5)


def approximation(text: str, first: Node, last: Node) -> Node:
    r"""Returns a value and what it is rounded to, as in 100/3 \approx 33.33, either of which may be meant.

    Rounded by more than about 1 %, or to what is no numeral, as 22/7, or to another unit, it is the first alone. Two
    numerals of which neither is the other one rounded are two guesses, which equal nothing.
    """
    if symbols(first) != set() or symbols(last) != set() or not units.agree(first.unit, last.unit):
        return first
    scales = [1.0, float(units.ratio(last.unit, first.unit))]
    if first.percent != last.percent:
        scales[last.percent] /= 100
    numbers = [exact.approximate(node.value) for node in (first, last)]
    if None in numbers or any(number.imag for number in numbers):
        return first
    a, b = (number.real * scale for number, scale in zip(numbers, scales, strict=True))
    apart, of_first = abs(a - b), _step(first, scales[0], math.inf)
    # e^{10} is rounded to 22000, but 100 is another guess than 101 and \frac{202}{2}.
    of_last = _step(last, scales[1], 2 if first.value.constant() is None else math.inf)
    if apart <= 0.0101 * abs(a) and apart <= (of_last if of_last < math.inf else of_first) < math.inf:
        return Choice(text, first, last)
    is_guess = first.unit == last.unit and apart > max(of_first, _step(last, scales[1], 2))
    return Leaf(text, None, hopeless=True) if is_guess else first


def difference(left: list[Token], right: list[Token]) -> Value | None:
    """Returns left side minus right side, None if one of them cannot be read. Raises NoValue."""
    if names.are_capitals(left + right):
        left, right = ([_named(token) for token in side] for side in (left, right))
    try:
        return _side(left) - _side(right)
    except Unreadable:
        return None


def _named(token: Token) -> Token:
    """Returns a run of letters as one name, and any other token as it is."""
    return token._replace(kind="name", text=token.text.strip()) if names.is_long_name(token) else token


def has_words(tokens: list[Token]) -> bool:
    """Returns whether one side of a relation holds words that name no unit. Computer algebra would drop them."""
    return any(map(words.is_prose, tokens)) and len(words.without_unit(tokens)[0]) == len(tokens)


def _side(tokens: list[Token]) -> Value:
    """Returns the value of one side of a relation. g(x) alone is one symbol."""
    if names.is_applied(tokens) and tokens[0].text in names.FUNCTION_LETTERS:
        return Value.symbol(latex(tokens))
    return expression.value_of(tokens)
