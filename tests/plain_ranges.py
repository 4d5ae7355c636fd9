"""cuDNN's kernels for packed sequences in plain JAX, for machines without a GPU; what is off the ranges is NaN."""

import jax
import jax.numpy as jnp

from igrpo_jax.models.cudnn import MaskType


def _range_of(ranges, size):
    """Returns the number of each token's range, -1 where it has none, [F]."""
    token = jnp.arange(size)
    inside = (token >= ranges.start[0, :-1, None]) & (token < (ranges.start[0, :-1] + ranges.length[0])[:, None])
    inside &= ranges.length[0, :, None] > 0
    return jnp.where(inside.any(0), jnp.argmax(inside, 0), -1)


def _scores(q, k, queries, keys, mask):
    """Returns scores [K, G, F, F], minus infinity where nothing is read, and which queries have a range."""
    size, kv_heads = q.shape[1], k.shape[2]
    grouped = q[0].astype(jnp.float32).reshape(size, kv_heads, -1, q.shape[3]) * q.shape[3] ** -0.5
    scores = jnp.einsum("FKGH,EKH->KGFE", grouped, k[0].astype(jnp.float32))
    query, key = _range_of(queries, size), _range_of(keys, size)
    reads = (query[:, None] == key) & (query[:, None] >= 0)
    if mask == MaskType.PADDING_CAUSAL:
        reads &= jnp.arange(size) <= jnp.arange(size)[:, None]
    return jnp.where(reads, scores, -jnp.inf), query >= 0, key >= 0


def _stats_of(by_query, ranges, size):
    """Returns [F, N] as [M, N, F]."""
    at = jnp.clip(ranges.start[0, :-1, None] + jnp.arange(size), 0, size - 1)
    inside = jnp.arange(size) < ranges.length[0][:, None]
    return jnp.where(inside[:, None], by_query[at].swapaxes(1, 2), jnp.nan)


def read_ranges(q, k, v, queries, keys, mask):
    size, heads = q.shape[1], q.shape[2]
    scores, has_range, _ = _scores(q, k, queries, keys, mask)
    sums = jax.nn.logsumexp(scores, axis=-1)  # [K, G, F]
    out = jnp.einsum("KGFE,EKH->FKGH", jnp.exp(scores - sums[..., None]), v[0].astype(jnp.float32))
    out = jnp.where(has_range[:, None, None], out.reshape(size, heads, -1), jnp.nan)
    stats = sums.transpose(2, 0, 1).reshape(size, heads)
    return out[None].astype(q.dtype), _stats_of(stats, queries, size)


def read_ranges_gradient(q, k, v, queries, keys, mask, stats, out, out_gradient):
    size, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    scores, has_range, is_key = _scores(q, k, queries, keys, mask)
    number = jnp.maximum(_range_of(queries, size), 0)
    sums = stats[number, :, jnp.arange(size) - queries.start[0][number]].reshape(size, kv_heads, -1)
    sums = jnp.where(has_range[:, None, None], sums, jnp.inf)
    weights = jnp.exp(scores - sums.transpose(1, 2, 0)[..., None])
    by_head = lambda x: x[0].astype(jnp.float32).reshape(size, kv_heads, heads // kv_heads, -1)
    d_out, of_out = by_head(out_gradient), by_head(out)
    subtracted = jnp.sum(d_out * of_out, axis=-1).transpose(1, 2, 0)
    d_weights = jnp.einsum("FKGH,EKH->KGFE", d_out, v[0].astype(jnp.float32))
    d_scores = weights * (d_weights - subtracted[..., None]) * q.shape[3] ** -0.5
    d_q = jnp.einsum("KGFE,EKH->FKGH", d_scores, k[0].astype(jnp.float32)).reshape(size, heads, -1)
    d_k = jnp.einsum("KGFE,FKGH->EKH", d_scores, by_head(q))
    d_v = jnp.einsum("KGFE,FKGH->EKH", weights, d_out)
    only = lambda x, inside: jnp.where(inside[:, None, None], x, jnp.nan)[None].astype(q.dtype)
    return only(d_q, has_range), only(d_k, is_key), only(d_v, is_key)
