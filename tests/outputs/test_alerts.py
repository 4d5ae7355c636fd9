"""Alerts: each limit from both of its sides, and what it takes for them to be sure."""

import pytest

from igrpo_jax.outputs import alerts as alerting

QUIET = {
    "reward": 1.2,
    "entropy": 0.4,
    "frac_reward_zero_std": 0.3,
    "completions/clipped_ratio": 0.1,
    "verifier/unparseable_frac": 0.05,
    "verifier/error_frac": 0.0,
    "verifier/timeout_frac": 0.0,
    "perf/recompiles": 0.0,
    "nonfinite_steps": 0.0,
}


def names(metrics, history=()):
    return [alert.partition(":")[0] for alert in alerting.alerts(metrics, history)]


def steps(count, **changes):
    return [QUIET | changes for _ in range(count)]


@pytest.mark.parametrize(
    "name, below, above",
    [
        ("truncation", {"completions/clipped_ratio": 0.5}, {"completions/clipped_ratio": 0.51}),
        ("unparseable", {"verifier/unparseable_frac": 0.3}, {"verifier/unparseable_frac": 0.31}),
        ("zero variance", {"frac_reward_zero_std": 0.8}, {"frac_reward_zero_std": 0.81}),
        (
            "verifier errors",
            {"verifier/error_frac": 0.01},
            dict.fromkeys(("verifier/error_frac", "verifier/timeout_frac"), 0.006),
        ),
        ("zero reward", {"reward": 0.0, "frac_reward_zero_std": 0.9}, {"reward": 0.0, "frac_reward_zero_std": 1.0}),
    ],
)
def test_each_limit_from_both_sides_at_the_first_step(name, below, above):
    assert name not in names(QUIET | below)
    assert name in names(QUIET | above)


def test_a_quiet_run_has_none_and_no_metric_must_be_there():
    assert names(QUIET, steps(40)) == []
    assert names({}) == names({}, [{}] * 40) == []
    assert names(dict.fromkeys(QUIET), [dict.fromkeys(QUIET)] * 40) == []  # not finite, as rows have it
    assert (
        names({"verifier/error_frac": 1.0}) == names({"verifier/error_frac": 1.0, "verifier/timeout_frac": None}) == []
    )
    assert set(QUIET) == set(alerting.WATCHED)


def test_one_odd_step_is_no_alert_and_two_quiet_ones_end_none():
    """The mean of five steps: 0.1 four times and 1 once is 0.28, not above a half; a half is reached with three."""
    odd = QUIET | {"completions/clipped_ratio": 1.0}
    assert names(odd, steps(4)) == []
    assert names(odd, [*steps(2), odd, odd]) == ["truncation"]
    assert names(QUIET, [odd] * 4) == ["truncation"] and names(QUIET, [*[odd] * 4, *steps(3)]) == []


def test_all_rewards_zero_needs_every_step():
    zero = QUIET | {"reward": 0.0, "frac_reward_zero_std": 1.0}
    assert "zero reward" in names(zero, [zero] * 9)
    assert "zero reward" not in names(zero, [*[zero] * 9, QUIET, zero])


def test_entropy_is_compared_with_the_start_of_the_run():
    """0.4 at first: below 0.04 in the mean of the last five."""
    assert names(QUIET | {"entropy": 0.039}, steps(5) + steps(4, entropy=0.039)) == ["entropy collapse"]
    assert names(QUIET | {"entropy": 0.041}, steps(5) + steps(4, entropy=0.041)) == []
    slow = [*steps(5), *steps(5, entropy=0.08), *steps(4, entropy=0.03)]
    assert names(QUIET | {"entropy": 0.03}, slow) == ["entropy collapse"]
    unsolved = {"nonfinite_steps": 0, "entropy": 0.03}  # a step in which all prompts were solved has no reward
    assert names(unsolved, steps(5) + steps(4, entropy=0.03)) == ["entropy collapse"]
    taught = {"sft/loss": 0.1, "entropy": 0.03, "nonfinite_steps": 0}  # SFT lowers it by what it teaches
    assert names(taught, [taught | {"entropy": 0.4}] * 5 + [taught] * 4) == []
    assert names(QUIET | {"entropy": 0.001}, steps(4)) == []  # nothing to compare with yet
    assert names(QUIET | {"entropy": 0.01}, steps(40, entropy=0.01)) == []  # a policy that was sure from the start


def test_compiling_is_expected_at_the_start_and_now_and_then():
    busy = QUIET | {"perf/recompiles": 2.0}
    assert names(busy, [busy] * 9) == []
    assert names(busy, [busy] * 10) == ["recompiles"]
    assert names(busy, steps(40)) == names(busy, [*steps(40), busy]) == []
    assert names(busy, [*steps(40), busy, busy]) == ["recompiles"]


def test_skipped_updates_are_an_alert_while_they_happen():
    skipped = QUIET | {"nonfinite_steps": 1.0}
    assert names(skipped, steps(3)) == ["not finite"]
    assert names(skipped, [*steps(3), *[skipped] * 5]) == []  # one, six steps ago


def of_rewards(**values):
    """A row with the mean and the standard deviation of custom rewards by name, and with the accuracy's mean."""
    row = QUIET | {"rewards/accuracy/mean": 0.0}
    for name, (mean, std) in values.items():
        row |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
    return row


def test_a_reward_that_is_none_for_all_is_an_alert_from_the_first_step():
    none, fine = of_rewards(short=(None, None), tidy=(0.5, 0.1)), of_rewards(short=(0.5, None), tidy=(0.5, 0.1))
    assert alerting.alerts(none) == ["no value: short gave None for every completion"]
    assert names(fine) == names(none, [fine]) == names(none, [fine, *[none] * 3]) == []
    assert names(none, [fine, *[none] * 4]) == ["no value"]
    both = of_rewards(short=(None, None), tidy=(None, None))
    assert alerting.alerts(both) == ["no value: short, tidy gave None for every completion"]


def test_a_reward_that_is_constant_over_many_steps_is_an_alert():
    """A mean of equal values may be rounded. A reward with one value in each step, and others in others, is fine."""
    same, rounded = of_rewards(short=(0.1, 0.0)), of_rewards(short=(0.1 + 1e-17, 0.0))
    assert names(same, [rounded] * 18) == []
    assert alerting.alerts(same, [rounded] * 19) == ["constant reward: short gave the same value in all 20 steps"]
    assert names(same, [*[same] * 18, of_rewards(short=(0.2, 0.0))]) == []
    assert names(of_rewards(short=(0.1, 0.01)), [same] * 19) == []
    assert names(same, [*[same] * 18, of_rewards(short=(None, None))]) == []
    assert names(of_rewards(short=(0.0, 0.0)), [of_rewards(short=(0.0, 0.0))] * 19) == ["constant reward"]


def test_the_metrics_that_alerts_read():
    assert all(map(alerting.is_watched, (*QUIET, "rewards/short/std", "rewards/short/mean")))
    assert not any(map(alerting.is_watched, ("loss", "rewards/a/b/mean", "custom/short/mean")))


def test_alerts_come_in_the_order_of_the_table():
    bad = QUIET | {"frac_reward_zero_std": 1.0, "reward": 0.0, "verifier/error_frac": 0.5}
    assert names(bad) == ["zero reward", "zero variance", "verifier errors"]
    assert alerting.alerts(bad)[1].startswith("zero variance: 100% of groups ")
    # Beside its label an alert fits a terminal of 80 columns.
    assert all(
        len(f"{limit.name}: {limit.message.format(1.0)}") <= 72 and limit.message.isascii() for limit in alerting.LIMITS
    )
    assert all(
        len(f"{limit.name}: {limit.message.format('my_function')}") <= 72 and limit.message.isascii()
        for limit in alerting.REWARD_LIMITS
    )
