"""Grouped-query attention: of decoded tokens to a cache, and of whole rows in prefill and training.

For whole rows there are four implementations with the same arguments and the same result, in IMPLEMENTATIONS; `choose`
selects one for a run. Each computes one float32 softmax over [prefix | own keys]. Two partial softmaxes that are merged
by their log-sum-exp would not do: cuDNN would lose a part of the gradient, and splash has no gradient for them.

- xla: holds all scores in memory. It is the reference for the others.
- chunked: flash attention in plain JAX, which holds the scores of one pair of chunks.
- cudnn: the flash kernel for NVIDIA GPUs.
- splash: the flash kernel for TPUs.

Legend: B batch, T query, S key, N heads, K kv heads, G heads per kv head (N = K * G), X = G * T, H head dim,
Q prefixes, R rows that continue one prefix (B = Q * R), P prefix positions.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging

from igrpo_jax.errors import InputError
from igrpo_jax.models.cache import Prefix
from igrpo_jax.models.chunked import NEVER, chunked_attention, grouped, ungrouped
from igrpo_jax.models.config import RopeScaling
from igrpo_jax.models.splash import splash_attention


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Computes the attention of decoded tokens to a cache: a query at position p reads the keys at positions 0 to p.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, S, H]; key s has position s.
        positions: [B, T] int32, positions of the queries.

    Returns:
        [B, T, N, H] in q's dtype. Scores and softmax are float32 and exist in memory: [B, K, G, T, S].
    """
    batch, time, heads, head_dim = q.shape
    kv_heads, groups = k.shape[1], heads // k.shape[1]
    # One matmul per (row, kv head) with G and T on one axis is 4 times faster on CPU than a BTKGH,BKSH->BKGTS einsum.
    rows = q.reshape(batch, time, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, groups * time, head_dim)
    scores = jnp.einsum("BKXH,BKSH->BKXS", rows, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    allowed = jnp.arange(k.shape[2])[None, None, :] <= positions[:, :, None]  # [B, T, S]
    scores = scores.reshape(batch, kv_heads, groups, time, -1)
    scores = jnp.where(allowed[:, None, None], scores, NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, kv_heads, groups * time, -1)
    mixed = jnp.einsum("BKXS,BKSH->BKXH", weights, v).reshape(batch, kv_heads, groups, time, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None) -> jax.Array:
    """Computes the attention of whole rows to themselves and to the prefix that they continue.

    A query of row b reads all real keys of prefix b // R, and the row's own keys up to its own position. Right padding
    needs no mask, because no real query reads past itself. The prefix is not repeated for its R rows.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, T, H].
        prefix: the keys and values of Q = B / R prefixes, or None.

    Returns:
        [B, T, N, H] in q's dtype. Scores and softmax are float32 and exist in memory: [B, N, T, P + T].
    """
    q, k, v = grouped(q, k, v, prefix)
    prefixes, kv_heads, rows, groups, time, head_dim = q.shape
    flat = q.reshape(prefixes, kv_heads, rows, groups * time, head_dim)
    scores = jnp.einsum("QKRXH,QKRSH->QKRXS", flat, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(prefixes, kv_heads, rows, groups, time, time)
    scores = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, NEVER)
    if prefix is not None:
        before = jnp.einsum("QKRXH,QKPH->QKRXP", flat, prefix.k, preferred_element_type=jnp.float32)
        real = jnp.arange(before.shape[-1]) < prefix.length[:, None]  # [Q, P]
        before = jnp.where(real[:, None, None, None], before, NEVER).reshape(*scores.shape[:-1], -1)
        scores = jnp.concatenate([before, scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(prefixes, kv_heads, rows, groups * time, -1)
    mixed = jnp.einsum("QKRXS,QKRSH->QKRXH", weights[..., -time:], v)
    if prefix is not None:
        mixed += jnp.einsum("QKRXP,QKPH->QKRXH", weights[..., :-time], prefix.v)
    return ungrouped(mixed.reshape(q.shape))


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None, implementation: str = "cudnn"
) -> jax.Array:
    """Computes `xla_attention` with cuDNN's kernel, whose arguments and result are the same.

    The kernel needs bfloat16, a head_dim that is a multiple of 8, and even lengths where there is a prefix. The prefix
    is repeated for its rows, and needs a mask [B, 1, T, P + T] in bfloat16.

    Args:
        implementation: of `jax.nn.dot_product_attention`; tests without a GPU take "xla".
    """
    time, mask = q.shape[1], None
    if prefix is not None:
        rows = q.shape[0] // prefix.k.shape[0]
        *before, length = (jnp.repeat(x, rows, axis=0) for x in prefix)
        k, v = (jnp.concatenate(pair, axis=2) for pair in zip(before, (k, v), strict=True))
        key = (
            jnp.arange(k.shape[2]) - before[0].shape[2]
        )  # its position among the row's own keys, negative in the prefix
        own = (key >= 0) & (key <= jnp.arange(time)[:, None])  # [T, S]
        mask = (own | (key - key[0] < length[:, None, None]))[:, None]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=prefix is None, implementation=implementation)


# The values of DecoderConfig.attention. "splash_interpret" emulates the TPU's kernel, for tests on other platforms.
IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": xla_attention,
    "chunked": chunked_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
    "splash_interpret": functools.partial(splash_attention, interpret=True),
}

# Up to this many tokens xla is chosen where there is no kernel, because chunked is no better there. At 1024 + 1024
# tokens chunked needs a third of the time and a sixteenth of the memory of xla to differentiate (on CPU, for 4 rows
# that share a prefix and 9 heads of 64).
LONGEST_XLA = 256


def choose(requested: str, mesh: jax.sharding.Mesh, dtype: str, head_dim: int, longest: int) -> str:
    """Returns the implementation for a run, which is a key of IMPLEMENTATIONS, and logs it.

    Args:
        requested: config.learner.attention; "auto" takes the platform's kernel where there is one.
        dtype: dtype of the computation, such as "bfloat16".
        head_dim: H.
        longest: tokens of the longest prefix and the longest row together.

    Raises:
        InputError: `requested` does not run on the devices of `mesh`, or does not run with this model.
    """
    platform = mesh.devices.flat[0].platform
    cannot = {}
    if platform != "tpu":
        cannot["splash"] = f"is for TPUs, the mesh is of {platform} devices"
    if platform != "gpu":
        cannot["cudnn"] = f"is for GPUs, the mesh is of {platform} devices"
    elif dtype != "bfloat16":
        cannot["cudnn"] = f"needs config.model.dtype = bfloat16, which is {dtype}"
    elif head_dim % 8 or head_dim > 128:
        cannot["cudnn"] = f"needs a head_dim that is a multiple of 8 up to 128, the model's is {head_dim}"
    if requested in cannot:
        raise InputError(f"config.learner.attention = {requested}: {cannot[requested]}; set it to auto")
    chosen = requested
    if requested == "auto":
        fallback = "xla" if longest <= LONGEST_XLA else "chunked"
        chosen = next((name for name in ("splash", "cudnn") if name not in cannot), fallback)
    logging.info("attention: %s (config.learner.attention = %s, %s, %d tokens)", chosen, requested, platform, longest)
    return chosen


def rope(x: jax.Array, positions: jax.Array, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Applies the rotary position embedding (Su et al., arXiv 2104.09864), computed in float32.

    The layout is that of Hugging Face: dimension i of the first half of a head rotates with dimension i of the second.

    Args:
        x: [B, T, N, H].
        positions: [B, T] int32.
        theta: base of the frequencies.
        scaling: how Llama 3 stretches the low frequencies, or None.

    Returns:
        [B, T, N, H] in x's dtype.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        unscaled = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        unscaled = jnp.clip(unscaled, 0, 1)  # 1 where the frequency stays as it is, 0 where it is divided by the factor
        frequency *= unscaled + (1 - unscaled) / scaling.factor
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, T, 1, H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
