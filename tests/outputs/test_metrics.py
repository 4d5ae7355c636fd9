"""Metrics of a rollout, against numbers derived by hand."""

import dataclasses
import math

import numpy as np
import pytest
from builders import completion, group, run_config

from igrpo_jax.outputs import metrics
from igrpo_jax.records import Score


def test_rollout_metrics_against_numbers_derived_by_hand(two_groups):
    got = metrics.rollout_metrics(two_groups, run_config())
    # Rewards [2, 0] and [1, 1]: the mean is 1; std with ddof = 1 is sqrt(2) and 0 (ddof = 0 would give 1 and 0).
    assert got["reward"] == 1.0
    assert got["reward_std"] == pytest.approx(np.sqrt(2) / 2)
    assert got["frac_reward_zero_std"] == 0.5
    assert got["rewards/accuracy/mean"] == 0.5 and got["rewards/format/mean"] == 0.5
    assert got["completions/mean_length"] == (3 + 3 + 2 + 1) / 4
    assert got["completions/min_length"] == 1 and got["completions/max_length"] == 3
    assert got["completions/clipped_ratio"] == 0.25
    # Draft rewards [2, 1] and [1, 0].
    assert got["draft/reward"] == 1.0 and got["draft/best_reward"] == 1.5 and got["draft/accuracy"] == 0.25
    assert (got["draft/solved_none"], got["draft/solved_some"], got["draft/solved_all"]) == (0.5, 0.5, 0.0)
    assert got["draft/mean_length"] == (3 + 2 + 4 + 2) / 4
    assert got["draft/kept_reward"] == 1.5
    # Right best draft: one refinement right, one wrong. Wrong best draft: one right, one wrong.
    assert [got[f"refine/{key}"] for key in ("fixed", "broken", "kept_right", "kept_wrong")] == [0.25] * 4
    # Refinements [2, 0] against the draft's 2, [1, 1] against its 1. The mean of all drafts would give +0.5.
    assert got["refine/gain_vs_best_draft"] == -0.5
    # [5 6] copies [5 6]; [5 7 8] shares its first of 3; [3] shares nothing; an empty one is no copy.
    assert got["refine/copy_ratio"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert got["refine/draft_truncated"] == 0.0
    assert all(type(value) is float for value in got.values())


def test_groups_may_hold_the_drafts_too(two_groups):
    """Rewards 2, 0 with drafts 2, 1, and 1, 1 with drafts 1, 0: variances (ddof = 1) of 2.75 / 3 and .75 / 3."""
    algorithm = dataclasses.replace(run_config().algorithm, group="prompt", train_drafts=True)
    got = metrics.rollout_metrics(two_groups, dataclasses.replace(run_config(), algorithm=algorithm))
    assert got["reward_std"] == pytest.approx((np.sqrt(2.75 / 3) + 0.5) / 2)
    assert got["frac_reward_zero_std"] == 0.0 and got["reward"] == 1.0  # the mean of the refinements as ever


def test_what_is_added_to_rewards_counts_in_their_spread_alone(two_groups):
    """Rewards 2, 0 with -2 and 0 added are alike, and 1, 1 with 0 and -1 differ by 1; an unrefined prompt has none."""
    first, second = two_groups
    solved = dataclasses.replace(first, completions=(), kept=None, context=first.prompt.tokens)
    changes = [np.array(some, np.float32) for some in ([], [-2, 0], [0, -1])]
    got = metrics.rollout_metrics([solved, first, second], run_config(), changes)
    assert got["reward_std"] == pytest.approx(np.sqrt(0.5) / 2) and got["frac_reward_zero_std"] == 0.5
    before = metrics.rollout_metrics([solved, first, second], run_config())
    assert {name for name in got if got[name] != before[name]} == {"reward_std"}
    algorithm = dataclasses.replace(run_config().algorithm, group="prompt", train_drafts=True)
    got = metrics.rollout_metrics([first], dataclasses.replace(run_config(), algorithm=algorithm), [changes[1]])
    assert got["reward_std"] == pytest.approx(np.sqrt(2.75 / 3))  # 0, 0 with drafts 2, 1


def test_prompts_without_refinements_count_among_the_drafts_alone(two_groups):
    first, second = two_groups
    solved = dataclasses.replace(first, completions=(), kept=None, context=first.prompt.tokens)
    whole, both = (metrics.rollout_metrics(groups, run_config()) for groups in (two_groups, [solved, second]))
    of_drafts = [name for name in whole if name.startswith("draft/") and name != "draft/kept_reward"]
    assert len(of_drafts) == 8 and [both[name] for name in of_drafts] == [whole[name] for name in of_drafts]
    alone = metrics.rollout_metrics([second], run_config())
    for name in ("reward", "frac_reward_zero_std", "completions/mean_length", "refine/fixed", "draft/kept_reward"):
        assert both[name] == alone[name]
    assert set(metrics.rollout_metrics([solved], run_config())) == set(of_drafts)


def test_verifications_have_metrics_of_their_own_and_solutions_those_of_trl(two_groups):
    """A right solution with verdicts 1 (right), 0 and 1 (right), a wrong one with 1, 1 and one ungraded."""
    right, wrong = two_groups
    verdict = lambda i, says, accuracy: dataclasses.replace(
        completion("verify", i, [5] * (i + 1), accuracy),
        score=Score(math.nan if says is None else accuracy, {"accuracy": accuracy}, says, "ok"),
    )
    groups = [
        dataclasses.replace(right, completions=(verdict(0, "1", 1.0), verdict(1, "0", 0.0), verdict(2, "1", 1.0))),
        dataclasses.replace(wrong, completions=(verdict(1, "1", 0.0), verdict(2, "1", 0.0), verdict(3, None, 0.0))),
        dataclasses.replace(wrong, kept=None, completions=()),
    ]
    algorithm = dataclasses.replace(run_config().algorithm, second_stage="verify", train_drafts=True)
    config = dataclasses.replace(run_config(), algorithm=algorithm)
    got = metrics.rollout_metrics(groups, config)
    verified = {name: value for name, value in got.items() if name.startswith("verify/")}
    assert verified == {
        "verify/prompts": 2,
        "verify/accuracy": pytest.approx(2 / 5),
        "verify/says_right": pytest.approx(4 / 5),
        "verify/accuracy_right": pytest.approx(2 / 3),
        "verify/accuracy_wrong": 0,
        "verify/mean_length": 2.5,  # 1, 2, 3 and 2, 3, 4 tokens
    }
    # The drafts of all three prompts: rewards 2, 1 and twice 1, 0, of which one is right; lengths 3, 2, 4, 2, 4, 2.
    assert (got["reward"], got["rewards/accuracy/mean"]) == (pytest.approx(5 / 6), pytest.approx(1 / 6))
    assert got["completions/mean_length"] == pytest.approx(17 / 6) and got["frac_reward_zero_std"] == 0
    assert got["draft/solved_some"] == pytest.approx(1 / 3)
    assert not [name for name in got if name.startswith("refine/")]
    assert not {"draft/reward", "draft/accuracy", "draft/mean_length", "draft/kept_reward"} & set(got)
    none = metrics.rollout_metrics(groups[2:], config)
    assert [name for name in none if name.startswith("verify/")] == ["verify/prompts"] and none["verify/prompts"] == 0


def test_the_entropy_of_drafts_is_the_mean_over_their_tokens(two_groups):
    """Drafts of 3, 2, 4 and 2 tokens with 1.5, 0.5, 2 and 1.5 nats in all."""
    given = iter([1.5, 0.5, 2.0, 1.5])
    groups = [
        dataclasses.replace(one, drafts=tuple(dataclasses.replace(draft, entropy=next(given)) for draft in one.drafts))
        for one in two_groups
    ]
    assert metrics.rollout_metrics(groups, run_config())["draft/entropy"] == pytest.approx(5.5 / 11)


def test_custom_rewards_have_a_spread_and_what_they_logged(two_groups):
    """Values 1, 3, 5 and None: the mean is 3, and the standard deviation (ddof = 1) 2, as TRL's nanmean and nanstd."""
    given = iter([(1.0, [2.0]), (3.0, [2.0, 4.0]), (5.0, []), (np.nan, [])])

    def graded(completion):
        value, logged = next(given)
        score = completion.score
        rewards = score.rewards | {"short": value}
        return dataclasses.replace(
            completion, score=dataclasses.replace(score, rewards=rewards, logged={"words": logged} if logged else {})
        )

    groups = [dataclasses.replace(group, completions=tuple(map(graded, group.completions))) for group in two_groups]
    plain = run_config()
    own = dataclasses.replace(plain, rewards=dataclasses.replace(plain.rewards, functions=("my:short", "my:tidy")))
    got = metrics.rollout_metrics(groups, own)
    assert (got["rewards/short/mean"], got["rewards/short/std"]) == (3.0, 2.0)
    assert got["custom/words"] == pytest.approx((2 + 2 + 4) / 3)
    assert np.isnan(got["rewards/tidy/std"]) and "rewards/accuracy/std" not in got
    spreads = {name for name in metrics.rollout_metrics(two_groups, plain) if "std" in name or "custom" in name}
    assert spreads == {"reward_std", "frac_reward_zero_std"}


@pytest.mark.slow
def test_means_and_spreads_of_rewards_are_those_of_trl():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; the extra parity brings it")
    theirs = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed; the extra parity brings it")
    for values in ([1.0, np.nan, 3.0, 4.5], [0.25, np.nan], [np.nan] * 3):
        tensor = torch.tensor(values, dtype=torch.float64)
        np.testing.assert_allclose(metrics._mean(values), torch.nanmean(tensor).item(), rtol=1e-12)
        np.testing.assert_allclose(metrics._std(values), theirs.nanstd(tensor).item(), rtol=1e-12)


def test_a_constant_reward_has_a_spread_of_exactly_zero():
    assert np.std([0.1] * 3, ddof=1) > 0  # by rounding
    assert metrics._std([0.1] * 3) == 0.0


def test_an_answer_may_be_the_drafts_though_its_words_are_not(two_groups):
    """Shown 7: one of two says so too. Shown no answer: one that states none either is no copy."""
    stated = lambda c, answer: dataclasses.replace(c, score=dataclasses.replace(c.score, extracted=answer))
    first, second = two_groups
    first = dataclasses.replace(first, completions=(first.completions[0], stated(first.completions[1], "8")))
    second = dataclasses.replace(
        second,
        drafts=(stated(second.drafts[0], None), second.drafts[1]),
        completions=(stated(second.completions[0], None), second.completions[1]),
    )
    assert metrics.rollout_metrics([first, second], run_config())["refine/same_answer"] == 0.25


def test_a_kept_draft_need_not_be_the_best(two_groups):
    """Shown their second drafts, of rewards 1 and 0, both wrong: all is fixed or kept wrong, the gain as before."""
    got = metrics.rollout_metrics([dataclasses.replace(group, kept=1) for group in two_groups], run_config())
    assert (got["draft/kept_reward"], got["draft/best_reward"]) == (0.5, 1.5)
    assert got["refine/gain_vs_best_draft"] == -0.5  # against the kept ones it would be +0.5
    assert [got[f"refine/{key}"] for key in ("fixed", "broken", "kept_right", "kept_wrong")] == [0.5, 0, 0, 0.5]


def test_completions_without_a_verdict_are_left_out_of_means(two_groups):
    def unknown(one):
        score = dataclasses.replace(one.score, reward=np.nan, rewards=one.score.rewards | {"judge": np.nan})
        return dataclasses.replace(one, score=score)

    right, wrong = two_groups
    groups = [
        group([unknown(right.drafts[0]), right.drafts[1]], 1, [right.completions[0], unknown(right.completions[1])]),
        group([unknown(one) for one in wrong.drafts], None, wrong.completions),
    ]
    got = metrics.rollout_metrics(groups, run_config())
    assert got["reward"] == pytest.approx((2 + 1 + 1) / 3) and got["reward_std"] == 0.0
    assert got["frac_reward_zero_std"] == 1.0  # one verdict alone compares with nothing
    assert np.isnan(got["rewards/judge/mean"])  # written as null
    # Their accuracy, which needs no judge, counts nowhere: 1, 1 and 0 of completions are left, and 0 of drafts.
    assert (got["rewards/accuracy/mean"], got["draft/accuracy"]) == (pytest.approx(2 / 3), 0.0)
    assert got["draft/reward"] == got["draft/best_reward"] == 1.0
    assert got["refine/gain_vs_best_draft"] == 1.0


def test_gradings_that_failed_are_left_out_of_means(two_groups):
    """Of the drafts' accuracies 1, 0, 0, 0 the first is not known, and of the completions' 1, 0, 0, 1 neither is."""
    nothing = Score(math.nan, {"accuracy": math.nan, "format": math.nan}, None, "timeout")
    failed = lambda one: dataclasses.replace(one, score=nothing)
    first, second = two_groups
    first = group([failed(first.drafts[0]), first.drafts[1]], 1, [failed(first.completions[0]), first.completions[1]])
    before, got = (metrics.rollout_metrics(groups, run_config()) for groups in (two_groups, [first, second]))
    assert not any(map(math.isnan, got.values()))
    for name in ("rewards/accuracy/mean", "draft/accuracy"):
        assert got[name] == pytest.approx((4 * before[name] - 1) / 3)
    assert (got["refine/fixed"], got["refine/kept_wrong"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    solved = group([two_groups[0].drafts[0], failed(first.drafts[1])], 0, [failed(first.completions[0])])
    got = metrics.rollout_metrics([solved, second], run_config())
    assert (got["draft/solved_none"], got["draft/solved_some"], got["draft/solved_all"]) == (0.5, 0.0, 0.5)
    assert "refine/fixed" not in metrics.rollout_metrics([solved], run_config())
    # A kept draft may have failed too, where another reward chose it; of its right refinement nothing is known.
    shown = group([failed(first.drafts[0]), first.drafts[1]], 0, two_groups[0].completions[:1])
    got = metrics.rollout_metrics([shown, second], run_config())
    assert (got["refine/fixed"], got["refine/kept_wrong"]) == (0.5, 0.5)


def test_kept_drafts_cut_to_the_limit_are_counted_without_their_eos(two_groups):
    # Kept drafts: [5 6 EOS] has 2 tokens in q', [4 4 4 4] has 4.
    for limit, share in ((1, 1.0), (2, 0.5), (3, 0.5), (4, 0.0)):
        got = metrics.rollout_metrics(two_groups, run_config(**{"refine.max_draft_length": limit}))
        assert got["refine/draft_truncated"] == share


def test_stages_that_did_not_run_have_no_keys(two_groups):
    base = [group([], None, g.completions) for g in two_groups]
    got = metrics.rollout_metrics(base, run_config())
    assert got["reward"] == 1.0
    assert not [name for name in got if name.startswith(("draft/", "refine/"))]
    # Draft dropout: drafts were drawn, but one group saw the plain prompt.
    dropped = [two_groups[0], group(two_groups[1].drafts, None, two_groups[1].completions)]
    got = metrics.rollout_metrics(dropped, run_config())
    assert got["draft/solved_none"] == 0.5
    assert (got["refine/kept_right"], got["refine/broken"], got["refine/fixed"]) == (0.5, 0.5, 0.0)
    assert metrics.rollout_metrics([], run_config()) == {}


def test_no_accuracy_reward_is_no_error():
    drafts = [completion("draft", 0, [1, 9], form=1.0)]
    groups = [group(drafts, 0, [completion("refine", i, [1, 9], form=float(i)) for i in range(2)])]
    got = metrics.rollout_metrics(groups, run_config(**{"rewards.accuracy": 0.0}))
    assert got["rewards/format/mean"] == 0.5 and got["refine/copy_ratio"] == 1.0
    assert "rewards/accuracy/mean" not in got and "refine/fixed" not in got and "draft/solved_none" not in got


@pytest.mark.parametrize(
    "draft, refinement, ratio",
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [3, 4], 1.0),  # the tail alone
        ([1, 2, 3, 4], [1, 4], 1.0),  # one piece cut out
        ([1, 2, 3, 4], [1, 2, 8, 4], 0.75),  # one token corrected
        ([1, 2], [1, 2, 1, 2], 0.5),  # no token of the draft counts twice
        ([1, 1], [1, 1, 1], 2 / 3),
        ([1, 2], [3, 4], 0.0),
        ([], [3], 0.0),
        ([], [], 1.0),
    ],
)
def test_copy_ratio(draft, refinement, ratio):
    assert metrics.copy_ratio(np.array(draft), np.array(refinement)) == pytest.approx(ratio)
