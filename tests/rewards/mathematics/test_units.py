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
