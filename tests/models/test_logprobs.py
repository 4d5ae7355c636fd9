"""Chunked log-probs and entropy: equal to full logits in value and gradient, without ever holding them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from igrpo_jax import config
from igrpo_jax.distributed import chips, sharding
from igrpo_jax.models import decoder, logprobs
from igrpo_jax.models.logprobs import packed_logprobs, token_logprobs
from igrpo_jax.models.segments import PrefixGroup, pack, starts

R, T, D, V = 3, 10, 8, 29


def data(rows=R, time=T, size=D, vocab=V):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, time, size)).astype(np.float32)
    head = rng.normal(size=(size, vocab)).astype(np.float32)
    return hidden, head, rng.integers(0, vocab, (rows, time), np.int32)


def naive(hidden, head, targets, temperature):
    """Over [R, T, V]."""
    logp = jax.nn.log_softmax(hidden @ head / (temperature or 1.0), axis=-1)
    return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def value_and_gradients(function, bonus=0.0):
    """Log-probs, entropies, and gradients of a weighted sum of the log-probs, and of the entropies times `bonus`."""
    weight, other = np.random.default_rng(1).normal(size=(2, R, T)).astype(np.float32)

    def loss(hidden, head, targets):
        logprob, entropy = function(hidden, head, targets)
        return jnp.sum(weight * logprob + bonus * other * entropy), (logprob, entropy)

    (_, values), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*data())
    return [np.asarray(x) for x in (*values, *gradients)]


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("chunk", [3, 64, *(pytest.param(each, marks=pytest.mark.proof) for each in (1, 10))])
def test_equal_to_full_logits(chunk, temperature, keep_logits):
    """10 positions of 3 rows leave a rest of T = 10, 64 are more than all; temperature 0 (greedy) is read as 1."""
    expected = value_and_gradients(lambda *x: naive(*x, temperature))
    got = value_and_gradients(lambda *x: token_logprobs(*x, temperature, chunk, keep_logits=keep_logits))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)
    if temperature == 0.7:
        untempered = value_and_gradients(lambda *x: naive(*x, 1.0))
        assert all(np.abs(a - b).max() > 0.1 for a, b in zip(got, untempered, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.0, marks=pytest.mark.proof)])
@pytest.mark.parametrize("chunk", [3, 64])
def test_entropy_with_its_gradient(chunk, temperature, tied):
    """Alone too, where the log-probs have none: d H / d z = -p (log p + H)."""

    def ours(hidden, head, targets):
        return token_logprobs(hidden, head.T if tied else head, targets, temperature, chunk, tied, True)

    for scale in (0.0, 1.0):
        both = lambda function: lambda *x: (scale * function(*x)[0], function(*x)[1])  # noqa: B023
        expected = value_and_gradients(both(lambda *x: naive(*x, temperature)), bonus=1.3)
        got = value_and_gradients(both(ours), bonus=1.3)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5, rtol=0)
        without = value_and_gradients(both(lambda *x: naive(*x, temperature)))
        assert all(np.abs(a - b).max() > 0.1 for a, b in zip(got[2:], without[2:], strict=True))


def test_entropy_carries_no_gradient_unless_asked_for():
    hidden, head, targets = data()
    total = lambda h, w: token_logprobs(h, w, targets, 1.0, 4)[1].sum()
    for gradient in jax.grad(total, argnums=(0, 1))(hidden, head):
        np.testing.assert_array_equal(gradient, 0.0)
    exact = lambda h, w: naive(h, w, targets, 1.0)[1].sum()
    assert np.abs(jax.grad(exact)(hidden, head)).max() > 0.1  # what it would be


def test_the_head_is_rounded_but_its_gradient_is_float32():
    """One bf16 sum over all chunks would lose bits: 512 like terms of 1/512 add to .5 or less in bf16."""
    hidden, head = jnp.ones((1, 512, 1), jnp.bfloat16), jnp.zeros((1, 4))
    loss = lambda w: token_logprobs(hidden, w, jnp.zeros((1, 512), jnp.int32), 1.0, 1)[0].mean()
    gradient = jax.grad(loss)(head)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, [[0.75, -0.25, -0.25, -0.25]], rtol=1e-5)


def of_first(count, bonus, hidden, head, targets, chunk=9):
    """Log-probs, entropies, and the gradients of a weighted sum of both over the first `count` positions."""
    weight, other = np.random.default_rng(1).normal(size=(2, R, T)).astype(np.float32)

    def loss(hidden, head, count):
        values = token_logprobs(hidden, head, targets, 0.7, chunk, entropy_gradient=bonus, count=count)
        wanted = np.arange(T) < (T if count is None else count)
        return jnp.sum(jnp.where(wanted, weight * values[0] + other * values[1], 0.0)), values

    (_, values), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head, count)
    return [np.asarray(x) for x in (*values, *gradients)]


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize(("count", "run"), [(1, 3), (3, 3), (4, 6), (10, 10)])
def test_positions_past_the_count_are_left_out(count, run, bonus):
    """With chunks of 3 positions: NaN past the last chunk that is run reaches neither values nor gradients."""
    hidden, head, targets = data()
    # The gradient of a head sums over all chunks, here with weights of 0 past the count.
    logprob, entropy, d_hidden, d_head = of_first(count, bonus, hidden, head, targets, chunk=64)
    hidden[:, run:] = np.nan
    found = of_first(count, bonus, hidden, head, targets)
    for x, expected in zip(found[:2], (logprob, entropy), strict=True):
        np.testing.assert_allclose(x[:, :run], expected[:, :run], atol=2e-5, rtol=0)
        np.testing.assert_array_equal(x[:, run:], 0)
    np.testing.assert_allclose(found[2], d_hidden, atol=2e-5, rtol=0)
    np.testing.assert_array_equal(found[2][:, run:], 0)
    np.testing.assert_allclose(found[3], d_head, atol=2e-5, rtol=0)
    assert np.abs(d_head).max() > 0.1


def test_a_count_of_all_is_none_and_a_count_of_0_runs_nothing():
    for x, y in zip(of_first(None, True, *data()), of_first(T, True, *data()), strict=True):
        np.testing.assert_array_equal(x, y)
    hidden, head, targets = data()
    for x in of_first(0, True, np.full_like(hidden, np.nan), head, targets):
        np.testing.assert_array_equal(x, 0)


WIDE = {"rows": 4, "time": 96, "size": 16, "vocab": 1009}  # all logits: 4 x 96 x 1009 x 4 = 1.55 MB


def loss_of(function):
    return lambda hidden, head, targets: jnp.sum(function(hidden, head, targets)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("gradient", "bonus"), [(False, False), (True, False), (True, True)])
def test_all_logits_never_exist(gradient, bonus):
    """In the compiled program, with chunks of 8 of 96 in 4 rows: neither in its shapes nor in its memory."""

    def compiled(function):
        loss = lambda *x: sum(jnp.sum(part) for part in function(*x)[: 1 + bonus])
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)) if gradient else loss).lower(*data(**WIDE)).compile()

    all_logits = 4 * 96 * 1009 * 4
    chunked = compiled(lambda *x: token_logprobs(*x, 0.7, 32, entropy_gradient=bonus))
    assert chunked.memory_analysis().temp_size_in_bytes < all_logits / 2
    held = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w\d+\[([\d,]+)\]", chunked.as_text())}
    assert max(np.prod(shape) for shape in held if 1009 in shape) <= 4 * 8 * 1009
    # The same check sees them where they do exist.
    full = compiled(lambda *x: naive(*x, 0.7))
    assert full.memory_analysis().temp_size_in_bytes >= all_logits or not gradient
    assert re.search(r"f32\[(4,96|384),1009\]", full.as_text())


def gathers(compiled):
    """Sizes of what collectives put together of their parts."""
    lines = [line for line in compiled.as_text().splitlines() if re.search(r" all-(gather|to-all)(-start)?\(", line)]
    shapes = [re.findall(r"\w\d+\[([\d,]*)\]", line.split("(")[0]) for line in lines]
    return [np.prod([int(x) for x in shape.split(",") if x]) for found in shapes for shape in found]


@pytest.mark.slow
def test_a_sharded_vocabulary_is_never_gathered():
    """Each device holds its half of the logits; only sums over the vocabulary travel."""
    mesh = sharding.make_mesh(config.MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    shape = WIDE | {"vocab": 1008}
    places = [sharding.batch_sharding(mesh), sharding.param_sharding(mesh, "lm_head"), sharding.batch_sharding(mesh)]

    def compiled(function):
        args = [jax.device_put(x, place) for x, place in zip(data(**shape), places, strict=True)]
        program = jax.jit(
            jax.value_and_grad(loss_of(function), argnums=(0, 1)), out_shardings=(None, tuple(places[:2]))
        )
        return program.lower(*args).compile(), args

    with jax.set_mesh(mesh):
        program, args = compiled(lambda *x: token_logprobs(*x, 0.7, 16))
        # The largest that may travel: the head's half over fsdp. A chunk's logits of one device are 2 x 8 x 504.
        assert max(gathers(program), default=0) <= 16 * 504 < 4 * 8 * 1008
        assert not re.search(r"f32\[[24],8,1008\]", program.as_text())
        loss, gradients = program(*args)
        assert max(gathers(compiled(_gathers)[0])) > 16 * 504  # the check can see one
    expected, wanted = jax.value_and_grad(loss_of(lambda *x: naive(*x, 0.7)), argnums=(0, 1))(*data(**shape))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=0)


def _gathers(hidden, head, targets):
    own = jnp.tanh(sharding.constrain(hidden @ head, "batch", "time", "vocab"))
    return (jnp.sort(sharding.constrain(own, "batch", "time", None), axis=-1)[..., ::7],)


SIZE = 64
CONTEXTS, COMPLETIONS = (6, 1, 9), ((4, 6), (5, 1), (3, 6))  # tokens; a context of one token has no prefix
MODELS = {"tiny": tiny_models.tiny_config, "hybrid": tiny_models.hybrid_config}
SHARDS = ((0, 1), (2,))  # which contexts stand in which packed sequence


def test_a_chunk_has_as_many_positions_as_memory_holds(monkeypatch):
    """100 of a vocabulary of 500 in 1/128 of the memory; a device has half of the words where two share them."""
    monkeypatch.setattr(chips, "usable_bytes", lambda device: 128 * 100 * 500 * 4)
    one, two = (sharding.make_mesh(config.MeshConfig(tensor=n), jax.devices()[:n]) for n in (1, 2))
    chunk = functools.partial(logprobs.chunk_positions, None)
    assert (chunk(500, one), chunk(500, two), chunk(10**9, one)) == (100, 200, 1)
    assert chunk(5, one) == logprobs.LONGEST_CHUNK["cpu"]
    monkeypatch.setattr(chips, "usable_bytes", None)  # nothing is asked of a device whose memory may not be known
    assert logprobs.chunk_positions(7, 500, one) == 7


SETTINGS = {"dtype": "float32", "temperature": 0.8, "chunk": 16, "remat": "none"}


def make_units():
    """Contexts and the completions of each."""
    rng = np.random.default_rng(2)
    draw = lambda length: rng.integers(0, 64, length, np.int32)
    return [draw(length) for length in CONTEXTS], [[draw(n) for n in lengths] for lengths in COMPLETIONS]


def places():
    """Yields of each completion its context's number, its own, its shard and where its segment stands."""
    for shard, numbers in enumerate(SHARDS):
        for i, (_, own) in zip(numbers, starts([prefix_group(i) for i in numbers]), strict=True):
            for j, start in enumerate(own):
                yield i, j, (shard, slice(start, start + COMPLETIONS[i][j]))


def prefix_group(i):
    return PrefixGroup(CONTEXTS[i] - 1, COMPLETIONS[i])


def packed(contexts, completions, chunk=None, padding=0):
    """The arrays that `packed_logprobs` takes after the parameters; `padding` stands where no token is."""
    segments = pack([[prefix_group(i) for i in numbers] for numbers in SHARDS], SIZE, chunk)
    tokens, targets = np.full((2, len(SHARDS), SIZE), padding, np.int32)
    for shard, numbers in enumerate(SHARDS):
        for i, (start, _) in zip(numbers, starts([prefix_group(i) for i in numbers]), strict=True):
            tokens[shard, start : start + CONTEXTS[i] - 1] = contexts[i][:-1]
    for i, j, place in places():
        tokens[place] = [contexts[i][-1], *completions[i][j][:-1]]
        targets[place] = completions[i][j]
    return tokens, targets, segments, np.int32(16)  # tokens of completions on the first shard; 9 on the second


@pytest.fixture(scope="module")
def alone():
    """For a model: log-probs and entropies [2, T_i] of each completion, and the gradient of their sum with `weights`.

    Each is computed in a row of its own after its context, over all logits.
    """

    @functools.cache
    def of(model):
        cfg = MODELS[model]()
        params = tiny_models.random_params(cfg)
        contexts, completions = make_units()
        texts = {(i, j): np.concatenate([contexts[i], completions[i][j]]) for i, j, _ in places()}
        rows = np.zeros((len(texts), 15), np.int32)
        for row, text in zip(rows, texts.values(), strict=True):
            row[: len(text)] = text
        positions = np.broadcast_to(np.arange(15, dtype=np.int32), rows.shape)

        def loss(params):
            hidden, _ = decoder.apply(cfg, params, rows, positions)
            both = jnp.stack(naive(hidden[:, :-1], params["lm_head"], rows[:, 1:], 0.8))
            values = {
                key: both[:, row, CONTEXTS[key[0]] - 1 : len(text) - 1] for row, (key, text) in enumerate(texts.items())
            }
            return sum(jnp.sum(values[key] * weight) for key, weight in weights().items()), values

        (_, values), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return cfg, params, jax.device_get(values), jax.device_get(gradient)

    return of


def weights():
    """Of the log-probs and entropies of each completion."""
    return {(i, j): np.random.default_rng([i, j]).normal(size=(2, COMPLETIONS[i][j])) for i, j, _ in places()}


@pytest.mark.slow(seconds=12)
@pytest.mark.parametrize(
    ("model", "attention"),
    [("tiny", "xla"), ("hybrid", "chunked"), pytest.param("tiny", "chunked", marks=pytest.mark.proof)],
)
def test_completions_are_scored_where_they_stand(alone, model, attention):
    """Each as after its context and alone, in a forward pass of its own; so are the gradients of all parameters."""
    cfg, params, expected, gradient = alone(model)
    cfg = dataclasses.replace(cfg, attention=attention)
    arrays = packed(*make_units(), chunk=cfg.mamba and cfg.mamba.chunk_size)
    weight = np.zeros((2, len(SHARDS), SIZE), np.float32)
    for i, j, (shard, own) in places():
        weight[:, shard, own] = weights()[i, j]

    def loss(params):
        values = jnp.stack(packed_logprobs(cfg, params, *arrays, **SETTINGS, entropy_gradient=True))
        return jnp.sum(values * weight), values

    (_, values), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for i, j, (shard, own) in places():
        np.testing.assert_allclose(values[:, shard, own], expected[i, j], atol=1e-5, rtol=0)
    assert np.isfinite(values).all()  # also where they mean nothing: 0 x NaN is NaN
    for path, x in gradient.items():
        np.testing.assert_allclose(found[path], x, atol=2e-5 * max(1, np.abs(x).max()), rtol=0, err_msg=path)
    assert np.abs(gradient["embedding"]).max() > 0.1


@pytest.mark.slow
def test_the_gradient_of_the_head_is_float32_in_bfloat16(tiny):
    """It is that of the master weight: that of its copy in bfloat16 would be rounded."""
    cfg, params = tiny
    arrays = packed(*make_units())

    def loss(head):
        logprobs, _ = packed_logprobs(cfg, params | {"lm_head": head}, *arrays, **SETTINGS | {"dtype": "bfloat16"})
        return logprobs[:, :9].sum()

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(params["lm_head"]))
    assert np.mean(np.asarray(gradient) != gradient.astype(jnp.bfloat16)) > 0.9


@pytest.fixture(scope="module", params=["xla", "chunked", "hybrid"])
def score(request):
    """Log-probs and entropies [S, F] of contexts and completions, with one attention or another, or with Mamba-2."""
    name = request.param
    cfg, params = request.getfixturevalue("hybrid" if name == "hybrid" else "tiny")
    cfg = dataclasses.replace(cfg, attention="chunked" if name == "hybrid" else name)
    run = jax.jit(lambda params, *x: packed_logprobs(cfg, params, *x, **SETTINGS))
    chunk = cfg.mamba and cfg.mamba.chunk_size
    return lambda *units, **options: [np.asarray(x) for x in run(params, *packed(*units, chunk=chunk, **options))]


@pytest.mark.slow
def test_completions_of_a_context_do_not_see_each_other(score):
    """Nor padding, nor what comes later; only the tokens of another context change its own completions. Bit for bit."""
    contexts, completions = make_units()
    own = {(i, j): place for i, j, place in places()}
    before = score(contexts, completions)
    for old, new in zip(before, score(contexts, completions, padding=60), strict=True):
        for place in own.values():
            np.testing.assert_array_equal(old[place], new[place])
    shard, place = own[0, 1]
    completions[0][1][2:] = (completions[0][1][2:] + 1) % 64
    for name, old, new in zip(("logprob", "entropy"), before, score(contexts, completions), strict=True):
        # A token is no input of its own distribution.
        changed = slice(place.start + (2 if name == "logprob" else 3), place.stop)
        for key, other in own.items():
            if key != (0, 1):
                np.testing.assert_array_equal(old[other], new[other])
        np.testing.assert_array_equal(old[shard, place.start : changed.start], new[shard, place.start : changed.start])
        assert (old[shard, changed] != new[shard, changed]).all()


@pytest.mark.slow
def test_a_context_is_seen_by_its_own_completions_alone(score):
    contexts, completions = make_units()
    before = score(contexts, completions)
    contexts[0][0] = (contexts[0][0] + 1) % 64  # the first token of a prefix
    for old, new in zip(before, score(contexts, completions), strict=True):
        for i, _, place in places():
            assert (old[place] != new[place]).all() if i == 0 else (old[place] == new[place]).all()
