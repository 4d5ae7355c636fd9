"""Windows: contiguous copies of the keys and values of each row, for attention that cannot read pages in place.

During a dispatch the windows do not change. The keys and values of its new tokens are stored next to them: those of its
decode step t at index t, whatever the row's position, so that a step writes at one index for all rows. Windows that are
kept for the next dispatch have several blocks of positions, and a step reads only those that the longest row needs.
After a dispatch `write_back` writes its keys and values to the pages, and `extend` adds them to windows that are kept.

Legend: B rows, K kv heads, H head dim, E positions of a block, T decode steps of a dispatch, P pages of C positions, R
pages of a row, n rows that are copied.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from igrpo_jax.distributed.sharding import constrain, spec
from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import KV, Cache
from igrpo_jax.models.config import DecoderConfig

Window = tuple[KV, ...]  # of one attention sublayer, block after block
Windows = tuple[Window | None, ...]  # of all sublayers; None of one without pages

BLOCKS = 5  # of a window, at most; decode programs have one branch of attention for each number of blocks that is read
MIN_BLOCK = 64  # positions of the first block of a window that has several
AXES = ("batch", "kv_heads", None, None)


class Windowed(NamedTuple):
    """What the attention of one sublayer reads, and where it puts the keys and values of the new tokens."""

    window: Window  # the positions before the dispatch
    added: KV  # [B, ., ., .], keys and values of the tokens of this dispatch: T indices, one for each decode step
    length: jax.Array  # [B] int32, positions of each row that the window holds
    last: jax.Array  # [] int32, number of the last block that any row needs
    step: jax.Array  # [] int32, the index of the new tokens in `added`; lower indices are of earlier steps


def block_ends(positions: int, page_size: int) -> tuple[int, ...]:
    """Returns the position at which each block of a window of `positions` positions ends.

    Each end is half of the next one, and all are rounded up to multiples of `page_size`; `positions` is one already.
    """
    ends = (-(-(positions >> i) // page_size) * page_size for i in range(1, BLOCKS))
    return (*sorted({end for end in ends if MIN_BLOCK <= end < positions}), positions)


def abstract(
    cfg: DecoderConfig, rows: int, positions: int, page_size: int, dtype: jnp.dtype, mesh: jax.sharding.Mesh
) -> Windows:
    """Returns the windows of `rows` rows of `positions` positions, as abstract arrays."""
    ends = block_ends(positions, page_size)
    of = lambda shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh))
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    window = tuple(KV(*map(of, _shapes(rows, cfg.num_kv_heads, cfg.head_dim, size))) for size in sizes)
    return tuple(window if kind == "*" else None for kind in cfg.pattern)


def sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of all keys and values of windows."""
    return NamedSharding(mesh, spec(AXES))


def of_pages(cache: Cache, table: jax.Array) -> Windows:
    """Returns windows of one block with all pages of each row.

    Args:
        cache: pools whose keys and values alternate; Mamba-2 states have no windows.
        table: [B, R] int32, the pages of each row; where a number is not a page, the window's content is meaningless.
    """
    return tuple((_by_pages(entry, table),) if isinstance(entry, jax.Array) else None for entry in cache)


def update(
    windows: Windows, cache: Cache, table: jax.Array, rows: jax.Array, count: jax.Array, length: jax.Array
) -> Windows:
    """Returns `windows` with the positions of the first `count` of `rows` copied from their pages.

    It copies block by block and row by row, in place where `windows` are donated, and only the blocks in which the row
    has positions; all other content must be finite already. This is fast on CPUs only; elsewhere `of_pages` copies
    everything.

    Args:
        table: [B, R] int32, the pages of each row.
        rows: [B] int32.
        count: [] int32.
        length: [B] int32, positions of each row.
    """
    needed = jnp.where(jnp.arange(len(rows)) < count, length[rows], 0)
    order = jnp.argsort(-needed)

    def copy(number: int, start: int, end: int, i: jax.Array, windows: Windows) -> Windows:
        row = rows[order[i]]

        def copied(window: Window | None, pool: jax.Array) -> Window | None:
            if window is None:
                return None
            size = pool.shape[1]
            new = _by_heads(pool, table[row, start // size : end // size][None])
            block = jax.tree.map(lambda x, y: x.at[row].set(y[0]), window[number], new)
            return (*window[:number], block, *window[number + 1 :])

        return tuple(map(copied, windows, cache))

    for number, (start, end) in enumerate(_spans(windows)):
        windows = jax.lax.fori_loop(0, jnp.sum(needed > start), partial(copy, number, start, end), windows)
    return windows


def new_token_buffers(cache: Cache, rows: int, steps: int) -> Cache:
    """Returns `cache` with a KV of zeros in the place of each pool, with `steps` places for each of `rows` rows."""

    def added(pool: jax.Array) -> KV:
        shapes = _shapes(rows, pool.shape[2] // 2, pool.shape[3], steps)
        return KV(*(constrain(jnp.zeros(shape, pool.dtype), *AXES) for shape in shapes))

    return caches.of_pools(added, cache)


def entries(windows: Windows, cache: Cache, length: jax.Array, active: jax.Array, step: jax.Array) -> Cache:
    """Returns `cache` with what attention needs to read windows.

    Args:
        cache: a KV of `new_token_buffers` for each sublayer that has a window, and the states of the rows.
        length: [B] int32, positions of each row in its window.
        active: [B] bool; what the other rows read is meaningless.
        step: [] int32, decode steps before this one.
    """
    ends = jnp.array([end for _, end in _spans(windows)], jnp.int32)
    last = jnp.sum(ends < jnp.max(jnp.where(active, length, 0)))
    return tuple(
        Windowed(window, entry, length, last, step) if window and isinstance(entry, KV) else entry
        for window, entry in zip(windows, cache, strict=True)
    )


def add(added: KV, k: jax.Array, v: jax.Array, step: jax.Array) -> KV:
    """Returns `added` with the keys and values [B, 1, K, H] of new tokens at the place `step`."""
    place = jax.lax.dynamic_update_slice_in_dim
    k, v = (x.astype(added.k.dtype) for x in (k, v))
    return KV(place(added.k, k.transpose(0, 2, 3, 1), step, 3), place(added.v, v.swapaxes(1, 2), step, 2))


def extend(windows: Windows, cache: Cache, begin: jax.Array, end: jax.Array) -> Windows:
    """Returns `windows` with what a dispatch has added, in place where they are donated.

    Args:
        cache: what the last step gave: a KV for each sublayer that has a window, and the states of the rows.
        begin, end: [B] int32, the positions that are new in each row.
    """

    def extended(window: Window | None, added: Any) -> Window | None:
        if window is None:
            return None
        rows, at = jnp.arange(len(begin))[:, None], begin[:, None] + jnp.arange(added.v.shape[2])  # [B, T]
        blocks, (k, v) = [], _by_token(added)
        for block, (start, stop) in zip(window, _spans((window,)), strict=True):
            here = (at >= start) & (at < stop) & (at < end[:, None])
            to = jnp.where(here, at - start, stop - start)  # past the last position: dropped
            new_k = block.k.at[rows, :, :, to].set(k, mode="drop")
            blocks.append(KV(new_k, block.v.at[rows, :, to].set(v, mode="drop")))
        return tuple(blocks)

    return tuple(extended(*entries) for entries in zip(windows, cache, strict=True))


def write_back(pools: Cache, cache: Cache, table: jax.Array, begin: jax.Array, end: jax.Array) -> Cache:
    """Returns `pools` with what a dispatch has added written to the pages, in place, and the states of `cache`.

    Args:
        cache: what the last step gave: a KV for each sublayer that has a window, and the states of the rows.
        table: [B, R] int32, the pages of each row.
        begin, end: [B] int32, the positions that are new in each row.
    """

    def put_new(pool: jax.Array, added: KV) -> jax.Array:
        rows, at = jnp.arange(len(begin))[:, None], begin[:, None] + jnp.arange(added.v.shape[2])  # [B, T]
        page = jnp.where(at < end[:, None], table.at[rows, at // pool.shape[1]].get(mode="clip"), pool.shape[0])
        return caches.put(pool, page, at % pool.shape[1], *_by_token(added))

    return caches.of_pools(put_new, pools, cache)


def _shapes(rows: int, heads: int, head_dim: int, positions: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of the keys and of the values of a KV."""
    return (rows, heads, head_dim, positions), (rows, heads, positions, head_dim)


def _by_token(added: KV) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values as [B, T, K, H]."""
    return added.k.transpose(0, 3, 1, 2), added.v.swapaxes(1, 2)


def _spans(windows: Windows) -> list[tuple[int, int]]:
    """Returns the first position of each block and the one after it, which are the same in all windows."""
    window = next(filter(None, windows), ())
    sizes = [block.v.shape[2] for block in window]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return list(zip((0, *ends), ends, strict=False))


def _by_pages(pool: jax.Array, table: jax.Array) -> KV:
    """Returns the keys and values of the pages of each row side by side."""
    pages = pool.at[table].get(mode="clip")  # [n, R, C, 2K, H]
    pairs = pages.reshape(len(table), -1, pool.shape[2] // 2, 2, pool.shape[3])
    return KV(pairs[:, :, :, 0].transpose(0, 2, 3, 1), pairs[:, :, :, 1].swapaxes(1, 2))


def _by_heads(pool: jax.Array, table: jax.Array) -> KV:
    """Does what `_by_pages` does in a third of the time on a CPU; on TPUs copies of so few values are slow."""
    size, heads, head_dim = pool.shape[1], pool.shape[2] // 2, pool.shape[3]
    position = jnp.arange(table.shape[1] * size)
    at = table[:, position // size] * size + position % size  # [n, E]
    at = jnp.broadcast_to(at[:, None], (len(table), heads, len(position)))
    pairs = pool.reshape(-1, heads, 2, head_dim)  # [P C, K, 2, H]
    # With the heads as a batch dimension the result has the layout that is needed, and a device that holds some of the
    # heads needs no data of others.
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(3,),
        collapsed_slice_dims=(0, 2),
        start_index_map=(0, 2),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(1,),
    )
    of = lambda which: jax.lax.gather(
        pairs, jnp.stack([at, jnp.full_like(at, which)], -1), numbers, (1, 1, 1, head_dim), mode="clip"
    )
    return KV(of(0).swapaxes(2, 3), of(1))
