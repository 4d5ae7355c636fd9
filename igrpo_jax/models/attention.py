"""Attention of grouped queries: over a cache that decodes, and of whole rows in prefill and training.

Of the latter there are four implementations with one signature and one meaning, in IMPLEMENTATIONS; `choose` picks one
for a run. All have one float32 softmax over [prefix | own keys]: of two partial ones merged by their log-sum-exp, cuDNN
would lose part of the gradient and splash has none.

- xla: holds all scores. The reference.
- chunked: flash attention (Dao et al., arXiv 2205.14135) in plain JAX; holds the scores of one pair of chunks.
- cudnn: the flash kernel of NVIDIA GPUs.
- splash: the flash kernel of TPUs.

Legend: B batch, T query, S key, N heads, K kv heads, G heads per kv head (N = K * G), X = G * T, H head dim,
Q prefixes, R rows that continue one prefix (B = Q * R), P prefix positions.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from igrpo_jax.errors import InputError
from igrpo_jax.models.cache import Prefix
from igrpo_jax.models.config import RopeScaling
from igrpo_jax.models.splash import splash_attention

NEVER = float(jnp.finfo(jnp.float32).min)  # score of a key that may not be read; -inf would make NaN of 0 * inf


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Attention of decoded tokens to a cache: a query at position p reads the keys at 0..p.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, S, H]; key s stands at position s.
        positions: [B, T] int32, of the queries.

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
    scores = jnp.where(allowed[:, None, None], scores, NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, kv_heads, groups * time, -1)
    mixed = jnp.einsum("BKXS,BKSH->BKXH", weights, v).reshape(batch, kv_heads, groups, time, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None) -> jax.Array:
    """Attention of whole rows to themselves, and to the prefix that they continue.

    Row b reads all real keys of prefix b // R, and of its own keys those up to the query's. Right padding needs no
    mask: no real query reads past itself. The prefix is not repeated for its R rows.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, T, H].
        prefix: of Q = B / R prefixes, or None.

    Returns:
        [B, T, N, H] in q's dtype. Scores and softmax are float32 (materialised: [B, N, T, P + T]).
    """
    q, k, v = _grouped(q, k, v, prefix)
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
    return _ungrouped(mixed.reshape(q.shape))


def _grouped(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q scaled, as [Q, K, R, G, T, H], and k, v as [Q, K, R, T, H]: what is moved is these, and never the scores."""
    batch, time, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    prefixes = batch if prefix is None else prefix.k.shape[0]
    q = (q * head_dim**-0.5).reshape(prefixes, -1, time, kv_heads, heads // kv_heads, head_dim)
    k, v = (x.reshape(prefixes, -1, kv_heads, time, head_dim).swapaxes(1, 2) for x in (k, v))
    return q.transpose(0, 3, 1, 4, 2, 5), k, v


def _ungrouped(x: jax.Array) -> jax.Array:
    """[Q, K, R, G, T, H] back to [B, T, N, H]."""
    prefixes, kv_heads, rows, groups, time, head_dim = x.shape
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(prefixes * rows, time, kv_heads * groups, head_dim)


# Queries, and keys, of one step. On CPU the scores of 128 x 128 stay in the processor's cache: to differentiate, 256
# takes 1.1 to 2 times as long, 512 1.4 to 5 times, and either more memory.
CHUNK = 128


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None) -> jax.Array:
    """`xla_attention` in steps of CHUNK queries by CHUNK keys, forward and backward; chunks out of sight are skipped.

    Beyond inputs and outputs it holds [B, N, CHUNK, CHUNK] scores, and float32 copies of what it sums.
    """
    time = q.shape[1]
    q, k, v = (_chunks(x, min(CHUNK, time)) for x in _grouped(q, k, v, prefix))
    if prefix is not None:
        prefix = Prefix(*(_chunks(x, min(CHUNK, x.shape[-2])) for x in prefix[:2]), prefix.length)
    mixed = jnp.moveaxis(_flash(q, k, v, prefix), 0, 4)  # [Q, K, R, G, chunks, chunk, H]
    return _ungrouped(mixed.reshape(*mixed.shape[:4], -1, mixed.shape[-1])[..., :time, :])


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """[..., T, H] to [chunks, ..., size, H], zeros at the end."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % size), (0, 0)])
    return jnp.moveaxis(x.reshape(*x.shape[:-2], -1, size, x.shape[-1]), -3, 0)


class _Source(NamedTuple):
    """Keys in chunks, and which chunks of queries read which of them."""

    axes: str  # of a chunk of keys in an einsum, without S and H
    k: jax.Array  # [chunks, Q, K, (R,) S, H]
    v: jax.Array
    pairs: np.ndarray  # [2, pairs] int32: chunks of queries, chunks of keys
    length: jax.Array | None  # [Q] int32, of a prefix; None where the row reads itself

    def scores(self, q: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Of the queries q [Q, K, R, G, T, H], chunk i, for the keys of chunk j: [Q, K, R, G, T, S] float32."""
        scores = jnp.einsum(f"QKRGTH,{self.axes}SH->QKRGTS", q, self.k[j], preferred_element_type=jnp.float32)
        key = j * self.k.shape[-2] + jnp.arange(self.k.shape[-2])
        if self.length is None:
            readable = key <= i * q.shape[-2] + jnp.arange(q.shape[-2])[:, None]
        else:
            readable = (key < self.length[:, None])[:, None, None, None, None]
        return jnp.where(readable, scores, NEVER)


def _sources(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None) -> list[_Source]:
    """The prefix first: where it is empty its weights are nonsense until a readable key wipes them out."""
    chunks = q.shape[0]
    own = _Source("QKR", k, v, np.stack(np.tril_indices(chunks)).astype(np.int32), None)
    if prefix is None:
        return [own]
    pairs = np.indices((chunks, prefix.k.shape[0]), np.int32).reshape(2, -1)
    return [_Source("QK", prefix.k, prefix.v, pairs, prefix.length), own]


def _put(x: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, i, 0)


@jax.custom_vjp
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None) -> jax.Array:
    """q [chunks, Q, K, R, G, T, H], scaled; k, v [chunks, Q, K, R, S, H]; the prefix's [chunks, Q, K, S, H]."""
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
        found = mixed * fade[..., None] + more, new_top, total * fade + weights.sum(-1)
        return tuple(_put(x, new, i) for x, new in zip(carry, found, strict=True)), None

    rows = jnp.zeros(q.shape[:-1], jnp.float32)
    carry = jnp.zeros(q.shape, jnp.float32), rows + NEVER, rows
    for source in _sources(q, k, v, prefix):
        carry, _ = jax.lax.scan(functools.partial(step, source), carry, tuple(source.pairs))
    mixed, top, total = carry
    mixed = (mixed / total[..., None]).astype(q.dtype)
    return mixed, (q, k, v, prefix, mixed, top + jnp.log(total))


def _flash_backward(saved, d_mixed):
    q, k, v, prefix, mixed, log_total = saved
    # Through the softmax: d_scores = weights * (d_weights - sum over keys of weights * d_weights), the latter being
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


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, prefix: Prefix | None, implementation: str = "cudnn"
) -> jax.Array:
    """`xla_attention` by cuDNN's kernel: bfloat16, a head_dim that is a multiple of 8, even lengths with a prefix.

    The prefix is repeated for its rows, and costs a mask [B, 1, T, P + T] in bfloat16.
    """
    time, mask = q.shape[1], None
    if prefix is not None:
        rows = q.shape[0] // prefix.k.shape[0]
        *before, length = (jnp.repeat(x, rows, axis=0) for x in prefix)
        k, v = (jnp.concatenate(pair, axis=2) for pair in zip(before, (k, v), strict=True))
        key = jnp.arange(k.shape[2]) - before[0].shape[2]  # its place among the row's own keys
        own = (key >= 0) & (key <= jnp.arange(time)[:, None])  # [T, S]
        mask = (own | (key - key[0] < length[:, None, None]))[:, None]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=prefix is None, implementation=implementation)


# What DecoderConfig.attention may name; "splash_interpret" is the TPU's kernel, run step by step for tests elsewhere.
IMPLEMENTATIONS = {
    "xla": xla_attention,
    "chunked": chunked_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
    "splash_interpret": functools.partial(splash_attention, interpret=True),
}

# Tokens up to which xla serves where there is no kernel: there chunked is no better. At 1024 + 1024 it takes a third of
# the time and a sixteenth of the memory to differentiate (CPU, 4 rows that share a prefix, 9 heads of 64).
LONGEST_XLA = 256


def choose(requested: str, mesh: jax.sharding.Mesh, dtype: str, head_dim: int, longest: int) -> str:
    """The implementation for a run, a key of IMPLEMENTATIONS; logged.

    Args:
        requested: config.learner.attention; "auto" takes the platform's kernel where there is one.
        dtype: of the computation.
        longest: tokens of the longest prefix and row together.

    Raises:
        InputError: `requested` does not run on the devices of `mesh`, or not with this model.
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
    """Rotary embedding, Hugging Face layout (the two halves of a head rotate together), computed in float32.

    Args:
        x: [B, T, N, H].
        positions: [B, T] int32.
        theta: base of the frequencies.
        scaling: how Llama 3 stretches the slow ones, or None.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = jnp.clip(kept, 0, 1)
        frequency *= kept + (1 - kept) / scaling.factor
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, T, 1, H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
