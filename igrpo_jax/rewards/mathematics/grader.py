r"""Is the answer stated in a text mathematically the reference answer?

    text -> extract -> prediction -> equivalent(prediction, gold) -> score 0 or 1

`equivalent` reads both answers into their structure (`answers`) and compares structures: a tuple with a tuple, item by
item, an interval with an inequality, never a set with a point. Expressions are compared by their exact values
(`exact`), which decides nearly all of them, right and wrong. What remains (identities of trigonometry, nested roots,
sums, unusual notation) goes to math-verify (`symbolic`), behind bounds on its size.

Conventions, where usage differs:

- The last box counts, alone, unless "and", "or" or a comma joins it to the one before.
- No answer is looked for in prose without a statement ("the answer is", "Answer:", "####").
- 28% equals both 28 and 0.28, because data sets write the same answer in all three ways, but not 0.28%.
- A decimal is exact: 0.333 is not 1/3, and 1.41421356 is not √2. A tolerance would pay for rounding a right answer
  and for guessing a near one; 0.\overline{3} is 1/3.
- 1,234 is one thousand …, 1{,}234 too; 3{,}5 is 3.5. A bare comma before one, two, four or more digits separates a
  list: a decimal comma would make 1,2 equal 1.2.
- A unit, a currency or a degree sign missing on one side is forgiven; two different units are not, and none is
  converted: 80 cents is not $0.80. Degrees are not radians, but in sin 30° they are what they are.
- `x = 5` is 5, and `f(x) = …` its right side; `x = 5` is not `y = 5`; `2x + z = 1` is only an equation, equal to its
  multiples. Where several named values face unnamed ones, the order counts.
- Lists are unordered and count repetitions (roots with multiplicity), except repeated points; sets ignore both. A
  bare list equals a set, and a tuple in the same order; a tuple is no set. (a, b) is a pair or an interval, as the
  other side has it. A column is a row vector, ⟨a, b⟩ and (a, b). ± stands for both values; "1/2 or 0.5" is one value.
- A single letter equals `(D)`, `D.` and `(D) Alina`; words compare without case; one letter keeps its case. Words of
  four and more letters, and capitals such as CD, are names and no products.
- Symbols under roots are read as positive; log without a base is not taken for ln; 2:4 is 1:2, but not as times of day.
- Based digits need their base: 52_8 is neither 52 nor 42.

Not here: time limits and memory limits (`rewards/pool`). Model text is never evaluated as Python. No jax, and sympy is
imported only when `symbolic` is first reached.
"""

import functools
import re
from collections.abc import Collection, Iterable

from igrpo_jax.rewards.mathematics import answers, exact, extraction, regions, symbolic, words
from igrpo_jax.rewards.mathematics.exact import NoValue, Value
from igrpo_jax.rewards.mathematics.nodes import (
    Based,
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

MAX_ANSWER = 1_000  # characters of an answer; longer ones are not compared (the longest gold of MATH has 159)

extract = extraction.extract


def equivalent(prediction: str, gold: str) -> bool:
    """True if the two answers (bare, as `extract` returns them) are mathematically the same.

    Symmetric. Anything that cannot be compared (too long, too deep, not parsed) is equal to its own text alone. May be
    slow on hostile input: run it in `rewards/pool`.
    """
    if len(prediction) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return False
    a, b = _read(prediction), _read(gold)
    try:
        return a is not None and b is not None and _same(a, b)
    except NoValue:
        return False


def grade(text: str, gold: str) -> tuple[float, str | None, str]:
    """(score 1.0 or 0.0, extracted answer, "ok" or "unparseable") of a whole completion."""
    extracted = extract(text)
    if extracted is None:
        return 0.0, None, "unparseable"
    return float(equivalent(extracted, gold)), extracted, "ok"


def classes(found: Collection[str | None]) -> list[int]:
    """Numbers from 0 for the answers of one problem, equal where they are equivalent; -1 where there is no answer.

    An answer joins the first class whose first member it is equivalent to. May be slow, as `equivalent` is.
    """
    firsts: list[str] = []
    by_text: dict[str, int] = {}

    def number(answer: str) -> int:
        for place, first in enumerate(firsts):
            if equivalent(answer, first):
                return place
        firsts.append(answer)
        return len(firsts) - 1

    for answer in found:
        if answer is not None and answer not in by_text:
            by_text[answer] = number(answer)
    return [-1 if answer is None else by_text[answer] for answer in found]


def warm_up() -> None:
    """Imports and first-use tables that take seconds: once per worker."""
    symbolic.warm_up()


def clear_cache() -> None:
    """Forgets the answers read so far; for measurements."""
    _read.cache_clear()


@functools.lru_cache(maxsize=2048)  # a group of completions shares its reference answer, and often its answers
def _read(answer: str) -> Node | None:
    return answers.read(extraction.last_box(answer) or answer)


def _same(a: Node, b: Node) -> bool:
    """Compares two structures; the order of the two does not matter."""
    if a.text == b.text and type(a) is type(b):
        return not isinstance(a, Leaf) or _units_agree(a, b)
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
        return _same_value(a, b.value, b)
    percent, plain = (a, b) if a.percent else (b, a)
    hundredth = Value.number(100) * plain.value
    return _same_value(percent, plain.value, plain) or exact.same(percent.value, hundredth) is True


def _same_value(a: Leaf, value: Value, b: Leaf) -> bool:
    verdict = exact.same(a.value, value)
    return symbolic.equal(a.text, b.text) if verdict is None else verdict


def _units_agree(a: Leaf, b: Leaf) -> bool:
    units = [leaf.unit or ("%" if leaf.percent else "") for leaf in (a, b)]
    return "" in units or units[0] == units[1]


# ------------------------------------------------------------------------------------------------------------- words


def _same_words(a: Words, b: Node) -> bool:
    if isinstance(b, Words):
        return a.words == b.words
    if isinstance(b, Leaf) and b.value is not None:
        number = words.NUMBER_WORDS.get(a.words)
        if number is not None:
            return b.value.constant() == number
        return bool(re.fullmatch(r"[A-Za-z]+", b.text)) and a.words == b.text.casefold()
    return False


def _same_choice(a: Choice, b: Node) -> bool:
    if isinstance(b, Choice):
        return _same(a.letter, b.letter) and _same(a.content, b.content)
    return _same(a.letter, b) or _same(a.content, b)


# --------------------------------------------------------------------------------------------- equations and regions


def _same_named(a: Named, b: Node) -> bool:
    if isinstance(b, Named):
        if a.name == b.name and _same(a.value, b.value):
            return True
        return a.equation is not None and b.equation is not None and _same_equation(a.equation, b.equation)
    if isinstance(b, Relation):
        return b.sign == "=" and None not in (a.equation, b.difference) and _same_equation(a.equation, b.difference)
    if isinstance(b, Region) and b.name not in ("", a.name):
        return False
    return _same(a.value, b)


def _same_relation(a: Relation, b: Node) -> bool:
    if isinstance(b, Leaf):
        return False
    if not isinstance(b, Relation) or a.sign != b.sign:
        return False
    if a.difference is None or b.difference is None:
        return symbolic.equal(a.text, b.text)
    if a.sign in ("=", "ne"):
        return _same_equation(a.difference, b.difference)
    scale = exact.proportional(a.difference, b.difference)
    return scale is not None and scale > 0


def _same_equation(a: Value, b: Value) -> bool:
    """Whether a = 0 and b = 0 say the same: one a multiple of the other, denominators aside."""
    if exact.proportional(a, b) is not None:
        return True
    return exact.proportional(exact.cleared(a), exact.cleared(b)) is not None


def _same_region(a: Region, b: Node) -> bool:
    other = regions.region_of(b)
    if other is None or (a.name and other.name and a.name != other.name) or len(a.pieces) != len(other.pieces):
        return False
    for piece, match in zip(a.pieces, other.pieces, strict=True):
        if piece[1] != match[1] or piece[3] != match[3]:
            return False
        for end, other_end in ((piece[0], match[0]), (piece[2], match[2])):
            if (end is None) != (other_end is None) or (end is not None and exact.same(end, other_end) is not True):
                return False
    return True


# --------------------------------------------------------------------------------------------------------- sequences


def _same_sequence(a: Sequence, b: Node) -> bool:
    if isinstance(b, Sequence):
        return _same_sequences(a, b)
    if a.kind == "or" and all(_same(a.items[0], item) for item in a.items[1:]):
        return _same(a.items[0], b)  # one value in two notations
    if isinstance(b, Matrix):
        return _is_ordered(a) and len(_vector(b)) == len(a.items) and all(map(_same, a.items, _vector(b)))
    if isinstance(b, Leaf):
        if b.listed is not None and _same_sequences(a, b.listed):
            return True
        if a.kind == "set" and len(a.items) == 1:
            return _same(a.items[0], b)
        return b.value is None and not b.hopeless and symbolic.equal(a.text, b.text)
    return False


def _same_sequences(a: Sequence, b: Sequence) -> bool:
    if _is_ordered(a) and _is_ordered(b):
        return (a.kind == b.kind or len(a.items) > 2) and _in_order(a.items, b.items)
    if _is_ordered(b):
        a, b = b, a
    if _is_ordered(a) and b.kind == "set" and len(b.items) == 1 and isinstance(b.items[0], Sequence):
        return _same(a, b.items[0])  # the set of one solution (1, 2)
    if _is_ordered(a):
        return a.kind == "()" and b.kind == "list" and _in_order(a.items, _by_name(b.items))
    if {a.kind, b.kind} != {"set"}:
        named = [len({item.name for item in side.items if isinstance(item, Named)}) for side in (a, b)]
        if (named[0] == len(a.items) and not named[1]) or (named[1] == len(b.items) and not named[0]):
            return _in_order(a.items, b.items)
    return _matched(_distinct(a, b), _distinct(b, a))


def _is_ordered(sequence: Sequence) -> bool:
    return sequence.kind[0] in "(["


def _in_order(a: Iterable[Node], b: Iterable[Node]) -> bool:
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(map(_same, a, b))


def _by_name(items: tuple[Node, ...]) -> tuple[Node, ...]:
    """`y = 2, x = 1` as the point (1, 2)."""
    if all(isinstance(item, Named) for item in items) and len({item.name for item in items}) == len(items):
        return tuple(sorted(items, key=lambda item: item.name))
    return items


def _distinct(sequence: Sequence, other: Sequence) -> list[Node]:
    """The elements, each once in a set and in a list of points; a list of numbers keeps its repetitions."""
    points = all(isinstance(item, Sequence) for item in sequence.items)
    if "set" not in (sequence.kind, other.kind) and not points:
        return list(sequence.items)
    kept: list[Node] = []
    for item in sequence.items:
        if not any(_same(item, one) for one in kept):
            kept.append(item)
    return kept


def _matched(a: list[Node], b: list[Node]) -> bool:
    """Whether the elements pair up, each with an equal one."""
    if len(a) != len(b):
        return False
    rest = list(b)
    for item in a:
        for at, other in enumerate(rest):
            if _same(item, other):
                del rest[at]
                break
        else:
            return False
    return True


def _same_matrix(a: Matrix, b: Node) -> bool:
    if isinstance(b, Matrix):
        return len(a.rows) == len(b.rows) and all(map(_in_order, a.rows, b.rows))
    return isinstance(b, Leaf) and b.value is None and not b.hopeless and symbolic.equal(a.text, b.text)


def _vector(matrix: Matrix) -> tuple[Node, ...]:
    """The elements of a single row or column; nothing of any other matrix."""
    if len(matrix.rows) == 1:
        return matrix.rows[0]
    return tuple(row[0] for row in matrix.rows) if len(matrix.rows[0]) == 1 else ()


def _same_ratio(a: Ratio, b: Node) -> bool:
    if isinstance(b, Ratio):
        if {a.unit, b.unit} & {"am", "pm"}:
            return _same_time(a, b)
        if a.unit and b.unit and a.unit != b.unit:
            return False
        if _in_order(a.parts, b.parts):
            return True
        if _TIME.fullmatch(a.text) and _TIME.fullmatch(b.text):
            return False  # 1:20 is not 2:40
        one, other = _quotient(a), _quotient(b)
        return one is not None and other is not None and exact.same(one, other) is True
    quotient = _quotient(a)
    return (
        isinstance(b, Leaf)
        and not b.unit
        and not b.percent
        and None not in (quotient, b.value)
        and exact.same(quotient, b.value) is True
    )


_TIME = re.compile(r"\d?\d:[0-5]\d")


def _same_time(a: Ratio, b: Ratio) -> bool:
    """3:30 p.m. is 15:30, and 3:30 where nothing is said of the half of the day."""
    hours = []
    for time, other in ((a, b), (b, a)):
        hour = time.parts[0].value.constant() if isinstance(time.parts[0], Leaf) and time.parts[0].value else None
        if hour is None:
            return False
        plain = not other.unit and isinstance(other.parts[0], Leaf) and _same(time.parts[0], other.parts[0])
        hours.append(hour % 12 + 12 * (time.unit == "pm") if time.unit and not plain else hour)
    return hours[0] == hours[1] and _in_order(a.parts[1:], b.parts[1:])


def _quotient(ratio: Ratio) -> Value | None:
    """a:b as a/b; None of three parts."""
    if len(ratio.parts) != 2 or ratio.unit:
        return None
    first, second = (part.value if isinstance(part, Leaf) else None for part in ratio.parts)
    if first is None or second is None or not second.numerator:
        return None
    return first / second


def _same_based(a: Based, b: Node) -> bool:
    return isinstance(b, Based) and a.number == b.number


# The first of two nodes is compared by the row that stands first here.
_COMPARISONS = {
    Choice: _same_choice,
    Named: _same_named,
    Relation: _same_relation,
    Region: _same_region,
    Sequence: _same_sequence,
    Matrix: _same_matrix,
    Ratio: _same_ratio,
    Based: _same_based,
    Words: _same_words,
    Leaf: _same_leaf,
}
_RANKS = {kind: rank for rank, kind in enumerate(_COMPARISONS)}
