"""The built-in tasks by name (data.task): their problems, and the examples of a supervised start."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.data import arithmetic, lookups
from igrpo_jax.records import VERDICTS

Problem = arithmetic.Problem | lookups.Problem


def is_right(problem: Problem, solution: str) -> bool:
    """Returns whether a written solution states the answer of its problem."""
    return f"<answer>{problem.answer}</answer>" in solution


def _verified_error_rate(config: Config, rng: np.random.Generator) -> float:
    """Returns the error rate of a draft to verify: 0 for one half of them, which are then right however long they
    are."""
    return 0.0 if rng.random() < 0.5 else config.warm_start.draft_error_rate


def _verdict(problem: Problem, draft: str) -> str:
    return f"<answer>{VERDICTS[is_right(problem, draft)]}</answer>"


class Task(NamedTuple):
    """A built-in task."""

    problems: Callable[[Config], tuple[Sequence[Problem], Sequence[Problem]]]  # to train and to test on
    # Gives (the draft in the prompt, the completion) of an example, where a draft is wanted; else (None, completion).
    example: Callable[[Config, Any, bool, np.random.Generator], tuple[str | None, str]]


def _arithmetic_example(
    config: Config, problem: arithmetic.Problem, has_draft: bool, rng: np.random.Generator
) -> tuple[str | None, str]:
    settings, top = config.warm_start, config.data.arithmetic.max_total
    if has_draft and settings.refinements == "verdicts":
        draft = arithmetic.solution(problem, _verified_error_rate(config, rng), top, rng)
        return draft, _verdict(problem, draft)
    draft = arithmetic.solution(problem, settings.draft_error_rate, top, rng) if has_draft else None
    return draft, arithmetic.solution(problem, settings.error_rate, top, rng)


def _lookups_example(
    config: Config, problem: lookups.Problem, has_draft: bool, rng: np.random.Generator
) -> tuple[str | None, str]:
    settings = config.warm_start
    if has_draft and settings.refinements == "checked":
        return lookups.checked(problem, settings.error_rate, settings.draft_error_rate, rng)
    if has_draft and settings.refinements == "verdicts":
        draft = lookups.solution(problem, _verified_error_rate(config, rng), rng)
        return draft, _verdict(problem, draft)
    draft = lookups.solution(problem, settings.draft_error_rate, rng) if has_draft else None
    return draft, lookups.solution(problem, settings.error_rate, rng)


TASKS = {
    "arithmetic": Task(lambda config: arithmetic.problems(config.data.arithmetic, config.seed), _arithmetic_example),
    "lookups": Task(lambda config: lookups.problems(config.data.lookups, config.seed), _lookups_example),
}
