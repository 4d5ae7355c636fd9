"""Flash attention in plain JAX (Dao et al., arXiv 2205.14135), by blocks of queries and keys, forward and backward.

Pairs of blocks in which no query reads a key are left out, so the work is that of real tokens and not of the whole
packed sequence. Loops over pairs have trip counts that are known when they run; that is why the gradient is written by
hand.

Legend: F queries, E keys, N heads, K kv heads, G heads per kv head (N = K * G), H head dim, I blocks of queries,
J blocks of keys, C tokens of a block, X = G * C.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igrpo_jax.models.segments import readable

NEVER = float(jnp.finfo(jnp.float32).min)  # score of a key that may not be read; -inf would give NaN by 0 * inf


class Reading(NamedTuple):
    """Which keys each query reads, as `segments.readable` says, and by blocks."""

    segment: jax.Array  # [F] int32, of queries
    parent: jax.Array  # [F] int32
    position: jax.Array  # [F] int32
    key_segment: jax.Array  # [E] int32
    key_position: jax.Array  # [E] int32
    blocks: jax.Array  # [I, J] bool, whether a query of block i reads a key of block j


def blocked_attention(q: jax.Array, k: jax.Array, v: jax.Array, reading: Reading) -> jax.Array:
    """Returns the attention [F, N, H], in q's dtype, of queries to the keys that they read.

    Scores and softmax are float32, and exist for one pair of blocks at a time. What a query that reads nothing gets is
    finite and meaningless.

    Args:
        q: [F, N, H].
        k, v: [K, E, H].
    """
    kv_heads, head_dim = k.shape[0], k.shape[2]
    rows, columns = reading.blocks.shape
    # [I, K, G, C, H] and [J, K, C, H]: transposing these arrays avoids transposing scores, which are larger.
    by_block = (q * head_dim**-0.5).reshape(rows, -1, kv_heads, q.shape[1] // kv_heads, head_dim)
    keys, values = (x.reshape(kv_heads, columns, -1, head_dim).swapaxes(0, 1) for x in (k, v))
    mixed = _flash(by_block.transpose(0, 2, 3, 1, 4), keys, values, _by_block(reading))
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape)


class _Blocks(NamedTuple):
    """`Reading` by blocks, with the list of the blocks of keys that each block of queries reads."""

    segment: jax.Array  # [I, C]
    parent: jax.Array  # [I, C]
    position: jax.Array  # [I, C]
    key_segment: jax.Array  # [J, C]
    key_position: jax.Array  # [J, C]
    read: jax.Array  # [I, J] int32, blocks of keys, those that are read first
    count: jax.Array  # [I] int32, how many of `read` are read


def _by_block(reading: Reading) -> _Blocks:
    rows, columns = reading.blocks.shape
    return _Blocks(
        segment=reading.segment.reshape(rows, -1),
        parent=reading.parent.reshape(rows, -1),
        position=reading.position.reshape(rows, -1),
        key_segment=reading.key_segment.reshape(columns, -1),
        key_position=reading.key_position.reshape(columns, -1),
        read=jnp.argsort(~reading.blocks, axis=1, stable=True).astype(jnp.int32),
        count=reading.blocks.sum(axis=1, dtype=jnp.int32),
    )


def _scores(q: jax.Array, k: jax.Array, blocks: _Blocks, i: jax.Array, j: jax.Array) -> jax.Array:
    """Returns the scores [K, G, C, C] float32 of block i of the queries, `q` [K, G, C, H], for block j of the keys."""
    flat = q.reshape(q.shape[0], -1, q.shape[-1])
    scores = jnp.einsum("KXH,KCH->KXC", flat, k, preferred_element_type=jnp.float32).reshape(*q.shape[:3], -1)
    queries = blocks.segment[i], blocks.position[i], blocks.parent[i]
    return jnp.where(readable(*queries, blocks.key_segment[j], blocks.key_position[j]), scores, NEVER)


@jax.custom_vjp
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, blocks: _Blocks) -> jax.Array:
    """Computes attention by blocks: q [I, K, G, C, H], scaled, and k and v [J, K, C, H] give [I, K, G, C, H]."""
    return _flash_forward(q, k, v, blocks)[0]


def _flash_forward(q, k, v, blocks):
    def attend(i, own, t, carry):
        mixed, top, total = carry
        j = blocks.read[i, t]
        scores = _scores(own, k[j], blocks, i, j)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        fade = jnp.exp(top - new_top)
        return (
            mixed * fade[..., None] + _product(weights.astype(v.dtype), v[j]),
            new_top,
            total * fade + weights.sum(-1),
        )

    def of_block(_, xs):
        i, own = xs
        rows = jnp.zeros(own.shape[:-1], jnp.float32)
        start = jnp.zeros(own.shape, jnp.float32), rows + NEVER, rows
        mixed, top, total = jax.lax.fori_loop(0, blocks.count[i], functools.partial(attend, i, own), start)
        total = jnp.where(total > 0, total, 1.0)  # a block of padding alone reads nothing
        return None, ((mixed / total[..., None]).astype(own.dtype), top + jnp.log(total))

    _, (mixed, log_total) = jax.lax.scan(of_block, None, (jnp.arange(q.shape[0]), q))
    return mixed, (q, k, v, blocks, mixed, log_total)


def _product(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the float32 product of [K, G, C, E] with [K, E, H] as [K, G, C, H]."""
    flat = weights.reshape(weights.shape[0], -1, weights.shape[-1])
    out = jnp.einsum("KXE,KEH->KXH", flat, values, preferred_element_type=jnp.float32)
    return out.reshape(*weights.shape[:-1], -1)


def _flash_backward(saved, d_mixed):
    q, k, v, blocks, mixed, log_total = saved
    # The gradient through the softmax is d_scores = weights * (d_weights - inner), where inner is the sum over keys of
    # weights * d_weights. That sum equals the product of the output with its gradient.
    inner = jnp.sum(mixed.astype(jnp.float32) * d_mixed.astype(jnp.float32), axis=-1)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    by_row = lambda x: x.reshape(x.shape[0], -1, x.shape[-1])  # [K, G, C, ...] -> [K, X, ...]

    def attend(i, own, t, carry):
        d_q, d_k, d_v = carry
        j = blocks.read[i, t]
        weights = jnp.exp(_scores(own, k[j], blocks, i, j) - log_total[i][..., None])
        d_weights = dot("KXH,KSH->KXS", by_row(d_mixed[i]), v[j]).reshape(weights.shape)
        d_scores = (weights * (d_weights - inner[i][..., None])).astype(q.dtype)
        d_q += _product(d_scores, k[j])
        d_k = d_k.at[j].add(dot("KXS,KXH->KSH", by_row(d_scores), by_row(own)))
        d_v = d_v.at[j].add(dot("KXS,KXH->KSH", by_row(weights).astype(q.dtype), by_row(d_mixed[i])))
        return d_q, d_k, d_v

    def of_block(carry, xs):
        i, own = xs
        start = (jnp.zeros(own.shape, jnp.float32), *carry)
        d_q, *carry = jax.lax.fori_loop(0, blocks.count[i], functools.partial(attend, i, own), start)
        return tuple(carry), d_q.astype(own.dtype)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(of_block, start, (jnp.arange(q.shape[0]), q))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_flash.defvjp(_flash_forward, _flash_backward)
