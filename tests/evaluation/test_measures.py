"""Measures against enumeration and against cases worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from igrpo_jax.evaluation import measures


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_sets_that_hold_a_right_one(right, k):
    correct = np.array([[i < right for i in range(6)]])
    sets = list(itertools.combinations(correct[0], k))
    # A plug-in estimate 1 - (1 - c/n)^k would be too high wherever 0 < c < n and k > 1.
    assert measures.pass_at(correct, k)[0] == pytest.approx(sum(map(any, sets)) / len(sets), abs=1e-15)


def test_pass_at_one_is_the_mean_and_k_is_checked():
    correct = np.random.default_rng(0).random((5, 9)) < 0.3
    np.testing.assert_allclose(measures.pass_at(correct, 1), correct.mean(axis=1))
    for k in (0, 10):
        with pytest.raises(ValueError, match="must be within 1 and the 9 samples"):
            measures.pass_at(correct, k)


@pytest.mark.parametrize(
    ("classes", "index"),
    [
        ([0, 1, 1, 0, 1], 1),
        ([0, 1, 1, 0], 0),  # two each: the class that came first
        ([1, 0, 0, 1], 0),  # not the one of the lowest number
        ([-1, -1, -1, 4], 3),  # no answer is no vote, even where most have none
        ([-1, -1], None),
        ([], None),
    ],
)
def test_the_vote(classes, index):
    assert measures.vote(classes) == index


def test_majority_over_disjoint_runs():
    classes = np.array([[0, 1, 1, 1, 0, 0, 1], [0, 1, 2, -1, -1, -1, 0]])
    correct = np.array([[1, 0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1]], bool)
    # k = 3: runs 0 1 1 (wrong) and 1 0 0 (right), the seventh left over; 0 1 2 (the first, right) and no votes (wrong).
    np.testing.assert_array_equal(measures.majority_at(classes, correct, 3), [0.5, 0.5])
    np.testing.assert_array_equal(measures.majority_at(classes, correct, 7), [0, 1])  # 4 against 3; 2 against 1, 1
    np.testing.assert_array_equal(measures.majority_at(classes, correct, 1), correct.mean(axis=1))


def test_the_interval_of_coin_flips_is_the_binomial_one():
    """Means of redrawn 0s and 1s are Binomial(20, 1/2) / 20, whose 2.5 % and 97.5 % points are 6 and 14 of 20:
    P(X <= 5) = 0.0207 and P(X <= 6) = 0.0577. A normal interval would be 0.281 to 0.719, one over samples narrower.
    """
    cdf = np.cumsum([math.comb(20, i) / 2**20 for i in range(21)])
    assert cdf[5] < 0.025 < cdf[6] and cdf[13] < 0.975 < cdf[14]
    assert measures.interval(np.array([0.0, 1.0] * 10)) == (0.3, 0.7)


def test_intervals_of_two_problems_and_of_equal_ones():
    # Means 0, 1/2, 1 come with 1/4, 1/2, 1/4.
    assert measures.interval(np.array([0.0, 1.0])) == (0.0, 1.0)
    # Three problems, one solved: 0 with 8/27, 1/3 with 12/27, 2/3 with 6/27, 1 with 1/27 = 0.037.
    assert measures.interval(np.array([1.0, 0.0, 0.0])) == (0.0, 1.0)


def test_a_paired_difference_knows_that_the_problems_are_the_same():
    hard = np.repeat([0.0, 1.0], 50)  # problems that differ much
    better = np.clip(hard + 0.1, 0, 1.1)
    change, low, high = measures.difference(hard, better)
    # All 100 problems gain 0.1; 1 - 0.025^(1/100) = 0.0362 of all problems may be others, with changes of -1 to 1.
    assert (
        change == pytest.approx(0.1)
        and low == pytest.approx(0.0601, abs=1e-4)
        and high == pytest.approx(0.1326, abs=1e-4)
    )
    change, low, high = measures.difference(np.array([1.0, 0.0]), np.array([0.0, 0.0]))
    assert (change, low, high) == (-0.5, -1.0, 0.0)


@pytest.mark.parametrize("count", [1, 6, 30])
def test_equal_problems_have_the_exact_interval(count):
    """At 0 and at all right it is that of Clopper and Pearson; the bootstrap is a point there."""
    for right in (0, count):
        interval = stats.binomtest(right, count).proportion_ci(0.95, "exact")
        assert measures.interval(np.full(count, right / count)) == pytest.approx((interval.low, interval.high))
    if count == 6:  # 1 - 0.025^(1/6)
        assert measures.interval(np.zeros(6)) == (0, pytest.approx(0.45926, abs=1e-5))
        # A quarter solved of each: all other problems may be unsolved, or solved.
        assert measures.interval(np.full(6, 0.25)) == pytest.approx((0.25 * 0.54074, 0.25 + 0.75 * 0.45926), abs=1e-5)


def test_the_sign_test_is_the_binomial_one():
    """8 better and none worse: 2 / 2^8; 4 and none: 2 / 16, though a bootstrap of 40 problems leaves no change out."""
    assert measures.sign_test(8, 0) == 2 / 256 and measures.sign_test(0, 4) == 2 / 16
    assert measures.sign_test(1, 3) == 2 * (1 + 4) / 16 and measures.sign_test(2, 2) == measures.sign_test(0, 0) == 1
    four = np.repeat([1.0, 0.0], [4, 36])
    assert measures.difference(np.zeros(40), four)[1] > 0


def test_the_four_fates_of_a_refinement():
    drafts = np.array([True, False])
    correct = np.array([[1, 1, 0], [0, 1, 0]], bool)
    shares = measures.refined(drafts, correct)
    assert shares == {"fixed": 1 / 6, "broken": 1 / 6, "kept_right": 2 / 6, "kept_wrong": 2 / 6}


def test_the_summary():
    answers = measures.Answers(
        correct=np.array([[1, 0], [0, 0]], bool),
        lengths=np.array([[10, 20], [30, 60]]),
        finished=np.array([[1, 1], [1, 0]], bool),
        parsed=np.array([[1, 1], [0, 0]], bool),
        failed=np.array([[0, 0], [0, 1]], bool),
        classes=np.array([[0, 1], [-1, -1]]),
    )
    assert measures.summary(answers, (1, 2)) == {
        "pass@1": 0.25,
        "pass@1_low": 0.0,
        "pass@1_high": 0.5,
        "pass@2": 0.5,
        "maj@2": 0.5,
        "mean_length": 30.0,
        "solved_length": 10.0,
        "unsolved_length": 110 / 3,
        "clipped_ratio": 0.25,
        "unparseable_frac": 0.5,
        "error_frac": 0.25,
    }
    none = measures.summary(measures.Answers(**{**vars(answers), "correct": np.zeros((2, 2), bool)}))
    assert "solved_length" not in none and none["unsolved_length"] == 30.0
