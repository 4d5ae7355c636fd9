r"""LaTeX and plain-text mathematics, read to exact values: tokens, and a recursive-descent parser of expressions.

    tokenize(r"\dfrac{1}{2}x") -> [Token("command", "frac", …), …]
    value_of(tokens)           -> exact.Value

An expression is read as written by hand: juxtaposition is a product, but 2\frac12 and "2 1/2" are mixed numbers; a
run of letters is a product of one-letter symbols unless it is a name such as `sqrt` or `pi`; `x_1` and `\lambda_{red}`
are one symbol; `i` and `e` are the numbers; 1,234 is one number, except inside (), [] and \{\}, where a comma
separates; 3{,}5 is 3.5; 4.5e33 is 4.5·10^33; 0.\overline{3} is 1/3; \log without a base is left undecided.

Not here: answers that are no single expression (`answers`); arithmetic (`exact`). Nothing is ever evaluated as
Python. Linear time, but for the arithmetic. Limits: MAX_DEPTH.
"""

import math
from fractions import Fraction

from igrpo_jax.rewards.mathematics import exact, functions
from igrpo_jax.rewards.mathematics.exact import NoValue, Value
from igrpo_jax.rewards.mathematics.tokens import FUNCTIONS, GREEK, Token, tokenize

MAX_DEPTH = 30  # nested brackets, roots, fractions, …


class Unreadable(ValueError):
    """The text is no expression of the kind read here."""


_LONG_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_ACCENT_NAMES = "vec hat bar overline dot ddot tilde overrightarrow widehat mathcal mathbb underline"
_ACCENTS = frozenset(_ACCENT_NAMES.split())
_INFINITIES = frozenset(("infty", "infinity", "inf"))
_REPEATING = frozenset(("overline", "bar", "dot", "dots"))


def value_of(tokens: list[Token]) -> Value:
    """The exact value of an expression. Raises Unreadable, or NoValue (division by zero, beyond the limits)."""
    return Parser(tokens).whole()


class Parser:
    """One expression; `degrees` tells afterwards whether a degree sign stood outside a function's argument."""

    def __init__(self, tokens: list[Token]):
        self._tokens = list(tokens)
        self._at = 0
        self._depth = 0
        self._in_angle = False
        self.degrees = False

    def whole(self) -> Value:
        if len(self._tokens) > 2 and any(token.is_in(_INFINITIES) for token in self._tokens):
            raise NoValue("arithmetic with infinity")
        value = self._sum()
        if self._at < len(self._tokens):
            raise Unreadable
        return value

    def _peek(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._tokens[at].text if at < len(self._tokens) and self._tokens[at].kind != "text" else ""

    def _kind(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._tokens[at].kind if at < len(self._tokens) else ""

    def _take(self, text: str) -> bool:
        found = self._peek() == text and bool(text)
        self._at += found
        return found

    def _need(self, text: str) -> None:
        if not self._take(text):
            raise Unreadable

    def _split_token(self, length: int) -> None:
        """Cuts the current token in two, after `length` characters where it has more."""
        token = self._tokens[self._at]
        if len(token.text) <= length:
            return
        rest = token._replace(text=token.text[length:], spaced=False)
        self._tokens[self._at : self._at + 1] = [token._replace(text=token.text[:length]), rest]

    def _sum(self) -> Value:
        total = self._product()
        while self._peek() in ("+", "-"):
            minus = self._take("-") or not self._take("+")
            term = self._product()
            total = total - term if minus else total + term
        return total

    def _product(self) -> Value:
        value = self._signed()
        while True:
            if self._peek() == "*" and self._peek(1) != "*":
                self._take("*")
                value = value * self._signed()
            elif self._take("/"):
                value = value / self._signed()
            elif self._starts_factor():
                value = value * self._factor()
            else:
                return value

    def _starts_factor(self) -> bool:
        kind, text = self._kind(), self._peek()
        if kind == "number":
            return False  # 1 2 is not 2, and 28_9 no product
        if kind == "command":
            return not self._tokens[self._at].closes
        return kind in ("letters", "text") or text in ("(", "[", "{")

    def _signed(self) -> Value:
        negative = False
        while self._peek() in ("+", "-"):
            negative ^= self._take("-") or not self._take("+")
        value = self._factor()
        return -value if negative else value

    def _factor(self) -> Value:
        """A primary with what follows it: power, factorial, degree sign, prime."""
        value = self._primary()
        while True:
            if self._take("!"):
                n = value.constant()
                if self._peek() == "!" or n is None or n.denominator != 1 or n < 0:
                    raise Unreadable
                if n > functions.MAX_EXPONENT:
                    raise NoValue("factorial too large")
                value = Value.number(math.factorial(int(n)))
            elif self._peek() == "^" or (self._peek() == "*" and self._peek(1) == "*"):
                self._at += 1 if self._peek() == "^" else 2
                if self._degree_sign():
                    value = value * exact.PI / Value.number(180) if self._in_angle else value
                else:
                    value = functions.power(value, self._exponent())
                    if self._peek() == "^":
                        raise Unreadable  # 2^3^2 is 2^(3^2) to some, (2^3)^2 to others
            else:
                return value

    def _degree_sign(self) -> bool:
        """Takes `\\circ` or `{\\circ}` after `^`."""
        braced = self._peek() == "{" and self._peek(1) == "circ" and self._peek(2) == "}"
        if not braced and self._peek() != "circ":
            return False
        self._at += 3 if braced else 1
        self.degrees |= not self._in_angle
        return True

    def _exponent(self) -> Value:
        if self._peek() == "{":
            return self._group("}")
        negative = self._take("-")
        letters = self._peek() if self._kind() == "letters" else ""
        if len(letters) > 1 and letters.casefold() not in FUNCTIONS | {"pi"}:
            self._split_token(1)
        value = self._bare_number() or self._primary()
        return -value if negative else value

    def _bare_number(self) -> Value | None:
        """A whole number token without braces, as in x^10; what follows it is none of its business."""
        if self._kind() != "number":
            return None
        self._at += 1
        return Value.number(_decimal(self._tokens[self._at - 1].text))

    def _group(self, closing: str) -> Value:
        self._at += 1
        value = self._sum()
        self._need(closing)
        return value

    def _primary(self) -> Value:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable
        value = self._opened()
        self._depth -= 1
        return value

    def _opened(self) -> Value:
        kind, text = self._kind(), self._peek()
        if kind == "number":
            return self._number()
        if kind == "letters":
            return self._letters()
        if kind == "command":
            return self._command()
        if kind == "text":
            return self._text()
        if text in ("(", "["):
            return self._group(")" if text == "(" else "]")
        if text == "{":
            return self._group("}")
        if text == "|":
            value = self._group("|")
            return functions.function("abs", value)
        raise Unreadable

    def _number(self) -> Value:
        text = self._tokens[self._at].text
        self._at += 1
        if "." in text and self._kind() == "command" and self._peek() in _REPEATING and self._peek(1) == "{":
            digits = self._peek(2)
            if digits.isdecimal() and self._peek(3) == "}":
                self._at += 4
                return Value.number(
                    _decimal(text) + Fraction(int(digits), 10 ** _places(text) * (10 ** len(digits) - 1))
                )
        value = _decimal(text)
        if text.isdecimal():
            value += self._mixed()
        return Value.number(value)

    def _mixed(self) -> Fraction:
        """The fraction of a mixed number, 0 where there is none: proper, of plain integers."""
        top = bottom = ""
        texts = [self._peek(ahead) for ahead in range(7)]
        if texts[0] == "frac":
            if texts[1] == "{" and texts[3] == "}":
                top, length = texts[2], 4
            else:
                top, length = texts[1][:1], 2
                if len(texts[1]) == 2:
                    top, bottom = texts[1]
            if not bottom and texts[length : length + 1] == ["{"] and self._peek(length + 2) == "}":
                bottom, length = self._peek(length + 1), length + 3
            elif not bottom:
                bottom, length = self._peek(length), length + 1
                if len(bottom) > 1:
                    return Fraction(0)
        elif texts[1] == "/" and self._kind() == "number" and self._tokens[self._at].spaced:
            top, bottom, length = texts[0], texts[2], 3
        if not (top.isdecimal() and bottom.isdecimal()) or int(top) >= int(bottom):
            return Fraction(0)
        if self._peek(length) in ("^", "!"):
            return Fraction(0)
        self._at += length
        return Fraction(int(top), int(bottom))

    def _letters(self) -> Value:
        text = self._peek()
        if text in ("np", "math", "sympy") and self._peek(1) == "." and self._kind(2) == "letters":
            self._at += 2
            text = self._peek()
        if text.casefold() in FUNCTIONS:
            self._at += 1
            return self._function(text.casefold())
        if text.casefold() in ("pi", "infinity", "infty", "inf") or text in GREEK:
            self._at += 1
            return exact.PI if text.casefold() == "pi" else self._symbol(text if text in GREEK else "infty")
        if len(text) > 1:
            self._split_token(1)
        self._at += 1
        return self._symbol(text[0])

    def _symbol(self, name: str) -> Value:
        """A symbol with the subscript and primes that follow it; f(…) as the application of a function."""
        if self._take("_"):
            name += "_" + self._subscript()
        while self._take("'") or self._prime():
            name += "'"
        if name == "infty":
            name = "∞"
        if name in ("i", "e"):
            return exact.I if name == "i" else exact.E
        if self._peek() == "(" and (name == "f" or (self._kind(1) == "number" and self._peek(2) == ")")):
            # Not the product: f(x+y), I(0). Of other letters than f it may be one, as in r(2).
            return functions.application(name, self._group(")"), opaque=name != "f")
        return Value.symbol(name)

    def _prime(self) -> bool:
        if self._peek() != "^":
            return False
        if self._peek(1) == "prime":
            self._at += 2
            return True
        if self._peek(1) == "{" and self._peek(2) == "prime" and self._peek(3) == "}":
            self._at += 4
            return True
        return False

    def _subscript(self) -> str:
        if self._take("{"):
            content = []
            while self._peek() != "}":
                if self._at >= len(self._tokens) or self._peek() == "{":
                    raise Unreadable
                content.append(self._tokens[self._at].text.replace(" ", ""))
                self._at += 1
            self._at += 1
            return "".join(content)
        if self._kind() == "letters" and len(self._peek()) > 1:
            self._split_token(1)
        if self._kind() not in ("number", "letters", "command"):
            raise Unreadable
        self._at += 1
        return self._tokens[self._at - 1].text

    def _text(self) -> Value:
        """\\mathrm{e}, \\text{2/3}, \\operatorname{arcsin}: read as if the command were not there."""
        inner = tokenize(self._tokens[self._at].text)
        is_function = len(inner) == 1 and inner[0].text.casefold() in FUNCTIONS
        if not is_function and (len(inner) > 4 or any(t.kind == "letters" and len(t.text) > 1 for t in inner)):
            raise Unreadable
        self._tokens[self._at : self._at + 1] = inner
        return self._primary()

    def _command(self) -> Value:
        name = self._peek()
        self._at += 1
        if name == "frac":
            if self._is_derivative():
                raise Unreadable
            top = self._argument()
            bottom = self._argument()
            return top / bottom
        if name == "sqrt":
            return self._root()
        if name == "pi":
            return exact.PI
        if name in GREEK:
            return self._symbol(name)
        if name in FUNCTIONS:
            return self._function(name)
        if name == "binom":
            n, k = self._argument().constant(), self._argument().constant()
            if n is None or k is None or n.denominator != 1 or k.denominator != 1 or min(n, k) < 0:
                raise Unreadable
            if n > functions.MAX_EXPONENT:
                raise NoValue("binomial too large")
            return Value.number(math.comb(int(n), int(k)))
        if name in ("lfloor", "lceil"):
            value = self._sum().constant()
            self._need("r" + name[1:])
            if value is None:
                raise Unreadable
            return Value.number(math.floor(value) if name == "lfloor" else math.ceil(value))
        if name in ("triangle", "angle") and self._kind() == "letters":
            self._at += 1
            return Value.symbol(f"{name} {self._tokens[self._at - 1].text}")
        if name in _ACCENTS and self._peek() == "{" and self._kind(1) == "letters" and self._peek(2) == "}":
            accented = self._peek(1)
            self._at += 3
            return self._symbol(f"{name} {accented}")
        raise Unreadable

    def _is_derivative(self) -> bool:
        """dy/dx is no quotient: after `\\frac` come {d… and }{d…, the latter with more than the d."""
        rest = self._tokens[self._at :]
        closed = next((at for at, token in enumerate(rest) if token.text == "}"), 0)
        below = rest[closed + 1 : closed + 4]
        above = rest[1:2]
        return (
            bool(above and len(below) == 3 and above[0].text.startswith("d") and below[1].text.startswith("d"))
            and above[0].kind == below[1].kind == "letters"
            and (len(below[1].text) > 1 or below[2].kind in ("letters", "command"))
        )

    def _argument(self) -> Value:
        """A macro's argument: a group, or one digit, letter or command."""
        if self._peek() == "{":
            return self._group("}")
        if self._kind() == "letters" or (self._kind() == "number" and self._peek().isdecimal()):
            self._split_token(1)
        number = self._bare_number()
        if number:
            return number
        if self._kind() == "letters":
            self._at += 1
            letter = self._tokens[self._at - 1].text
            return {"i": exact.I, "e": exact.E}.get(letter) or Value.symbol(letter)
        if self._kind() == "command":
            return self._primary()
        raise Unreadable

    def _root(self) -> Value:
        degree = 2
        if self._peek() == "[":
            constant = self._group("]").constant()
            if constant is None or constant.denominator != 1 or not 2 <= constant <= 100:
                raise Unreadable
            degree = int(constant)
        if self._peek() == "(":
            return functions.root(self._group(")"), degree)
        # \sqrt10 means the root of 10, whatever TeX makes of it.
        return functions.root(self._bare_number() or self._argument(), degree)

    def _function(self, name: str) -> Value:
        name = _LONG_NAMES.get(name, name)
        if name == "sqrt":
            return self._root()
        exponent = base = None
        while self._peek() in ("^", "_"):
            if self._take("^"):
                exponent = self._exponent()
            else:
                self._at += 1
                base = self._bare_number() or self._argument()
        outer, self._in_angle = self._in_angle, name in ("sin", "cos", "tan", "cot", "sec", "csc")
        argument = self._angle()
        self._in_angle = outer
        if exponent is not None and exponent.constant() == -1 and name in ("sin", "cos", "tan"):
            name, exponent = "arc" + name, None
        if base is not None:
            value = functions.logarithm(argument) / functions.logarithm(base) if name == "log" else None
            if value is None:
                raise Unreadable
        else:
            value = functions.function(name, argument)
        return value if exponent is None else functions.power(value, exponent)

    def _angle(self) -> Value:
        """A function's argument: a bracketed one alone, else the product up to the next function, sign or bracket."""
        if self._peek() in ("(", "{", "[", "|"):
            value = self._primary()
            if self._in_angle and self._peek() == "^" and self._peek(1) in ("circ", "{"):
                mark = self._at
                self._at += 1
                if self._degree_sign():
                    return value * exact.PI / Value.number(180)
                self._at = mark
            return value
        value = self._signed()
        while self._starts_factor() and self._peek() not in ("(", "[") and self._kind() != "text":
            if self._peek().casefold() in FUNCTIONS:
                break
            value = value * self._factor()
        return value


def _decimal(text: str) -> Fraction:
    """The exact value of a number token."""
    digits, _, exponent = text.casefold().partition("e")
    if exponent:
        power = int(exponent)
        if abs(power) > functions.MAX_EXPONENT:
            raise NoValue("exponent too large")
        return Fraction(digits) * Fraction(10) ** power
    return Fraction(digits)


def _places(text: str) -> int:
    return len(text.partition(".")[2])
