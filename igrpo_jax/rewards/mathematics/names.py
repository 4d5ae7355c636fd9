r"""The names of quantities, which only name the right side of an equation: a_3 = 5, \angle ABC = 30, f(x) = x^2.

Not here: what the right side says (`answers`).
"""

import re

from igrpo_jax.rewards.mathematics import units
from igrpo_jax.rewards.mathematics.tokens import FUNCTIONS, GREEK, Cursor, Token, is_enclosed, split
from igrpo_jax.rewards.mathematics.words import OPERATORS, is_denied

FUNCTION_LETTERS = frozenset("fghFGHP")
_NAMING = "angle triangle overline overrightarrow vec mathbf mathcal mathbb frac dot bar hat circ cdot langle rangle"
_NAMED_BY = frozenset(_NAMING.split()) | frozenset(("(", ")", "[", "]", "{", "}", "|", ":", "'", "_", ",", "^"))


def are_capitals(tokens: list[Token]) -> bool:
    """Returns whether all letters are in capitals such as MR, or words such as Area, each of which is one name."""
    words = [token for token in tokens if token.kind in ("letters", "text")]
    are_names = all(is_long_name(word) and word.text.strip()[:1].isupper() for word in words)
    return bool(words) and are_names and not any(token.is_in(("_",)) for token in tokens)


# A sum, a limit, a determinant or a function of one argument on the left of an equation names the right side.
_SUMS = frozenset(("sum", "prod", "int", "iint", "oint"))
_OPERATIONS = frozenset(("max", "min", "sup", "det", "deg", "dim", "rank", "tr", "arg", "gcd", "lcm"))
_ANGULAR = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_INVERSE = ["^", "{", "-", "1", "}"]


def is_applied(tokens: list[Token]) -> bool:
    """Returns whether the tokens look like f(x), f'(2), f^{-1}(x), x_p(t) or \\omega(r)."""
    return bool(_argument(tokens))


def _argument(tokens: list[Token]) -> list[Token]:
    """Returns the (x) of f(x), and nothing if the tokens are no application of a function."""
    if not tokens or not (tokens[0].kind == "letters" or tokens[0].is_in(GREEK)):
        return []
    rest = _without_subscripts(tokens[1:])
    if [token.text for token in rest[:5]] == _INVERSE:
        rest = rest[5:]
    while rest and rest[0].is_in(("'",)):
        rest = rest[1:]
    return rest if len(rest) > 2 and rest[0].is_in(("(",)) and is_enclosed(rest) else []


def with_argument_x(left: list[Token], right: list[Token]) -> tuple[list[Token], list[Token]] | None:
    """Returns the sides of f(n) = n^2 as those of f(x) = x^2, None if there is nothing to rename.

    P(A) and f(a) are values for one A and a unless the right side depends on the letter.
    """
    argument = _argument(left)
    letter = argument[1].text if len(argument) == 3 and argument[1].kind == "letters" else ""
    is_run = lambda token: token.kind == "letters" and token.text not in FUNCTIONS | GREEK | {"pi"}
    runs = "".join(token.text for token in right if is_run(token))
    if len(letter) != 1 or not letter.islower() or letter in "xie" + left[0].text or "x" in left[0].text + runs:
        return None
    if letter not in runs:
        return None
    renamed = lambda token: token._replace(text=token.text.replace(letter, "x"))
    left, right = ([renamed(token) if is_run(token) else token for token in side] for side in (left, right))
    return left, right


# Letters in the order in which a point or tuple has them. Others, as l and w or n and k, stand in either order.
_RUNS = r"""a b c d e f | m b | h k | a h k | l m n | p q r s t | s t u | t x | u v w | x y z | A B C D E F | P Q R S T
X Y Z | \rho \theta \phi | r \theta \phi | r \theta z | \alpha \beta \gamma \delta | \lambda \mu"""
_ORDERS = [{letter: at for at, letter in enumerate(run.split())} for run in re.split(r"[|\n]", _RUNS)]
_PIECES = re.compile(r"\\[A-Za-z]+|[A-Z]?[a-z]{2,}|\d+|\S")


def in_order(names: list[str]) -> list[int]:
    r"""Returns which name stands first, second, …, as [1, 0] for y, x. Names without a known order stay as they are.

    Those with an order differ in one letter, as x and y or \angle A and \angle B, or in one number, as x_2 and x_{10}.
    """
    written = list(range(len(names)))
    pieces = [[piece for piece in _PIECES.findall(name) if piece not in "{}"] for name in names]
    if len(set(map(len, pieces))) != 1:
        return written
    columns = [column for column in zip(*pieces, strict=True) if len(set(column)) > 1]
    if len(columns) != 1:
        return written
    column = columns[0]
    if all(map(str.isdecimal, column)):
        return sorted(written, key=lambda at: int(column[at]))
    order = next((order for order in _ORDERS if order.keys() >= set(column)), None)
    return sorted(written, key=lambda at: order[column[at]]) if order else written


def is_name(tokens: list[Token], value: list[Token]) -> bool:
    """Returns whether the left side of an equation only names the right side: x, a_3, AB, |AB|, f(x), (p, q), Area."""
    if _is_operation(tokens, value):
        return True
    argument = _argument(tokens)
    is_primed = any(token.is_in(("'",)) for token in tokens)
    if argument and tokens[0].text not in FUNCTION_LETTERS and any(token.is_in(OPERATORS) for token in argument):
        return False  # x(x+1) is a product
    for at, token in enumerate(tokens):
        is_behind_name = at > 0 and (tokens[at - 1].kind == "letters" or tokens[at - 1].is_in(("'", "}")))
        if token.is_in(("'",)) and (not is_behind_name or tokens[-1].kind == "letters"):
            return False  # a quotation mark and not a prime
    named = tokens[:1] if argument else _without_subscripts(_without_power(tokens))
    texts = {token.text for token in named}
    if not all(map(_may_name, named)) or ("^" in texts and not texts & {"circ", "prime"}):
        return False
    has_letters = any(token.kind in ("letters", "text") or token.text in GREEK for token in named)
    if not has_letters or (len(tokens) == 1 and tokens[0].text in ("i", "e")):
        return False
    if argument and not is_primed:
        return True
    return not _share_symbols(tokens[:1] if argument else tokens, value)


def _is_operation(tokens: list[Token], value: list[Token]) -> bool:
    r"""Returns whether the tokens are a limit, a sum or a function of one argument, as \tan\theta or \max f(x)."""
    name = tokens[0].text.strip().casefold()
    if name in _SUMS and tokens[0].kind == "command":
        return len(split(tokens, {"+", "-"})[0]) == 1
    if name not in _OPERATIONS | _ANGULAR:
        return tokens[0].is_in(("lim",))
    rest = _without_subscripts(tokens[1:])
    is_matrix = len(rest) > 8 and rest[0].is_in(("begin",)) and rest[-4].is_in(("end",))
    is_one = not rest or is_enclosed(rest) or is_applied(rest) or is_matrix
    is_one |= all(map(_may_name, rest)) and not any(token.is_in(("^", "(", "|")) for token in rest)
    return is_one and not (name in _ANGULAR and (not rest or _share_symbols(rest, value)))


def _without_power(tokens: list[Token]) -> list[Token]:
    """Returns |z|^2 as |z| and A^{-1} as A."""
    texts = [token.text for token in tokens]
    end = len(texts) - texts[::-1].index("|") if texts[0] == "|" else 0  # behind the last bar
    if texts[end : end + 1] == ["^"] and (len(texts) == end + 2 or texts[end + 1 :: 2] == ["{", "}"]):
        return tokens[:end]
    return tokens[:-5] if texts[-5:] == _INVERSE and texts[0].strip().isupper() else tokens


def _share_symbols(tokens: list[Token], value: list[Token]) -> bool:
    """Returns whether a name shares a symbol with its value, or ABC is spelled by symbols of it, as in A + B + C."""
    names, symbols = _symbols_of(tokens), _symbols_of(value)
    if len(tokens) == len(value) == 1 and are_capitals(tokens) and are_capitals(value):
        return bool(set("".join(names)) & set("".join(symbols)))  # MR = SRMC
    return bool(names & symbols) or any(len(name) > 1 and set(name) <= symbols for name in names)


def is_long_name(token: Token) -> bool:
    r"""Returns whether a token is one name and no product: capitals such as MR, a word such as Area, \text{MR}."""
    text = token.text.strip()
    if token.kind not in ("letters", "text") or not text.isalpha() or text.casefold() in FUNCTIONS or text in GREEK:
        return False
    return (len(text) > 1 and text.isupper()) or (len(text) >= 4 and text != "infty") or token.kind == "text"


def _may_name(token: Token) -> bool:
    if token.kind in ("letters", "text"):
        denied = not token.text.isupper() and is_denied(token.text)
        return any(map(str.isalpha, token.text)) and token.text.casefold() not in FUNCTIONS and not denied
    return token.text in _NAMED_BY or token.text in GREEK


def _without_subscripts(tokens: list[Token]) -> list[Token]:
    kept, cursor = [], Cursor(tokens)
    while cursor.kind():
        if not cursor.take("_"):
            kept.append(tokens[cursor.at])
            cursor.at += 1
        elif cursor.take("{"):
            cursor.at += next(
                (at + 1 for at, token in enumerate(tokens[cursor.at :]) if token.is_in(("}",))), len(tokens)
            )
        else:
            cursor.at += 1
    return kept


def _symbols_of(tokens: list[Token]) -> set[str]:
    """Returns the letters of an expression, each with its subscript: a_n is another symbol than n."""
    symbols: list[str] = []
    cursor = Cursor(tokens)
    while cursor.kind():
        is_long = is_long_name(cursor.tokens[cursor.at])
        is_behind = cursor.at > 0 and not cursor.tokens[cursor.at - 1].is_in(OPERATORS)  # only there it may be a unit
        is_run = is_long or (cursor.kind() == "letters" and cursor.peek() not in FUNCTIONS)
        text = cursor.next().strip()
        is_unit = is_behind and cursor.peek() != "_" and units.known(text)
        if (is_run and not is_unit) or text in GREEK:
            symbols += [text] if text in GREEK or is_long else list(text)
            if cursor.take("_"):
                symbols[-1] += "_" + _subscript(cursor)
    return set(symbols)


def _subscript(cursor: Cursor) -> str:
    """Returns what stands behind "_": what is in braces, or one letter, number or command."""
    if cursor.kind() == "letters":
        cursor.split_token(1)
    if not cursor.take("{"):
        return cursor.next() if cursor.kind() else ""
    content = ""
    while cursor.kind() and not cursor.take("}"):
        content += cursor.next()
    return content
