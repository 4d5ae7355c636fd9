"""Attention of whole rows: every implementation against a plain one, on one device and on meshes; which is chosen."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import plain_attention
import pytest

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError
from igrpo_jax.models import attention, decoder, splash
from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import Prefix

# cuDNN's layout and mask are run by XLA, splash's kernel by Pallas' interpreter.
RUNS_HERE = {
    "xla": attention.xla_attention,
    "chunked": attention.chunked_attention,
    "cudnn": functools.partial(attention.cudnn_attention, implementation="xla"),
    "splash": attention.IMPLEMENTATIONS["splash_interpret"],
}


def plain(arrays, lengths, weight):
    """Row by row over the keys that there really are, in float64: no padding is seen, so none has to be masked.

    Output, and gradients of its sum weighted by `weight`, by q, k, v and the prefix's k and v.
    """
    q, k, v, *before = (x.astype(np.float64) for x in jax.tree.leaves(arrays))
    groups = q.shape[2] // k.shape[1]
    mixed, grads = np.zeros_like(q), [np.zeros_like(x) for x in (q, k, v, *before)]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        of, past = (b, n // groups), 0
        keys, values = k[of], v[of]
        if before:
            prefix = (b // (len(q) // len(lengths)), n // groups)
            past = lengths[prefix[0]]
            keys = np.concatenate([before[0][prefix][:past], keys])
            values = np.concatenate([before[1][prefix][:past], values])
        row = plain_attention.attend(q[b, :, n], keys, values, weight[b, :, n])
        mixed[b, :, n], grads[0][b, :, n] = row.mixed, row.d_q
        grads[1][of] += row.d_k[past:]
        grads[2][of] += row.d_v[past:]
        if before:
            grads[3][prefix][:past] += row.d_k[:past]
            grads[4][prefix][:past] += row.d_v[:past]
    return [mixed, *grads]


def inputs(prefixes, rows, time, kv_heads, groups, positions=0, lengths=(), head_dim=8, dtype="float32"):
    """((q, k, v, prefix keys and values or None), prefix lengths, a weight for each output)."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    batch, past = prefixes * rows, (prefixes, kv_heads, positions, head_dim)
    q, weight = draw(batch, time, kv_heads * groups, head_dim), draw(batch, time, kv_heads * groups, head_dim)
    k, v = draw(batch, kv_heads, time, head_dim), draw(batch, kv_heads, time, head_dim) - 2
    before = (draw(*past), draw(*past) + 2) if positions else None
    for row, length in enumerate(lengths):
        for x in before:
            x[row, :, length:] = 40  # of padding; whoever reads it is far off
    return (q, k, v, before), np.array(lengths, np.int32), weight


def value_and_grads(attend, arrays, lengths, weight):
    """What `plain` gives, of an implementation; as float32 on the host."""

    def loss(arrays, lengths, weight):
        q, k, v, before = arrays
        mixed = attend(q, k, v, None if before is None else Prefix(*before, lengths))
        assert mixed.dtype == q.dtype and mixed.shape == q.shape
        return jnp.sum(mixed.astype(jnp.float32) * weight), mixed

    (_, mixed), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays, lengths, weight)
    return [np.asarray(x, np.float32) for x in (mixed, *jax.tree.leaves(grads))]


def assert_close(found, expected, atol):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=atol)


CASES = {
    "one token": inputs(2, 1, 1, 2, 1),
    "no prefix": inputs(2, 1, 130, 2, 2),
    "some of a prefix": inputs(1, 3, 7, 1, 4, positions=5, lengths=[3]),
    "none and all of a prefix": inputs(2, 3, 130, 2, 2, positions=16, lengths=[0, 16]),
    "a longer prefix than rows": inputs(2, 1, 128, 2, 1, positions=130, lengths=[7, 130]),
}


LONG_CASES = {  # more keys than LONGEST_XLA, where chunked runs by blocks
    "no prefix": inputs(1, 2, 300, 2, 2),
    "whole blocks": inputs(1, 1, 320, 1, 1),
    "none and some of a prefix": inputs(2, 2, 70, 2, 2, positions=230, lengths=[0, 150]),
    "a prefix that ends with a block": inputs(1, 3, 9, 1, 4, positions=256, lengths=[128]),
    "all of a prefix, one token": inputs(2, 1, 1, 2, 1, positions=257, lengths=[257, 257]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RUNS_HERE)
def test_it_equals_the_plain_one(name, case):
    # Rounding alone is about 1e-5; a mask that is off by one key, or a scale left out, is off by more than 1e-2.
    assert_close(value_and_grads(RUNS_HERE[name], *CASES[case]), plain(*CASES[case]), 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG_CASES)
def test_blocks_of_long_rows_equal_the_plain_one(case):
    assert_close(value_and_grads(attention.chunked_attention, *LONG_CASES[case]), plain(*LONG_CASES[case]), 5e-5)


def test_a_query_does_not_visit_later_blocks():
    """NaN in the keys and values of one block reaches the queries of that block and of later ones, and no others."""
    (q, k, v, _), _, _ = inputs(1, 1, 320, 1, 1)
    expected = np.asarray(attention.chunked_attention(q, k, v, None))
    k[:, :, 192:256], v[:, :, 192:256] = np.nan, np.nan
    found = np.asarray(attention.chunked_attention(q, k, v, None))
    np.testing.assert_array_equal(found[:, :192], expected[:, :192])
    assert np.isnan(found[:, 192:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS_HERE)
def test_bfloat16(name):
    positions = 260 if name == "chunked" else 24  # enough for blocks
    case = inputs(1, 2, 40, 1, 2, positions=positions, lengths=[9], dtype=jnp.bfloat16)
    for x, y in zip(value_and_grads(RUNS_HERE[name], *case), plain(*case), strict=True):
        assert np.abs(x - y).max() <= 0.02 * np.abs(y).max()  # 8 bits: 0.004 each, over a few roundings


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("name", ["chunked", "splash"])
def test_a_mesh_changes_nothing(name, shape):
    positions = 260 if name == "chunked" else 24  # enough for blocks
    case = inputs(4, 3, 20, 2, 2, positions=positions, lengths=[24, 0, 9, 24])
    mesh = sharding.make_mesh(config.MeshConfig(*shape))
    rows, cache = ("batch", "time", "heads", "head_dim"), caches.AXES
    axes = (rows, cache, cache, (cache, cache)), ("batch",), rows

    def put(logical, x):
        return sharding.to_global(x, jax.NamedSharding(mesh, sharding.spec(logical)))

    placed = jax.tree.map(put, axes, case, is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], str))
    with jax.set_mesh(mesh):
        assert_close(value_and_grads(RUNS_HERE[name], *placed), plain(*case), 5e-5)


@pytest.mark.slow
def test_chunked_memory_grows_with_length_and_not_its_square():
    def temporaries(attend, time):
        (q, k, v, before), lengths, _ = inputs(1, 2, time, 1, 2, positions=time, lengths=[time])
        loss = lambda q, k, v, before: attend(q, k, v, Prefix(*before, lengths)).sum()
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(q, k, v, before).compile()
        return program.memory_analysis().temp_size_in_bytes

    long, short = (temporaries(attention.chunked_attention, time) for time in (2048, 1024))
    assert long < 2.2 * short
    # xla's scores alone: [B, N, T, P + T] float32.
    assert temporaries(attention.xla_attention, 1024) > 2 * 2 * 1024 * 2048 * 4 > 5 * short


@pytest.mark.parametrize("size, padded", [(1, (128, 128)), (130, (256, 256)), (512, (512, 512)), (600, (768, 384))])
def test_splash_blocks(size, padded):
    assert splash._padded(size) == padded


@pytest.mark.slow
def test_splash_of_several_blocks():
    case = inputs(1, 1, 600, 1, 1, positions=200, lengths=[150])  # 2 blocks of 384 queries, 2 of 512 keys
    assert_close(value_and_grads(RUNS_HERE["splash"], *case), plain(*case), 5e-5)


def on(platform):
    return SimpleNamespace(devices=np.array([[SimpleNamespace(platform=platform)]], object))


@pytest.mark.parametrize(
    "platform, requested, dtype, head_dim, expected",
    [
        ("tpu", "auto", "bfloat16", 128, "splash"),
        ("tpu", "auto", "float32", 12, "splash"),
        ("tpu", "chunked", "bfloat16", 128, "chunked"),
        ("gpu", "auto", "bfloat16", 64, "cudnn"),
        ("gpu", "auto", "float32", 64, "chunked"),
        ("gpu", "auto", "bfloat16", 12, "chunked"),
        ("gpu", "xla", "bfloat16", 64, "xla"),
        ("cpu", "auto", "bfloat16", 64, "chunked"),
        ("cpu", "xla", "float32", 64, "xla"),
    ],
)
def test_the_choice(platform, requested, dtype, head_dim, expected, caplog):
    caplog.set_level("INFO")
    assert attention.choose(requested, on(platform), dtype, head_dim) == expected
    assert f"attention: {expected}" in caplog.text
    assert expected in attention.IMPLEMENTATIONS and expected in attention.PACKED


@pytest.mark.parametrize(
    "platform, requested, dtype, head_dim, says",
    [
        ("cpu", "splash", "float32", 64, "config.learner.attention = splash: is for TPUs, the mesh is of cpu devices"),
        ("gpu", "splash", "bfloat16", 64, "config.learner.attention = splash: is for TPUs"),
        ("tpu", "cudnn", "bfloat16", 64, "config.learner.attention = cudnn: is for GPUs, the mesh is of tpu devices"),
        ("gpu", "cudnn", "float32", 64, "needs config.model.dtype = bfloat16, which is float32; set it to auto"),
        ("gpu", "cudnn", "bfloat16", 12, "needs a head_dim that is a multiple of 8 up to 128, the model's is 12"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(platform, requested, dtype, head_dim, says):
    with pytest.raises(InputError) as error:
        attention.choose(requested, on(platform), dtype, head_dim)
    assert says in str(error.value) and "set it to auto" in str(error.value)


def logits_and_grads(c, params):
    """Two contexts run once, three rows continue each; each sublayer is run again in the backward pass."""
    rng = np.random.default_rng(0)
    prefix, tokens = rng.integers(0, c.vocab_size, (2, 9), np.int32), rng.integers(0, c.vocab_size, (6, 5), np.int32)
    length = np.array([9, 4], np.int32)
    positions = np.repeat(length, 3)[:, None] + np.arange(5, dtype=np.int32)

    def loss(params):
        places = np.broadcast_to(np.arange(9, dtype=np.int32), prefix.shape)
        _, cache = decoder.apply(c, params, prefix, places, remat="full")
        hidden, _ = decoder.apply(c, params, tokens, positions, caches.shared(cache, length), remat="full")
        logits = decoder.logits(c, params, hidden)
        return jnp.sum(jax.nn.log_softmax(logits)[..., 0]), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return [np.asarray(logits), *(np.asarray(grads[path]) for path in sorted(grads))]


@pytest.mark.slow
def test_the_decoder_gives_the_same_with_any(tiny, monkeypatch):
    """And splash on a mesh, where the rows of a sublayer that is run again go through shard_map twice."""
    c = dataclasses.replace(tiny[0], pattern="*")  # the rest of it has nothing to do with the choice
    params = {path: tiny[1][path] for path in decoder.shapes(c)}
    with pytest.raises(KeyError, match="none such"):  # so it is read at all
        logits_and_grads(dataclasses.replace(c, attention="none such"), params)
    expected = logits_and_grads(c, params)
    monkeypatch.setattr(attention, "LONGEST_XLA", 0)  # by blocks
    assert_close(logits_and_grads(dataclasses.replace(c, attention="chunked"), params), expected, 1e-4)
    mesh = sharding.make_mesh(config.MeshConfig(1, 2, 2), jax.devices()[:4])
    placed = {path: sharding.to_global(x, sharding.param_sharding(mesh, path)) for path, x in params.items()}
    with jax.set_mesh(mesh):
        found = logits_and_grads(dataclasses.replace(c, attention="splash_interpret"), placed)
    assert_close(found, expected, 1e-4)
