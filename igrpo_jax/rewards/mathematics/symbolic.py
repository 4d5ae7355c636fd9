r"""Computer algebra with math-verify (LaTeX -> sympy), for the pairs that exact arithmetic cannot decide.

`equal` is slow (5 to 100 ms, seconds on hostile input) and few pairs reach it. Before it runs, bounds apply to nesting
and to the size of numbers, exponents, factorials and sums. Afterwards a check to 40 relative digits follows, because
math-verify rounds to 6 decimals and would take 1/2004! for 1/2006!.

Not here: limits on time and memory (`rewards/pool`). Model text is never evaluated as Python: math-verify's extractor
of plain expressions runs `sympy.parse_expr`, an `eval`, and is never used. sympy is imported at the first use.
"""

import functools
import itertools
import logging
import re

from igrpo_jax.rewards.mathematics import derivatives

MAX_LENGTH = 300  # characters; the longest reference answer of MATH has 159
MAX_DEPTH = 12  # nested braces and brackets
MAX_DIGITS = 400  # of one number literal
MAX_EXPONENT = 10_000  # integer exponents, factorials and binomials beyond this are not expanded
# Of each the parser considers every way in which they may nest: 60 of them take minutes. References of MATH have 2 bars
# and 2 functions.
MAX_BARS = 8
MAX_FUNCTIONS = 8

_EXPONENT = re.compile(r"\^\s*\{?\s*[({]*\s*-?(\d+)")
_FACTORIAL = re.compile(r"(\d+)\s*[)}]*\s*!")
_SUM = re.compile(r"\\[dt]?binom|\\Gamma|\\zeta|\\prod|\\sum|\\int")
# Functions that need all digits of their argument, or its factors.
_COSTLY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|sqrt)|\^\{?\\frac")
_DIGITS = re.compile(r"\d+")
_FUNCTION = re.compile(r"\\?(?:arc)?(?:log|ln|lg|exp|sin|cos|tan|cot|sec|csc)")
# What math-verify ignores, so that 5, \ldots would be 5; and what has no place in mathematics.
_DROPPED = re.compile(r"\\[lcv]?dots|['\"]|\\\$|\d\s?_|\.\.|__")
# Numbers behind a factor, which it takes for a product: 2 2, 4!2 and \frac{1}{2}12.
_BESIDE = re.compile(r"(?<![_^\d])\d+(?:\s+|\s*\{)\d|[!)]\s*\d|\\frac ?\{[^{}]*\}\{[^{}]*\}\s*\d")
_DOUBLE = re.compile(r"![\s)}\]]*!|\^\s*\{?[\w.]*\}?\s*\^")  # (9!)!, 9^9^9
# Of symbols: \gcd(m,n) would be 1, as of polynomials, and \{x\}+1 would be x+1.
_OF_INTEGERS = re.compile(r"gcd|lcm|[-+\d)]\s*\\\{|\\cdot\s*\\\{|\\\}\s*(?:[-+*^\d(]|\\cdot)", re.IGNORECASE)
_REFUSED = (_DOUBLE, _DROPPED, _BESIDE, _OF_INTEGERS)


@functools.lru_cache(maxsize=1024)
def equal(a: str, b: str) -> bool:
    """Returns whether math-verify finds two LaTeX answers equal. Symmetric.

    An answer that is refused here, or that math-verify can't parse, equals nothing.
    """
    if not (_acceptable(a) and _acceptable(b)):
        return False
    try:
        return _verified(a, b)
    except MemoryError:
        raise
    except Exception:  # sympy and its parser raise nearly anything on input that is not mathematics
        return False


@functools.cache  # a worker may be a fork of a process that has done it
def warm_up() -> None:
    """Prepares the imports and tables of sympy and its LaTeX parser, which take seconds."""
    _verified("x+1", "1+x")
    _verified(r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}")


def _acceptable(answer: str) -> bool:
    """Returns False for text that sympy would misread or might expand without end. A deadline applies all the same."""
    depths = itertools.accumulate((character in "([{") - (character in ")]}") for character in answer)
    numbers = _DIGITS.findall(answer)
    expanded = _EXPONENT.findall(answer) + _FACTORIAL.findall(answer) + (numbers if _SUM.search(answer) else [])
    most = 100 if _COSTLY.search(answer) else MAX_EXPONENT
    return (
        len(answer) <= MAX_LENGTH
        and max(depths, default=0) <= MAX_DEPTH
        and all(len(digits) <= MAX_DIGITS for digits in numbers)
        and all(int(digits[:9]) <= most for digits in expanded)
        and answer.count("|") <= MAX_BARS
        and len(_FUNCTION.findall(answer)) <= MAX_FUNCTIONS
        and not (_is_tower(answer) or any(refused.search(answer) for refused in _REFUSED))
        and not derivatives.is_misread(answer)
    )


def _is_tower(answer: str) -> bool:
    """Returns True for exponents three deep, or two deep with a number as the inner base, as in 2^{2^{49}}."""
    stack: list[bool] = []  # of open brackets: does it open an exponent?
    previous = ""
    for character in answer:
        if character in "({":
            stack.append(previous == "^")
        elif character in ")}" and stack:
            stack.pop()
        elif character == "^" and (sum(stack) >= 2 or (any(stack) and previous.isdigit())):
            return True
        if not character.isspace() and not (character in "({" and previous == "^"):
            previous = character
    return False


def _verified(a: str, b: str) -> bool:
    """Returns whether math-verify finds the answers equal in both directions, and the check of digits agrees."""
    import latex2sympy2_extended  # these import sympy
    import math_verify

    # It warns once that nothing stops a slow parse, but the pool's deadline does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    # Its own removal of units would read 3m as 3.
    reading = latex2sympy2_extended.NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    parsed = [
        math_verify.parse(
            f"${answer}$",
            [math_verify.LatexExtractionConfig(normalization_config=reading)],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        for answer in (a, b)
    ]
    # In both directions: as a prediction, 2x+z=1 would pass for 1.
    for gold, prediction in (parsed, reversed(parsed)):
        if not gold or not math_verify.verify(gold, prediction, allow_set_relation_comp=True, timeout_seconds=None):
            return False
    return _confirmed(parsed[0][0], parsed[1][0])


def _confirmed(a, b) -> bool:
    """Compares sympy's numbers, which math-verify found equal within 6 decimals, again to 40 relative digits.

    Those of two matrices are compared one by one.
    """
    import sympy

    if isinstance(a, sympy.MatrixBase | sympy.MatrixExpr) and isinstance(b, sympy.MatrixBase | sympy.MatrixExpr):
        a, b = (sympy.ImmutableMatrix(side.doit()) for side in (a, b))
        return a.shape == b.shape and all(map(_confirmed, a, b))
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and a.is_number and b.is_number):
        return True
    if a.is_Rational and b.is_Rational:
        return a == b
    # A decimal among surds has only 15 digits.
    digits = 12 if a.has(sympy.Float) or b.has(sympy.Float) else 40
    a, b = a.evalf(digits + 10), b.evalf(digits + 10)
    scale = max(abs(a), abs(b))
    return bool(abs(a - b) <= scale * sympy.Float(10) ** -digits)
