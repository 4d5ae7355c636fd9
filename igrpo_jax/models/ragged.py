"""Sequences whose new tokens are packed one after another, and whose positions lie in pages of a pool.

Legend: F new tokens, W sequences, R pages of a sequence, P pages of the pool, C positions of a page, K kv heads, H head
dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from igrpo_jax.models import cache as caches


class Ragged(NamedTuple):
    """Sequences whose new tokens are packed one after another, and the pages that hold each of them.

    Token t of sequence w (start[w] <= t < start[w + 1], w < count) has position length[w] - start[w + 1] + t, and reads
    the positions 0 to its own of its sequence. Tokens from start[count] on are padding. Sequences may share pages that
    none of them writes to.
    """

    length: jax.Array  # [W] int32, tokens of each sequence, its new ones included
    table: jax.Array  # [W, R] int32, the pages of each sequence in their order; P or more means none
    start: jax.Array  # [W + 1] int32, where the new tokens of each begin; from `count` on, the end of the last one
    count: jax.Array  # [1] int32, sequences; the others hold nothing


class Paged(NamedTuple):
    """The pool of pages of one attention sublayer, and the sequences that are read and written."""

    pages: jax.Array  # P pages of C positions, in the `PageLayout` of the implementation
    ragged: Ragged


class Places(NamedTuple):
    """Where the new tokens belong."""

    sequence: jax.Array  # [F] int32, number of each token's sequence; W at padding
    position: jax.Array  # [F] int32, in its sequence; meaningless at padding


def places(ragged: Ragged, size: int) -> Places:
    """Returns where each of `size` packed tokens belongs."""
    token = jnp.arange(size, dtype=jnp.int32)
    ends = ragged.start[1:]
    sequence = jnp.searchsorted(ends, token, side="right", method="compare_all").astype(jnp.int32)
    last = jnp.minimum(sequence, ends.shape[0] - 1)
    return Places(sequence, ragged.length[last] - ends[last] + token)


def write(pages: jax.Array, k: jax.Array, v: jax.Array, ragged: Ragged) -> jax.Array:
    """Returns `pages` with the new tokens written, in place where `pages` is donated.

    Padding is dropped, and so is a token whose page is P or more or beyond its table.

    Args:
        pages: pages of any layout.
        k, v: [F, K, H], cast to the dtype of `pages`.
    """
    size = pages.shape[-3]
    sequence, position = places(ragged, k.shape[0])
    page = ragged.table.at[sequence, position // size].get(mode="fill", fill_value=len(pages))
    return caches.put(pages, page, position % size, k, v)
