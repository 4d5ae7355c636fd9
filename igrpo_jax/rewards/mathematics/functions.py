"""Powers, exponentials, logarithms and trigonometric functions of exact values.

A result is exact where it is in the ring of `exact`: roots of rationals and of products, e^(iπ/6), 2^(n-1),
ln 8 = 3·ln 2, the sine of multiples of 15°. Anything else becomes an opaque symbol with a canonical argument:
sin(-x) = -sin(x), tan(x) = sin(x)/cos(x), √(4x+4) = 2·√(x+1); sinh(x) is (e^x - e^-x)/2. All functions raise NoValue
beyond MAX_EXPONENT and the limits of `exact`.
"""

import math
from collections.abc import Callable
from fractions import Fraction

from igrpo_jax.rewards.mathematics import exact
from igrpo_jax.rewards.mathematics.exact import ONE, PI, UNIT, Atom, E, I, NoValue, TooManyTerms, Value
from igrpo_jax.rewards.mathematics.roots import NotFactored, loses_sign, named, primes, root, without_content

MAX_EXPONENT = 10_000  # of integer powers; also the largest n of n! and of binomials


def power(base: Value, exponent: Value) -> Value:
    """Returns base ** exponent. Raises NoValue."""
    constant = exponent.constant()
    if constant is None:
        return _exponential(base, exponent)
    if constant.denominator != 1:
        return power(root(base, constant.denominator), Value.number(constant.numerator))
    n = constant.numerator
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
            result = result * result * base if bit == "1" else result * result
        return result
    except TooManyTerms:
        return named("pow", base, Fraction(n))


def _exponential(base: Value, exponent: Value) -> Value:
    """Returns base ** exponent for an exponent that is not a rational number.

    2^(n-1) = 2^n/2, e^(-2t) = (e^t)^-2, e^(iπ) = -1, e^(2·ln x) = x^2, 2^(log_2 x) = x.
    """
    opaque = base.opaque or exponent.opaque
    constant = base.constant()
    is_e = base.numerator == E.numerator and base.denominator is UNIT
    if not (is_e or (constant is not None and constant > 0)):
        return named("pow", exponent, base=base)
    if exponent.denominator is not UNIT:
        ratio = exact.proportional(logarithm(base), Value(exponent.denominator))
        if ratio is None or is_e:
            return named("pow", exponent, base=base)
        return power(E, Value(exponent.numerator, opaque=exponent.opaque) * Value.number(ratio))
    try:
        bases = [(E, 1)] if is_e else [(Value.number(p), k) for p, k in primes(constant)]
    except NotFactored:
        return named("pow", exponent, base=base)
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
                term = named("exp", Value({key: Fraction(1)}), c * k, opaque or not free, prime)
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
    turns = (angle / PI).constant()
    if turns is None:
        return named("cos", _unsigned(angle)[0])
    turns = abs(turns) % 2
    turns = 2 - turns if turns > 1 else turns
    if turns > Fraction(1, 2):
        return -cosine(Value.number(1 - turns) * PI)
    if turns not in _COSINES:
        return named("cos", Value.number(turns) * PI)
    result = Value.number(0)
    for c, radicand in _COSINES[turns]:
        result = result + Value.number(c) * root(Value.number(radicand), 2)
    return result


def sine(angle: Value) -> Value:
    """Returns the sine of an angle in radians, exact for multiples of 15°, and 18° and 54°."""
    turns = (angle / PI).constant()
    if turns is not None:
        return cosine(Value.number(Fraction(1, 2) - turns) * PI)
    angle, sign = _unsigned(angle)
    return Value.number(sign) * named("sin", angle)


def logarithm(value: Value, function: str = "ln") -> Value:
    """Returns the logarithm as a sum over the factors of the value, whose symbols are read as positive.

    ln 8 = 3·ln 2, ln(x/y) = ln x - ln y, ln(3·√2·e^(2t)) = ln 3 + ln(2)/2 + 2t, but ln(x²) = 2·ln|x|.
    """
    if value.denominator is not UNIT:
        bottom, sign = _unsigned(Value(value.denominator, opaque=value.opaque))
        top = Value.number(sign) * Value(value.numerator, opaque=value.opaque)
        return logarithm(top, function) - logarithm(bottom, function)
    if len(value.numerator) > 1:
        content, rest = without_content(value)
        return logarithm(Value.number(content), function) + named(function, rest)
    for (imaginary, roots, symbols), c in value.numerator.items():
        try:
            numbers = primes(c) if c > 0 and not imaginary else None
        except NotFactored:
            numbers = None
        if numbers is not None:
            # Some read `log` without a base as base 10, others as base e.
            bases = [(named(function, Value.number(p), opaque=function != "ln"), k) for p, k in [*numbers, *roots]]
            bases += [(_factor_logarithm(name, k, function), k) for name, k in symbols]
            return sum((Value.number(k) * part for part, k in bases), Value.number(0))
    return named(function, value)


def _factor_logarithm(name: str, power: int | Fraction, function: str) -> Value:
    """Returns the logarithm of a symbol that stands to a power."""
    if name == "e" and function == "ln":
        return Value.number(1)
    if isinstance(name, Atom) and name.base is not None:  # 2^n
        return name.argument * logarithm(name.base, function)
    is_root = isinstance(name, Atom) and name.function == "pow"
    base = name.argument if is_root else Value({(0, (), ((name, 1),)): Fraction(1)})
    base = _absolute(base) if loses_sign(name, power) else base
    return logarithm(base, function) if is_root else named(function, base)


def function(name: str, argument: Value) -> Value:
    """Returns the value of a function that is known by name: sin, cis, arctan, sinh, ln, log, lg, exp, abs, Gamma, …"""
    if name in ("ln", "log"):
        return logarithm(argument, name)
    if name in ("arcsin", "arccos", "arctan"):
        return _inverse(name, argument)
    return _FUNCTIONS[name](argument) if name in _FUNCTIONS else named(name, argument)


def divisor(name: str, arguments: list[Value]) -> Value:
    """Returns gcd or lcm of integers. With symbols it is one symbol, whatever the order of the arguments."""
    integers = [argument.constant() for argument in arguments]
    if all(n is not None and n.denominator == 1 for n in integers):
        return Value.number(getattr(math, name)(*(n.numerator for n in integers)))
    return Value.symbol(f"{name}({','.join(sorted(map(str, arguments)))})")


def fractional_part(value: Value) -> Value:
    r"""Returns \{value\} = value - floor(value), which is one symbol unless the value is rational."""
    constant = value.constant()
    return Value.symbol(f"{{{value}}}") if constant is None else Value.number(constant % 1)


def _inverse(name: str, argument: Value) -> Value:
    """Returns the angle, exactly where it is a multiple of 15° or 18° whose sine, cosine or tangent is the argument."""
    number = None if argument.symbols() else exact.approximate(argument)
    if number is not None and not number.imag and abs(number.real) <= (1 if name != "arctan" else 1e6):
        turns = Fraction(getattr(math, name.replace("rc", ""))(number.real) / math.pi).limit_denominator(12)
        angle = Value.number(turns) * PI
        if exact.same(function(name[3:], angle), argument) is True:
            return angle
    return named(name, argument)


def _arccot(argument: Value) -> Value:
    """Returns arctan(1/x), but not of negative numbers, for which some take an angle from π/2 to π."""
    if not argument.numerator:
        return PI / Value.number(2)
    number = None if argument.symbols() else exact.approximate(argument)
    is_known = argument.symbols() or (number is not None and not number.imag and number.real > 0)
    return _inverse("arctan", _ONE / argument) if is_known else Value.symbol(f"arccot({argument})")


def _written_out(name: str, expanded: Callable[[Value], Value]) -> Callable[[Value], Value]:
    """Returns a hyperbolic function or its inverse as exponentials or logarithms, unless its argument holds functions.

    The expansion has the argument several times, so that nested ones would grow without end.
    """
    has_atoms = lambda value: any(isinstance(symbol, Atom) for symbol in value.symbols())
    return lambda value: named(name, value) if has_atoms(value) else expanded(value)


def _half_sum(power_of_e: Value, sign: int) -> Value:
    """Returns (e^x + e^-x)/2 or (e^x - e^-x)/2 for e^x."""
    return (power_of_e + Value.number(sign) / power_of_e) / Value.number(2)


def _hyperbolic_tangent(power_of_e: Value) -> Value:
    return _half_sum(power_of_e, -1) / _half_sum(power_of_e, 1)


def _gamma(argument: Value) -> Value:
    """Returns Γ of positive integers and half-integers exactly."""
    n = argument.constant()
    if n is None or not 0 < n <= 200 or n.denominator > 2:
        return named("Gamma", argument)
    product = Value.number(math.prod(n - k for k in range(1, math.ceil(n))))
    return product if n.denominator == 1 else product * root(PI, 2)


def _zeta(argument: Value) -> Value:
    """Returns ζ(2), ζ(4) and ζ(6) exactly."""
    n = argument.constant()
    divisor = {2: 6, 4: 90, 6: 945}.get(int(n)) if n in (2, 4, 6) else None
    return power(PI, argument) / Value.number(divisor) if divisor else named("zeta", argument)


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
    if value.denominator is not UNIT:
        parts = [Value(part, opaque=value.opaque) for part in (value.numerator, value.denominator)]
        return _absolute(parts[0]) / _absolute(parts[1])
    if len(value.numerator) != 1:
        return named("abs", _unsigned(value)[0])
    ((_, roots, symbols), c), *_ = value.numerator.items()
    result = Value({(0, roots, ()): abs(c)})
    for name, exponent in symbols:
        positive = Value({(0, (), ((name, exponent),)): Fraction(1)}, opaque=value.opaque)
        symbol = Value({(0, (), ((name, 1),)): Fraction(1)}, opaque=value.opaque)
        result = result * (positive if _is_positive(name) else named("abs", symbol, exponent))
    return result


def _is_positive(name: str) -> bool:
    """Returns whether a symbol is a positive number: π, e, |x|, or a positive number to a real power."""
    function = getattr(name, "function", "")
    is_real = function == "exp" and not any(key[0] for key in name.argument.numerator)
    return name in ("π", "e") or function == "abs" or is_real


def _unsigned(value: Value) -> tuple[Value, int]:
    """Returns (value or its negative, the sign), so that x-1 and 1-x have the same form."""
    if value.numerator and value.numerator[min(value.numerator)] < 0:
        return -value, -1
    return value, 1


_ONE = Value.number(1)
_FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    "sin": sine,
    "cos": cosine,
    "tan": lambda angle: sine(angle) / cosine(angle),
    "cot": lambda angle: cosine(angle) / sine(angle),
    "sec": lambda angle: Value.number(1) / cosine(angle),
    "csc": lambda angle: Value.number(1) / sine(angle),
    "arccot": _arccot,
    "arsinh": _written_out("arsinh", lambda value: logarithm(value + root(value * value + _ONE, 2))),
    "arcosh": _written_out("arcosh", lambda value: logarithm(value + root(value * value - _ONE, 2))),
    "artanh": _written_out("artanh", lambda value: logarithm((_ONE + value) / (_ONE - value)) / Value.number(2)),
    "sinh": _written_out("sinh", lambda value: _half_sum(power(E, value), -1)),
    "cosh": _written_out("cosh", lambda value: _half_sum(power(E, value), 1)),
    "tanh": _written_out("tanh", lambda value: _hyperbolic_tangent(power(E, value))),
    "cis": lambda angle: cosine(angle) + I * sine(angle),
    "exp": lambda exponent: power(E, exponent),
    "sqrt": lambda value: root(value, 2),
    "abs": _absolute,
    "Gamma": _gamma,
    "zeta": _zeta,
}
