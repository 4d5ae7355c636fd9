r"""What ± and ∓ stand for: 1 \pm \sqrt2 is 1 + \sqrt2 and 1 - \sqrt2."""

import itertools

from igrpo_jax.rewards.mathematics.tokens import Token


def readings(tokens: list[Token]) -> list[list[Token]]:
    """Returns the readings of ± outside of sets. Each ± has its own sign; with a ∓, all ± agree and ∓ is opposite."""
    if not any(token.text in ("pm", "mp") for token in tokens):
        return [tokens]
    depths = itertools.accumulate(token.is_in(("\\{",)) - token.is_in(("\\}",)) for token in tokens)
    signs_at = [not depth and token.kind == "command" for token, depth in zip(tokens, depths, strict=True)]
    positions = [at for at, token in enumerate(tokens) if signs_at[at] and token.text in ("pm", "mp")]
    if not positions or len(positions) > 3:
        return [tokens]
    tied = any(tokens[at].text == "mp" for at in positions)
    found = []
    for minuses in itertools.product((False, True), repeat=1 if tied else len(positions)):
        reading = list(tokens)
        for at, minus in zip(positions, itertools.cycle(minuses), strict=False):
            reading[at] = tokens[at]._replace(kind="mark", text="+-"[minus ^ (tokens[at].text == "mp")])
        found.append(reading)
    return found
