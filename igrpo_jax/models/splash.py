"""Splash attention, the TPU's flash kernel in Pallas, for rows that continue a prefix.

The compiler cannot split a kernel over devices, so it runs under `shard_map`, where each device has its own rows and
heads. Queries and keys are padded to whole blocks. The keys are [prefix | own | zeros], the causal mask is shifted by
the length of the prefix, and the padding of the prefix belongs to another segment than the queries, so that no query
reads it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library

from igrpo_jax.distributed.sharding import spec
from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import Prefix

LANES = 128  # lanes of a TPU's vector registers; the kernel works on multiples of it
BLOCKS = (512, 384, 256)  # sizes of the blocks of longer sequences; smaller blocks leave the matrix unit idle


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
    sizes = library.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return library.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
