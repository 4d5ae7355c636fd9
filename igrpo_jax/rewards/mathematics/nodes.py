r"""What an answer can be made of: a number with a unit, a tuple, a list, an interval, a matrix, an equation, words, …

Every node carries `text`, one spelling for all ways to write the same answer, which is LaTeX. Not here: reading
(`answers`), comparing (`grader`).
"""

from dataclasses import dataclass

from igrpo_jax.rewards.mathematics.exact import Value


@dataclass(frozen=True)
class Node:
    text: str


@dataclass(frozen=True)
class Leaf(Node):
    """An expression, without the unit, percent or money sign around it."""

    value: Value | None  # None: not read, or without a value
    unit: str = ""
    percent: bool = False
    hopeless: bool = False  # division by zero or beyond the limits: nobody shall try it again
    listed: "Node | None" = None  # 1,234 may also be the list 1, 234


@dataclass(frozen=True)
class Words(Node):
    words: str


@dataclass(frozen=True)
class Choice(Node):
    """`(D) Alina`: a letter with what it stands for."""

    letter: Node
    content: Node


@dataclass(frozen=True)
class Named(Node):
    """`x = 5`, `AB = 7`, `x \\in [0, 1]`."""

    name: str
    value: Node
    equation: Value | None  # left side minus right side


@dataclass(frozen=True)
class Relation(Node):
    """left - right = 0, or (for "<" and "<=") right - left > 0 or ≥ 0."""

    sign: str
    difference: Value | None


@dataclass(frozen=True)
class Sequence(Node):
    """kind: "list" and "or" (bare, with commas or "or"), "set", or the two brackets of a tuple, as "[)"."""

    kind: str
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Region(Node):
    """A set of real numbers: pieces (low, whether closed, high, whether closed), None for infinity; sorted, apart."""

    name: str
    pieces: tuple


@dataclass(frozen=True)
class Matrix(Node):
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Ratio(Node):
    """`3:5`, and times of day."""

    parts: tuple[Node, ...]
    unit: str


@dataclass(frozen=True)
class Based(Node):
    """Digits in a base, `204_5`."""

    number: int
