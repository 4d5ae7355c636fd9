"""The sublayers of the decoder as nnx modules: RMSNorm, Attention, MLP. Each mixer maps [B, T, D] to [B, T, D].

A mixer is called with (x, positions, entry). `entry` is the part of the cache that the rows continue, or None.

Modules compute in the dtype of their parameters; norms and softmax are float32.

Legend: B batch, T query, N heads, K kv heads, H head dim, D model, F ffn.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from igrpo_jax.distributed.sharding import constrain
from igrpo_jax.models.attention import PACKED, row_attention, windowed_attention
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.paged import paged_attention
from igrpo_jax.models.products import product
from igrpo_jax.models.ragged import Paged
from igrpo_jax.models.rotary import Positions, rope
from igrpo_jax.models.segments import KV_AXES, Segments
from igrpo_jax.models.windows import Windowed


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """Returns a float32 weight whose entries are normal with standard deviation 1 / sqrt(fan_in)."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5)


def zeros(shape: tuple[int, ...]) -> nnx.Param:
    """Returns a float32 parameter of zeros."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Returns `x` [..., S] over its root mean square, computed in float32, times `scale` [S].

    The gradient is written by hand. XLA's CPU compiler computes the terms of the sums in JAX's own one, entry by entry,
    from what they depend on: of 8,192 tokens of 576 channels, two cores take 103 ms so and 10 here.
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x: jax.Array, scale: jax.Array, eps: float):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype) * scale, (x, scale, inverse)


def _rms_norm_backward(eps: float, kept: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array):
    x, scale, inverse = kept
    normalised = x.astype(jnp.float32) * inverse
    of_normalised = (gradient * scale).astype(jnp.float32)
    of_x = inverse * (of_normalised - normalised * jnp.mean(of_normalised * normalised, axis=-1, keepdims=True))
    of_scale = jnp.sum(gradient * normalised.astype(x.dtype), axis=range(x.ndim - 1))
    return of_x.astype(x.dtype), of_scale


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis (Zhang and Sennrich, arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Grouped-query attention, with the bias, the norm per head and the rotary positions of the model's family."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        d, n, k, h = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.q_proj = normal(rngs, (d, n, h), d)
        self.k_proj = normal(rngs, (d, k, h), d)
        self.v_proj = normal(rngs, (d, k, h), d)
        self.o_proj = zeros((n, h, d))  # with the residual, a sublayer starts as the identity
        if cfg.qkv_bias:
            self.q_bias = zeros((n, h))
            self.k_bias = zeros((k, h))
            self.v_bias = zeros((k, h))
        if cfg.qk_norm:
            self.q_norm = RMSNorm(h, cfg.rms_norm_eps)
            self.k_norm = RMSNorm(h, cfg.rms_norm_eps)
        self.qkv_bias = cfg.qkv_bias
        self.qk_norm = cfg.qk_norm
        self.attention = cfg.attention
        self.row_parts = cfg.row_parts

    def __call__(self, x: jax.Array, positions: Positions, entry: Windowed | Paged | Segments | None):
        """Returns the output [B, T, D], and the keys and values that the caller keeps.

        Without `entry` each row attends causally to itself. With a Windowed (T = 1) the new token is stored in `added`
        and attends to the window and to `added`. With a Paged all new tokens are written to their pages and attend to
        the pages of their sequence. With Segments a token attends to its own segment and to its prefix, and nothing is
        kept.

        Args:
            x: [B, T, D].
            positions: positions of its tokens.
        """
        q = product("BTD,DNH->BTNH", x, self.q_proj)
        k = product("BTD,DKH->BTKH", x, self.k_proj)
        v = product("BTD,DKH->BTKH", x, self.v_proj)
        if self.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if positions.sin is not None:
            q, k = rope(q, positions), rope(k, positions)
        q = constrain(q, "batch", "time", "heads", "head_dim")
        mixed, kept = self._attend(q, k, v, entry)
        return product("BTNH,NHD->BTD", mixed, self.o_proj), kept

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, entry: Windowed | Paged | Segments | None):
        """Returns what `q` [B, T, N, H] reads, in its shape, and what is kept of `k` and `v` [B, T, K, H]."""
        if isinstance(entry, Paged):
            tokens = lambda y: y.reshape(-1, *y.shape[2:])
            mixed, pool = paged_attention(self.attention, tokens(q), tokens(k), tokens(v), entry, self.row_parts)
            return mixed.reshape(q.shape), pool
        if isinstance(entry, Windowed):
            return windowed_attention(q, k, v, entry)
        if isinstance(entry, Segments):
            k, v = (constrain(y.swapaxes(1, 2), *KV_AXES) for y in (k, v))
            return PACKED[self.attention](q, k, v, entry), None
        return row_attention(q, k, v), None


class MLP(nnx.Module):
    """The feed-forward sublayer: swiglu is down(silu(gate(x)) * up(x)), relu2 is down(relu(up(x)) ** 2)."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.gated = cfg.mlp == "swiglu"
        if self.gated:
            self.gate_proj = normal(rngs, (d, f), d)
        self.up_proj = normal(rngs, (d, f), d)
        self.down_proj = zeros((f, d))

    def __call__(self, x: jax.Array, positions: Positions, entry: None):
        """Returns the output [B, T, D], and None because an MLP keeps nothing."""
        up = product("BTD,DF->BTF", x, self.up_proj)
        hidden = jax.nn.silu(product("BTD,DF->BTF", x, self.gate_proj)) * up if self.gated else jax.nn.relu(up) ** 2
        hidden = constrain(hidden, "batch", "time", "ffn")
        return product("BTF,FD->BTD", hidden, self.down_proj), None
