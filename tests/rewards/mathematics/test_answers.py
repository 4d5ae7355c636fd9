"""igrpo_jax.rewards.mathematics.answers: the structure that an answer is read to."""

import pytest

from igrpo_jax.rewards.mathematics import answers, units
from igrpo_jax.rewards.mathematics.answers import read
from igrpo_jax.rewards.mathematics.nodes import (
    Choice,
    Leaf,
    Matrix,
    Named,
    Ratio,
    Region,
    Relation,
    Sequence,
    Words,
)


def shape(node):
    """A node as nested tuples of its kind and what can be told apart in it."""
    if isinstance(node, Sequence):
        return (node.kind, *map(shape, node.items))
    if isinstance(node, Named):
        return (f"{node.name}=", shape(node.value))
    if isinstance(node, Matrix):
        return ("matrix", *(tuple(map(shape, row)) for row in node.rows))
    if isinstance(node, Ratio):
        return ("ratio", *map(shape, node.parts), node.unit)
    if isinstance(node, Choice):
        return ("choice", shape(node.short), shape(node.long))
    if isinstance(node, Words):
        return f"words {node.words}"
    if isinstance(node, Region):
        return (
            "region",
            node.name,
            *(("closed" if p[1] else "open", "closed" if p[3] else "open") for p in node.pieces),
        )
    if isinstance(node, Relation):
        return ("relation", node.sign)
    assert isinstance(node, Leaf)
    return node.text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("42.", "42"),
        ("$42$", "42"),
        ("**42**", "42"),
        (r"\text{42}", "42"),
        ("(42)", "42"),
        ("(1, 2)", ("()", "1", "2")),
        ("[1, 2)", ("[)", "1", "2")),
        ("(1; 2)", ("()", "1", "2")),
        (r"\langle 1, 2\rangle", ("()", "1", "2")),
        (r"\{1, 2\}", ("set", "1", "2")),
        ("1, 2", ("list", "1", "2")),
        ("1, 2, and 3", ("list", "1", "2", "3")),
        ("1 or 2", ("or", "1", "2")),
        (r"6, 8\text{, and }10", ("list", "6", "8", "10")),
        ("(1,2),(3,4)", ("list", ("()", "1", "2"), ("()", "3", "4"))),
        (r"\pm 2", ("list", "+2", "-2")),
        (r"x = 1 \pm 2", ("list", ("x=", "1+2"), ("x=", "1-2"))),
        (r"(\pm 1, \pm 2)", ("list", *[("()", a, b) for a in ("+1", "-1") for b in ("+2", "-2")])),
        (r"1 \pm 2 \mp 3", ("list", "1+2-3", "1-2+3")),
        ("x = 5", ("x=", "5")),
        ("5 = x", ("x=", "5")),
        ("x = y = 5", ("x=", ("y=", "5"))),
        ("p=5,q=2; p=7,q=2", ("list", ("list", ("p=", "5"), ("q=", "2")), ("list", ("p=", "7"), ("q=", "2")))),
        ("2x + z = 1", ("relation", "=")),
        ("x^2 < y", ("relation", "<")),
        (r"0.56 = 56\%", "0.56"),
        ("2 = 3", ("relation", "=")),
        (r"x \approx 11", "11"),
        (r"\frac13 \approx 0.33", ("choice", r"\frac {1}{3}", "0.33")),
        (r"\pi \approx 3", r"\pi "),
        ("x < 3", ("region", "x", ("open", "open"))),
        (r"-2 \le x < 7", ("region", "x", ("closed", "open"))),
        (r"x \ne 3", ("region", "x", ("open", "open"), ("open", "open"))),
        (r"x \in [0, 1]", ("region", "x", ("closed", "closed"))),
        (r"x \in \{1, 2\}", ("x=", ("set", "1", "2"))),
        (r"(0,1) \cup [2,3]", ("region", "", ("open", "open"), ("closed", "closed"))),
        (r"(0,1) \cup [1,3]", ("region", "", ("open", "closed"))),
        (r"\mathbb{R} \setminus \{2\}", ("region", "", ("open", "open"), ("open", "open"))),
        (r"\{x \mid x > 3\}", ("region", "x", ("open", "open"))),
        ("x > 1 and x < 3", ("region", "x", ("open", "open"))),
        ("x < 1 or x > 3", ("region", "x", ("open", "open"), ("open", "open"))),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", ("matrix", ("1", "2"), ("3", "4"))),
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", ("matrix", ("1", "2"), ("3", "4"))),
        ("3:5", ("ratio", "3", "5", "")),
        ("3:30 p.m.", ("ratio", "3", "30", "pm")),
        ("204_5", "words BASED 54"),
        (r"1010_{\text{two}}", "words BASED 10"),
        ("(D) Alina", ("choice", "D", "words alina")),
        (r"\textbf{(D)}\ 12", ("choice", "D", "12")),
        ("D)", "D"),
        ("Option D: Alina", ("choice", "D", "words alina")),
        ("(A)(B)", "(A)(B)"),  # a product
        (r"\text{no solution}", "words empty set"),
        (r"\{\}", "words empty set"),
        (r"\text{A, B}", ("list", "A", "B")),
        ("1,234", "1234"),
    ],
)
def test_read(answer, expected):
    assert shape(read(answer)) == expected


@pytest.mark.parametrize("answer", ["", " ", "$$", "...", "**"])
def test_nothing_is_none(answer):
    assert read(answer) is None


def test_what_cannot_be_read_has_no_value():
    for answer in (r"\sum_{k=1}^3 k", "1 +", "28_9_3", r"\{1,2\} \cap \{3\}"):
        node = read(answer)
        assert isinstance(node, Leaf) and node.value is None and not node.hopeless
    for answer in ("1/0", "9^{99999}", ",".join("1" * (answers.MAX_PARTS + 1)), "(" * 20 + "1,2" + ")" * 20):
        node = read(answer)
        assert isinstance(node, Leaf) and node.value is None and node.hopeless


def test_a_long_chain_of_names_does_not_recurse():
    assert read("a=" * 400 + "5") is not None


def test_units_are_taken_off():
    node = read(r"15\text{ cm}^2")
    assert (node.text, node.unit, node.percent) == ("15", units.read("cm^2"), False)
    assert read("90°").unit == units.read("degrees")
    assert read(r"12.5\%").percent


def test_thousands_are_one_number():
    assert shape(read("1,234")) == shape(read("1{,}234")) == shape(read("1234"))
    assert shape(read("1, 234")) == ("list", "1", "234")
