"""igrpo_jax.rewards.mathematics.tokens: numbers with their separators, spellings of the same answer, brackets."""

import pytest

from igrpo_jax.rewards.mathematics.tokens import is_enclosed, latex, split, tokenize


def texts(source):
    return [token.text for token in tokenize(source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("1,234", ["1234"]),
        ("1,234,567.5", ["1234567.5"]),
        (r"1{,}234", ["1234"]),
        (r"32,\! 349", ["32349"]),
        (r"1\,234", ["1234"]),
        ("1 234 567", ["1234567"]),
        (r"\frac{1,234}{2}", ["frac", "{", "1234", "}", "{", "2", "}"]),
        (r"3{,}5", ["3.5"]),
        (r"0{,}125", ["0.125"]),
        ("1,23", ["1", ",", "23"]),
        ("1,2345", ["1", ",", "2345"]),
        ("1,2,345", ["1", ",", "2", ",", "345"]),
        ("0,111", ["0", ",", "111"]),
        ("(1,234)", ["(", "1", ",", "234", ")"]),  # a pair
        (r"\{1,234\}", ["\\{", "1", ",", "234", "\\}"]),
        ("1 2", ["1", "2"]),
        ("4.5e33", ["4.5e33"]),
        ("2e", ["2", "e"]),
        ("-1./3", ["-", "1.", "/", "3"]),
        ("43_5.", ["43", "_", "5", "."]),
        (".5", [".5"]),
    ],
)
def test_numbers(source, expected):
    assert texts(source) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\left( x \right)", "(x)"),
        (r"x \leq 2", "x<=2"),
        (r"x \le 2", "x ≤ 2"),
        ("π", r"\pi"),
        ("2×3", r"2\cdot 3"),
        ("$x$", "x"),
        (r"1 \text{ and } 2", "1 and 2"),
        ("sqrt(2)", r"\sqrt{2}"),
        ("2**x", "2**x"),
        ("x^(1/2)", "x^{1/2}"),
        (r"\tfrac{1}{2}", r"\cfrac{1}{2}"),
        (r"\tfrac{1}{2}", r"\frac{1}{2}"),
        (r"\dbinom{4}{2}", r"\binom{4}{2}"),
        (r"\tbinom{4}{2}", r"\binom{4}{2}"),
        (r"4.5e3", r"4.5 \times 10^{3}"),
        (r"90°", r"90^\circ"),
    ],
)
def test_one_spelling(one, other):
    assert latex(tokenize(one)) == latex(tokenize(other))


@pytest.mark.parametrize(
    ("one", "others"),
    [
        ("ne", "neq"),
        ("leq", "le leqslant"),
        ("geq", "ge geqslant"),
        ("<", "lt"),
        (">", "gt"),
        (":", "colon"),
        ("*", "cdot times ast"),
        ("/", "div"),
        ("|", "lvert rvert vert lVert rVert Vert mid"),
        ("[", "lbrack"),
        ("]", "rbrack"),
        ("(", "lparen"),
        (")", "rparen"),
        ("\\{", "lbrace"),
        ("\\}", "rbrace"),
        ("cup", "bigcup"),
        ("varnothing", "emptyset"),
        ("approx", "thickapprox doteq fallingdotseq"),
        ("sim", "thicksim"),
        ("setminus", "backslash"),
        ("epsilon", "varepsilon"),
        ("phi", "varphi"),
        ("ldots", "dots cdots dotsc dotsb dotso"),
        ("lor", "vee"),
        ("land", "wedge"),
        ("neg", "lnot"),
        ("bmod", "mod"),
        ("to", "rightarrow"),
        ("implies", "Rightarrow"),
    ],
)
def test_commands_of_the_same_meaning(one, others):
    assert [texts(f"\\{other} 2") for other in others.split()] == [[one, "2"]] * len(others.split())


def test_commands_of_text():
    names = "text textbf textit textrm textsf texttt textnormal textup mbox hbox emph operatorname"
    for name in f"{names} mathrm mathbf mathit mathsf mathtt bm boldsymbol".split():
        assert tokenize(rf"\{name}{{two words}}") == [("text", "two words", False)]


def test_spellings_that_stay_apart():
    assert latex(tokenize("1 2")) != latex(tokenize("12"))
    assert latex(tokenize(r"\text{(}")) != latex(tokenize("("))


def test_an_odd_dollar_is_money():
    assert texts("$5") == ["\\$", "5"]
    assert texts("$5$") == ["5"]
    assert texts(r"\$5") == ["\\$", "5"]


def test_split_leaves_brackets_alone():
    parts, found = split(tokenize(r"(1,2), \{3,4\} and \frac{5,6}{7}"), {",", "and"})
    assert [latex(part) for part in parts] == ["(1,2)", r"\{3,4\}", r"\frac {5,6}{7}"]
    assert found == [",", "and"]


@pytest.mark.parametrize(
    ("source", "expected"), [("(1+2)", True), ("(1)+(2)", False), ("1", False), ("(", False), (")(", False)]
)
def test_is_enclosed(source, expected):
    assert is_enclosed(tokenize(source)) is expected


def test_text_is_taken_whole():
    tokens = tokenize(r"5\text{ cm {a} b}")
    assert [(token.kind, token.text) for token in tokens] == [("number", "5"), ("text", " cm {a} b")]
    assert texts(r"\text{never closed") == ["text", "{", "never", "closed"]
