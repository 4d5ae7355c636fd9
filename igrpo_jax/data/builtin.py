"""The built-in tasks by name (data.task): their problems, and the examples of a supervised start."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.data import arithmetic, lookups

Problem = arithmetic.Problem | lookups.Problem


class Task(NamedTuple):
    """A built-in task."""

    problems: Callable[[Config], tuple[Sequence[Problem], Sequence[Problem]]]  # to train and to test on
    # Gives (the draft in the prompt, the completion) of an example, where a draft is wanted; else (None, completion).
    example: Callable[[Config, Any, bool, np.random.Generator], tuple[str | None, str]]


def _arithmetic_example(
    config: Config, problem: arithmetic.Problem, has_draft: bool, rng: np.random.Generator
) -> tuple[str | None, str]:
    settings, top = config.warm_start, config.data.arithmetic.max_total
    draft = arithmetic.solution(problem, settings.draft_error_rate, top, rng) if has_draft else None
    return draft, arithmetic.solution(problem, settings.error_rate, top, rng)


def _lookups_example(
    config: Config, problem: lookups.Problem, has_draft: bool, rng: np.random.Generator
) -> tuple[str | None, str]:
    settings = config.warm_start
    if has_draft and settings.refinements == "checked":
        return lookups.checked(problem, settings.error_rate, settings.draft_error_rate, rng)
    draft = lookups.solution(problem, settings.draft_error_rate, rng) if has_draft else None
    return draft, lookups.solution(problem, settings.error_rate, rng)


TASKS = {
    "arithmetic": Task(lambda config: arithmetic.problems(config.data.arithmetic, config.seed), _arithmetic_example),
    "lookups": Task(lambda config: lookups.problems(config.data.lookups, config.seed), _lookups_example),
}
