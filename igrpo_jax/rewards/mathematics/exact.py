r"""Exact values: quotients of polynomials in roots of primes, i, π, e and symbols, whose equality is decidable.

A polynomial is a dict {key: Fraction}; a key (power of i, roots, symbols) stands for one product:

    (1, ((2, 1/2), (3, 1/3)), (("x", 2), ("π", 1)))   =   i · 2^(1/2) · 3^(1/3) · x² · π

with i to the power 0 or 1, every prime to a power between 0 and 1, and symbols to rational powers. Such products are
linearly independent over the rationals (real roots of different radicands are, Besicovitch 1940; π, e and the
logarithms of primes count as independent, which nobody doubts and nobody has proved). So two polynomials are equal only
if their dicts are, and P1/Q1 = P2/Q2 if and only if P1·Q2 = P2·Q1. Right and wrong answers are both decided without a
computer algebra system.

Anything else (sines of symbols, roots of sums, …) becomes an opaque symbol, named by the exact form of its argument.
Two values with opaque symbols can be found equal. Otherwise their numbers decide, evaluated to DIGITS digits
(`_same_numbers`), unless free symbols leave that open.

Symbols under a root are read as positive, as in school: √(xy) = √x·√y, but √(x²) stays as it is.
Not here: powers, roots and functions (`functions`); reading text (`expression`). Beyond the limits MAX_TERMS and
MAX_BITS, NoValue is raised.
"""

import cmath
import functools
import zlib
from fractions import Fraction

MAX_TERMS = 100  # of a polynomial
MAX_BITS = 150_000  # of a numerator or denominator; 10000! has 118,458
DIGITS = 330  # with which opaque symbols are evaluated
CLOSE = 300  # digits in which equal values agree
LARGE = 1e100  # beyond which numbers are not compared by their digits


class NoValue(ArithmeticError):
    """Division by zero, or a value beyond the limits. It equals only its own text."""


class TooManyTerms(NoValue):
    """A polynomial with more than MAX_TERMS terms."""


class Atom(str):
    """An opaque symbol, named by function and argument: `sin(x)`. A str, so that keys sort and hash as usual."""

    function: str
    argument: "Value"
    base: "Value | None"  # of a power whose exponent is the argument


Key = tuple[int, tuple, tuple]
Polynomial = dict[Key, Fraction]
ONE: Key = (0, (), ())
UNIT: Polynomial = {ONE: Fraction(1)}


class Value:
    """numerator / denominator. `opaque` marks a value that holds a symbol with unknown algebra. Immutable."""

    __slots__ = ("denominator", "numerator", "opaque")

    def __init__(self, numerator: Polynomial, denominator: Polynomial = UNIT, opaque: bool = False):
        if not denominator:
            raise NoValue("division by zero")
        if len(denominator) == 1 and denominator is not UNIT:
            numerator, denominator = _times(numerator, _inverse(denominator)), UNIT
        self.numerator = numerator
        self.denominator = denominator
        self.opaque = opaque

    @staticmethod
    def number(value: int | Fraction) -> "Value":
        """Returns a rational number."""
        fraction = Fraction(value)
        _check_size(fraction)
        return Value({ONE: fraction} if fraction else {})

    @staticmethod
    def symbol(name: str) -> "Value":
        """Returns a symbol."""
        return Value({(0, (), ((name, 1),)): Fraction(1)})

    def constant(self) -> Fraction | None:
        """Returns the value where it is a rational number, else None."""
        if not self.numerator:
            return Fraction(0)
        if self.denominator is UNIT and len(self.numerator) == 1 and ONE in self.numerator:
            return self.numerator[ONE]
        return None

    def symbols(self) -> set[str]:
        """Returns the names of its symbols, without π and e."""
        names = {name for part in (self.numerator, self.denominator) for key in part for name, _ in key[2]}
        return names - {"π", "e"}

    def __add__(self, other: "Value") -> "Value":
        opaque = self.opaque or other.opaque
        if self.denominator == other.denominator:
            return Value(_plus(self.numerator, other.numerator), self.denominator, opaque)
        crossed = _plus(_times(self.numerator, other.denominator), _times(other.numerator, self.denominator))
        return Value(crossed, _times(self.denominator, other.denominator), opaque)

    def __neg__(self) -> "Value":
        return Value({key: -c for key, c in self.numerator.items()}, self.denominator, self.opaque)

    def __sub__(self, other: "Value") -> "Value":
        return self + -other

    def __mul__(self, other: "Value") -> "Value":
        top, bottom = _times(self.numerator, other.numerator), _times(self.denominator, other.denominator)
        return Value(top, bottom, self.opaque or other.opaque)

    def __truediv__(self, other: "Value") -> "Value":
        return self * Value(other.denominator, other.numerator, other.opaque)

    def __str__(self) -> str:
        """Returns one text per polynomial. Equal quotients may have several."""
        terms = []
        for (imaginary, roots, symbols), c in sorted(self.numerator.items()):
            # Not the repr of names: it escapes quotes, and nested names would be twice as long at each level.
            names = ",".join(f"{name}^{power}" for name, power in symbols)
            # Hexadecimal, because Python limits the digits of decimals.
            terms.append(f"{c.numerator:x}/{c.denominator:x}({imaginary},{roots},[{names}])")
        top = "+".join(terms)
        return top if self.denominator is UNIT else f"{top}/{Value(self.denominator)}"


I = Value({(1, (), ()): Fraction(1)})
PI = Value.symbol("π")
E = Value.symbol("e")


def same(a: Value, b: Value) -> bool | None:
    """Returns whether the values are equal, None if that cannot be decided here."""
    if _times(a.numerator, b.denominator) == _times(b.numerator, a.denominator):
        return True
    return _same_numbers(a, b) if a.opaque or b.opaque else False


def proportional(a: Value, b: Value) -> Fraction | None:
    """Returns a rational c ≠ 0 with a = c·b, None if none is found. With opaque symbols there may be one."""
    left, right = _times(a.numerator, b.denominator), _times(b.numerator, a.denominator)
    if not left or left.keys() != right.keys():
        return None
    ratios = {left[key] / right[key] for key in left}
    return ratios.pop() if len(ratios) == 1 else None


def cleared(value: Value) -> Value:
    """Returns the value times its denominators, including negative powers of symbols: y - 1/x becomes xy - 1."""
    powers = [dict(key[2]) for key in value.numerator]
    lowest = {name: min(terms.get(name, 0) for terms in powers) for name in set().union(*powers)}
    factor = tuple(sorted((name, -exponent) for name, exponent in lowest.items() if exponent < 0))
    return Value(_times(value.numerator, {(0, (), factor): Fraction(1)}), opaque=value.opaque)


# ---------------------------------------------------------------------------------------------------- polynomials


def _check_size(value: Fraction) -> None:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise NoValue("too many digits")


def _plus(p: Polynomial, q: Polynomial) -> Polynomial:
    total = dict(p)
    for key, c in q.items():
        total[key] = total[key] + c if key in total else c
        if not total[key]:
            del total[key]
    if len(total) > MAX_TERMS:
        raise TooManyTerms("too many terms")
    return total


def _times(p: Polynomial, q: Polynomial) -> Polynomial:
    if q is UNIT:
        return p
    if p is UNIT:
        return q
    if len(p) * len(q) > 25 * MAX_TERMS:
        raise TooManyTerms("too many terms")
    total: Polynomial = {}
    for key, c in p.items():
        for other, d in q.items():
            product, carried = _merge(key, other)
            c_d = c * d * carried if carried != 1 else c * d
            _check_size(c_d)
            total[product] = total.get(product, 0) + c_d
    if len(total) > MAX_TERMS:
        raise TooManyTerms("too many terms")
    return {key: c for key, c in total.items() if c}


def _merge(a: Key, b: Key) -> tuple[Key, int]:
    """Returns (product of two keys, the integer factor that results from it: i·i = -1, √2·√2 = 2)."""
    if a == ONE:
        return b, 1
    if b == ONE:
        return a, 1
    carried = -1 if a[0] and b[0] else 1
    roots = a[1] or b[1]
    if a[1] and b[1]:
        powers = _added(a[1], b[1])
        for prime, power in powers.items():
            if power >= 1:
                carried *= prime
                powers[prime] = power - 1
        roots = tuple(sorted(item for item in powers.items() if item[1]))
    symbols = a[2] or b[2]
    if a[2] and b[2]:
        symbols = tuple(sorted(item for item in _added(a[2], b[2]).items() if item[1]))
    return (a[0] ^ b[0], roots, symbols), carried


def _added(a: tuple, b: tuple) -> dict:
    powers = dict(a)
    for name, power in b:
        powers[name] = powers.get(name, 0) + power
    return powers


def _inverse(single: Polynomial) -> Polynomial:
    """Returns 1 / a polynomial of one term."""
    ((imaginary, roots, symbols), c), *_ = single.items()
    for prime, _ in roots:
        c *= prime
    complement = tuple((prime, 1 - power) for prime, power in roots)
    return {(imaginary, complement, tuple((name, -power) for name, power in symbols)): (-1 if imaginary else 1) / c}


# ------------------------------------------------------------------------------------------------- floating point


def approximate(value: Value) -> complex | None:
    """Returns a value without free symbols in floating point, None if that fails."""
    constant = value.constant()
    try:
        number = complex(_evaluated(value, 0)[0] if constant is None else constant)
        return number if cmath.isfinite(number) else None
    except (ArithmeticError, ValueError):
        return None


def _same_numbers(a: Value, b: Value) -> bool | None:
    """Returns whether the numbers of two values are equal, None if that is not certain.

    Values with free symbols or with a `log` of unknown base are never certain to be equal. They are different if they
    differ at both of two points.
    """
    if (closed := _close(a, b, None)) is not None:
        return closed
    return False if [_close(a, b, point) for point in range(2)] == [False, False] else None


def _close(a: Value, b: Value, point: int | None) -> bool | None:
    try:
        (first, first_scale), (second, second_scale) = _evaluated(a, point), _evaluated(b, point)
    except (ArithmeticError, ValueError):
        return None
    scale = max(first_scale, second_scale)
    if scale > LARGE:  # the digits do not reach to where √(10^4000 + 1) + 1 differs from it
        return None
    return bool(abs(first - second) <= scale * _context().mpf(10) ** -CLOSE)


@functools.cache
def _context():
    """Returns mpmath's arithmetic with DIGITS digits."""
    import mpmath  # sympy depends on it

    context = mpmath.MPContext()
    context.dps = DIGITS
    return context


def _evaluated(value: Value, point: int | None) -> tuple:
    """Returns mpmath's (value, sum of the sizes of its terms, to which rounding errors are relative).

    `point` selects positive numbers for free symbols, and whether `log` is the natural one (0) or that to base 10 (1).
    Raises ArithmeticError; ValueError for an unknown function, or where `point` is None but needed.
    """
    top, top_scale = _sum(value.numerator, point)
    bottom, bottom_scale = _sum(value.denominator, point)
    if abs(bottom) <= 1e-6 * bottom_scale:
        raise ZeroDivisionError
    return top / bottom, top_scale / abs(bottom)


def _sum(p: Polynomial, point: int | None) -> tuple:
    number, total, scale = _context().mpmathify, 0, 0
    for (imaginary, roots, symbols), c in p.items():
        term = number(c) * (1j if imaginary else 1)
        factors = [(number(prime), power) for prime, power in roots]
        for base, power in factors + [(_symbol(name, point), Fraction(power)) for name, power in symbols]:
            is_negative = power.denominator % 2 and base.imag == 0 and base.real < 0  # the real root, as of -8
            root = abs(base) ** number(power) if is_negative else base ** number(power)
            term *= -root if is_negative and power.numerator % 2 else root
        total, scale = total + term, scale + abs(term)
    return total, scale


_EVALUATED = {name: name for name in ("sin", "cos", "sinh", "cosh", "tanh", "log")}
_EVALUATED |= {"ln": "log", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}
_EVALUATED |= {f"ar{name}": f"a{name}" for name in ("sinh", "cosh", "tanh")}


def _symbol(name: str, point: int | None):
    """Returns the number of a symbol. Raises OverflowError for a large argument of a function."""
    m = _context()
    if name in ("π", "e"):
        return +m.pi if name == "π" else +m.e
    if point is None and (not isinstance(name, Atom) or name.function == "log"):
        raise ValueError
    if not isinstance(name, Atom):
        return m.mpf(0.6 + zlib.crc32(f"{point}{name}".encode()) % 10_007 / 7_000)
    argument, _ = _evaluated(name.argument, point)
    if name.base is not None:
        argument, function = argument * m.log(_evaluated(name.base, point)[0]), m.exp
    elif name.function in ("pow", "abs"):
        return argument if name.function == "pow" else abs(argument)
    elif name.function in _EVALUATED:
        function = getattr(m, "log10" if name.function == "log" and point else _EVALUATED[name.function])
    else:
        raise ValueError
    if abs(argument) > (1e3 if function in (m.exp, m.sinh, m.cosh) else 1e300):
        raise OverflowError
    return function(argument)
