"""Draws one token a row from logits, with temperature, top-k and top-p, but no random tensor or sort of the vocabulary.

1. top-k and top-p keep the entries at or above a threshold, which bisection on the bits of the float finds (32 passes);
   this runs only when one of them is on. Ties at the threshold are kept.
2. The token is the inverse of the cumulative distribution at one uniform number per row: summed by blocks of the
   vocabulary, then searched inside one block. This takes 3 ms for 64 rows of 49,152 on two
   cores; a Gumbel draw takes 68.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128


class Draw(NamedTuple):
    """One token a row, and what is known of the distribution p = softmax(logits / temperature) that it is from.

    p is the distribution before top-k and top-p, which is that of the trainer; at temperature 0 that of temperature 1.
    """

    token: jax.Array  # [B] int32
    logprob: jax.Array  # [B] float32, log p of the token, in nats
    entropy: jax.Array  # [B] float32, Shannon entropy of p, in nats


def draw(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array, top_k: jax.Array) -> Draw:
    """Draws one token per row.

    Args:
        logits: [B, V] float32.
        keys: [B, 2] uint32, one threefry key per row.
        temperature, top_p, top_k: [], traced; temperature 0 takes the largest logit, top_p 1 and top_k 0 are off.
    """
    scale = jnp.where(temperature > 0, temperature, 1.0)
    largest = logits.max(axis=-1, keepdims=True)
    weights_of = lambda x: jnp.exp((x - largest) / scale)

    # Only what is asked for runs, because XLA's argmax and the search for a threshold cost more than everything else.
    def plain(logits: jax.Array) -> jax.Array:
        return _inverse_cdf(weights_of(logits), uniform)

    def filtered(logits: jax.Array) -> jax.Array:
        return _inverse_cdf(_keep_top_p(_keep_top_k(weights_of(logits), top_k), top_p), uniform)

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.wrap_key_data(key)))(keys)
    branch = jnp.where(temperature > 0, ((top_p < 1) | (top_k > 0)).astype(jnp.int32), 2)
    token = jax.lax.switch(branch, (plain, filtered, greedy), logits)
    drawn = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    weights = weights_of(logits)
    total = weights.sum(axis=-1)
    # An entry of weight 0 adds 0, also where its logit is -inf.
    below = jnp.where(weights > 0, weights * ((largest - logits) / scale), 0.0).sum(axis=-1)
    log_total = jnp.log(total)
    return Draw(token, (drawn - largest[:, 0]) / scale - log_total, log_total + below / total)


def _inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns an index [B] drawn in proportion to weights [B, V], by uniform numbers [B] in [0, 1)."""
    rows, size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -size % BLOCK))).reshape(rows, -1, BLOCK)
    edges = jnp.cumsum(blocks.sum(axis=-1), axis=-1)  # [B, V / BLOCK]
    target = uniform[:, None] * edges[:, -1:]
    # Rounding may leave the target past the last edge, or in a block or entry of weight 0, which must not be picked.
    rises = edges > jnp.pad(edges, ((0, 0), (1, 0)))[:, :-1]
    index = jnp.minimum(jnp.sum(edges <= target, axis=-1, keepdims=True), _last(rises))
    start = jnp.where(index > 0, jnp.take_along_axis(edges, jnp.maximum(index - 1, 0), axis=-1), 0.0)
    inside = jnp.take_along_axis(blocks, index[..., None], axis=1)[:, 0]  # [B, BLOCK]
    offset = jnp.sum(jnp.cumsum(inside, axis=-1) <= target - start, axis=-1, keepdims=True)
    return (index * BLOCK + jnp.minimum(offset, _last(inside > 0)))[:, 0].astype(jnp.int32)


def _last(flags: jax.Array) -> jax.Array:
    """Returns the index of the last true entry of each row, [B, 1]."""
    return flags.shape[1] - 1 - jnp.argmax(flags[:, ::-1], axis=-1, keepdims=True)


def _keep_top_k(weights: jax.Array, top_k: jax.Array) -> jax.Array:
    enough = lambda keep: jnp.sum(keep, axis=-1) >= top_k
    return jnp.where(top_k > 0, _keep_smallest_set(weights, enough), weights)


def _keep_top_p(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    target = top_p * weights.sum(axis=-1)
    enough = lambda keep: jnp.sum(jnp.where(keep, weights, 0.0), axis=-1) >= target
    return jnp.where(top_p < 1, _keep_smallest_set(weights, enough), weights)


def _keep_smallest_set(weights: jax.Array, enough) -> jax.Array:
    """Keeps the smallest set {w >= threshold} of each row for which `enough(set [B, V]) -> [B]` holds, and puts 0
    elsewhere."""
    order = jax.lax.bitcast_convert_type(weights, jnp.int32)  # non-negative floats have the same order as their bits

    def halve(_, bounds):
        low, high = bounds  # `enough` holds at low and not at high
        middle = low + ((high - low) >> 1)
        ok = enough(order >= middle[:, None])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low = jnp.zeros(weights.shape[:1], jnp.int32)
    high = jnp.full(weights.shape[:1], jnp.iinfo(jnp.int32).max)
    threshold, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jnp.where(order >= threshold[:, None], weights, 0.0)
