r"""Reads expressions in LaTeX and plain text to exact values: a recursive-descent parser of tokens.

    tokenize(r"\dfrac{1}{2}x") -> [Token("command", "frac", …), …]
    value_of(tokens)           -> exact.Value

Expressions are read as people write them. Juxtaposition is a product, but 2\frac12 and "2 1/2" are mixed numbers, and
any other number behind a factor, as in 2 2, 2{2} or \frac12 12, leaves no value, unless both are factorials: 2!3!. A
run of letters is a product of one-letter symbols unless it is a name such as `sqrt` or `pi`; `x_1`, `\lambda_{red}` and
dx/dt are symbols; `i` and `e` are numbers. 1,234 is one number, except inside (), [] and \{\}, where a comma separates;
3{,}5 is 3.5; 4.5e33 is 4.5·10^33; 0.\overline{3} is 1/3. \log without a base is left undecided.

Not here: answers that are not one expression (`answers`); arithmetic (`exact`). Nothing is ever evaluated as Python.
Takes linear time, apart from the arithmetic. Limit: MAX_DEPTH.
"""

import math

from igrpo_jax.rewards.mathematics import derivatives, exact, functions, numerals, roots
from igrpo_jax.rewards.mathematics.exact import NoValue, Value
from igrpo_jax.rewards.mathematics.tokens import FUNCTIONS, GREEK, Cursor, Token, Unreadable, tokenize

MAX_DEPTH = 30  # of nested brackets, roots, fractions, …


_LONG_NAMES = {
    **{f"a{name}": f"arc{name}" for name in ("sin", "cos", "tan", "cot")},
    **{f"{prefix}{name}": f"ar{name}" for prefix in ("a", "arc") for name in ("sinh", "cosh", "tanh")},
}
_ACCENT_NAMES = "vec hat bar overline dot ddot tilde overrightarrow widehat mathcal mathbb"
_ACCENTS = frozenset(_ACCENT_NAMES.split())
_INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "sec": "arccos", "csc": "arcsin"}  # sec^{-1}: of 1/x
_INVERSES |= {"cot": "arccot", "sinh": "arsinh", "cosh": "arcosh", "tanh": "artanh"}
_MODULES = ("np", "math", "sympy")  # of functions, as in np.arcsin
_CLOSINGS = {"(": ")", "[": "]", "{": "}", "|": "|", "\\{": "\\}"}
_PRIMES = (("'",), ("^", "prime"), ("^", "{", "prime", "}"))
_NAMES = FUNCTIONS | GREEK | {"pi"}
_INFINITIES = frozenset(("infty", "infinity", "inf"))


def value_of(tokens: list[Token]) -> Value:
    """Returns the exact value of an expression. Raises Unreadable, or NoValue (division by zero, beyond the limits)."""
    return Parser(tokens).parse()


def _integer(value: Value, least: float, most: float = functions.MAX_EXPONENT) -> int:
    """Returns an integer of at least `least`. Raises Unreadable for anything else, NoValue beyond `most`."""
    constant = value.constant()
    if constant is None or constant.denominator != 1 or constant < least:
        raise Unreadable
    if constant > most:
        raise NoValue("too large")
    return int(constant)


class Parser:
    """Parses one expression. Afterwards `degrees` tells whether a degree sign stood outside a function's argument."""

    def __init__(self, tokens: list[Token]):
        self._cursor = Cursor(tokens)
        self._depth = 0
        self._in_angle = False
        self.degrees = False

    def parse(self) -> Value:
        """Returns the value of all tokens together. Raises Unreadable or NoValue."""
        if len(self._cursor.tokens) > 2 and any(token.is_in(_INFINITIES) for token in self._cursor.tokens):
            raise NoValue("arithmetic with infinity")
        value = self._sum()
        if self._cursor.at < len(self._cursor.tokens):
            raise Unreadable
        return value

    def _sum(self) -> Value:
        total = self._product()
        while self._cursor.peek() in ("+", "-"):
            minus = self._cursor.take("-") or not self._cursor.take("+")
            term = self._product()
            total = total - term if minus else total + term
        return total

    def _product(self) -> Value:
        value, is_quotient = self._signed(), False
        while True:
            if self._cursor.peek() == "*" and self._cursor.peek(1) != "*":
                self._cursor.take("*")
                value = value * self._signed()
            elif self._cursor.take("/"):
                value, is_quotient = value / self._denominator(), True
            elif self._cursor.take("bmod"):
                n, modulus = _integer(value, -math.inf, math.inf), _integer(self._signed(), 1, math.inf)
                if self._starts_factor():
                    raise Unreadable  # 17 \bmod 5x
                value = Value.number(n % modulus)
            elif self._starts_visible_factor() or (not is_quotient and self._starts_factorial()):
                value = value * self._factor()
            elif self._cursor.kind() == "number" or self._starts_factor():
                # Computer algebra would make 4 of 2 2, 6 of \frac12 12 and 7x of x 3 4.
                raise NoValue("a number behind a factor")
            else:
                return value

    def _starts_factor(self) -> bool:
        kind, text = self._cursor.kind(), self._cursor.peek()
        if kind == "number":
            return False  # 28_9 is not a product
        if kind == "command":
            return not self._cursor.tokens[self._cursor.at].closes
        return kind in ("letters", "text", "name") or text in ("(", "[", "{", "\\{")

    def _starts_visible_factor(self) -> bool:
        return self._starts_factor() and not numerals.is_hidden(self._cursor)

    def _starts_factorial(self) -> bool:
        """Returns whether a number with a factorial of its own follows a factorial without a blank, as in 2!3!."""
        is_factorial = self._cursor.kind() == "number" and self._cursor.peek(1) == "!" == self._cursor.peek(-1)
        return is_factorial and not self._cursor.tokens[self._cursor.at].spaced

    def _denominator(self) -> Value:
        """Reads what stands behind "/": letters side by side are one denominator, as in t/RC, but 1/2x is x/2."""
        may_go_on = self._starts_letter()
        value = self._signed()
        while may_go_on and self._starts_letter():
            value = value * self._factor()
        return value

    def _starts_letter(self) -> bool:
        """Returns whether a letter comes next that is no function and neither i nor e."""
        kind, text = self._cursor.kind(), self._cursor.peek()
        return (kind == "letters" and text.casefold() not in FUNCTIONS and text[0] not in "ie") or text in GREEK

    def _signed(self) -> Value:
        negative = False
        while self._cursor.peek() in ("+", "-"):
            negative ^= self._cursor.take("-") or not self._cursor.take("+")
        value = self._factor()
        return -value if negative else value

    def _factor(self) -> Value:
        """Reads a primary and what follows it: power, factorial, degree sign, prime."""
        value = self._primary()
        while True:
            if self._cursor.take("!"):
                step = 2 if self._cursor.take("!") else 1  # 5!! is 5·3·1
                n = _integer(value, 0)
                if self._cursor.peek() == "!":
                    raise Unreadable
                value = Value.number(math.prod(range(n, 0, -step)) if step == 2 else math.factorial(n))
            elif self._cursor.take("^") or self._cursor.take("*", "*"):
                if self._degree_sign():
                    value = value * exact.PI / Value.number(180) if self._in_angle else value
                else:
                    value = functions.power(value, self._exponent())
                    if self._cursor.peek() == "^":
                        raise Unreadable  # some read 2^3^2 as 2^(3^2), others as (2^3)^2
            else:
                return value

    def _degree_sign(self) -> bool:
        """Reads `\\circ` or `{\\circ}` after `^`; returns whether it was there."""
        is_there = self._cursor.take("circ") or self._cursor.take("{", "circ", "}")
        self.degrees |= is_there and not self._in_angle
        return is_there

    def _exponent(self) -> Value:
        if self._cursor.peek() == "{":
            return self._primary()  # counts its depth
        negative = self._cursor.take("-")
        letters = self._cursor.peek() if self._cursor.kind() == "letters" else ""
        if len(letters) > 1 and letters.casefold() not in FUNCTIONS | {"pi"}:
            self._cursor.split_token(1)
        value = numerals.bare_number(self._cursor) or self._primary()
        return -value if negative else value

    def _group(self, closing: str) -> Value:
        self._cursor.at += 1
        value = self._sum()
        if not self._cursor.take(closing):
            raise Unreadable
        return value

    def _primary(self) -> Value:
        kind, text = self._cursor.kind(), self._cursor.peek()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable
        if kind == "number":
            value = numerals.number(self._cursor)
        elif derivative := derivatives.quotient(self._cursor):
            value = Value.symbol(derivative)
        elif kind in ("letters", "command", "text"):
            value = {"letters": self._letters, "command": self._command, "text": self._text}[kind]()
        elif kind == "name":
            value = Value.symbol(self._cursor.next())
        elif text in _CLOSINGS:
            value = self._group(_CLOSINGS[text])
        else:
            raise Unreadable
        self._depth -= 1
        if kind == "mark" and text in ("|", "\\{"):
            constant = value.constant()
            if text == "\\{" and constant is not None and constant.denominator == 1:
                raise Unreadable  # a set, as in \mathbb{Z} - \{0\}
            return functions.function("abs", value) if text == "|" else functions.fractional_part(value)
        return value

    def _letters(self) -> Value:
        if any(self._cursor.take(module, ".") for module in _MODULES) and self._cursor.kind() != "letters":
            raise Unreadable
        text = self._cursor.peek()
        name = text if text in GREEK else text.casefold()
        if name in _NAMES or name in _INFINITIES:
            self._cursor.at += 1
            return self._named("infty" if name in _INFINITIES else name)
        self._cursor.split_token(1)
        return self._symbol(self._cursor.next())

    def _named(self, name: str) -> Value:
        """Reads what follows the name of a function, of π, or of a Greek letter."""
        if name in FUNCTIONS:
            return self._function(name)
        return exact.PI if name == "pi" else self._symbol(name)

    def _symbol(self, name: str) -> Value:
        """Reads the subscript and primes that follow a symbol; f(…) is the application of a function."""
        if self._cursor.take("_"):
            name += "_" + self._subscript()
        while self._cursor.peek() in ("'", "^") and any(self._cursor.take(*prime) for prime in _PRIMES):
            name += "'"
        if name == "infty":
            name = "∞"
        if name in ("i", "e"):
            return exact.I if name == "i" else exact.E
        if self._cursor.peek() == "(":
            if name in ("Gamma", "zeta"):
                return functions.function(name, self._group(")"))
            of_number = self._cursor.kind(1) == "number" and self._cursor.peek(2) == ")"
            if name == "f" or of_number:
                # f(x+y) and I(0) are not products. Letters other than f may stand for one, as in r(2): opaque.
                return roots.application(name, self._group(")"), opaque=name != "f")
        return Value.symbol(name)

    def _subscript(self) -> str:
        if self._cursor.take("{"):
            content = ""
            while not self._cursor.take("}"):
                if not self._cursor.kind() or self._cursor.peek() == "{":
                    raise Unreadable
                content += self._cursor.next().replace(" ", "")
            return content
        if self._cursor.kind() == "letters":
            self._cursor.split_token(1)
        if self._cursor.kind() not in ("number", "letters", "command"):
            raise Unreadable
        return self._cursor.next()

    def _text(self) -> Value:
        """Reads \\mathrm{e}, \\text{2/3} or \\operatorname{arcsin} as if the command were not there."""
        inner = tokenize(self._cursor.tokens[self._cursor.at].text)
        is_function = len(inner) == 1 and inner[0].text.casefold() in FUNCTIONS
        if not is_function and (len(inner) > 4 or any(t.kind == "letters" and len(t.text) > 1 for t in inner)):
            raise Unreadable
        self._cursor.tokens[self._cursor.at : self._cursor.at + 1] = inner
        return self._primary()

    def _command(self) -> Value:
        name = self._cursor.next()
        if name == "frac":
            derivative = derivatives.fraction(self._cursor)
            return Value.symbol(derivative) if derivative else self._argument() / self._argument()
        if name in _NAMES:
            return self._named(name)
        if name == "binom":
            n, k = (_integer(self._argument(), 0) for _ in range(2))
            return Value.number(math.comb(n, k))
        if name in ("lfloor", "lceil"):
            value = self._sum().constant()
            if value is None or not self._cursor.take("r" + name[1:]):
                raise Unreadable
            return Value.number(math.floor(value) if name == "lfloor" else math.ceil(value))
        if name in ("triangle", "angle") and self._cursor.kind() == "letters":
            return Value.symbol(f"{name} {self._cursor.next()}")
        if name in _ACCENTS:
            return self._accented(name)
        raise Unreadable

    def _accented(self, accent: str) -> Value:
        """Reads the argument of an accent: a Greek letter, or letters in braces. \\vec v is \\vec{v}."""
        is_braced = self._cursor.peek() == "{"
        if self._cursor.kind(is_braced) == "letters" and not is_braced:
            self._cursor.split_token(1)
        letters = self._cursor.peek(is_braced)
        is_letter = self._cursor.kind(is_braced) == "letters" or letters in GREEK
        if not is_letter or not self._cursor.take(*(("{", letters, "}") if is_braced else (letters,))):
            raise Unreadable
        if accent in ("hat", "vec") and letters in ("i", "j", "k"):  # unit vectors, also written \mathbf{i}
            return exact.I if letters == "i" else Value.symbol(letters)
        return self._symbol(derivatives.dotted(accent, letters))

    def _argument(self) -> Value:
        """Reads a macro's argument: a group, one letter or command, or a number.

        \\sqrt10 means the root of 10, although TeX reads it as the root of 1 before a 0.
        """
        if self._cursor.peek() == "{":
            return self._group("}")
        if number := numerals.bare_number(self._cursor):
            return number
        if self._cursor.kind() == "letters":
            self._cursor.split_token(1)
            letter = self._cursor.next()
            return {"i": exact.I, "e": exact.E}.get(letter) or Value.symbol(letter)
        if self._cursor.kind() == "command":
            return self._primary()
        raise Unreadable

    def _root(self) -> Value:
        degree = 2
        if self._cursor.peek() == "[":
            degree = _integer(self._group("]"), 2)
            if degree > 100:
                raise Unreadable
        if self._cursor.peek() == "(":
            return roots.root(self._group(")"), degree)
        return roots.root(self._argument(), degree)

    def _function(self, name: str) -> Value:
        name = _LONG_NAMES.get(name, name)
        if name == "sqrt":
            return self._root()
        if name in ("gcd", "lcm"):
            return functions.divisor(name, self._arguments())
        exponent = base = None
        while self._cursor.peek() in ("^", "_"):
            if self._cursor.next() == "^":
                exponent = self._exponent()
            else:
                base = self._argument()
        outer, self._in_angle = self._in_angle, name in ("sin", "cos", "tan", "cot", "sec", "csc", "cis")
        argument = self._angle()
        self._in_angle = outer
        if exponent is not None and exponent.constant() == -1 and name in _INVERSES:
            argument = Value.number(1) / argument if name in ("sec", "csc") else argument
            name, exponent = _INVERSES[name], None
        if base is not None and name != "log":
            raise Unreadable
        value = functions.function("ln" if base is not None else name, argument)
        value = value if base is None else value / functions.logarithm(base)
        return value if exponent is None else functions.power(value, exponent)

    def _arguments(self) -> list[Value]:
        """Reads what stands in parentheses, cut at commas."""
        values = []
        while self._cursor.take("," if values else "("):
            values.append(self._sum())
        if not self._cursor.take(")"):
            raise Unreadable
        return values

    def _angle(self) -> Value:
        """Reads a function's argument: one in brackets, else the product up to the next function, sign or bracket."""
        if self._cursor.peek() in ("(", "{", "[", "|"):
            value = self._primary()
            is_degrees = self._in_angle and (self._cursor.take("^", "circ") or self._cursor.take("^", "{", "circ", "}"))
            return value * exact.PI / Value.number(180) if is_degrees else value
        value = self._signed()
        while self._starts_factor() and self._cursor.peek() not in ("(", "[") and self._cursor.kind() != "text":
            if self._cursor.peek().casefold() in FUNCTIONS:
                break
            value = value * self._factor()
        return value
