"""Powers, roots, exponentials, logarithms and trigonometry of igrpo_jax.rewards.mathematics.functions."""

import cmath
import math
from fractions import Fraction

import pytest

from igrpo_jax.rewards.mathematics import exact, functions
from igrpo_jax.rewards.mathematics.exact import PI, E, I, NoValue, Value, same
from igrpo_jax.rewards.mathematics.functions import cosine, function, logarithm, power, root, sine

X, N = Value.symbol("x"), Value.symbol("n")


def number(*value):
    return Value.number(Fraction(*value))


@pytest.mark.parametrize(
    ("value", "degree", "expected"),
    [
        (number(16), 2, number(4)),
        (number(-4), 2, number(2) * I),
        (number(-8), 3, number(-2)),
        (number(1, 2), 2, root(number(2), 2) / number(2)),
        (number(50), 2, number(5) * root(number(2), 2)),
        (number(10**40), 2, number(10**20)),
        (number(4) * X, 2, number(2) * root(X, 2)),
        (X * X * X, 2, X * root(X, 2)),
        (X * X * X, 3, X),
        (number(4) * X + number(4), 2, number(2) * root(X + number(1), 2)),
        (PI * PI, 2, PI),
    ],
)
def test_root(value, degree, expected):
    assert same(root(value, degree), expected) is True


def test_the_root_of_a_square_is_not_its_base():
    assert same(root(X * X, 2), X) is None  # it is |x|
    assert same(root(X * X, 2), -X) is False


def test_a_radicand_that_cannot_be_factored_is_opaque():
    large = number((2**89 - 1) * (2**107 - 1))
    assert root(large, 2).opaque
    assert same(root(large, 2), root(large, 2)) is True


def test_a_formula_of_several_symbols_is_of_positive_quantities():
    assert same(root(number(2) * X * X * N, 2), X * root(number(2) * N, 2)) is True
    assert same(root(number(2) * X * X, 2), X * root(number(2), 2)) is not True  # it is |x|·√2


@pytest.mark.parametrize("name", ["arsinh", "arcosh", "artanh", "sinh", "cosh", "tanh", "arccot", "ln", "log"])
def test_nested_functions_stay_small(name):
    value = X
    for _ in range(11):
        value = function(name, value)
    assert len(value.numerator) <= 2
    assert len(str(value)) < 100_000  # twice and more as long at each level, where each holds the one below it twice


@pytest.mark.parametrize(
    ("base", "exponent", "expected"),
    [
        (number(2), number(10), number(1024)),
        (number(8), number(2, 3), number(4)),
        (number(2), number(-1), number(1, 2)),
        (X + number(1), number(2), X * X + number(2) * X + number(1)),
        (number(4), N, power(number(2), number(2) * N)),
        (number(6), N, power(number(2), N) * power(number(3), N)),
        (number(2), N - number(1), power(number(2), N) / number(2)),
        (E, number(-2) * X, number(1) / (power(E, X) * power(E, X))),
        (E, I * PI, number(-1)),
        (E, I * PI / number(3), number(1, 2) + I * root(number(3), 2) / number(2)),
    ],
)
def test_power(base, exponent, expected):
    assert same(power(base, exponent), expected) is True


def test_powers_differ():
    assert same(power(number(2), N), power(number(2), N + number(1))) is False
    assert same(power(number(3), number(2025)), power(number(2), number(2025))) is False
    assert same(power(number(-1), N), number(1)) is not True


@pytest.mark.parametrize("exponent", [functions.MAX_EXPONENT + 1, -functions.MAX_EXPONENT - 1, 10**50])
def test_large_exponents_have_no_value(exponent):
    with pytest.raises(NoValue):
        power(number(2), number(exponent))
    with pytest.raises(NoValue):
        power(number(10**1000), number(1000))


def test_a_power_with_too_many_terms_stays_a_power():
    wide = X + N + Value.symbol("y") + Value.symbol("z")
    assert same(power(wide, number(50)), power(wide, number(50))) is True
    assert same(power(wide, number(50)), power(wide + X, number(50))) is False


@pytest.mark.parametrize("degrees", range(-375, 390, 15))
def test_multiples_of_15_degrees_are_exact(degrees):
    for ours, theirs in ((cosine, math.cos), (sine, math.sin)):
        value = ours(number(degrees, 180) * PI)
        assert not value.opaque
        assert exact.approximate(value) == pytest.approx(theirs(math.radians(degrees)), abs=1e-12)


@pytest.mark.parametrize(
    ("value", "degrees", "expected"),
    [
        (cosine, 36, math.cos),
        (cosine, 72, math.cos),
        (cosine, 144, math.cos),
        (sine, 18, math.sin),
        (sine, 54, math.sin),
    ],
)
def test_angles_of_the_pentagon(value, degrees, expected):
    found = value(number(degrees, 180) * PI)
    assert not found.opaque
    assert exact.approximate(found) == pytest.approx(expected(math.radians(degrees)), abs=1e-12)


@pytest.mark.parametrize("name", ["sin", "cos", "tan", "cot", "sec", "csc"])
def test_other_angles(name):
    # As numbers they are what they are; the signs of the argument come out.
    inverse = {"cot": "tan", "sec": "cos", "csc": "sin"}
    expected = getattr(cmath, inverse.get(name, name))(0.3)
    expected = 1 / expected if name in inverse else expected
    assert exact.approximate(function(name, number(3, 10))) == pytest.approx(expected)
    minus = -function(name, X) if name not in ("cos", "sec") else function(name, X)
    assert same(function(name, -X), minus) is True


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (logarithm(number(8)), number(3) * logarithm(number(2))),
        (logarithm(number(2, 9)), logarithm(number(2)) - number(2) * logarithm(number(3))),
        (logarithm(E * E), number(2)),
        (logarithm(number(1)), number(0)),
        (logarithm(number(8)) / logarithm(number(2)), number(3)),
        (function("abs", number(-3)), number(3)),
        (function("abs", number(2) - root(number(5), 2)), root(number(5), 2) - number(2)),
        (function("abs", -X), function("abs", X)),
    ],
)
def test_logarithm_and_absolute_value(value, expected):
    assert same(value, expected) is True


def test_log_without_a_base_is_left_open():
    assert same(logarithm(number(100), "log"), number(2)) is None
    assert same(logarithm(number(100), "log"), number(3)) is False
    assert same(logarithm(number(2)), logarithm(number(3))) is False
