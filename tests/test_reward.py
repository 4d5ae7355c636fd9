"""igrpo_jax.rewards.reward: weighted scores through the pool, failures that are counted, and the step's statistics.

Workers import this file, so it must not import jax.
"""

import dataclasses
import multiprocessing
import time

import pytest

from igrpo_jax import config
from igrpo_jax.batch import Score
from igrpo_jax.rewards import reward
from igrpo_jax.rewards.pool import Outcome, Pool
from igrpo_jax.rewards.reward import Verifier, VerifierError, check_errors, score, statistics

BOTH = {"accuracy": 1.0, "format": 1.0}
RIGHT = "<think>2+2</think><answer>4</answer>"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(config.Rewards(accuracy=1.0, format=0.5, workers=2, timeout=5.0)) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("completion", "prefix", "weights", "expected"),
    [
        (RIGHT, "", BOTH, Score(2.0, {"accuracy": 1.0, "format": 1.0}, "4", "ok")),
        (r"It is \boxed{4}.", "", BOTH, Score(1.0, {"accuracy": 1.0, "format": 0.0}, "4", "ok")),
        (RIGHT.replace("4", "5"), "", BOTH, Score(1.0, {"accuracy": 0.0, "format": 1.0}, "5", "ok")),
        ("no idea", "", BOTH, Score(0.0, {"accuracy": 0.0, "format": 0.0}, None, "unparseable")),
        # The template opened the block: without the prefix the format is 0.
        ("2+2</think><answer>4</answer>", "<think>\n", BOTH, Score(2.0, {"accuracy": 1.0, "format": 1.0}, "4", "ok")),
        (r"\boxed{4}</think> or 5", "<think>", {"accuracy": 1.0}, Score(0.0, {"accuracy": 0.0}, None, "unparseable")),
        (RIGHT, "", {"accuracy": 0.25, "format": 2.0}, Score(2.25, {"accuracy": 1.0, "format": 1.0}, "4", "ok")),
        (RIGHT, "", {"accuracy": 3.0}, Score(3.0, {"accuracy": 1.0}, "4", "ok")),
        ("no idea", "", {"format": 1.0}, Score(0.0, {"format": 0.0}, None, "ok")),
    ],
)  # fmt: skip
def test_score(completion, prefix, weights, expected):
    assert score(completion, "4", prefix, weights) == expected


def test_a_reward_of_weight_zero_is_not_computed(monkeypatch):
    weights = reward.weights_of(config.Rewards(accuracy=0.0, format=2.0))
    assert weights == {"format": 2.0}
    monkeypatch.setattr(reward.math_grader, "grade", lambda *_: pytest.fail("accuracy was computed"))
    assert score(RIGHT, "4", "", weights) == Score(2.0, {"format": 1.0}, None, "ok")


def test_the_pool_says_what_the_function_says(verifier):
    cases = [(f"{i}</think><answer>{i}</answer>", str(i + i % 2), "<think>") for i in range(60)] + [("?", "1", "")]
    futures = [verifier.submit(*case) for case in cases]
    for case, future in zip(cases, futures, strict=True):
        graded = future.result(timeout=30)
        assert graded.seconds > 0
        assert dataclasses.replace(graded, seconds=0.0) == score(*case, {"accuracy": 1.0, "format": 0.5})


def test_a_step_of_short_completions_is_graded_in_a_fraction_of_a_second(verifier):
    # 0.03 s measured for 130; importing sympy or building its tables per item would take seconds.
    verifier.submit(RIGHT, "4").result(timeout=30)
    start = time.perf_counter()
    futures = [verifier.submit(f"1+{i}</think><answer>{i}</answer>", str(i), "<think>") for i in range(130)]
    assert time.perf_counter() - start < 0.1, "submit must not wait"
    assert [future.result(timeout=30).reward for future in futures] == [1.5] * 130
    assert time.perf_counter() - start < 0.5


def fake_score(completion, answer, prefix, weights):
    """Stands in for `score` in a worker."""
    if completion == "hang":
        while True:
            pass
    if completion == "fail":
        raise RuntimeError("a bug in the grader")
    return score(completion, answer, prefix, weights)


def test_timeouts_and_errors_are_scores(monkeypatch):
    monkeypatch.setattr(reward, "Pool", lambda function, *args, **options: Pool(fake_score, *args, **options))
    before = set(multiprocessing.active_children())
    with Verifier(config.Rewards(workers=1, timeout=1.0)) as verifier:
        futures = [verifier.submit(text, "4") for text in (RIGHT, "hang", "fail", RIGHT)]
        scores = [future.result(timeout=30) for future in futures]
        pending = verifier.submit("hang", "4")
    nothing = {"accuracy": 0.0, "format": 0.0}
    assert [(s.status, s.reward) for s in scores] == [("ok", 2.0), ("timeout", 0.0), ("error", 0.0), ("ok", 2.0)]
    assert scores[1] == Score(0.0, nothing, None, "timeout", 1.0)
    assert dataclasses.replace(scores[2], seconds=0.0) == Score(0.0, nothing, None, "error")
    assert pending.result(timeout=1).status == "error"  # closed before it was graded
    assert set(multiprocessing.active_children()) <= before


def test_statistics():
    seconds = [i / 1000 for i in range(1, 101)]
    statuses = ["timeout"] * 5 + ["error"] * 10 + ["unparseable"] * 20 + ["ok"] * 65
    scores = [Score(0.0, {}, None, status, s) for status, s in zip(statuses, reversed(seconds), strict=True)]
    assert statistics(scores) == {
        "verifier/timeout_frac": 0.05,
        "verifier/error_frac": 0.1,
        "verifier/unparseable_frac": 0.2,
        "verifier/latency_p50": 0.05,  # the 50th smallest of 100, not the 51st
        "verifier/latency_p99": 0.099,
    }
    assert statistics(scores[:1])["verifier/latency_p50"] == 0.1
    assert set(statistics([]).values()) == {0.0}


def test_errors_stop_the_run():
    failed = [Score(0.0, {}, None, "timeout"), Score(0.0, {}, None, "error")]
    wrong = [Score(0.0, {}, None, "unparseable"), Score(0.0, {}, "1", "ok")]
    check_errors(failed + wrong, 0.5)  # at the limit, not over it
    check_errors(wrong * 10, 0.0)  # a wrong answer is no failure
    check_errors([], 0.0)
    with pytest.raises(VerifierError, match=r"1 of 3 gradings timed out and 1 failed.*rewards\.max_error_fraction"):
        check_errors(failed + wrong[:1], 0.5)


def test_latency_is_that_of_the_worker(verifier):
    outcome = Outcome("ok", score(RIGHT, "4", "", BOTH), seconds=0.25)
    assert verifier._to_score(outcome).seconds == 0.25
