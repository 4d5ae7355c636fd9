"""The format reward: is the text one `<think>` block followed by one `<answer>` block, and nothing else?

It reads generation prefix + completion, because templates of R1 distills open `<think>` in the prompt. Special tokens
are already removed by the caller. It says nothing of what stands in the blocks: that is the accuracy reward's work.
Tags are matched literally (lower case, no attributes); an empty block counts, so that the two rewards stay independent.
"""

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(text: str) -> float:
    """1.0 if `text` is exactly `<think>…</think>` `<answer>…</answer>` with only whitespace around, else 0.0.

    Each tag must occur once: a second block, or a tag quoted inside a block, leaves it open which one is the answer.
    Linear in the length of `text`: counting and finding of fixed strings, no regular expression.
    """
    if any(text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    before, _, rest = text.partition("<think>")
    thought, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    # A tag out of order lands in an earlier part and leaves the later ones without it.
    in_order = closed and not any(tag in thought + answer for tag in _TAGS)
    return float(bool(in_order) and not (before + between + after).strip())
