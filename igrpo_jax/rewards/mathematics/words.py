"""Words in answers: units, phrases such as "no solution", and prose.

Not here: numbers (`expression`), the names of quantities (`names`).
"""

import re

from igrpo_jax.rewards.mathematics import units
from igrpo_jax.rewards.mathematics.tokens import FUNCTIONS, GREEK, Token
from igrpo_jax.rewards.mathematics.units import Unit

OPERATORS = frozenset(("+", "-", "*", "/", "^", "_", "=", "<", ">", "!", "'", "cup"))
EMPTY = "empty set"
REALS = frozenset(("real numbers", "R"))
_SHORT = frozenset(("yes", "no", "odd"))  # words, and no products of letters
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
_FOR_ALL = re.compile(
    r"\\forall(?![A-Za-z])|(?:\\(?:text|textrm|mbox|mathrm)\s*\{[\s,]*|\b)for (?:all|every|any|each)\b", re.IGNORECASE
)
_OF_FUNCTION = re.compile(r"[\s$]*\\?[A-Za-z]+\s*\(\s*([a-z])\s*\)\s*=")
_DOMAINS = {
    **{word: word for word in ("positive", "nonnegative", "natural", "rational", "complex", "integer", "real")},
    **{"integers": "integer", "reals": "real", "N": "natural", "Z": "integer", "Q": "rational", "R": "real"},
    "C": "complex",
}
_DOMAIN = frozenset([*_DOMAINS, "number", "numbers", "value", "values", "of", "in", "mathbb", "text"])
_DOMAIN_WORD = re.compile(r"[A-Za-z]+")
_SPACE_AT_END = re.compile(r"(?:[\s,~]|\\[,;:! ]|\\q?quad)+$")
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
_PER = ("per ", "a ", "an ", "/ ")
_VOWEL = re.compile(r"[aeiouy]", re.IGNORECASE)
_ORDINALS = frozenset(("st", "nd", "rd", "th"))
# Of "5 more minutes": it leaves a whole number of counted things as it is. "1/2 more" and "2 more times" are factors.
_MORE = re.compile(r"^more\s+(?!/|(?:times|an?|per)\b)", re.IGNORECASE)


def is_prose(token: Token) -> bool:
    """Returns whether a token is a word and not mathematics."""
    if token.kind == "text":
        return bool(re.search(r"[A-Za-z]{2}", token.text)) and token.text.strip() not in FUNCTIONS
    known = token.text.casefold() in FUNCTIONS or token.text in GREEK
    return token.kind == "letters" and len(token.text) >= 4 and not known and token.text != "infty"


def is_word(token: Token) -> bool:
    """Returns whether a token is a word, or a unit of several letters that needs no \\text, as min."""
    if token.kind == "text" or is_prose(token):
        return True
    return token.kind == "letters" and len(token.text) > 1 and bool(units.known(token.text))


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
    is_word = any((len(run) > 1 and run.isupper()) or run.casefold() in _SHORT for run in runs)
    if from_text or length > 3 or is_word or any(token.kind == "text" for token in tokens):
        folded = " ".join(runs).casefold()
        phrase = " ".join(_without_article(runs)).casefold()
        return next((meaning for known, meaning in _PHRASES.items() if known.fullmatch(folded)), phrase)
    return None


def _without_article(runs: list[str]) -> list[str]:
    """Returns "an ellipse" as "ellipse". A B, "the BC" and "a third" stay: they may be letters, names and numbers."""
    if len(runs) < 2 or runs[0].casefold() not in ("a", "an", "the"):
        return runs
    # "a xyz" and "a mgh" are products.
    least = 3 if runs[0].casefold() == "the" else 5
    is_noun = len(runs[1]) >= least and _VOWEL.search(runs[1]) and not runs[1].isupper()
    is_noun = is_noun and runs[1].casefold() not in units.BLOCKED
    return runs[1:] if is_noun else runs


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


def without_domain(answer: str) -> tuple[str, str]:
    r"""Returns (f(x) = x, "real") for "f(x) = x for all real x" or f(x) = x, \forall x \in \mathbb{R}.

    The domain is "" if it is not stated. Any other answer is returned as it is: only the equation of a function says
    for which values of its argument it holds, and says nothing else thereby.
    """
    found, head = _FOR_ALL.search(answer), _OF_FUNCTION.match(answer)
    stated = set(_DOMAIN_WORD.findall(answer, found.end())) if found and head else set()
    if not head or head[1] not in stated or not stated <= _DOMAIN | {head[1]}:
        return answer, ""
    if _DOMAIN_WORD.sub("", answer[found.end() :]).strip(" \\{}$.,~;:!"):
        return answer, ""
    kinds = sorted({_DOMAINS[word] for word in stated if word in _DOMAINS})
    return _SPACE_AT_END.sub("", answer[: found.start()]), " ".join(kinds)


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
        text = _MORE.sub("", text) if start == 1 and before.text.isdigit() else text
        unit = units.read(_of_money(text, currency), is_single)
        if unit:
            return core[:start], unit, False
    return _without_ordinal(core), money, False


def without_units(tokens: list[Token]) -> list[Token] | None:
    """Returns a calculation without the units behind its numbers, None where other words are in it.

    In "50% of 60" and "10 x 3" the words are operations.
    """
    tokens, currency = _without_currency(tokens)
    kept: list[Token] = []
    at = 0
    while at < len(tokens):
        token, following = tokens[at], tokens[at + 1 : at + 2]
        is_behind_number = bool(kept) and (kept[-1].kind == "number" or kept[-1].closes)
        length = 1
        if is_behind_number and token.is_in(("%",)):
            is_of = bool(following) and following[0].text.strip() == "of"
            kept += [*_HUNDREDTH, *_TIMES] if is_of else _HUNDREDTH
            length += is_of
        elif is_behind_number and token.is_in(("x",)) and token.spaced and following and following[0].kind == "number":
            kept += _TIMES
        elif is_behind_number and (length := _unit_length(tokens, at)):
            text = spelled(tokens[at : at + length])
            if not units.read(_of_money(text, currency), is_single=kept[-1].text == "1"):
                return None
        else:
            kept.append(token)
        at += max(length, 1)
    return kept


_TIMES = [Token("mark", "*", False)]
_HUNDREDTH = [Token("mark", "/", False), Token("number", "100", False)]
_EXPONENT = re.compile(r"\^(?:\d|\{\d\})")


def _is_unit_word(token: Token) -> bool:
    word = token.text.strip()
    is_word = word[:1].isalpha() and (len(word) > 1 or (token.kind == "text" and word in units.SYMBOLS))
    return token.kind in ("letters", "text") and is_word


def _unit_length(tokens: list[Token], start: int) -> int:
    """Returns how many tokens the unit has that begins there: words, those behind "/", and exponents of one digit."""
    at = start
    while at < len(tokens):
        is_per = tokens[at].is_in(("/",)) and len(tokens) > at + 1
        exponent = _EXPONENT.match("".join(token.text for token in tokens[at : at + 4])) if at > start else None
        if not (exponent or _is_unit_word(tokens[at + is_per])):
            break
        at += (4 if "{" in exponent[0] else 2) if exponent else 1 + is_per
    return at - start


def _of_money(text: str, currency: str) -> str:
    """Returns "dollar per hour" for the "per hour" behind an amount of dollars."""
    return f"{currency} {text}" if text.lstrip(" .").casefold().startswith(_PER) else text


def _without_currency(tokens: list[Token]) -> tuple[list[Token], str]:
    """Returns (the tokens without signs of money, the name of the currency or "")."""
    signs = [token.text.strip() for token in tokens if token.kind in ("mark", "text", "letters")]
    currency = next((_CURRENCIES[sign] for sign in signs if sign in _CURRENCIES), "")
    return [token for token in tokens if token.text.strip() not in _CURRENCIES] if currency else tokens, currency


def _may_begin_unit(tokens: list[Token], at: int) -> bool:
    """Returns whether a unit may begin at a token: \\text, a word, %, a fraction of units, or °C."""
    token = tokens[at]
    word = token.text.strip()
    # Without an argument behind it, sec is a second and no secant.
    is_function = word.casefold() in FUNCTIONS and not (at == len(tokens) - 1 and units.known(word))
    if token.kind == "text":
        return (len(word) > 1 or word in units.SYMBOLS) and not is_function
    if token.kind == "letters":
        if is_function or word in GREEK or word == "infty":
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
        return len(tokens) > at + 1 and (tokens[at + 1].kind == "text" or _may_be_under_slash(tokens, at + 1))
    if token.text == "(":  # 204 (minutes)
        is_alone = token.spaced and tokens[at - 1].kind == "number" and tokens[-1].is_in((")",))
        return is_alone and is_word(tokens[at + 1]) and bool(units.known(tokens[at + 1].text.split()[0]))
    if token.text == "Å":
        return tokens[at - 1].text != "Å"  # or a row of them takes quadratic time
    return token.text in ("%", "in") or (token.text == "^" and bool(units.TEMPERATURE.match(spelled(tokens[at:]))))


def _may_be_under_slash(tokens: list[Token], at: int) -> bool:
    """Returns whether a token behind "/" is a word and no product, as in 18/day. Behind a number, kg is one too."""
    word = tokens[at].text
    if not is_word(tokens[at]) or (word in FUNCTIONS and at < len(tokens) - 1):
        return False
    return len(word) > 2 or (word in _BARE_UNITS and tokens[at - 2].kind == "number")


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
