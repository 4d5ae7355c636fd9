"""What travels between processes arrives as it was, and groups keep their positions, whichever process made them."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.learning import exchange
from igrpo_jax.learning.exchange import RolloutPart, StepPosition, all_gather_parts, from_bytes, to_bytes
from igrpo_jax.records import Completion, Group, Prompt, Score
from igrpo_jax.rewards.judge import Judgement
from igrpo_jax.sampling.requests import Usage

# The prompts of a step with three positions, and those of its first redraw.
PROMPTS = [
    [Prompt(f"{n}.{i}", i, "1+2", "3", np.array([n, i], np.int32), {"x": {1}}) for i in range(3)] for n in (0, 1)
]


def completion(stage, number, length, **score):
    draw = np.random.default_rng([number, length])
    tokens = draw.integers(0, 1 << 17, length, dtype=np.int32)
    logprobs = draw.normal(size=length).astype(np.float32)
    graded = Score(**{"reward": 0.1 + 0.2, "rewards": {"accuracy": 1.0}, "extracted": "3", "status": "ok"} | score)
    return Completion(stage, number, tokens, logprobs, length > 2, "é\ud800 \x1b[1m</answer>", graded)


def process_rollout():
    drafts = tuple(completion("draft", i, length) for i, length in enumerate((1, 3)))
    unknown = {
        "reward": math.nan,
        "rewards": {"judge": math.nan},
        "extracted": None,
        "status": "invalid",
        "detail": "é",
        "logged": {"words": [1.0, 0.5]},
        "extra": {"why": "\ud800", "count": 3, "none": None, "yes": True},
    }
    refined = (completion("refine", 0, 5), completion("refine", 1, 2, **unknown))
    context = np.arange(7, dtype=np.int32)
    groups = {
        StepPosition(2): Group(PROMPTS[0][2], drafts, 1, context, refined),
        StepPosition(0, redraw=1): Group(PROMPTS[1][0], (), None, PROMPTS[1][0].tokens, refined),
    }
    scores = [one.score for one in refined]
    judged = [Judgement(None, "no answer", requests=3, seconds=0.5), Judgement(0.25, cached=True)]
    return RolloutPart(groups, 2, 1, scores, 11, 12, judged, Usage(1, 2, 3, 4, 5), 1.5, 0.125, 0.25)


def check_same(one, other):
    """Field by field: arrays by dtype and values, NaN equal to NaN."""
    assert type(one) is type(other)
    if hasattr(one, "__dataclass_fields__"):
        for field in fields(one):
            check_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            check_same(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            check_same(mine, theirs)
    else:
        assert one == other or (one != one and other != other)


def test_it_arrives_as_it_was():
    sent = process_rollout()
    received = from_bytes(to_bytes(sent), PROMPTS.__getitem__)
    check_same(received, sent)
    assert received.groups[2, 0].prompt is PROMPTS[0][2] and received.groups[0, 1].prompt is PROMPTS[1][0]
    nothing = replace(sent, groups={}, scores=[], judgements=[])
    check_same(from_bytes(to_bytes(nothing), PROMPTS.__getitem__), nothing)


def test_arrays_keep_their_dtype_and_may_be_empty():
    """A completion without tokens is sent too: the library reads arrays from buffers, and this one is empty."""
    empty = Completion(
        "refine", 0, np.zeros(0, np.int32), np.zeros(0, np.float32), False, "", Score(0.0, {}, None, "ok")
    )
    group = Group(PROMPTS[0][1], (), None, np.zeros(0, np.int32), (empty,))
    sent = replace(process_rollout(), groups={StepPosition(1): group})
    check_same(from_bytes(to_bytes(sent), PROMPTS.__getitem__), sent)


@pytest.mark.parametrize("text", ["", "\ud800", "a\udfffb", "\U0001f600", "\x00\x1b", "é" * 70_000])
def test_texts_arrive_as_they_were(text):
    """A lone surrogate is no UTF-8, and MessagePack refuses it. A detail or an extracted answer may hold one too."""
    score = Score(0.0, {"accuracy": 0.0}, text, "error", detail=text)
    completions = (replace(completion("refine", 0, 2), text=text, score=score),)
    group = Group(PROMPTS[0][1], (), None, np.arange(3, dtype=np.int32), completions)
    judged = [Judgement(None, text)]
    sent = replace(process_rollout(), groups={StepPosition(1): group}, scores=[score], judgements=judged)
    check_same(from_bytes(to_bytes(sent), PROMPTS.__getitem__), sent)


def test_the_integer_that_randomness_comes_of():
    """Of a step with 6 prompts; runs that are resumed rely on it."""
    assert [
        StepPosition(2).random_index(6),
        StepPosition(2, 1).random_index(6),
        StepPosition(0, 3).random_index(6),
    ] == [*(2, 8, 18)]


def test_one_process_sends_nothing(monkeypatch):
    monkeypatch.setattr(exchange.cluster, "gather", None)
    mine = process_rollout()
    assert all_gather_parts(mine, PROMPTS.__getitem__)[0] is mine
    with pytest.raises(Preempted):
        all_gather_parts(None, PROMPTS.__getitem__)


def test_where_one_process_was_told_to_leave_all_leave(monkeypatch):
    monkeypatch.setattr(exchange.jax, "process_count", lambda: 2)
    other = [to_bytes(process_rollout())]
    monkeypatch.setattr(exchange.cluster, "gather", lambda data: [data, *other])
    assert len(all_gather_parts(process_rollout(), PROMPTS.__getitem__)) == 2
    with pytest.raises(Preempted):
        all_gather_parts(None, PROMPTS.__getitem__)
    other[:] = [b""]
    with pytest.raises(Preempted):
        all_gather_parts(process_rollout(), PROMPTS.__getitem__)
