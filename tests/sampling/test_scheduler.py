"""Scheduling: the same samples whatever the slots, dispatches, order, neighbours and mesh; each sample exactly once."""

import dataclasses
import functools
import math

import devices
import engines
import jax
import numpy as np
import pytest
from processes import Started, ended, free_port

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.programs import Program
from igrpo_jax.errors import InputError
from igrpo_jax.records import Prompt
from igrpo_jax.sampling import shapes
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.shard import Shard
from igrpo_jax.sampling.state import Sampling

EOS = (0, 17, 40)
KEY = np.array([3, 4], np.uint32)
SAMPLING = Sampling(0.9, 0.95)


@functools.cache
def make_engine(c, slots, steps_per_dispatch, mesh, **pages):
    """All shapes have a program of their own, as those of a large model, although a step of this one does little."""
    sizes = {"slots": slots, "longest_prompt": 110, "max_completion": 24, "steps_per_dispatch": steps_per_dispatch}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "_hardly_more", lambda work: work)
        return engines.make_engine(c, mesh, EOS, dtype="float32", **sizes, **pages)


def requests():
    """More samples than slots, prompts on both sides of the edge of a page, and limits of their own.

    A cache of 110 + 24 positions has blocks up to 80 and 144: the prompt of 70 crosses from one to the other while it
    is sampled.
    """
    rng = np.random.default_rng(0)
    shape = {32: (5, 24), 33: (1, 24), 110: (4, 24), 7: (11, 9), 1: (2, 1), 70: (1, 24)}
    tokens = [rng.integers(0, 64, length, np.int32) for length in shape]
    return [
        Request(ids, index, samples, KEY, limit, prompt=Prompt(f"row {index}", index, "", "", ids))
        for index, (ids, (samples, limit)) in enumerate(zip(tokens, shape.values(), strict=True))
    ]


def start(engine, tiny, ahead=0):
    params = {path: jax.device_put(x, sharding.param_sharding(engine.mesh, path)) for path, x in tiny[1].items()}
    scheduler = Scheduler(engine, ahead)
    scheduler.start(params, SAMPLING)
    return scheduler


def sample(engine, tiny, wanted, ahead=0):
    with jax.set_mesh(engine.mesh):
        scheduler = start(engine, tiny, ahead)
        for request in wanted:
            scheduler.submit(request)
        return list(scheduler.drain()), scheduler


def all_free(scheduler):
    return all(shard.pool.free == shard.pool.count for shard in scheduler.shards)


def one_device():
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def engine(tiny):
    return make_engine(tiny[0], 8, 16, one_device())


@pytest.fixture(scope="module")
def expected(engine, tiny):
    return sample(engine, tiny, requests())


@pytest.mark.slow
@pytest.mark.parametrize(
    "slots, shards", [(8, 4), *(pytest.param(slots, 1, marks=pytest.mark.proof) for slots in (8, 64))]
)
def test_the_first_dispatch_needs_the_programs_that_are_named_for_it(tiny, slots, shards):
    """More samples than slots, fewer of them, and prompts that are prefilled side by side."""
    mesh = sharding.make_mesh(config.MeshConfig(data=shards), jax.devices()[:shards])
    engine = make_engine(tiny[0], slots, 16, mesh)
    samples, used = 3, []
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(engine.mesh):
        compiled = Program.compiled
        patch.setattr(Program, "compiled", lambda own, *shape: used.append(own.title(*shape)) or compiled(own, *shape))
        scheduler = start(engine, tiny)
        for request in requests():
            scheduler.submit(dataclasses.replace(request, samples=samples, limit=2))  # end with the first dispatch
        scheduler.advance()
    wanted = engine.first_program_shapes([len(request.tokens) for request in requests()], samples)
    named = [program.title(*shape) for program, shape in wanted]
    assert named[0].startswith("decode") and sorted(named) == sorted(set(used))
    assert engine.first_program_shapes([], 1) == []


def test_shapes_of_decoding_that_do_hardly_more_share_a_program(monkeypatch):
    """A step that reads 1,000 bytes of weights and 1 for each position: 300 does 1.04 times the work of 256, and 1.15
    times that of 128."""
    monkeypatch.setattr(shapes, "EXTRA_WORK_BYTES", 0)
    kept = lambda choice, work: shapes._worthwhile(choice, [work(*shape) for shape in choice])
    reads = lambda *lengths: [(4, length) for length in lengths]
    weights = lambda rows, read: 1000 + read
    assert kept(reads(128, 256, 300), weights) == reads(128, 300)
    assert kept(reads(192, 256), weights) == reads(256) and kept(reads(64), weights) == reads(64)
    assert kept([(1, 64), (2, 64), (4, 64)], lambda rows, read: 100 + 2 * rows**2) == [(2, 64), (4, 64)]
    every = reads(128, 200, 256)
    assert kept(every, lambda rows, read: read) == every
    monkeypatch.setattr(shapes, "MOST_DECODES", 2)
    assert kept(every, lambda rows, read: read) == reads(128, 256)  # 200 in place of 128 would add more
    monkeypatch.setattr(shapes, "MOST_DECODES", 3)
    # 2 rows that read 128 positions would cost least to go without, but those that read 64 may grow.
    work = {(2, 64): 1, (2, 128): 9, (4, 64): 8, (4, 128): 10}
    assert kept(list(work), lambda *shape: work[shape]) == [(2, 64), (2, 128), (4, 128)]


def test_chunks_that_a_cpu_reads_do_least_work_together(engine):
    """Against all ways to read so many tokens; of several that are the best, the largest chunk comes first."""
    sampler = engine.programs
    assert sampler.chunks == (64, 256, 896)
    of_cost = shapes._work(sampler.costs, "cpu")
    work = {size: round(of_cost(sampler.costs.prefill(size))) for size in sampler.chunks}

    @functools.cache
    def least(to_prefill):
        return min(work[size] + least(to_prefill - size) for size in sampler.chunks) if to_prefill > 0 else 0

    for to_prefill in (1, 64, 65, 130, 256, 257, 300, 500, 700, 896):
        chosen = engine.chunk_size(to_prefill)
        assert work[chosen] + least(to_prefill - chosen) == least(to_prefill)
        larger = [size for size in sampler.chunks if size > chosen]
        assert all(work[size] + least(to_prefill - size) > least(to_prefill) for size in larger)
    assert engine.chunk_size(5000) == engine.chunk_size(896)


def check_same(samples, expected):
    """Token ids are equal; log-probs up to the rounding of attention over more or fewer cache positions."""
    assert len(samples) == len(expected)
    by_id = {(one.request.index, one.sample_id): one for one in samples}
    for one in expected:
        other = by_id[one.request.index, one.sample_id]
        np.testing.assert_array_equal(other.tokens, one.tokens)
        np.testing.assert_allclose(other.logprobs, one.logprobs, atol=1e-4, rtol=0)
        assert other.finished == one.finished


@pytest.mark.slow
def test_each_sample_comes_once_with_its_request(expected):
    samples, _ = expected
    ids = [(one.request.index, one.sample_id) for one in samples]
    assert sorted(ids) == [(request.index, i) for request in requests() for i in range(request.samples)]
    assert all(sample.request.prompt.id == f"row {sample.request.index}" for sample in samples)
    assert ids != sorted(ids)  # as they finish: not in order
    assert {len(one.tokens) for one in samples if one.request.index == 4} == {1}
    assert max(len(one.tokens) for one in samples if one.request.index == 3) == 9
    assert any(not one.finished for one in samples) and any(one.finished for one in samples)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slots", "steps_per_dispatch", "page_size"),
    [(3, 5, 128), *(pytest.param(*each, marks=pytest.mark.proof) for each in ((1, 16, 64), (8, 1, 16)))],
)
def test_samples_do_not_depend_on_slots_dispatches_or_pages(tiny, expected, slots, steps_per_dispatch, page_size):
    engine = make_engine(tiny[0], slots, steps_per_dispatch, one_device(), page_size=page_size)
    samples, scheduler = sample(engine, tiny, requests())
    check_same(samples, expected[0])
    assert all_free(scheduler)


@pytest.mark.slow
def test_samples_do_not_depend_on_the_host_being_a_dispatch_behind(engine, tiny, expected):
    samples, scheduler = sample(engine, tiny, requests(), ahead=1)
    check_same(samples, expected[0])
    assert scheduler.usage.tokens == expected[1].usage.tokens
    assert not scheduler.pending and list(scheduler.drain()) == []


@pytest.mark.slow
def test_the_device_has_work_while_the_host_reads(engine, tiny):
    """With `ahead` the next dispatch is on its way before the first one's results are asked for."""
    with jax.set_mesh(engine.mesh):
        scheduler = start(engine, tiny, ahead=1)
        scheduler.submit(requests()[0])
        assert scheduler.advance() == [] and len(scheduler._in_flight) == 1
        scheduler.advance()
        assert len(scheduler._in_flight) == 1  # the second, the first one is fetched
        list(scheduler.drain())


@pytest.mark.slow
def test_few_slots_that_are_left_decode_in_a_program_of_few_rows(engine, tiny, monkeypatch):
    """A limit for each sample: the one long completion ends in a program of one row, wherever its slot is."""
    used = []
    decode = engine.decode

    def watched(weights, state, slots, *rest):
        used.append((engine.row_bucket(len(slots[0])), slots[0]))
        return decode(weights, state, slots, *rest)

    monkeypatch.setattr(engine, "decode", watched)
    whole = Request(np.arange(20, 28, dtype=np.int32), 5, 8, KEY, 24)
    plain = {one.sample_id: one.tokens for one in sample(engine, tiny, [whole])[0]}
    longest = max(plain, key=lambda i: (len(plain[i]), i))
    limits = np.full(8, 2)
    limits[longest] = 24
    request = Request(whole.tokens, 5, 8, KEY, limits)
    used.clear()
    samples, _ = sample(engine, tiny, [request])
    assert used[0][0] == 8 and used[-1] == (1, [longest]) and engine.programs.window_lengths.keys() == {1, 2, 4, 8}
    for one in samples:
        np.testing.assert_array_equal(one.tokens, plain[one.sample_id][: limits[one.sample_id]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shards", "ahead"), [(1, 1), *(pytest.param(*each, marks=pytest.mark.proof) for each in ((1, 0), (2, 1)))]
)
def test_samples_that_are_put_back_where_pages_run_out_are_the_same(tiny, expected, shards, ahead):
    """The pages of a shard hold one sequence of the longest and little more: some samples begin anew several times."""
    mesh = sharding.make_mesh(config.MeshConfig(data=shards), jax.devices()[:shards])
    engine = make_engine(tiny[0], 8 * shards, 3, mesh, page_size=4, pages=math.ceil(134 / 4) + 2)
    returned = []
    with pytest.MonkeyPatch.context() as patch:
        preempt = Shard._preempt
        patch.setattr(Shard, "_preempt", lambda own: returned.append(preempt(own)) or returned[-1])
        samples, scheduler = sample(engine, tiny, requests(), ahead)
    check_same(samples, expected[0])
    assert len(returned) > 3 and 0 < scheduler.usage.preempted <= len(returned)
    assert all_free(scheduler)


@pytest.mark.slow
def test_samples_of_a_prompt_share_its_full_pages(engine, tiny):
    """Seven samples of 110 tokens: 6 pages of 16 once, and of each sample its copy of the 7th and what it draws."""
    with jax.set_mesh(engine.mesh):
        scheduler = start(engine, tiny)
        tokens = np.random.default_rng(0).integers(0, 64, 110, np.int32)
        scheduler.submit(Request(tokens, 0, 7, KEY, 24))
        scheduler._fill()
        (shard,) = scheduler.shards
        assert shard.pool.used == 6 + len(shard.running) == 6 + 7
        assert len({tuple(sample.pages[:6]) for sample in shard.running.values()}) == 1
        list(scheduler.drain())
    assert all_free(scheduler)


@pytest.mark.slow
def test_a_long_prompt_does_not_hold_up_the_others(tiny):
    """While most slots run, one chunk is read between two dispatches."""
    never = (tiny[0].vocab_size,)
    sizes = {"slots": 4, "longest_prompt": 200, "max_completion": 24, "dtype": "float32", "steps_per_dispatch": 4}
    engine = engines.make_engine(tiny[0], one_device(), never, **sizes, prefill_chunk=64)
    order = []
    for name in ("prefill", "decode"):
        call = getattr(engine, name)
        setattr(engine, name, lambda *x, name=name, call=call: order.append(name) or call(*x))
    rng = np.random.default_rng(0)
    with jax.set_mesh(engine.mesh):
        scheduler = start(engine, tiny)
        scheduler.submit(Request(rng.integers(18, 40, 10, np.int32), 0, 3, KEY, 24))
        scheduler.submit(Request(rng.integers(18, 40, 200, np.int32), 1, 1, KEY, 24))
        list(scheduler.drain())
    first = order.index("decode")
    assert order[first : first + 6] == ["decode", "prefill"] * 3


@pytest.mark.slow
def test_samples_that_wait_go_to_shards_that_have_nothing_to_do(tiny):
    """One prompt for four shards of two slots: each draws two of its eight samples."""
    engine = make_engine(tiny[0], 8, 16, sharding.make_mesh(config.MeshConfig(data=4), jax.devices()[:4]))
    with jax.set_mesh(engine.mesh):
        scheduler = start(engine, tiny)
        scheduler.submit(dataclasses.replace(requests()[0], samples=8))
        scheduler.advance()
        begun = [shard._began for shard in scheduler.shards]
        list(scheduler.drain())
    assert begun == [3, 3, 3, 3]  # a prompt and two samples each
    assert all_free(scheduler)


@pytest.mark.slow
def test_samples_do_not_depend_on_order(engine, tiny, expected):
    check_same(sample(engine, tiny, requests()[::-1])[0], expected[0])


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slots", "axes"),
    [
        (8, {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param(16, {"data": 2, "fsdp": 4}, marks=pytest.mark.proof),
        pytest.param(4, {"tensor": 2}, marks=pytest.mark.proof),
    ],
)
def test_samples_do_not_depend_on_the_mesh(tiny, expected, slots, axes):
    """Shards of 2, 2 and 4 slots; each of the former stops its dispatches by itself where tensor = 1."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | axes
    mesh = sharding.make_mesh(config.MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    check_same(sample(make_engine(tiny[0], slots, 8, mesh), tiny, requests(), ahead=1)[0], expected[0])


@pytest.mark.slow
def test_usage(engine, expected):
    """A prompt is prefilled once, not once a sample; the first token of a sample comes of its prompt's last logits."""
    samples, scheduler = expected
    usage = scheduler.usage
    assert usage.tokens == sum(len(one.tokens) - 1 for one in samples)
    assert usage.slot_steps % engine.slots == 0
    assert usage.slot_utilization == usage.tokens / usage.slot_steps
    assert 0.3 < usage.slot_utilization < usage.queued_slot_utilization <= 1
    assert usage.overlap == 0


@pytest.mark.slow
def test_overlap_is_the_share_of_steps_with_both_stages(engine, tiny):
    with jax.set_mesh(engine.mesh):
        scheduler = start(engine, tiny)
        first, second = (dataclasses.replace(requests()[i], samples=2) for i in (0, 1))
        scheduler.submit(dataclasses.replace(first, stage="draft"))
        list(scheduler.drain())
        assert scheduler.usage.overlap == 0
        scheduler.submit(dataclasses.replace(first, stage="draft"))
        scheduler.submit(dataclasses.replace(second, stage="refine"))
        list(scheduler.drain())
        assert 0 < scheduler.usage.overlap < 1


@pytest.mark.slow
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


def test_a_prompt_and_its_completion_that_fit_alone_but_not_together(engine, monkeypatch):
    """Where the longest prompts have shorter completions, as questions with and without a draft."""
    monkeypatch.setattr(engine, "sizes", dataclasses.replace(engine.sizes, length=120))
    scheduler = Scheduler(engine)
    with pytest.raises(InputError, match=r"^prompt 6: 100 \+ 21 tokens .* 110 \+ 24, together 120;"):
        scheduler.submit(Request(np.zeros(100, np.int32), 6, 2, KEY, np.array([3, 21])))
    assert not scheduler.pending
    scheduler.submit(Request(np.zeros(100, np.int32), 6, 2, KEY, np.array([3, 20])))
    assert scheduler.pending


@pytest.mark.slow
def test_no_samples_are_no_work(engine, tiny):
    scheduler = Scheduler(engine)
    scheduler.submit(Request(np.zeros(3, np.int32), 0, 0, KEY, 4))
    assert not scheduler.pending
    assert list(scheduler.drain()) == scheduler.advance() == []


@pytest.mark.slow
def test_a_phase_does_not_begin_in_another(engine, tiny):
    """Its weights would change in the middle of a sample."""
    scheduler = start(engine, tiny)
    scheduler.submit(requests()[0])
    with pytest.raises(AssertionError):
        scheduler.start({}, SAMPLING)


PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.sampling.configured import make_programs
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.state import Sampling

given = np.load(sys.argv[3], allow_pickle=True)
c, host = given["c"].item(), given["params"].item()
mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2))
params = {path: sharding.to_global(x, sharding.param_sharding(mesh, path)) for path, x in host.items()}
sizes = {"slots": 8, "longest_prompt": 110, "max_completion": 24, "steps_per_dispatch": 16}
scheduler = Scheduler(Engine(c, mesh, make_programs(c, mesh, (0, 17, 40), dtype="float32", **sizes)))
assert scheduler.engine.slots == 4 and scheduler.engine.mesh.size == 2
scheduler.start(params, Sampling(0.9, 0.95))
for tokens, index, samples, limit in given["requests"][int(sys.argv[2]) :: 2]:
    scheduler.submit(Request(tokens, index, samples, np.array([3, 4], np.uint32), limit))
found = {(one.request.index, one.sample_id): (one.tokens, one.logprobs) for one in scheduler.drain()}
np.savez(sys.argv[4], found=np.array(found, dtype=object))
jax.distributed.shutdown()  # waits for the other process, as JAX does at the exit of one that is not a fork
"""


@pytest.mark.proof
@pytest.mark.slow(seconds=12)
def test_two_processes_sample_side_by_side(tiny, expected, tmp_path):
    """Each on its half of a 2 x 2 mesh, with unequal work and no lockstep: one has 3 of the prompts, the other 2."""
    wanted = [(one.tokens, one.index, one.samples, one.limit) for one in requests()]
    given = {"c": tiny[0], "params": tiny[1], "requests": wanted}
    np.savez(tmp_path / "given.npz", **{name: np.array(value, dtype=object) for name, value in given.items()})
    address = f"localhost:{free_port()}"
    files = [tmp_path / f"{rank}.npz" for rank in (0, 1)]
    env = devices.environment(2, JAX_PLATFORMS="cpu")
    running = [
        Started(PROCESS, ["process", address, rank, tmp_path / "given.npz", file], env)
        for rank, file in enumerate(files)
    ]
    done = ended(running)
    assert [process.returncode for process in done] == [0, 0], done
    found = [np.load(file, allow_pickle=True)["found"].item() for file in files]
    assert not found[0].keys() & found[1].keys() and len(found[0]) + len(found[1]) == len(expected[0])
    for one in expected[0]:
        tokens, logprobs = (found[0] | found[1])[one.request.index, one.sample_id]
        np.testing.assert_array_equal(tokens, one.tokens)
        np.testing.assert_allclose(logprobs, one.logprobs, atol=1e-4, rtol=0)
