"""Proves that two algebraic numbers are equal: sines of rational angles, nested roots, and what is built from them.

An algebraic integer that is not zero is at least 1 / B^(d-1), where d is its degree and no conjugate is beyond B,
because its norm is an integer. So a difference that is computed with enough digits and is smaller than that is zero.
Not here: that two numbers differ (`exact.same`), which fewer digits show.
"""

import math
from fractions import Fraction
from typing import NamedTuple

from igrpo_jax.rewards.mathematics import exact
from igrpo_jax.rewards.mathematics.exact import UNIT, Polynomial, Value

_MAX_DIGITS = 1_000  # of the comparison, which then takes some milliseconds
_MAX_DEGREE = 2_000


class _Unknown(ArithmeticError):
    """Not an algebraic number of the kind that is handled here, or beyond the limits."""


class _Size(NamedTuple):
    """What is known of the conjugates of a number."""

    denominator: int  # times this, it is an algebraic integer
    bound: float  # log2 of a bound on its conjugates
    angle: int  # its angles are multiples of π / angle
    roots: frozenset  # (radicand's name, degree) of the roots


def equal(a: Value, b: Value) -> bool:
    """Returns True where the values are proved to be equal, else False, which says nothing."""
    import mpmath  # sympy depends on it

    try:
        left = exact.cleared(Value(a.numerator) * Value(b.denominator) - Value(b.numerator) * Value(a.denominator))
        size = _size(left.numerator)
        degree = 2 * _totient(2 * size.angle) * math.prod(degree for _, degree in size.roots)
        digits = int((degree * (max(size.bound, 0) + math.log2(size.denominator)) + 64) * 0.302)
        if degree > _MAX_DEGREE or digits > _MAX_DIGITS:
            return False
        inverted = {name for v in (a, b) for key in v.numerator for name, exponent in key[2] if exponent < 0}
        divisors = [a.denominator, b.denominator, *({(0, (), ((name, 1),)): Fraction(1)} for name in inverted)]
        with mpmath.workdps(2 * digits + 60):  # twice, because a root halves the digits of a number near 0
            return bool(
                all(abs(_number(p, mpmath)) > 0.001 for p in divisors)
                and abs(_number(left.numerator, mpmath)) < mpmath.mpf(10) ** -digits
            )
    except (ArithmeticError, ValueError):
        return False


def _size(p: Polynomial) -> _Size:
    denominator, bounds, angle, roots = 1, [0.0], 1, frozenset()
    for (_, primes, symbols), c in p.items():
        bound, bottom = math.log2(abs(c)), c.denominator
        for prime, exponent in primes:
            bound += math.log2(prime) * exponent
            roots |= {(str(prime), exponent.denominator)}
        for name, exponent in symbols:
            inner, radical = _size_of(name, exponent)
            bound += inner.bound
            bottom *= inner.denominator
            angle = math.lcm(angle, inner.angle)
            roots |= inner.roots | radical
        denominator = math.lcm(denominator, bottom)
        bounds.append(bound)
        if math.log2(denominator) > _MAX_DIGITS or bound > _MAX_DIGITS:
            raise _Unknown
    return _Size(denominator, max(bounds) + math.log2(len(bounds)), angle, roots)


def _size_of(name: str, exponent: int | Fraction) -> tuple[_Size, frozenset]:
    """Returns the size of a power of an opaque symbol, and the root that it adds."""
    function, exponent = getattr(name, "function", ""), Fraction(exponent)
    if exponent < 0 or exponent > 64:
        raise _Unknown
    if function in ("cos", "sin") and exponent.denominator == 1:
        turns = (name.argument / exact.PI).constant()
        if turns is None:
            raise _Unknown
        return _Size(2**exponent.numerator, 0.0, 2 * turns.denominator, frozenset()), frozenset()
    if function == "pow" and not hasattr(name, "base") and name.argument.denominator is UNIT:
        inner = _size(name.argument.numerator)
        bound = max(inner.bound, 0) * float(exponent)
        bottom = inner.denominator ** math.ceil(exponent)
        return _Size(bottom, bound, inner.angle, inner.roots), frozenset({(str(name), exponent.denominator)})
    raise _Unknown


def _totient(n: int) -> int:
    if n > 10 * _MAX_DEGREE:
        raise _Unknown
    return sum(math.gcd(k, n) == 1 for k in range(1, n + 1))


def _number(p: Polynomial, mpmath):
    """Returns the number with the digits that are set."""
    total = mpmath.mpc(0)
    for (imaginary, primes, symbols), c in p.items():
        term = mpmath.mpc(0, 1) if imaginary else mpmath.mpc(1)
        term *= mpmath.mpf(c.numerator) / c.denominator
        for prime, exponent in primes:
            term *= _raised(mpmath.mpf(prime), exponent, mpmath)
        for name, exponent in symbols:
            if name.function == "pow":
                term *= _raised(_number(name.argument.numerator, mpmath), exponent, mpmath)
            else:
                turns = (name.argument / exact.PI).constant()
                term *= getattr(mpmath, name.function)(mpmath.pi * turns.numerator / turns.denominator) ** int(exponent)
        total += term
    return total


def _raised(base, exponent: int | Fraction, mpmath):
    """Returns base ** exponent, where an odd root of a negative number is negative, as in `exact`."""
    exponent = Fraction(exponent)
    power = mpmath.mpf(exponent.numerator) / exponent.denominator
    if exponent.denominator % 2 and base.imag == 0 and base.real < 0:
        return (-1) ** (exponent.numerator % 2) * abs(base) ** power
    return base**power
