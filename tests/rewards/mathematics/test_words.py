"""igrpo_jax.rewards.mathematics.words: units, prose and names."""

import pytest

from igrpo_jax.rewards.mathematics import words
from igrpo_jax.rewards.mathematics.tokens import latex, tokenize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cm", "cm"),
        (" Centimeters", "cm"),
        ("square centimeters", "cm2"),
        ("sq. cm", "cm2"),
        ("cm^2", "cm2"),
        ("cubic inches", "in3"),
        ("feet", "ft"),
        ("boxes", "boxe"),
        ("p.m.", "pm"),
        ("dollars", "dollar"),
        ("miles per hour", "mph"),
        ("", ""),
    ],
)
def test_unit_name(text, expected):
    assert words.unit_name(text) == expected


@pytest.mark.parametrize(
    ("answer", "core", "unit", "percent"),
    [
        (r"10\text{ cm}", "10", "cm", False),
        (r"15\mbox{ cm}^2", "15", "cm2", False),
        ("10 cm", "10", "cm", False),
        ("10 apples", "10", "apple", False),
        ("18 a day", "18", "day", False),
        (r"\$18", "18", "dollar", False),
        ("€5", "5", "euro", False),
        (r"28\%", "28", "", True),
        ("28 percent", "28", "", True),
        (r"28\text{ pct}", "28", "", True),
        (r"3^{rd}", "3", "", False),
        (r"3^\text{rd}", "3", "", False),
        ("21st", "21", "", False),
        (r"5\sqrt{3}\text{ units}", r"5\sqrt{3}", "unit", False),
        ("3m", "3m", "", False),  # m is a symbol
        ("5 or more", "5 or more", "", False),
        (r"5\text{ is not possible}", r"5\text{ is not possible}", "", False),
        (r"x + \text{cm}", r"x + \text{cm}", "", False),
        (r"2\mathrm{i}", r"2\mathrm{i}", "", False),
    ],
)
def test_without_unit(answer, core, unit, percent):
    found = words.without_unit(tokenize(answer))
    assert (latex(found[0]), *found[1:]) == (latex(tokenize(core)), unit, percent)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("even", "even"),
        ("Two Lines", "two lines"),
        (r"\text{No solution}", "empty set"),
        (r"\emptyset", "empty set"),
        ("DNE", "does not exist"),
        ("CD", "cd"),
        (r"\mathbb{R}", "R"),
        ("xy", None),  # a product
        ("x", None),
        (r"\sin x", None),
        ("2x", None),
        ("x+y", None),
    ],
)
def test_words_of(answer, expected):
    assert words.words_of(tokenize(answer), from_text=False) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("x", "5", True),
        ("a_3", "2", True),
        ("AB", "7", True),
        ("|AB|", "7", True),
        ("f(x)", "x^2", True),
        ("f(x+1)", "x^2", True),
        (r"\angle ABC", "30", True),
        (r"\frac{NO}{BO}", "2", True),
        ("(x,y)", "(1,2)", True),
        (r"\text{Area}", "5", True),
        ("y", "2x+1", True),
        ("2x+z", "1", False),
        ("x^2", "4", False),
        ("x(x+1)", "6", False),
        ("7", "11a+c", False),
        (r"\tan \theta", r"2\theta", False),
        (r"\frac{dx}{dt}", "kx", False),
        ("x", "x+1", False),
        ("i", "1", False),
        ("open('marker')", "0", False),
    ],
)
def test_is_name(name, value, expected):
    assert words.is_name(tokenize(name), tokenize(value)) is expected
