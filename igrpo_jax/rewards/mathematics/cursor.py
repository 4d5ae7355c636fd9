"""A position in a list of tokens, from which a parser reads on."""

from igrpo_jax.rewards.mathematics.tokens import Token


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
        matches = all(self.peek(ahead) == text for ahead, text in enumerate(texts))
        self.at += len(texts) * matches
        return matches

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
