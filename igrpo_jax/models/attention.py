"""Attention of grouped queries over keys that may come from a cache: one call site, exact, with an fp32 softmax.

Legend: B batch, T query, S key, N heads, K kv heads, G heads per kv head (N = K * G), H head dim.
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
    grouped = q.reshape(batch, time, k.shape[1], heads // k.shape[1], head_dim)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    allowed = jnp.arange(k.shape[2])[None, None, :] <= positions[:, :, None]  # [B, T, S]
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weights, v).reshape(q.shape)


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
