"""Chunked log-probs and entropy: equal to full logits in value and gradient, without ever holding them."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import decoder
from igrpo_jax.models.logprobs import completion_logprobs, token_logprobs

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


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_equal_to_full_logits(chunk, temperature):
    """10 positions of 3 rows leave a rest of T = 10, 64 are more than all; temperature 0 (greedy) is read as 1."""
    expected = value_and_gradients(lambda *x: naive(*x, temperature))
    got = value_and_gradients(lambda *x: token_logprobs(*x, temperature, chunk))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)
    if temperature == 0.7:
        untempered = value_and_gradients(lambda *x: naive(*x, 1.0))
        assert all(np.abs(a - b).max() > 0.1 for a, b in zip(got, untempered, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
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


Q, G = 3, 2  # contexts, and completions of each
CONTEXTS, COMPLETIONS = np.array([6, 1, 9]), np.array([[4, 6], [5, 1], [3, 6]])


def make_units():
    """Contexts and completions, padded with what must not matter: a context of one token has no prefix."""
    rng = np.random.default_rng(2)
    contexts = [rng.integers(0, 4, n, np.int32) for n in CONTEXTS]
    completions = rng.integers(0, 64, (Q, G, 6), np.int32)
    return contexts, completions


@pytest.fixture(scope="module")
def run(tiny):
    """Log-probs and entropies [Q, G, T] of `make_units`; its prefixes are padded to `size` with `pad`."""
    c, params = tiny
    settings = {"dtype": "float32", "temperature": 0.8, "chunk": 24, "remat": "none"}
    score = jax.jit(lambda *x: completion_logprobs(c, *x, **settings))

    def call(contexts, completions, size=8, pad=5):
        prefix = np.full((Q, size), pad, np.int32)
        for i, context in enumerate(contexts):
            prefix[i, : len(context) - 1] = context[:-1]
        lengths, last = np.array([len(x) - 1 for x in contexts], np.int32), np.array([x[-1] for x in contexts])
        return [np.asarray(x) for x in score(params, prefix, lengths, last, completions)]

    return call


@pytest.mark.slow
def test_completions_are_scored_where_they_stand(tiny, run):
    """Each after its context and alone, in a forward pass of its own: positions go on where the context ends."""
    c, params = tiny
    contexts, completions = make_units()
    wide = np.pad(completions, ((0, 0), (0, 0), (0, 5)), constant_values=9)
    got = run(contexts, completions), run(contexts, wide, size=13)
    rows = np.zeros((Q * G, 15), np.int32)
    for i, row in enumerate(rows):
        own = np.concatenate([contexts[i // G], completions[i // G, i % G]])
        row[: len(own)] = own
    places = np.broadcast_to(np.arange(15), rows.shape)
    hidden = jax.jit(lambda params, rows: decoder.apply(c, params, rows, places)[0])(params, rows)
    expected = naive(hidden[:, :-1], params["lm_head"], rows[:, 1:], 0.8)
    for i in range(Q * G):
        start, n = CONTEXTS[i // G] - 1, COMPLETIONS[i // G, i % G]
        for a, b in itertools.product(range(2), repeat=2):
            np.testing.assert_allclose(
                got[a][b][i // G, i % G, :n], expected[b][i, start : start + n], atol=1e-5, rtol=0
            )
    assert all(np.isfinite(x).all() for pair in got for x in pair)  # also where they mean nothing: 0 x NaN is NaN


def test_completions_of_a_context_do_not_see_each_other(run):
    """Nor the padding of the prefix, nor what comes later; only the tokens of another context change its own rows."""
    contexts, completions = make_units()
    before = run(contexts, completions)
    for pair in zip(before, run(contexts, completions, pad=60), strict=True):
        np.testing.assert_array_equal(*pair)
    changed = completions.copy()
    changed[0, 1, 2:] = (changed[0, 1, 2:] + 1) % 64
    for name, old, new in zip(("logprob", "entropy"), before, run(contexts, changed), strict=True):
        own = np.zeros_like(old, bool)
        own[0, 1, 2 if name == "logprob" else 3 :] = True  # a token is no input of its own distribution
        np.testing.assert_array_equal(old[~own], new[~own])
        assert (old[own] != new[own]).all()
    changed = [contexts[0], contexts[1], (contexts[2] + 1) % 64]
    for old, new in zip(before, run(changed, completions), strict=True):
        np.testing.assert_array_equal(old[:2], new[:2])
        assert (old[2] != new[2]).all()
