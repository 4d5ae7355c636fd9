"""The decoder: cached decode equals the full forward, padding changes nothing, remat changes memory alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder
from igrpo_jax.models.config import builtin

TINY = tiny_models.tiny_config(
    vocab_size=48, hidden_size=24, intermediate_size=40, num_heads=6, max_position_embeddings=64
)


def random_params(cfg):
    return jax.tree.map(jnp.asarray, tiny_models.random_params(cfg))


def tokens_and_positions(rows, length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length), np.int32)
    return tokens, np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture(scope="module")
def full():
    return jax.jit(lambda params, tokens, positions: decoder.apply(TINY, params, tokens, positions))


@pytest.mark.slow
@pytest.mark.parametrize("read", [16, 24])
def test_cached_decode_equals_the_full_forward(params, full, read):
    """Three prompts of different lengths in slots of their own, decoded side by side up to 15 tokens."""
    tokens, positions = tokens_and_positions(3, 15)
    expected = np.asarray(full(params, tokens, positions)[0])
    lengths, slots = np.array([1, 5, 8]), np.array([3, 0, 2])
    cache = caches.empty(TINY, slots=4, length=24, dtype=jnp.float32)
    for row, length in enumerate(lengths):
        prompt = np.full((1, 8), 47, np.int32)  # one bucket for all; what stands past the prompt must not matter
        prompt[0, :length] = tokens[row, :length]
        hidden, rows = full(params, prompt, np.arange(8, dtype=np.int32)[None])
        np.testing.assert_allclose(hidden[0, :length], expected[row, :length], atol=1e-5, rtol=0)
        cache = caches.insert(cache, rows, slots[row : row + 1])

    def decode(params, token, position, cache):
        hidden, part = decoder.apply(TINY, params, token, position, caches.window(cache, 4, read))
        return hidden, caches.restore(cache, part, position[:, 0], 1)

    step = jax.jit(decode)
    at = lengths.copy()
    while (at < 15).any():
        now = np.minimum(at, 14)  # a row that is done repeats its last token
        token, position = np.zeros((4, 1), np.int32), np.zeros((4, 1), np.int32)
        token[slots, 0], position[slots, 0] = tokens[np.arange(3), now], now
        hidden, cache = step(params, token, position, cache)
        np.testing.assert_allclose(hidden[slots, 0], expected[np.arange(3), now], atol=1e-5, rtol=0)
        at += 1


def test_a_query_reads_nothing_past_itself(params, full):
    tokens, positions = tokens_and_positions(2, 12)
    before = full(params, tokens, positions)[0]
    later = tokens.copy()
    later[:, 7:] = (later[:, 7:] + 1) % TINY.vocab_size
    after = full(params, later, positions)[0]
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).min(axis=-1).max() > 1e-4


def test_right_padding_changes_nothing(params, full):
    tokens, positions = tokens_and_positions(2, 9)
    expected = full(params, tokens, positions)[0]
    for pad in (0, 47):
        padded = np.pad(tokens, ((0, 1), (0, 7)), constant_values=pad)
        got = full(params, padded, np.broadcast_to(np.arange(16, dtype=np.int32), padded.shape))[0]
        np.testing.assert_allclose(got[:2, :9], expected, atol=1e-5, rtol=0)


def random_cache(rows, length, seed):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda x: draw(size=x.shape).astype(x.dtype), caches.empty(TINY, rows, length, jnp.float32))


def test_insert_writes_its_slots_and_drops_what_is_past_the_last():
    cache, rows = random_cache(4, 10, 0), random_cache(3, 6, 1)
    after = jax.jit(caches.insert)(cache, rows, np.array([2, 4, 0]))  # four slots: the second row has none
    for old, row, new in zip(*map(jax.tree.leaves, (cache, rows, after)), strict=True):
        expected = np.array(old)
        expected[2, :, :6], expected[0, :, :6] = row[0], row[2]
        np.testing.assert_array_equal(new, expected)


def test_insert_keeps_the_dtype_of_the_cache():
    cache = caches.empty(TINY, 2, 8, jnp.bfloat16)
    after = caches.insert(cache, random_cache(1, 4, 0), np.array([1]))
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}


def test_fork_repeats_one_row():
    prefix = random_cache(1, 6, 0)
    for one, many in zip(*map(jax.tree.leaves, (prefix, caches.fork(prefix, 3))), strict=True):
        np.testing.assert_array_equal(many, np.repeat(one, 3, axis=0))


def test_a_cache_remembers_attention_only():
    cache = caches.empty(TINY, slots=3, length=10, dtype=jnp.float32)
    assert [entry is None for entry in cache] == [kind == "-" for kind in TINY.pattern]
    assert cache[0].k.shape == cache[0].v.shape == (3, 2, 10, 8)


def gradient(c, remat):
    def loss(params, tokens, positions):
        hidden, _ = decoder.apply(c, params, tokens, positions, remat=remat)
        return jnp.mean(decoder.logits(c, params, hidden) ** 2)

    return jax.jit(jax.grad(loss), compiler_options=decoder.remat_options(jax.default_backend()))


@pytest.mark.slow
def test_remat_saves_memory_and_changes_no_gradient():
    """The compiler may undo or hoist a recomputation that was asked for: hence its memory, and not a flag.

    At these sizes the scores alone, [4, 6, 64, 64] float32, are 0.4 MB a layer and several copies of them are kept:
    over 6 layers 7.7 MB without remat. With it there is one layer's at a time. (Without `remat_options` both arms of
    the test need the same memory on CPU, where the compiler runs every recomputation at the start.)
    """
    c = dataclasses.replace(TINY, pattern="*-" * 6)
    params, batch = random_params(c), tokens_and_positions(4, 64)
    compiled = {remat: gradient(c, remat).lower(params, *batch).compile() for remat in ("none", "full")}
    memory = {remat: program.memory_analysis().temp_size_in_bytes for remat, program in compiled.items()}
    assert memory["full"] < 0.5 * memory["none"], memory
    none, full = (compiled[remat](params, *batch) for remat in ("none", "full"))
    for path in params:
        scale = np.abs(none[path]).max()
        assert scale > 0, path
        np.testing.assert_allclose(full[path], none[path], atol=1e-5 * scale, rtol=0, err_msg=path)


@pytest.mark.parametrize(
    ("pattern", "pieces"),
    [
        ("*-" * 28, [(2, 28)]),
        ("M-*M", [(1, 1)] * 4),
        ("M-M-*-*-", [(2, 2), (2, 2)]),
        ("M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-", [(11, 4), (2, 4)]),  # Nemotron-H-8B
    ],
)
def test_what_repeats(pattern, pieces):
    assert decoder.stretches(pattern) == pieces
    cut, at = [], 0
    for width, times in pieces:
        cut.append(pattern[at : at + width] * times)
        at += width * times
    assert "".join(cut) == pattern


def test_weights_that_nothing_has_cast_are_not_stacked():
    assert decoder._pieces("*-*-", jnp.bfloat16, "full") == [(2, 2)]
    assert decoder._pieces("*-*-", jnp.bfloat16, "none") == decoder._pieces("*-*-", jnp.float32, "full") == [(4, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_a_loop_is_its_sublayers_one_after_the_other(hybrid, remat, monkeypatch):
    """Of rows and of those that continue them: hidden states, caches and gradients; of two different stretches."""
    c = dataclasses.replace(hybrid[0], pattern="M-M-*-*-")
    params, length = random_params(c), jnp.array([3, 5])
    tokens, places = tokens_and_positions(2, 5)
    more, _ = tokens_and_positions(4, 6)

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, remat):
        def loss(params):
            first, cache = decoder.apply(c, params, tokens, places, length=length, remat=remat)
            at = jnp.repeat(length, 2)[:, None] + jnp.arange(6)
            rows, last = decoder.apply(c, params, more, at, caches.shared(cache, length), remat=remat)
            return jnp.mean(jnp.sin(rows) ** 2), (first, rows, cache, last)

        return jax.value_and_grad(loss, has_aux=True)(params)

    plain = run(params, remat)
    monkeypatch.setattr(decoder, "_pieces", lambda kinds, dtype, remat: decoder.stretches(kinds))
    run.clear_cache()
    looped = run(params, remat)
    assert jax.tree.structure(plain) == jax.tree.structure(looped)
    for (path, x), y in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(looped), strict=True):
        assert np.abs(x).max() > 0 or "lm_head" in str(path)
        np.testing.assert_allclose(y, x, atol=1e-5 * np.abs(x).max(), rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_count_of_parameters_is_that_of_the_arrays(tied, bias):
    c = dataclasses.replace(TINY, tie_embeddings=tied, qkv_bias=bias)
    shapes = decoder.shapes(c)
    assert c.num_params == sum(int(np.prod(shape)) for shape in shapes.values())
    assert ("lm_head" in shapes) is not tied
    assert ("blocks/0/mixer/q_bias" in shapes) is bias


@pytest.mark.slow
def test_init_depends_on_its_key_and_starts_near_even_odds():
    c = builtin(config.BuiltinModelConfig(hidden_size=64, num_layers=1), vocab_size=64)
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    first, other = (decoder.init(c, jax.random.key(seed), mesh) for seed in (0, 1))
    for path in first:
        if path.endswith(("o_proj", "down_proj")):  # a sublayer starts as the identity
            assert not first[path].any()
        else:
            assert path.endswith("scale") or np.abs(first[path] - other[path]).min() > 0
    tokens, positions = tokens_and_positions(2, 8)
    logits = decoder.logits(c, first, decoder.apply(c, first, tokens, positions)[0])
    assert 0.1 < float(logits.std()) < 1  # a head tied to unit embeddings would start at std 8
    assert logits.dtype == jnp.float32


def test_logits_are_float32_also_in_bfloat16(params, full):
    tokens, positions = tokens_and_positions(2, 8)
    half = decoder.cast(params, "bfloat16")
    hidden, cache = full(half, tokens, positions)
    assert hidden.dtype == cache[0].k.dtype == jnp.bfloat16
    logits = decoder.logits(TINY, half, hidden)
    assert logits.dtype == jnp.float32
    assert len(np.unique(np.asarray(logits))) > len(np.unique(np.asarray(logits.astype(jnp.bfloat16))))
    exact = decoder.logits(TINY, params, full(params, tokens, positions)[0])
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_a_builtin_shape_that_can_not_be():
    with pytest.raises(InputError, match=r"config\.model\.builtin\.num_heads = 3"):
        builtin(config.BuiltinModelConfig(num_heads=3), 64)
