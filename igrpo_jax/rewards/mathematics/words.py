"""Words in answers: units, phrases such as "no solution", prose, and the names of quantities.

Not here: numbers (`expression`).
"""

import re

from igrpo_jax.rewards.mathematics import units
from igrpo_jax.rewards.mathematics.tokens import FUNCTIONS, GREEK, Cursor, Token, is_enclosed, split
from igrpo_jax.rewards.mathematics.units import Unit

OPERATORS = frozenset(("+", "-", "*", "/", "^", "_", "=", "<", ">", "!", "'", "cup"))
FUNCTION_LETTERS = frozenset("fghFGHP")
EMPTY = "empty set"
REALS = frozenset(("real numbers", "R"))
_NO_SOLUTION = (
    r"(?:there (?:is|are|exists?) |(?:(?:the |this )?(?:equation|system|inequality|problem) |it )?has )?"
    r"(?:no (?:(?:real|such|valid|possible) )*(?:solutions?|roots?|values?)|none)(?: exists?)?"
)
_ENDLESS = r"(?:there are )?(?:infinitely many|(?:an )?infinite number of)(?: solutions)?|infinite solutions"
_MISSING = r"(?:the )?(?:limit )?(?:dne|does not exist|doesn't exist)"
_PHRASES = {
    re.compile(rf"{_NO_SOLUTION}|(?:the )?(?:solution set is )?empty(?: set)?"): EMPTY,
    re.compile(_ENDLESS): "infinitely many",
    re.compile(_MISSING): "does not exist",
    re.compile(r"(?:(?:for )?(?:all|any|every) )?real(?:s| numbers?)|all real x"): "real numbers",
}
_MONTH = re.compile(
    r"\b(jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)(?:uary|ruary|ch|il|ust|ember|ober)?\b", re.IGNORECASE
)
_LABEL = re.compile(r"\s*(?:\\text\w*\{([A-Za-z][a-z ]{2,40}):\s*\}|(\\text\w*\{)?([A-Za-z][a-z ]{2,40}):)(?=.*\S)")
_ROOT = re.compile(r"\b(?:square|cube) root")
_ORDINAL_DAY = r"(\d{1,2})(?:\s?(?:st|nd|rd|th))?"
_DATE = re.compile(rf"(?:(?:the )?{_ORDINAL_DAY}(?: of)? MONTH|MONTH (?:the )?{_ORDINAL_DAY})(?: (\d{{4}}))?")
_PERCENT = frozenset(("percent", "pct", "percentage", "%"))
_CURRENCIES = {
    **{"\\$": "dollar", "€": "euro", "£": "gbp", "¥": "yen", "₹": "rupee"},
    **{"USD": "dollar", "EUR": "euro", "GBP": "gbp"},
}
_SHORT_UNITS = "cm mm km ft in kg lb oz ml mi hr yd sq cu"  # units of two letters that need no \text
_BARE_UNITS = frozenset(_SHORT_UNITS.split())
_QUOTIENT = re.compile(r"[mg]/(?:s|h|min|l|ml|L|mL|m|cm|mol)(?:\^.*)?")
_ORDINALS = frozenset(("st", "nd", "rd", "th"))


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
        folded = " ".join(runs).casefold()
        return next((meaning for phrase, meaning in _PHRASES.items() if phrase.fullmatch(folded)), folded)
    return None


def date(answer: str) -> str | None:
    """Returns one spelling of a day such as "March 5" or "the 5th of March 2020", None for anything else."""
    month = _MONTH.search(answer)
    if not month:
        return None
    text = re.sub(r"(?:\\[a-z]+|[^A-Za-z\d])+", " ", _MONTH.sub("MONTH", answer)).strip()
    match = _DATE.fullmatch(text)
    return f"{month[1][:3]} {int(match[1] or match[2])} {match[3] or ''}".casefold() if match else None


def without_label(answer: str) -> str:
    """Returns the answer behind a label such as "Total:"."""
    label = _LABEL.match(answer)
    name = (label[1] or label[3]).casefold() if label else ""
    if not label or not units.BLOCKED.isdisjoint(name.split()) or is_denied(name) or _ROOT.search(name):
        return answer
    return (label[2] or "") + answer[label.end() :]


def without_unit(tokens: list[Token]) -> tuple[list[Token], Unit, bool]:
    """Returns (the expression, its unit, whether it is in percent)."""
    core, currency = _without_currency(tokens)
    money = (units.read(currency) if currency else None) or units.NONE
    if not any(token.kind in ("letters", "text") or token.text in ("%", "Å") for token in core[1:]):
        return core, money, False
    depth = 0
    for start in range(1, len(core)):
        before = core[start - 1]
        depth += before.opens - before.closes
        if depth > 0 or before.is_in(OPERATORS) or not _may_begin_unit(core, start):
            continue
        text = spelled(core[start:]).strip()
        first, _, rest = text.strip(" .").casefold().partition(" ")
        is_single = first in _PERCENT or core[0].text == "1" or any(t.is_in(("frac", "/")) for t in core[:start])
        if first in _PERCENT and (rest in ("", "points") or units.read(rest, is_single)):
            return core[:start], units.NONE, True
        if first in _ORDINALS and not rest and before.kind == "number":
            return core[:start], units.NONE, False
        if units.is_remark(text):
            return core[:start], money, False
        unit = units.read(f"{currency} {text}" if first in ("per", "a", "an", "/") else text, is_single)
        if unit:
            return core[:start], unit, False
    return _without_ordinal(core), money, False


def _without_currency(tokens: list[Token]) -> tuple[list[Token], str]:
    """Returns (the tokens without signs of money, the name of the currency or "")."""
    signs = [token.text.strip() for token in tokens if token.kind in ("mark", "text", "letters")]
    currency = next((_CURRENCIES[sign] for sign in signs if sign in _CURRENCIES), "")
    return [token for token in tokens if token.text.strip() not in _CURRENCIES] if currency else tokens, currency


def _may_begin_unit(tokens: list[Token], at: int) -> bool:
    """Returns whether a unit may begin at a token: \\text, a word, %, a fraction of units, or °C."""
    token = tokens[at]
    word = token.text.strip()
    if token.kind == "text":
        return (len(word) > 1 or word in units.SYMBOLS) and word.casefold() not in FUNCTIONS
    if token.kind == "letters":
        if word.casefold() in FUNCTIONS or word in GREEK or word == "infty":
            return False
        if len(word) == 1:
            return token.spaced and (word == "a" or bool(_QUOTIENT.fullmatch("".join(t.text for t in tokens[at:]))))
        if len(word) > 2:
            return token.spaced or bool(units.known(word)) or word in _PERCENT
        if word in _ORDINALS and not token.spaced:
            return True
        is_symbol = units.known(word) and (not word.islower() or any(t.text == "/" for t in tokens[at + 1 : at + 2]))
        return word in _BARE_UNITS or (token.spaced and bool(is_symbol or word in ("of", "am", "pm")))
    if token.text == "frac":
        return len(tokens) > at + 2 and tokens[at + 2].kind in ("text", "letters") and _may_begin_unit(tokens, at + 2)
    if token.text == "/":
        return tokens[at + 1].kind == "text" if len(tokens) > at + 1 else False
    if token.text == "Å":
        return tokens[at - 1].text != "Å"  # or a row of them takes quadratic time
    return token.text in ("%", "in") or (token.text == "^" and bool(units.TEMPERATURE.match(spelled(tokens[at:]))))


def spelled(tokens: list[Token]) -> str:
    """Returns the words and marks of a unit."""
    return " ".join(token.text for token in tokens if token.text != "frac")


def _without_ordinal(tokens: list[Token]) -> list[Token]:
    """Returns 3^{rd} and 3^\\text{rd} as 3."""
    texts = [token.text.strip(" {}") for token in tokens]
    if "^" not in texts[1:] or "".join(texts).rpartition("^")[2] not in _ORDINALS:
        return tokens
    return tokens[: len(texts) - 1 - texts[::-1].index("^")]


_DENIED = "not no never cannot wrong incorrect false excluded excluding except invalid impossible extraneous rejected"
_DENIALS = frozenset(_DENIED.split())


def is_denied(name: str) -> bool:
    """Returns whether a name takes back what it names, as in "cannot be x"."""
    return any(word in _DENIALS or word.endswith(("n't", "n’t")) for word in name.casefold().split())


_NAMING = "angle triangle overline overrightarrow vec mathbf mathcal mathbb frac dot bar hat circ cdot langle rangle"
_NAMED_BY = frozenset(_NAMING.split()) | frozenset(("(", ")", "[", "]", "{", "}", "|", ":", "'", "_", ",", "^"))


def are_capitals(tokens: list[Token]) -> bool:
    """Returns whether all letters are in capitals such as MR, or words such as Area, each of which is one name."""
    words = [token for token in tokens if token.kind in ("letters", "text")]
    are_names = all(is_long_name(word) and word.text.strip()[:1].isupper() for word in words)
    return bool(words) and are_names and not any(token.is_in(("_",)) for token in tokens)


# A sum, a limit, a determinant or a function of one argument on the left of an equation names the right side.
_SUMS = frozenset(("sum", "prod", "int", "iint", "oint"))
_OPERATIONS = frozenset(("max", "min", "sup", "det", "deg", "dim", "rank", "tr", "arg", "gcd", "lcm"))
_ANGULAR = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_INVERSE = ["^", "{", "-", "1", "}"]


def is_applied(tokens: list[Token]) -> bool:
    """Returns whether the tokens look like f(x), f'(2), f^{-1}(x), x_p(t) or \\omega(r)."""
    return bool(_argument(tokens))


def _argument(tokens: list[Token]) -> list[Token]:
    """Returns the (x) of f(x), and nothing where the tokens are no application of a function."""
    if not tokens or not (tokens[0].kind == "letters" or tokens[0].is_in(GREEK)):
        return []
    rest = _without_subscripts(tokens[1:])
    if [token.text for token in rest[:5]] == _INVERSE:
        rest = rest[5:]
    while rest and rest[0].is_in(("'",)):
        rest = rest[1:]
    return rest if len(rest) > 2 and rest[0].is_in(("(",)) and is_enclosed(rest) else []


def is_name(tokens: list[Token], value: list[Token]) -> bool:
    """Returns whether the left side of an equation only names the right side: x, a_3, AB, |AB|, f(x), (p, q), Area."""
    if _is_operation(tokens, value):
        return True
    argument = _argument(tokens)
    is_primed = any(token.is_in(("'",)) for token in tokens)
    if argument and tokens[0].text not in FUNCTION_LETTERS and any(token.is_in(OPERATORS) for token in argument):
        return False  # x(x+1) is a product
    for at, token in enumerate(tokens):
        is_behind_name = at > 0 and (tokens[at - 1].kind == "letters" or tokens[at - 1].is_in(("'", "}")))
        if token.is_in(("'",)) and (not is_behind_name or tokens[-1].kind == "letters"):
            return False  # a quotation mark and not a prime
    named = tokens[:1] if argument else _without_subscripts(_without_power(tokens))
    texts = {token.text for token in named}
    if not all(map(_may_name, named)) or ("^" in texts and not texts & {"circ", "prime"}):
        return False
    has_letters = any(token.kind in ("letters", "text") or token.text in GREEK for token in named)
    if not has_letters or (len(tokens) == 1 and tokens[0].text in ("i", "e")):
        return False
    if argument and not is_primed:
        return True
    return not _share_symbols(tokens[:1] if argument else tokens, value)


def _is_operation(tokens: list[Token], value: list[Token]) -> bool:
    r"""Returns whether the tokens are a limit, a sum or a function of one argument, as \tan\theta or \max f(x)."""
    name = tokens[0].text.strip().casefold()
    if name in _SUMS and tokens[0].kind == "command":
        return len(split(tokens, {"+", "-"})[0]) == 1
    if name not in _OPERATIONS | _ANGULAR:
        return tokens[0].is_in(("lim",))
    rest = _without_subscripts(tokens[1:])
    is_matrix = len(rest) > 8 and rest[0].is_in(("begin",)) and rest[-4].is_in(("end",))
    is_one = not rest or is_enclosed(rest) or is_applied(rest) or is_matrix
    is_one |= all(map(_may_name, rest)) and not any(token.is_in(("^", "(", "|")) for token in rest)
    return is_one and not (name in _ANGULAR and (not rest or _share_symbols(rest, value)))


def _without_power(tokens: list[Token]) -> list[Token]:
    """Returns |z|^2 as |z| and A^{-1} as A."""
    texts = [token.text for token in tokens]
    if texts[0] == "|" and texts[-3:] in (["|", "^", texts[-1]], ["{", texts[-2], "}"]):
        at = len(texts) - 1 - texts[::-1].index("|")
        return tokens[: at + 1] if texts[at + 1 : at + 2] == ["^"] else tokens
    return tokens[:-5] if texts[-5:] == _INVERSE and texts[0].strip().isupper() else tokens


def _share_symbols(tokens: list[Token], value: list[Token]) -> bool:
    """Returns whether a name shares a symbol with its value, or ABC is spelled by symbols of it, as in A + B + C."""
    names, symbols = _symbols_of(tokens), _symbols_of(value)
    if len(tokens) == len(value) == 1 and are_capitals(tokens) and are_capitals(value):
        return bool(set("".join(names)) & set("".join(symbols)))  # MR = SRMC
    return bool(names & symbols) or any(len(name) > 1 and set(name) <= symbols for name in names)


def is_long_name(token: Token) -> bool:
    r"""Returns whether a token is one name and no product: capitals such as MR, a word such as Area, \text{MR}."""
    text = token.text.strip()
    if token.kind not in ("letters", "text") or not text.isalpha() or text.casefold() in FUNCTIONS or text in GREEK:
        return False
    return (len(text) > 1 and text.isupper()) or (len(text) >= 4 and text != "infty") or token.kind == "text"


def _may_name(token: Token) -> bool:
    if token.kind in ("letters", "text"):
        denied = not token.text.isupper() and is_denied(token.text)
        return any(map(str.isalpha, token.text)) and token.text.casefold() not in FUNCTIONS and not denied
    return token.text in _NAMED_BY or token.text in GREEK


def _without_subscripts(tokens: list[Token]) -> list[Token]:
    kept, cursor = [], Cursor(tokens)
    while cursor.kind():
        if not cursor.take("_"):
            kept.append(tokens[cursor.at])
            cursor.at += 1
        elif cursor.take("{"):
            cursor.at += next(
                (at + 1 for at, token in enumerate(tokens[cursor.at :]) if token.is_in(("}",))), len(tokens)
            )
        else:
            cursor.at += 1
    return kept


def _symbols_of(tokens: list[Token]) -> set[str]:
    """Returns the letters of an expression, each with its subscript: a_n is another symbol than n."""
    symbols: list[str] = []
    cursor = Cursor(tokens)
    while cursor.kind():
        is_long = is_long_name(cursor.tokens[cursor.at])
        is_behind = cursor.at > 0 and not cursor.tokens[cursor.at - 1].is_in(OPERATORS)  # only there it may be a unit
        is_run = is_long or (cursor.kind() == "letters" and cursor.peek() not in FUNCTIONS)
        text = cursor.next().strip()
        is_unit = is_behind and cursor.peek() != "_" and units.known(text)
        if (is_run and not is_unit) or text in GREEK:
            symbols += [text] if text in GREEK or is_long else list(text)
            if cursor.take("_"):
                symbols[-1] += "_" + _subscript(cursor)
    return set(symbols)


def _subscript(cursor: Cursor) -> str:
    """Returns what stands behind "_": what is in braces, or one letter, number or command."""
    if cursor.kind() == "letters":
        cursor.split_token(1)
    if not cursor.take("{"):
        return cursor.next() if cursor.kind() else ""
    content = ""
    while cursor.kind() and not cursor.take("}"):
        content += cursor.next()
    return content
