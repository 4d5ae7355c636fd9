"""The sublayers of the decoder as nnx modules: RMSNorm, Attention, MLP. Each mixer maps [B, T, D] to [B, T, D].

Modules compute in the dtype of the parameters they are given; norms and softmax in float32.

Legend: B batch, T query, N heads, K kv heads, H head dim, D model, F ffn.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from igrpo_jax.models import cache as caches
from igrpo_jax.models.attention import IMPLEMENTATIONS, cached_attention, rope
from igrpo_jax.models.cache import KV, Prefix
from igrpo_jax.models.config import ModelConfig
from igrpo_jax.sharding import constrain


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5)


def _zeros(shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32))


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * self.scale[...]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and an optional bias on q, k and v."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        d, n, k, h = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        self.q_proj = _normal(rngs, (d, n, h), d)
        self.k_proj = _normal(rngs, (d, k, h), d)
        self.v_proj = _normal(rngs, (d, k, h), d)
        self.o_proj = _zeros((n, h, d))  # a sublayer starts as the identity
        if c.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = _zeros((n, h)), _zeros((k, h)), _zeros((k, h))
        self.qkv_bias, self.rope_theta, self.attention = c.qkv_bias, c.rope_theta, c.attention

    def __call__(self, x: jax.Array, positions: jax.Array, entry: KV | Prefix | None):
        """Output [B, T, D] and the keys and values that the caller may keep.

        Without `entry` the row attends to itself, with a Prefix to that as well, and its own [B, K, T, H] come back.
        With a KV (T = 1) the token is written at its position, and the whole entry comes back.
        """
        q = jnp.einsum("BTD,DNH->BTNH", x, self.q_proj[...])
        k = jnp.einsum("BTD,DKH->BTKH", x, self.k_proj[...])
        v = jnp.einsum("BTD,DKH->BTKH", x, self.v_proj[...])
        if self.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        q = constrain(rope(q, positions, self.rope_theta), "batch", "time", "heads", "head_dim")
        k = rope(k, positions, self.rope_theta)
        own = KV(*(constrain(y.swapaxes(1, 2), *caches.AXES) for y in (k, v)))
        if isinstance(entry, KV):
            own = caches.append(entry, own, positions[:, 0])
            mixed = cached_attention(q, *own, positions)
        else:
            mixed = IMPLEMENTATIONS[self.attention](q, *own, entry)
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.o_proj[...]), own


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        d, f = c.hidden_size, c.intermediate_size
        self.gate_proj = _normal(rngs, (d, f), d)
        self.up_proj = _normal(rngs, (d, f), d)
        self.down_proj = _zeros((f, d))

    def __call__(self, x: jax.Array, positions: jax.Array, entry: None):
        gate = jnp.einsum("BTD,DF->BTF", x, self.gate_proj[...])
        up = jnp.einsum("BTD,DF->BTF", x, self.up_proj[...])
        hidden = constrain(jax.nn.silu(gate) * up, "batch", "time", "ffn")
        return jnp.einsum("BTF,FD->BTD", hidden, self.down_proj[...]), None
