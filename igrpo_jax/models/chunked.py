"""Flash attention in plain JAX (Dao et al., arXiv 2205.14135), in chunks of queries and keys, forward and backward.

`grouped` and `ungrouped` convert between the layout of the decoder and that in which heads and rows that share keys
stand side by side; the other implementation in plain JAX uses them too.

Legend: B batch, T query, S key, N heads, K kv heads, G heads per kv head (N = K * G), H head dim, Q prefixes, R rows
that continue one prefix (B = Q * R), P prefix positions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igrpo_jax.models.cache import Prefix

NEVER = float(jnp.finfo(jnp.float32).min)  # score of a key that may not be read; -inf would give NaN by 0 * inf


def grouped(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q, scaled, as [Q, K, R, G, T, H], and k and v as [Q, K, R, T, H].

    Transposing these arrays here avoids transposing the scores, which are larger.
    """
    batch, time, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    prefixes = batch if prefix is None else prefix.k.shape[0]
    q = (q * head_dim**-0.5).reshape(prefixes, -1, time, kv_heads, heads // kv_heads, head_dim)
    k, v = (x.reshape(prefixes, -1, kv_heads, time, head_dim).swapaxes(1, 2) for x in (k, v))
    return q.transpose(0, 3, 1, 4, 2, 5), k, v


def ungrouped(x: jax.Array) -> jax.Array:
    """Returns `x` [Q, K, R, G, T, H] as [B, T, N, H]."""
    prefixes, kv_heads, rows, groups, time, head_dim = x.shape
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(prefixes * rows, time, kv_heads * groups, head_dim)


# Queries, and also keys, of one step. On CPU the scores of 128 x 128 stay in the processor's cache. A differentiated
# step takes 1.1 to 2 times as long with 256 and 1.4 to 5 times as long with 512, and both need more memory.
CHUNK = 128


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None) -> jax.Array:
    """Computes `attention.xla_attention` in steps of CHUNK queries by CHUNK keys, forward and backward.

    Pairs of chunks whose keys the queries may not read are skipped. Beyond inputs and outputs it holds [B, N, CHUNK,
    CHUNK] scores, and float32 copies of the arrays that it sums. Arguments and result are the same.
    """
    time = q.shape[1]
    q, k, v = (_chunks(x, min(CHUNK, time)) for x in grouped(q, k, v, prefix))
    if prefix is not None:
        prefix = Prefix(*(_chunks(x, min(CHUNK, x.shape[-2])) for x in prefix[:2]), prefix.length)
    mixed = jnp.moveaxis(_flash(q, k, v, prefix), 0, 4)  # [Q, K, R, G, chunks, chunk, H]
    return ungrouped(mixed.reshape(*mixed.shape[:4], -1, mixed.shape[-1])[..., :time, :])


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """Returns `x` [..., T, H] as [chunks, ..., size, H], with zeros at the end."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % size), (0, 0)])
    return jnp.moveaxis(x.reshape(*x.shape[:-2], -1, size, x.shape[-1]), -3, 0)


class _Source(NamedTuple):
    """Keys and values in chunks, and which chunks of queries read which chunks of keys."""

    axes: str  # axes of a chunk of keys in an einsum, without S and H
    k: jax.Array  # [chunks, Q, K, (R,) S, H]
    v: jax.Array
    pairs: np.ndarray  # [2, pairs] int32: chunks of queries, chunks of keys
    length: jax.Array | None  # [Q] int32, real keys of a prefix; None where the keys are the row's own

    def scores(self, q: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Returns the scores [Q, K, R, G, T, S] float32 of q [Q, K, R, G, T, H], chunk i, for the keys of chunk j."""
        scores = jnp.einsum(f"QKRGTH,{self.axes}SH->QKRGTS", q, self.k[j], preferred_element_type=jnp.float32)
        key = j * self.k.shape[-2] + jnp.arange(self.k.shape[-2])
        if self.length is None:
            readable = key <= i * q.shape[-2] + jnp.arange(q.shape[-2])[:, None]
        else:
            readable = (key < self.length[:, None])[:, None, None, None, None]
        return jnp.where(readable, scores, NEVER)


def _sources(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None) -> list[_Source]:
    """Returns the keys of the prefix, then those of the row itself.

    The prefix comes first because the weights of an empty prefix are meaningless, and the first readable key, which is
    one of the row's own, sets them to zero.
    """
    chunks = q.shape[0]
    own = _Source("QKR", k, v, np.stack(np.tril_indices(chunks)).astype(np.int32), None)
    if prefix is None:
        return [own]
    pairs = np.indices((chunks, prefix.k.shape[0]), np.int32).reshape(2, -1)
    return [_Source("QK", prefix.k, prefix.v, pairs, prefix.length), own]


def _put(x: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
    """Returns `x` with `value` at index `i` of its first axis."""
    return jax.lax.dynamic_update_index_in_dim(x, value, i, 0)


@jax.custom_vjp
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None) -> jax.Array:
    """Computes attention by chunks.

    Args:
        q: [chunks, Q, K, R, G, T, H], scaled.
        k, v: [chunks, Q, K, R, S, H].
        prefix: its k and v are [chunks, Q, K, S, H].

    Returns:
        [chunks, Q, K, R, G, T, H] in q's dtype.
    """
    return _flash_forward(q, k, v, prefix)[0]


def _flash_forward(q, k, v, prefix):
    def step(source, carry, pair):
        i, j = pair
        mixed, top, total = (x[i] for x in carry)
        scores = source.scores(q[i], i, j)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        fade = jnp.exp(top - new_top)
        more = jnp.einsum(
            f"QKRGTS,{source.axes}SH->QKRGTH", weights.astype(v.dtype), source.v[j], preferred_element_type=jnp.float32
        )
        updated = mixed * fade[..., None] + more, new_top, total * fade + weights.sum(-1)
        return tuple(_put(x, new, i) for x, new in zip(carry, updated, strict=True)), None

    rows = jnp.zeros(q.shape[:-1], jnp.float32)
    carry = jnp.zeros(q.shape, jnp.float32), rows + NEVER, rows
    for source in _sources(q, k, v, prefix):
        carry, _ = jax.lax.scan(functools.partial(step, source), carry, tuple(source.pairs))
    mixed, top, total = carry
    mixed = (mixed / total[..., None]).astype(q.dtype)
    return mixed, (q, k, v, prefix, mixed, top + jnp.log(total))


def _flash_backward(saved, d_mixed):
    q, k, v, prefix, mixed, log_total = saved
    # The gradient through the softmax is d_scores = weights * (d_weights - inner), where inner is the sum over keys of
    # weights * d_weights. That sum equals the product of the output with its gradient.
    inner = jnp.sum(mixed.astype(jnp.float32) * d_mixed.astype(jnp.float32), axis=-1)

    def step(source, carry, pair):
        i, j = pair
        keys = f"{source.axes}SH"
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        weights = jnp.exp(source.scores(q[i], i, j) - log_total[i][..., None])
        d_weights = dot(f"QKRGTH,{keys}->QKRGTS", d_mixed[i], source.v[j])
        d_scores = (weights * (d_weights - inner[i][..., None])).astype(q.dtype)
        more = (
            (dot(f"QKRGTS,{keys}->QKRGTH", d_scores, source.k[j]), i),
            (dot(f"QKRGTS,QKRGTH->{keys}", d_scores, q[i]), j),
            (dot(f"QKRGTS,QKRGTH->{keys}", weights.astype(q.dtype), d_mixed[i]), j),
        )
        return tuple(_put(x, x[at] + new, at) for x, (new, at) in zip(carry, more, strict=True)), None

    d_q = jnp.zeros(q.shape, jnp.float32)
    d_sources = []
    for source in _sources(q, k, v, prefix):
        carry = d_q, jnp.zeros(source.k.shape, jnp.float32), jnp.zeros(source.v.shape, jnp.float32)
        (d_q, *d_keys), _ = jax.lax.scan(functools.partial(step, source), carry, tuple(source.pairs))
        d_sources.append([x.astype(k.dtype) for x in d_keys])
    d_prefix = None if prefix is None else Prefix(*d_sources[0], None)
    return d_q.astype(q.dtype), *d_sources[-1], d_prefix


_flash.defvjp(_flash_forward, _flash_backward)
