"""Powers, roots, exponentials, logarithms and trigonometric functions of exact values.

A result is exact where it is in the ring of `exact`: roots of rationals and of products, e^(iπ/6), 2^(n-1),
ln 8 = 3·ln 2, the sine of multiples of 15°. Anything else becomes an opaque symbol with a canonical argument:
sin(-x) = -sin(x), tan(x) = sin(x)/cos(x), √(4x+4) = 2·√(x+1). All functions raise NoValue beyond MAX_EXPONENT and the
limits of `exact`.
"""

import functools
import math
from fractions import Fraction

from igrpo_jax.rewards.mathematics import exact
from igrpo_jax.rewards.mathematics.exact import ONE, PI, UNIT, Atom, E, I, NoValue, Polynomial, TooManyTerms, Value

MAX_EXPONENT = 10_000  # of integer powers; also the largest n of n! and of binomials
_MAX_DIVISOR = 60_000  # where trial division ends, after at most 1.5 ms; earlier for large numbers


class _NotFactored(NoValue):
    """A number too large to factor."""


# ------------------------------------------------------------------------------------------------ powers and roots


@functools.lru_cache(maxsize=4096)
def factors(n: int) -> tuple[tuple[int, int], ...]:
    """Returns the prime factors of n ≥ 1 with their powers. Raises _NotFactored where trial division fails."""
    if n.bit_length() > 16_000:
        raise _NotFactored("too large to factor")
    primes, divisor, end = [], 2, _MAX_DIVISOR if n.bit_length() < 512 else 1_000
    while divisor * divisor <= n and divisor < end:
        power = 0
        while n % divisor == 0:
            n //= divisor
            power += 1
        if power:
            primes.append((divisor, power))
        divisor += 1 if divisor == 2 else 2
    if divisor * divisor <= n:
        root = math.isqrt(n)
        if root * root != n or root > _MAX_DIVISOR**2:
            raise _NotFactored("too large to factor")
        primes.append((root, 2))
    elif n > 1:
        primes.append((n, 1))
    return tuple(primes)


def power(base: Value, exponent: Value) -> Value:
    """Returns base ** exponent. Raises NoValue."""
    constant = exponent.constant()
    if constant is None:
        return _exponential(base, exponent)
    if constant.denominator != 1:
        return power(root(base, constant.denominator), Value.number(constant.numerator))
    n = int(constant)
    if abs(n) > MAX_EXPONENT:
        raise NoValue("exponent too large")
    if n < 0:
        return power(Value(base.denominator, base.numerator, base.opaque), Value.number(-n))
    for c in base.numerator.values() if len(base.numerator) == 1 else ():
        if max(c.numerator.bit_length(), c.denominator.bit_length()) * n > exact.MAX_BITS:
            raise NoValue("too many digits")
    try:
        result = Value.number(1)
        for bit in bin(n)[2:]:
            result = result * result
            if bit == "1":
                result = result * base
        return result
    except TooManyTerms:
        return _named("pow", base, Fraction(n))


def root(value: Value, degree: int) -> Value:
    """Returns the real root where there is one (∛-8 = -2), else the principal root. Raises NoValue."""
    if value.denominator is not UNIT:
        top = root(Value(value.numerator, opaque=value.opaque), degree)
        return top / root(Value(value.denominator, opaque=value.opaque), degree)
    if len(value.numerator) != 1:
        if not value.numerator:
            return value
        content = _content(value.numerator)
        rest = Value({key: c / content for key, c in value.numerator.items()}, opaque=value.opaque)
        return root(Value.number(content), degree) * _named("pow", rest, Fraction(1, degree))
    ((imaginary, roots, symbols), c), *_ = value.numerator.items()
    if imaginary or (c < 0 and degree % 2 == 0 and degree != 2):
        return _named("pow", value, Fraction(1, degree))
    if any(_loses_sign(name, power, degree) for name, power in symbols):
        return _named("pow", value, Fraction(1, degree))
    result = Value(
        {(0, (), tuple((name, Fraction(p) / degree) for name, p in symbols)): Fraction(1)}, opaque=value.opaque
    )
    if c < 0:
        result = result * (I if degree == 2 else Value.number(-1))
    powers = {prime: Fraction(p) for prime, p in roots}
    try:
        for number, sign in ((abs(c.numerator), 1), (c.denominator, -1)):
            for prime, p in _factored(number, degree):
                powers[prime] = powers.get(prime, Fraction(0)) + sign * p
    except _NotFactored:
        return _named("pow", value, Fraction(1, degree))
    for prime, p in powers.items():
        integer, rest = divmod(p / degree, 1)
        key = (0, ((prime, rest),) if rest else (), ())
        result = result * Value({key: Fraction(prime) ** int(integer)})
    return result


def _factored(number: int, degree: int) -> tuple[tuple[int, int], ...]:
    """Returns factors of `number`. A large square, such as 10^40 for degree 2, need not be factored into primes."""
    if number.bit_length() > 64 and degree == 2 and math.isqrt(number) ** 2 == number:
        return ((math.isqrt(number), 2),)
    return factors(number)


def _loses_sign(name: str, exponent: int | Fraction, degree: int) -> bool:
    """Returns whether a root loses the sign of a symbol: √(x²) is |x|, not x. √x, √(x³), ∛(x³) and √(π²) do not."""
    even = degree % 2 == 0 and Fraction(exponent).numerator % 2 == 0
    return even and name not in ("π", "e") and getattr(name, "function", "") != "exp"


def _content(p: Polynomial) -> Fraction:
    """Returns the positive rational that divides a polynomial's coefficients."""
    return Fraction(math.gcd(*(c.numerator for c in p.values())), math.lcm(*(c.denominator for c in p.values())))


def _named(function: str, argument: Value, exponent: int | Fraction = 1, opaque: bool = True) -> Value:
    name = Atom(f"{function}({argument})")
    name.function, name.argument = function, argument
    return Value({(0, (), ((name, exponent),)): Fraction(1)}, opaque=opaque)


def application(function: str, argument: Value, opaque: bool = False) -> Value:
    """Returns the value of an unknown function, as f(2)."""
    return _named(function, argument, opaque=opaque or argument.opaque or argument.denominator is not UNIT)


def _exponential(base: Value, exponent: Value) -> Value:
    """Returns base ** exponent for an exponent that is not a rational number.

    2^(n-1) = 2^n/2, e^(-2t) = (e^t)^-2, e^(iπ) = -1, e^(2·ln x) = x^2, 2^(log_2 x) = x.
    """
    opaque = base.opaque or exponent.opaque
    constant = base.constant()
    is_e = base.numerator == E.numerator and base.denominator is UNIT
    if not (is_e or (constant is not None and constant > 0)):
        return _pair("pow", base, exponent)
    if exponent.denominator is not UNIT:
        ratio = exact.proportional(logarithm(base), Value(exponent.denominator))
        if ratio is None or is_e:
            return _pair("pow", base, exponent)
        return power(E, Value(exponent.numerator, opaque=exponent.opaque) * Value.number(ratio))
    bases = [(E, 1)] if is_e else []
    if not is_e:
        try:
            bases = [(Value.number(p), k) for p, k in factors(constant.numerator)]
            bases += [(Value.number(p), -k) for p, k in factors(constant.denominator)]
        except _NotFactored:
            return _pair("pow", base, exponent)
    result = Value.number(1)
    for key, c in exponent.numerator.items():
        term = Value({key: c})
        has_logarithm = any(getattr(name, "function", "") == "ln" for name, _ in key[2])
        logarithms = _of_logarithm(term if is_e else term * logarithm(base)) if has_logarithm else None
        if key == ONE:
            result = result * power(base, Value.number(c))
        elif logarithms:
            result = result * power(*logarithms)
        elif is_e and key == (1, (), (("π", 1),)):
            result = result * (cosine(Value.number(c) * PI) + I * cosine(Value.number(Fraction(1, 2) - c) * PI))
        else:
            # Numbers such as 2^√2 and e^π may be related in unknown ways; functions such as 2^n are not.
            free = any(name not in ("π", "e") for name, _ in key[2])
            for prime, k in bases:
                term = _pair("exp", prime, Value({key: Fraction(1)}), c * k, opaque=opaque or not free)
                result = result * term
    return result


def _of_logarithm(exponent: Value) -> tuple[Value, Value] | None:
    """Returns (x, c) where e^exponent is x^c because exponent = c·ln x. None for anything else."""
    if exponent.denominator is not UNIT or len(exponent.numerator) != 1:
        return None
    ((imaginary, roots, symbols), c), *_ = exponent.numerator.items()
    names = [name for name, power in symbols if getattr(name, "function", "") == "ln" and power == 1]
    if len(names) != 1:
        return None
    rest = (imaginary, roots, tuple(item for item in symbols if item[0] != names[0]))
    argument = names[0].argument
    return (argument, Value({rest: c})) if rest == ONE or argument.constant() is not None else None


def _pair(function: str, base: Value, argument: Value, exponent: int | Fraction = 1, opaque: bool = True) -> Value:
    name = Atom(f"{function}({base};{argument})")
    name.function, name.argument, name.base = function, argument, base
    return Value({(0, (), ((name, exponent),)): Fraction(1)}, opaque=opaque)


# ------------------------------------------------------------------------------------------------------- functions

# angle / π -> its cosine, as (coefficient, radicand) pairs
_COSINES = {
    Fraction(0): ((1, 1),),
    Fraction(1, 12): ((Fraction(1, 4), 6), (Fraction(1, 4), 2)),
    Fraction(1, 6): ((Fraction(1, 2), 3),),
    Fraction(1, 5): ((Fraction(1, 4), 5), (Fraction(1, 4), 1)),
    Fraction(1, 4): ((Fraction(1, 2), 2),),
    Fraction(1, 3): ((Fraction(1, 2), 1),),
    Fraction(2, 5): ((Fraction(1, 4), 5), (Fraction(-1, 4), 1)),
    Fraction(5, 12): ((Fraction(1, 4), 6), (Fraction(-1, 4), 2)),
    Fraction(1, 2): (),
}


def cosine(angle: Value) -> Value:
    """Returns the cosine of an angle in radians, exact for multiples of 15°, and 36° and 72°."""
    turns = _in_pi(angle)
    if turns is None:
        return _named("cos", _unsigned(angle)[0])
    turns = abs(turns) % 2
    turns = 2 - turns if turns > 1 else turns
    if turns > Fraction(1, 2):
        return -cosine(Value.number(1 - turns) * PI)
    if turns not in _COSINES:
        return _named("cos", Value.number(turns) * PI)
    result = Value.number(0)
    for c, radicand in _COSINES[turns]:
        result = result + Value.number(c) * root(Value.number(radicand), 2)
    return result


def sine(angle: Value) -> Value:
    """Returns the sine of an angle in radians, exact for multiples of 15°, and 18° and 54°."""
    turns = _in_pi(angle)
    if turns is not None:
        return cosine(Value.number(Fraction(1, 2) - turns) * PI)
    angle, sign = _unsigned(angle)
    return Value.number(sign) * _named("sin", angle)


def logarithm(value: Value, function: str = "ln") -> Value:
    """Returns the logarithm of a positive rational or a power of e, for anything else an opaque symbol."""
    constant = value.constant()
    if constant is not None and constant > 0:
        result = Value.number(0)
        try:
            primes = [*factors(constant.numerator), *((prime, -k) for prime, k in factors(constant.denominator))]
        except _NotFactored:
            return _named(function, value)
        for prime, k in primes:
            # Some read `log` without a base as base 10, others as base e.
            result = result + Value.number(k) * _named(function, Value.number(prime), opaque=function != "ln")
        return result
    if function == "ln" and value.denominator is UNIT and len(value.numerator) == 1:
        ((imaginary, roots, symbols), c), *_ = value.numerator.items()
        known = all(name == "e" or (getattr(name, "function", "") == "exp") for name, _ in symbols)
        if not imaginary and known and c > 0:  # ln(3·√2·e^(2t)) = ln 3 + ln(2)/2 + 2t
            result = logarithm(Value.number(c))
            for prime, exponent in roots:
                result = result + Value.number(exponent) * logarithm(Value.number(prime))
            for name, exponent in symbols:
                inner = Value.number(1) if name == "e" else name.argument * logarithm(name.base)
                result = result + Value.number(exponent) * inner
            return result
    return _named(function, value)


def function(name: str, argument: Value) -> Value:
    """Returns the value of a function that is known by name: sin, cis, arctan, sinh, ln, log, lg, exp, abs, Gamma, …"""
    if name in ("sin", "csc"):
        return sine(argument) if name == "sin" else Value.number(1) / sine(argument)
    if name in ("cos", "sec"):
        return cosine(argument) if name == "cos" else Value.number(1) / cosine(argument)
    if name in ("tan", "cot"):
        top, bottom = sine(argument), cosine(argument)
        return top / bottom if name == "tan" else bottom / top
    if name in ("ln", "log"):
        return logarithm(argument, name)
    if name == "exp":
        return power(E, argument)
    if name == "sqrt":
        return root(argument, 2)
    if name == "abs":
        return _absolute(argument)
    if name == "cis":
        return cosine(argument) + I * sine(argument)
    if name in ("arcsin", "arccos", "arctan"):
        return _inverse(name, argument)
    if name in ("Gamma", "zeta"):
        return _special(name, argument)
    return _named(name, argument)


def _inverse(name: str, argument: Value) -> Value:
    """Returns the angle, exactly where it is a multiple of 15° or 18° whose sine, cosine or tangent is the argument."""
    number = None if argument.symbols() else exact.approximate(argument)
    if number is not None and not number.imag and abs(number.real) <= (1 if name != "arctan" else 1e6):
        turns = Fraction(getattr(math, name.replace("rc", ""))(number.real) / math.pi).limit_denominator(12)
        angle = Value.number(turns) * PI
        if exact.same(function(name[3:], angle), argument) is True:
            return angle
    return _named(name, argument)


def _special(name: str, argument: Value) -> Value:
    """Returns Γ of integers and half-integers and ζ(2), ζ(4), …, exactly; other values of Γ and ζ are opaque."""
    n = argument.constant()
    if name == "Gamma" and n is not None and 0 < n <= 200 and n.denominator <= 2:
        if n.denominator == 1:
            return Value.number(math.factorial(int(n) - 1))
        return Value.number(math.prod(Fraction(k, 2) for k in range(1, n.numerator - 1, 2))) * root(PI, 2)
    if name == "zeta" and n in (2, 4, 6):
        return power(PI, argument) / Value.number({2: 6, 4: 90, 6: 945}[int(n)])
    return _named(name, argument)


def _absolute(value: Value) -> Value:
    """Returns |value|."""
    constant = value.constant()
    if constant is not None:
        return Value.number(abs(constant))
    if not value.opaque and not value.symbols():
        number = exact.approximate(value)
        if number is not None and number.imag == 0 and abs(number.real) > 1e-6:
            return value if number.real > 0 else -value
        if number is not None and value.denominator is UNIT:  # |3+4i| = 5
            parts = [Value({(0, *key[1:]): c for key, c in value.numerator.items() if key[0] == at}) for at in (0, 1)]
            return root(parts[0] * parts[0] + parts[1] * parts[1], 2)
    return _named("abs", _unsigned(value)[0])


def _in_pi(angle: Value) -> Fraction | None:
    """Returns angle / π where that is rational, else None."""
    return (angle / PI).constant()


def _unsigned(value: Value) -> tuple[Value, int]:
    """Returns (value or its negative, the sign), so that x-1 and 1-x have the same form."""
    if value.numerator and value.numerator[min(value.numerator)] < 0:
        return -value, -1
    return value, 1
