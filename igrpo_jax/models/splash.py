"""Splash attention, the TPU's flash kernel in Pallas, over rows that continue a prefix.

A kernel is opaque to the compiler that places collectives, so it runs under `shard_map`, each device on its own rows
and heads. Queries and keys are padded to whole blocks: the keys are [prefix | own | zeros], the causal mask is shifted
by the prefix, and padding in the prefix is another segment than the queries.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library

from igrpo_jax.distributed.sharding import spec
from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import Prefix

LANES = 128  # of a TPU's vector registers; the kernel works on multiples
BLOCKS = (512, 384, 256)  # sizes of a block of a longer sequence: smaller ones leave the matrix unit idle


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None, interpret: bool = False
) -> jax.Array:
    """`attention.xla_attention` by the TPU's kernel; `interpret` emulates it on any platform, slowly.

    Over a mesh, `data` and `fsdp` must divide the rows and the prefixes, `tensor` the kv heads.
    """
    run = functools.partial(_on_one_device, interpret=interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return run(q, k, v, prefix)
    rows, cache = spec(("batch", "time", "heads", "head_dim")), spec(caches.AXES)
    before = None if prefix is None else Prefix(cache, cache, spec(("batch",)))
    # check_vma: the results of a Pallas kernel don't say over which axes they vary.
    return jax.shard_map(run, in_specs=(rows, cache, cache, before), out_specs=rows, check_vma=False)(q, k, v, prefix)


def _on_one_device(q, k, v, prefix, interpret):
    time, heads, head_dim = q.shape[1:]
    before = 0 if prefix is None else prefix.k.shape[2]
    if prefix is not None:
        repeats = q.shape[0] // prefix.k.shape[0]
        old_k, old_v, length = (jnp.repeat(x, repeats, axis=0) for x in prefix)
        k, v = jnp.concatenate([old_k, k], axis=2), jnp.concatenate([old_v, v], axis=2)
    queries, block_q = _padded(time)
    keys, block_kv = _padded(before + time)
    widen = lambda x, size: jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)))
    q, k, v = widen(q.swapaxes(1, 2) * head_dim**-0.5, queries), widen(k, keys), widen(v, keys)
    kernel = _kernel(heads, queries, keys, before, block_q, block_kv, interpret)
    if prefix is None:
        mixed = jax.vmap(kernel)(q, k, v)
    else:
        place = jnp.arange(keys)
        padding = (place >= length[:, None]) & (place < before)
        segments = library.SegmentIds(jnp.zeros((queries,), jnp.int32), padding.astype(jnp.int32))
        mixed = jax.vmap(kernel, in_axes=(0, 0, 0, library.SegmentIds(None, 0)))(q, k, v, segments)
    return mixed[:, :, :time].swapaxes(1, 2)


def _padded(size: int) -> tuple[int, int]:
    """`size` rounded up to whole blocks, and the block: one where it is short, else what pads least."""
    one = -(-size // LANES) * LANES
    if one <= BLOCKS[0]:
        return one, one
    return min(((-(-size // block) * block, block) for block in BLOCKS), key=lambda pair: (pair[0], -pair[1]))


def _kernel(heads: int, queries: int, keys: int, offset: int, block_q: int, block_kv: int, interpret: bool):
    """The kernel for a causal mask that lets query t read keys 0..offset + t."""
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
