r"""What an answer is made of: a number with a unit, a tuple, a list, an interval, a matrix, an equation, words, …

    read(r"x \in [0, \frac12)")  -> Named("x", Sequence("[)", (Leaf 0, Leaf 1/2)))
    read("1 < x < 3")            -> Region("x", ((1, False, 3, False),))

Every node has a `text`, which is LaTeX with one spelling for all ways to write the same tokens. An expression that
cannot be read is a Leaf without a value; prose is Words. Nothing raises an error, and an empty answer is None.

Not here: when two answers are equal (`comparison`); answers that hold no others (`leaves`); expressions (`expression`).
Limit: MAX_PARTS.
"""

import dataclasses
import itertools
import re

from igrpo_jax.rewards.mathematics import leaves, letters, names, plus_minus, regions, rounding, spoken, words
from igrpo_jax.rewards.mathematics.exact import NoValue, Value
from igrpo_jax.rewards.mathematics.nodes import Choice, Leaf, Matrix, Named, Node, Region, Relation, Sequence, Words
from igrpo_jax.rewards.mathematics.tokens import Token, is_enclosed, latex, split, tokenize

MAX_PARTS = 200  # elements of a list; a longer list is a Leaf without a value
_MAX_NESTED = 6  # levels of lists in tuples in sets …

_GROUPS = re.compile(r"[1-9]\d\d(?:,[1-9]\d\d)+\.?")  # a number, or a list of numbers of three digits
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}")
_EDGES = frozenset((".", ",", ";", "\\", '"', "`"))
_LEADING = frozenset(("=", "approx", "simeq", "therefore", "implies", "to"))  # before an answer
_LEADING_WORDS = frozenset(("approx", "approx.", "approximately", "about", "roughly"))
_POINTS = frozenset("ABCDEKLMOPQRSTVWXYZ")  # and not N(0, 1) and U(0, 1), which are distributions
_BRACKETS = frozenset(("()", "[]", "(]", "[)", "{}", "\\{\\}", "langlerangle"))


def read(answer: str) -> Node | None:
    """Returns the structure of a bare answer, None for an empty one. Never raises."""
    answer = _unwrapped(answer.strip().strip("*"))
    head, domain = words.without_domain(answer)
    node, whole = _read_whole(head), _read_whole(answer) if head != answer else None
    if not whole:
        return node
    if not isinstance(node, Named):
        return whole
    # Equal texts are equal answers, so the domain stands in the text too.
    return dataclasses.replace(node, text=f"{node.text} {domain}".strip(), domain=domain, whole=whole)


def _read_whole(answer: str) -> Node | None:
    """Returns the structure of an answer without looking for a domain at its end."""
    if _WORD.search(answer):
        day = words.date(answer)
        if day:
            return Words(day, day)
        answer = words.without_label(spoken.rewritten(letters.unnamed(answer)))
    tokens = _without_edges(tokenize(rounding.with_sign(answer)))
    if not tokens:
        return None
    try:
        if _GROUPS.fullmatch(answer):
            return _number_or_list(tokens[0], answer)
        return _read(tokens, 0)
    except NoValue:
        return Leaf(latex(tokens), None, hopeless=True)


def _number_or_list(number: Token, answer: str) -> Node:
    """Reads 102,204 as 102204 or as the list 102, 204, whichever the other answer means."""
    items = tuple(leaves.leaf(tokenize(group)) for group in answer.rstrip(".").split(","))
    return Choice(answer, leaves.leaf([number]), Sequence(answer, "list", items))


def _without_edges(tokens: list[Token]) -> list[Token]:
    """Returns tokens without punctuation at their ends and without "=", \\approx or "about" before a value."""
    while tokens and tokens[-1].is_in(_EDGES):
        tokens.pop()
    while tokens and (tokens[0].is_in(_EDGES | _LEADING) or _is_about(tokens)):
        tokens.pop(0)
    return tokens


def _is_about(tokens: list[Token]) -> bool:
    """Returns whether a word such as "about", or \\sim before a number, begins the tokens."""
    if tokens[0].is_in(("sim",)):
        return len(tokens) > 1 and tokens[1].kind == "number"
    return tokens[0].kind in ("text", "letters") and tokens[0].text.strip(" ,:").casefold() in _LEADING_WORDS


def _unwrapped(answer: str) -> str:
    """Returns the answer without the \\(…\\) or \\[…\\] around all of it, which would look like a tuple's brackets."""
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        bare = answer.removesuffix(".")
        if bare.startswith(opening) and bare.endswith(closing) and bare.count(opening) == 1:
            return bare[2:-2].strip()
    return answer


_RELATIONS = frozenset(("=", "<", ">", "leq", "geq", "ne", "in", "approx", "simeq", "sim"))


def _read(tokens: list[Token], nested: int, from_text: bool = False) -> Node:
    """Reads tokens (at least one) that may be a list."""
    text = latex(tokens)
    if nested > _MAX_NESTED:
        return Leaf(text, None, hopeless=True)
    if len(tokens) == 1 and tokens[0].kind == "text":
        inner = _without_edges(tokenize(tokens[0].text))
        return _read(inner, nested + 1, from_text=True) if inner else Words(text, "")
    choice = _choice(tokens, nested)
    if choice:
        return choice
    parts, separators = split(tokens, {",", ";", "and", "or"})
    parts = [part for part in parts if part]
    if len(parts) > MAX_PARTS or not parts or tokens[-1].is_in(("and", "or")):
        return Leaf(text, None, hopeless=True)
    if len(parts) > 1 and latex(parts[-1][1:]) == _INTEGERS:
        parts = [_renamed(part, parts[-1][0].text) for part in parts[:-1]]
    items = _items(parts, nested, from_text)
    if len(items) == 1:
        return items[0]
    kinds, region = set(separators), None
    if kinds == {"or"} and any(isinstance(item, Region) for item in items):
        region = regions.united(text, items)
    elif kinds == {"and"} or (kinds <= {",", "and"} and any(map(regions.lacks_a_point, items))):
        region = regions.intersected(text, items)
    if "," in kinds and len(kinds) > 1:
        items = _systems(tokens, nested) or items
    several = region or Sequence(text, "or" if kinds == {"or"} else "list", tuple(items))
    amount = leaves.compound(tokens) if kinds <= {"and", ","} and (from_text or not nested) else None
    return Choice(text, amount, several) if amount else several  # 1 hour and 30 minutes


_INTEGERS = "\\in \\mathbb {Z}"


def _renamed(tokens: list[Token], parameter: str) -> list[Token]:
    """Returns tokens with k instead of the parameter, such as the n of `n \\in \\mathbb{Z}`, that is any integer."""
    if len(parameter) != 1 or any("k" in token.text for token in tokens if token.kind == "letters"):
        return tokens
    return [t._replace(text=t.text.replace(parameter, "k")) if t.kind == "letters" else t for t in tokens]


def _items(parts: list[list[Token]], nested: int, from_text: bool = False) -> list[Node]:
    """Reads the elements of a list; one with ± has several readings."""
    return [_read_unlisted(reading, nested, from_text) for part in parts for reading in plus_minus.readings(part)]


def _systems(tokens: list[Token], nested: int) -> list[Node]:
    """Reads `p=5,q=2; p=7,q=2`, a list of points with named coordinates. Returns an empty list for anything else."""
    groups = []
    for group in split(tokens, {";", "and", "or"})[0]:
        items = _items([part for part in split(group, {","})[0] if part], nested)
        if len({item.name for item in items if isinstance(item, Named)}) < max(len(items), 2):
            return []
        groups.append(Sequence(latex(group), "list", tuple(items)))
    return groups if len({len(group.items) for group in groups}) == 1 else []


def _choice(tokens: list[Token], nested: int) -> Node | None:
    """Reads `(D) Alina`, `D) 12` or `\\textbf{(D)}\\ 12`, and `D)` or `D.` as the letter alone."""
    label = letters.split_label(tokens)
    if label is None:
        return None
    letter, rest = Leaf(label[0], Value.symbol(label[0])), label[1]
    return Choice(latex(tokens), letter, _read(rest, nested + 1)) if rest else letter


def _read_unlisted(tokens: list[Token], nested: int, from_text: bool = False) -> Node:
    """Reads tokens that are not a list."""
    if nested > _MAX_NESTED:
        return Leaf(latex(tokens), None, hopeless=True)
    sides, signs = split(tokens, _RELATIONS)
    if signs and all(sides):
        return _relation(tokens, sides, signs, nested)
    pieces, _ = split(tokens, {"cup"})
    if len(pieces) > 1 and all(pieces):
        unread = Leaf(latex(tokens), None)
        return regions.united(unread.text, [_read_unlisted(piece, nested + 1) for piece in pieces]) or unread
    pieces, _ = split(tokens, {"setminus"})
    if len(pieces) == 2 and all(pieces):
        if pieces[1][0].text == "{" and is_enclosed(pieces[1]):  # \setminus{0}, without backslashes
            marks = [Token("mark", bracket, False) for bracket in ("\\{", "\\}")]
            pieces[1] = [marks[0], *pieces[1][1:-1], marks[1]]
        unread = Leaf(latex(tokens), None)
        return regions.without(unread.text, *(_read_unlisted(piece, nested + 1) for piece in pieces)) or unread
    for reader in (leaves.congruence, _bracketed, _transposed, _matrix, leaves.based, leaves.ratio):
        node = reader(tokens, nested)
        if node:
            return node
    return _point(tokens, nested) or leaves.with_symbol(tokens) or leaves.leaf(tokens, from_text)


def _bracketed(tokens: list[Token], nested: int) -> Node | None:
    """Reads a tuple, set, vector or interval, or parentheses around anything."""
    opening, closing = tokens[0].text, tokens[-1].text
    if not is_enclosed(tokens) or opening + closing not in _BRACKETS:
        return None
    content = tokens[1:-1]
    text = latex(tokens)
    if opening == "\\{":
        return _set(text, content, nested)
    if not content:
        return Words(text, text)
    parts = split(content, {",", ";"})[0]
    if len(parts) == 1 and opening + closing in ("()", "[]", "{}"):
        return _read(content, nested + 1)
    if not all(parts) or len(parts) > MAX_PARTS:
        return Leaf(text, None)
    brackets = "()" if opening == "langle" else opening + closing
    return Sequence(text, brackets, tuple(_read(part, nested + 1) for part in parts))


def _point(tokens: list[Token], nested: int) -> Node | None:
    """Reads B(15, -29) as the point (15, -29) named B. Returns None for anything else."""
    name, rest = tokens[0].text.strip(), tokens[1:]
    if name not in _POINTS or not rest or not rest[0].is_in(("(",)) or not any(token.is_in((",",)) for token in rest):
        return None
    point = _bracketed(rest, nested)
    is_point = isinstance(point, Sequence) and point.kind == "()"
    return Named(latex(tokens), name, point, None) if is_point else None


_TRANSPOSED = (["^", "T"], ["^", "{", "T", "}"], ["^", "top"], ["^", "{", "top", "}"])


def _transposed(tokens: list[Token], nested: int) -> Node | None:
    """Reads (1, 2, 3)^T as a column. Returns None for anything else."""
    ending = next((end for end in _TRANSPOSED if [token.text for token in tokens[-len(end) :]] == end), None)
    node = _bracketed(tokens[: -len(ending)], nested) if ending and len(tokens) > len(ending) else None
    if not isinstance(node, Sequence) or node.kind not in ("()", "[]"):
        return None
    return Matrix(latex(tokens), tuple((item,) for item in node.items))


def _set(text: str, content: list[Token], nested: int) -> Node:
    """Reads the content of \\{…\\}."""
    if not content:
        return Words(text, words.EMPTY)
    halves, bars = split(content, {"|", ":"})
    if len(bars) == 1 and all(halves):
        condition = _read(halves[1], nested + 1)
        is_bare = len(halves[0]) == 1 or halves[0][1].is_in(("in",))  # {x^2 : x > 3} is another set than {x : x > 3}
        if isinstance(condition, Region) and is_bare and condition.name.strip(" \\") in ("", halves[0][0].text):
            return condition
        if latex(halves[1][1:]) == _INTEGERS:
            content = _renamed(halves[0], halves[1][0].text)
    node = _read(content, nested + 1)
    items = node.items if isinstance(node, Sequence) and node.kind in ("list", "or") else (node,)
    return Sequence(text, "set", tuple(items))


_MATRICES = frozenset(("cases", "pmatrix", "bmatrix", "matrix", "Bmatrix", "array", "smallmatrix"))


def _matrix(tokens: list[Token], nested: int) -> Node | None:
    """Reads a matrix, a system of equations, or values by cases. Returns None for anything else."""
    texts = [token.text for token in tokens]
    if texts[0] != "begin" or texts[-4:-2] != ["end", "{"] or len(texts) < 9 or texts.count("begin") > 1:
        return None
    text, name = latex(tokens), texts[2]
    if name not in _MATRICES:
        return None
    start = 5 + texts[4:].index("}") if name == "array" and texts[4] == "{" else 4  # behind the columns, as {cc}
    body = [token for token in tokens[start:-4] if token.text != "hline"]
    rows = []
    for row in filter(None, split(body, {"\\"})[0]):
        cells = split(row, {"&"})[0]
        rows.append([_trimmed(cell) for cell in cells] if name == "cases" else cells)
    widths = {len(cells) for cells in rows}
    if len(widths) != 1 or not all(map(all, rows)) or (name == "cases" and not widths <= {1, 2}):
        return Leaf(text, None)
    read = tuple(tuple(_read(cell, nested + 1) for cell in cells) for cells in rows)
    if name != "cases":
        return Matrix(text, read)
    if widths == {1}:  # a system of equations
        return Sequence(text, "list", tuple(row[0] for row in read))
    # Values with their conditions, in any order.
    return Sequence(text, "set", tuple(Matrix(" & ".join(cell.text for cell in row), (row,)) for row in read))


def _trimmed(cell: list[Token]) -> list[Token]:
    """Returns a cell of `cases` without the comma at its end and without "if" or "for" at its beginning."""
    if cell and cell[0].kind == "text":
        cell = [*tokenize(cell[0].text), *cell[1:]]
    while cell and cell[-1].text in _EDGES:
        cell = cell[:-1]
    return cell[1:] if cell and cell[0].text.casefold() in ("if", "for", "when", "where") else cell


# ---------------------------------------------------------------------------------------------- relations, regions


def _relation(tokens: list[Token], sides: list[list[Token]], signs: list[str], nested: int) -> Node:
    """Reads an equation, inequality, approximation or membership."""
    text = latex(tokens)
    if signs[0] == "in":
        if not names.is_name(sides[0], []):
            return Words(text, text)
        value, name = _read(tokens[len(sides[0]) + 1 :], nested + 1), latex(sides[0])
        if isinstance(value, Sequence) and value.kind[0] in "([":
            value = regions.region_of(value) or value
        return Region(text, name, value.pieces) if isinstance(value, Region) else Named(text, name, value, None)
    if {signs[0], signs[-1]} & {"approx", "simeq", "sim"}:
        if names.is_name(sides[0], sides[1]):
            sides = [side for side in sides[1:] if not _has_symbols(side)] or sides[1:]
        read = [_read_unlisted(side, nested + 1) for side in sides[:: max(len(sides) - 1, 1)]]  # the first and the last
        return leaves.approximation(text, *read) if len(read) > 1 else read[0]
    if set(signs) == {"="}:
        return _equation(text, tokens, sides, nested)
    parts = []
    for left, sign, right in zip(sides[:-1], signs, sides[1:], strict=True):
        if sign in (">", "geq"):
            left, sign, right = right, "<" if sign == ">" else "leq", left
        difference = leaves.difference(left, right)
        if difference is None and (leaves.has_words(left) or leaves.has_words(right)):
            return Leaf(text, None, hopeless=True)
        parts.append(regions.inequality(text, difference, sign))
    return parts[0] if len(parts) == 1 else regions.intersected(text, parts) or Leaf(text, None)


def _equation(text: str, tokens: list[Token], sides: list[list[Token]], nested: int) -> Node:
    left, right = sides[0], sides[-1]
    difference, hopeless = None, False
    try:
        difference = leaves.difference(left, right) if len(sides) == 2 else None
    except NoValue:  # a name may have none, as S_\infty
        hopeless = True
    if names.is_name(left, right):
        explained = 0 if _has_symbols(right) else sum(1 for _ in itertools.takewhile(_has_symbols, sides[1:-1]))
        if leaves.are_side_by_side(sides[: 1 + explained]):
            return Leaf(text, None, hopeless=True)  # x = 1 y = 2
        rest = tokens[sum(len(side) + 1 for side in sides[: 1 + explained]) :]  # A = bh/2 = 6 says that A = 6
        renamed = names.with_argument_x(left, rest)
        alias = Named(text, latex(renamed[0]), _read_unlisted(renamed[1], nested + 1), None) if renamed else None
        return Named(text, latex(left), _read_unlisted(rest, nested + 1), difference, alias)
    is_constant = not any(token.kind == "letters" for token in left)
    if len(sides) == 2 and is_constant and names.is_name(right, left):
        return Named(text, latex(right), _read_unlisted(left, nested + 1), difference)
    values = [leaves.leaf(side) for side in sides]
    if all(leaves.symbols(leaf) == set() and leaves.agree(values[0], leaf) for leaf in values):
        return values[0]
    if last := leaves.result(sides):
        return last
    hopeless |= difference is None and any(map(leaves.has_words, sides))
    return Leaf(text, None, hopeless=True) if hopeless else Relation(text, "=", difference)


def _has_symbols(side: list[Token]) -> bool:
    """Returns whether a side of an equation is a formula with symbols, and no name."""
    return not names.is_name(side, []) and bool(leaves.symbols(leaves.leaf(side)))
