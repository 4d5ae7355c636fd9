"""Attention of grouped queries over keys that may come from a cache: one call site, exact, with an fp32 softmax.

Legend: B batch, T query, S key, N heads, K kv heads, G heads per kv head (N = K * G), X = G * T, H head dim.
"""

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Causal attention: a query at position p reads the keys at 0..p.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, S, H]; key s stands at position s.
        positions: [B, T] int32, of the queries. Right padding needs no mask: no real query reads past itself.

    Returns:
        [B, T, N, H] in q's dtype. Scores and softmax are float32 (materialised: [B, K, G, T, S]).
    """
    batch, time, heads, head_dim = q.shape
    kv_heads, groups = k.shape[1], heads // k.shape[1]
    # One matmul per (row, kv head) with G and T side by side: on CPU 4 times faster than a BTKGH,BKSH->BKGTS einsum.
    rows = q.reshape(batch, time, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, groups * time, head_dim)
    scores = jnp.einsum("BKXH,BKSH->BKXS", rows, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    allowed = jnp.arange(k.shape[2])[None, None, :] <= positions[:, :, None]  # [B, T, S]
    scores = scores.reshape(batch, kv_heads, groups, time, -1)
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, kv_heads, groups * time, -1)
    mixed = jnp.einsum("BKXS,BKSH->BKXH", weights, v).reshape(batch, kv_heads, groups, time, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding, Hugging Face layout (the two halves of a head rotate together), computed in float32.

    Args:
        x: [B, T, N, H].
        positions: [B, T] int32.
        theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, T, 1, H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
