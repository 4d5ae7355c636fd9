r"""What an answer can be made of: a number with a unit, a tuple, a list, an interval, a matrix, an equation, words, …

Every node has a `text`, which is LaTeX with one spelling for all ways to write the same answer. Not here: reading
(`answers`, `leaves`), comparing (`comparison`).
"""

from dataclasses import dataclass

from igrpo_jax.rewards.mathematics import units
from igrpo_jax.rewards.mathematics.exact import Value
from igrpo_jax.rewards.mathematics.units import Unit


@dataclass(frozen=True)
class Node:
    """Any part of an answer."""

    text: str


@dataclass(frozen=True)
class Leaf(Node):
    """An expression, without the unit, percent or money sign around it."""

    value: Value | None  # None: not read, or without a value
    unit: Unit = units.NONE
    percent: bool = False
    hopeless: bool = False  # division by zero or beyond the limits, so that nothing else tries to read it
    compound: bool = False  # 2 hours 30 minutes, which equals no number without a unit


@dataclass(frozen=True)
class Words(Node):
    """Words alone, without case."""

    words: str


@dataclass(frozen=True)
class Choice(Node):
    """Two readings of an answer, each of which may be meant: (D) Alina, and 42_{10} as a number and as digits."""

    short: Node
    long: Node


@dataclass(frozen=True)
class Named(Node):
    """`x = 5`, `AB = 7`, `x \\in [0, 1]`."""

    name: str
    value: Node
    equation: Value | None  # left side minus right side
    alias: "Named | None" = None  # f(x) = x^2 for f(n) = n^2
    domain: str = ""  # "integer", if the equation is stated for all integers n
    whole: Node | None = None  # the answer with its "for all integers n"


@dataclass(frozen=True)
class Relation(Node):
    """left - right = 0 or ≠ 0, or (for "<" and "leq") left - right < 0 or ≤ 0."""

    sign: str
    difference: Value | None


@dataclass(frozen=True)
class Sequence(Node):
    """Several answers. `kind` is "list" or "or" (bare, with commas or "or"), "set", or a tuple's brackets, as "[)"."""

    kind: str
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Region(Node):
    """A set of real numbers: sorted, disjoint pieces (low, whether closed, high, whether closed); None = infinity."""

    name: str
    pieces: tuple


@dataclass(frozen=True)
class Matrix(Node):
    """A matrix by its rows."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Ratio(Node):
    """A ratio such as `3:5`, or a time of day."""

    parts: tuple[Node, ...]
    unit: str  # of a time: "am", "pm"; else the name of a unit
