"""What a decoder remembers of the tokens it has read, one entry per sublayer, and the verbs on it.

`insert` writes the rows of a prefilled prompt into slots; `fork` repeats one prefilled prompt for its samples. The
sampler uses both to run a prompt once for all its completions. `shared` is the learner's fork: nothing is repeated, the
rows that continue a prefix read the one copy, and their gradients add up in it. `extend` joins a prompt that is read in
pieces. `window` takes a part of the slots out to decode it, `restore` puts back what it learnt; `move` carries rows
between slots.

Attention remembers every position, Mamba-2 one state of fixed size, whatever the length: verbs that choose positions
take whole states.

Legend: B batch or slot, K kv heads, S key positions, H head dim, Q prefixes, P prefix positions or numbers of state,
N heads, G groups, W tokens that a convolution sees.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from igrpo_jax.distributed.sharding import constrain, spec
from igrpo_jax.models.config import DecoderConfig


class KV(NamedTuple):
    """Keys and values of one attention sublayer. [B, K, S, H] decodes 1.3 times faster than [B, S, K, H]."""

    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]


class Prefix(NamedTuple):
    """Keys and values that several rows continue: of B rows, row b continues prefix b // (B / Q)."""

    k: jax.Array  # [Q, K, P, H]
    v: jax.Array  # [Q, K, P, H]
    length: jax.Array  # [Q] int32, how many of the P positions are real; may be 0


class MambaState(NamedTuple):
    """Of one Mamba-2 sublayer after a row's last real token. Of B rows that continue Q, row b continues b // (B / Q).

    x, b and c are what the convolution has yet to see of the last W - 1 tokens, zeros before the first.
    """

    x: jax.Array  # [B, W - 1, N, H]
    b: jax.Array  # [B, W - 1, G, P]
    c: jax.Array  # [B, W - 1, G, P]
    state: jax.Array  # [B, N, H, P] float32: it adds up over thousands of tokens


Cache = tuple[KV | Prefix | MambaState | None, ...]  # one entry per sublayer, None where it remembers nothing
AXES = ("batch", "kv_heads", "time", "head_dim")
MAMBA_AXES = MambaState(
    ("batch", "width", "heads", "head_dim"),
    ("batch", "width", "groups", "state"),
    ("batch", "width", "groups", "state"),
    ("batch", "heads", "head_dim", "state"),
)


def empty(config: DecoderConfig, slots: int, length: int, dtype: jnp.dtype) -> Cache:
    """A cache of `slots` rows and `length` positions."""
    shape = (slots, config.num_kv_heads, length, config.head_dim)

    def entry(kind: str) -> KV | MambaState | None:
        if kind == "*":
            return KV(*(constrain(jnp.zeros(shape, dtype), *AXES) for _ in "kv"))
        return empty_state(config, slots, dtype) if kind == "M" else None

    return tuple(entry(kind) for kind in config.pattern)


def empty_state(config: DecoderConfig, rows: int, dtype: jnp.dtype) -> MambaState:
    """Of `rows` rows that have read nothing."""
    m = config.mamba
    heads, groups = (m.num_heads, m.head_dim), (m.num_groups, m.state_size)
    shapes = [(rows, m.conv_size - 1, *inner) for inner in (heads, groups, groups)]
    zeros = [*(jnp.zeros(shape, dtype) for shape in shapes), jnp.zeros((rows, *heads, m.state_size), jnp.float32)]
    return MambaState(*(constrain(x, *axes) for x, axes in zip(zeros, MAMBA_AXES, strict=True)))


def shardings(config: DecoderConfig, mesh: jax.sharding.Mesh) -> Cache:
    """A NamedSharding in the place of each array of a cache."""
    axes = {"*": KV(AXES, AXES), "M": MAMBA_AXES}
    place = lambda entry: type(entry)(*(NamedSharding(mesh, spec(x)) for x in entry))
    return tuple(place(axes[kind]) if kind in axes else None for kind in config.pattern)


def positions(cache: Cache) -> int | None:
    """S; None for a model without attention."""
    return next((entry.k.shape[2] for entry in cache if isinstance(entry, KV)), None)


def append(entry: KV, new: KV, positions: jax.Array) -> KV:
    """`entry` with one new position per row written in place: new.k [B, K, 1, H] at positions [B]."""
    rows = jnp.arange(positions.shape[0])
    return KV(*(old.at[rows, :, positions].set(add[:, :, 0]) for old, add in zip(entry, new, strict=True)))


def extend(cache: Cache, new: Cache, start: jax.Array) -> Cache:
    """`cache` with the positions of `new`, [B, K, T, H], written in place from `start` [] int32 on."""
    put = lambda old, add: jax.lax.dynamic_update_slice_in_dim(old, add.astype(old.dtype), start, axis=2)
    return _map(put, lambda old, later: later.astype(old.dtype), cache, new)


def fork(prefix: Cache, count: int) -> Cache:
    """`prefix` (one row) repeated to `count` rows."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), prefix)


def insert(cache: Cache, rows: Cache, slots: jax.Array) -> Cache:
    """`cache` with `rows` [n, K, P, H] written to `slots` [n]; a slot past the last drops its row.

    Where P > S, the positions past S (padding) are left out.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        size = min(new.shape[2], old.shape[2])
        return old.at[slots, :, :size].set(new[:, :, :size].astype(old.dtype), mode="drop")

    return _map(put, lambda old, new: old.at[slots].set(new.astype(old.dtype), mode="drop"), cache, rows)


def move(cache: Cache, source: jax.Array, target: jax.Array) -> Cache:
    """`cache` with the rows `source` [n] also at `target` [n]; a target past the last drops its row."""
    return jax.tree.map(lambda x: x.at[target].set(x[source], mode="drop"), cache)


def window(cache: Cache, rows: int, read: int) -> Cache:
    """The first `read` positions of the first `rows` slots."""
    return _map(lambda x: x[:rows, :, :read], lambda x: x[:rows], cache)


def restore(cache: Cache, part: Cache, start: jax.Array, count: int) -> Cache:
    """`cache` with what was added to a `window` of it: `count` positions of each row from `start` [rows] int32 on.

    Only these are written, in place: putting the whole window back costs as much as two decode steps.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        size = min(count, new.shape[2])
        first = jnp.minimum(start, new.shape[2] - size)  # at the end of the window a few old ones come along
        take = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size, axis=1))
        add = jax.vmap(lambda row, piece, at: jax.lax.dynamic_update_slice_in_dim(row, piece, at, axis=1))
        rows = new.shape[0]
        if rows == old.shape[0]:
            return add(old, take(new, first), first)
        index = first[:, None] + jnp.arange(size)  # [rows, count]
        return old.at[jnp.arange(rows)[:, None], :, index].set(take(new, first).swapaxes(1, 2))

    return _map(put, lambda old, new: old.at[: new.shape[0]].set(new), cache, part)


def shared(cache: Cache, length: jax.Array) -> Cache:
    """The cache of Q rows of right-padded tokens as prefixes to continue; `length` is [Q] int32.

    A state already is that of the last real token, if the rows were run with the same length.
    """
    return tuple(Prefix(*entry, length) if isinstance(entry, KV) else entry for entry in cache)


def _map(of_positions: Callable, of_state: Callable, *caches: Cache) -> Cache:
    """Entry by entry: a function for arrays [B, K, S, H] of attention, and one for arrays [B, ...] of states."""

    def entry(*entries):
        apply = of_state if isinstance(entries[0], MambaState) else of_positions
        return jax.tree.map(apply, *entries)

    return tuple(entry(*entries) for entries in zip(*caches, strict=True))
