"""A scan over the chunks of a packed sequence, each of which continues the state of another: a tree instead of a row.

All completions of a prefix continue its last chunk, which is computed once. Autodiff would save a buffer of states at
every chunk, so the backward pass is written by hand. It computes each chunk again, so that what a chunk needs besides
its state exists for one chunk at a time. Both passes end with the last chunk that has tokens.

States and their gradients use one buffer with a place per chunk. Chunks that continue the same chunk are siblings; the
place of the first of them holds the state that comes into all. The backward pass goes from the last chunk to the first,
and leaves in each place the sum of the gradients of the states that come into this chunk and its later siblings. The
first sibling, whose state the others still need, is overwritten last. Each turn of a loop first writes to the buffer
and then reads what the next turn needs: with reads before, XLA would copy the buffer in every turn.

Legend: S shards of the batch, F tokens of the packed sequence, N chunks of C tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from igrpo_jax.models.segments import Chain

Tree = Any  # a pytree of arrays
Body = Callable[[Tree, Tree, Tree, jax.Array], tuple[Tree, jax.Array]]


class Links(NamedTuple):
    """Where the chunks of one packed sequence lie, and which chunks continue which."""

    start: jax.Array  # [N] int32, the first token of each chunk
    count: jax.Array  # [N] int32, its tokens, which are neighbours; 0 = none
    child: jax.Array  # [N] int32, the first of the chunks that continue it; N = none
    sibling: jax.Array  # [N] int32, the next chunk that continues the same chunk; N = none
    source: jax.Array  # [N] int32, the first chunk that continues the same chunk, maybe itself; N = continues none


def tree_scan(body: Body, weights: Tree, empty: Tree, inputs: Tree, chain: Chain) -> jax.Array:
    """Runs `body` on every chunk of a packed sequence, and returns its result for each token, [S, F, ...].

    Args:
        body: takes the weights, the state before a chunk, the inputs of its tokens ([C, ...], with zeros past the last
            token) and their number; returns the state after the chunk and the result [C, ...] of each token.
        weights: what all chunks share.
        empty: the state before the first token of a prefix, zeros.
        inputs: [S, F, ...] of every token.
        chain: the chunks. The tokens of a chunk are neighbours in the sequence, and no chunk continues a later one.

    Returns:
        The results; zeros at tokens of no chunk. No gradient passes to `empty`, nor to inputs of such tokens.
    """
    size = jax.tree.leaves(inputs)[0].shape[1]
    links = jax.vmap(functools.partial(_links, size=size))(chain.chunks, chain.chunk_before)
    return _tree_scan(body, min(chain.chunks.shape[2], size), weights, empty, inputs, links)


def _links(chunks: jax.Array, chunk_before: jax.Array, size: int) -> Links:
    number = jnp.arange(len(chunks))
    first = lambda among: jnp.min(jnp.where(among, number, len(chunks)), axis=1)
    child = first(chunk_before == number[:, None])
    sibling = first((chunk_before == chunk_before[:, None]) & (number > number[:, None]))
    source = child.at[chunk_before].get(mode="fill", fill_value=len(chunks))
    return Links(chunks[:, 0], jnp.sum(chunks < size, axis=1), child, sibling, source)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tree_scan(body: Body, chunk: int, weights: Tree, empty: Tree, inputs: Tree, links: Links) -> jax.Array:
    return _forward(body, chunk, weights, empty, inputs, links)[0]


def _forward(body, chunk, weights, empty, inputs, links):
    """Returns the results, and what the backward pass keeps."""

    def of_shard(shard):
        inputs, links = shard
        place = lambda n: (links.start[n], links.count[n])

        def visit(n, carry):
            states, state, results = carry
            state, result = body(weights, state, tokens_of(inputs, *place(n), chunk), links.count[n])
            states = _with(states, links.child[n], state)
            return states, _at(states, links.source[n + 1]), put_tokens(results, result, *place(n))

        # The last place takes the states that no chunk continues.
        states = jax.tree.map(lambda x: jnp.zeros((len(links.start) + 1, *x.shape), x.dtype), empty)
        result = jax.eval_shape(lambda: body(weights, empty, tokens_of(inputs, *place(0), chunk), links.count[0])[1])
        results = jnp.zeros((jax.tree.leaves(inputs)[0].shape[0], *result.shape[1:]), result.dtype)
        states, _, results = jax.lax.fori_loop(0, _used(links), visit, (states, empty, results))
        return states, results

    states, results = jax.lax.map(of_shard, (inputs, links))
    return results, (weights, inputs, links, states)


def _backward(body, chunk, kept, gradient):
    """Returns the gradients of weights and inputs: those of `body` at each chunk, from the last to the first."""
    weights, inputs, links, states = kept

    def of_shard(shard):
        inputs, links, states, gradient = shard
        place = lambda n: (links.start[n], links.count[n])

        def read(states, n):
            """Returns the state before chunk `n`, and the gradients of the states after it and before its sibling."""
            return [_at(states, place[n]) for place in (links.source, links.child, links.sibling)]

        def visit(i, carry):
            states, (state, of_state, of_sibling), of_weights, of_inputs = carry
            n = _used(links) - 1 - i
            tokens, of_results = tokens_of((inputs, gradient), *place(n), chunk)
            run = lambda weights, state, tokens: body(weights, state, tokens, links.count[n])
            more, of_state, of_tokens = jax.vjp(run, weights, state, tokens)[1]((of_state, of_results))
            states = _with(states, n, _sum(of_state, of_sibling))
            of_inputs = jax.tree.map(lambda whole, x: put_tokens(whole, x, *place(n)), of_inputs, of_tokens)
            return states, read(states, n - 1), _sum(of_weights, more), of_inputs

        start = states, read(states, _used(links) - 1), *jax.tree.map(jnp.zeros_like, (weights, inputs))
        return jax.lax.fori_loop(0, _used(links), visit, start)[2:]

    of_weights, of_inputs = jax.lax.map(of_shard, (inputs, links, states, gradient))
    return jax.tree.map(lambda x: x.sum(axis=0), of_weights), None, of_inputs, None


_tree_scan.defvjp(_forward, _backward)


def _used(links: Links) -> jax.Array:
    """Returns the number of chunks with tokens, all of which stand before those without."""
    return jnp.sum(links.count > 0)


def _at(states: Tree, place: jax.Array) -> Tree:
    """Returns what the buffer holds for chunk `place`; zeros for N."""
    return jax.tree.map(lambda x: jnp.where(place < len(x) - 1, x[place], 0), states)


def _sum(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)


def _with(states: Tree, place: jax.Array, new: Tree) -> Tree:
    """Returns the buffer with `new` for chunk `place`, written in place."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, place, 0), states, new)


def tokens_of(tree: Tree, start: jax.Array, count: jax.Array, chunk: int) -> Tree:
    """Returns the tokens of one chunk from each array [F, ...], as [C, ...], with zeros past the last one.

    Args:
        start, count: [] int32, the first token of the chunk, and how many it has.
        chunk: C, at most F.
    """

    def take(x: jax.Array) -> jax.Array:
        begin, shift = _window(start, chunk, x.shape[0])
        tokens = jnp.roll(jax.lax.dynamic_slice_in_dim(x, begin, chunk), -shift, axis=0)
        return jnp.where(_column(jnp.arange(chunk) < count, x), tokens, 0)

    return jax.tree.map(take, tree)


def put_tokens(results: jax.Array, new: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """Returns `results` [F, ...] with those of the tokens of one chunk, `new` [C, ...], written in place."""
    chunk = new.shape[0]
    begin, shift = _window(start, chunk, results.shape[0])
    place = jnp.arange(chunk) - shift
    own = _column((place >= 0) & (place < count), new)
    old = jax.lax.dynamic_slice_in_dim(results, begin, chunk)
    return jax.lax.dynamic_update_slice_in_dim(results, jnp.where(own, jnp.roll(new, shift, axis=0), old), begin, 0)


def _window(start: jax.Array, chunk: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns where C tokens begin that lie in the sequence and include a chunk, and how many come before the chunk."""
    begin = jnp.minimum(start, size - chunk)
    return begin, start - begin


def _column(mask: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `mask` [C] with as many axes as `like`."""
    return mask.reshape(-1, *[1] * (like.ndim - 1))
