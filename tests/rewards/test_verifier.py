"""igrpo_jax.rewards.verifier: weighted scores through the pool, failures that are counted, and the step's statistics.

Workers import this file, so it must not import jax.
"""

import dataclasses
import math
import multiprocessing
import sys
import time
from concurrent.futures import Future

import numpy as np
import pytest

from igrpo_jax import config
from igrpo_jax.records import Candidate, Score
from igrpo_jax.rewards import verifier as verifier_module
from igrpo_jax.rewards.failures import VerifierError, check_errors
from igrpo_jax.rewards.judge import Judgement
from igrpo_jax.rewards.pool import Outcome, Pool
from igrpo_jax.rewards.rules import Rules, rules_of, score, total
from igrpo_jax.rewards.verifier import Verifier, statistics

BOTH = {"accuracy": 1.0, "format": 1.0}
RIGHT = "<think>2+2</think><answer>4</answer>"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(config.RewardsConfig(accuracy=1.0, format=0.5, workers=2, timeout=5.0)) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("completion", "opening", "weights", "expected"),
    [
        (RIGHT, "", BOTH, Score(2.0, {"accuracy": 1.0, "format": 1.0}, "4", "ok")),
        (r"It is \boxed{4}.", "", BOTH, Score(1.0, {"accuracy": 1.0, "format": 0.0}, "4", "ok")),
        (RIGHT.replace("4", "5"), "", BOTH, Score(1.0, {"accuracy": 0.0, "format": 1.0}, "5", "ok")),
        ("no idea", "", BOTH, Score(0.0, {"accuracy": 0.0, "format": 0.0}, None, "unparseable")),
        # The template opened the block: without the opening the format is 0.
        ("2+2</think><answer>4</answer>", "<think>\n", BOTH, Score(2.0, {"accuracy": 1.0, "format": 1.0}, "4", "ok")),
        (r"\boxed{4}</think> or 5", "<think>", {"accuracy": 1.0}, Score(0.0, {"accuracy": 0.0}, None, "unparseable")),
        # A template may open the answer too.
        ("4</answer>", "<think>2+2</think><answer>", BOTH, Score(2.0, {"accuracy": 1.0, "format": 1.0}, "4", "ok")),
        (RIGHT, "", {"accuracy": 0.25, "format": 2.0}, Score(2.25, {"accuracy": 1.0, "format": 1.0}, "4", "ok")),
        (RIGHT, "", {"accuracy": 3.0}, Score(3.0, {"accuracy": 1.0}, "4", "ok")),
        ("no idea", "", {"format": 1.0}, Score(0.0, {"format": 0.0}, None, "ok")),
    ],
)  # fmt: skip
def test_score(completion, opening, weights, expected):
    assert score(Candidate(completion, "4", opening), Rules(weights)) == expected


def test_a_reward_of_weight_zero_is_not_computed(monkeypatch):
    rules = rules_of(config.RewardsConfig(accuracy=0.0, format=2.0))
    assert rules.weights == {"format": 2.0}
    monkeypatch.setattr(verifier_module.grader, "grade", lambda *_: pytest.fail("accuracy was computed"))
    assert score(Candidate(RIGHT, "4"), rules) == Score(2.0, {"format": 1.0}, None, "ok")


def test_a_reward_of_weight_zero_leaves_the_verdict_to_those_that_count():
    only = total(Score(0.0, {"logged": 0.5}, None, "ok"), {"logged": 0.0})  # a judge's score may be added to it
    assert (only.reward, only.status) == (0.0, "ok")
    beside = total(Score(0.0, {"logged": 0.5, "counted": math.nan}, None, "ok"), {"logged": 0.0, "counted": 1.0})
    assert math.isnan(beside.reward) and beside.status == "invalid"


def test_the_overlong_penalty_counts_tokens():
    rules = rules_of(config.RewardsConfig(format=0.0, overlong=0.5, overlong_cache=4), max_completion=10)
    graded = [score(Candidate(RIGHT, "4", tokens=np.zeros(n, np.int32)), rules).reward for n in (1, 6, 7, 8, 10)]
    assert graded == [1.0, 1.0, 0.875, 0.75, 0.5]


class StubJudge:
    """Gives the verdicts of a script, the first submission last."""

    def __init__(self, verdicts):
        self._verdicts, self.asked, self.steps, self._first = iter(verdicts), [], 0, None

    def submit(self, question, answer, completion):
        self.asked.append((question, answer, completion))
        future, verdict = Future(), next(self._verdicts)
        if self._first is None:
            self._first = (future, verdict)
        else:
            future.set_result(verdict)
        return future

    def save(self):
        pass

    def release(self):
        self._first[0].set_result(self._first[1])

    def start_step(self):
        self.steps += 1

    def close(self):
        self.release()


def test_the_judge_is_blended_and_no_verdict_is_never_zero(monkeypatch):
    judge = StubJudge([Judgement(0.25), Judgement(None, "the server is down"), Judgement(0.0), Judgement(1.0)])
    monkeypatch.setattr(verifier_module, "Judge", lambda *_: judge)
    settings = config.RewardsConfig(format=0.0, judge=config.JudgeConfig(weight=2.0, model="m"), workers=1)
    with Verifier(settings) as verifier:
        verifier.start_step(1)
        futures = [verifier.submit(Candidate(RIGHT, "4", "<", "q")) for _ in range(3)]
        second, third = futures[1].result(timeout=60), futures[2].result(timeout=60)
        time.sleep(0.1)
        assert not futures[0].done()  # its judge has not replied, and its place is kept
        judge.release()
        first = futures[0].result(timeout=60)
        judged = verifier.judgements
        verifier.start_step(2)
        assert (len(judged), verifier.judgements) == (3, [])  # those of a step, which may be counted later
        metrics = verifier.statistics([first, second, third], judged)
        checked = verifier.check_answer(Candidate(RIGHT, "4")).result(timeout=60)
        judge._first = (Future(), None)
    assert judge.asked == [("q", "4", "<" + RIGHT)] * 3 and judge.steps == 2
    assert first.rewards == {"accuracy": 1.0, "judge": 0.25} and first.reward == 1.5 and first.status == "ok"
    assert third.rewards == {"accuracy": 1.0, "judge": 0.0} and third.reward == 1.0
    assert math.isnan(second.reward) and math.isnan(second.rewards["judge"]) and second.status == "invalid"
    assert second.detail == "the server is down"
    assert metrics["verifier/invalid_frac"] == pytest.approx(1 / 3) and metrics["judge/invalid_frac"] > 0
    assert checked.rewards == {"accuracy": 1.0} and checked.reward == 1.0  # evaluation never asks the judge


def test_the_judge_alone(monkeypatch):
    monkeypatch.setattr(verifier_module, "Judge", lambda *_: judge)
    judge = StubJudge([Judgement(0.0), Judgement(0.75)])
    settings = config.RewardsConfig(
        accuracy=0.0, format=0.0, judge=config.JudgeConfig(weight=1.0, model="m"), workers=1
    )
    with Verifier(settings) as verifier:
        verifier.submit(Candidate("abc", "4"))
        graded = verifier.submit(Candidate("abc", "4")).result(timeout=60)
    assert graded.reward == 0.75 and graded.rewards == {"judge": 0.75} and graded.status == "ok"


def test_the_pool_says_what_the_function_says(verifier):
    cases = [Candidate(f"{i}</think><answer>{i}</answer>", str(i + i % 2), "<think>") for i in range(60)]
    cases.append(Candidate("?", "1"))
    futures = [verifier.submit(case) for case in cases]
    for case, future in zip(cases, futures, strict=True):
        graded = future.result(timeout=30)
        assert graded.seconds > 0
        assert dataclasses.replace(graded, seconds=0.0) == score(case, Rules({"accuracy": 1.0, "format": 0.5}))


def fake_call(function, candidate, rules):
    """Stands in for what a worker runs."""
    if candidate.text == "hang":
        while True:
            pass
    if candidate.text == "modules":
        return sorted(name for name in sys.modules if name in ("jax", "sympy", "igrpo_jax.rewards.mathematics.grader"))
    if candidate.text == "fail":
        raise RuntimeError("a bug in the grader")
    return function(candidate, rules)


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(verifier_module, "Pool", lambda function, *args, **options: Pool(fake_call, *args, **options))


@pytest.mark.slow
def test_a_verdict_of_the_judge_alone_is_no_reward_where_the_grading_failed(faked, monkeypatch):
    """It would be a part of the sum that others of the group have."""
    judge = StubJudge([Judgement(1.0), Judgement(0.75)])
    monkeypatch.setattr(verifier_module, "Judge", lambda *_: judge)
    settings = config.RewardsConfig(format=0.0, judge=config.JudgeConfig(weight=1.0, model="m"), workers=1)
    with Verifier(settings) as verifier:
        verifier.submit(Candidate(RIGHT, "4"))  # whose judge replies last
        failed = verifier.submit(Candidate("fail", "4")).result(timeout=60)
    assert failed.status == "error" and math.isnan(failed.reward)
    assert failed.rewards == {"accuracy": pytest.approx(math.nan, nan_ok=True), "judge": 0.75}


def test_submit_does_not_wait(faked):
    with Verifier(config.RewardsConfig(workers=1, timeout=60.0)) as verifier:
        first = verifier.submit(Candidate("hang", "4"))
        futures = [verifier.submit(Candidate(RIGHT, str(i))) for i in range(130)]
        assert not any(future.done() for future in (first, *futures))
    assert {future.result(timeout=1).status for future in (first, *futures)} == {"error"}


def test_equal_completions_are_graded_once(faked, monkeypatch):
    """All that a grading reads counts: texts, answer, tokens, and which rewards are asked. Failures are repeated."""
    monkeypatch.setattr(verifier_module, "REMEMBERED", 3)
    with Verifier(config.RewardsConfig(overlong=1.0, overlong_cache=2, workers=1), max_completion=4) as verifier:
        sent, submit = [], verifier._pool.submit
        monkeypatch.setattr(verifier._pool, "submit", lambda *args: sent.append(args[1].text) or submit(*args))
        one = Candidate(RIGHT, "4", tokens=np.zeros(4, np.int32))
        short = dataclasses.replace(one, tokens=np.zeros(2, np.int32), sample_id=1)
        other = dataclasses.replace(one, answer="5")
        futures = [verifier.submit(each) for each in (one, one, short, other, short, one)]
        assert [future.result(timeout=60).reward for future in futures] == [1.0, 1.0, 2.0, 0.0, 2.0, 1.0]
        assert len(sent) == 3 and verifier.check_answer(one).result(timeout=60).reward == 1.0
        assert len(sent) == 4 and verifier.submit(one).result(timeout=60).reward == 1.0
        assert (
            len(sent) == 4 and verifier.submit(other).result(timeout=60).reward == 0.0
        )  # the least recent one is gone
        assert len(sent) == 5
        another = dataclasses.replace(other, question="?", columns={"level": 1})  # columns are not read
        for tokens in (other.tokens, other.tokens + 1):
            verifier.submit(dataclasses.replace(another, tokens=tokens)).result(timeout=60)
        assert len(sent) == 7
        for _ in range(2):
            assert verifier.submit(Candidate("fail", "4")).result(timeout=60).status == "error"
        assert sent[7:] == ["fail"] * 2


def test_a_worker_has_imported_the_grader_before_its_first_item(faked):
    # In seconds that no item's deadline pays for.
    with Verifier(config.RewardsConfig(workers=1, timeout=30.0)) as verifier:
        outcome = verifier._pool.submit(None, Candidate("modules", "4"), None).result(timeout=60)
    assert outcome.value == ["igrpo_jax.rewards.mathematics.grader", "sympy"]


@pytest.mark.slow
def test_timeouts_and_errors_are_no_verdict_and_wrong_in_an_evaluation(faked):
    before = set(multiprocessing.active_children())
    with Verifier(config.RewardsConfig(workers=1, timeout=3.0)) as verifier:
        futures = [verifier.submit(Candidate(text, "4")) for text in (RIGHT, "hang", "fail", RIGHT)]
        scores = [future.result(timeout=30) for future in futures]
        evaluated = verifier.check_answer(Candidate("fail", "4")).result(timeout=30)
        pending = verifier.submit(Candidate("hang", "4"))
    nothing = {"accuracy": math.nan, "format": math.nan}
    assert [(s.status, s.reward) for s in scores[::3]] == [("ok", 2.0)] * 2
    hung = Score(math.nan, nothing, None, "timeout", 3.0, "no result within 3.0 s")
    np.testing.assert_equal(dataclasses.asdict(scores[1]), dataclasses.asdict(hung))  # unlike ==, NaN equals NaN
    failed = Score(math.nan, nothing, None, "error", detail="RuntimeError: a bug in the grader")
    np.testing.assert_equal(dataclasses.asdict(scores[2]) | {"seconds": 0.0}, dataclasses.asdict(failed))
    assert not scores[2].is_right
    wrong = dataclasses.replace(failed, reward=0.0, rewards={"accuracy": 0.0})
    assert dataclasses.replace(evaluated, seconds=0.0) == wrong
    assert pending.result(timeout=1).status == "error"  # closed before it was graded
    assert set(multiprocessing.active_children()) <= before


def test_statistics():
    seconds = [i / 1000 for i in range(1, 101)]
    statuses = ["timeout"] * 5 + ["error"] * 10 + ["unparseable"] * 20 + ["invalid"] * 3 + ["ok"] * 62
    scores = [Score(0.0, {}, None, status, s) for status, s in zip(statuses, reversed(seconds), strict=True)]
    assert statistics(scores) == {
        "verifier/timeout_frac": 0.05,
        "verifier/error_frac": 0.1,
        "verifier/unparseable_frac": 0.2,
        "verifier/invalid_frac": 0.03,
        "verifier/latency_p50": 0.05,  # the 50th smallest of 100, not the 51st
        "verifier/latency_p99": 0.099,
    }
    assert statistics(scores[:1])["verifier/latency_p50"] == 0.1
    assert set(statistics([]).values()) == {0.0}


def test_errors_stop_the_run():
    failed = [Score(0.0, {}, None, "timeout"), Score(0.0, {}, None, "error", detail="no memory")]
    failed.append(Score(math.nan, {}, None, "invalid"))
    wrong = [Score(0.0, {}, None, "unparseable"), Score(0.0, {}, "1", "ok")]
    check_errors(failed + wrong, 0.6)  # at the limit, not over it
    check_errors(wrong * 10, 0.0)  # a wrong answer is no failure
    check_errors([], 0.0)
    stated = r"of 4 gradings 1 timed out, 1 failed and 1 have no verdict.*rewards\.max_error_fraction.*first: no memory"
    with pytest.raises(VerifierError, match=stated):
        check_errors(failed + wrong[:1], 0.5)
    unjudged = Score(math.nan, {"accuracy": 1.0, "judge": math.nan}, "1", "invalid", detail="connection failed")
    stated = r"\. The first: the judge of config\.rewards\.judge \(base_url, .*\) gave none: connection failed"
    with pytest.raises(VerifierError, match=stated) as caught:
        check_errors([*failed, unjudged], 0.5)
    assert not caught.value.comes_again


@pytest.mark.parametrize("detail", ["MemoryError: ", "RuntimeError: can't start new thread"])
def test_the_limit_of_memory_is_named_where_gradings_failed_at_it(detail):
    late = [Score(0.0, {}, None, "timeout", detail="late"), Score(0.0, {}, None, "error", detail=f"m:f: {detail}")]
    stated = r"; if a reward needs more memory than config\.rewards\.memory_gib, raise that"
    with pytest.raises(VerifierError, match=rf"The first: m:f: {detail}{stated}$"):
        check_errors(late[1:], 0.5)
    with pytest.raises(VerifierError, match=rf"The first: late{stated}\. A larger config\.rewards\.timeout"):
        check_errors(late, 0.5)


def test_rewards_that_return_none_too_often_are_named_with_the_fix():
    """The same command, which was named as the way to go on, came to the same end."""
    none = Score(math.nan, {"custom": math.nan}, None, "invalid", detail="every reward function returned None")
    stated = r"Every reward function returned None for 2 of them: return .*raise config\.rewards\.max_error_fraction$"
    with pytest.raises(VerifierError, match=stated) as caught:
        check_errors([none, none, Score(math.nan, {}, None, "timeout")], 0.5)
    assert caught.value.comes_again
    with pytest.raises(VerifierError, match="The first: every reward") as caught:
        check_errors([none, Score(math.nan, {}, None, "error")], 0.5)
    assert not caught.value.comes_again


def test_latency_is_that_of_the_worker():
    graded = score(Candidate(RIGHT, "4"), Rules(BOTH))
    assert verifier_module._to_score(Outcome("ok", graded, seconds=0.25), Rules(BOTH)).seconds == 0.25
