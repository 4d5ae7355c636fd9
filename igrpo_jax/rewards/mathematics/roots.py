"""Roots, prime factors, and opaque symbols for what has no exact value."""

import functools
import math
from fractions import Fraction

from igrpo_jax.rewards.mathematics.exact import UNIT, Atom, NoValue, Value

_MAX_DIVISOR = 60_000  # where trial division ends, after at most 1.5 ms; earlier for large numbers


class NotFactored(NoValue):
    """A number too large to factor."""


@functools.lru_cache(maxsize=4096)
def factors(n: int) -> tuple[tuple[int, int], ...]:
    """Returns the prime factors of n ≥ 1 with their powers. Raises NotFactored if trial division fails."""
    if n.bit_length() > 16_000:
        raise NotFactored("too large to factor")
    found, divisor, end = [], 2, _MAX_DIVISOR if n.bit_length() < 512 else 1_000
    while divisor * divisor <= n and divisor < end:
        power = 0
        while n % divisor == 0:
            n //= divisor
            power += 1
        if power:
            found.append((divisor, power))
        divisor += 1 if divisor == 2 else 2
    if divisor * divisor <= n:
        raise NotFactored("too large to factor")
    if n > 1:
        found.append((n, 1))
    return tuple(found)


def root(value: Value, degree: int) -> Value:
    """Returns the real root if there is one (∛-8 = -2), else the principal root. Raises NoValue."""
    if value.denominator is not UNIT:
        top = root(Value(value.numerator, opaque=value.opaque), degree)
        return top / root(Value(value.denominator, opaque=value.opaque), degree)
    if len(value.numerator) != 1:
        if not value.numerator:
            return value
        content, rest = without_content(value)
        return root(Value.number(content), degree) * named("pow", rest, Fraction(1, degree))
    ((imaginary, roots, symbols), c), *_ = value.numerator.items()
    try:
        if imaginary or (c < 0 and degree % 2 == 0 and degree != 2):
            raise NotFactored
        powers = {prime: Fraction(p) for prime, p in roots}
        for prime, p in primes(abs(c), degree):
            powers[prime] = powers.get(prime, Fraction(0)) + p
        others = [*powers.values(), *(Fraction(p) for name, p in symbols if not loses_sign(name, p, degree))]
        is_square = all((p / degree).denominator == 1 for p in others)
        letters = [name for name, _ in symbols if name not in ("π", "e") and not isinstance(name, Atom)]
        # √(2x²) is |x|·√2, but the symbols of a formula such as √(Gρr²) are positive quantities.
        if (is_square or len(letters) < 2) and any(loses_sign(name, power, degree) for name, power in symbols):
            raise NotFactored
    except NotFactored:
        return named("pow", value, Fraction(1, degree))
    taken = tuple((name, Fraction(p) / degree) for name, p in symbols)
    result = Value(
        {(int(c < 0 and degree == 2), (), taken): Fraction(-1 if c < 0 and degree != 2 else 1)}, opaque=value.opaque
    )
    for prime, p in powers.items():
        integer, rest = divmod(p / degree, 1)
        key = (0, ((prime, rest),) if rest else (), ())
        result = result * Value({key: Fraction(prime) ** int(integer)})
    return result


def without_content(value: Value) -> tuple[Fraction, Value]:
    """Returns (the largest positive rational that divides all terms of a polynomial, the polynomial divided by it)."""
    tops, bottoms = zip(*((c.numerator, c.denominator) for c in value.numerator.values()), strict=True)
    content = Fraction(math.gcd(*tops), math.lcm(*bottoms))
    return content, Value({key: c / content for key, c in value.numerator.items()}, opaque=value.opaque)


def primes(c: Fraction, degree: int = 1) -> list[tuple[int, int]]:
    """Returns the prime factors of c > 0 with their powers, which are negative below the fraction bar.

    A large square, such as 10^40, need not be factored into primes for a root of degree 2. Raises NotFactored.
    """
    found: list[tuple[int, int]] = []
    for number, sign in ((c.numerator, 1), (c.denominator, -1)):
        is_square = degree == 2 and number.bit_length() > 64 and math.isqrt(number) ** 2 == number
        found += [(p, sign * k) for p, k in ([(math.isqrt(number), 2)] if is_square else factors(number))]
    return found


def loses_sign(name: str, exponent: int | Fraction, degree: int = 2) -> bool:
    """Returns whether a root loses the sign of a symbol: √(x²) is |x|, not x. √x, √(x³), ∛(x³) and √(π²) do not."""
    even = degree % 2 == 0 and Fraction(exponent).numerator % 2 == 0
    return even and name not in ("π", "e") and getattr(name, "function", "") not in ("exp", "abs")


def named(
    function: str, argument: Value, exponent: int | Fraction = 1, opaque: bool = True, base: Value | None = None
) -> Value:
    """Returns an opaque symbol to a power. `base` is that of the function "exp" or "pow", where it is not e."""
    name = Atom(f"{function}({argument})" if base is None else f"{function}({base};{argument})")
    name.function, name.argument, name.base = function, argument, base
    return Value({(0, (), ((name, exponent),)): Fraction(1)}, opaque=opaque)


def application(function: str, argument: Value, opaque: bool = False) -> Value:
    """Returns the value of an unknown function, as f(2)."""
    return named(function, argument, opaque=opaque or argument.opaque or argument.denominator is not UNIT)
