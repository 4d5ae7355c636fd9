"""The built-in tasks by name (data.task): their problems, and the examples of a warm start."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.data import arithmetic, lookups
from igrpo_jax.errors import InputError
from igrpo_jax.records import VERDICTS

Problem = arithmetic.Problem | lookups.Problem


def is_right(problem: Problem, solution: str) -> bool:
    """Returns whether a written solution states the answer of its problem."""
    return f"<answer>{problem.answer}</answer>" in solution


def _half_right(
    config: Config, problem: Problem, solution: Callable[[float], str], rng: np.random.Generator
) -> tuple[str, bool]:
    """Returns a draft, which is right with probability one half, and whether it is.

    Args:
        solution: returns a solution written with the error rate that it is given.
    """
    error_rate = 0.0 if rng.random() < 0.5 else config.warm_start.draft_error_rate
    draft = solution(error_rate)
    for _ in range(1000):  # where the teacher is nearly always right, some drafts stay right
        if not error_rate or not is_right(problem, draft):
            break
        draft = solution(error_rate)
    return draft, is_right(problem, draft)


def _verdict(known: bool) -> str:
    return f"<answer>{VERDICTS[known]}</answer>"


class Task(NamedTuple):
    """A built-in task."""

    problems: Callable[[Config], tuple[Sequence[Problem], Sequence[Problem]]]  # to train and to test on
    # Returns (the draft in the prompt, the completion) of an example; the draft is None if none is wanted.
    example: Callable[[Config, Any, bool, np.random.Generator], tuple[str | None, str]]


def _arithmetic_example(
    config: Config, problem: arithmetic.Problem, has_draft: bool, rng: np.random.Generator
) -> tuple[str | None, str]:
    settings, top = config.warm_start, config.data.arithmetic.max_total
    if has_draft and settings.refinements == "verdicts":
        solution = lambda error_rate: arithmetic.solution(problem, error_rate, top, rng)
        draft, known = _half_right(config, problem, solution, rng)
        return draft, _verdict(known)
    draft = arithmetic.solution(problem, settings.draft_error_rate, top, rng) if has_draft else None
    return draft, arithmetic.solution(problem, settings.error_rate, top, rng)


def _lookups_example(
    config: Config, problem: lookups.Problem, has_draft: bool, rng: np.random.Generator
) -> tuple[str | None, str]:
    settings = config.warm_start
    solution = lambda error_rate: lookups.solution(problem, error_rate, rng)
    if not has_draft:
        return None, solution(settings.error_rate)
    if settings.refinements in ("verdicts", "critiqued"):
        draft, known = _half_right(config, problem, solution, rng)
        if settings.refinements == "verdicts":
            return draft, _verdict(known)
        return draft, draft if known else lookups.checked(problem, settings.error_rate, draft, rng)
    draft = solution(settings.draft_error_rate)
    if settings.refinements == "checked":
        return draft, lookups.checked(problem, settings.error_rate, draft, rng)
    return draft, solution(settings.error_rate)


TASKS = {
    "arithmetic": Task(lambda config: arithmetic.problems(config.data.arithmetic, config.seed), _arithmetic_example),
    "lookups": Task(lambda config: lookups.problems(config.data.lookups, config.seed), _lookups_example),
}


def check_held_out(config: Config, run: Config, model: str, questions: Mapping[str, Sequence[str]]) -> None:
    """Refuses settings of a built-in task with which an evaluation of a run asks problems that it was trained on.

    Test and training problems are the first and the next ones of one stream (`drawing`). So more test problems than the
    run has reach into its training problems, and another stream may hold any of them; fewer test problems cannot.

    Args:
        config: the settings of the evaluation.
        run: those of the run in the folder `model`.
        questions: what is asked, by benchmark.

    Raises:
        InputError: any of the questions is in the run's training set.
    """
    task = run.data.task
    if run.data.train or task not in questions:
        return
    given, own = _stream(config, task), _stream(run, task)
    changed = [name for name in given if given[name] != own[name]]
    if not changed:
        return
    trained = {problem.question for problem in TASKS[task].problems(run)[0]}
    if seen := sum(question in trained for question in questions[task]):
        raise InputError(
            f"{', '.join(f'config.{name} = {given[name]}' for name in changed)}: with this, the run {model} was "
            f"trained on {seen:,} of the {len(questions[task]):,} problems of {task!r}; leave it out to use "
            f"the run's own {', '.join(f'{name} = {own[name]}' for name in changed)}"
        )


def _stream(config: Config, task: str) -> dict[str, int]:
    """Returns the settings that decide which test problems a built-in task has, by their dotted names."""
    fields = vars(getattr(config.data, task)).items()
    return {"seed": config.seed} | {f"data.{task}.{name}": value for name, value in fields if name != "train_problems"}
