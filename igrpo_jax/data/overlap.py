"""Which training problems should not be trained on: repetitions, and those that evaluation asks for too.

A training problem overlaps an evaluation problem where it holds at least half of that one's runs of 13 words: runs of
letters and digits, without case. Shorter texts are compared whole, and with their signs: 7 + 5 is not 7 - 5, and so are
repetitions.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

RUN = 13  # words


def repeated(questions: Sequence[str]) -> set[int]:
    """Places of the questions that are an earlier one, but for case, spaces and punctuation."""
    seen: set[tuple[str, ...]] = set()
    places = set()
    for place, text in enumerate(questions):
        signs = _signs(text)
        if signs in seen:
            places.add(place)
        seen.add(signs)
    return places


def overlapping(questions: Sequence[str], held_out: Iterable[str]) -> dict[int, int]:
    """Place among `questions` -> place among `held_out` of the problem it overlaps most, for those that do."""
    sizes, holders = [], {}
    for place, text in enumerate(held_out):
        runs = _runs(text)
        sizes.append(len(runs))
        for run in runs:
            holders.setdefault(run, []).append(place)
    found = {}
    for place, text in enumerate(questions):
        shared = Counter(other for run in _runs(text) for other in holders.get(run, ()))
        near = [(count / sizes[other], -other) for other, count in shared.items() if 2 * count >= sizes[other]]
        if near:
            found[place] = -max(near)[1]
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


def _signs(text: str) -> tuple[str, ...]:
    """Words and the single signs of mathematics between them, without case."""
    return tuple(re.findall(r"[^\W_]+|[^\w\s.,;:?!'\"]|_", text.casefold()))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _words(text)
    if len(words) < RUN:
        return {_signs(text)} - {()}
    return {words[i : i + RUN] for i in range(len(words) - RUN + 1)}
