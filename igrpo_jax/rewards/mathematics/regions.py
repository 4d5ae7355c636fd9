"""Sets of real numbers: intervals, their unions, and the inequalities that describe them.

Endpoints are exact; only their order comes from floating point. Not here: reading them from text (`answers`).
"""

import functools
from collections.abc import Callable

from igrpo_jax.rewards.mathematics import exact
from igrpo_jax.rewards.mathematics.exact import Value
from igrpo_jax.rewards.mathematics.nodes import Leaf, Node, Region, Relation, Sequence

EVERYTHING = ((None, False, None, False),)


def inequality(text: str, difference: Value | None, sign: str) -> Node:
    """Returns `difference` < 0, ≤ 0 or ≠ 0 as a Region where it is linear in its only symbol, else as a Relation."""
    relation = Relation(text, sign, difference)
    if sign == "<" and (name := _bounded_by_infinity(difference)):
        return Region(text, name, EVERYTHING)
    names = difference.symbols() if difference is not None else ()
    if len(names) != 1 or difference.denominator is not exact.UNIT:
        return relation
    (name,) = names
    if getattr(name, "function", "") == "abs":
        return _within(text, difference, sign, name) or relation
    slope, rest = {}, {}
    for key, c in difference.numerator.items():
        if any(symbol == name for symbol, _ in key[2]):
            if (name, 1) not in key[2]:
                return relation
            slope[key[0], key[1], tuple(item for item in key[2] if item[0] != name)] = c
        else:
            rest[key] = c
    slope_value = Value(slope)
    steepness = exact.approximate(slope_value)
    bound = -Value(rest) / slope_value
    if not is_real(bound) or steepness is None or steepness.imag:
        return relation
    below, above = (None, False, bound, sign == "leq"), (bound, sign == "leq", None, False)
    pieces = (below, above) if sign == "ne" else (below if steepness.real > 0 else above,)
    return Region(text, name, pieces)


def _bounded_by_infinity(difference: Value | None) -> str:
    """Returns the x of x - ∞ and -∞ - x, of which an inequality says nothing; "" for any other difference."""
    names = difference.symbols() - {"∞"} if difference is not None else set()
    if len(names) != 1:
        return ""
    (name,) = names
    infinite, symbol = Value.symbol("∞"), Value.symbol(name)
    says_nothing = any(exact.same(difference, end - infinite) is True for end in (symbol, -symbol))
    return name if says_nothing else ""


def _within(text: str, difference: Value, sign: str, name: exact.Atom) -> Region | None:
    """Returns |u| < c as -c < u < c and |u| > c as its complement, where u is linear; None for anything else."""
    symbol = (0, (), ((name, 1),))
    rest = {key: c for key, c in difference.numerator.items() if key != symbol}
    slope = difference.numerator.get(symbol)
    bound = -Value(rest) / Value.number(slope or 1)
    if not slope or sign == "ne" or bound.symbols() or not is_real(bound) or exact.approximate(bound).real <= 0:
        return None
    inner = Value.number(1 if slope > 0 else -1)
    sides = [inequality(text, inner * (side - bound), sign) for side in (name.argument, -name.argument)]
    return (intersected if slope > 0 else united)(text, sides)


def is_real(value: Value) -> bool:
    """Returns whether the value is a real number without symbols."""
    if value.symbols():
        return False
    number = exact.approximate(value)
    return number is not None and abs(number.imag) <= 1e-12 * abs(number.real)


def region_of(node: Node) -> Region | None:
    """Returns an interval or a set of real points as a Region, None for anything else."""
    if isinstance(node, Region):
        return node
    if not isinstance(node, Sequence):
        return None
    ends = [item.value if isinstance(item, Leaf) and not item.unit.name else None for item in node.items]
    if any(end is None for end in ends):
        return None
    if node.kind == "set":
        points = Region(node.text, "", tuple((end, True, end, True) for end in ends))
        return united(node.text, [points]) if all(is_real(end) for end in ends) else None
    if node.kind[0] not in "([" or len(ends) != 2:
        return None
    infinite = Value.symbol("∞")
    low = None if exact.same(ends[0], -infinite) else ends[0]
    high = None if exact.same(ends[1], infinite) else ends[1]
    if not all(end is None or is_real(end) for end in (low, high)):
        return None
    piece = (low, node.kind[0] == "[", high, node.kind[1] == "]")
    return united(node.text, [Region(node.text, "", (piece,))])


def united(text: str, nodes: list[Node]) -> Region | None:
    """Returns the union of sets of real numbers in one symbol, None if a node is not such a set."""
    regions = [region_of(node) for node in nodes]
    if not all(regions) or len({region.name for region in regions} - {""}) > 1:
        return None
    return _joined(text, max(region.name for region in regions), regions, set.union)


def intersected(text: str, nodes: list[Node]) -> Region | None:
    """Returns the intersection of regions in one symbol; None if it is empty or a node is not a region."""
    if not all(isinstance(node, Region) for node in nodes) or len({node.name for node in nodes}) != 1:
        return None
    return _joined(text, nodes[0].name, nodes, set.intersection)


def lacks_a_point(node: Node) -> bool:
    """Returns whether a node says x ≠ 2. What stands beside it, as in x ≥ 0, x ≠ 2, holds at the same time."""
    if not isinstance(node, Region) or len(node.pieces) != 2 or not node.name:
        return False
    (low, _, before, _), (after, _, high, _) = node.pieces
    return low is None and high is None and before is after


def without(text: str, base: Node, points: Node) -> Region | None:
    """Returns a region without the points of another, None if nothing is left or one of them is not a region."""
    regions = [region_of(base), region_of(points)]
    return _joined(text, regions[0].name, regions, set.difference) if all(regions) else None


def _joined(text: str, name: str, regions: list[Region], join: Callable[[set, set], set]) -> Region | None:
    """Returns the regions combined by `join`, in order; None if the result is empty.

    The n different ends cut the real line into cells: cell 2k + 1 is end k, the even cells lie between and outside.
    """
    ends: list[Value] = []
    cell_of: dict[int, int] = {}  # by the identity of an end
    all_ends = (end for region in regions for piece in region.pieces for end in piece[::2] if end is not None)
    for end in sorted(all_ends, key=lambda end: exact.approximate(end).real):
        if not ends or exact.same(ends[-1], end) is not True:
            ends.append(end)
        cell_of[id(end)] = 2 * len(ends) - 1
    last = 2 * len(ends)
    cells = []
    for region in regions:
        cells.append(set())
        for low, low_closed, high, high_closed in region.pieces:
            first = 0 if low is None else cell_of[id(low)] + (not low_closed)
            cells[-1].update(range(first, 1 + (last if high is None else cell_of[id(high)] - (not high_closed))))
    kept = functools.reduce(join, cells)
    starts = [cell for cell in sorted(kept) if cell - 1 not in kept]
    stops = [cell for cell in sorted(kept) if cell + 1 not in kept]
    pieces = tuple(
        (ends[(low - 1) // 2] if low else None, low % 2 == 1, ends[high // 2] if high < last else None, high % 2 == 1)
        for low, high in zip(starts, stops, strict=True)
    )
    return Region(text, name, pieces) if pieces else None
