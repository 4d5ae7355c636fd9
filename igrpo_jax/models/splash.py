"""Splash attention of a packed sequence: the TPU's flash kernel in Pallas.

The compiler cannot split a kernel over devices, so it runs under `shard_map`, where each device has its own packed
sequences and heads. Queries and keys are padded to whole blocks.

In a packed sequence a completion reads two intervals of keys: its own and that of its prefix. The kernel computes a
mask from one number of each query, and compares another number of each query with one of each key. So the keys are
[packed | packed]: a query reads tokens of its own segment from the first copy, where its number holds the two ends of
an interval, and tokens of its prefix from the second copy, where the compared numbers alone decide. The kernel could
read masks of single blocks from memory instead, 4 bytes for each pair of tokens and again for each head.

Legend: S shards of the batch, F tokens of the packed sequence, N heads, K kv heads, H head dim, M pieces of the second
copy.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask_info

from igrpo_jax.distributed.sharding import spec
from igrpo_jax.models import visits
from igrpo_jax.models.segments import KV_AXES, Segments

LANES = 128  # lanes of a TPU's vector registers; the kernel works on multiples of it
BLOCKS = (512, 384, 256)  # sizes of the blocks of longer sequences; smaller blocks leave the matrix unit idle
INDEX_BITS = 16  # bits of the index of a token in a packed sequence: two such indices fit the number of a query
MOST_TOKENS = 2**INDEX_BITS  # of a packed sequence
UNREAD = jnp.iinfo(jnp.int32).min  # id of the keys that no query reads


def _padded(size: int) -> tuple[int, int]:
    """Returns `size` rounded up to whole blocks, and the size of a block.

    A short sequence is one block. A longer one has the blocks that need the least padding.
    """
    single = -(-size // LANES) * LANES
    if single <= BLOCKS[0]:
        return single, single
    return min(((-(-size // block) * block, block) for block in BLOCKS), key=lambda pair: (pair[0], -pair[1]))


def _block_sizes(block_q: int, block_kv: int) -> library.BlockSizes:
    """Returns blocks of the same sizes for the forward and the backward passes."""
    return library.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )


def packed_splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, interpret: bool = False
) -> jax.Array:
    """Computes the attention of a packed sequence with the TPU's kernel: what `segments.readable` allows is read.

    On a mesh, `data` times `fsdp` must divide S, and `tensor` must divide the kv heads. F is at most MOST_TOKENS
    (`attention.check_tokens`). The tokens of a segment stand in their order, one after another, and completions before
    all prefixes. Blocks without anything to read are skipped.

    Args:
        q: [S, F, N, H].
        k, v: [S, K, F, H].
        segments: as `segments.pack` makes them.
        interpret: emulates the kernel, slowly, on any platform.

    Returns:
        [S, F, N, H] in q's dtype, zeros at padding. All of it is NaN if the order of the segments is another one and
        needs more visits of blocks than there is space for.
    """
    assert q.shape[1] <= MOST_TOKENS, f"the kernel cannot index {q.shape[1]} tokens"
    run = functools.partial(_packed_on_one_device, interpret=interpret)
    arguments = (q, k, v, *(jnp.asarray(x) for x in (segments.segment, segments.parent, segments.blocks)))
    if jax.sharding.get_abstract_mesh().empty:
        return run(*arguments)
    rows, keys = spec(("batch", "time", "heads", "head_dim")), spec(KV_AXES)
    tokens, blocks = spec(("batch", "time")), spec(("batch", None, None))
    specs = (rows, keys, keys, tokens, tokens, blocks)
    return jax.shard_map(run, in_specs=specs, out_specs=rows, check_vma=False)(*arguments)


def _packed_on_one_device(q, k, v, segment, parent, blocks, interpret):
    """Runs the kernel on the sequences and heads of one device; arguments and result as `packed_splash_attention`."""
    size, _, head_dim = q.shape[1:]
    padded, block = _padded(size)
    pad = lambda x, axis: jnp.pad(x, [(0, (padded - size) * (i == axis)) for i in range(x.ndim)])
    q = pad(q.swapaxes(1, 2) * head_dim**-0.5, 2)
    packed = q, pad(k, 2), pad(v, 2), pad(segment, 1), pad(parent, 1), blocks
    # Each device mostly has one packed sequence. Several in one batch would take both branches of the condition.
    run = functools.partial(_packed_attention, block=block, interpret=interpret)
    mixed = jax.lax.map(lambda sequence: run(*sequence), packed)
    return mixed[:, :, :size].swapaxes(1, 2)


def _packed_attention(q, k, v, segment, parent, blocks, block, interpret):
    """Runs the kernel on one packed sequence of whole blocks: q is [N, F, H] and scaled, k and v are [K, F, H]."""
    needed = visits.visits(segment, parent, blocks, block)
    short, full = visits.lengths(len(needed.own))
    run = functools.partial(_packed_kernel, interpret=interpret)
    arguments = q, k, v, segment, parent, needed
    if short == full:
        mixed = run(*arguments, given=full)
    else:
        branches = functools.partial(run, given=short), functools.partial(run, given=full)
        mixed = jax.lax.cond(visits.fit(needed, short), *branches, *arguments)
    mixed = jnp.where(visits.fit(needed, full), mixed, jnp.nan)
    # Padding reads nothing, and the kernel has NaN for it. With zeros instead, no gradient passes either.
    return jnp.where((segment > 0)[:, None], mixed, 0)


def _packed_kernel(q, k, v, segment, parent, needed: visits.Visits, given: visits.Lengths, interpret: bool):
    """Runs the kernel with loops of the given lengths; the other arguments are as of `_packed_attention`."""
    size, blocks = len(segment), len(needed.own)
    block_of, prefix = visits.divide(needed.prefix, given)

    def pieces(x):  # of [X, F, ...], as [X, M * block, ...]
        return x.reshape(len(x), blocks, -1, *x.shape[2:])[:, block_of].reshape(len(x), -1, *x.shape[2:])

    query_ids, own_ids, prefix_ids = _ids(segment, parent)
    ids = library.SegmentIds(query_ids, jnp.concatenate([own_ids, pieces(prefix_ids[None])[0]]))
    visited = jnp.concatenate([needed.own, prefix], axis=1)
    of_queries = visits.listed(visited, given.keys)
    # The gradients of keys are computed block of keys by block of keys, so the queries of each are listed.
    of_keys = [x.T for x in visits.listed(visited.T, given.queries)]
    forward, backward = (
        splash_attention_mask_info.MaskInfo(
            data_next=following[None],
            mask_next=None,
            block_mask=exists[None],
            partial_mask_blocks=None,
            q_sequence=_intervals(segment),
        )
        for following, exists in (of_queries, of_keys)
    )
    kernel = splash_attention_kernel.SplashAttentionKernel(
        *(forward, forward, backward),
        block_sizes=_block_sizes(size // blocks, size // blocks),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_reads(size),
        interpret=interpret,
    )
    return kernel(q, *(jnp.concatenate([x, pieces(x)], axis=1) for x in (k, v)), ids)


def _ids(segment: jax.Array, parent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns [F] int32 of queries, of the keys of the first copy and of those of the second one.

    A query may read a key whose number is its own: that of the prefix group, negative in a prefix. In the second copy
    a prefix has the number of its completions.
    """
    prefix = (segment > 0) & (segment == parent)
    own = jnp.where(prefix, -parent, parent)
    return own, jnp.where(segment > 0, own, UNREAD), jnp.where(prefix, parent, UNREAD)


def _intervals(segment: jax.Array) -> jax.Array:
    """Returns [F] int32, of each token in the first copy the start of its segment (high bits) and its own index."""
    index = jnp.arange(len(segment), dtype=jnp.int32)
    starts = jnp.where(segment != jnp.roll(segment, 1), index, 0)
    return (jax.lax.cummax(starts) << INDEX_BITS) | index


@functools.cache
def _reads(size: int):
    """Returns the kernel's mask function for a packed sequence of `size` tokens; equal sizes get the same function."""

    def reads(interval: jax.Array, key: jax.Array) -> jax.Array:
        start = jax.lax.shift_right_logical(interval, INDEX_BITS)
        return (key >= size) | ((key >= start) & (key <= (interval & (2**INDEX_BITS - 1))))

    return reads
