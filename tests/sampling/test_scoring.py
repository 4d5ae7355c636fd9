"""Sampling and scoring at once: each sample is scored once, its request's callback gets it, and may ask for more."""

import functools
import itertools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from igrpo_jax.config import RewardsConfig
from igrpo_jax.distributed import preemption
from igrpo_jax.records import Prompt, Score
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.sampling.requests import Request, Sample
from igrpo_jax.sampling.scoring import sample_and_score, stage_key

KEY = np.array([3, 4], np.uint32)
RENDERER = SimpleNamespace(text=lambda tokens: f"text {tokens[0]}", opening="<think>")


class StubScheduler:
    """Draws one sample per `advance`; its only token says which of all samples it is."""

    def __init__(self):
        self.waiting, self.numbers = [], itertools.count()

    def submit(self, request):
        self.waiting += [(request, request.first + i) for i in range(request.samples)]

    leads = True

    @property
    def pending(self):
        return bool(self.waiting)

    @property
    def demand(self):
        return len(self.waiting)

    def advance(self):
        request, sample_id = self.waiting.pop(0)
        number = next(self.numbers)
        tokens, logprobs = np.array([number], np.int32), np.array([-number], np.float32)
        return [Sample(request, sample_id, tokens, logprobs, finished=number % 2 == 0, entropy=number / 2)]


class SlowScheduler(StubScheduler):
    """Draws all that waits in each `advance`, which takes `seconds`."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.dispatches = seconds, []

    def advance(self):
        time.sleep(self.seconds)
        samples = [sample for _ in range(self.demand) for sample in super(SlowScheduler, self).advance()]
        self.dispatches.append(sorted((sample.request.stage, sample.request.index) for sample in samples))
        return samples


def request(index, samples, scored, **fields):
    prompt = Prompt(f"row {index}", index, f"question {index}", "7", np.zeros(2, np.int32), {"level": index})
    fields = {"stage": "draft", **fields}
    return Request(prompt.tokens, index, samples, KEY, 4, prompt=prompt, scored=scored, **fields)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_each_callback_gets_its_own_completions_with_their_scores(pool):
    scheduler, told, candidates = StubScheduler(), {0: [], 1: []}, []

    def grade(candidate, batch) -> Future:
        candidates.append(candidate)
        return pool.submit(lambda: Score(float(candidate.tokens[0]), {}, None, "ok"))

    scheduler.submit(request(0, 3, told[0].append))
    scheduler.submit(request(1, 2, told[1].append, stage="refine", first=5))
    assert sample_and_score(scheduler, grade, RENDERER) >= 0
    assert sorted(done.sample_id for done in told[0]) == [0, 1, 2] and {done.stage for done in told[0]} == {"draft"}
    assert sorted(done.sample_id for done in told[1]) == [5, 6] and {done.stage for done in told[1]} == {"refine"}
    for done in (*told[0], *told[1]):
        (number,) = done.tokens
        assert done.score.reward == number and done.text == f"text {number}"
        assert (done.logprobs, done.finished, done.entropy) == (-number, number % 2 == 0, number / 2)
    assert [(seen.question, seen.answer, seen.opening, seen.columns["level"]) for seen in candidates] == [
        *[("question 0", "7", "<think>", 0)] * 3,
        *[("question 1", "7", "<think>", 1)] * 2,
    ]


def test_each_request_has_a_batch_of_its_own(pool):
    """Samples of requests that run at once arrive mixed; two requests of one prompt have two batches."""
    scheduler, given, told = StubScheduler(), [], []

    def grade(candidate, batch) -> Future:
        given.append((candidate.question, candidate.sample_id, batch))
        return pool.submit(Score, 1.0, {}, None, "ok")

    scheduler.submit(request(0, 3, told.append))
    scheduler.submit(request(1, 2, told.append, first=5))
    scheduler.submit(request(0, 1, told.append, first=3))
    scheduler.waiting = [scheduler.waiting[i] for i in (3, 0, 5, 2, 4, 1)]
    sample_and_score(scheduler, grade, RENDERER)
    assert [(question, sample_id, batch.size) for question, sample_id, batch in given] == [
        ("question 1", 5, 2),
        ("question 0", 0, 3),
        ("question 0", 3, 1),
        ("question 0", 2, 3),
        ("question 1", 6, 2),
        ("question 0", 1, 3),
    ]
    batches = [batch for *_, batch in given]
    assert len({id(batch) for batch in batches}) == 3
    assert batches[0] is batches[4] and batches[1] is batches[3] is batches[5]


def of_group(completions, **columns):
    """A custom reward that tells the batch's size, each place in it, and which text is the last one by the alphabet."""
    last = max(completions)
    return [10.0 * len(completions) + (text == last) + place / 8 for place, text in enumerate(completions)]


@pytest.mark.slow
def test_a_custom_reward_sees_the_completions_of_each_request():
    scheduler, told = StubScheduler(), {0: [], 1: []}
    scheduler.submit(request(0, 3, told[0].append))
    scheduler.submit(request(1, 2, told[1].append, first=5))
    scheduler.waiting = [scheduler.waiting[i] for i in (4, 1, 0, 3, 2)]
    settings = RewardsConfig(accuracy=0.0, format=0.0, custom=f"{__name__}:of_group", workers=1, timeout=60.0)
    with Verifier(settings) as verifier:
        sample_and_score(scheduler, verifier.submit, RENDERER)
    rewards = {index: {done.sample_id: done.score.reward for done in scored} for index, scored in told.items()}
    assert rewards == {0: {0: 30.0, 1: 30.125, 2: 31.25}, 1: {5: 21.0, 6: 20.125}}


def test_a_callback_may_ask_for_more_after_the_queue_is_empty(pool):
    """Red if the loop ended with the queue: the last score of Stage 1 is what brings Stage 2."""
    scheduler, told = StubScheduler(), []

    def scored(completion):
        told.append(completion.sample_id)
        if len(told) < 4:
            scheduler.submit(request(0, 1, scored, first=len(told)))

    scheduler.submit(request(0, 1, scored))
    sample_and_score(scheduler, lambda candidate, batch: pool.submit(Score, 1.0, {}, None, "ok"), RENDERER)
    assert told == [0, 1, 2, 3]


def test_a_dispatch_waits_for_scores_that_bring_most_of_its_samples(pool):
    """The scores come one after another: red if the first one's refinement were drawn alone."""
    scheduler, began = SlowScheduler(0.6), time.perf_counter()
    refine = lambda completion: scheduler.submit(request(int(completion.tokens[0]), 1, print, stage="refine"))

    def grade(candidate, batch) -> Future:
        return pool.submit(lambda: time.sleep(0.05 * candidate.tokens[0]) or Score(1.0, {}, None, "ok"))

    for index in range(4):
        scheduler.submit(request(index, 1, refine, may_follow_up=lambda: True))
    waited = sample_and_score(scheduler, grade, RENDERER)
    drafts, refinements = ([(stage, index) for index in range(4)] for stage in ("draft", "refine"))
    assert scheduler.dispatches == [drafts, refinements] and 0.1 < waited < time.perf_counter() - began


def test_a_dispatch_does_not_wait_for_a_score_that_takes_long():
    """The score of one draft comes after that of another's refinement: red if all scores were waited for."""
    scheduler, futures = SlowScheduler(0.01), []

    def end(future):
        if not future.done():
            future.set_result(Score(1.0, {}, None, "ok"))

    def grade(candidate, batch) -> Future:
        futures.append(Future())
        if len(futures) == 1:  # ends the test also where it fails
            threading.Timer(5, end, (futures[0],)).start()
        else:
            end(futures[-1])
        if len(futures) > 2:
            end(futures[0])
        return futures[-1]

    for index in range(2):
        refine = functools.partial(lambda i, _: scheduler.submit(request(i, 1, print, stage="refine")), index)
        scheduler.submit(request(index, 1, refine, may_follow_up=lambda: True))
    sample_and_score(scheduler, grade, RENDERER)
    assert scheduler.dispatches == [[("draft", 0), ("draft", 1)], [("refine", 1)], [("refine", 0)]]


@pytest.mark.slow
def test_a_notice_ends_it_while_it_waits_for_the_verifier(monkeypatch):
    """The future never ends: red if the wait for a verdict did not look for a notice."""
    scheduler, checks = StubScheduler(), itertools.count()

    def check():
        if next(checks) > 2:
            raise preemption.Preempted

    monkeypatch.setattr(preemption, "check", check)
    scheduler.submit(request(0, 1, print))
    with pytest.raises(preemption.Preempted):
        sample_and_score(scheduler, lambda candidate, batch: Future(), RENDERER)


def test_nothing_waits_for_samples_that_are_never_drawn(monkeypatch):
    """A notice comes after two of three samples: red if their futures waited for the third one."""
    scheduler, checks, futures = StubScheduler(), itertools.count(), []

    def check():
        if next(checks) == 2:
            raise preemption.Preempted

    monkeypatch.setattr(preemption, "check", check)
    scheduler.submit(request(0, 3, print))
    settings = RewardsConfig(accuracy=0.0, format=0.0, custom=f"{__name__}:of_group", workers=1)

    def grade(candidate, batch) -> Future:
        futures.append(verifier.submit(candidate, batch))
        return futures[-1]

    with Verifier(settings) as verifier:
        with pytest.raises(preemption.Preempted):
            sample_and_score(scheduler, grade, RENDERER)
        assert [future.result(timeout=1).status for future in futures] == ["error", "error"]


def test_the_keys_of_stages_differ():
    keys = {stage_key(seed, step, stage).tobytes() for seed in (0, 1) for step in range(9) for stage in (0, 1, 2)}
    assert len(keys) == 54 and stage_key(0, 0, 0).shape == (2,) and stage_key(0, 0, 0).dtype == np.uint32
