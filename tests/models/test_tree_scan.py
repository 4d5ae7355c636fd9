"""A scan over a tree of chunks: sums along the chain of each token, and their gradients, against a walk by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igrpo_jax.models.segments import Chain, PrefixGroup, dense_mask, pack
from igrpo_jax.models.tree_scan import tree_scan

SHARDS = [
    [
        PrefixGroup(0, [5, 1]),
        PrefixGroup(2, [3, 9, 1]),
        PrefixGroup(13, [8, 16]),
        PrefixGroup(20, [11, 7]),
        PrefixGroup(3, []),
    ],
    [],
    [PrefixGroup(100, [156])],  # ends with the packed sequence
]


def sums(weight, state, tokens, count):
    """The state counts the tokens too, so that their number is known."""
    total, length = state
    return (total + tokens.sum(axis=0), length + count), weight * (total + jnp.cumsum(tokens, axis=0)) + length


@pytest.mark.parametrize("chunk", [4, 32, 300])
def test_sums_along_each_chain(chunk):
    """Values, and gradients of inputs and of what all chunks share, all of whole numbers and so exact."""
    shards = [[PrefixGroup(9, [30])], SHARDS[2]] if chunk == 300 else SHARDS  # 256 packed tokens have two chunks of 300
    segments = pack(shards, 256, chunk)
    chain = segments.chain
    inputs, slope = np.random.default_rng(0).integers(-9, 9, (2, len(shards), 256, 2)).astype(np.float32)
    empty = jnp.zeros(2), jnp.zeros(())

    def loss(weight, inputs, chain):
        results = tree_scan(sums, weight, empty, inputs, chain)
        return jnp.sum(results * slope), results

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, results), (of_weight, of_inputs) = run(np.float32(3), inputs, chain)
    reads = np.asarray(dense_mask(segments), np.float32)  # of token j by token i: it is that token, or before it
    before = np.zeros((len(shards), 256))
    for shard, number in np.ndindex(chain.chunk_before.shape):
        tokens, last = chain.chunks[shard, number], chain.chunk_before[shard, number]
        tokens = tokens[tokens < 256]
        before[shard, tokens] = reads[shard, tokens].sum(axis=1) - np.arange(1, len(tokens) + 1)
        assert len(tokens) == 0 or (last < len(chain.chunks[shard])) == (before[shard, tokens[0]] > 0)
    np.testing.assert_array_equal(results, 3 * reads @ inputs + before[..., None])
    np.testing.assert_array_equal(of_inputs, 3 * reads.swapaxes(1, 2) @ slope)
    np.testing.assert_array_equal(of_weight, np.sum(reads @ inputs * slope))


def test_nothing_is_read_past_a_chunk():
    """Not even to be multiplied by zero: what is no number elsewhere stays there."""
    chain = pack([[PrefixGroup(2, [3, 5])]], 128, 4).chain
    inputs = np.ones((1, 128, 2), np.float32)
    inputs[:, 3:8], inputs[:, 10:] = np.nan, np.nan  # the second completion, and padding
    results = tree_scan(sums, np.float32(1), (jnp.zeros(2), jnp.zeros(())), inputs, Chain(*map(jnp.asarray, chain)))
    finite = np.isfinite(results).all(axis=-1)[0]
    np.testing.assert_array_equal(np.flatnonzero(~finite), range(3, 8))
