"""igrpo_jax.rewards.mathematics.names: what names the right side of an equation."""

import pytest

from igrpo_jax.rewards.mathematics import names
from igrpo_jax.rewards.mathematics.tokens import tokenize


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
    assert names.is_name(tokenize(name), tokenize(value)) is expected


@pytest.mark.parametrize(
    "ordered",
    [
        ["x", "y", "z"],
        ["a", "b", "c"],
        ["m", "b"],
        ["h", "k"],
        ["r", r"\theta "],
        ["r", r"\theta ", "z"],
        [r"\rho ", r"\theta ", r"\phi "],
        ["x_2", "x_9", "x_{10}"],
        [r"\angle A", r"\angle B"],
        ["f(1)", "f(2)"],
    ],
)
def test_known_orders(ordered):
    backwards = ordered[::-1]
    assert [backwards[at] for at in names.in_order(backwards)] == ordered
    assert names.in_order(ordered) == list(range(len(ordered)))


@pytest.mark.parametrize("written", [["n", "k"], ["k", "n"], ["w", "l"], ["x", "w"], ["cat", "bat"], ["x", "y_1"], []])
def test_names_without_an_order_stay_as_they_are(written):
    assert names.in_order(written) == list(range(len(written)))
