"""igrpo_jax.rewards.mathematics.expression: what an expression means, and what is not read."""

import pytest

from igrpo_jax.rewards.mathematics import expression
from igrpo_jax.rewards.mathematics.exact import NoValue, same
from igrpo_jax.rewards.mathematics.expression import value_of
from igrpo_jax.rewards.mathematics.tokens import Unreadable, tokenize

SAME = [
    ("2 + 3 * 4", "14"),
    ("-2^2", "-4"),
    ("1/2x", r"\frac{x}{2}"),
    (r"2\frac{1}{2}", "5/2"),
    (r"2\frac12", "5/2"),
    ("2 1/2", "5/2"),
    (r"2\frac{x}{3}", r"\frac{2x}{3}"),
    (r"\frac12", "0.5"),
    (r"\frac 3 8", "3/8"),
    (r"\frac1{72}", "1/72"),
    (r"\frac\pi2", r"\pi/2"),
    (r"\sqrt 2", r"\sqrt{2}"),
    (r"\sqrt10", r"\sqrt{10}"),
    (r"4\sqrt(2)", r"4\sqrt{2}"),
    (r"\sqrt[3]{27}", "3"),
    ("x^10", "x^{10}"),
    ("x^-1", r"\frac{1}{x}"),
    (r"x^2\frac{1}{2}", r"\frac{x^2}{2}"),  # no mixed exponent
    (r"\log_3 \frac19", "-2"),
    ("2**3", "8"),
    (r"0.\overline{3}", "1/3"),
    (r"1.2\overline{34}", "1222/990"),
    ("4.5e-3", "0.0045"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    ("abc", "c b a"),
    ("x_1", "x_{1}"),
    (r"\lambda_{\text{red}}", r"\lambda_{red}"),
    ("f'", r"f^{\prime}"),
    ("i^2", "-1"),
    (r"\mathrm{e}^0", "1"),
    (r"|3-5|", "2"),
    (r"\lfloor 7/2 \rfloor", "3"),
    (r"\sin 5x \cos x", r"\sin(5x)\cos(x)"),
    (r"\sin x (1+y)", r"(1+y)\sin x"),
    (r"\cos(2t)/5", r"\frac{\cos(2t)}{5}"),
    (r"\sin^2 x", r"(\sin x)^2"),
    (r"\sin^{-1} x", r"\arcsin x"),
    (r"\sin 30^\circ", "1/2"),
    (r"\log_2(8)", "3"),
    ("np.arcsin(10/13)", r"\arcsin\left(\frac{10}{13}\right)"),
    (r"\exp{a*t}", "e^{at}"),
    ("e^xy", "y e^x"),
]
DIFFERENT = [
    ("f(x+y)", "f(x)+f(y)"),
    ("I(0)", "0"),
    ("x_1", "x_2"),
    ("x", "X"),
    (r"\sin 30", "1/2"),  # radians
    ("2^{n}", "2^{n+1}"),
    (r"\frac{a}{b+c}", r"\frac{a}{b}+c"),
]


def value(source):
    return value_of(tokenize(source))


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same(a, b):
    assert same(value(a), value(b)) is True


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert same(value(a), value(b)) is not True


@pytest.mark.parametrize(
    "source",
    ["", "28_9", "2^3^2", "9!!!", "1,2", "x=1", "(1", r"\foo", r"\sum_{k=1}^3 k", r"1+\ldots", "+", "5!+",
     r"\frac{1}", "(" * (expression.MAX_DEPTH + 1) + "1" + ")" * (expression.MAX_DEPTH + 1), r"\sqrt" * 100 + "2",
     r"\sin" * 300 + "x", "sin " * 200, r"\text{ two words}"],
)  # fmt: skip
def test_unreadable(source):
    with pytest.raises(Unreadable):
        value(source)


@pytest.mark.parametrize(
    "source",
    [
        "1/0",
        r"\frac{1}{x-x}",
        "2^{2^{49}}",
        "10^{99999}",
        "99999!",
        r"\binom{99999}{5}",
        "1e99999",
        "1 2",
        "|x + 1 2|",
        "x3",
        "2{2}",
        r"2\frac{3}{2}",
    ],
)
def test_no_value(source):
    with pytest.raises(NoValue):
        value(source)


def test_degrees_are_reported():
    for source, outside in ((r"90^\circ", True), ("90°", True), (r"\sin 90^\circ", False), ("90", False)):
        parser = expression.Parser(tokenize(source))
        parser.parse()
        assert parser.degrees is outside
