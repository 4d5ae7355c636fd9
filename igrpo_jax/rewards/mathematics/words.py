"""Words in answers: units, phrases such as "no solution", prose, and the names of quantities.

Not here: numbers (`expression`).
"""

import re

from igrpo_jax.rewards.mathematics.tokens import FUNCTIONS, GREEK, Token

OPERATORS = frozenset(("+", "-", "*", "/", "^", "_", "=", "<", ">", "!", "'", "cup"))
FUNCTION_LETTERS = frozenset("fghFGHP")
_COUNTED = "zero one two three four five six seven eight nine ten eleven twelve"
NUMBER_WORDS = {word: number for number, word in enumerate(_COUNTED.split())}
EMPTY = "empty set"
REALS = frozenset(("all real numbers", "all reals", "real numbers", "R"))
_PHRASES = {
    **dict.fromkeys(
        ("no solution", "no solutions", "no real solution", "no real solutions", "empty", "empty set"), EMPTY
    ),
    **dict.fromkeys(("the empty set", "none", "no such values"), EMPTY),
    **dict.fromkeys(("dne", "does not exist"), "does not exist"),
}
_UNIT_NAMES = {
    alias: name
    for name, aliases in {
        "cm": "cm centimeter centimetre cms",
        "mm": "mm millimeter millimetre",
        "m": "m meter metre",
        "km": "km kilometer kilometre",
        "in": "inch inche in",
        "ft": "ft foot feet",
        "mile": "mile mi",
        "yd": "yard yd",
        "h": "h hour hr",
        "min": "min minute",
        "s": "s sec second",
        "kg": "kg kilogram",
        "g": "g gram",
        "lb": "lb pound",
        "oz": "oz ounce",
        "l": "l liter litre",
        "ml": "ml milliliter millilitre",
        "dollar": "dollar usd buck",
        "cent": "cent",
        "degree": "degree deg",
        "day": "day",
        "week": "week",
        "month": "month",
        "year": "year yr",
        "unit": "unit",
        "euro": "euro eur",
        "gallon": "gallon gal",
        "mph": "mph",
        "rad": "rad radian",
    }.items()
    for alias in aliases.split()
}
_LONG_UNITS = [name for name in _UNIT_NAMES if len(name) > 2]
_SHORT_BARE_UNITS = "cm mm km ft kg lb lbs oz ml inches square sq cubic cu"
_BARE_UNITS = frozenset([*_LONG_UNITS, *(name + "s" for name in _LONG_UNITS), *_SHORT_BARE_UNITS.split()])
_PERCENT = frozenset(("percent", "pct", "percentage", "%"))
_CURRENCIES = {"\\$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen"}
_RESTRICTING = (
    "is are was were not no nor if when more less fewer most least than about between to except other mod modulo"
)
_NO_UNITS = frozenset(_RESTRICTING.split())  # words after a number that change its meaning
_ORDINALS = frozenset(("st", "nd", "rd", "th"))
_SYMBOLS = "m s g h J N W V L K C F T A Hz"
_SHORT_UNITS = frozenset(_SYMBOLS.split())


def unit_name(text: str) -> str:
    """Returns one spelling of a unit: `Square Centimeters` and `cm^2` are `cm^2`. Other words lose a plural s."""
    words, power = [], ""
    for word in re.findall(r"[^\W\d_]+|\d+|/", re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text.casefold())):
        if word.isdigit() and words:
            words[-1] += word
        elif word in ("square", "sq", "cubic", "cu"):
            power = "2" if word[0] == "s" else "3"
        elif word not in ("of", "the", "a"):
            singular = word if word in _UNIT_NAMES or len(word) < 3 else word.removesuffix("s")
            words.append(_UNIT_NAMES.get(singular, singular) + power)
            power = ""
    return " ".join(words).replace("mile per h", "mph")


def is_prose(token: Token) -> bool:
    """Returns whether a token is a word and not mathematics."""
    if token.kind == "text":
        return bool(re.search(r"[A-Za-z]{2}", token.text)) and token.text.strip() not in FUNCTIONS
    known = token.text.casefold() in FUNCTIONS or token.text in GREEK
    return token.kind == "letters" and len(token.text) >= 4 and not known and token.text != "infty"


def words_of(tokens: list[Token], from_text: bool) -> str | None:
    """Returns the words of an answer that consists of words, None for mathematics."""
    if len(tokens) == 1 and tokens[0].text == "varnothing":
        return EMPTY
    if len(tokens) == 4 and tokens[0].text == "mathbb" and tokens[2].text == "R":
        return "R"
    if not any(token.kind in ("letters", "text") for token in tokens):
        return None
    runs = []
    for token in tokens:
        if token.kind in ("letters", "text"):
            runs += re.findall(r"[^\s.,;:!?()\"]+", token.text)
        elif token.text not in ("-", "'", ".", "\\"):
            return None
    if any(run.casefold() in FUNCTIONS or run in ("pi", "infty", "infinity", "inf") for run in runs):
        return None
    length = sum(map(len, runs))
    if length == 1:
        return None
    capital = any(len(run) > 1 and run.isupper() for run in runs)
    if from_text or length > 3 or capital or any(token.kind == "text" for token in tokens):
        words = " ".join(runs)
        folded = words.casefold()
        return _PHRASES.get(folded, folded)
    return None


def without_unit(tokens: list[Token]) -> tuple[list[Token], str, bool]:
    """Returns (the expression, its unit, whether it is in percent)."""
    core, currency = _without_currency(tokens)
    texts = [token.text for token in core]
    if texts[-1:] == ["%"]:
        return core[:-1], currency, True
    end, power = len(core), ""
    for exponent in ("2", "3"):
        for tail in (["^", exponent], ["^", "{", exponent, "}"]):
            if texts[-len(tail) :] == tail and len(core) > len(tail):
                end, power = len(core) - len(tail), exponent
    start = _start_of_unit(core, end)
    if start == end:
        return _without_ordinal(core), currency, False
    unit = " ".join(token.text for token in core[start:end]).strip().strip(".").casefold()
    if unit in _PERCENT and not power:
        return core[:start], currency, True
    if unit in _ORDINALS and core[start - 1].kind == "number":
        return core[:start], currency, False
    return core[:start], unit_name(unit) + power, False


def _without_currency(tokens: list[Token]) -> tuple[list[Token], str]:
    """Returns (the tokens without signs of money, the currency or "")."""
    signs = [token.text.strip() for token in tokens if token.kind in ("mark", "text")]
    currencies = [_CURRENCIES[sign] for sign in signs if sign in _CURRENCIES]
    if not currencies:
        return tokens, ""
    return [token for token in tokens if token.text.strip() not in _CURRENCIES], currencies[0]


def _start_of_unit(tokens: list[Token], end: int) -> int:
    """Returns where the unit that ends at `end` begins: any words after a number, known units and \\text elsewhere."""
    start, known = end, True
    while start > 1 and not tokens[start - 2].is_in(OPERATORS):
        token = tokens[start - 1]
        word = token.text.strip().casefold()
        if token.kind == "text":
            if len(word) < 2 and token.text.strip() not in _SHORT_UNITS:
                break
        elif token.kind != "letters" or word in FUNCTIONS or token.text in GREEK:
            break
        elif word not in _BARE_UNITS | _PERCENT and not (word in _ORDINALS and not token.spaced):
            if not token.spaced or (len(word) < 3 and not (word in ("a", "an", "of", "in") and start < end)):
                break
            known = False
        start -= 1
    unit_words = {word for token in tokens[start:end] for word in re.findall("[a-z]+", token.text.casefold())}
    return end if unit_words & _NO_UNITS or not (known or tokens[start - 1].kind == "number") else start


def _without_ordinal(tokens: list[Token]) -> list[Token]:
    """Returns 3^{rd} and 3^\\text{rd} as 3."""
    texts = [token.text.strip() for token in tokens]
    if len(texts) > 2 and texts[-2] == "^" and texts[-1] in _ORDINALS:
        return tokens[:-2]
    if len(texts) > 4 and texts[-4:-2] == ["^", "{"] and texts[-2] in _ORDINALS:
        return tokens[:-4]
    return tokens


_NAMING = "angle triangle overline overrightarrow vec mathbf mathcal frac dot bar hat circ cdot"
_NAMED_BY = frozenset(_NAMING.split()) | frozenset(("(", ")", "[", "]", "{", "}", "|", ":", "'", "_", ",", "^"))


def is_applied(tokens: list[Token]) -> bool:
    """Returns whether the tokens look like f(x) or f^{-1}(x)."""
    if [token.text for token in tokens[1:6]] == ["^", "{", "-", "1", "}"]:  # an inverse function
        tokens = [tokens[0], *tokens[6:]]
    return len(tokens) > 3 and tokens[0].kind == "letters" and tokens[1].text == "(" and tokens[-1].text == ")"


def is_name(tokens: list[Token], value: list[Token]) -> bool:
    """Returns whether the left side of an equation only names the right side: x, a_3, AB, |AB|, f(x), (p, q), Area."""
    applied = is_applied(tokens)
    if applied and tokens[0].text not in FUNCTION_LETTERS and any(token.is_in(OPERATORS) for token in tokens):
        return False  # x(x+1) is a product
    for at, token in enumerate(tokens):
        if token.is_in(("'",)) and (tokens[at - 1].kind != "letters" or tokens[-1].kind == "letters"):
            return False  # a quotation mark and not a prime
    named = tokens[:1] if applied else _without_subscripts(tokens)
    texts = {token.text for token in named}
    if not all(_may_name(token) for token in named) or ("^" in texts and not texts & {"circ", "prime"}):
        return False
    if not any(token.kind in ("letters", "text") or token.text in GREEK for token in named):
        return False
    if len(tokens) == 1 and tokens[0].text in ("i", "e"):
        return False
    return applied or not (_letters_of(tokens) & _letters_of(value))


def _may_name(token: Token) -> bool:
    if token.kind in ("letters", "text"):
        return token.text.casefold() not in FUNCTIONS
    return token.text in _NAMED_BY or token.text in GREEK


def _without_subscripts(tokens: list[Token]) -> list[Token]:
    kept, at = [], 0
    while at < len(tokens):
        if tokens[at].is_in(("_",)):
            braced = tokens[at + 1 : at + 2] and tokens[at + 1].is_in(("{",))
            while braced and at < len(tokens) and not tokens[at].is_in(("}",)):
                at += 1
            at += 1 if braced else 2
        else:
            kept.append(tokens[at])
            at += 1
    return kept


def _letters_of(tokens: list[Token]) -> set[str]:
    names = set()
    for token in tokens:
        if token.kind == "letters" and token.text not in FUNCTIONS and token.text not in _BARE_UNITS:
            names |= set(token.text)
        elif token.text in GREEK:
            names.add(token.text)
    return names
