"""The order in which a run reads its problems."""

import numpy as np
import pytest

from igrpo_jax.data import order


def test_an_epoch_is_a_permutation_of_its_seed_and_number():
    orders = {(seed, epoch): order.epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(rows) == list(range(50)) for rows in orders.values())
    assert len({tuple(rows) for rows in orders.values()}) == 4
    assert orders[0, 1] == order.epoch_order(50, 0, 1).tolist()
    # The very numbers: a run that is resumed under another numpy must go on in the same order.
    assert order.epoch_order(8, 7, 2).tolist() == [0, 3, 5, 1, 4, 2, 6, 7]


def test_steps_are_slices_of_the_epochs_laid_end_to_end():
    epochs = np.concatenate([order.epoch_order(7, 3, epoch) for epoch in range(4)]).tolist()
    for step in range(9):  # 27 of 28 places, three per step: steps 2, 4 and 6 straddle two epochs
        assert order.step_indices(step, 3, 7, seed=3) == epochs[3 * step : 3 * step + 3]
    assert order.step_indices(0, 28, 7, seed=3) == epochs  # a step may even be longer than an epoch


@pytest.mark.parametrize(
    ("epochs", "per_step", "count", "steps"),
    [
        (0.29, 1, 100, 29),
        (1.15, 1, 100, 115),
        (1.0, 3, 7, 2),
        (3, 32, 7473, 700),
        (1e-5, 4, 100, 1),
        (0.5, 4, 15, 1),
        (1 / 3, 1, 300, 100),
    ],
)
def test_the_steps_of_epochs_are_those_of_simple_fractions(epochs, per_step, count, steps):
    assert order.steps_of_epochs(epochs, per_step, count) == steps


def test_every_row_is_read_once_before_any_is_read_twice():
    read = [index for step in range(5) for index in order.step_indices(step, 4, 10, seed=0)]
    assert sorted(read) == sorted(list(range(10)) * 2)
    assert sorted(read[:10]) == list(range(10))


def test_redraws_take_rows_that_the_step_has_not():
    """3 of 20 rows a step: five redraws read 15 different ones of the other 17, in an order of the step's own."""
    own = order.step_indices(4, 3, 20, seed=1)
    draws = [order.redraw_indices(4, redraw, 3, 20, seed=1) for redraw in range(1, 6)]
    read = [row for rows in draws for row in rows]
    assert len(set(read)) == 15 and not set(read) & set(own)
    assert order.redraw_indices(4, 3, 3, 20, seed=1) == draws[2]  # of what it is asked alone
    assert order.redraw_indices(5, 1, 3, 20, seed=1) != draws[0] != order.redraw_indices(4, 1, 3, 20, seed=2)


def test_redraws_of_a_small_data_set_begin_it_again():
    own = set(order.step_indices(0, 3, 5, seed=0))
    one, two = (order.redraw_indices(0, redraw, 3, 5, seed=0) for redraw in (1, 2))
    assert set(one) == set(two) == set(range(5)) - own and one != two
    assert set(order.redraw_indices(0, 1, 3, 3, seed=0)) == {0, 1, 2}  # there are no others
