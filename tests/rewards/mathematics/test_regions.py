"""igrpo_jax.rewards.mathematics.regions: intervals, unions and inequalities as sets of real numbers."""

import pytest

from igrpo_jax.rewards.mathematics import exact, regions
from igrpo_jax.rewards.mathematics.answers import read
from igrpo_jax.rewards.mathematics.exact import Value
from igrpo_jax.rewards.mathematics.nodes import Region, Relation

X, Y = Value.symbol("x"), Value.symbol("y")


def described(region):
    """ "[1, 2) (3, inf)" and so on."""
    pieces = []
    for low, low_closed, high, high_closed in region.pieces:
        ends = ["inf" if end is None else f"{exact.approximate(end).real:g}" for end in (low, high)]
        pieces.append(f"{'(['[low_closed]}{ends[0]}, {ends[1]}{')]'[high_closed]}")
    return " ".join(pieces)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x < 3", "(inf, 3)"),
        ("3 > x", "(inf, 3)"),
        ("-x > -1", "(inf, 1)"),
        (r"2x + 1 \ge 5", "[2, inf)"),
        (r"\sqrt{2} x < 2", "(inf, 1.41421)"),
        ("1 < x <= 3", "(1, 3]"),
        (r"x \neq 5", "(inf, 5) (5, inf)"),
        (r"(0,1) \cup (2,3)", "(0, 1) (2, 3)"),
        (r"(2,3) \cup (0,1)", "(0, 1) (2, 3)"),
        (r"[0,1] \cup [1,2]", "[0, 2]"),
        (r"[0,1) \cup [1,2]", "[0, 2]"),
        (r"(0,1) \cup (1,2)", "(0, 1) (1, 2)"),
        (r"(0,5) \cup (1,2)", "(0, 5)"),
        (r"(0,2) \cup (1,2]", "(0, 2]"),
        (r"(0,2) \cup [0,1]", "[0, 2)"),
        (r"\{-1\} \cup [0,7)", "[-1, -1] [0, 7)"),
        (r"(-\infty,1) \cup (0,\infty)", "(inf, inf)"),
        (r"\mathbb{R} \setminus \{2, 1\}", "(inf, 1) (1, 2) (2, inf)"),
        ("x > 1 and x < 3 and x < 2", "(1, 2)"),
        (r"-\infty < x < \infty", "(inf, inf)"),
        (r"0 < x < \infty", "(0, inf)"),
    ],
)
def test_pieces(answer, expected):
    region = read(answer)
    assert isinstance(region, Region)
    assert described(region) == expected


@pytest.mark.parametrize("answer", ["(0,1)", r"[0, \pi]", r"(-\infty, 0]", r"\{1, 2\}"])
def test_what_may_be_a_region(answer):
    assert regions.region_of(read(answer)) is not None


@pytest.mark.parametrize("answer", ["(0,1,2)", r"(\infty, 0)", "(a, b)", "(i, 2)", "1, 2", "5", r"\{x\}"])
def test_what_is_no_region(answer):
    assert regions.region_of(read(answer)) is None


def test_other_inequalities_stay_relations():
    for difference in (X * X - Value.number(1), X - Y, exact.I * X, Value.number(1), None):
        assert isinstance(regions.inequality("", difference, "<"), Relation)


def test_regions_of_two_symbols_do_not_join():
    assert not isinstance(read("x < 1 or y > 3"), Region)
    assert not isinstance(read("x > 1 and y < 3"), Region)
    assert not isinstance(read("x > 3 and x < 1"), Region)
