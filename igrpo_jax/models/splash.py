"""Splash attention, the TPU's flash kernel in Pallas: for rows that continue a prefix, and for a packed axis.

The compiler cannot split a kernel over devices, so it runs under `shard_map`, where each device has its own rows and
heads. Queries and keys are padded to whole blocks.

For rows, the keys are [prefix | own | zeros], the causal mask is shifted by the length of the prefix, and the padding
of the prefix belongs to another segment than the queries, so that no query reads it.

On a packed axis a completion reads two intervals of keys: its own and that of its prefix. The kernel computes a mask
from one number of each query, and compares one number of each query with one of each key. So the keys are
[axis | axis]: a query reads tokens of its own segment from the first copy, where its number holds the two ends of an
interval, and tokens of its prefix from the second copy, where the compared numbers alone decide. The kernel can also
read masks of single blocks from memory, but takes 4 bytes for each pair of tokens there, for each head anew. Which
blocks it visits is computed on the device, since each batch has other segments.

Legend: S shards of the batch, F tokens of the axis, N heads, K kv heads, H head dim, I blocks of queries, J blocks of
keys, V visits of blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask_info

from igrpo_jax.distributed.sharding import spec
from igrpo_jax.errors import InputError
from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import Prefix
from igrpo_jax.models.segments import BLOCK, NOTHING, Segments

LANES = 128  # lanes of a TPU's vector registers; the kernel works on multiples of it
BLOCKS = (512, 384, 256)  # sizes of the blocks of longer sequences; smaller blocks leave the matrix unit idle
INDEX_BITS = 16  # bits of the index of a token on a packed axis: two such indices fit the number of a query
UNREAD = jnp.iinfo(jnp.int32).min  # id of the keys that no query reads


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None, interpret: bool = False
) -> jax.Array:
    """Computes `attention.xla_attention` with the TPU's kernel.

    On a mesh, `data` times `fsdp` must divide the rows and the prefixes, and `tensor` must divide the kv heads.

    Args:
        q, k, v, prefix: as for `attention.xla_attention`.
        interpret: emulates the kernel, slowly, on any platform.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    run = functools.partial(_on_one_device, interpret=interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return run(q, k, v, prefix)
    rows, cache = spec(("batch", "time", "heads", "head_dim")), spec(caches.AXES)
    before = None if prefix is None else Prefix(cache, cache, spec(("batch",)))
    # check_vma is off because the results of a Pallas kernel do not say over which axes they vary.
    return jax.shard_map(run, in_specs=(rows, cache, cache, before), out_specs=rows, check_vma=False)(q, k, v, prefix)


def _on_one_device(q, k, v, prefix, interpret):
    """Runs the kernel on the rows and heads of one device; arguments and result as of `splash_attention`."""
    time, heads, head_dim = q.shape[1:]
    before = 0 if prefix is None else prefix.k.shape[2]
    if prefix is not None:
        repeats = q.shape[0] // prefix.k.shape[0]
        old_k, old_v, length = (jnp.repeat(x, repeats, axis=0) for x in prefix)
        k, v = jnp.concatenate([old_k, k], axis=2), jnp.concatenate([old_v, v], axis=2)
    queries, block_q = _padded(time)
    keys, block_kv = _padded(before + time)
    pad = lambda x, size: jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)))
    q, k, v = pad(q.swapaxes(1, 2) * head_dim**-0.5, queries), pad(k, keys), pad(v, keys)
    kernel = _kernel(heads, queries, keys, before, block_q, block_kv, interpret)
    if prefix is None:
        mixed = jax.vmap(kernel)(q, k, v)
    else:
        position = jnp.arange(keys)
        padding = (position >= length[:, None]) & (position < before)
        segments = library.SegmentIds(jnp.zeros((queries,), jnp.int32), padding.astype(jnp.int32))
        mixed = jax.vmap(kernel, in_axes=(0, 0, 0, library.SegmentIds(None, 0)))(q, k, v, segments)
    return mixed[:, :, :time].swapaxes(1, 2)


def _padded(size: int) -> tuple[int, int]:
    """Returns `size` rounded up to whole blocks, and the size of a block.

    A short sequence is one block. A longer one has the blocks that need the least padding.
    """
    single = -(-size // LANES) * LANES
    if single <= BLOCKS[0]:
        return single, single
    return min(((-(-size // block) * block, block) for block in BLOCKS), key=lambda pair: (pair[0], -pair[1]))


def _kernel(heads: int, queries: int, keys: int, offset: int, block_q: int, block_kv: int, interpret: bool):
    """Returns the kernel for a causal mask under which query t reads the keys 0 to offset + t."""
    mask = library.MultiHeadMask([library.CausalMask((queries, keys), offset)] * heads)
    sizes = _block_sizes(block_q, block_kv)
    return library.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


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
    """Computes the attention of a packed axis with the TPU's kernel: what `segments.readable` allows is read.

    On a mesh, `data` times `fsdp` must divide S, and `tensor` must divide the kv heads. The tokens of a segment stand
    in their order, one after another, and completions before all prefixes. Blocks without anything to read are skipped.

    Args:
        q: [S, F, N, H].
        k, v: [S, K, F, H].
        segments: as `segments.pack` makes them.
        interpret: emulates the kernel, slowly, on any platform.

    Returns:
        [S, F, N, H] in q's dtype, zeros at padding. All of it is NaN where the order of the segments is another one and
        needs more visits of blocks than there is space for.

    Raises:
        InputError: F is larger than the index of a token can be.
    """
    size, longest = q.shape[1], 2**INDEX_BITS
    if size > longest:
        raise InputError(
            f"config.learner.tokens_per_microbatch: an axis of {size:,} tokens is more than attention = splash "
            f"supports; set it to at most {longest:,}, or config.learner.attention to chunked"
        )
    run = jax.vmap(functools.partial(_packed_on_one_device, interpret=interpret))
    arguments = (q, k, v, *(jnp.asarray(x) for x in (segments.segment, segments.parent, segments.blocks)))
    if jax.sharding.get_abstract_mesh().empty:
        return run(*arguments)
    rows, cache = spec(("batch", "time", "heads", "head_dim")), spec(caches.AXES)
    axis, blocks = spec(("batch", "time")), spec(("batch", None, None))
    specs = (rows, cache, cache, axis, axis, blocks)
    return jax.shard_map(run, in_specs=specs, out_specs=rows, check_vma=False)(*arguments)


def _packed_on_one_device(q, k, v, segment, parent, blocks, interpret):
    """Runs the kernel on one axis; arguments and result as of `packed_splash_attention`, without S."""
    size, _, head_dim = q.shape
    padded, block = _padded(size)
    pad = lambda x, axis: jnp.pad(x, [(0, (padded - size) * (i == axis)) for i in range(x.ndim)])
    segment, parent = pad(segment, 0), pad(parent, 0)
    twice = lambda x: jnp.concatenate([pad(x, 1)] * 2, axis=1)
    visited = _visited(segment, parent, blocks, block)
    kernel = _packed_kernel(_intervals(segment), visited, interpret)
    mixed = kernel(pad(q.swapaxes(0, 1) * head_dim**-0.5, 1), twice(k), twice(v), _ids(segment, parent))
    mixed = jnp.where(visited.sum(axis=1).max() > _space(visited), jnp.nan, mixed)
    # Padding reads nothing, so what the kernel has for it is no number. With zeros instead, no gradient passes either.
    return jnp.where((segment > 0)[:, None], mixed, 0)[:, :size].swapaxes(0, 1)


def _packed_kernel(intervals: jax.Array, visited: jax.Array, interpret: bool):
    """Returns the kernel for queries [N, F, H], keys and values [K, 2 * F, H] and the ids of `_ids`.

    Args:
        intervals: [F] int32, of `_intervals`.
        visited: [I, J] bool, of `_visited`.
    """
    size, block = len(intervals), len(intervals) // len(visited)
    # The gradients of keys are computed block of keys by block of keys, so the queries of each are listed.
    of_queries, of_keys = _visits(visited, _space(visited)), [x.T for x in _visits(visited.T, len(visited))]
    forward, backward = (
        splash_attention_mask_info.MaskInfo(
            data_next=following[None],
            mask_next=None,
            block_mask=exists[None],
            partial_mask_blocks=None,
            q_sequence=intervals,
        )
        for following, exists in (of_queries, of_keys)
    )
    return splash_attention_kernel.SplashAttentionKernel(
        *(forward, forward, backward),
        block_sizes=_block_sizes(block, block),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_reads(size),
        interpret=interpret,
    )


def _ids(segment: jax.Array, parent: jax.Array) -> library.SegmentIds:
    """Returns the numbers that are equal where a query [F] may read a key [2 * F]: of the family, negative in a prefix.

    In the second copy a prefix has the number of its completions.
    """
    prefix = (segment > 0) & (segment == parent)
    own = jnp.where(prefix, -parent, parent)
    first, second = jnp.where(segment > 0, own, UNREAD), jnp.where(prefix, parent, UNREAD)
    return library.SegmentIds(own, jnp.concatenate([first, second]))


def _intervals(segment: jax.Array) -> jax.Array:
    """Returns [F] int32, of each token in the first copy the start of its segment (high bits) and its own index."""
    index = jnp.arange(len(segment), dtype=jnp.int32)
    starts = jnp.where(segment != jnp.roll(segment, 1), index, 0)
    return (jax.lax.cummax(starts) << INDEX_BITS) | index


@functools.cache
def _reads(size: int):
    """Returns the kernel's mask function for an axis of `size` tokens; equal sizes get the same function."""

    def reads(interval: jax.Array, key: jax.Array) -> jax.Array:
        start = jax.lax.shift_right_logical(interval, INDEX_BITS)
        return (key >= size) | ((key >= start) & (key <= (interval & (2**INDEX_BITS - 1))))

    return reads


def _visited(segment: jax.Array, parent: jax.Array, blocks: jax.Array, block: int) -> jax.Array:
    """Returns [I, J] bool, which blocks of keys in both copies a block of queries visits.

    Args:
        segment, parent: [F] int32, padded to whole blocks of `block` tokens.
        blocks: [F / BLOCK, F / BLOCK] int8 of `segments`, without that padding.
    """
    count, parts = len(segment) // block, block // BLOCK
    missing = count * parts - len(blocks)
    some = jnp.pad(blocks, ((0, missing), (0, missing)), constant_values=NOTHING) != NOTHING
    some = some.reshape(count, parts, count, parts).any(axis=(1, 3))
    has = lambda tokens: tokens.reshape(count, block).any(axis=1)
    of_prefix = some & has(segment != parent)[:, None] & has((segment > 0) & (segment == parent))
    return jnp.concatenate([jnp.tril(some), of_prefix], axis=1)


def _space(visited: jax.Array) -> int:
    """Returns the most blocks of keys that a block of queries visits where prefixes stand behind completions.

    That is each block once, and twice the one in which the completions end and the prefixes begin.
    """
    return len(visited) + 1


def _visits(visited: jax.Array, space: int) -> tuple[jax.Array, jax.Array]:
    """Returns [I, V] int32 and [I, V] int8: the blocks that each block visits, first of all, and 1 at each of them.

    The rest of a row repeats its last block, which is therefore not fetched again.

    Args:
        visited: [I, J] bool.
        space: V, at least what any row needs.
    """
    columns = jnp.arange(visited.shape[1], dtype=jnp.int32)
    in_order = jnp.sort(jnp.where(visited, columns, len(columns)), axis=1)[:, :space]
    last = jnp.where(visited, columns, 0).max(axis=1, keepdims=True)
    return jnp.minimum(in_order, last), (in_order < len(columns)).astype(jnp.int8)
