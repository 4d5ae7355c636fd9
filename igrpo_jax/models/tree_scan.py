"""A scan over the chunks of a packed axis, each of which continues the state of another: a tree instead of a row.

All completions of a prefix continue its last chunk, which is computed once. The states and their gradients use one
buffer, with a place per chunk: it holds the state that comes into a chunk, and once the backward pass has been there,
the gradient of that state. Autodiff would save the buffer at every chunk, so the backward pass is written by hand. It
computes each chunk again, so that what a chunk needs besides its state exists for one chunk at a time. Both passes end
with the last chunk that has tokens.

Legend: S shards of the batch, F tokens of the axis, N chunks of C tokens.
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
    """Where the chunks of one axis lie, and which chunks continue which."""

    start: jax.Array  # [N] int32, the first token of each chunk
    count: jax.Array  # [N] int32, its tokens, which are neighbours; 0 = none
    child: jax.Array  # [N] int32, the first of the chunks that continue it; N = none
    sibling: jax.Array  # [N] int32, the next chunk that continues the same chunk; N = none


def tree_scan(body: Body, weights: Tree, empty: Tree, inputs: Tree, chain: Chain) -> jax.Array:
    """Runs `body` on every chunk of a packed axis, and returns what it gives for each token, [S, F, ...].

    Args:
        body: takes the weights, the state before a chunk, the inputs of its tokens ([C, ...], with zeros past the last
            token) and their number; returns the state after the chunk and the result [C, ...] of each token.
        weights: what all chunks share.
        empty: the state before the first token of a prefix, zeros.
        inputs: [S, F, ...] of every token.
        chain: the chunks. The tokens of a chunk are neighbours on the axis, and no chunk continues a later one.

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
    return Links(chunks[:, 0], jnp.sum(chunks < size, axis=1), child, sibling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tree_scan(body: Body, chunk: int, weights: Tree, empty: Tree, inputs: Tree, links: Links) -> jax.Array:
    return _forward(body, chunk, weights, empty, inputs, links)[0]


def _forward(body, chunk, weights, empty, inputs, links):
    """Returns the results, and what the backward pass keeps."""

    def of_shard(shard):
        inputs, links = shard

        def visit(n, carry):
            states, results = carry
            tokens = _tokens(inputs, links, n, chunk)
            state, result = body(weights, _at(states, n), tokens, links.count[n])
            put = lambda states, child: jax.tree.map(lambda all, x: all.at[child].set(x), states, state)
            return _over_children(put, states, links, n), _put(results, result, links, n)

        states = jax.tree.map(lambda x: jnp.zeros((len(links.start), *x.shape), x.dtype), empty)
        result = jax.eval_shape(lambda: body(weights, empty, _tokens(inputs, links, 0, chunk), links.count[0])[1])
        results = jnp.zeros((jax.tree.leaves(inputs)[0].shape[0], *result.shape[1:]), result.dtype)
        return jax.lax.fori_loop(0, _used(links), visit, (states, results))

    states, results = jax.lax.map(of_shard, (inputs, links))
    return results, (weights, empty, inputs, links, states)


def _backward(body, chunk, kept, gradient):
    """Returns the gradients of weights and inputs, which are those of `body` at each chunk, from the last to the first.

    The gradient of the state after a chunk is the sum of those that the chunks which continue it have left in its
    buffer.
    """
    weights, empty, inputs, links, states = kept

    def of_shard(shard):
        inputs, links, states, gradient = shard

        def visit(i, carry):
            states, of_weights, of_inputs = carry
            n = _used(links) - 1 - i
            tokens, of_results = _tokens((inputs, gradient), links, n, chunk)
            add = lambda total, child: jax.tree.map(jnp.add, total, _at(states, child))
            of_state = _over_children(add, jax.tree.map(jnp.zeros_like, empty), links, n)
            run = lambda weights, state, tokens: body(weights, state, tokens, links.count[n])
            _, vjp = jax.vjp(run, weights, _at(states, n), tokens)
            more, of_state, of_tokens = vjp((of_state, of_results))
            states = jax.tree.map(lambda all, x: all.at[n].set(x), states, of_state)
            of_inputs = jax.tree.map(lambda all, x: _put(all, x, links, n), of_inputs, of_tokens)
            return states, jax.tree.map(jnp.add, of_weights, more), of_inputs

        start = states, jax.tree.map(jnp.zeros_like, weights), jax.tree.map(jnp.zeros_like, inputs)
        return jax.lax.fori_loop(0, _used(links), visit, start)[1:]

    of_weights, of_inputs = jax.lax.map(of_shard, (inputs, links, states, gradient))
    return jax.tree.map(lambda x: x.sum(axis=0), of_weights), None, of_inputs, None


_tree_scan.defvjp(_forward, _backward)


def _used(links: Links) -> jax.Array:
    """Returns the number of chunks with tokens, all of which stand before those without."""
    return jnp.sum(links.count > 0)


def _at(tree: Tree, index: jax.Array) -> Tree:
    return jax.tree.map(lambda x: x[index], tree)


def _over_children(visit: Callable[[Tree, jax.Array], Tree], carry: Tree, links: Links, n: jax.Array) -> Tree:
    """Folds `visit` over the chunks that continue chunk `n`."""
    unfinished = lambda pair: pair[1] < len(links.start)
    step = lambda pair: (visit(*pair), links.sibling[pair[1]])
    return jax.lax.while_loop(unfinished, step, (carry, links.child[n]))[0]


def _tokens(tree: Tree, links: Links, n: jax.Array, chunk: int) -> Tree:
    """Returns of each [F, ...] the tokens of chunk `n`, [C, ...], with zeros past the last one."""

    def take(x: jax.Array) -> jax.Array:
        begin, shift = _window(links, n, chunk, x.shape[0])
        tokens = jnp.roll(jax.lax.dynamic_slice_in_dim(x, begin, chunk), -shift, axis=0)
        return jnp.where(_column(jnp.arange(chunk) < links.count[n], x), tokens, 0)

    return jax.tree.map(take, tree)


def _put(results: jax.Array, new: jax.Array, links: Links, n: jax.Array) -> jax.Array:
    """Returns `results` [F, ...] with those of the tokens of chunk `n`, `new` [C, ...], written in place."""
    chunk = new.shape[0]
    begin, shift = _window(links, n, chunk, results.shape[0])
    place = jnp.arange(chunk) - shift
    own = _column((place >= 0) & (place < links.count[n]), new)
    old = jax.lax.dynamic_slice_in_dim(results, begin, chunk)
    return jax.lax.dynamic_update_slice_in_dim(results, jnp.where(own, jnp.roll(new, shift, axis=0), old), begin, 0)


def _window(links: Links, n: jax.Array, chunk: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns where C tokens begin that lie on the axis and include chunk `n`, and how many come before the chunk."""
    begin = jnp.minimum(links.start[n], size - chunk)
    return begin, links.start[n] - begin


def _column(mask: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `mask` [C] with as many axes as `like`."""
    return mask.reshape(-1, *[1] * (like.ndim - 1))
