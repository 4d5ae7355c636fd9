"""Drawing: the exact distribution, the filters of a plain sort, and never an entry of weight 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.sampling import draw as room

ROWS, VOCAB = 8192, 300  # two whole blocks of 128 and a part of one


@pytest.fixture(scope="module")
def keys():
    one = lambda i: jax.random.key_data(jax.random.fold_in(jax.random.key(0), i))
    return jax.jit(jax.vmap(one))(jnp.arange(ROWS))


@pytest.fixture(scope="module")
def draw(keys):
    """Draws one token for each key; logits [V] or [ROWS, V]."""
    run = jax.jit(room.draw)

    def call(logits, temperature=1.0, top_p=1.0, top_k=0):
        rows = np.broadcast_to(np.asarray(logits, np.float32), (ROWS, np.shape(logits)[-1]))
        return tuple(map(np.asarray, run(rows, keys, temperature, top_p, top_k)))

    return call


def probabilities(logits, temperature=1.0, top_p=1.0, top_k=0):
    """By sorting, in float64: temperature, then top-k, then top-p of what is left."""
    scaled = np.asarray(logits, np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if top_k:
        p = np.where(p >= np.sort(p)[-top_k], p, 0)
        p /= p.sum()
    if top_p < 1:
        order = np.sort(p)[::-1]
        p = np.where(p >= order[np.searchsorted(np.cumsum(order), top_p)], p, 0)
    return p / p.sum()


def p_value(tokens, p):
    """Of a chi-square test that `tokens` were drawn from p; entries with fewer than 5 expected are taken together."""
    counts, expected = np.bincount(tokens, minlength=len(p)), p * len(tokens)
    if counts[p == 0].any():
        return 0.0
    few = expected < 5
    counts, expected = (np.append(x[~few], x[few].sum()) for x in (counts, expected))
    some = expected > 0
    return stats.chisquare(counts[some], expected[some]).pvalue


def random_logits(seed=0, spread=1.5):
    return np.random.default_rng(seed).normal(0, spread, VOCAB)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_tempered_softmax(draw, temperature):
    logits = random_logits()
    tokens, *_ = draw(logits, temperature)
    assert p_value(tokens, probabilities(logits, temperature)) > 0.01
    # The test can tell: multiplied by the temperature instead of divided, or not at all.
    for wrong in {1 / temperature, 1.0} - {temperature}:
        assert p_value(tokens, probabilities(logits, wrong)) < 1e-9


def test_each_row_has_its_own_distribution(draw):
    """A row in two has the logits the other way round."""
    logits = random_logits(1)
    tokens, logprobs, _ = draw(np.tile([logits, logits[::-1]], (ROWS // 2, 1)))
    for part, own in ((slice(0, None, 2), logits), (slice(1, None, 2), logits[::-1])):
        p = probabilities(own)
        assert p_value(tokens[part], p) > 0.01
        np.testing.assert_allclose(logprobs[part], np.log(p)[tokens[part]], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        *((0.6, 0.8, 20), (1.0, 1e-6, 0), (1.0, 1.0, 1)),
        *(pytest.param(*each, marks=pytest.mark.proof) for each in ((1.0, 0.3, 0), (1.0, 1.0, 7), (1.3, 0.5, 9))),
    ],
)
def test_filters_equal_a_sort(draw, temperature, top_p, top_k):
    logits = random_logits(2, spread=2.0)
    tokens, logprobs, entropies = draw(logits, temperature, top_p, top_k)
    p = probabilities(logits, temperature, top_p, top_k)
    assert ROWS * p[p > 0].min() > 20  # so that every kept entry must turn up
    assert set(tokens) == set(np.flatnonzero(p))
    if np.count_nonzero(p) > 1:
        assert p_value(tokens, p) > 0.01
    # The log-prob is the one the trainer computes: tempered, and of the unfiltered softmax.
    unfiltered = np.log(probabilities(logits, temperature))
    np.testing.assert_allclose(logprobs, unfiltered[tokens], atol=1e-5)
    np.testing.assert_allclose(entropies, -np.sum(np.exp(unfiltered) * unfiltered), rtol=1e-5)
    assert np.abs(logprobs - np.log(p[tokens])).min() > 0.05


def test_top_p_counts_what_top_k_has_left(draw):
    """Of .4 .3 .2 .1 top-k 3 leaves .444 .333 .222, of which two reach .75; before top-k three would (.4 .7 .9)."""
    tokens, *_ = draw(np.log([0.1, 0.4, 0.2, 0.3]), top_p=0.75, top_k=3)
    assert set(tokens) == {1, 3}
    assert p_value(tokens, np.array([0, 4 / 7, 0, 3 / 7])) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 2), (0.45, 0)])
def test_ties_at_the_threshold_are_kept(draw, top_p, top_k):
    """The weights are 4 2 2 2 1 of 11: two of them, or .45 of the whole, end among the three equal ones."""
    tokens, *_ = draw(np.log([2.0, 4.0, 2.0, 1.0, 2.0]), top_p=top_p, top_k=top_k)
    assert p_value(tokens, np.array([0.2, 0.4, 0.2, 0, 0.2])) > 0.01


def test_a_top_k_past_the_vocabulary_keeps_all(draw):
    logits = np.log([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(draw(logits, top_k=10)[0], draw(logits)[0])


def test_temperature_0_takes_the_largest_logit(draw):
    logits = np.random.default_rng(3).normal(size=(ROWS, VOCAB))
    logits[:, 7] = logits[:, 250] = 9.0  # the first of equals
    tokens, logprobs, entropies = draw(logits, temperature=0.0)
    assert set(tokens) == {7}
    expected = 9 - np.log(np.exp(logits).sum(axis=1))  # at temperature 1
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(entropies, -(p * np.log(p)).sum(axis=1), rtol=1e-5)


def test_impossible_entries_are_never_drawn(draw):
    """A first block, a last block and every third entry of -inf, and 100 nats between the largest and the rest."""
    logits = random_logits(4)
    logits[:128] = logits[256:] = logits[::3] = -np.inf
    logits[200] = 8.0
    tokens, logprobs, entropies = draw(logits)
    assert np.isfinite(logits[tokens]).all() and np.isfinite(logprobs).all()
    p = probabilities(logits)
    assert p_value(tokens, p) > 0.01
    np.testing.assert_allclose(entropies, -(p[p > 0] * np.log(p[p > 0])).sum(), rtol=1e-5)
    logits[200] += 100
    tokens, logprobs, entropies = draw(logits)
    assert set(tokens) == {200}
    np.testing.assert_array_equal(logprobs, 0.0)
    np.testing.assert_allclose(entropies, 0.0, atol=1e-30)


@pytest.mark.parametrize("size", [1, 5, 128, 130, 300, 1000])
def test_the_ends_of_the_uniform_numbers(size):
    """0 must not fall on leading entries of weight 0, nor the largest number below 1 past the last weight.

    In float32 that number times the sum may round up to the sum, which no edge exceeds: uncorrected the index would
    be `size` or beyond, or an entry of the padding.
    """
    rng, rows = np.random.default_rng(size), 64
    share = np.where(np.arange(rows) % 2, 0.2, 0.005)[:, None]  # of entries above 0; at 0.005 also whole blocks are 0
    weights = rng.random((rows, size), np.float32) * (rng.random((rows, size)) < share)
    weights[np.arange(rows), rng.integers(0, size, rows)] = 0.7

    @jax.jit
    def index(weights, uniform):
        blocks = room._blocks(weights, 0.0)
        return room._inverse_cdf(blocks.sum(axis=-1), functools.partial(room._take, blocks), uniform)

    for uniform in (0.0, 1 - 2**-24, 1.0):
        picked = np.asarray(index(weights, np.full(rows, uniform, np.float32)))
        assert (picked < size).all()
        assert (weights[np.arange(rows), picked] > 0).all()
    first = np.argmax(weights > 0, axis=1)
    np.testing.assert_array_equal(index(weights, np.zeros(rows, np.float32)), first)


def test_a_part_of_the_vocabulary_without_weight_is_never_drawn():
    """At the ends of the uniform numbers, where the first and the last part weigh nothing, and between two others."""
    uniform = np.array([0, 0.25, 0.5, np.nextafter(np.float32(1), 0)], np.float32)
    totals = np.array([[0], [2], [0], [2], [0]], np.float32) * np.ones(len(uniform), np.float32)
    part, rest = room._part_of(uniform, totals)
    assert part.tolist() == [1, 1, 3, 3]
    np.testing.assert_allclose(rest, [0, 0.5, 0, 1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [(0.8, 1.0, 0), (0.8, 0.9, 20), (0.0, 1.0, 0)])
def test_a_vocabulary_in_parts_is_drawn_from_as_a_whole_one(keys, sampling):
    """On four devices; those of the second one are impossible."""
    rows = 61
    logits = np.random.default_rng(0).normal(0, 2, (rows, 4 * 60)).astype(np.float32)
    logits[:, 60:120] = -np.inf
    run = functools.partial(jax.jit(room.draw), logits, np.asarray(keys[:rows]), *sampling)
    one = run()
    with jax.set_mesh(sharding.make_mesh(config.MeshConfig(fsdp=2, tensor=4))):
        parts = run()
    assert {int(token) // 60 for token in one.token} == {0, 2, 3}
    np.testing.assert_array_equal(parts.token, one.token)
    np.testing.assert_allclose(parts.logprob, one.logprob, atol=1e-5, rtol=0)
    np.testing.assert_allclose(parts.entropy, one.entropy, atol=1e-5, rtol=0)
