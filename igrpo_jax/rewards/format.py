"""The format reward: is the text one `<think>` block followed by one `<answer>` block, and nothing else?

It reads generation prefix + completion, because templates of R1 distills open `<think>` in the prompt. Special tokens
are already removed by the caller. It says nothing of what stands in the blocks: that is the accuracy reward's work.
Tags are matched literally (lower case, no attributes); an empty block counts, so that the two rewards stay independent.
"""

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


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
    return 0.0 if any(tag in thought or tag in answer for tag in _TAGS) else 1.0
