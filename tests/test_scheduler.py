"""Scheduling: the same samples whatever the slots, dispatches, order, neighbours and mesh; each sample exactly once."""

import jax
import numpy as np
import pytest

from igrpo_jax import config, sharding
from igrpo_jax.config import InputError
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.sampling.scheduler import Request, Scheduler
from igrpo_jax.sampling.steps import Sampling

EOS = (0, 17, 40)
KEY = np.array([3, 4], np.uint32)
SAMPLING = Sampling(0.9, 0.95)


def make_engine(c, slots, steps_per_dispatch, mesh):
    sizes = {"slots": slots, "max_context": 110, "max_completion": 24, "steps_per_dispatch": steps_per_dispatch}
    return Engine(c, mesh, EOS, dtype="float32", **sizes)


def requests():
    """More samples than slots, prompts on both sides of a bucket's edge, and limits of their own.

    A cache of 110 + 24 positions and more is read in buckets of 128 and all: the longest prompt crosses from one to
    the other while it is sampled.
    """
    rng = np.random.default_rng(0)
    shape = {32: (5, 24), 33: (1, 24), 110: (4, 24), 7: (11, 9), 1: (2, 1)}
    return [
        Request(rng.integers(0, 64, length, np.int32), index, samples, KEY, limit, tag=f"tag {index}")
        for index, (length, (samples, limit)) in enumerate(shape.items())
    ]


def start(engine, tiny):
    params = {path: jax.device_put(x, sharding.param_sharding(engine.mesh, path)) for path, x in tiny[1].items()}
    scheduler = Scheduler(engine)
    scheduler.start(params, SAMPLING)
    return scheduler


def sample(engine, tiny, wanted):
    with jax.set_mesh(engine.mesh):
        scheduler = start(engine, tiny)
        for request in wanted:
            scheduler.submit(request)
        return list(scheduler.drain()), scheduler


def one_device():
    return sharding.make_mesh(config.Mesh(), jax.devices()[:1])


@pytest.fixture(scope="module")
def engine(tiny):
    return make_engine(tiny[0], 8, 16, one_device())


@pytest.fixture(scope="module")
def expected(engine, tiny):
    return sample(engine, tiny, requests())


def check_same(samples, expected):
    """Token ids are equal; log-probs up to the rounding of attention over more or fewer cache positions."""
    assert len(samples) == len(expected)
    by_id = {(one.request.index, one.sample_id): one for one in samples}
    for one in expected:
        other = by_id[one.request.index, one.sample_id]
        np.testing.assert_array_equal(other.tokens, one.tokens)
        np.testing.assert_allclose(other.logprobs, one.logprobs, atol=1e-4, rtol=0)
        assert other.finished == one.finished


def test_each_sample_comes_once_with_its_tag(expected):
    samples, _ = expected
    ids = [(one.request.index, one.sample_id) for one in samples]
    assert sorted(ids) == [(request.index, i) for request in requests() for i in range(request.samples)]
    assert all(one.request.tag == f"tag {one.request.index}" for one in samples)
    assert ids != sorted(ids)  # as they finish: not in order
    assert {len(one.tokens) for one in samples if one.request.index == 4} == {1}
    assert max(len(one.tokens) for one in samples if one.request.index == 3) == 9
    assert any(not one.finished for one in samples) and any(one.finished for one in samples)


@pytest.mark.parametrize(("slots", "steps_per_dispatch"), [(1, 16), (3, 5), (8, 1)])
def test_samples_do_not_depend_on_slots_or_dispatches(tiny, expected, slots, steps_per_dispatch):
    engine = make_engine(tiny[0], slots, steps_per_dispatch, one_device())
    check_same(sample(engine, tiny, requests())[0], expected[0])


def test_samples_do_not_depend_on_order(engine, tiny, expected):
    check_same(sample(engine, tiny, requests()[::-1])[0], expected[0])


def test_samples_do_not_depend_on_neighbours_or_on_when_they_were_queued(engine, tiny, expected):
    """Each prompt is submitted while the one before it is being sampled, into slots that others have used."""
    with jax.set_mesh(engine.mesh):
        scheduler, samples = start(engine, tiny), []
        for request in requests():
            scheduler.submit(request)
            samples += scheduler.advance()
        samples += scheduler.drain()
        alone = requests()[2]
        scheduler.submit(alone)
        again = list(scheduler.drain())
    check_same(samples, expected[0])
    check_same(again, [one for one in expected[0] if one.request.index == alone.index])


def test_samples_do_not_depend_on_the_mesh(tiny, expected):
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    check_same(sample(make_engine(tiny[0], 8, 8, mesh), tiny, requests())[0], expected[0])


def test_usage(engine, expected):
    """A prompt is prefilled once, not once a sample; the first token of a sample comes of its prompt's last logits."""
    samples, scheduler = expected
    usage = scheduler.usage
    assert usage.tokens == sum(len(one.tokens) - 1 for one in samples)
    assert usage.slot_steps % engine.slots == 0
    assert usage.slot_utilization == usage.tokens / usage.slot_steps
    assert 0.3 < usage.slot_utilization <= 1


@pytest.mark.parametrize(
    ("length", "limit", "said"), [(111, 24, "111 + 24"), (0, 24, "0 + 24"), (110, 25, "110 + 25"), (5, 0, "5 + 0")]
)
def test_a_request_that_does_not_fit(engine, length, limit, said):
    scheduler = Scheduler(engine)
    with pytest.raises(InputError) as caught:
        scheduler.submit(Request(np.zeros(length, np.int32), 6, 1, KEY, limit))
    message = str(caught.value)
    assert message.startswith(f"prompt 6: {said} tokens do not fit the cache of 110 + 24")
    for field in ("data.max_prompt_length", "refine.max_draft_length", "rollout.max_completion_length"):
        assert f"config.{field}" in message
    assert not scheduler.pending


def test_no_samples_are_no_work(engine, tiny):
    scheduler = Scheduler(engine)
    scheduler.submit(Request(np.zeros(3, np.int32), 0, 0, KEY, 4))
    assert not scheduler.pending
    assert list(scheduler.drain()) == scheduler.advance() == []


def test_a_phase_does_not_begin_in_another(engine, tiny):
    """Its weights would change in the middle of a sample."""
    scheduler = start(engine, tiny)
    scheduler.submit(requests()[0])
    with pytest.raises(AssertionError):
        scheduler.start({}, SAMPLING)
