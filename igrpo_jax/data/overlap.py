"""Finds training problems that should be left out: repetitions, and problems that evaluation uses too.

A training problem overlaps an evaluation problem if it contains at least half of the latter's runs of 13 words. A word
is a run of letters and digits; case does not count. Shorter texts must match completely, including their signs: 7 + 5
is not 7 - 5. Repetitions are found in the same way as shorter texts, and have the same answer too: signs such as
"!" do not count, and "What is 5!?" is not "What is 5?".
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from igrpo_jax.rewards.mathematics import grader

RUN = 13  # words


def repeated(questions: Sequence[str], answers: Sequence[str]) -> tuple[list[int], list[int]]:
    """Returns the positions of questions that repeat an earlier one, apart from case, spaces and punctuation.

    Args:
        answers: the reference answer to each question.

    Returns:
        Those whose answer equals that to an earlier such question, and those that have another answer than all of them.
    """
    seen: dict[tuple[str, ...], list[str]] = {}  # the different answers to each question
    repeats, others = [], []
    for position, (text, answer) in enumerate(zip(questions, answers, strict=True)):
        before = seen.setdefault(_signs(text), [])
        if answer in before or any(grader.equivalent(answer, other) for other in before):
            repeats.append(position)
            continue
        if before:
            others.append(position)
        before.append(answer)
    return repeats, others


def overlapping(questions: Sequence[str], held_out: Iterable[str]) -> dict[int, int]:
    """Returns, for each question that overlaps a held-out problem, the position of the one that it overlaps most.

    The keys are positions in `questions`, the values positions in `held_out`.
    """
    sizes, holders = [], {}
    for position, text in enumerate(held_out):
        runs = _runs(text)
        sizes.append(len(runs))
        for run in runs:
            holders.setdefault(run, []).append(position)
    overlaps = {}
    for position, text in enumerate(questions):
        shared = Counter(other for run in _runs(text) for other in holders.get(run, ()))
        near = [(count / sizes[other], -other) for other, count in shared.items() if 2 * count >= sizes[other]]
        if near:
            overlaps[position] = -max(near)[1]
    return overlaps


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


def _signs(text: str) -> tuple[str, ...]:
    """Returns the words and the single signs of mathematics between them, without case."""
    return tuple(re.findall(r"[^\W_]+|[^\w\s.,;:?!'\"]|_", text.casefold()))


def _runs(text: str) -> set[tuple[str, ...]]:
    """Returns the runs of words of a text; for a short one, all its words and signs as one run."""
    words = _words(text)
    if len(words) < RUN:
        return {_signs(text)} - {()}
    return {words[i : i + RUN] for i in range(len(words) - RUN + 1)}
