"""Sampling and scoring at once: each sample is scored once, its request's callback gets it, and may ask for more."""

import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from igrpo_jax.distributed import preemption
from igrpo_jax.records import Prompt, Score
from igrpo_jax.sampling.scheduler import Request, Sample
from igrpo_jax.sampling.scoring import sample_and_score, stage_key

KEY = np.array([3, 4], np.uint32)
RENDERER = SimpleNamespace(text=lambda tokens: f"text {tokens[0]}", opening="<think>")


class StubScheduler:
    """Draws one sample per `advance`; its only token says which of all samples it is."""

    def __init__(self):
        self.waiting, self.numbers = [], itertools.count()

    def submit(self, request):
        self.waiting += [(request, request.first + i) for i in range(request.samples)]

    @property
    def pending(self):
        return bool(self.waiting)

    def advance(self):
        request, sample_id = self.waiting.pop(0)
        tokens = np.array([next(self.numbers)], np.int32)
        return [Sample(request, sample_id, tokens, np.zeros(1, np.float32), True)]


def request(index, samples, scored, stage="draft", first=0):
    prompt = Prompt(f"row {index}", index, f"question {index}", "7", np.zeros(2, np.int32), {"level": index})
    return Request(prompt.tokens, index, samples, KEY, 4, stage=stage, first=first, prompt=prompt, scored=scored)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_each_callback_gets_its_own_completions_with_their_scores(pool):
    scheduler, told, candidates = StubScheduler(), {0: [], 1: []}, []

    def grade(candidate) -> Future:
        candidates.append(candidate)
        return pool.submit(lambda: Score(float(candidate.tokens[0]), {}, None, "ok"))

    scheduler.submit(request(0, 3, told[0].append))
    scheduler.submit(request(1, 2, told[1].append, stage="refine", first=5))
    assert sample_and_score(scheduler, grade, RENDERER) >= 0
    assert sorted(done.sample_id for done in told[0]) == [0, 1, 2] and {done.stage for done in told[0]} == {"draft"}
    assert sorted(done.sample_id for done in told[1]) == [5, 6] and {done.stage for done in told[1]} == {"refine"}
    for done in (*told[0], *told[1]):
        assert done.score.reward == done.tokens[0] and done.text == f"text {done.tokens[0]}" and done.finished
    assert [(seen.question, seen.answer, seen.opening, seen.columns["level"]) for seen in candidates] == [
        *[("question 0", "7", "<think>", 0)] * 3,
        *[("question 1", "7", "<think>", 1)] * 2,
    ]


def test_a_callback_may_ask_for_more_after_the_queue_is_empty(pool):
    """Red if the loop ended with the queue: the last score of Stage 1 is what brings Stage 2."""
    scheduler, told = StubScheduler(), []

    def scored(completion):
        told.append(completion.sample_id)
        if len(told) < 4:
            scheduler.submit(request(0, 1, scored, first=len(told)))

    scheduler.submit(request(0, 1, scored))
    sample_and_score(scheduler, lambda candidate: pool.submit(Score, 1.0, {}, None, "ok"), RENDERER)
    assert told == [0, 1, 2, 3]


def test_a_notice_ends_it_while_it_waits_for_the_verifier(monkeypatch):
    """The future never ends: red if the wait for a verdict did not look for a notice."""
    scheduler, checks = StubScheduler(), itertools.count()

    def check():
        if next(checks) > 2:
            raise preemption.Preempted

    monkeypatch.setattr(preemption, "check", check)
    scheduler.submit(request(0, 1, print))
    with pytest.raises(preemption.Preempted):
        sample_and_score(scheduler, lambda candidate: Future(), RENDERER)


def test_the_keys_of_stages_differ():
    keys = {stage_key(seed, step, stage).tobytes() for seed in (0, 1) for step in range(9) for stage in (0, 1, 2)}
    assert len(keys) == 54 and stage_key(0, 0, 0).shape == (2,) and stage_key(0, 0, 0).dtype == np.uint32
