r"""Tokens of LaTeX and plain-text mathematics.

    tokenize(r"\dfrac{1}{2}x") -> [Token("command", "frac", …), …]
    latex(tokens)              -> one spelling for all ways to write the same tokens
    Cursor(tokens)             -> a position, from which a parser reads on

A number is one token, whose separators are removed: 1,234 is one number, except inside (), [] and \{\}, where a comma
separates. 1\,234 and 1{,}234, whose comma is a SEPARATOR, are one number too, and 3{,}5 is 3.5. Not here: what
tokens mean. Takes linear time.
"""

import itertools
import re
from collections.abc import Collection, Set
from typing import NamedTuple

from igrpo_jax.rewards.mathematics import spelling
from igrpo_jax.rewards.mathematics.spelling import SEPARATOR

_FUNCTION_NAMES = (
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh arsinh arcosh artanh arcsinh arccosh arctanh "
    "asin acos atan acot asinh acosh atanh ln log exp sqrt abs cis gcd lcm"
)
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_LETTER_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell infty odot vartheta"
)
GREEK = frozenset(_LETTER_NAMES.split())


class Token(NamedTuple):
    """One token of a text."""

    kind: str  # number, letters, command, text, mark; name for letters that are one symbol
    text: str  # a number's digits without separators; a command's name; the content of \text{…}; one character
    spaced: bool  # whether white space precedes it

    @property
    def opens(self) -> bool:
        return self.text in _OPEN and self.kind in ("mark", "command")

    @property
    def closes(self) -> bool:
        return self.text in _CLOSE and self.kind in ("mark", "command")

    def is_in(self, texts: Collection[str]) -> bool:
        """Returns whether it is one of these marks, commands, letters or numbers, and not a \\text{…}."""
        return self.text in texts and self.kind != "text"


_MONEY = re.compile(r"\$(?= ?-?[.\d])")

_SAME_AS = {
    **{"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "neq": "ne"},
    **{"le": "leq", "leqslant": "leq", "ge": "geq", "geqslant": "geq"},
    **{"lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")"},
    **dict.fromkeys(("lvert", "rvert", "vert", "lVert", "rVert", "Vert", "mid"), "|"),
    **{"lt": "<", "gt": ">", "colon": ":", "ast": "*", "cdot": "*", "times": "*", "div": "/"},
    **{
        "degree": "circ",
        "bigcup": "cup",
        "emptyset": "varnothing",
        **dict.fromkeys(("thickapprox", "doteq", "fallingdotseq"), "approx"),
        "thicksim": "sim",
        "backslash": "setminus",
        "varepsilon": "epsilon",
        "varphi": "phi",
        **dict.fromkeys(("dots", "cdots", "dotsc", "dotsb", "dotso"), "ldots"),
    },
    **{"vee": "lor", "wedge": "land", "lnot": "neg", "mod": "bmod", "rightarrow": "to", "Rightarrow": "implies"},
}
_AND_OR = frozenset(("and", "or"))
_BEHIND_INCHES = frozenset(("^", "*", "/", "+", "-", "=", ")", "}", ".", ",", ";"))  # and no set
_LOGICAL = {"land": "and", "lor": "or"}
_RELATIONS = frozenset(("=", "<", ">", "leq", "geq", "ne", "in"))
_DIGRAPHS = {"<=": "leq", "=<": "leq", ">=": "geq", "!=": "ne", "==": "="}
_MARKS = frozenset(("<", ">", "[", "]", "(", ")", "|", "*", "/", ":", "\\{", "\\}"))
_TEXT_NAMES = (
    "text textbf textit textrm textsf texttt textnormal mbox hbox mathrm mathbf mathit mathsf mathtt rm bf emph "
    "operatorname textup bm boldsymbol"
)
_TEXT_COMMANDS = frozenset(_TEXT_NAMES.split())
_SPACE = re.compile(
    r"(?:[\s$~]|\\[,;:!> \t\n]|\\q?quad|\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits"
    r"|thinspace|enspace|hfill|strut|rm|bf|tiny|small|large|Large|LARGE|huge)(?![A-Za-z])\.?)+"
)
_EXPONENT = r"(?:[eE][+-]?\d{1,5}(?!\d|\.\d))?"
_EXPLICIT = re.compile(rf"[1-9]\d{{0,2}}(?:{SEPARATOR}\d{{3}})+(?:\.\d+)?(?!\d)")
_DECIMAL_COMMA = re.compile(rf"\d+{SEPARATOR}\d+(?!{SEPARATOR}\d{{3}}|\.?\d)")
_SPACED = re.compile(r"[1-9]\d{0,2}(?:(?:\\[,;: ]|[ ~\u2009])\d{3})+(?:\.\d+)?(?![\d,])")
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?!\d|,\d)")
_NUMBER = re.compile(rf"(?:\d+(?:\.\d+|\.(?=\s?[/*)}}\],eE]|\\(?:overline|bar|dot)))?|\.\d+){_EXPONENT}")
_LETTERS = re.compile(r"[A-Za-z]+")
_ESCAPED = {"{": "\\{", "}": "\\}", "%": "%", "$": "\\$", "&": "and", "#": "#", "_": "_"}
_UNESCAPED = re.compile(r"(?<!\\)[{}]")
_BRACE = re.compile(r"\s*\{")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_OPEN = frozenset(("(", "[", "{", "\\{", "langle", "begin", "lfloor", "lceil"))
_CLOSE = frozenset((")", "]", "}", "\\}", "rangle", "end", "rfloor", "rceil"))


def tokenize(source: str) -> list[Token]:
    """Returns the tokens of any text. Drops spacing and sizing commands, and `$` except for money.

    "and" and "or" in all their spellings become marks; `<=` and similar signs become commands.
    """
    source = spelling.normal(source)
    if source.replace("\\$", "").count("$") % 2:
        source = _MONEY.sub(r"\\$", source, count=1)
    return _joined(_scanned(source))


def _joined(tokens: list[Token]) -> list[Token]:
    """Joins `<` and `=`, turns the words "and" and "or" into marks and "in" before a set into a command."""
    result: list[Token] = []
    counts = False  # whether a number is in this part of a list
    for token, following in itertools.zip_longest(tokens, tokens[1:]):
        last = result[-1] if result else None
        counts = not token.is_in((",", ";", *_AND_OR)) and (counts or token.kind == "number")
        is_word = token.kind == "text" or (token.kind == "letters" and token.spaced)
        word = token.text.strip(" ,.").casefold() if is_word else ""
        if token.kind == "text" and not token.text.strip(" ,.;:"):
            punctuation = token._replace(kind="mark", text=":" if ":" in token.text else ",")
            result += [punctuation] if token.text.strip(" .") else []
        elif word in _AND_OR:
            result.append(token._replace(kind="mark", text=word))
        elif token.is_in(_LOGICAL) and any(other.is_in(_RELATIONS) for other in tokens):
            result.append(token._replace(kind="mark", text=_LOGICAL[token.text]))
        elif word == "in" and token.kind == "letters" and (counts or following):
            result.append(token._replace(kind="text" if counts and _is_no_set(following) else "command"))
        elif last and last.kind == token.kind == "mark" and not token.spaced and last.text + token.text in _DIGRAPHS:
            result[-1] = last._replace(kind="command", text=_DIGRAPHS[last.text + token.text])
        else:
            result.append(token)
    return result


def _is_no_set(token: Token | None) -> bool:
    """Returns whether "in" is no sign before what follows it, as in "5 in total" and 5 in^2. In "x in R" it is one."""
    if token is None:
        return True
    is_word = token.kind == "text" or (token.kind == "letters" and not token.text.isupper())
    return is_word or token.is_in(_BEHIND_INCHES)


def _scanned(source: str) -> list[Token]:
    """Returns the tokens as they stand in the text."""
    tokens: list[Token] = []
    brackets: list[str] = []
    at, spaced = 0, False
    while at < len(source):
        match = _SPACE.match(source, at)
        if match:
            at, spaced = match.end(), True
            continue
        start, character = at, source[at]
        if character.isdecimal() or (character == "." and source[at + 1 : at + 2].isdecimal()):
            text, at = _number(source, at, bool(brackets) and brackets[-1] != "{")
            kind = "number"
        elif character.isascii() and character.isalpha():
            kind, at = "letters", _LETTERS.match(source, at).end()
            text = source[start:at]
        elif character == "\\" and at + 1 < len(source):
            kind, text, at = _command(source, at)
        else:
            kind, text, at = "mark", "," if character == SEPARATOR else character, at + 1
        tokens.append(Token(kind, text, spaced))
        if tokens[-1].opens:
            brackets.append(text)
        elif tokens[-1].closes and brackets:
            brackets.pop()
        spaced = False
    return tokens


def _number(source: str, at: int, in_brackets: bool) -> tuple[str, int]:
    """Returns (digits, end) of the number that begins at `at`."""
    if not (source[at - 1 : at] in (",", SEPARATOR) and source[at - 2 : at - 1].isdecimal()):
        for pattern in (_EXPLICIT, _SPACED) if in_brackets else (_EXPLICIT, _SPACED, _GROUPED):
            if match := pattern.match(source, at):
                return re.sub(r"[^\d.]", "", match.group()), match.end()
        if match := _DECIMAL_COMMA.match(source, at):
            return match.group().replace(SEPARATOR, "."), match.end()
    match = _NUMBER.match(source, at)
    return match.group(), match.end()


def _command(source: str, at: int) -> tuple[str, str, int]:
    """Returns (kind, text, end) of the command that begins at `at`."""
    match = _COMMAND.match(source, at)
    name, end = match[1], match.end()
    if name in _TEXT_COMMANDS and (opened := _BRACE.match(source, end)):
        closed = _closing(source, opened.end() - 1)
        if closed:
            return "text", source[opened.end() : closed], closed + 1
    if name in _ESCAPED:
        return "mark", _ESCAPED[name], end
    name = _SAME_AS.get(name, name)
    return ("mark" if name in _MARKS else "command"), name, end


def _closing(source: str, opened: int) -> int | None:
    """Returns where the brace that opens at `opened` closes, None if it does not."""
    depth = 0
    for brace in _UNESCAPED.finditer(source, opened):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return None


def is_enclosed(tokens: list[Token]) -> bool:
    """Returns whether the first token opens a bracket that the last one closes."""
    depth = 0
    for at, token in enumerate(tokens):
        depth += token.opens - token.closes
        if depth <= 0:
            return at == len(tokens) - 1 > 0
    return False


def split(tokens: list[Token], separators: Set[str]) -> tuple[list[list[Token]], list[str]]:
    """Cuts tokens at separators outside all brackets. Returns (the parts, the separators between them)."""
    if separators.isdisjoint([token.text for token in tokens]):
        return [list(tokens)], []
    parts: list[list[Token]] = [[]]
    between, depth = [], 0
    for token in tokens:
        depth += token.opens - token.closes
        if depth == 0 and token.is_in(separators) and not token.closes:
            between.append(token.text)
            parts.append([])
        else:
            parts[-1].append(token)
    return parts, between


def latex(tokens: list[Token]) -> str:
    """Returns tokens as LaTeX, with one spelling for all ways to write them: `sqrt(2)*x` is `\\sqrt{2}\\cdot x`."""
    pieces: list[str] = []
    closing: list[str] = []  # what each open bracket is closed with
    previous = Token("mark", "", False)
    for token in tokens:
        kind, text = token.kind, token.text
        if kind == "text":
            text = f"\\text{{{' '.join(text.split())}}}"
        elif text in ("(", "[", "{"):
            braces = text == "(" and previous.is_in(("^", "sqrt"))
            closing.append("}" if braces else "")
            text = "{" if braces else text
        elif text in (")", "]", "}") and closing:
            text = closing.pop() or text
        elif kind == "number" and "e" in text.casefold():
            digits, _, power = text.casefold().partition("e")
            text = f"{digits}\\cdot 10^{{{int(power)}}}"
        elif kind == "number" and (previous.is_in(("sqrt",)) or (previous.text == "^" and len(text) > 1)):
            text = f"{{{text}}}"
        elif kind == "command" or (kind == "letters" and (text in FUNCTIONS or text == "pi")):
            text = f"\\{text}" if text in ("begin", "end") else f"\\{text} "
        elif kind == previous.kind and kind in ("number", "letters"):
            text = f" {text}"
        pieces.append("\\cdot " if text == "*" else text)
        previous = token
    return "".join(pieces)


class Unreadable(ValueError):
    """The text is not an expression of the kind that is read here."""


class Cursor:
    """Tokens and the position of the next one. Text in \\text{…} never equals a mark, command, letter or number."""

    __slots__ = ("at", "tokens")

    def __init__(self, tokens: list[Token]):
        self.tokens = list(tokens)
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        """Returns the text of the next token, or of one further ahead; "" at the end and for \\text{…}."""
        at = self.at + ahead
        return self.tokens[at].text if at < len(self.tokens) and self.tokens[at].kind != "text" else ""

    def kind(self, ahead: int = 0) -> str:
        """Returns the kind of the next token, or of one further ahead; "" at the end."""
        at = self.at + ahead
        return self.tokens[at].kind if at < len(self.tokens) else ""

    def take(self, *texts: str) -> bool:
        """Moves past the next tokens if their texts are these, none of them ""; returns whether it did."""
        for ahead, text in enumerate(texts):
            if self.peek(ahead) != text:
                return False
        self.at += len(texts)
        return True

    def next(self) -> str:
        """Returns the text of the next token, also that of \\text{…}, and moves past it."""
        self.at += 1
        return self.tokens[self.at - 1].text

    def split_token(self, length: int) -> None:
        """Cuts the next token in two after `length` characters, where it has more."""
        token = self.tokens[self.at]
        if len(token.text) <= length:
            return
        rest = token._replace(text=token.text[length:], spaced=False)
        self.tokens[self.at : self.at + 1] = [token._replace(text=token.text[:length]), rest]
