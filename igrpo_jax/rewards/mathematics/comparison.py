"""When two answers, read into their structure (`nodes`), are equal.

Structures are compared part by part: a tuple with a tuple, an interval with an inequality, never a set with a point.
Expressions are compared by their exact values (`exact`), and by `symbolic` where those cannot decide. The conventions
are listed in `grader`.
"""

import itertools
import re
from collections.abc import Iterable
from fractions import Fraction

from igrpo_jax.rewards.mathematics import derivatives, exact, names, regions, symbolic, units
from igrpo_jax.rewards.mathematics.exact import Value
from igrpo_jax.rewards.mathematics.nodes import (
    Choice,
    Leaf,
    Matrix,
    Named,
    Node,
    Ratio,
    Region,
    Relation,
    Sequence,
    Words,
)
from igrpo_jax.rewards.mathematics.tokens import latex, split, tokenize


def same_answer(a: Node, b: Node) -> bool:
    """Returns whether two structures are equal. Symmetric. May raise NoValue."""
    if a.text == b.text and type(a) is type(b):
        return not isinstance(a, Leaf) or a.unit == b.unit or (_units_agree(a, b) and units.ratio(a.unit, b.unit) == 1)
    if _RANKS[type(a)] > _RANKS[type(b)]:
        a, b = b, a
    return _COMPARISONS[type(a)](a, b)


# ------------------------------------------------------------------------------------------------------------ leaves


def _same_leaf(a: Leaf, b: Node) -> bool:
    if not isinstance(b, Leaf) or a.hopeless or b.hopeless or not _units_agree(a, b):
        return False
    if a.value is None or b.value is None:
        return symbolic.equal(a.text, b.text)
    if a.percent == b.percent:
        return _same_value(a, b)
    percent, plain = (a, b) if a.percent else (b, a)
    hundredth = Value.number(100) * plain.value
    return _same_value(percent, plain) or exact.same(percent.value, hundredth) is True


def _same_value(a: Leaf, b: Leaf) -> bool:
    ratio = units.ratio(a.unit, b.unit)
    if ratio != 1:
        return exact.same(Value.number(ratio) * a.value, b.value) is True
    equal = exact.same(a.value, b.value)
    if equal is None:
        return symbolic.equal(a.text, b.text)
    return equal or _same_progression(a.value, b.value)


def _same_progression(a: Value, b: Value) -> bool:
    """Returns whether π/4 + kπ and n·π - 3π/4 are the same numbers, where k, m and n stand for any integers."""
    starts, steps = [], []
    for value in (a, b):
        keys = [(0, (), tuple(sorted(((name, 1), ("π", 1))))) for name in value.symbols() & {"k", "m", "n"}]
        if len(value.symbols()) != 1 or not keys or keys[0] not in value.numerator or value.denominator != exact.UNIT:
            return False
        starts.append(Value({key: c for key, c in value.numerator.items() if key != keys[0]}))
        steps.append(value.numerator[keys[0]])
    shift = ((starts[0] - starts[1]) / exact.PI).constant()
    return abs(steps[0]) == abs(steps[1]) and shift is not None and (shift / steps[0]).denominator == 1


def _units_agree(a: Leaf, b: Leaf) -> bool:
    if a.percent != b.percent and (a.unit.name or b.unit.name):
        return False
    return units.agree(a.unit, b.unit) and not ((a.compound or b.compound) and "" in (a.unit.name, b.unit.name))


# ------------------------------------------------------------------------------------------------------------- words


def _same_words(a: Words, b: Node) -> bool:
    if isinstance(b, Words):
        return a.words == b.words
    if isinstance(b, Leaf) and b.value is not None:
        return bool(re.fullmatch(r"[A-Za-z]+", b.text)) and a.words == b.text.casefold()
    return False


def _same_choice(a: Choice, b: Node) -> bool:
    if isinstance(b, Choice):
        return same_answer(a.short, b.short) and same_answer(a.long, b.long)
    return same_answer(a.short, b) or same_answer(a.long, b)


# --------------------------------------------------------------------------------------------- equations and regions


def _same_named(a: Named, b: Node) -> bool:
    if isinstance(b, Named):
        if a.domain and b.domain and a.domain != b.domain:
            return False
        if a.name == b.name and same_answer(a.value, b.value):
            return True
        if (a.alias or b.alias) and same_answer(a.alias or a, b.alias or b):
            return True
        return a.equation is not None and b.equation is not None and _same_equation(a.equation, b.equation)
    if isinstance(b, Relation):
        return b.sign == "=" and None not in (a.equation, b.difference) and _same_equation(a.equation, b.difference)
    if isinstance(b, Region) and b.name not in ("", a.name):
        return False
    return same_answer(a.value, b) or (a.whole is not None and same_answer(a.whole, b))


def _same_relation(a: Relation, b: Node) -> bool:
    if not isinstance(b, Relation) or a.sign != b.sign:
        return False
    if a.difference is None or b.difference is None:
        return _same_sides(a.text, b.text) if a.sign == "=" else symbolic.equal(a.text, b.text)
    if a.sign in ("=", "ne"):
        return _same_equation(a.difference, b.difference)
    scale = exact.proportional(a.difference, b.difference)
    return scale is not None and scale > 0


def _same_sides(a: str, b: str) -> bool:
    """Returns whether computer algebra finds both sides of two equations equal. It reads the right ones alone as well.

    So 1 + \\int f = 5 would pass for 2 + \\int f = 5.
    """
    sides = [[latex(side) for side in split(tokenize(text), {"="})[0]] for text in (a, b)]
    if len(sides[0]) != len(sides[1]):
        return False
    return any(all(map(symbolic.equal, sides[0], others)) for others in (sides[1], sides[1][::-1]))


def _same_equation(a: Value, b: Value) -> bool:
    """Returns whether a = 0 and b = 0 are the same equation: one is a multiple of the other, denominators aside."""
    primes = [any(name.endswith("'") for name in side.symbols()) for side in (a, b)]
    if primes[0] != primes[1]:
        a, b = (a, derivatives.primed(b, a.symbols())) if primes[0] else (derivatives.primed(a, b.symbols()), b)
    if exact.proportional(a, b) is not None:
        return True
    return exact.proportional(exact.cleared(a), exact.cleared(b)) is not None


def _same_region(a: Region, b: Node) -> bool:
    other = regions.region_of(b)
    if other is None or (a.name and other.name and a.name != other.name) or len(a.pieces) != len(other.pieces):
        return False
    ends = zip(itertools.chain(*a.pieces), itertools.chain(*other.pieces), strict=True)
    return all(x == y if None in (x, y) or isinstance(x, bool) else exact.same(x, y) is True for x, y in ends)


# --------------------------------------------------------------------------------------------------------- sequences


def _same_sequence(a: Sequence, b: Node) -> bool:
    if isinstance(b, Sequence):
        return _same_sequences(a, b)
    if a.kind == "or" and all(same_answer(a.items[0], item) for item in a.items[1:]):
        return same_answer(a.items[0], b)  # one value in several notations
    if isinstance(b, Matrix):
        return _is_ordered(a) and _in_order(a.items, _vector(b))
    if not isinstance(b, Leaf):
        return False
    if a.kind in ("()", "[]") and b.value is not None:
        return _is_vector(a.items, b)
    if a.kind == "set" and len(a.items) == 1:
        return same_answer(a.items[0], b)
    return _asked(a, b)


def _asked(a: Node, b: Node) -> bool:
    """Returns whether computer algebra finds the structure equal to an expression that was not read here."""
    return isinstance(b, Leaf) and b.value is None and not b.hopeless and symbolic.equal(a.text, b.text)


def _same_sequences(a: Sequence, b: Sequence) -> bool:
    if _is_ordered(a) and _is_ordered(b):
        return (a.kind == b.kind or len(a.items) > 2) and _in_order(a.items, b.items)
    if _is_ordered(b):
        a, b = b, a
    if _is_ordered(a) and b.kind == "set" and len(b.items) == 1 and isinstance(b.items[0], Sequence):
        return same_answer(a, b.items[0])  # the set of one solution (1, 2)
    if _is_ordered(a):
        is_point = a.kind == "()" or (a.kind == "[]" and len(a.items) > 2)
        return is_point and b.kind == "list" and _in_order(a.items, _by_name(b.items))
    if {a.kind, b.kind} != {"set"}:
        # x_1 and x_2 are roots in any order.
        stated = ([item.name for item in side.items if isinstance(item, Named)] for side in (a, b))
        named = [len({"x" if name.startswith("x_") else name for name in side}) for side in stated]
        if (named[0] == len(a.items) and not named[1]) or (named[1] == len(b.items) and not named[0]):
            return _in_order(a.items, b.items)
    # Without this, all pairs of a long list of garbage would be compared before any with the reference.
    if not all(any(same_answer(item, other) for other in b.items) for item in a.items):
        return False
    if not all(any(same_answer(item, other) for item in a.items) for other in b.items):
        return False
    return _matched(_distinct(a, b), _distinct(b, a))


def _is_ordered(sequence: Sequence) -> bool:
    return sequence.kind[0] in "(["


def _in_order(a: Iterable[Node], b: Iterable[Node]) -> bool:
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(map(same_answer, a, b))


def _by_name(items: tuple[Node, ...]) -> tuple[Node, ...]:
    """Returns named items in the order that their names have in a point: `y = 2, x = 1` is (1, 2)."""
    if all(isinstance(item, Named) for item in items) and len({item.name for item in items}) == len(items):
        return tuple(items[at] for at in names.in_order([item.name for item in items]))
    return items


def _distinct(sequence: Sequence, other: Sequence) -> list[Node]:
    """Returns the elements, each once in a set or a list of points. A list of numbers keeps its repetitions."""
    points = all(isinstance(item, Sequence) for item in sequence.items)
    if "set" not in (sequence.kind, other.kind) and not points:
        return list(sequence.items)
    kept: list[Node] = []
    for item in sequence.items:
        kept += [] if any(same_answer(item, other) for other in kept) else [item]
    return kept


def _matched(a: list[Node], b: list[Node]) -> bool:
    """Returns whether each element of one list can be paired with an equal element of the other."""
    rest = list(b) if len(a) == len(b) else []
    for item in a:
        at = next((at for at, other in enumerate(rest) if same_answer(item, other)), None)
        if at is None:
            return False
        del rest[at]
    return len(a) == len(b)


def _same_matrix(a: Matrix, b: Node) -> bool:
    if isinstance(b, Matrix):
        if len(a.rows) != len(b.rows) and _vector(a):
            return _in_order(_vector(a), _vector(b))
        return len(a.rows) == len(b.rows) and all(map(_in_order, a.rows, b.rows))
    return _is_vector(_vector(a), b) if isinstance(b, Leaf) and b.value is not None else _asked(a, b)


def _vector(matrix: Matrix) -> tuple[Node, ...]:
    """Returns the elements of a single row or column, and nothing for any other matrix."""
    rows = matrix.rows if len(matrix.rows) == 1 else tuple(zip(*matrix.rows, strict=True))
    return rows[0] if len(rows) == 1 else ()


def _is_vector(items: tuple[Node, ...], b: Leaf) -> bool:
    """Returns whether a value such as i + 2j + 3k has these components."""
    components = _components(b.value, len(items))
    return bool(components) and _in_order(items, components)


def _components(value: Value, length: int) -> list[Node]:
    """Returns i + 2j + 3k as 1, 2, 3; an empty list where a term is not a multiple of i, j or k, or only i occurs."""
    parts: list[dict] = [{}, {}, {}]
    for (imaginary, roots, symbols), c in value.numerator.items():
        units = [0] * imaginary + [" jk".index(name) for name, power in symbols if name in ("j", "k") and power == 1]
        if len(units) != 1:
            return []
        parts[units[0]][0, roots, tuple(item for item in symbols if item[0] not in ("j", "k"))] = c
    used = max((at for at in range(3) if parts[at]), default=0)
    if not 1 <= used < length <= 3 or value.denominator is not exact.UNIT:
        return []
    return [Leaf(str(Value(part)), Value(part)) for part in parts[:length]]


def _same_ratio(a: Ratio, b: Node) -> bool:
    values = _values(a)
    if isinstance(b, Ratio):
        if {a.unit, b.unit} & {"am", "pm"}:
            is_same_half = "" in (a.unit, b.unit) or a.unit == b.unit
            return is_same_half and bool(_hours(a) & _hours(b)) and _in_order(a.parts[1:], b.parts[1:])
        if a.unit and b.unit and a.unit != b.unit:
            return False
        is_time = _TIME.fullmatch(a.text) and _TIME.fullmatch(b.text)  # 1:20 is not 2:40
        return _in_order(a.parts, b.parts) or (not is_time and _is_multiple(values, _values(b)))
    if not isinstance(b, Leaf) or b.percent or b.value is None or len(values) != 2 or None in values:
        return False
    if {a.unit, b.unit.name} <= {"am", "pm"}:  # 3:00 pm is 3 pm
        return not values[1].numerator and a.unit == b.unit.name and exact.same(values[0], b.value) is True
    if a.unit or b.unit.name or not values[1].numerator:
        return False
    return exact.same(values[0] / values[1], b.value) is True


_TIME = re.compile(r"\d?\d:[0-5]\d(:[0-5]\d)?")


def _hours(time: Ratio) -> set[Fraction]:
    """Returns the hour of a time as written and, with a.m. or p.m., from 0 to 23: 3 and 15 for 3:30 p.m."""
    first = _values(time)[0]
    hour = first and first.constant()
    if hour is None:
        return set()
    return {hour, hour % 12 + 12 * (time.unit == "pm")} if time.unit else {hour}


def _values(ratio: Ratio) -> list[Value | None]:
    return [part.value if isinstance(part, Leaf) else None for part in ratio.parts]


def _is_multiple(values: list[Value | None], others: list[Value | None]) -> bool:
    """Returns whether the parts of a ratio are a multiple of another one's: 2:4 is 1:2."""
    if len(values) != len(others) or None in values + others or not (values[0].numerator and others[0].numerator):
        return False
    return all(exact.same(values[0] * y, others[0] * x) is True for x, y in zip(values, others, strict=True))


# Two nodes are compared by the function of the one whose type stands first here.
_COMPARISONS = {
    Choice: _same_choice,
    Named: _same_named,
    Relation: _same_relation,
    Region: _same_region,
    Sequence: _same_sequence,
    Matrix: _same_matrix,
    Ratio: _same_ratio,
    Words: _same_words,
    Leaf: _same_leaf,
}
_RANKS = {kind: rank for rank, kind in enumerate(_COMPARISONS)}
