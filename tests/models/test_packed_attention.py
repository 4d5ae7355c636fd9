"""Attention over packed segments: each implementation against each prefix and completion run alone.

The TPU's kernel is tested in `test_packed_splash.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_attention
import plain_ranges
import pytest

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import attention
from igrpo_jax.models.segments import KV_AXES, PrefixGroup, dense_mask, pack, starts


def with_mask(q, k, v, segments):
    """Computes cuDNN's attention of segments without spans."""
    return attention.packed_cudnn_attention(q, k, v, segments._replace(spans=None), kernels=plain_ranges)


RUNS_HERE = {
    "xla": attention.packed_xla_attention,
    "chunked": attention.packed_chunked_attention,
    "cudnn": functools.partial(attention.packed_cudnn_attention, kernels=plain_ranges),
    "cudnn with a mask": with_mask,
}
AXES = ("batch", "time", "heads", "head_dim"), KV_AXES, KV_AXES

RAGGED = [PrefixGroup(70, [50, 1, 20]), PrefixGroup(0, [9, 5]), PrefixGroup(20, [3])]  # 178 tokens
LONG = [PrefixGroup(3, [150]), PrefixGroup(90, [1])]  # a completion and a prefix that are longer than a block
FILLED = [PrefixGroup(64, [64]), PrefixGroup(64, [64])]  # 256 tokens; each segment is a block
SIZE = 256
CASES = {  # shards, kv heads, heads per kv head
    "ragged": ([RAGGED], 2, 3),
    "long": ([LONG], 1, 2),
    "without padding": ([FILLED], 2, 1),
    "shards, one of padding alone": ([RAGGED, [], LONG], 1, 1),
}


def inputs(shards, kv_heads, groups, head_dim=8, dtype="float32"):
    """Segments; q, k and v; and the weight of each output, which is 0 at padding."""
    rng = np.random.default_rng(0)
    segments = pack(shards, SIZE, most=12)
    queries, keys = (len(shards), SIZE, kv_heads * groups, head_dim), (len(shards), kv_heads, SIZE, head_dim)
    q, k, v, weight = (rng.normal(size=shape).astype(dtype) for shape in (queries, keys, keys, queries))
    padding = segments.segment == 0
    for x in (k, v):
        x[np.broadcast_to(padding[:, None], keys[:3])] = 40  # whoever reads padding is far off
    weight[padding] = 0
    return segments, (q, k, v), weight


def tokens_of(groups):
    """Yields of each segment the indices of its tokens, and those of the prefix that it continues."""
    for group, (start, own) in zip(groups, starts(groups), strict=True):
        prefix = np.arange(start, start + group.prefix)
        if group.prefix:
            yield prefix, prefix[:0]
        for at, length in zip(own, group.completions, strict=True):
            yield np.arange(at, at + length), prefix


def alone(shards, arrays, weight):
    """Outputs, and gradients of their sum weighted by `weight`, of each segment run after its prefix as a row."""
    q, k, v = arrays
    per_kv_head = q.shape[2] // k.shape[1]
    mixed, d_q, d_k, d_v = (np.zeros(x.shape) for x in (q, q, k, v))
    for s, groups in enumerate(shards):
        for own, prefix in tokens_of(groups):
            read = np.concatenate([prefix, own])
            for n in range(q.shape[2]):
                kv = s, n // per_kv_head, read
                row = plain_attention.attend(q[s, own, n], k[kv], v[kv], weight[s, own, n])
                mixed[s, own, n], d_q[s, own, n] = row.mixed, row.d_q
                d_k[kv] += row.d_k
                d_v[kv] += row.d_v
    return mixed, d_q, d_k, d_v


def value_and_grads(attend, segments, arrays, weight):
    """What `alone` gives, of an implementation; as float32 on the host."""

    def loss(arrays, segments, weight):
        mixed = attend(*arrays, segments)
        assert mixed.dtype == arrays[0].dtype and mixed.shape == arrays[0].shape
        return jnp.sum(mixed.astype(jnp.float32) * weight), mixed

    # Or XLA would leave out roundings that the program asks for.
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options={"xla_allow_excess_precision": False})
    (_, mixed), grads = run(arrays, segments, weight)
    return [np.asarray(x, np.float32) for x in (mixed, *grads)]


def assert_equal_alone(shards, found, arrays, weight, padding):
    """At real tokens. At padding outputs are finite, and there is no gradient."""
    for name, x, y in zip(("mixed", "q", "k", "v"), found, alone(shards, arrays, weight), strict=True):
        if name == "mixed":
            assert np.isfinite(x).all()
            x = np.where(padding[:, :, None, None], 0, x)
        np.testing.assert_allclose(x, y, atol=5e-5, rtol=5e-5, err_msg=name)
        by_token = x if name in ("mixed", "q") else x.swapaxes(1, 2)
        assert (by_token[padding] == 0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RUNS_HERE)
def test_it_equals_each_segment_alone(name, case):
    shards, kv_heads, groups = CASES[case]
    segments, arrays, weight = inputs(shards, kv_heads, groups)
    found = value_and_grads(RUNS_HERE[name], segments, arrays, weight)
    assert_equal_alone(shards, found, arrays, weight, segments.segment == 0)


@pytest.mark.parametrize("name", RUNS_HERE)
def test_bfloat16(name):
    """Scores are float32: in bfloat16 the largest of these, of some hundreds, would be off by one."""
    segments, arrays, weight = inputs([RAGGED], 1, 2, head_dim=16, dtype=jnp.bfloat16)  # scaled without rounding
    arrays = (32 * arrays[0], *arrays[1:])
    found = value_and_grads(RUNS_HERE[name], segments, arrays, weight)
    found[0][segments.segment == 0] = 0
    for x, y in zip(found, alone([RAGGED], arrays, weight), strict=True):
        assert np.abs(x - y).max() <= 0.02 * np.abs(y).max()  # 8 bits: 0.004 each, over a few roundings


@pytest.mark.parametrize("name", ["xla", "chunked"])
def test_gradients_of_a_prefix_that_many_blocks_read_are_added_in_float32(name):
    """In bfloat16 the sum over the first block would stay as it is, to which each of 15 others adds a 512th."""
    shards, size = [[PrefixGroup(1, [1] * 1023)]], 1024
    segments = pack(shards, size)
    q, k, v = (np.zeros(shape, jnp.bfloat16) for shape in ((1, size, 1, 8), *[(1, 1, size, 8)] * 2))
    q[:], v[:, :, -1] = 1, 1  # the prefix is the last token
    weight = np.full(q.shape, 1 / 64, jnp.bfloat16)
    weight[:, :64] = 8
    arrays = q, k, v
    found, expected = value_and_grads(RUNS_HERE[name], segments, arrays, weight), alone(shards, arrays, weight)
    for x, y in zip(found[2:], expected[2:], strict=True):
        np.testing.assert_allclose(x[:, :, -1], y[:, :, -1], rtol=0.01)


@pytest.mark.parametrize("name", RUNS_HERE)
def test_a_mesh_changes_nothing(name):
    shards = [RAGGED, LONG, [], FILLED]
    segments, arrays, weight = inputs(shards, 2, 2)
    mesh = sharding.make_mesh(config.MeshConfig(2, 2, 2))
    put = lambda x, *axes: sharding.to_global(x, jax.NamedSharding(mesh, sharding.spec(axes)))
    placed = jax.tree.map(lambda x: put(x, "batch", *[None] * (x.ndim - 1)), segments)
    of_arrays = tuple(put(x, *axes) for x, axes in zip(arrays, AXES, strict=True))
    with jax.set_mesh(mesh):
        found = value_and_grads(RUNS_HERE[name], placed, of_arrays, put(weight, *AXES[0]))
    assert_equal_alone(shards, found, arrays, weight, segments.segment == 0)


@pytest.mark.parametrize("name", RUNS_HERE)
def test_a_completion_is_seen_by_itself_alone(name):
    """All other outputs are equal bit for bit, those in the same blocks and those that share its prefix too."""
    segments, (q, k, v), _ = inputs([RAGGED], 2, 2)
    changed = next(own for own, prefix in tokens_of(RAGGED) if len(prefix) == 70)  # of the first group
    assert len(changed) == 50
    run = jax.jit(lambda q, k, v: RUNS_HERE[name](q, k, v, segments))
    before = np.asarray(run(q, k, v))
    q, k, v = q.copy(), k.copy(), v.copy()
    q[:, changed] += 3
    k[:, :, changed] -= 2
    v[:, :, changed] *= -5
    after = np.asarray(run(q, k, v))
    other = np.setdiff1d(np.arange(178), changed)
    np.testing.assert_array_equal(after[:, other], before[:, other])
    assert (after[:, changed] != before[:, changed]).any(axis=(0, 2, 3)).all()


def test_with_a_mask_every_token_reads_something(monkeypatch):
    """Padding reads itself: cuDNN's softmax over nothing would not be finite."""
    segments, arrays, _ = inputs([RAGGED, []], 1, 1)
    masks = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *_, mask, implementation: masks.append(mask))
    with_mask(*arrays, segments)
    expected = dense_mask(segments) | ((segments.segment == 0)[..., None] & np.eye(SIZE, dtype=bool))
    np.testing.assert_array_equal(masks[0][:, 0], expected)
    assert masks[0].any(axis=-1).all()


def test_a_prefix_is_seen_by_its_own_completions_alone():
    segments, (q, k, v), _ = inputs([RAGGED], 2, 2)
    (prefix, _), *others = tokens_of(RAGGED)
    run = jax.jit(lambda k, v: attention.packed_chunked_attention(q, k, v, segments))
    before = np.asarray(run(k, v))
    k[:, :, prefix] += 1
    changed = (np.asarray(run(k, v)) != before).any(axis=(0, 2, 3))
    continuing = np.concatenate([own for own, before in others if len(before) == 70])
    # The first token of a prefix reads only itself, whatever its key.
    np.testing.assert_array_equal(np.flatnonzero(changed[:178]), np.sort([*prefix[1:], *continuing]))


def test_blocks_that_nothing_reads_are_skipped():
    """NaN in the keys and values of one prefix group's blocks reaches neither outputs nor gradients of the other group.

    A product with a masked weight of 0 would be NaN.
    """
    segments, (q, k, v), weight = inputs([FILLED], 1, 2)
    # Completions, then prefixes: a block reads itself, and that of its prefix.
    np.testing.assert_array_equal(segments.blocks[0], np.eye(4) + np.eye(4, k=2))
    first, second = [np.r_[0:64, 128:192], np.r_[64:128, 192:256]]
    weight[:, second] = 0
    before = value_and_grads(attention.packed_chunked_attention, segments, (q, k, v), weight)
    k[:, :, second], v[:, :, second] = np.nan, np.nan
    after = value_and_grads(attention.packed_chunked_attention, segments, (q, k, v), weight)
    for x, y in zip(before, after, strict=True):
        tokens = 1 if x.shape[1] == SIZE else 2
        np.testing.assert_array_equal(np.take(x, first, tokens), np.take(y, first, tokens))
    assert np.isnan(after[0][:, second]).all()


def test_later_blocks_of_a_segment_are_skipped():
    segments, (q, k, v), _ = inputs([[PrefixGroup(0, [SIZE])]], 1, 1)
    np.testing.assert_array_equal(segments.blocks[0], np.tri(4))
    before = np.asarray(attention.packed_chunked_attention(q, k, v, segments))
    k[:, :, 192:], v[:, :, 192:] = np.nan, np.nan
    after = np.asarray(attention.packed_chunked_attention(q, k, v, segments))
    np.testing.assert_array_equal(after[:, :192], before[:, :192])


@pytest.mark.slow
def test_memory_grows_with_length_and_not_its_square():
    def temporaries(attend, size):
        segments = pack([[PrefixGroup(size // 2, [size // 4] * 2)]], size)
        q, kv = np.zeros((1, size, 2, 8), np.float32), np.zeros((1, 1, size, 8), np.float32)
        gradient = jax.jit(jax.grad(lambda *x: attend(*x, segments).sum(), argnums=(0, 1, 2)))
        return gradient.lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes

    long, short = (temporaries(attention.packed_chunked_attention, size) for size in (4096, 2048))
    assert long < 2.2 * short
    assert temporaries(attention.packed_xla_attention, 2048) > 2 * 2048**2 * 4 > 5 * short  # of the scores alone
