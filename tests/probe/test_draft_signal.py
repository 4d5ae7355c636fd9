"""The formulas of draft_signal: by hand, by enumeration, and against simulated groups.

Simulated groups go through the package's own `group_advantages`. A simulated mean must lie within five standard errors
of the formula, so a right formula fails once in two million comparisons; the seed is fixed.
"""

import itertools
import math

import numpy as np
import pytest
from builders import completion

from igrpo_jax.learning import objectives
from igrpo_jax.learning.selection import select_draft
from igrpo_jax.probe import draft_signal
from igrpo_jax.probe.draft_signal import igrpo_counts, kept_right, right_counts, signal, snr_ratio

SCALES = ("group", "batch", "none")
GROUPS = 40_000
SIGMA = 1.0  # noise of a simulated score; D is 1
CONTEXTS = [(0.05, 0.7, 0.2), (0.3, 0.9, 0.1), (0.5, 1.0, 0.3), (0.9, 0.6, 0.4)]  # p, r, w


def simulated_refinements(rng, p, r, w, drafts, refinements):
    """Rewards [GROUPS, G] of refinements of a best draft, the success [GROUPS, 1] of each, and the drafts' rewards."""
    drafted = rng.random((GROUPS, drafts)) < p
    success = np.where(drafted.max(axis=1, keepdims=True), r, w)
    return (rng.random((GROUPS, refinements)) < success).astype(np.float32), success, drafted.astype(np.float32)


def simulated_scores(rng, rewards, success):
    """One-dimensional scores: their mean is 0, their difference between right and wrong is D = 1."""
    return rewards - success + SIGMA * rng.normal(size=rewards.shape)


def simulated_snr_squared(rng, rewards, means):
    """SNR^2 of a group's gradient, in units of |D|^2 / sigma^2, by the means of its scores along the plain gradient."""
    advantages = objectives.group_advantages(rewards, "group").astype(float)
    gradients = np.mean(advantages * (means + SIGMA * rng.normal(size=rewards.shape)), axis=1)
    noise = gradients - np.mean(advantages * means, axis=1)
    return np.mean(gradients) ** 2 / np.mean(noise**2) * SIGMA**2


def near(samples, expected):
    """Whether the mean of independent samples is within five standard errors of what is expected."""
    error = np.std(samples, ddof=1) / math.sqrt(len(samples))
    return abs(np.mean(samples) - expected) <= 5 * error + 1e-3 * abs(
        expected
    )  # delta of the code is 1e-4 over the std


# By hand.


def test_a_group_of_two_at_one_half():
    """One of two is right in half of the groups. Then the std is 1/sqrt(2), so A is +-1/sqrt(2).

    (1/2) A_right is 1 / (2 sqrt 2), times one half: 0.177. Squared advantages are 1/2, times one half: 1/4.
    With the std over G instead of G - 1 they would be 1, times one half.
    """
    of_two = signal(right_counts(0.5, 2))
    assert of_two.active == pytest.approx(0.5)
    assert of_two.gradient == pytest.approx(0.5 / (2 * math.sqrt(2)))
    assert of_two.squared_advantage == pytest.approx(0.25)
    assert of_two.snr_squared == pytest.approx(2 * (1 / 32) / 0.25)


def test_a_group_of_four_at_one_half():
    """1, 2 or 3 of 4 are right with probabilities 4, 6, 4 of 16. Rewards have the variances 1/4, 1/3, 1/4 (ddof 1)."""
    mean_std = (4 * 0.5 + 6 / math.sqrt(3) + 4 * 0.5) / 16
    of_four = signal(right_counts(0.5, 4))
    assert of_four.active == pytest.approx(14 / 16)
    assert of_four.gradient == pytest.approx(3 / 4 * mean_std)
    assert of_four.squared_advantage == pytest.approx(3 / 4 * 14 / 16)
    assert signal(right_counts(0.5, 4), "none").gradient == pytest.approx(3 / 4 / 4)  # (G - 1) / G p (1 - p)
    assert signal(right_counts(0.5, 4), "batch").squared_advantage == pytest.approx(3 / 4)  # over p (1 - p)


def test_one_draft_and_a_group_of_one_teach_nothing():
    """N = G = 1: one refinement has none to be compared with, while GRPO has two completions."""
    for scale in SCALES:
        alone = signal(igrpo_counts(0.5, 0.9, 0.4, 1, 1), scale)
        assert alone.active == pytest.approx(0) and (alone.gradient, alone.snr_squared) == (0, 0)
        assert snr_ratio(0.5, 0.9, 0.4, 1, 1, scale) == 0


def test_two_drafts_and_two_refinements():
    """p = 1/2: a right draft is kept in 3 of 4 prompts. r = 1 is never active, w = 1/2 in half of the groups."""
    refined = signal(igrpo_counts(0.5, 1.0, 0.5, 2, 2))
    assert refined.active == pytest.approx(1 / 4 * 1 / 2)
    # A quarter of the active groups of one half: c and q are a quarter, so SNR^2 = c^2 / q is a quarter too.
    assert refined.snr_squared == pytest.approx(signal(right_counts(0.5, 2)).snr_squared / 4)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_where_every_completion_earns_the_same_there_is_no_signal(scale, p):
    of_grpo = signal(right_counts(p, 8), scale)
    assert (of_grpo.active, of_grpo.gradient, of_grpo.squared_advantage, of_grpo.snr_squared) == (0, 0, 0, 0)
    copied = signal(igrpo_counts(p, 1.0, 0.0, 4, 4), scale)
    assert (copied.active, copied.snr_squared) == (0, 0)


@pytest.mark.parametrize("scale", SCALES)
def test_drafts_that_are_ignored_leave_grpo_with_half_of_the_samples(scale):
    p = np.linspace(0.01, 0.99, 9)
    for size in (2, 4):
        ignored, half = signal(igrpo_counts(p, p, p, size, size), scale), signal(right_counts(p, size), scale)
        for name in half._fields:
            np.testing.assert_allclose(getattr(ignored, name), getattr(half, name), rtol=1e-12)
    ratio = snr_ratio(p, p, p, 4, 4, scale)
    if scale == "group":
        assert np.all((ratio > 0.428) & (ratio < 0.439))
    else:
        np.testing.assert_allclose(ratio, 3 / 7)


# Every number of right ones, through the package's own advantages.


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [2, 4, 7])
def test_the_advantages_are_those_of_the_package(size, scale, baseline):
    """Of each number of right ones 400 groups, so that the ddof of the std of a batch hardly matters."""
    rewards = np.tile(np.tri(size + 1, size, -1, np.float32), (400, 1))
    advantages = objectives.group_advantages(rewards, scale, baseline).astype(float)
    batch = signal(np.full(size + 1, 1 / (size + 1)), scale, baseline)
    assert batch.active == pytest.approx(np.mean(objectives.has_signal(rewards)))
    assert batch.gradient == pytest.approx(np.mean(advantages * rewards), rel=2e-3)
    assert batch.squared_advantage == pytest.approx(np.mean(advantages**2), rel=2e-3)


# Simulated groups.


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("sizes", [(4, 4), (1, 7)])
def test_simulated_groups_with_drafts(context, scale, sizes):
    rng = np.random.default_rng(0)
    rewards, success, _ = simulated_refinements(rng, *context, *sizes)
    advantages = objectives.group_advantages(rewards, scale).astype(float)
    expected = signal(igrpo_counts(*context, *sizes), scale)
    assert near(objectives.has_signal(rewards), expected.active)
    assert near(np.mean(advantages**2, axis=1), expected.squared_advantage)
    gradients = np.mean(advantages * simulated_scores(rng, rewards, success), axis=1)
    assert near(gradients, expected.gradient)
    # The noise at given rewards is what the scores vary around their means.
    means = np.mean(advantages * (rewards - success), axis=1)
    noise = np.square(gradients - means)
    assert near(noise, SIGMA**2 * expected.squared_advantage / sizes[1])
    assert np.mean(gradients) ** 2 / np.mean(noise) * SIGMA**2 == pytest.approx(expected.snr_squared, rel=0.1)


@pytest.mark.parametrize("cosine", [1.0, 0.7, 0.3])
def test_simulated_gradients_of_which_a_part_moves_the_plain_prompt(cosine):
    """Right and wrong scores on q' lie apart by 1 in a direction with this cosine to the plain one."""
    rng, (p, r, w), sizes = np.random.default_rng(5), CONTEXTS[0], (4, 4)
    rewards, success, _ = simulated_refinements(rng, p, r, w, *sizes)
    refined = simulated_snr_squared(rng, rewards, cosine * (rewards - success))
    drawn = (rng.random((GROUPS, sum(sizes))) < p).astype(np.float32)
    plain = simulated_snr_squared(rng, drawn, drawn - p)
    assert refined / plain == pytest.approx(float(snr_ratio(p, r, w, *sizes, transfer=cosine)), rel=0.1)


@pytest.mark.parametrize("context", CONTEXTS[:3])
def test_simulated_signal_per_sample_with_drafts_that_stop_early(context):
    """Drafts of a prompt are drawn up to the first right one; the samples that are left pay for further prompts."""
    rng, (p, r, w), drafts, size = np.random.default_rng(6), context, 4, 4
    tried = rng.random((GROUPS, drafts)) < p
    found = tried.any(axis=1)
    samples = np.where(found, tried.argmax(axis=1) + 1, drafts) + size
    success = np.where(found, r, w)[:, None]
    rewards = (rng.random((GROUPS, size)) < success).astype(np.float32)
    refined = simulated_snr_squared(rng, rewards, rewards - success) / samples.mean()
    drawn = (rng.random((GROUPS, drafts + size)) < p).astype(np.float32)
    plain = simulated_snr_squared(rng, drawn, drawn - p) / (drafts + size)
    saved = (drafts + size) / (float(draft_signal.expected_drafts(p, drafts)) + size)
    assert refined / plain == pytest.approx(float(snr_ratio(p, r, w, drafts, size)) * saved, rel=0.1)


@pytest.mark.parametrize("scale", SCALES)
def test_simulated_groups_of_drafts_that_are_trained_on_too(scale):
    """The update takes the mean over all completions, with a baseline of their own for drafts and for refinements."""
    rng, (p, r, w), drafts, refinements = np.random.default_rng(1), CONTEXTS[1], 3, 5
    rewards, success, drafted = simulated_refinements(rng, p, r, w, drafts, refinements)
    both = np.concatenate([rewards, drafted], axis=1)
    advantages = np.concatenate([objectives.group_advantages(part, scale) for part in (rewards, drafted)], axis=1)
    scores = simulated_scores(rng, both, np.concatenate([np.tile(success, refinements), np.full_like(drafted, p)], 1))
    groups = [igrpo_counts(p, r, w, drafts, refinements), right_counts(p, drafts)]
    expected = draft_signal.trained_together(*(signal(counts, scale) for counts in groups))
    assert expected.trained == 8
    assert near(np.mean(advantages.astype(float) ** 2, axis=1), expected.squared_advantage)
    assert near(np.mean(advantages * scores, axis=1), expected.gradient)


def test_simulated_problems_that_differ():
    """The distribution of right ones is averaged over the problems, and "batch" divides by the std of all rewards."""
    rng = np.random.default_rng(2)
    p = rng.beta(0.5, 1.5, GROUPS)
    rewards = (rng.random((GROUPS, 6)) < p[:, None]).astype(np.float32)
    for scale in SCALES:
        advantages = objectives.group_advantages(rewards, scale).astype(float)
        expected = signal(right_counts(p, 6).mean(axis=0), scale)
        assert near(np.mean(advantages**2, axis=1), expected.squared_advantage)
        assert near(np.mean(advantages * (rewards - p[:, None]), axis=1), expected.gradient)


# Drafts.


@pytest.mark.parametrize("selection", ["best", "worst", "first", "random"])
def test_the_kept_draft_is_that_of_the_package(selection):
    """Every outcome of three drafts with its probability; the random choice is averaged over many."""
    p, probability = 0.3, 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=3):
        drafts = [completion("draft", number, [1], accuracy=reward) for number, reward in enumerate(outcome)]
        picked = [
            outcome[select_draft(drafts, selection, np.random.default_rng(seed))]
            for seed in range(400 if selection == "random" else 1)
        ]
        probability += math.prod(p if reward else 1 - p for reward in outcome) * np.mean(picked)
    assert kept_right(p, 3, selection) == pytest.approx(probability, abs=0.02 if selection == "random" else 1e-12)


def test_the_number_of_drafts_until_the_first_right_one():
    """Each outcome of three drafts, which stop at the first success: p + 2 (1 - p) p + 3 (1 - p)^2."""
    p = 0.3
    expected = 0.0
    for outcome in itertools.product((False, True), repeat=3):
        drawn = outcome.index(True) + 1 if any(outcome) else 3
        expected += math.prod(p if right else 1 - p for right in outcome) * drawn
    assert draft_signal.expected_drafts(p, 3) == pytest.approx(expected) == pytest.approx((1 - 0.7**3) / p)
    np.testing.assert_allclose(draft_signal.expected_drafts([0.0, 1.0], 3), [3, 1])


def test_copying():
    """A model that always copies repeats the verdict, one that never does ignores the draft."""
    assert [float(value) for value in draft_signal.copying(0.3, 1.0)] == [1.0, 0.0]
    assert [float(value) for value in draft_signal.copying(0.3, 0.0)] == [0.3, 0.3]
    assert [float(value) for value in draft_signal.copying(0.2, 0.5)] == pytest.approx([0.6, 0.1])


def test_a_model_that_copies_or_ignores_has_less_signal_at_four_and_four():
    p, share = np.linspace(0.001, 0.999, 300)[:, None], np.linspace(0, 1, 101)
    for scale in SCALES:
        assert snr_ratio(p, *draft_signal.copying(p, share), 4, 4, scale).max() < 0.68


# Limits and regions.


def rare_ratio(times, after_right, drafts, refinements, scale):
    """The limit of `snr_ratio` where p goes to 0 and w = times * p, to first order in p."""
    single = np.eye(refinements + 1)[1] * refinements
    per_success = drafts * draft_signal.right_counts(after_right, refinements) + times[..., None] * single
    scale = "none" if scale == "batch" else scale  # a common divisor does not change the SNR
    return draft_signal.signal(per_success, scale).snr_squared / (drafts + refinements - 1)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sizes", [(4, 4), (8, 8), (2, 6)])
def test_where_success_is_rare(scale, sizes):
    times, r, p = np.array([0.5, 1.0, 2.5, 8.0])[:, None], np.array([1.0, 0.9, 0.5, 0.1]), 1e-5
    limit = rare_ratio(times, r, *sizes, scale)
    np.testing.assert_allclose(snr_ratio(p, r, times * p, *sizes, scale), limit, rtol=1e-3)
    if scale != "group":
        by_hand = (sizes[1] - 1) * (sizes[0] * r * (1 - r) + times) / (sum(sizes) - 1)
        np.testing.assert_allclose(limit, by_hand)
    bound = draft_signal.rare_bound(times, *sizes, scale)
    assert np.all(limit <= bound + 1e-12)
    np.testing.assert_allclose(limit[:, 2:3], bound, rtol=0.03)  # r = 1/2 comes close


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16, 32])
def test_the_signal_of_a_group_is_largest_at_one_half_and_has_a_simple_bound(size):
    p = np.linspace(0.001, 0.999, 999)
    of_group, undivided = (signal(right_counts(p, size), scale).snr_squared for scale in ("group", "none"))
    np.testing.assert_allclose(undivided, (size - 1) * p * (1 - p))
    assert np.all(of_group <= undivided + 1e-9)
    assert of_group.max() == pytest.approx(draft_signal.largest_signal(size)) and np.argmax(of_group) == 499
    assert np.all(np.diff(of_group[:500]) > 0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sizes", [(4, 4), (8, 8), (1, 7)])
def test_where_drafts_cannot_win(scale, sizes):
    edge = draft_signal.hopeless_from(*sizes, scale)
    r, w = np.meshgrid(np.linspace(0, 1, 101), np.linspace(0, 1, 101))
    for p in (edge * 1.01, 0.5, 1 - edge * 1.01):
        assert snr_ratio(p, r, w, *sizes, scale).max() < 1
    assert snr_ratio(edge * 0.99, 0.5, 0.5, *sizes, scale) > 1
    if scale != "group":
        assert edge == pytest.approx((1 - math.sqrt(sizes[0] / (sum(sizes) - 1))) / 2)


@pytest.mark.parametrize("scale", SCALES)
def test_above_the_band_only_confusing_drafts_win(scale):
    p, r, w = np.meshgrid(np.linspace(0.88, 0.999, 13), np.linspace(0, 1, 101), np.linspace(0, 1, 21))
    wins = snr_ratio(p, r, w, 4, 4, scale) >= 1
    assert wins.any() and np.all(r[wins] < p[wins])


@pytest.mark.parametrize("sizes", [(4, 4), (8, 8), (2, 6)])
def test_training_on_drafts_leaves_at_least_the_signal_of_the_drafts(sizes):
    p, r, w = np.meshgrid(np.linspace(0.01, 0.99, 15), np.linspace(0, 1, 21), np.linspace(0, 1, 21))
    for scale in ("group", "none"):
        drafts, refined = (signal(part, scale) for part in (right_counts(p, sizes[0]), igrpo_counts(p, r, w, *sizes)))
        both = draft_signal.trained_together(drafts, refined)
        assert np.all(both.snr_squared >= drafts.snr_squared * (1 - 1e-12))


def test_the_mean_variance_of_problems_decides_undivided():
    """4 + 4: where the mean of p (1 - p) is above 3/28, even refinements that are right half of the time lose."""
    half = signal(right_counts(0.5, 4), "none").snr_squared
    for p in ([0.01, 0.5], [0.02, 0.45]):
        mean = signal(right_counts(p, 8).mean(axis=0), "none").snr_squared
        assert (half < mean) == (np.mean(np.multiply(p, np.subtract(1, p))) > 3 / 28)


def test_a_mixture_has_no_more_signal_than_its_parts():
    """The convexity that the bound stands on."""
    p, r, w = np.meshgrid(*[np.linspace(0.02, 0.98, 17)] * 3)
    a = kept_right(p, 4)
    for scale in ("group", "none"):
        parts = [signal(right_counts(success, 4), scale).snr_squared for success in (r, w)]
        mixed = signal(igrpo_counts(p, r, w, 4, 4), scale).snr_squared
        assert np.all(mixed <= a * parts[0] + (1 - a) * parts[1] + 1e-9)


def test_how_much_repair_is_needed():
    """Undivided and with copied right drafts: (1 - a) w (1 - w) = 7/3 p (1 - p)."""
    p = 0.02
    least, largest = draft_signal.repair_range(p, 1.0, 4, 4, "none")
    product = 7 / 3 * p * (1 - p) / (1 - kept_right(p, 4))
    root = math.sqrt(1 - 4 * product)
    assert least == pytest.approx((1 - root) / 2, rel=5e-3) and largest == pytest.approx((1 + root) / 2, rel=5e-3)
    for scale in SCALES:
        least, largest = draft_signal.repair_range(p, 1.0, 4, 4, scale, transfer=0.8)
        assert snr_ratio(p, 1.0, least, 4, 4, scale, 0.8) >= 1 > snr_ratio(p, 1.0, least * 0.98, 4, 4, scale, 0.8)
        assert snr_ratio(p, 1.0, largest, 4, 4, scale, 0.8) >= 1
        assert largest == 1 or snr_ratio(p, 1.0, largest * 1.001, 4, 4, scale, 0.8) < 1
    nothing = draft_signal.repair_range([0.3, 0.02], [0.5, 1.0], 4, 4)
    assert np.isnan(nothing[0][0]) and np.isnan(nothing[1][0]) and not np.isnan(nothing[0][1])


def test_rare_success_needs_the_least_repair():
    """The least w/p for 4 + 4 is that of the limit: 7/3 with copied drafts, and by the bound with any r."""
    p, r = np.meshgrid(np.geomspace(1e-3, 0.12, 9), np.linspace(0, 1, 21))
    least, _ = draft_signal.repair_range(p, r, 4, 4)
    assert np.nanmin(least / p) > (7 - 4 * draft_signal.largest_signal(4)) / 3 > 1.33
    assert np.nanmin((least / p)[r == 1]) > 7 / 3


@pytest.mark.parametrize(("selection", "right"), [("random", 0.1), ("first", 0.1), ("worst", 0.1**4)])
def test_the_ratio_knows_which_draft_is_shown(selection, right):
    """The least w was always that of the best of N."""
    refined = right * right_counts(0.7, 4) + (1 - right) * right_counts(0.3, 4)
    expected = signal(refined).snr_squared / signal(right_counts(0.1, 8)).snr_squared
    assert snr_ratio(0.1, 0.7, 0.3, 4, 4, selection=selection) == pytest.approx(expected)
    least, best = (float(draft_signal.repair_range(0.1, 0.5, 4, 4, selection=each)[0]) for each in (selection, "best"))
    assert least > best
    assert snr_ratio(0.1, 0.5, least, 4, 4, selection=selection) >= 1


def test_transfer_counts_squared():
    assert snr_ratio(0.1, 0.7, 0.3, 4, 4, transfer=0.5) == pytest.approx(snr_ratio(0.1, 0.7, 0.3, 4, 4) / 4)


# Measured problems.


def test_the_estimate_from_answers_is_unbiased():
    """Over all numbers of right answers among six, with their probabilities. The plain binomial is not."""
    p = 0.2
    chances = right_counts(p, 6)
    np.testing.assert_allclose(chances @ draft_signal.drawn_counts(np.arange(7), 6, 4), right_counts(p, 4))
    plain = chances @ right_counts(np.arange(7) / 6, 4)
    assert signal(plain).active < signal(right_counts(p, 4)).active - 0.05
    np.testing.assert_allclose(draft_signal.drawn_counts(3, 4, 4), [0, 0, 0, 1, 0])
    with pytest.raises(ValueError, match="3 answers to a problem: must be at least the 4 of a group"):
        draft_signal.drawn_counts([1], 3, 4)


def test_what_the_plain_prompt_is_left_with():
    """Two policies over ten answers, of which the first four are right."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        plain, refined = rng.dirichlet(np.ones(10), 2)
        success = refined[:4].sum()
        reliance = np.sum(refined[:4] / success * np.log(refined[:4] / plain[:4]))
        assert plain[:4].sum() >= draft_signal.plain_success_bound(success, reliance) - 1e-12
    shifted = np.r_[plain[:4] * 1.2, plain[4:]]  # the same ratio for every right answer: the bound is exact
    exact = draft_signal.plain_success_bound(shifted[:4].sum(), math.log(1.2))
    assert exact == pytest.approx(plain[:4].sum())
