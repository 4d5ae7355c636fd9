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
from igrpo_jax.models import decoder, windows
from igrpo_jax.models.config import builtin
from igrpo_jax.models.policy import open_policy
from igrpo_jax.models.ragged import Paged, Ragged

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
@pytest.mark.parametrize("pages", [4, 6])
def test_cached_decode_equals_the_full_forward(params, full, pages):
    """Three prompts of other lengths in rows of pages of 4 positions, decoded side by side up to 15 tokens."""
    tokens, positions = tokens_and_positions(3, 15)
    expected = np.asarray(full(params, tokens, positions)[0])
    lengths, slots = np.array([1, 5, 8], np.int32), np.array([3, 0, 2])
    table = np.random.default_rng(0).permutation(24).astype(np.int32).reshape(4, 6)
    start = np.append(0, np.cumsum(lengths)).astype(np.int32)
    packed = np.full((1, 64), 47, np.int32)  # what stands past the prompts must not matter
    packed[0, : start[-1]] = np.concatenate([tokens[row, :length] for row, length in enumerate(lengths)])
    ragged = Ragged(lengths, table[slots], start, np.array([3], np.int32))
    places = np.concatenate([*map(np.arange, lengths), np.zeros(64 - start[-1])])[None].astype(np.int32)

    def prefill(params, packed, places, ragged):
        pools = caches.empty(TINY, 24, 4, 4, jnp.float32)
        entries = tuple(None if pool is None else Paged(pool, ragged) for pool in pools)
        return decoder.apply(TINY, params, packed, places, entries)

    hidden, cache = jax.jit(prefill)(params, packed, places, ragged)
    for row, length in enumerate(lengths):
        read = hidden[0, start[row] : start[row + 1]]
        np.testing.assert_allclose(read, expected[row, :length], atol=1e-5, rtol=0)

    def decode(params, token, position, cache):
        own, at = jnp.asarray(table[:, :pages]), position[:, 0]
        entries = windows.entries(windows.of_pages(cache, own), windows.new_token_buffers(cache, 4, 1), at, at >= 0, 0)
        hidden, rows = decoder.apply(TINY, params, token, position, entries)
        return hidden, windows.write_back(cache, rows, own, at, at + 1)

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


def gradient(c, remat):
    def loss(params, tokens, positions):
        hidden, _ = decoder.apply(c, params, tokens, positions, remat=remat)
        return jnp.mean(decoder.logits(c, params, hidden) ** 2)

    return jax.jit(jax.grad(loss), compiler_options=decoder.barrier_options(jax.default_backend()))


@pytest.mark.slow
def test_remat_saves_memory_and_changes_no_gradient():
    """The compiler may undo or hoist a recomputation that was asked for: hence its memory, and not a flag.

    At these sizes the scores alone, [4, 6, 64, 64] float32, are 0.4 MB a layer and several copies of them are kept:
    over 6 layers 7.7 MB without remat. With it there is one layer's at a time. (Without `barrier_options` both arms of
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


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts products in the text of a CPU's program")
def test_what_is_computed_again(params):
    """With "dots" only the two products of attention, scores and what they weigh; with "full" those of weights too."""
    batch = tokens_and_positions(2, 16)
    none, dots, full = (
        gradient(TINY, remat).lower(params, *batch).compile().as_text().count(" dot(")
        for remat in ("none", "dots", "full")
    )
    attention = TINY.pattern.count("*")
    assert none == 3 * (len([path for path in params if sharding.is_linear(path)]) + 2 * attention + 1)
    assert dots == none + 2 * attention
    # The last product of a sublayer is needed by the next one alone.
    assert full == dots + 3 * attention + 2 * TINY.pattern.count("-")


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
    assert decoder._repeats("*-*-", jnp.bfloat16, "full") == [(2, 2)]
    assert decoder._repeats("*-*-", jnp.bfloat16, "none") == decoder._repeats("*-*-", jnp.float32, "full") == [(4, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.proof)])
def test_a_loop_is_its_sublayers_one_after_the_other(hybrid, remat, monkeypatch):
    """Hidden states and gradients; of two different stretches."""
    c = dataclasses.replace(hybrid[0], pattern="M-M-*-*-")
    params, (tokens, places) = random_params(c), tokens_and_positions(2, 5)

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, remat):
        def loss(params):
            hidden, _ = decoder.apply(c, params, tokens, places, remat=remat)
            return jnp.mean(jnp.sin(hidden) ** 2), hidden

        return jax.value_and_grad(loss, has_aux=True)(params)

    plain = run(params, remat)
    monkeypatch.setattr(decoder, "_repeats", lambda kinds, dtype, remat: decoder.stretches(kinds))
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


@pytest.mark.slow
def test_the_builtin_model_is_drawn_from_the_seed():
    policy = open_policy(config.ModelConfig(builtin=config.BuiltinModelConfig(hidden_size=64, num_layers=1)))
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    first, same, other = (np.asarray(policy.load(mesh, seed)["embedding"]) for seed in (3, 3, 4))
    assert (first == same).all() and (first != other).mean() > 0.9


def test_logits_are_float32_also_in_bfloat16(params, full):
    tokens, positions = tokens_and_positions(2, 8)
    half = decoder.cast(params, "bfloat16")
    hidden = full(half, tokens, positions)[0]
    assert hidden.dtype == jnp.bfloat16
    logits = decoder.logits(TINY, half, hidden)
    assert logits.dtype == jnp.float32
    assert len(np.unique(np.asarray(logits))) > len(np.unique(np.asarray(logits.astype(jnp.bfloat16))))
    exact = decoder.logits(TINY, params, full(params, tokens, positions)[0])
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_no_product_of_logits_is_rounded_to_bfloat16(params):
    """With the embedding, and with a head of its own."""
    rows = jax.random.normal(jax.random.key(2), (3 * decoder.FEW_ROWS, TINY.hidden_size)).astype(jnp.bfloat16)
    embedding = params["embedding"].astype(jnp.bfloat16)
    weights = {"embedding": embedding, "lm_head": embedding.T}
    exact = np.asarray(rows, np.float64) @ np.asarray(embedding, np.float64).T
    for product in (
        lambda rows: decoder._logits_hidden_first(rows, embedding),
        lambda rows: decoder.logits(TINY, weights, rows),
        lambda rows: decoder.logits(dataclasses.replace(TINY, tie_embeddings=False), weights, rows),
    ):
        found = jax.jit(product, compiler_options={"xla_allow_excess_precision": False})(rows)
        np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max(), rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_few_rows_are_those_of_many(tied):
    cfg = dataclasses.replace(TINY, tie_embeddings=tied)
    size = (cfg.vocab_size, cfg.hidden_size)
    weights = {name: jax.random.normal(jax.random.key(1), size) for name in ("embedding", "lm_head")}
    weights["lm_head"] = 2 * weights["lm_head"].T
    rows = jax.random.normal(jax.random.key(2), (3, decoder.FEW_ROWS, cfg.hidden_size))
    logits = jax.jit(functools.partial(decoder.logits, cfg, weights))
    np.testing.assert_allclose(logits(rows[1]), logits(rows)[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits(rows), (1 if tied else 2) * rows @ weights["embedding"].T, rtol=1e-4, atol=1e-4)


def test_a_builtin_shape_that_can_not_be():
    with pytest.raises(InputError, match=r"config\.model\.builtin\.num_heads = 3"):
        builtin(config.BuiltinModelConfig(num_heads=3), 64)


def test_sines_and_cosines_are_computed_once_for_all_sublayers(params):
    """XLA's CPU compiler would compute them anew for the queries and keys of each sublayer."""
    tokens, positions = tokens_and_positions(2, 8)
    options = decoder.barrier_options(jax.default_backend())
    run = jax.jit(lambda *inputs: decoder.apply(TINY, *inputs)[0], compiler_options=options)
    text = run.lower(params, tokens, positions).compile().as_text()
    assert TINY.pattern.count("*") > 1
    assert text.count(" cosine(") == text.count(" sine(") == 1


def test_gradients_of_the_embedding_are_added_in_float32():
    """In bfloat16 a sum of ones would stay at 256; each of these is added, and a gradient has the table's dtype."""
    table, tokens = jnp.zeros((3, 2), jnp.bfloat16), jnp.ones((1, 2048), jnp.int32)
    gradient = jax.jit(jax.grad(lambda table: jnp.sum(decoder._lookup(table, tokens, 3).astype(jnp.float32))))(table)
    np.testing.assert_array_equal(gradient, [[0, 0], [2048, 2048], [0, 0]])
    assert gradient.dtype == jnp.bfloat16
