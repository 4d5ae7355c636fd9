"""Draws the problems of a built-in task: all different, and disjoint for training and testing."""

from collections.abc import Callable, Hashable
from typing import TypeVar

from igrpo_jax.config import ArithmeticConfig, LookupsConfig
from igrpo_jax.errors import InputError

P = TypeVar("P", bound=Hashable)


def train_and_test(
    draw: Callable[[], P], settings: ArithmeticConfig | LookupsConfig, task: str, to_raise: str
) -> tuple[list[P], list[P]]:
    """Returns train and test problems. The test problems are drawn first, so they do not depend on the training set.

    Args:
        draw: returns a problem at random.
        task: the task's name, which is that of its settings in config.data.
        to_raise: the settings that give more different problems, for the message of an error.

    Raises:
        InputError: there are too few different problems.
    """
    wanted = settings.train_problems + settings.test_problems
    distinct: dict[P, None] = {}
    for _ in range(50 * wanted):
        if len(distinct) == wanted:
            break
        distinct.setdefault(draw())
    if len(distinct) < wanted:
        raise InputError(
            f"config.data.{task}.train_problems = {settings.train_problems}: found only {len(distinct)} different "
            f"problems for train and test; ask for fewer or raise {to_raise}"
        )
    test_first = list(distinct)
    return test_first[settings.test_problems :], test_first[: settings.test_problems]
