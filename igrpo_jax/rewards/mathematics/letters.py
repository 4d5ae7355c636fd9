r"""Letters of multiple-choice answers: `(D) Alina`, `D: Alina`, `D. Alina`, `Option D`, `\textbf{(D)}\ 12`.

An answer that names a second letter, such as "D. Alina or C. Ben" or "Option D or C", is not a choice. Other graders
(math-verify, lighteval, simple-evals) take the first letter behind "answer" that a dot, a colon, a comma or a blank
follows. Here a comma or a blank is not enough, since "D, Ben" may be a list and "D 12" a product.
Not here: when two choices are equal (`comparison`).
"""

import re

from igrpo_jax.rewards.mathematics.tokens import Token
from igrpo_jax.rewards.mathematics.words import OPERATORS

_LETTER = "[A-J]"
# Words before a letter, in \text{…} or not: "Option D", "The correct choice is (D) Alina".
_NAMED = re.compile(
    r"(\\text\w*\s?\{)?\s*(?:[Tt]he\s+)?(?:(?:[Cc]orrect|[Rr]ight|[Bb]est|[Ff]inal)\s+)?"
    r"(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer)(?:\s+is)?\s*:?\s*(\})?\s*(?:\*\*)?"
    rf"(?=\(?{_LETTER}(?:\s*\}}?\s*$|\)|[.:]\s|\*\*))"
)
_BOLD = re.compile(rf"(\(?{_LETTER}[).:]*)\*\*(?=[).:\s])")  # Markdown, whose first two stars are gone
_LABEL = re.compile(rf"\(?({_LETTER})[).:]")
_TEXT_LABEL = re.compile(rf"\s*\(?({_LETTER})[).:]+\s*")
# Behind a label: words that take the letter back, or another letter.
_NO_CONTENT = re.compile(rf"[\s{{(,]*(?:(?:or|and|is|not|isn)\b|{_LETTER}(?:\s*[).:,;/]|\s*$))")
_IN_PARENTHESES = re.compile(r"(?<=\w)\([^()]*\)|\([^()]{2,}\)")  # f(A) and (x + A) name no choice
_OTHERS = (
    re.compile(rf"\b(?:or|and|nor|option|choice)\s+\(?({_LETTER})(?![\w'])", re.IGNORECASE),
    re.compile(rf"[,;./]\s*\(?({_LETTER})\)?\s*(?:[,;.]|$)"),
    re.compile(rf"(?<![\w\\])({_LETTER})\s?[).:](?:\s|$)"),
)


def unnamed(answer: str) -> str:
    """Returns "D" for "Option D" and "(D) Alina" for "The correct choice is (D) Alina"; other texts as they are."""
    match = _NAMED.match(answer)
    if match:
        is_open = match[1] and not match[2]
        answer = (match[1] if is_open else "") + answer[match.end() :]
    return _BOLD.sub(r"\1", answer, count=1) if _BOLD.match(answer) else answer


def split_label(tokens: list[Token]) -> tuple[str, list[Token]] | None:
    """Returns the letter of a choice and the tokens behind its label, which may be none; None for anything else."""
    is_text = tokens[0].kind == "text"
    length = 1 if is_text else 2 + (tokens[0].text == "(")
    label, rest = "".join(token.text for token in tokens[:length]), tokens[length:]
    match = (_TEXT_LABEL if is_text else _LABEL).fullmatch(label)
    if not match or (tokens[0].text == "(" and not rest):
        return None
    if rest and label.endswith(")") and rest[0].is_in((":", ".")):  # (D): Alina
        rest = rest[1:]
    if rest and label.endswith(":") and not _is_behind_colon(tokens, rest):
        return None
    if not rest:
        return match[1], rest
    is_apart = rest[0].spaced or is_text or (rest[0].kind in ("text", "letters") and tokens[1].text != ".")
    if not is_apart or rest[0].text in OPERATORS or _names_another(match[1], rest):
        return None
    return match[1], rest


def _is_behind_colon(tokens: list[Token], rest: list[Token]) -> bool:
    """Returns whether a colon ends a label: D: 12, and neither D:12 nor D : 12 nor the equation of two ratios."""
    return rest[0].spaced and not tokens[1].spaced and not any(token.is_in((":", "=")) for token in rest)


def _names_another(letter: str, rest: list[Token]) -> bool:
    """Returns whether what stands behind a label takes its letter back, or names another one."""
    if _NO_CONTENT.match(" ".join(token.text for token in rest[:3])):
        return True
    text = "".join(" " * token.spaced + token.text for token in rest)
    bare = _IN_PARENTHESES.sub(" ", text)
    joined, *labels = _OTHERS
    found = [*joined.finditer(text), *(match for pattern in labels for match in pattern.finditer(bare))]
    return any(match[1].upper() != letter for match in found)
