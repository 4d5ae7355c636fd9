"""Attention to pages with the TPU's kernel, which reads those of every sequence, in decoding and in chunks of prompts.

Legend: F new tokens, W sequences, R pages of a sequence, N heads, G heads per kv head, H head dim.
"""

import functools
import importlib.util
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as library

from igrpo_jax.models.ragged import Paged

HEAD_DIM = 128  # of the kernel: it copies whole registers of 128 lanes, and loads from arrays of no other width
TILES = (1, 2, 4)  # numbers of kv heads that the kernel reads, besides the multiples of 8
# The kernel's blocks. Keys: those of the tables that come with it for full pages, up to 1,024 positions, because a copy
# has to be large to hide its latency. Queries: of a chunk also theirs; in decoding a block of queries computes all its
# rows for each of its sequences and keeps one, so that it is as small as the registers allow.
KEY_POSITIONS, CHUNK_QUERIES, DECODE_QUERIES = 1024, 32, 8
VMEM_BYTES = 32 * 2**20  # vector memory that the kernel may use; the limit of the compiler is 16 MiB on most TPUs
TABLE_BYTES = 2**20 - 2**14  # of a table, which the kernel holds in scalar memory; 1 MiB less what else it keeps there


def splash_paged_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, entry: Paged, interpret: bool = False
) -> jax.Array:
    """Computes the attention of new tokens with the TPU's kernel, whatever stands before them.

    Arguments and result are those of `xla_paged_attention`; k and v are read from the pages.

    The kernel must have memory for the table (`holds_table`).

    Args:
        interpret: emulates the kernel, slowly, on any platform.
    """
    (pages, ragged), size = entry, q.shape[0]
    together = pages.shape[3] // q.shape[2]
    grouped = q.reshape(size, k.shape[1] // together, together, -1, q.shape[2])  # the queries of each head of a row
    sequences, of_sequence = ragged.table.shape
    assert holds_table(sequences, of_sequence), f"the kernel cannot hold {sequences} x {of_sequence} page numbers"
    kernel = _emulated_kernel() if interpret else library.ragged_paged_attention
    mixed = kernel(
        _widened(grouped),
        pages,
        ragged.length,
        jnp.minimum(ragged.table, pages.shape[0] - 1),  # the kernel would read past the pool
        ragged.start,
        ragged.count,
        sm_scale=q.shape[2] ** -0.5,
        num_kv_pages_per_block=min(of_sequence, max(KEY_POSITIONS // pages.shape[1], 1)),
        num_queries_per_block=min(size, DECODE_QUERIES if size <= sequences else CHUNK_QUERIES),
        vmem_limit_bytes=VMEM_BYTES,
    )
    mixed = _narrowed(mixed, grouped).reshape(q.shape)
    # The kernel writes nothing at padding.
    return jnp.where((jnp.arange(size) < ragged.start[-1])[:, None, None], mixed, 0)


def holds_table(sequences: int, of_sequence: int) -> bool:
    """Returns whether the kernel can hold the page numbers of sequences with `of_sequence` pages each."""
    return -(-sequences // 8) * 8 * -(-of_sequence // 128) * 128 * 4 <= TABLE_BYTES


def _widened(grouped: jax.Array) -> jax.Array:
    """Returns queries [F, rows, heads of a row, G, H] as [F, N, width of a row], zero where other heads stand."""
    size, rows, together, groups, head_dim = grouped.shape
    own = jnp.eye(together, dtype=bool)[:, None, :, None]
    wide = jnp.where(own, grouped[..., None, :], 0)  # [F, rows, heads, G, heads, H]
    return wide.reshape(size, rows * together * groups, together * head_dim)


def _narrowed(mixed: jax.Array, grouped: jax.Array) -> jax.Array:
    """Returns the part of each query's own head in results [F, N, width of a row], in the shape of `grouped`."""
    together = grouped.shape[2]
    mixed = mixed.reshape(*grouped.shape[:4], together, -1)
    return jnp.stack([mixed[:, :, head, :, head] for head in range(together)], axis=2)


@functools.cache
def _emulated_kernel() -> Callable[..., jax.Array]:
    """Returns the kernel in plain JAX, from a second copy of its module, because the kernel has no argument for it.

    There, `pallas_call` interprets, and a store with a mask is a load, a select and a store: JAX's interpreter fails on
    such a store to a part of a scratch array, and its emulation of TPUs on the array of keys with another shape.
    """
    source = importlib.util.find_spec(library.__name__)
    assert source is not None and source.loader is not None
    copy = importlib.util.module_from_spec(source)
    source.loader.exec_module(copy)

    def store(ref, value, *, mask):
        ref[...] = jnp.where(mask, value, ref[...])

    pallas_call = functools.partial(pl.pallas_call, interpret=True)
    replaced = {"pl": vars(pl) | {"pallas_call": pallas_call}, "pltpu": vars(pltpu) | {"store": store}}
    for name, members in replaced.items():
        setattr(copy, name, types.SimpleNamespace(**members))
    return copy.ragged_paged_attention
