"""A graded reward of the study of look-ups, for choosing drafts by how many of their digits are right."""

import re


def right_digits(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """Returns the fraction of the answer's digits that each completion has in their places, 0 without an answer."""
    del kwargs  # the other columns
    stated = [re.search(r"<answer>(\d*)", completion) for completion in completions]
    digits = [match.group(1) if match else "" for match in stated]
    return [
        sum(first == second for first, second in zip(given, right, strict=False)) / len(right)
        for given, right in zip(digits, answer, strict=True)
    ]
