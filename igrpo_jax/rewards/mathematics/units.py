"""Units of measurement and counted things: the words after a number that leave its value as it is.

    read("km/h") == read("kilometers per hour") == Unit("m s-1", 5/18)    read("red apples") == Unit("red apple", 1)
    read("squared") == read("or more") == None

A unit is known, or it is a noun: words none of which can change a number, with a plural among them.
Not here: where in an answer the unit is (`words`).
"""

import re
import string
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from igrpo_jax.rewards.mathematics.spoken import NUMBER_WORDS, OPERATION_WORDS


class Unit(NamedTuple):
    """What is measured or counted, as powers of base units or as a noun, and how many of these make up the unit."""

    name: str
    scale: Fraction


NONE = Unit("", Fraction(1))
_METRIC = """m meter metre = 1 m | g gram gramme = 1 g | s sec second = 1 s | L l liter litre = 1/1000 m3
J joule = 1000 g m2 s-2 | N newton = 1000 g m s-2 | W watt = 1000 g m2 s-3 | Pa pascal = 1000 g m-1 s-2
Hz hertz = 1 s-1 | A amp ampere = 1 A | C coulomb = 1 A s | V volt = 1 V | K kelvin = 1 K | mol mole = 1 mol
eV electronvolt = 1 eV | cal calorie = 1 cal | T tesla = 1 T | F farad = 1 F | ohm = 1 ohm
erg = 1/10000 g m2 s-2 | pc parsec = 1 pc"""
_OTHER = """h hr hour = 3600 s | min minute = 60 s | day = 86400 s | week wk = 604800 s | month = 1 month
year yr = 12 month | decade = 120 month | century centuries = 1200 month | in inch = 1 in | ft foot feet = 12 in
mi mile = 63360 in | acre = 6272640 in2 | ha hectare = 10000 m2 | cc = 1/1000000 m3 | tonne = 1000000 g
lb lbs = 1 lb | pound = 1 pound | oz ounce = 1 oz | ton = 1 ton | gal gallon = 1 gal | qt quart = 1/4 gal
pt pint = 1/8 gal | cup = 1/16 gal | tbsp tablespoon = 1 tbsp | tsp teaspoon = 1/3 tbsp | cent = 1 cent
dollar usd buck = 100 cent | euro eur = 1 euro | gbp sterling = 1 gbp | yen jpy = 1 yen | yuan rmb cny = 1 yuan
rupee inr rs = 1 rupee | won = 1 won | peso = 1 peso | ruble rouble = 1 ruble | franc = 1 franc | krona = 1 krona
degree deg = 1 degree | celsius = 1 celsius | fahrenheit = 1 fahrenheit | rad radian = 1 rad | unit = 1 unit
mph = 63360/3600 in s-1 | kph kmh kmph = 1000/3600 m s-1 | fps = 12 in s-1 | knot = 1 knot | rpm = 1 rpm
KB = 1/1000 MB | MB = 1 MB | GB = 1000 MB | kWh = 3600000000 g m2 s-2 | am = 1 am | pm = 1 pm
Å angstrom = 1/10000000000 m | atm = 101325000 g m-1 s-2 | AU = 1 AU | amu = 1 amu | arcsec arcsecond = 1/3600 degree
arcmin arcminute = 1/60 degree | solarmass = 1 solarmass | yd yard = 36 in"""
_PREFIXES = """k kilo 1000 | c centi 1/100 | m milli 1/1000 | d deci 1/10 | h hecto 100 | M mega 1e6 | μ micro 1e-6
G giga 1e9 | n nano 1e-9 | T tera 1e12"""
_CHANGING = """is are was were be been being isn aren wasn not no nor neither never none nothing cannot can could may
might must shall should will would won don doesn does do did didn has have had if when unless except without with but
and or else either more less few fewer fewest greater greatest smaller smallest higher highest lower lowest larger
largest bigger most least max maximum minimum than about approx approximately around nearly almost roughly beyond under
above below up down upward upwards downward downwards onward onwards opposite inverse reciprocal conjugate complement
double doubled triple tripled quadruple twice thrice halved exponent log logarithm mod modulo remainder base binary
ternary octal decimal hex hexadecimal percent percentage percentile mille mil permille added subtracted reduced
increased decreased raised rounded negated inverted another other between through until till from since before after
past by wrong incorrect false impossible invalid extraneous rejected reject fails seems becomes exceeds equals equal
works gives yields lacks misses contradicts violates divides itself bc remains undefined unknown repeating recurring
repeated off short late instead rather infinite infinity infinitely too so perhaps versus besides always over score
gross grand lots ago first it this that these which there only excluding including north south east west ones twos
threes fours fives sixes sevens eights nines st nd rd th backward backwards"""
BLOCKED = frozenset(_CHANGING.split()) | NUMBER_WORDS | (OPERATION_WORDS - {"times"})  # these may change the number
_PLURALS = "people children men women mice fish sheep geese teeth dice data vertices indices"
_IRREGULAR = tuple(_PLURALS.split())  # goldfish and grandchildren too
_PER = frozenset(("/", "per", "a", "an"))
_CAPITALS = frozenset(string.ascii_uppercase)  # A/B is no unit
_POWERS_OF_TEN = re.compile(r"\borders?[\s-]+of[\s-]+magnitude", re.IGNORECASE)
_OF_DIGITS = re.compile(rf"\b(?:\d+|{'|'.join(NUMBER_WORDS)})\s?-\s?digit\s+(?=[A-Za-z])", re.IGNORECASE)
_POWERS = {"squared": 2, "cubed": 3, "square": 2, "sq": 2, "cubic": 3, "cu": 3}
# A name that stands for several units is equal to each of them.
_AMBIGUOUS = (("pound", "lb"), ("pound", "gbp"), ("degree", "celsius"), ("degree", "fahrenheit"))
# Words that add nothing, with an article behind them: an article alone is "per", as in "18 a day".
_FILLERS = re.compile(
    r"\b(?:(?:of|for|on|at|in(?=\s+[A-Za-z]))(?:\s+an?\b)?|the|total|altogether|each|all|long|tall|wide|high|deep|old"
    r"|positive)\b",
    re.IGNORECASE,
)
_REMARK = re.compile(r"in all|(?:in )?total|altogether|each|left(?: over)?|remaining|profit", re.IGNORECASE)
_WORDS = re.compile(r"\^[\s{(]*(-?)\s*(\d)[\s})]*|[^\W\d_]+(\d?)|[^\s\w]|\d+")
_COMMANDS = re.compile(r"\\(?:[dt]?frac|cdot|times|[,;: ])")
# Units that LaTeX writes as commands: \Omega, \mu m, M_\odot.
_WRITTEN = (
    (re.compile(r"\\?\bmu\s+(?=[A-Za-z])"), "μ"),
    (re.compile(r"\\?\bOmega\b"), "ohm"),
    (re.compile(r"\bM\s?_\s?\{?\s?\\?odot\b\s?\}?"), "solarmass"),
)
_QUOTIENT = re.compile(r"\}\s*\{")  # of the arguments of \frac
_HALF_OF_DAY = re.compile(r"\b([ap])\.\s?m\b\.?", re.IGNORECASE)
_DEGREE = r"(?:\bdegrees?|\^ ?(?:\{ ?)?\\?circ(?: ?\})?)\s+"
TEMPERATURE = re.compile(rf"{_DEGREE}(?:(c|celsius)|f|fahrenheit)\b", re.IGNORECASE)


def _known() -> dict[str, tuple[Fraction, dict[str, int]]]:
    """Returns (scale, powers of base units) of each name. Long names are without case, symbols are as they are."""
    known: dict[str, tuple[Fraction, dict[str, int]]] = {}
    prefixes = [prefix.split() for prefix in re.split(r"[|\n]", _PREFIXES)]
    for entry in re.split(r"[|\n]", f"{_METRIC}\n{_OTHER}"):
        names, _, definition = entry.partition("=")
        scale, *bases = definition.split()
        powers = {base.rstrip("-1234"): int(base.lstrip(string.ascii_letters) or 1) for base in bases}
        for name in names.split():
            known[name] = Fraction(scale), powers
            for letter, prefix, factor in prefixes if entry in _METRIC else ():
                written = prefix if len(name) > 3 else letter
                known.setdefault(written + name, (Fraction(scale) * Fraction(factor), powers))
    return known


_KNOWN = _known()
SYMBOLS = frozenset(name for name in _KNOWN if len(name) == 1)


def known(word: str) -> tuple[Fraction, dict[str, int]] | None:
    """Returns (scale, powers of base units) of the name or symbol of a unit, None for another word."""
    if word in _KNOWN or len(word) == 1:
        return _KNOWN.get(word)
    folded = word.casefold()
    singular = folded[:-2] if folded.endswith("ches") else folded.removesuffix("s")
    return _KNOWN.get(folded) or (_KNOWN.get(singular) if len(singular) > 1 else None)


def is_remark(text: str) -> bool:
    """Returns whether words alone behind a number, such as "in total", name no unit and leave the number as it is."""
    return bool(_REMARK.fullmatch(text.strip(" .")))


def read(text: str, is_single: bool = False) -> Unit | None:
    """Returns the unit that the words after a number name, None if they may change the number or name nothing.

    With `is_single` (after 1, a fraction or a percentage) the noun may be in the singular: "of the cake".
    """
    if _POWERS_OF_TEN.search(text):
        return None
    for pattern, name in _WRITTEN:
        text = pattern.sub(name, text)
    text = _OF_DIGITS.sub(" ", _FILLERS.sub(" ", _HALF_OF_DAY.sub(r"\1m", _COMMANDS.sub(" ", text))))
    text = TEMPERATURE.sub(lambda match: "celsius" if match[1] else "fahrenheit", _QUOTIENT.sub("}/{", text))
    powers: Counter[str] = Counter()  # of base units and nouns
    nouns: dict[int, list[str]] = {1: [], -1: []}  # words that are not known units, above and below "per"
    scale, sign, outer, modifier = Fraction(1), 1, 1, 1
    counts, last = False, None
    for match in _WORDS.finditer(text):
        word, folded = match[0], match[0].casefold()
        if folded in _PER and word != "A":
            sign = -outer
        elif word in ("(", "{", ")", "}"):
            outer = sign = sign if word in "({" else 1
        elif folded in ("square", "sq", "cubic", "cu"):
            modifier = _POWERS[folded]
        elif word[0] == "^" or folded in _POWERS:
            if last is None or word == "^":
                return None
            exponent = _POWERS.get(folded) or int(match[1] + match[2])
            scale *= last[0] ** (last[2] * (exponent - 1))
            powers.update({base: power * last[2] * (exponent - 1) for base, power in last[1].items()})
            last = None
        elif not word[0].isalpha():
            if word not in "*·-.,\\~$":
                return None
        elif (unit := known(word.rstrip("23"))) and not (len(word) == 1 and nouns[1]):
            exponent = sign * modifier * int(match[3] or 1)
            scale *= unit[0] ** exponent
            powers.update({base: power * exponent for base, power in unit[1].items()})
            last, sign, modifier, counts = (*unit, sign), outer, 1, True
        elif folded in BLOCKED or match[3] or "illionth" in folded or (sign < 0 and not unit and word in _CAPITALS):
            return None
        else:
            plural = folded.endswith("s") and not folded.endswith(("ss", "us", "is")) and len(folded) > 2
            single = is_single and len(word) > 1 and not folded.endswith(("ed", "ing", "ly"))
            counts |= sign == 1 and (plural or single or folded.endswith(_IRREGULAR))
            nouns[sign].append(folded.removesuffix("s"))
            last = None
    if nouns[1] and not any(power > 0 for power in powers.values()):  # behind a unit, nouns say only what is measured
        powers[" ".join(nouns[1])] += modifier
    if nouns[-1]:
        powers[" ".join(nouns[-1])] -= 1
    name = " ".join(f"{base}{power if power != 1 else ''}" for base, power in sorted(powers.items()) if power)
    return Unit(name, scale) if counts else None


def agree(a: Unit, b: Unit) -> bool:
    """Returns whether two units measure the same thing, perhaps on another scale. A missing unit is forgiven."""
    names = {a.name, b.name}
    return len(names) == 1 or "" in names or any({name, other} == names for name, other in _AMBIGUOUS)


def ratio(a: Unit, b: Unit) -> int | Fraction:
    """Returns how many of `b` one `a` is, where they agree; 1 where a unit is missing."""
    return a.scale / b.scale if a.name and b.name else 1
