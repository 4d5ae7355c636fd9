"""The engine against the full forward and against transformers; where completions end; what does not fit."""

import dataclasses
import functools
import os
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from engines import make_engine

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.compiling import all_shapes
from igrpo_jax.distributed.programs import Program, compilations
from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder, hf_files, hf_read, paged
from igrpo_jax.models.windows import block_ends
from igrpo_jax.sampling import configured, decoding, page_count, shapes
from igrpo_jax.sampling import programs as sampler_programs
from igrpo_jax.sampling.configured import make_programs
from igrpo_jax.sampling.draw import draw
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.state import Sampling

EOS = (0, 17, 40)  # 0 is also what prompts are padded with
KEY = np.array([1, 2], np.uint32)
# At, below and above the edge of a page of 16. The cache of 142 positions has blocks up to 80 and 144; completions of
# the prompt of 70 go from the first to the second.
LENGTHS = (1, 31, 32, 33, 70, 110)
LIMIT = 24


def one_device():
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])


def put(params, mesh):
    return {path: jax.device_put(value, sharding.param_sharding(mesh, path)) for path, value in params.items()}


def prompt(length):
    """Random ids, with every EOS somewhere inside where there is room."""
    tokens = np.random.default_rng(length).integers(0, 64, length, np.int32)
    tokens[1 : 1 + len(EOS)] = EOS[: max(length - 1, 0)]
    return tokens


def sample(engine, params, requests, sampling):
    """(index, sample) -> Sample of all requests."""
    with jax.set_mesh(engine.mesh):
        scheduler = Scheduler(engine)
        scheduler.start(params, sampling)
        for request in requests:
            scheduler.submit(request)
        return {(one.request.index, one.sample_id): one for one in scheduler.drain()}


@pytest.fixture(scope="module")
def engine(tiny):
    """All shapes have a program of their own, as those of a large model, although a step of this one does little."""
    sizes = {"slots": 6, "longest_prompt": 110, "max_completion": 32, "dtype": "float32", "steps_per_dispatch": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "_hardly_more", lambda work: work)
        return make_engine(tiny[0], one_device(), EOS, **sizes)


@pytest.fixture(scope="module")
def params(tiny, engine):
    return put(tiny[1], engine.mesh)


@pytest.fixture(scope="module")
def requests():
    return [Request(prompt(length), length, 8, KEY, LIMIT) for length in LENGTHS]


@pytest.fixture(scope="module")
def samples(engine, params, requests):
    return sample(engine, params, requests, Sampling(0.8))


@pytest.fixture(scope="module")
def full_logits(tiny, params):
    return forward_of(tiny[0], params)


def forward_of(c, params):
    """A function to logits [T, V] that predict a sample's tokens: of one forward pass without a cache or any bucket."""

    @jax.jit
    def run(tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return decoder.logits(c, params, decoder.apply(c, params, tokens, positions)[0])

    def call(one):
        before = len(one.request.tokens)
        row = np.zeros((1, 136), np.int32)
        row[0, : before + len(one.tokens)] = [*one.request.tokens, *one.tokens]
        return np.asarray(run(row))[0, before - 1 : before - 1 + len(one.tokens)]

    return call


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.slow
def test_cached_logprobs_equal_the_full_forward(samples, full_logits):
    """Also at edges of pages and blocks, with neighbours of other lengths, and with the padding's id in the prompt."""
    assert len(samples) == 8 * len(LENGTHS)
    assert max(len(one.request.tokens) + len(one.tokens) for one in samples.values()) > 130
    for one in samples.values():
        logits = full_logits(one)
        logp = log_softmax(logits / 0.8)
        expected = logp[np.arange(len(one.tokens)), one.tokens]
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4, rtol=0)
        assert one.entropy == pytest.approx(-(np.exp(logp) * logp).sum(), rel=1e-4)
        if len(one.tokens) > 2:  # those of temperature 1 are no match
            assert np.abs(log_softmax(logits)[np.arange(len(one.tokens)), one.tokens] - expected).max() > 1e-2


@pytest.mark.slow
def test_each_token_is_drawn_with_a_key_of_its_own(samples, full_logits):
    """Of its stage, prompt, sample and position, from 0: the first token is drawn by another program than the rest."""
    fold = jax.random.fold_in
    for (index, number), one in samples.items():
        of_sample = fold(fold(jax.random.wrap_key_data(KEY), index), number)
        keys = jax.vmap(lambda n, key=of_sample: jax.random.key_data(fold(key, n)))(jnp.arange(LIMIT))
        logits = np.zeros((LIMIT, 64), np.float32)
        logits[: len(one.tokens)] = full_logits(one)
        drawn = jax.jit(draw)(logits, keys, 0.8, 1.0, 0).token
        np.testing.assert_array_equal(drawn[: len(one.tokens)], one.tokens)


@pytest.mark.slow
def test_logprobs_are_of_the_unfiltered_softmax(engine, params, full_logits):
    requests = [Request(prompt(33), 0, 4, KEY, 12)]
    for one in sample(engine, params, requests, Sampling(0.9, 0.5, 6)).values():
        logits = full_logits(one) / 0.9
        expected = log_softmax(logits)[np.arange(len(one.tokens)), one.tokens]
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4, rtol=0)
        rank = (logits > np.take_along_axis(logits, one.tokens[:, None], 1)).sum(axis=1)
        assert rank.max() < 6


@pytest.mark.slow
def test_a_completion_ends_with_its_first_eos(samples):
    """Any of the set; it belongs to the completion; those in the prompt end nothing."""
    ends = set()
    for one in samples.values():
        assert 0 < len(one.tokens) == len(one.logprobs) <= LIMIT
        assert not np.isin(one.tokens[:-1], EOS).any()
        assert one.finished == (one.tokens[-1] in EOS)
        assert one.finished or len(one.tokens) == LIMIT
        ends.add(int(one.tokens[-1]) if one.finished else None)
    assert ends == {*EOS, None}  # each of them was seen


def test_the_limit_cuts_and_changes_nothing_before_it(engine, params, samples):
    for limit in (1, 5):
        cut = sample(engine, params, [Request(prompt(n), n, 8, KEY, limit) for n in (1, 32)], Sampling(0.8))
        assert len(cut) == 16
        for key, one in cut.items():
            np.testing.assert_array_equal(one.tokens, samples[key].tokens[:limit])
            assert one.finished == (len(samples[key].tokens) <= limit and samples[key].finished)
    assert {len(one.tokens) <= 5 for one in samples.values()} == {True, False}
    # An EOS that just fits the limit: the completion is finished, not cut.
    (index, _), whole = next(item for item in samples.items() if item[1].finished and 1 < len(item[1].tokens) < LIMIT)
    fits = sample(engine, params, [Request(prompt(index), index, 8, KEY, len(whole.tokens))], Sampling(0.8))
    assert fits[index, whole.sample_id].finished


@pytest.mark.slow
def test_nothing_that_is_traced_recompiles(engine, params, samples):
    """All programs are there after `compile`; other temperatures, limits, keys and numbers of samples need no more."""
    engine.compile()
    with compilations() as seen:
        for sampling, limit in ((Sampling(0.0), 7), (Sampling(1.3, 0.9, 5), np.arange(1, 10))):
            found = sample(
                engine, params, [Request(prompt(n), n, 9, KEY + np.uint32(n), limit) for n in LENGTHS], sampling
            )
            assert len(found) == 9 * len(LENGTHS)
    assert seen == []


@pytest.mark.slow
def test_samples_differ_by_sample_prompt_and_key(engine, params, samples):
    def first(index, key):
        return sample(engine, params, [Request(prompt(32), index, 2, key, LIMIT)], Sampling(0.8))[index, 0].tokens

    own = samples[32, 0].tokens
    np.testing.assert_array_equal(first(32, KEY), own)
    for other in (samples[32, 1].tokens, first(31, KEY), first(32, KEY + np.uint32(1))):
        assert len(other) != len(own) or (other != own).any()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_prompts_read_in_one_chunk_or_in_several_give_the_same_samples(tiny, attention, samples):
    """Chunks of 64 cut the prompts anywhere: several are in a chunk, and one goes on in the next two."""
    c = dataclasses.replace(tiny[0], attention=attention)
    sizes = {"slots": 40, "longest_prompt": 110, "max_completion": 32, "dtype": "float32", "steps_per_dispatch": 16}
    engine, calls = make_engine(c, one_device(), EOS, **sizes, prefill_chunk=64), []
    prefill = engine.prefill
    engine.prefill = lambda *x: calls.append(x[3][0]) or prefill(*x)
    found = sample(
        engine, put(tiny[1], engine.mesh), [Request(prompt(n), n, 8, KEY, LIMIT) for n in LENGTHS], Sampling(0.8)
    )
    assert max(map(len, calls)) > 2 and {piece.before for pieces in calls for piece in pieces} > {0}
    for key, one in samples.items():
        np.testing.assert_array_equal(found[key].tokens, one.tokens)
        np.testing.assert_allclose(found[key].logprobs, one.logprobs, atol=1e-4, rtol=0)


@pytest.mark.slow(seconds=12)
def test_pages_read_in_place_give_the_same_samples_as_pages_side_by_side(monkeypatch):
    """The kernels of TPUs and GPUs, emulated, in prefill and in decoding, against plain attention; heads of 128."""
    monkeypatch.setitem(paged.PAGED, "cudnn", functools.partial(paged.cudnn_paged_attention, implementation="xla"))
    c = tiny_models.tiny_config(head_dim=128, num_heads=2, num_kv_heads=2)
    host, results = tiny_models.random_params(c), []
    sizes = {"slots": 3, "longest_prompt": 70, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 4}
    for attention in ("xla", "splash_interpret", "cudnn"):
        engine = make_engine(dataclasses.replace(c, attention=attention), one_device(), EOS, **sizes, prefill_chunk=64)
        assert engine.programs.reads_pages == (attention != "xla")
        requests = [Request(prompt(length), length, 3, KEY, 8) for length in (5, 70)]
        results.append(sample(engine, put(host, engine.mesh), requests, Sampling(0.8)))
    for key, one in results[0].items():
        for in_place in results[1:]:
            np.testing.assert_array_equal(in_place[key].tokens, one.tokens)
            np.testing.assert_allclose(in_place[key].logprobs, one.logprobs, atol=1e-4, rtol=0)


def test_windows_lie_where_those_of_the_last_dispatch_lay(engine, params, requests, samples):
    """Their memory is donated from one dispatch to the next, and let go at the end.

    Of rows that are copied anew it may hold any numbers. Those of samples that go on are not copied.
    """
    before, after, copied, rows = [], [], 0, 0
    execute = engine._execute

    def watched(call, *on_device):
        if call.program != "decode" or engine._kept is None or engine._kept[0] != call.shape:
            return execute(call, *on_device)
        nonlocal copied, rows
        stale = call.split.stale[0, : call.split.stale_count[0]]
        copied, rows = copied + len(stale), rows + call.split.runs.sum()
        windows = jax.tree.map(lambda x: x.at[stale].set(1e9), engine._kept[1])
        before.extend(x.unsafe_buffer_pointer() for x in jax.tree.leaves(windows))
        engine._kept = call.shape, windows
        result = execute(call, *on_device)
        after.extend(x.unsafe_buffer_pointer() for x in jax.tree.leaves(engine._kept[1]))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_execute", watched)
        found = sample(engine, params, requests, Sampling(0.8))
    engine.release_followers()
    assert engine._kept is None
    assert before and sorted(before) == sorted(after)
    assert 0 < copied < rows / 2
    for key, one in samples.items():
        np.testing.assert_array_equal(found[key].tokens, one.tokens)
    program, windows = engine.programs.decode.compiled(6, 144), engine.programs.windows(6, 144)
    memory = program.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(windows))
    assert memory.alias_size_in_bytes == engine.state_bytes + held > memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ("taken", "active", "least", "goes_on"),
    [(0, [1, 1, 0], 2, True), (3, [1, 0, 0], 1, True), (4, [1, 1, 1], 1, False), (0, [1, 0, 0], 2, False),
     (0, [0, 0, 0], 0, False)],
)  # fmt: skip
def test_how_long_a_dispatch_goes_on(taken, active, least, goes_on):
    """Up to 4 steps, while enough rows are active; of a shard without samples none, although it needs none."""
    condition = decoding._condition(one_device(), jnp.int32(least), 4)
    assert condition(jnp.int32(taken), jnp.array(active, bool)) == goes_on


def test_what_programs_cost_and_need(tiny):
    """A call of decode takes all steps of a dispatch, in the rows of all parts. Weights wait while samples begin."""
    sizes = {"slots": 2, "longest_prompt": 8, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 4}
    programs = make_engine(tiny[0], one_device(), EOS, **sizes).programs
    programs = programs.resized(dataclasses.replace(programs.sizes, parts=2))
    assert programs.decode.cost(2, 16) == programs.costs.decode(4, 16) * 4
    fields = {name: SimpleNamespace(peak_bytes=peak) for name, peak in (("decode", 5), ("prefill", 6), ("fork", 4))}
    predicted = sampler_programs.SamplerPrograms.predicted_bytes.fget
    assert predicted(SimpleNamespace(**fields, weight_bytes=3)) == 7
    assert predicted(SimpleNamespace(**fields, weight_bytes=1)) == 6


@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_a_slot_without_a_sample_draws_nothing(tiny, attention, monkeypatch):
    """Of a sample that was put back the slot is still active, and its page is another's: the table names page 0."""
    monkeypatch.setitem(paged.PAGED, "cudnn", functools.partial(paged.cudnn_paged_attention, implementation="xla"))
    sizes = {"slots": 2, "longest_prompt": 8, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 4}
    engine = make_engine(dataclasses.replace(tiny[0], attention=attention), one_device(), (), **sizes)
    decode, both = engine.programs.decode, np.ones(2, np.int32)
    shape = decode.shapes[-1]
    empty = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    state = empty(engine.programs.state)._replace(active=both > 0, length=3 * both, count=both, limit=8 * both)
    rows = empty(decode._arguments(*shape)[3])
    rows = rows._replace(
        slot=np.array([[0, 1]], np.int32),
        runs=np.array([[True, False]]),
        table=rows.table.at[0, 0].set(1),
        min_active=np.array([1], np.int32),
        stale_count=np.array([1], np.int32),
    )
    weights = engine.weights(put(tiny[1], engine.mesh))
    arguments = weights, state, empty(engine.programs.windows(*shape)), rows, sampler_programs.traced(Sampling(1.0))
    with jax.set_mesh(engine.mesh):
        after, _, status = decode(*arguments, shape=shape)
    assert status.count.tolist() == [5, 1] and status.steps.tolist() == [4]
    assert after.out[0, 1:5].any() and not after.out[1].any()
    for pool in filter(None.__ne__, after.cache):
        written = np.abs(pool).max(axis=tuple(range(1, pool.ndim)))
        assert written[1] > 0 and not np.delete(written, 1).any()


@pytest.mark.proof
@pytest.mark.slow
def test_where_xla_allocates_windows_samples_are_the_same(engine, params, requests, samples):
    """As on accelerators that have no kernel for pages."""
    other = make_engine(
        engine.programs.cfg, engine.mesh, EOS, slots=6, longest_prompt=110, max_completion=32, dtype="float32",
        steps_per_dispatch=16,
    )  # fmt: skip
    other.programs._on_cpu = False
    other.programs.window_lengths = {6: (64, 144)}  # several lengths, as there
    assert not jax.tree.leaves(other.programs.windows(6, 144)) and jax.tree.leaves(engine.programs.windows(6, 144))
    found = sample(other, params, requests, Sampling(0.8))
    for key, one in samples.items():
        np.testing.assert_array_equal(found[key].tokens, one.tokens)


@pytest.mark.slow
def test_memory_of_a_long_prefill_is_that_of_a_chunk(tiny):
    c = dataclasses.replace(tiny[0], attention="chunked", hidden_size=256, intermediate_size=1024)
    sizes = {"slots": 1, "longest_prompt": 4096, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 4}

    def temporaries(chunk):
        engine = make_engine(c, one_device(), EOS, **sizes, prefill_chunk=chunk)
        return engine.programs.prefill.compiled(chunk).memory_analysis().temp_size_in_bytes

    assert temporaries(512) < temporaries(4096) / 3


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_programs_are_few(tiny, platform):
    """At most 20 on a CPU, and 8 elsewhere, for slots and lengths as of a real run."""
    engine = make_engine(
        tiny[0], one_device(), EOS, slots=128, longest_prompt=5200, max_completion=4096, dtype="float32",
        steps_per_dispatch=16, pages=2000,
    )  # fmt: skip
    programs = engine.programs
    if platform == "tpu":
        programs.window_lengths = shapes.decode_shapes(engine.sizes, programs.costs, platform, reads_pages=False)
        programs.chunks = shapes.chunk_sizes(engine.sizes, platform)
    assert len(engine.program_shapes) <= {"cpu": 20, "tpu": 8}[platform], [
        program.title(*x) for program, x in engine.program_shapes
    ]


def test_pages_that_do_not_hold_one_sequence_are_refused(tiny):
    sizes = {"slots": 2, "longest_prompt": 40, "max_completion": 9, "dtype": "float32", "steps_per_dispatch": 4}
    with pytest.raises(InputError, match=r"config.rollout.pages = 4: .* 49 tokens, which need 5 pages of 16"):
        make_engine(tiny[0], one_device(), EOS, **sizes, pages=4)
    assert make_engine(tiny[0], one_device(), EOS, **sizes, pages=5).sizes.pages == 5
    with pytest.raises(InputError, match="9 tokens, which need 1 page of 16; set"):
        configured._check_sizes(SimpleNamespace(pages=0, least_pages=1, length=9, page_size=16), None, 1, 1)


def test_pages_are_as_many_as_slots_need_or_memory_holds(tiny):
    """A page of 16 tokens takes 16 x 2 x 2 heads x 8 x 4 bytes in each of the two layers, 4,096 bytes in all."""
    sizes = {"slots": 4, "longest_prompt": 40, "max_completion": 24, "dtype": "float32", "steps_per_dispatch": 4}
    pages = lambda memory, **more: make_engine(tiny[0], one_device(), EOS, **sizes, memory=memory, **more).sizes.pages
    assert pages(None) == pages(1e9) == 4 * 4 + 4  # those of the slots, and a partly filled one of each lane
    weights, copied = 4 * tiny[0].num_params, 4 * 4  # decoding copies the pages of all slots
    assert pages((weights + (copied + 10) * 4096 + 99) / 0.9) == 10
    assert pages(weights) == 5  # the least with which a run can begin
    assert pages(None, length=48) == 4 * 3 + 4  # the longest prompt has no completion of 24


@pytest.mark.slow
def test_pages_fill_what_the_compiler_leaves(tiny):
    """Of all programs together with a page more would not fit; nothing is compiled where memory is no bound."""
    sizes = {"slots": 32, "longest_prompt": 40, "max_completion": 24, "dtype": "float32", "steps_per_dispatch": 4}
    memory = 4 * tiny[0].num_params + 800_000
    estimated = make_programs(tiny[0], one_device(), EOS, **sizes, memory=memory, prefill_chunk=64)
    engine = Engine(tiny[0], one_device(), page_count.fitted(estimated))
    pages = engine.sizes.pages
    assert engine.sizes.least_pages < pages < engine.sizes.most_pages and pages != estimated.sizes.pages
    engine.compile()
    used = engine.programs.predicted_bytes
    code = sum(len(program.shapes) * program.code_bytes for program in engine.programs)
    assert 0 <= 0.95 * memory - used - code < 4096
    for bounds in ({"pages": 9}, {"pages": 9, "memory": memory}, {"memory": 1e9}, {}):
        programs = make_programs(tiny[0], one_device(), EOS, **sizes, **bounds)
        assert page_count.fitted(programs) is programs
        assert not any(program.is_ready(*shape) for program, shape in all_shapes(list(programs)))


def test_programs_with_the_fewest_pages_are_not_compiled_again(tiny):
    """Where no page more fits, they are those that were compiled for the count."""
    sizes = {"slots": 32, "longest_prompt": 40, "max_completion": 24, "dtype": "float32", "steps_per_dispatch": 4}
    programs = page_count.fitted(make_programs(tiny[0], one_device(), EOS, **sizes, memory=1e3, prefill_chunk=64))
    assert programs.sizes.pages == programs.sizes.least_pages
    assert all(program.is_ready(*program.largest[0]) for program in (programs.decode, programs.prefill, programs.fork))


def test_pages_without_bytes_are_bound_by_no_memory(hybrid):
    """A model without attention keeps nothing in pages."""
    cfg = dataclasses.replace(hybrid[0], pattern="M-")
    sizes = {"slots": 4, "longest_prompt": 40, "max_completion": 24, "dtype": "float32", "steps_per_dispatch": 4}
    fitted = page_count.fitted(make_programs(cfg, one_device(), EOS, **sizes, memory=1e3)).sizes
    assert fitted.pages == fitted.most_pages


def test_the_code_of_all_programs_leaves_fewer_pages(tiny, monkeypatch):
    sizes = {"slots": 32, "longest_prompt": 40, "max_completion": 24, "dtype": "float32", "steps_per_dispatch": 4}
    memory = 4 * tiny[0].num_params + 900_000
    programs = make_programs(tiny[0], one_device(), EOS, **sizes, memory=memory, prefill_chunk=64)
    programs = programs.resized(dataclasses.replace(programs.sizes, pages=programs.sizes.least_pages))
    without, number = page_count.counted_pages(programs, memory), sum(len(program.shapes) for program in programs) - 2
    monkeypatch.setattr(Program, "code_bytes", 4096)  # a page; not that of `empty` and `harvest`
    assert page_count.counted_pages(programs, memory) == without - number > programs.sizes.least_pages


@pytest.mark.slow(seconds=14)
def test_a_hybrid_samples_as_its_full_forward(hybrid, monkeypatch):
    """Its states follow the slots: from lanes, refilled, in fewer rows at the end of a rollout, of prompts in chunks.

    Eight slots and forty samples; chunks of Mamba-2 are of 8 tokens.
    """
    monkeypatch.setattr(shapes, "_hardly_more", lambda work: work)
    c, host = hybrid
    sizes = {"slots": 8, "longest_prompt": 70, "max_completion": LIMIT, "dtype": "float32", "steps_per_dispatch": 4}
    params, results = put(host, one_device()), []
    requests = [Request(prompt(length), length, 8, KEY, LIMIT) for length in (1, 16, 17, 33, 70)]
    full = forward_of(c, params)
    for chunk in (64, 2048):
        engine, calls = make_engine(c, one_device(), EOS, **sizes, prefill_chunk=chunk), []
        decode, rows = engine.decode, engine.row_bucket
        engine.decode = lambda *x, decode=decode, rows=rows, calls=calls: calls.append(rows(len(x[2][0]))) or decode(*x)
        results.append(sample(engine, params, requests, Sampling(0.8)))
        assert {4, 8} <= set(calls)
        for one in results[-1].values():
            expected = log_softmax(full(one) / 0.8)[np.arange(len(one.tokens)), one.tokens]
            np.testing.assert_allclose(one.logprobs, expected, atol=1e-4, rtol=0)
    assert len(results[0]) == 40
    for key, one in results[0].items():
        np.testing.assert_array_equal(results[1][key].tokens, one.tokens)


@pytest.mark.proof
@pytest.mark.slow(seconds=10)
def test_a_hybrid_on_a_mesh_samples_the_same(hybrid):
    c, host = hybrid
    sizes = {"slots": 4, "longest_prompt": 40, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 4}
    requests, results = [Request(prompt(length), length, 4, KEY, 8) for length in (5, 33)], []
    for mesh in (one_device(), sharding.make_mesh(config.MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])):
        engine = make_engine(c, mesh, EOS, **sizes)
        results.append(sample(engine, put(host, mesh), requests, Sampling(0.8)))
    for key, one in results[0].items():
        np.testing.assert_array_equal(results[1][key].tokens, one.tokens)
    groups = engine.programs.state.cache[0].b  # of 2 shards by 2 of tensor
    assert groups.sharding.shard_shape(groups.shape) == (2, 3, 1, 8)


@pytest.mark.slow
def test_a_model_without_attention_samples_as_its_full_forward(hybrid):
    c = dataclasses.replace(hybrid[0], pattern="M-")
    params = {path: hybrid[1][path] for path in decoder.shapes(c)}
    params, requests = put(params, one_device()), [Request(prompt(length), length, 2, KEY, 8) for length in (3, 40)]
    sizes = {"slots": 2, "longest_prompt": 40, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 4}
    for one in sample(make_engine(c, one_device(), EOS, **sizes), params, requests, Sampling(0.8)).values():
        expected = log_softmax(forward_of(c, params)(one) / 0.8)[np.arange(len(one.tokens)), one.tokens]
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4, rtol=0)


COLLECTIVES = re.compile(r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-[a-z]+)(-start)?[(]")
# Groups of 2 devices each, as versions of XLA write them.
OWN_REPLICA = "replica_groups={{0,1},{2,3},{4,5},{6,7}}", "replica_groups=[4,2]<=[8]", "'tensor'=2] {'tensor'}"


def leaves_its_replica(line):
    pairs = re.search(r"source_target_pairs={([{}0-9,]+)}", line)
    if pairs:
        return any(int(a) // 2 != int(b) // 2 for a, b in re.findall(r"{(\d+),(\d+)}", pairs[1]))
    return not any(groups in line for groups in OWN_REPLICA)


@pytest.mark.slow
def test_decoding_asks_no_other_shard(tiny):
    """No collective at all; with tensor parallelism only within a replica, but for the trip count all agree on."""
    sizes = {"slots": 16, "longest_prompt": 120, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 4}
    engine = make_engine(tiny[0], sharding.make_mesh(config.MeshConfig(data=2, fsdp=4)), EOS, **sizes)
    programs = engine.programs
    assert len(block_ends(128, 16)) > 1
    for program in (programs.decode.compiled(2, 128), programs.prefill.compiled(64), programs.fork.compiled()):
        assert not COLLECTIVES.search(program.as_text())
    engine = make_engine(tiny[0], sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2)), EOS, **sizes)
    found = [
        line for line in engine.programs.decode.compiled(4, 128).as_text().splitlines() if COLLECTIVES.search(line)
    ]
    across = [line for line in found if leaves_its_replica(line)]
    assert len(found) > len(across) and across
    assert all(re.search(r"= s32\[\]\S* all-reduce", line) for line in across), across


def test_a_decode_step_computes_sines_once_for_all_sublayers(tiny):
    """Once before the loop for the first token, and once in it."""
    sizes = {"slots": 2, "longest_prompt": 8, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 4}
    decode = make_engine(tiny[0], one_device(), EOS, **sizes).programs.decode
    text = decode.compiled(*decode.shapes[-1]).as_text()
    assert tiny[0].pattern.count("*") > 1
    assert text.count(" cosine(") == text.count(" sine(") == 2


def test_weights_are_cast_and_gathered_once(tiny, monkeypatch):
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    sizes = {"slots": 2, "longest_prompt": 8, "max_completion": 8, "steps_per_dispatch": 4}
    weights = make_engine(tiny[0], mesh, EOS, dtype="bfloat16", **sizes).weights(put(tiny[1], mesh))
    assert {x.dtype for x in jax.tree.leaves(weights)} == {jnp.dtype(jnp.bfloat16)}
    # [N, H, D] = (4, 8, 32): whole over fsdp, heads over tensor.
    assert weights["blocks/0/mixer/q_proj"].stored.addressable_shards[0].data.shape == (2, 8, 32)
    engine = make_engine(tiny[0], one_device(), EOS, dtype="float32", **sizes)
    ready = engine.weights(put(tiny[1], one_device()))
    again = engine.weights(ready)
    assert all(again[path] is ready[path] for path in ready)  # nothing to do: no copy
    monkeypatch.setattr(sampler_programs, "uses_output_major", lambda mesh: False)  # as on an accelerator
    params = put(tiny[1], one_device())
    same = make_engine(tiny[0], one_device(), EOS, dtype="float32", **sizes).weights(params)
    assert all(same[path] is params[path] for path in params)  # nothing to do: no copy


def test_slots_must_divide_over_the_mesh(tiny):
    mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))
    with pytest.raises(InputError, match=r"config\.rollout\.slots = 6: must be a multiple of .* = 4"):
        sizes = {"longest_prompt": 8, "max_completion": 8, "steps_per_dispatch": 4}
        make_engine(tiny[0], mesh, EOS, slots=6, dtype="float32", **sizes)


def greedy_equals_generate(path, prompts, tokens):
    """Greedy completions of all prompts side by side, against `generate` on each."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; the extra parity brings it")
    import transformers

    c, mesh = hf_files.load_config(str(path)), one_device()
    sizes = {"slots": 2, "longest_prompt": max(map(len, prompts)), "max_completion": tokens, "steps_per_dispatch": 16}
    engine = make_engine(c, mesh, (c.vocab_size,), dtype="float32", **sizes)  # no EOS: all tokens are compared
    requests = [Request(np.asarray(one, np.int32), i, 1, KEY, tokens) for i, one in enumerate(prompts)]
    ours = sample(engine, hf_read.load_params(str(path), c, mesh), requests, Sampling(0.0))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    for i, one in enumerate(prompts):
        ids = torch.tensor([list(one)])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(one) :].numpy()
        assert len(theirs) == tokens
        np.testing.assert_array_equal(ours[i, 0].tokens, theirs)
        assert not ours[i, 0].finished
    return ours


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_greedy_equals_generate(tmp_path, kind):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; the extra parity brings it")
    import transformers

    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(float("norm" in name), 0.3)
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    ours = greedy_equals_generate(tmp_path, [rng.integers(0, 96, n) for n in (3, 32, 17)], 64)
    assert len(np.unique(ours[0, 0].tokens)) > 8  # no short loop, which anything would match


@pytest.mark.skipif(
    "IGRPO_SMOLLM2" not in os.environ, reason="set IGRPO_SMOLLM2 to a directory with SmolLM2-135M-Instruct"
)
def test_greedy_equals_generate_on_smollm2():
    path = os.environ["IGRPO_SMOLLM2"]
    tokenizer = hf_files.load_tokenizer(path)
    questions = ("What is 17 times 23? Think step by step.", "Write one sentence about the sea.")
    turns = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] for turn in turns]
    greedy_equals_generate(path, prompts, 64)
