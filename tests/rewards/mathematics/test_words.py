"""igrpo_jax.rewards.mathematics.words: units and prose."""

import pytest

from igrpo_jax.rewards.mathematics import units, words
from igrpo_jax.rewards.mathematics.tokens import latex, tokenize


@pytest.mark.parametrize(
    ("answer", "core", "unit", "percent"),
    [
        (r"10\text{ cm}", "10", "cm", False),
        (r"15\mbox{ cm}^2", "15", "cm^2", False),
        ("10 cm", "10", "cm", False),
        ("10 apples", "10", "apples", False),
        ("18 a day", "18", "per day", False),
        (r"\$18", "18", "dollars", False),
        (r"\$18\text{ dollars}", "18", "dollars", False),
        (r"\$18\text{ per day}", "18", "dollars per day", False),
        ("€5", "5", "euros", False),
        (r"12\ \frac{\text{km}}{\text{h}}", "12", "km/h", False),
        (r"\frac{1}{2}\text{ of the cake}", r"\frac{1}{2}", "cake", False),
        (r"25^\circ\text{C}", "25", "degrees Celsius", False),
        ("25°F", "25", "fahrenheit", False),
        ("9.8 m/s^2", "9.8", "m/s^2", False),
        (r"28\%", "28", "", True),
        ("28 percent", "28", "", True),
        (r"28\text{ pct}", "28", "", True),
        (r"28\%\text{ of the students}", "28", "", True),
        (r"3^{rd}", "3", "", False),
        (r"3^\text{rd}", "3", "", False),
        ("21st", "21", "", False),
        (r"5\sqrt{3}\text{ units}", r"5\sqrt{3}", "units", False),
        ("3m", "3m", "", False),  # m is a symbol
        (r"\frac{37}{4} m", r"\frac{37}{4} m", "", False),
        ("5 A/B", "5 A/B", "", False),
        ("5 or more", "5 or more", "", False),
        (r"5\text{ is not possible}", r"5\text{ is not possible}", "", False),
        (r"5\text{ squared}", r"5\text{ squared}", "", False),
        (r"5\text{ feet } 3\text{ inches}", r"5\text{ feet } 3", "inches", False),  # "5 feet 3" is no expression
        (r"x + \text{cm}", r"x + \text{cm}", "", False),
        (r"2\mathrm{i}", r"2\mathrm{i}", "", False),
    ],
)
def test_without_unit(answer, core, unit, percent):
    expression, read, in_percent = words.without_unit(tokenize(answer))
    assert latex(expression) == latex(tokenize(core))
    assert (read, in_percent) == (units.read(unit, is_single=True) if unit else units.NONE, percent)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"\text{March } 5", "mar 5 "),
        ("March 5th", "mar 5 "),
        ("5 March", "mar 5 "),
        (r"\text{the 5th of March}", "mar 5 "),
        ("March 5, 2020", "mar 5 2020"),
        ("Sept. 30", "sep 30 "),
        ("March", None),
        ("may be 5", None),
        ("5 Mayors", None),
        ("March 5 or 6", None),
    ],
)
def test_date(answer, expected):
    assert words.date(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"\text{Total: } 12", "12"),
        (r"\text{Total: 12}", r"\text{ 12}"),
        ("Total cost: 12", "12"),
        ("Not: 12", "Not: 12"),
        (r"\text{Wrong: } 12", r"\text{Wrong: } 12"),
        (r"\text{At least: } 12", r"\text{At least: } 12"),
        ("AB:CD", "AB:CD"),
        ("3:4", "3:4"),
        ("Total:", "Total:"),
    ],
)
def test_without_label(answer, expected):
    assert latex(tokenize(words.without_label(answer))) == latex(tokenize(expected))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("even", "even"),
        ("Two Lines", "two lines"),
        (r"\text{No solution}", "empty set"),
        (r"\emptyset", "empty set"),
        (r"\text{There is no solution}", "empty set"),
        (r"\text{The equation has no real solutions.}", "empty set"),
        (r"\text{No solutions exist}", "empty set"),
        (r"\text{There is a solution}", "there is a solution"),
        (r"\text{no integer solution}", "no integer solution"),
        (r"\text{no answer}", "no answer"),
        (r"\text{infinitely many solutions}", "infinitely many"),
        (r"\text{The limit does not exist}", "does not exist"),
        (r"\text{all real numbers}", "real numbers"),
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
