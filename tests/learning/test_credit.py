"""Advantages by hand: whose rewards share a baseline, what is added to them, and which completions are trained on."""

import math

import numpy as np
import pytest

from igrpo_jax import config
from igrpo_jax.learning import credit
from igrpo_jax.records import Completion, Group, Prompt, Score

CONTEXT, PLAIN = np.arange(5, dtype=np.int32), np.arange(2, dtype=np.int32)
# Two rewards that differ by 1: half of it, over the std (ddof = 1) of sqrt(1/2).
PAIR = 0.5 / (math.sqrt(0.5) + 1e-4)


def settings(**changes):
    algorithm = {"num_drafts": 2, "num_generations": 2, "train_drafts": True} | changes
    return config.Config(algorithm=config.AlgorithmConfig(**algorithm))


def samples(stage, rewards, answers=None):
    """Completions whose accuracy is their reward; NaN is no verdict."""
    answers = answers or [None] * len(rewards)
    scores = [
        Score(float(reward), {} if math.isnan(reward) else {"accuracy": float(reward)}, answer, "ok")
        for reward, answer in zip(rewards, answers, strict=True)
    ]
    empty = np.zeros(1, np.int32), np.zeros(1, np.float32)
    return tuple(Completion(stage, i, *empty, True, score=score) for i, score in enumerate(scores))


def make_group(drafts, refinements, kept=0, answers=((), ())):
    prompt = Prompt("0", 0, "q", "1", PLAIN)
    drafted, refined = samples("draft", drafts, answers[0]), samples("refine", refinements, answers[1])
    return Group(prompt, drafted, kept, PLAIN if kept is None else CONTEXT, refined)


def assert_advantages(got, expected):
    assert [own.dtype for own in got] == [np.float32] * len(expected)
    for own, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(own, wanted, atol=1e-6)


def test_stages_have_baselines_of_their_own():
    """A prompt without refinements, as one without drafts, is in no group of that stage."""
    groups = [make_group([0, 1], [1, 0], kept=1), make_group([1, 0], [], kept=None), make_group([], [0, 1], kept=None)]
    assert_advantages(credit.advantages(groups, settings()).refinements, [[PAIR, -PAIR], [], [-PAIR, PAIR]])
    assert_advantages(credit.advantages(groups, settings()).drafts, [[-PAIR, PAIR], [PAIR, -PAIR], []])
    assert_advantages(credit.advantages(groups[1:2], settings()).refinements, [[]])


def test_drafts_and_refinements_can_share_a_baseline():
    """Wrong drafts and right refinements: four rewards with mean 1/2 and std sqrt(1/3). By stage nothing differs."""
    groups = [make_group([0, 0], [1, 1]), make_group([1, 0], [], kept=None)]
    joint = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    together = settings(group="prompt")
    assert_advantages(credit.advantages(groups, together).refinements, [[joint, joint], []])
    assert_advantages(credit.advantages(groups, together).drafts, [[-joint, -joint], [PAIR, -PAIR]])
    assert_advantages(credit.advantages(groups, settings()).refinements, [[0, 0], []])


def test_a_shared_baseline_over_the_batch():
    """Rewards 0, 0, 1, 1 and 1, 0: each less its group's mean of 1/2, over the std of all six, which is sqrt(.3)."""
    groups = [make_group([0, 0], [1, 1]), make_group([1, 0], [], kept=None)]
    unit = 0.5 / (math.sqrt(0.3) + 1e-4)
    batch = settings(group="prompt", scale_rewards="batch")
    assert_advantages(credit.advantages(groups, batch).refinements, [[unit, unit], []])
    assert_advantages(credit.advantages(groups, batch).drafts, [[-unit, -unit], [unit, -unit]])


def test_wrong_refinements_have_no_credit_on_the_plain_prompt():
    """Rewards 1, 0, 0, 0: mean 1/4 and std 1/2. The wrong ones count in both, whether they are trained on or not.

    Refinements that saw no draft are answers to the plain prompt like any other.
    """
    four = {"num_generations": 4, "refine_credit": "plain"}
    groups = [make_group([0, 1], [1, 0, 0, 0]), make_group([], [1, 0, 0, 0], kept=None)]
    right, wrong = 0.75 / (0.5 + 1e-4), -0.25 / (0.5 + 1e-4)
    every = [right, wrong, wrong, wrong]
    assert_advantages(credit.advantages(groups, settings(**four)).refinements, [[right, 0, 0, 0], every])
    everything = settings(**four, credit_completions="all")
    assert_advantages(credit.advantages(groups, everything).refinements, [every, every])
    assert_advantages(credit.advantages(groups, settings(**four)).drafts, [[-PAIR, PAIR], []])


def test_wrong_refinements_without_credit_stay_in_a_shared_baseline():
    """Drafts 0, 0 and refinements 1, 0: mean 1/4, std 1/2. The drafts are trained on, the wrong refinement is not."""
    chosen = settings(group="prompt", refine_credit="plain")
    groups = [make_group([0, 0], [1, 0])]
    assert_advantages(credit.advantages(groups, chosen).refinements, [[0.75 / (0.5 + 1e-4), 0]])
    assert_advantages(credit.advantages(groups, chosen).drafts, [[-0.25 / (0.5 + 1e-4)] * 2])


@pytest.mark.parametrize(
    ("kept", "refined", "drafted"),
    [
        # 1 + .5 (1 - 0) and 0 + .5 (0 - 0), beside drafts of 0 and 1: mean 2.5 / 4.
        (0, [0.875, -0.625], [-0.625, 0.375]),
        # 1 + .5 (1 - 1) and 0 + .5 (0 - 1): mean 1.5 / 4.
        (1, [0.625, -0.875], [-0.375, 0.625]),
        (None, [0.5, -0.5], [-0.5, 0.5]),  # no draft was shown
    ],
)
def test_the_bonus_is_for_what_a_refinement_has_beyond_its_draft(kept, refined, drafted):
    chosen = settings(group="prompt", improvement_bonus=0.5, scale_rewards="none")
    groups = [make_group([0, 1], [1, 0], kept=kept)]
    assert_advantages(credit.advantages(groups, chosen).refinements, [refined])
    assert_advantages(credit.advantages(groups, chosen).drafts, [drafted])
    change = {0: 0.25, 1: -0.25, None: 0.0}[kept]
    assert credit.reward_metrics(groups, chosen) == {"refine/reward_change": change}


def test_repeating_the_answer_of_a_wrong_draft_costs():
    """Of four wrong refinements two repeat the draft's "3", one states nothing: rewards -.2, 0, -.2, 0, mean -.1.

    Repeating a right answer costs nothing, and neither does stating none as the draft did.
    """
    chosen = settings(num_generations=4, repeat_penalty=0.2, scale_rewards="none")
    wrong = make_group([0, 0], [0] * 4, answers=(["3", "4"], ["3", "4", "3", None]))
    right = make_group([1, 0], [1, 0, 1, 1], answers=(["3", "4"], ["3", "4", "3", "3"]))
    silent = make_group([0, 0], [0] * 4, answers=([None, "4"], [None, "4", None, None]))
    expected = [[-0.1, 0.1, -0.1, 0.1], [0.25, -0.75, 0.25, 0.25], [0] * 4]
    assert_advantages(credit.advantages([wrong, right, silent], chosen).refinements, expected)
    (metric,) = credit.reward_metrics([wrong, right, silent], chosen).values()
    assert metric == pytest.approx(-0.4 / 12)


def test_what_an_update_leaves_of_the_dynamic_reward_of_verifications():
    """A factor that all verifications of a solution share is not in advantages over the group's std, unless it is 0.

    Self-Verification has 2 (1 - k/N) or 2 k/N there, with k right ones of N solutions.
    """
    chosen = settings(num_drafts=4, num_generations=4, second_stage="verify")
    verified = lambda factor: make_group([0, 1, 1, 1], np.multiply(factor, [1, 0, 0, 1]), kept=1)
    (plain,) = credit.advantages([verified(1)], chosen).refinements
    for factor in (2 * (1 - 3 / 4), 2 * 3 / 4):
        np.testing.assert_allclose(credit.advantages([verified(factor)], chosen).refinements, [plain], rtol=1e-3)
    assert_advantages(credit.advantages([verified(0)], chosen).refinements, [[0] * 4])
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert_advantages([plain], [[unit, -unit, -unit, unit]])
    third = 0.25 / (0.5 + 1e-4)  # the solutions are a group of their own, with mean 3/4 and std 1/2
    assert_advantages(credit.advantages([verified(1)], chosen).drafts, [[-3 * third, third, third, third]])


def test_completions_without_a_verdict_stay_out():
    """One of two refinements has no verdict: nothing is left to compare; with the drafts there is."""
    groups = [make_group([0, 1], [math.nan, 1], kept=1)]
    assert_advantages(credit.advantages(groups, settings()).refinements, [[0, 0]])
    chosen = settings(group="prompt", improvement_bonus=1.0, scale_rewards="none")
    assert_advantages(credit.advantages(groups, chosen).refinements, [[0, 1 / 3]])  # rewards 1, 0 and 1: mean 2/3
    assert credit.reward_metrics(groups, chosen) == {"refine/reward_change": 0.0}
    assert credit.reward_metrics([make_group([1, 0], [], kept=None)], chosen) == {}
    assert credit.reward_metrics(groups, settings()) == {}


@pytest.mark.parametrize(("metric", "learns"), [(None, [1]), ("reward", [0, 1, 2]), ("format", [0, 2])])
def test_dynamic_sampling_filters_drafts_by_the_metric_too(metric, learns):
    """Drafts that are all wrong, or all right, and differ in their format alone carry no loss where accuracy filters.

    The mistake: advantages from the weighted sum of their rewards, which group 0 and group 2 then train on.
    """
    # (accuracy, format) of both drafts; the last group has a right and a wrong one with equal sums.
    rewards = [((0, 1), (0, 0)), ((1, 1), (0, 1)), ((1, 0), (1, 1)), ((1, 0), (0, 1))]
    groups = [make_group([sum(draft) for draft in drafts], [], kept=None) for drafts in rewards]
    for group, drafts in zip(groups, rewards, strict=True):
        for draft, (accuracy, form) in zip(group.drafts, drafts, strict=True):
            draft.score.rewards.update({"accuracy": float(accuracy), "format": float(form)})
    expected = [[PAIR, -PAIR], [PAIR, -PAIR], [-PAIR, PAIR], [0, 0]]
    assert_advantages(credit.advantages(groups, settings()).drafts, expected)
    left = [own if index in learns else [0, 0] for index, own in enumerate(expected)]
    filtered = credit.advantages(groups, settings(max_redraws=1, filter_groups_metric=metric))
    assert_advantages(filtered.drafts, left)
    assert_advantages(filtered.refinements, [[]] * 4)
