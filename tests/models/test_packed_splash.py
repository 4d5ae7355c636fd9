"""The TPU's kernel on a packed sequence, run by Pallas' interpreter: against dense attention, and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import segments as packed
from igrpo_jax.models import splash, visits
from igrpo_jax.models.segments import PrefixGroup, Segments
from igrpo_jax.models.visits import Lengths

AXES = (("batch", "time", "heads", "head_dim"), packed.KV_AXES, packed.KV_AXES)
attend = functools.partial(splash.packed_splash_attention, interpret=True)

RAGGED = [PrefixGroup(70, [50, 1, 60]), PrefixGroup(0, [30, 5]), PrefixGroup(40, [3, 20])]  # 279 tokens
FILLED = [PrefixGroup(100, [130, 26]), PrefixGroup(64, [64])]  # 384 tokens, one completion longer than a block
ONE_GROUP = [PrefixGroup(200, [40, 9, 100])]  # blocks of completions that all read the same prefix


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128 tokens, so that a short sequence has several."""
    monkeypatch.setattr(splash, "BLOCKS", (128,))


def inputs(segments, kv_heads, groups, head_dim=8):
    """q, k and v, and a weight of each output that is 0 at padding."""
    rng = np.random.default_rng(0)
    shards, size = segments.segment.shape
    q, weight = (rng.normal(size=(shards, size, kv_heads * groups, head_dim)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(shards, kv_heads, size, head_dim)).astype(np.float32) for _ in range(2))
    padding = segments.segment == 0
    k[np.broadcast_to(padding[:, None], k.shape[:3])] = 40  # whoever reads padding is far off
    weight[padding] = 0
    return (q, k, v), weight


def dense(q, k, v, segments):
    """Attention with all scores in memory, zeros at padding."""
    groups = q.shape[2] // k.shape[1]
    k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
    scores = jnp.einsum("STNH,SNUH->SNTU", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(packed.dense_mask(segments)[:, None], scores, -1e30)
    mixed = jnp.einsum("SNTU,SNUH->STNH", jax.nn.softmax(scores, axis=-1), v)
    return jnp.where((segments.segment == 0)[:, :, None, None], 0, mixed)


def value_and_grads(attention, arrays, weight, segments):
    def loss(arrays, weight, segments):
        mixed = attention(*arrays, segments)
        assert mixed.shape == arrays[0].shape and mixed.dtype == arrays[0].dtype
        return jnp.sum(mixed * weight), mixed

    (_, mixed), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays, weight, segments)
    return [np.asarray(x) for x in (mixed, *grads)]


def assert_equal_dense(arrays, weight, segments, placed=None, attention=attend):
    expected = value_and_grads(dense, arrays, weight, segments)
    for x, y in zip(value_and_grads(attention, *(placed or (arrays, weight, segments))), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("size, padded", [(1, (128, 128)), (130, (256, 256)), (512, (512, 512)), (600, (768, 384))])
def test_a_packed_sequence_has_the_blocks_that_need_the_least_padding(size, padded):
    assert splash._padded(size) == padded


@pytest.mark.slow
@pytest.mark.parametrize(
    "shards, kv_heads, groups",
    [([RAGGED], 1, 3), ([FILLED], 2, 1), ([ONE_GROUP, []], 1, 2)],
    ids=["ragged", "filled", "one group, and a shard of padding"],
)
def test_it_equals_dense_attention(shards, kv_heads, groups, small_blocks):
    segments = packed.pack(shards, 384)
    assert_equal_dense(*inputs(segments, kv_heads, groups), segments)


@pytest.mark.slow
@pytest.mark.parametrize("fits", [True, pytest.param(False, marks=pytest.mark.proof)])
def test_short_loops_where_they_are_enough(fits, small_blocks, monkeypatch):
    """Two completions, each of a block, read one block of a prefix: in two pieces, each for one of them.

    The attention is run again in the backward pass, as by remat.
    """
    short = Lengths(pieces=2, keys=2 if fits else 1, queries=1)
    monkeypatch.setattr(visits, "lengths", lambda count: (short, Lengths(count, count + 1, count)))
    segments = packed.pack([[PrefixGroup(100, [128, 128])], [PrefixGroup(128, [200])]], 384)
    for shard, expected in ((0, fits), (1, False)):
        needed = visits.visits(*(jnp.asarray(x[shard]) for x in segments[:2] + segments[3:4]), 128)
        assert visits.fit(needed, short) == expected
    assert_equal_dense(*inputs(segments, 1, 2), segments, attention=jax.checkpoint(attend))


@pytest.mark.slow
def test_a_packed_sequence_that_is_padded_to_blocks():
    segments = packed.pack([[*RAGGED, *ONE_GROUP]], 704)  # 2 blocks of 384 tokens
    assert_equal_dense(*inputs(segments, 1, 1), segments)


@pytest.mark.slow
def test_a_mesh_changes_nothing(small_blocks, monkeypatch):
    """Its devices run different loops: the short ones are enough for the shard of padding alone."""
    monkeypatch.setattr(visits, "lengths", lambda count: (Lengths(1, 1, 1), Lengths(count, count + 1, count)))
    segments = packed.pack([RAGGED, FILLED, [], ONE_GROUP], 384)
    arrays, weight = inputs(segments, 2, 2)
    mesh = sharding.make_mesh(config.MeshConfig(2, 2, 2))
    put = lambda x, *axes: sharding.to_global(x, jax.NamedSharding(mesh, sharding.spec(axes)))
    placed = jax.tree.map(lambda x: put(x, "batch", *[None] * (x.ndim - 1)), segments)
    of_arrays = tuple(put(x, *axes) for x, axes in zip(arrays, AXES, strict=True))
    with jax.set_mesh(mesh):
        assert_equal_dense(arrays, weight, segments, (of_arrays, put(weight, *AXES[0]), placed))


@pytest.mark.slow
def test_a_gradient_of_padding_changes_nothing(small_blocks):
    segments = packed.pack([RAGGED], 384)
    arrays, weight = inputs(segments, 1, 1)
    expected = value_and_grads(attend, arrays, weight, segments)
    weight[:, 279:] = 1e3
    for x, y in zip(value_and_grads(attend, arrays, weight, segments), expected, strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.all((x if x.shape[1] == 384 else x.swapaxes(1, 2))[:, 279:] == 0)


def test_intervals_up_to_the_longest_packed_sequence():
    segment = jnp.repeat(jnp.array([1, 2], jnp.int32), jnp.array([40000, 25536]), total_repeat_length=65536)
    reads = splash._reads(65536)(splash._intervals(segment)[-1], jnp.array([39999, 40000, 65535, 65536, 131071]))
    assert reads.tolist() == [False, True, True, True, True]


@pytest.mark.slow
def test_an_order_that_needs_more_visits_gives_nan(small_blocks):
    """A prefix before its completion: its blocks are visited in both copies, which `pack` never needs."""
    segment, parent = np.full((1, 384), 1, np.int32), np.full((1, 384), 1, np.int32)
    segment[:, 300:] = 2
    blocks = np.ones((1, 384 // packed.BLOCK, 384 // packed.BLOCK), bool)
    segments = Segments(segment, parent, np.arange(384, dtype=np.int32)[None], blocks, None)
    arrays, _ = inputs(segments, 1, 1)
    assert np.isnan(attend(*arrays, segments)).all()


def test_a_packed_sequence_that_is_too_long_is_refused():
    q, k = jnp.zeros((1, 65664, 1, 8), jnp.bfloat16), jnp.zeros((1, 1, 65664, 8), jnp.bfloat16)
    with pytest.raises(AssertionError, match="65664 tokens"):
        attend(q, k, k, packed.pack([[]], 128))
