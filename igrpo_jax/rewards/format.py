"""Rewards of a completion's form: how it is laid out, and how long it is. They say nothing of whether it is right.

The format reward: is the text one `<think>` block followed by one `<answer>` block, and nothing else?

It reads generation prefix + completion, because templates of R1 distills open `<think>` in the prompt. Special tokens
are already removed by the caller. Tags are matched literally (lower case, no attributes); an empty block counts, so
that this reward and the accuracy stay independent.
"""

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(text: str) -> float:
    """1.0 if `text` is exactly `<think>…</think>` `<answer>…</answer>` with only whitespace around, else 0.0.

    Each tag must occur once: a second block, or a tag quoted inside a block, leaves it open which one is the answer.
    Linear in the length of `text`: finding of fixed strings, no regular expression.
    """
    before, _, rest = text.partition("<think>")
    thought, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")  # where any tag is missing, `closed` is empty
    if not closed or (before + between + after).strip():
        return 0.0
    return 0.0 if any(tag in thought or tag in answer for tag in TAGS) else 1.0


def overlong_penalty(length: int, limit: int, cache: int) -> float:
    """The soft over-long penalty of DAPO (2503.14476, Eq. 13): 0 up to `limit - cache`, then linearly to -1 at `limit`.

    Args:
        length: tokens of the completion, EOS included.
        limit: L_max, the most tokens a completion may have.
        cache: L_cache, the last tokens over which the penalty grows; at least 1.
    """
    return -min(max(length - (limit - cache), 0) / cache, 1.0)
