"""igrpo_jax.rewards.mathematics.exact: equality that is decided, and where it says that it cannot."""

from fractions import Fraction

import pytest

from igrpo_jax.rewards.mathematics import exact, functions
from igrpo_jax.rewards.mathematics.exact import PI, E, I, NoValue, Value, same

X, Y = Value.symbol("x"), Value.symbol("y")
ONE, TWO = Value.number(1), Value.number(2)


def root(n, degree=2):
    return functions.root(Value.number(n), degree)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (Value.number(Fraction(2, 4)), Value.number(Fraction(1, 2)), True),
        (X + Y, Y + X, True),
        (X * X - ONE, (X - ONE) * (X + ONE), True),
        ((X * X - ONE) / (X - ONE), X + ONE, True),
        (ONE / X + ONE / Y, (X + Y) / (X * Y), True),
        (I * I, -ONE, True),
        (ONE / I, -I, True),
        (root(2) * root(3), root(6), True),
        (ONE / (root(2) + ONE), root(2) - ONE, True),
        (root(2, 3) * root(4, 3), TWO, True),  # roots of a prime add their exponents
        (root(2, 4) * root(2, 4), root(2), True),
        (root(6) / root(3), root(2), True),
        (X - X, Value.number(0), True),
        (root(2) + root(3), root(5), False),
        (root(2), Value.number(Fraction("1.4142135623730951")), False),  # floats cannot tell them apart
        (PI, Value.number(Fraction(355, 113)), False),
        (PI, E, False),
        (X + ONE, Y + ONE, False),
        (I, -I, False),
        (Value.number(10**30), Value.number(10**30 + 1), False),
    ],
)
def test_same(a, b, verdict):
    assert same(a, b) is verdict
    assert same(b, a) is verdict


def test_opaque_values_are_equal_surely_and_differ_only_by_their_numbers():
    sine, cosine = functions.sine(X), functions.cosine(X)
    assert same(sine + ONE, ONE + sine) is True
    assert same(sine, cosine) is False
    assert same(sine * sine + cosine * cosine, ONE) is None  # an identity is not known here
    nested = functions.root(Value.number(3) + TWO * root(2), 2)
    assert same(nested, ONE + root(2)) is True  # to 300 digits
    assert same(nested, ONE + root(3)) is False
    tiny = Value.number(Fraction(1, 10**20))
    assert same(sine + tiny, sine) is False  # free symbols: the numbers at two points tell
    assert same(functions.sine(ONE) + tiny * tiny, functions.sine(ONE)) is False
    assert same(functions.function("abs", X), X) is None  # equal numbers at positive points are no proof
    assert same(functions.function("log", TWO) - functions.function("log", TWO + ONE), functions.sine(ONE)) is False


def test_zero_has_no_inverse():
    with pytest.raises(NoValue):
        ONE / (X - X)


def test_limits():
    with pytest.raises(NoValue):
        Value.number(1 << exact.MAX_BITS)
    wide = sum((Value.symbol(f"x_{k}") for k in range(exact.MAX_TERMS)), start=Value.number(0))
    with pytest.raises(NoValue):
        wide + Value.symbol("y")
    with pytest.raises(NoValue):
        (wide * wide).constant()


@pytest.mark.parametrize(
    ("a", "b", "ratio"),
    [
        (X + Y - ONE, TWO * X + TWO * Y - TWO, Fraction(1, 2)),
        (X - Y, Y - X, -1),
        (X - ONE, X + ONE, None),
        (X, Y, None),
        (X - X, X, None),
    ],
)
def test_proportional(a, b, ratio):
    assert exact.proportional(a, b) == ratio


def test_cleared():
    assert same(exact.cleared(Y - ONE / X), X * Y - ONE) is True
    assert same(exact.cleared(X * Y - X), X * Y - X) is True  # x = 0 is a solution that must not be lost


def test_constant_and_symbols():
    assert Value.number(3).constant() == 3
    assert (X - X).constant() == 0
    assert X.constant() is None and root(2).constant() is None
    assert (X * PI + E).symbols() == {"x"}


def test_approximate():
    assert exact.approximate(root(2) + PI) == pytest.approx(2**0.5 + 3.141592653589793)
    assert exact.approximate(Value.number(10) * I) == 10j
    assert exact.approximate(Value.number(10**1000)) is None
