"""The cache of a decoder: what it keeps of the tokens that it has read, one entry per sublayer, and its operations.

Attention keeps keys and values of every position, in pages of a few positions that lie anywhere in a pool. A table says
which pages hold a sequence, in their order, and several sequences may read the same page. The host decides which pages
are free (`sampling.pages`); nothing here knows.

Where attention cannot read pages, `window` copies those of some rows side by side, so that one row of keys belongs to
one sequence, and `restore` writes the positions that were added back into the pages.

Mamba-2 keeps one state of fixed size, whatever the length. Each slot has one. A prompt that is being read has one in
its lane until all its samples have begun; `fork` gives a slot the state of a lane, and a page of its own in place of a
partly filled one that others read too.

Legend: B rows or slots, L lanes, K kv heads, S key positions, H head dim, P pages of C positions, R pages of a row,
N heads, G groups, W tokens that a convolution sees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from igrpo_jax.distributed.sharding import constrain, spec
from igrpo_jax.models.config import DecoderConfig


@dataclass(frozen=True)
class PageLayout:
    """How a page holds the keys and values of its C positions: as the kernel that reads it wants them.

    Keys and values alternate by head, [C, 2K, H], unless they are `apart`, [2, C, K, H].
    """

    apart: bool = False  # whether all keys stand before all values
    heads_per_row: int = 1  # kv heads that stand side by side where they alternate, [C, 2K / 2, 2H] for two

    def shape(self, page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Returns the shape of a page."""
        if self.apart:
            return 2, page_size, kv_heads, head_dim
        return page_size, 2 * kv_heads // self.heads_per_row, head_dim * self.heads_per_row


ALTERNATING = PageLayout()


class KV(NamedTuple):
    """Keys and values of the rows of one attention sublayer, one row for each sequence.

    In these layouts both products of attention read memory in its order. On a CPU that takes 0.7 of the time of keys
    [B, K, S, H], which in turn decode 1.3 times faster than [B, S, K, H].
    """

    k: jax.Array  # [B, K, H, S]
    v: jax.Array  # [B, K, S, H]


class MambaState(NamedTuple):
    """The state of one Mamba-2 sublayer after the last real token of each row.

    x, b and c are the inputs of the convolution for the last W - 1 tokens, with zeros before the first token.
    """

    x: jax.Array  # [B, W - 1, N, H]
    b: jax.Array  # [B, W - 1, G, P]
    c: jax.Array  # [B, W - 1, G, P]
    state: jax.Array  # [B, N, H, P] float32, because it sums over thousands of tokens


# One entry per sublayer: the pool of an attention sublayer, P pages of a `PageLayout`, or a KV where the rows of its
# pages lie side by side; None for an MLP, which keeps nothing.
Cache = tuple[jax.Array | KV | MambaState | None, ...]
AXES = ("batch", "kv_heads", "time", "head_dim")  # of the keys and values of packed axes
MAMBA_AXES = MambaState(
    ("batch", "width", "heads", "head_dim"),
    ("batch", "width", "groups", "state"),
    ("batch", "width", "groups", "state"),
    ("batch", "heads", "head_dim", "state"),
)


def empty(
    cfg: DecoderConfig, pages: int, page_size: int, slots: int, dtype: jnp.dtype, layout: PageLayout = ALTERNATING
) -> Cache:
    """Returns pools of zeros with `pages` pages, and empty states of `slots` slots."""
    shape = (pages, *layout.shape(page_size, cfg.num_kv_heads, cfg.head_dim))

    def entry(kind: str) -> jax.Array | MambaState | None:
        if kind == "*":
            return constrain(jnp.zeros(shape, dtype), *pool_axes(len(shape)))
        return empty_state(cfg, slots, dtype) if kind == "M" else None

    return tuple(entry(kind) for kind in cfg.pattern)


def empty_lanes(cfg: DecoderConfig, lanes: int, dtype: jnp.dtype) -> Cache:
    """Returns empty states of `lanes` prompts for the Mamba-2 sublayers, and None for the others."""
    return tuple(empty_state(cfg, lanes, dtype) if kind == "M" else None for kind in cfg.pattern)


def empty_state(cfg: DecoderConfig, rows: int, dtype: jnp.dtype) -> MambaState:
    """Returns the Mamba-2 state of `rows` rows that have read no token; states are float32, all else is `dtype`."""
    mamba = cfg.mamba
    heads, groups = (mamba.num_heads, mamba.head_dim), (mamba.num_groups, mamba.state_size)
    shapes = [(rows, mamba.conv_size - 1, *inner) for inner in (heads, groups, groups)]
    zeros = [*(jnp.zeros(shape, dtype) for shape in shapes), jnp.zeros((rows, *heads, mamba.state_size), jnp.float32)]
    return MambaState(*(constrain(x, *axes) for x, axes in zip(zeros, MAMBA_AXES, strict=True)))


def pool_axes(dimensions: int) -> tuple[str | None, ...]:
    """Returns the axes of a pool of so many dimensions; the pages of each shard of the batch are its own."""
    return "batch", *[None] * (dimensions - 3), "kv_heads", "head_dim"


def shardings(
    cfg: DecoderConfig, mesh: jax.sharding.Mesh, kinds: str = "*M", layout: PageLayout = ALTERNATING
) -> Cache:
    """Returns a tree like a cache, with a NamedSharding instead of each array; None for sublayers not of `kinds`."""
    pool = NamedSharding(mesh, spec(pool_axes(1 + len(layout.shape(1, 1, 1)))))
    states = MambaState(*(NamedSharding(mesh, spec(axes)) for axes in MAMBA_AXES))
    every: dict[str, Any] = {"*": pool, "M": states}
    return tuple(every[kind] if kind in kinds and kind in every else None for kind in cfg.pattern)


def append(entry: KV, k: jax.Array, v: jax.Array, positions: jax.Array) -> KV:
    """Returns `entry` with one new position per row, written in place: k and v [B, K, H] at `positions` [B] int32."""
    rows = jnp.arange(positions.shape[0])
    return KV(entry.k.at[rows, :, :, positions].set(k), entry.v.at[rows, :, positions].set(v))


def put(pool: jax.Array, page: jax.Array, offset: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns `pool` with keys and values [..., K, H] written, in place where `pool` is donated.

    Args:
        page, offset: [...] int32, where they belong; those with a page of P or more are dropped.
    """
    if pool.ndim == 5:  # apart
        return pool.at[page, :, offset].set(jnp.stack([k, v], axis=-3).astype(pool.dtype), mode="drop")
    k, v = (x.reshape(*x.shape[:-2], -1, pool.shape[3]) for x in (k, v))
    alternating = jnp.stack([k, v], axis=-2).reshape(*k.shape[:-2], *pool.shape[2:])
    return pool.at[page, offset].set(alternating.astype(pool.dtype), mode="drop")


def take(pool: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values that `pages` [R] int32 hold, each [R C, K, H]; those past the last page are any."""
    held = pool.at[pages].get(mode="clip")
    apart = (held[:, 0], held[:, 1]) if pool.ndim == 5 else (held[:, :, 0::2], held[:, :, 1::2])
    k, v = (x.reshape(-1, *x.shape[2:]) for x in apart)
    return k, v


def rows_of(cache: Cache, slots: jax.Array) -> Cache:
    """Returns the pools of `cache`, and of its states those of `slots` [n] int32."""
    of_slots = lambda x: x.at[slots].get(mode="clip")
    return tuple(jax.tree.map(of_slots, entry) if isinstance(entry, MambaState) else entry for entry in cache)


def put_rows(cache: Cache, rows: Cache, slots: jax.Array) -> Cache:
    """Returns the pools of `rows`, and the states of `cache` with those of `rows` written to `slots` [n] int32.

    Rows whose slot is past the last one are dropped.
    """
    put_row = lambda x, new: x.at[slots].set(new.astype(x.dtype), mode="drop")
    return tuple(
        jax.tree.map(put_row, entry, row) if isinstance(entry, MambaState) else row
        for entry, row in zip(cache, rows, strict=True)
    )


def abstract_windows(cfg: DecoderConfig, rows: int, positions: int, dtype: jnp.dtype, mesh: jax.sharding.Mesh) -> Cache:
    """Returns what `window` makes of the pools for `rows` rows of so many positions, as abstract arrays."""
    batch, heads, time, inner = AXES
    axes = KV((batch, heads, inner, time), AXES)
    sizes = {batch: rows, heads: cfg.num_kv_heads, time: positions, inner: cfg.head_dim}
    shape = lambda axes: tuple(sizes[axis] for axis in axes)
    kv = KV(*(jax.ShapeDtypeStruct(shape(x), dtype, sharding=NamedSharding(mesh, spec(x))) for x in axes))
    return tuple(kv if kind == "*" else None for kind in cfg.pattern)


def window(cache: Cache, table: jax.Array) -> Cache:
    """Returns the cache of some rows with the pages of each row side by side.

    Args:
        cache: pools whose keys and values alternate, and the states of the rows.
        table: [n, R] int32, the pages of each row; of a number that is no page, the content is meaningless.

    Returns:
        A KV of R C positions for each pool.
    """
    return _pools(partial(_by_pages, table=table), cache)


def update_windows(windows: Cache, cache: Cache, table: jax.Array, rows: jax.Array, count: jax.Array) -> Cache:
    """Returns what `window` returns, of which `windows` hold all but the first `count` of `rows`, [n] int32.

    It copies one row after another, in place where `windows` are donated, and is for CPUs.
    """

    def copy(i: jax.Array, held: Cache) -> Cache:
        row = rows[i]
        put_row = lambda x, new: x.at[row].set(new[0])
        return _pools(lambda pool, kv: jax.tree.map(put_row, kv, _by_heads(pool, table[row][None])), cache, held)

    held = jax.lax.fori_loop(0, count, copy, windows)
    return _pools(lambda pool, kv, _: kv, cache, held, cache)


def _by_pages(pool: jax.Array, table: jax.Array) -> KV:
    """Returns the keys and values of the pages of each row side by side."""
    pages = pool.at[table].get(mode="clip")  # [n, R, C, 2K, H]
    pairs = pages.reshape(len(table), -1, pool.shape[2] // 2, 2, pool.shape[3])
    return KV(pairs[:, :, :, 0].transpose(0, 2, 3, 1), pairs[:, :, :, 1].swapaxes(1, 2))


def _by_heads(pool: jax.Array, table: jax.Array) -> KV:
    """Does what `_by_pages` does in a third of the time on a CPU; on TPUs copies of so few values are slow."""
    size, heads, head_dim = pool.shape[1], pool.shape[2] // 2, pool.shape[3]
    position = jnp.arange(table.shape[1] * size)
    at = table[:, position // size] * size + position % size  # [n, S]
    at = jnp.broadcast_to(at[:, None], (len(table), heads, len(position)))
    pairs = pool.reshape(-1, heads, 2, head_dim)  # [P C, K, 2, H]
    # With the heads as a batch dimension the result lies as it is needed, and devices that have some of them need no
    # others.
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


def restore(cache: Cache, part: Cache, table: jax.Array, begin: jax.Array, end: jax.Array, most: int) -> Cache:
    """Returns `cache` with the new positions of a `window` of it, and the states of its rows as they are in `part`.

    Only the new positions are written, in place, because writing all of the window costs as much as two decode steps.

    Args:
        table: the pages that the window was made of.
        begin, end: [n] int32, the positions that are new in each row.
        most: at least the largest number of new positions.
    """

    def put_new(pool: jax.Array, new: KV) -> jax.Array:
        size, rows = min(most, new.v.shape[2]), jnp.arange(len(table))[:, None]
        first = jnp.minimum(begin, new.v.shape[2] - size)  # so many positions up to the end of the window
        at = first[:, None] + jnp.arange(size)  # [n, size]
        cut = jax.vmap(jax.lax.dynamic_slice_in_dim, in_axes=(0, 0, None, None))
        k = cut(new.k, first, size, 2).transpose(0, 3, 1, 2)  # [n, size, K, H]
        v = cut(new.v, first, size, 1).swapaxes(1, 2)
        is_new = (at >= begin[:, None]) & (at < end[:, None])
        page = jnp.where(is_new, table[rows, at // pool.shape[1]], pool.shape[0])
        return put(pool, page, at % pool.shape[1], k, v)

    return _pools(put_new, cache, part)


def fork(
    cache: Cache,
    lanes: Cache,
    lane: jax.Array,
    slot: jax.Array,
    source: jax.Array,
    target: jax.Array,
    parts: int = 1,
) -> Cache:
    """Returns `cache` after samples of prompts have taken slots.

    Args:
        lanes: the states of the prompts.
        lane, slot: [n] int32; each slot gets the state of its lane; past the last slot means none.
        source, target: [n] int32, pages: each target becomes a copy of its source, which is of the same part; past the
            last page means none.
        parts: of `own_pages`.
    """
    copy = partial(_copy_pages, parts) if parts > 1 else _copy
    copied = _pools(lambda pool: copy(pool, source, target), cache)
    states = tuple(copied[i] if entry is None else entry for i, entry in enumerate(rows_of(lanes, lane)))
    return put_rows(copied, states, slot)


def _copy(pool: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    return pool.at[target].set(pool.at[source].get(mode="clip"), mode="drop")


def _copy_pages(parts: int, pool: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Returns `pool` after each device has copied the pages of its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    own = lambda pool, *numbers: _copy(pool, *(own_pages(x, len(pool), parts) for x in numbers))
    pages = spec((None, *pool_axes(pool.ndim)[1:]))
    on_devices = jax.shard_map(
        own,
        in_specs=(pages, spec(()), spec(())),
        out_specs=pages,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )
    return on_devices(pool, source, target)


def own_pages(numbers: jax.Array, count: int, parts: int) -> jax.Array:
    """Returns the numbers of pages as this device counts its own, from 0, and `count` for those of other parts.

    Args:
        numbers: int32, of the pages of all parts: part i has i * count to (i + 1) * count - 1. A device is in the part
            that its place on the mesh axis `tensor` gives, modulo `parts`.
        count: pages of a part.
    """
    first = jax.lax.axis_index("tensor") % parts * count
    return jnp.where((numbers >= first) & (numbers < first + count), numbers - first, count)


def _pools(of_pool: Callable, *caches: Cache) -> Cache:
    """Returns the result of `of_pool` for each pool, and the other entries of the last of `caches`."""
    return tuple(
        of_pool(*entries) if isinstance(entries[0], jax.Array) else entries[-1] for entries in zip(*caches, strict=True)
    )
