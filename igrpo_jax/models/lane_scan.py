"""A scan over sequences that are packed one after another, each of which continues the state in its lane.

The sampler reads prompts in this way: a prompt that does not fit in one call continues in a later one, from the state
that its lane holds. Sequences are cut into chunks on the device, and the chunks run one after another.

Each turn of the loop first writes to the lanes and then reads what the next turn needs: with reads before, XLA would
copy all lanes in every turn.

Legend: F tokens of the packed sequence, W sequences, L lanes, N chunks of C tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from igrpo_jax.models.ragged import Ragged
from igrpo_jax.models.tree_scan import put_tokens, tokens_of

Tree = Any  # a pytree of arrays
Body = Callable[[Tree, Tree, jax.Array], tuple[Tree, jax.Array]]


class Lanes(NamedTuple):
    """The states of sequences that are being read, one lane each, and the sequences that are packed."""

    states: Tree  # [L, ...], the state after the last token that was read of the sequence in each lane
    lane: jax.Array  # [W] int32, the lane of each sequence; no two sequences have the same one
    ragged: Ragged  # its pages are not used here


class _Chunks(NamedTuple):
    start: jax.Array  # [N] int32, the first token of each chunk
    count: jax.Array  # [N] int32, its tokens
    lane: jax.Array  # [N] int32, the lane of its sequence
    begins: jax.Array  # [N] bool, whether it holds the first token of its sequence
    used: jax.Array  # [] int32, chunks; from this number on, the arrays mean nothing


def lane_scan(body: Body, inputs: Tree, lanes: Lanes, chunk: int) -> tuple[Tree, jax.Array]:
    """Runs `body` on every sequence, chunk by chunk.

    A sequence that has tokens before the packed ones continues the state in its lane. Any other begins with zeros.

    Args:
        body: takes the state before a chunk ([1, ...]), the inputs of its tokens ([C, ...], with zeros past the last
            token) and their number; returns the state after the chunk and the result [C, ...] of each token.
        inputs: [F, ...] of every token.
        chunk: the most tokens of a chunk.

    Returns:
        The states, [L, ...]: those after the last tokens of the sequences, and the others as they were. The results,
        [F, ...]; zeros at tokens of no sequence.
    """
    size = jax.tree.leaves(inputs)[0].shape[0]
    chunk = min(chunk, size)
    chunks = _chunks(lanes.lane, lanes.ragged, size, chunk)
    take = lambda n: tokens_of(inputs, chunks.start[n], chunks.count[n], chunk)

    def before(states, n):
        read = lambda x: jax.lax.dynamic_slice_in_dim(x, chunks.lane[n], 1)
        return jax.tree.map(lambda x: jnp.where(chunks.begins[n], 0, read(x)), states)

    def visit(n, carry):
        states, state, results = carry
        state, result = body(state, take(n), chunks.count[n])
        write = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), chunks.lane[n], 0)
        states = jax.tree.map(write, states, state)
        return states, before(states, n + 1), put_tokens(results, result, chunks.start[n], chunks.count[n])

    first = before(lanes.states, 0)
    result = jax.eval_shape(lambda: body(first, take(0), chunks.count[0])[1])
    results = jnp.zeros((size, *result.shape[1:]), result.dtype)
    states, _, results = jax.lax.fori_loop(0, chunks.used, visit, (lanes.states, first, results))
    return states, results


def _chunks(lane: jax.Array, ragged: Ragged, size: int, chunk: int) -> _Chunks:
    """Cuts the sequences in `size` packed tokens into chunks of at most `chunk` tokens, each of one sequence."""
    width = len(lane)
    tokens = jnp.diff(ragged.start)  # [W], how many of each sequence are packed
    many = -(-tokens // chunk)
    end = jnp.cumsum(many)  # [W], the number of chunks of all sequences up to this one
    number = jnp.arange(-(-size // chunk) + width)
    sequence = jnp.minimum(jnp.searchsorted(end, number, side="right", method="compare_all"), width - 1)
    before = (number - (end - many)[sequence]) * chunk  # packed tokens of the same sequence before each chunk
    return _Chunks(
        start=ragged.start[sequence] + before,
        count=jnp.minimum(tokens[sequence] - before, chunk),
        lane=lane[sequence],
        begins=(before == 0) & (ragged.length == tokens)[sequence],
        used=end[-1],
    )
