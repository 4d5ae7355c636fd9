"""The second built-in task: a list of look-ups in a table that only the weights can hold, right only if all are right.

A problem is a list of letters, "jzc". The answer has one digit for each, TABLE's entry: "<answer>637</answer>". Every
digit of an answer is as far from its letter as any other, which a small model can learn. The first digit of an answer
is not 0, so that two answers are equal as numbers only where all digits are. Everything is generated from a seed,
without a download. Train and test problems are disjoint.

The task was made to study when drafts pay. Each look-up is easy, but all n together are hard: with an error rate e, a
solution is right with probability (1 - e)^n, which n makes as small as wanted. A draft holds one guess for each letter,
and looking up again can find its mistakes: with the same skill, repairing is easier than solving.

1. A teacher is wrong at each look-up with a given probability, and then writes one of the nine wrong digits. For a
   model that imitates it the right digit stays the most likely one, which reinforcement learning can sharpen.
2. `checked` is a teacher that works with a draft: it looks up again where its own first look-up differs from the
   draft. A digit is then right with probability (1-d)(1-e) + (1 - (1-d)(1-e) - d e / 9) (1-e), where d and e are the
   error rates of draft and teacher: the two agree on the right digit, or on a wrong one with d e / 9, or differ.

Texts consist of ASCII characters and the tags of an answer, each a token of the built-in model's tokenizer
(`arithmetic.tokenizer`); so the task needs none of its own.
"""

import string
from dataclasses import dataclass

import numpy as np

from igrpo_jax.config import LookupsConfig
from igrpo_jax.data import drawing

# [52] int, the digit of each letter. The digits follow no obvious rule, and each occurs five or six times, because
# k -> k^3 modulo 53 is a permutation.
TABLE = np.array([pow(key + 1, 3, 53) % 10 for key in range(len(string.ascii_letters))])


@dataclass(frozen=True)
class Problem:
    """A list of letters."""

    question: str

    @property
    def digits(self) -> np.ndarray:
        """The digit of each letter, [n] int."""
        return np.array([TABLE[string.ascii_letters.index(letter)] for letter in self.question])

    @property
    def answer(self) -> str:
        return "".join(map(str, self.digits))


def problems(settings: LookupsConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Returns train and test problems, all different.

    Raises:
        InputError: there are too few different problems of this length.
    """
    rng = np.random.default_rng([seed, 0x100C])

    def draw() -> Problem:
        keys = rng.integers(0, len(TABLE), settings.items)
        keys[0] = rng.choice(np.flatnonzero(TABLE))
        return Problem("".join(string.ascii_letters[key] for key in keys))

    return drawing.train_and_test(draw, settings, "lookups", "items")


def solution(problem: Problem, error_rate: float, rng: np.random.Generator) -> str:
    """Returns a written solution, each digit of which is wrong with probability `error_rate`."""
    return _written(_looked_up(problem.digits, error_rate, rng))


def checked(problem: Problem, error_rate: float, draft: str, rng: np.random.Generator) -> str:
    """Returns the written solution of a teacher that looks up again where it disagrees with `draft`, a solution."""
    shown = np.array([int(digit) for digit in draft if digit.isdigit()])
    own, again = (_looked_up(problem.digits, error_rate, rng) for _ in range(2))
    return _written(np.where(own == shown, own, again))


def _looked_up(digits: np.ndarray, error_rate: float, rng: np.random.Generator) -> np.ndarray:
    """Returns `digits` [n], each replaced by one of the nine others with probability `error_rate`."""
    is_wrong = rng.random(len(digits)) < error_rate
    return np.where(is_wrong, (digits + rng.integers(1, 10, len(digits))) % 10, digits)


def _written(digits: np.ndarray) -> str:
    return f"<answer>{''.join(map(str, digits))}</answer>"
