"""Which blocks of keys a flash kernel visits in a packed sequence, as device arrays, because each batch has others.

The kernel reads the keys of the packed sequence twice: each query reads its own segment from the first copy of them,
and its prefix from the second one (`splash` says why). The kernel's loops have a fixed length, and a turn that visits
nothing still runs 300 to 500 instructions, where one that visits a block runs 1,700 to 2,800 (compiled for v5p, blocks
of 512 tokens). So there are two sets of lengths. The shorter one is enough for most packed sequences, and has a fifth
to two fifths of the turns.

The second copy is made of pieces. A block of it that many blocks of queries visit, because completions share prefixes,
is repeated, each time for some of them. The lists of the gradients of keys are short by that.

Legend: F tokens of the packed sequence, I blocks of queries, J blocks of keys, M pieces, V visits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from igrpo_jax.models.segments import BLOCK


class Lengths(NamedTuple):
    """What the kernel has space for, in blocks."""

    pieces: int  # M
    keys: int  # blocks and pieces that a block of queries visits
    queries: int  # blocks of queries that visit a block or a piece


def lengths(count: int) -> tuple[Lengths, Lengths]:
    """Returns the short and the full lengths for a packed sequence of `count` blocks.

    The full ones are enough wherever completions stand before prefixes: of a block of queries each block of keys is
    visited in one copy, except the one in which the completions end and the prefixes begin.
    """
    few = max(count // 4, 12)  # of 512 tokens: a context of 6,144, or of a quarter of the packed sequence
    full = Lengths(count, count + 1, count)
    return (Lengths(count // 2, few, few) if count >= 2 * few else full), full


class Visits(NamedTuple):
    """The blocks of keys that each block of queries visits."""

    own: jax.Array  # [I, J] bool, of the first copy
    prefix: jax.Array  # [I, J] bool, of the second copy


def visits(segment: jax.Array, parent: jax.Array, blocks: jax.Array, block: int) -> Visits:
    """Returns the visits that a packed sequence needs.

    Args:
        segment, parent: [F] int32, of `segments.Segments`, padded to whole blocks of `block` tokens.
        blocks: [F / BLOCK, F / BLOCK] bool, without that padding.
        block: tokens of a block here, a multiple of BLOCK.
    """
    count, parts = len(segment) // block, block // BLOCK
    missing = count * parts - len(blocks)
    some = jnp.pad(blocks, ((0, missing), (0, missing))).reshape(count, parts, count, parts).any(axis=(1, 3))
    has = lambda tokens: tokens.reshape(count, block).any(axis=1)
    prefix = some & has(segment != parent)[:, None] & has((segment > 0) & (segment == parent))
    return Visits(jnp.tril(some), prefix)


def fit(needed: Visits, given: Lengths) -> jax.Array:
    """Returns whether the kernel has space for the visits, a bool."""
    keys = needed.own.sum(axis=1) + needed.prefix.sum(axis=1)
    pieces = -(-needed.prefix.sum(axis=0) // given.queries)
    of_queries = (keys.max() <= given.keys) & (needed.own.sum(axis=0).max() <= given.queries)
    return of_queries & (pieces.sum() <= given.pieces)


def divide(prefix: jax.Array, given: Lengths) -> tuple[jax.Array, jax.Array]:
    """Returns the block of keys that each piece belongs to, [M] int32, and which pieces are visited, [I, M] bool.

    Args:
        prefix: [I, J] bool, visits that fit `given`.
    """
    pieces = -(-prefix.sum(axis=0) // given.queries)
    ends = jnp.cumsum(pieces)
    number = ends - pieces + (jnp.cumsum(prefix, axis=0) - 1) // given.queries  # [I, J], of the piece to visit
    piece = jnp.arange(given.pieces)
    block_of = jnp.minimum(jnp.searchsorted(ends, piece, side="right"), len(ends) - 1)
    return block_of, prefix[:, block_of] & (number[:, block_of] == piece)


def listed(visited: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns [I, V] int32 and [I, V] int8: the blocks that each block visits, first of all, and 1 at each of them.

    The rest of a row repeats its last block, which is therefore not fetched again.

    Args:
        visited: [I, J] bool.
        length: V, at least what any row needs.
    """
    columns = jnp.arange(visited.shape[1], dtype=jnp.int32)
    in_order = jnp.sort(jnp.where(visited, columns, len(columns)), axis=1)[:, :length]
    last = jnp.where(visited, columns, 0).max(axis=1, keepdims=True)
    return jnp.minimum(in_order, last), (in_order < len(columns)).astype(jnp.int8)
