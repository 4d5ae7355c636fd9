"""The order in which a run reads its problems, a pure function of the seed.

Epoch e is the permutation of (seed, e), and rollout s reads the problems s*P .. s*P + P-1 of the concatenated epochs,
where P is the number of prompts per step. So only the step determines the position in the data, and a resumed run
continues without replaying anything. Redraws (algorithm.max_redraws) do not move the position: each step has a separate
order for them, and the problems that they use still have their turn.
"""

from fractions import Fraction

import numpy as np


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the permutation of 0..count-1 in which `epoch` reads the rows, [count] int64.

    Sorts raw draws of a bit generator: numpy promises that their stream never changes, which it does not for
    `permutation`.
    """
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(draws, kind="stable")


def step_indices(step: int, per_step: int, count: int, seed: int) -> list[int]:
    """Returns the `per_step` rows of rollout `step` (from 0). A rollout may take rows from two epochs."""
    epochs, offsets = np.divmod(np.arange(step * per_step, (step + 1) * per_step), count)
    orders = {epoch: epoch_order(count, seed, epoch) for epoch in set(epochs.tolist())}
    return [int(orders[epoch][offset]) for epoch, offset in zip(epochs.tolist(), offsets.tolist(), strict=True)]


def steps_of_epochs(epochs: float, per_step: int, count: int) -> int:
    """Returns how many whole rollouts `epochs` passes over `count` rows have, at least 1.

    What counts is the simple fraction next to `epochs`: 0.29 passes over 100 rows are 29 rows, and 28.999... in floats.
    """
    return max(1, int(Fraction(epochs).limit_denominator(10**6) * count / per_step))


def redraw_indices(step: int, redraw: int, per_step: int, count: int, seed: int) -> list[int]:
    """Returns the row that redraw number `redraw` (from 1) of rollout `step` uses at each of its `per_step` positions.

    While there are enough rows, no redraw repeats a row of another redraw or of the rollout itself; in a small data set
    rows repeat. The row of a position does not depend on which other positions need a redraw.
    """
    draws = np.random.Philox(np.random.SeedSequence([seed, step, 0x5EDA])).random_raw(count)
    order = np.argsort(draws, kind="stable")
    others = order[~np.isin(order, step_indices(step, per_step, count, seed))]
    order = others if len(others) else order
    return [int(order[i % len(order)]) for i in range((redraw - 1) * per_step, redraw * per_step)]
