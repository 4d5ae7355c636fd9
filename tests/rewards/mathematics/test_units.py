"""igrpo_jax.rewards.mathematics.units: units, counted things, and words that are neither."""

from fractions import Fraction

import pytest

from igrpo_jax.rewards.mathematics import units


@pytest.mark.parametrize(
    ("text", "name", "scale"),
    [
        ("m", "m", 1),
        ("cm", "m", Fraction(1, 100)),
        (" Centimeters", "m", Fraction(1, 100)),
        ("square centimeters", "m2", Fraction(1, 10**4)),
        ("sq. cm", "m2", Fraction(1, 10**4)),
        ("cm^2", "m2", Fraction(1, 10**4)),
        ("cm ^ { 2 }", "m2", Fraction(1, 10**4)),
        ("cm2", "m2", Fraction(1, 10**4)),
        ("meters squared", "m2", 1),
        ("mL", "m3", Fraction(1, 10**6)),
        ("feet", "in", 12),
        ("km/h", "m s-1", Fraction(5, 18)),
        ("kilometres per hour", "m s-1", Fraction(5, 18)),
        ("km * h ^ { - 1 }", "m s-1", Fraction(5, 18)),
        ("{ km } / { h }", "m s-1", Fraction(5, 18)),
        ("meters per second squared", "m s-2", 1),
        ("kg m^2/s^2", "g m2 s-2", 1000),
        ("kJ", "g m2 s-2", 10**6),
        ("MW", "g m2 s-3", 10**9),
        ("mW", "g m2 s-3", 1),
        ("degrees C", "celsius", 1),
        ("degree Fahrenheit", "fahrenheit", 1),
        ("p.m.", "pm", 1),
        ("A", "A", 1),
        ("V/A", "A-1 V", 1),
        ("customers/h", "customer h-1", 1),
        ("molecules/L", "l-1 molecule", 1),
        ("km/d", "d-1 m", 1000),
        ("N in magnitude", "g m s-2", 1000),
        ("orders", "order", 1),
        ("positive integers", "integer", 1),
        ("dollars", "cent", 100),
        ("a day", "s-1", Fraction(1, 86400)),
        ("dollars an hour", "cent s-1", Fraction(1, 36)),
        ("boxes", "boxe", 1),
        ("distinct integers", "distinct integer", 1),
        ("apples per basket", "apple basket-1", 1),
        ("apples in total", "apple", 1),
        ("cups of flour", "gal", Fraction(1, 16)),
        ("years old", "month", 12),
        ("(square units)", "unit2", 1),
        ("times", "time", 1),
        ("people", "people", 1),
        ("erg/s", "g m2 s-3", Fraction(1, 10**4)),
        ("Å", "m", Fraction(1, 10**10)),
        ("\\mu m", "m", Fraction(1, 10**6)),
        ("kpc", "pc", 1000),
        ("M _ { odot }", "solarmass", 1),
    ],
)
def test_read(text, name, scale):
    assert units.read(text) == (name, scale)


@pytest.mark.parametrize(
    ("one", "other", "ratio"),
    [
        *[("GHz", "MHz", 1000), ("THz", "Hz", 10**12), ("hPa", "pascals", 100), ("ns", "μs", Fraction(1, 1000))],
        *[("dm", "metre", Fraction(1, 10)), ("MeV", "electronvolts", 10**6), ("kcal", "calories", 1000)],
        *[("joules", "N m", 1), ("watts", "joules per second", 1), ("Pa", "N/m^2", 1), ("kHz", "hertz", 1000)],
        *[("coulombs", "A s", 1), ("mmol", "moles", Fraction(1, 1000)), ("atm", "Pa", 101325), ("kWh", "kJ", 3600)],
        *[("tonnes", "kg", 1000), ("hectares", "m^2", 10**4), ("acres", "square feet", 43560), ("cc", "mL", 1)],
        *[("gallons", "quarts", 4), ("quarts", "pints", 2), ("pints", "cups", 2), ("tablespoons", "teaspoons", 3)],
        *[("decades", "years", 10), ("centuries", "decades", 10), ("years", "months", 12), ("weeks", "days", 7)],
        *[("days", "hours", 24), ("hours", "minutes", 60), ("miles", "yards", 1760), ("yards", "feet", 3)],
        *[("mph", "miles per hour", 1), ("kmph", "km/h", 1), ("fps", "feet per second", 1), ("bucks", "cents", 100)],
        *[("degrees", "arcmin", 60), ("arcminutes", "arcseconds", 60), ("angstroms", "nm", Fraction(1, 10))],
        *[("GB", "MB", 1000), ("KB", "MB", Fraction(1, 1000)), ("grammes", "mg", 1000), ("litres", "dm^3", 1)],
    ],
)
def test_how_many_of_another_unit_one_is(one, other, ratio):
    first, second = units.read(one), units.read(other)
    assert first.name == second.name and units.ratio(first, second) == ratio


@pytest.mark.parametrize(
    "different",
    [
        "pounds|euros|yen|yuan|rupees|won|pesos|rubles|francs|krona|dollars",
        "ounces|tons|tonnes|lbs",
        "degrees|radians|kelvin|rpm",
        "volts|teslas|farads|ohms|amps|watts",
        "knots|mph",
        "tablespoons|cups",
        "parsecs|AU|meters",
        "months|days",
    ],
)
def test_units_between_which_nothing_here_converts(different):
    assert len({units.read(text).name for text in different.split("|")}) == different.count("|") + 1


CHANGING = (
    "thirds|squared|hundred|and a half|base 8|or higher|or more|factorial|million|dozen|out of 8|"
    "with remainder two|cannot|at least|minimum|k|bn|grand|score|gross|repeating|mod 7|choose two|"
    "to the fourth|doubled|inverse|fails|is wrong|tens|per thousand|degrees below zero|fewer apples|"
    "apples or more|pairs squared in hex|of n|May|minutes past three|nothing|meters doubled|cm 3 inches|x|"
    "V/B|orders of magnitude|more apples|negative points|apples 3|sixes|too many|off|short|cubes minus one|"
    "dollars less|each|the|"
)


@pytest.mark.parametrize("text", CHANGING.split("|"))
def test_words_that_may_change_the_number_are_no_unit(text):
    assert units.read(text) is None


# Beside counted things, where any other word only says which they are.
ADJECTIVES = """is are was were be been being isn aren wasn not no nor neither never none nothing cannot can could may
might must shall should will would don doesn does do did didn have had if when unless except without with but
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
threes fours fives sixes sevens eights nines backward backwards half third hundred minus squared divided"""


def test_no_word_that_may_change_a_number_is_an_adjective():
    assert units.read("ripe apples") == ("ripe apple", 1)
    assert [word for word in ADJECTIVES.split() if units.read(f"{word} apples")] == []


def test_a_noun_in_the_singular_counts_a_single_thing():
    assert units.read("of the cake", is_single=True) == ("cake", 1)
    assert units.read("solution", is_single=True) == ("solution", 1)
    assert units.read("solution") is None
    assert units.read("half of the cake", is_single=True) is None
    assert units.read("flipped", is_single=True) is None


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("cm", "mm", True),
        ("pounds", "lb", True),
        ("pounds", "gbp", True),
        ("lb", "gbp", False),
        ("degrees", "celsius", True),
        ("celsius", "fahrenheit", False),
        ("miles", "km", False),
        ("cm^2", "cm^3", False),
        ("km/h", "km", False),
        ("apples", "oranges", False),
    ],
)
def test_agree(a, b, expected):
    a, b = units.read(a), units.read(b)
    assert units.agree(a, b) is expected
    assert units.agree(b, a) is expected
    assert units.agree(a, units.NONE)


def test_ratio():
    assert units.ratio(units.read("g"), units.read("kg")) == Fraction(1, 1000)
    assert units.ratio(units.read("g"), units.NONE) == 1
