"""Where tokens stand in their sequences, and the rotary position embedding (Su et al., arXiv 2104.09864).

Legend: B batch, T query, N heads, H head dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igrpo_jax.models.config import DecoderConfig


class Positions(NamedTuple):
    """Positions of tokens, and the sines and cosines of their angles, which all sublayers share."""

    number: jax.Array  # [B, T] int32
    sin: jax.Array | None  # [B, T, 1, H/2] float32; None where attention has no positions
    cos: jax.Array | None


def with_angles(cfg: DecoderConfig, positions: jax.Array) -> Positions:
    """Returns `positions` [B, T] int32 with what `rope` needs of them, computed in float32."""
    if cfg.rope_theta is None:
        return Positions(positions, None, None)
    half, scaling = cfg.head_dim // 2, cfg.rope_scaling
    frequency = cfg.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:  # Llama 3 stretches the low frequencies
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        unscaled = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        unscaled = jnp.clip(unscaled, 0, 1)  # 1 where the frequency stays as it is, 0 where it is divided by the factor
        frequency *= unscaled + (1 - unscaled) / scaling.factor
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    # Without the barrier, where `decoder.barrier_options` keeps it, XLA's CPU compiler computes sines and cosines
    # again for every head of every sublayer.
    return Positions(positions, *jax.lax.optimization_barrier((jnp.sin(angle), jnp.cos(angle))))


def rope(x: jax.Array, positions: Positions) -> jax.Array:
    """Returns `x` [B, T, N, H] rotated by the angles of its positions, in its dtype; computed in float32.

    The layout is that of Hugging Face: dimension i of the first half of a head rotates with dimension i of the second.
    """
    sin, cos = positions.sin, positions.cos
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
