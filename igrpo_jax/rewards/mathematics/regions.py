"""Sets of real numbers: intervals, their unions, and the inequalities that describe them.

Endpoints are exact; only their order comes from floating point. Not here: reading them from text (`answers`).
"""

from igrpo_jax.rewards.mathematics import exact
from igrpo_jax.rewards.mathematics.exact import Value
from igrpo_jax.rewards.mathematics.nodes import Leaf, Named, Node, Region, Relation, Sequence

_INFINITY = float("inf")
EVERYTHING = ((None, False, None, False),)


def inequality(text: str, difference: Value | None, sign: str) -> Node:
    """Returns `difference` < 0, ≤ 0 or ≠ 0 as a Region where it is linear in its only symbol, else as a Relation."""
    relation = Relation(text, sign, difference)
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
    closed = sign == "leq"
    if sign == "ne":
        return Region(text, name, ((None, False, bound, False), (bound, False, None, False)))
    return Region(
        text, name, ((None, False, bound, closed),) if steepness.real > 0 else ((bound, closed, None, False),)
    )


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
    if isinstance(node, Named) and isinstance(node.value, Region | Sequence):
        region = region_of(node.value)
        return region and Region(node.text, node.name, region.pieces)
    if not isinstance(node, Sequence):
        return None
    ends = [item.value if isinstance(item, Leaf) and not item.unit.name else None for item in node.items]
    if any(end is None for end in ends):
        return None
    if node.kind == "set":
        pieces = tuple((end, True, end, True) for end in ends)
        return _region(node.text, "", pieces) if all(is_real(end) for end in ends) else None
    if node.kind[0] not in "([" or len(ends) != 2:
        return None
    low, high = (_infinite(end) for end in ends)
    if low == 1 or high == -1:
        return None
    if (not low and not is_real(ends[0])) or (not high and not is_real(ends[1])):
        return None
    piece = (None if low else ends[0], node.kind[0] == "[", None if high else ends[1], node.kind[1] == "]")
    return _region(node.text, "", (piece,))


def _infinite(value: Value) -> int:
    """Returns 1 for ∞, -1 for -∞, else 0."""
    if value.symbols() != {"∞"}:
        return 0
    return -1 if str(value).startswith("-") else 1


def _number(value: Value | None, infinite: float) -> float:
    """Returns the end of a piece in floating point; `infinite` stands for None."""
    return infinite if value is None else exact.approximate(value).real


def _region(text: str, name: str, pieces: tuple) -> Region:
    """Returns the Region of pieces, sorted, after joining those that touch."""
    joined: list[tuple] = []
    for piece in sorted(pieces, key=lambda p: (_number(p[0], -_INFINITY), _number(p[2], _INFINITY))):
        if joined:
            low, low_closed, high, high_closed = joined[-1]
            gap = _number(piece[0], -_INFINITY) - _number(high, _INFINITY)
            touching = high is not None and piece[0] is not None and exact.same(high, piece[0]) is True
            if (touching and (high_closed or piece[1])) or (not touching and gap < 0):
                further = _number(piece[2], _INFINITY) - _number(high, _INFINITY) > 0 or (
                    high is not None and piece[2] is not None and exact.same(high, piece[2]) is True and piece[3]
                )
                first_closed = low_closed or (low is not None and piece[1] and exact.same(low, piece[0]) is True)
                joined[-1] = (low, first_closed, *(piece[2:] if further else (high, high_closed)))
                continue
        joined.append(piece)
    return Region(text, name, tuple(joined))


def united(text: str, nodes: list[Node]) -> Region | None:
    """Returns the union of sets of real numbers in one symbol, None where a node is no such set."""
    regions = [region_of(node) for node in nodes]
    if not all(regions) or len({region.name for region in regions} - {""}) > 1:
        return None
    pieces = tuple(piece for region in regions for piece in region.pieces)
    return _region(text, max(region.name for region in regions), pieces)


def intersected(text: str, nodes: list[Node]) -> Region | None:
    """Returns the intersection of half-lines and intervals in one symbol; None if it is empty or a node is neither."""
    if not all(isinstance(node, Region) and len(node.pieces) == 1 for node in nodes):
        return None
    if len({node.name for node in nodes}) != 1:
        return None
    low = high = (None, False)
    for node in nodes:
        piece = node.pieces[0]
        if piece[0] is not None and (low[0] is None or _is_inside(piece[:2], low, 1)):
            low = piece[:2]
        if piece[2] is not None and (high[0] is None or _is_inside(piece[2:], high, -1)):
            high = piece[2:]
    if None not in (low[0], high[0]) and _number(low[0], 0) > _number(high[0], 0):
        return None
    return Region(text, nodes[0].name, ((*low, *high),))


def _is_inside(end: tuple, other: tuple, side: int) -> bool:
    """Returns whether one end of an interval (1: lower, -1: upper) leaves out more than another one."""
    if exact.same(end[0], other[0]) is True:
        return other[1] and not end[1]
    return side * (_number(end[0], 0) - _number(other[0], 0)) > 0


def without(text: str, base: Node, points: Node) -> Region | None:
    """Returns a region without the points of another, None where one of them is no region."""
    base_region, removed = region_of(base), region_of(points)
    if not (base_region and removed):
        return None
    ends = [
        (None, False),
        *((end, not closed) for p in removed.pieces for end, closed in (p[:2], p[2:])),
        (None, False),
    ]
    gaps = [(*low, *high) for low, high in zip(ends[::2], ends[1::2], strict=True)]
    if removed.pieces[0][0] is None:
        gaps.pop(0)
    if removed.pieces[-1][2] is None:
        gaps.pop()
    kept = []
    for piece in base_region.pieces:
        for gap in gaps:
            common = intersected(text, [Region(text, "", (piece,)), Region(text, "", (gap,))])
            if common and not _is_empty(common.pieces[0]):
                kept.append(common.pieces[0])
    return Region(text, base_region.name, tuple(kept)) if kept else None


def _is_empty(piece: tuple) -> bool:
    """Returns whether a piece has one point that does not belong to it, as (1, 1]."""
    return None not in (piece[0], piece[2]) and exact.same(piece[0], piece[2]) is True and not (piece[1] and piece[3])
