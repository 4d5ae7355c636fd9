"""Rewards for the form of a completion: its layout and its length. They do not depend on whether it is right.

The format reward asks whether the text is one `<think>` block followed by one `<answer>` block and nothing else.

It reads opening + completion, because the templates of R1 distills open `<think>` in the prompt. The caller
has already removed special tokens. Tags are matched literally (lower case, no attributes). An empty block counts, so
that this reward and the accuracy stay independent.
"""

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(text: str) -> float:
    """Returns 1.0 if `text` is exactly `<think>…</think>` `<answer>…</answer>` with only whitespace
    around, else 0.0.

    Each tag must occur once: with a second block, or a tag quoted inside a block, it is unclear which is the answer.
    Takes linear time in the length of `text`: it searches for fixed strings and uses no regular expression.
    """
    before, _, rest = text.partition("<think>")
    thought, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")  # `closed` is empty if any tag is missing
    if not closed or (before + between + after).strip():
        return 0.0
    return 0.0 if any(tag in thought or tag in answer for tag in TAGS) else 1.0


def opens_thinking(opening: str) -> bool:
    """Returns whether a reply that begins like this is inside its `<think>` block."""
    return opening.count("<think>") > opening.count("</think>")


def overlong_penalty(length: int, max_completion: int, cache: int) -> float:
    """Returns the soft over-long penalty of DAPO (arXiv 2503.14476, Eq. 13).

    It is 0 up to `max_completion - cache` and then falls linearly to -1 at `max_completion`.

    Args:
        length: tokens of the completion, including EOS.
        max_completion: L_max, the most tokens that a completion may have.
        cache: L_cache, the last tokens over which the penalty grows; at least 1.
    """
    return -min(max(length - (max_completion - cache), 0) / cache, 1.0)
