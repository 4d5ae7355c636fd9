"""Grouped-query attention: of decoded tokens to keys that lie side by side, of rows, and of segments in training.

Of the attention of segments there are four implementations; `choose` selects one for a run. `paged` has those of the
same names for tokens whose keys lie in pages. Each computes one float32 softmax over all that a query reads.

- xla: holds all scores in memory. It is the reference for the others.
- chunked: flash attention in plain JAX, which holds the scores of one pair of blocks.
- cudnn: the flash kernel for NVIDIA GPUs.
- splash: the flash kernel for TPUs.

Legend: B batch, T query, S key, N heads, K kv heads, G heads per kv head (N = K * G), X = G * T, H head dim; of
segments see `segments`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging

from igrpo_jax.distributed.sharding import spec
from igrpo_jax.errors import InputError
from igrpo_jax.models import cache as caches
from igrpo_jax.models.blocked import NEVER, Reading, blocked_attention
from igrpo_jax.models.cache import KV
from igrpo_jax.models.segments import Segments, dense_mask
from igrpo_jax.models.spans import packed_cudnn_attention
from igrpo_jax.models.splash import packed_splash_attention


def cached_attention(q: jax.Array, keys: KV, positions: jax.Array) -> jax.Array:
    """Computes the attention of decoded tokens to a cache: a query at position p reads the keys at positions 0 to p.

    Args:
        q: [B, T, N, H].
        keys: keys and values; number s has position s.
        positions: [B, T] int32, positions of the queries.

    Returns:
        [B, T, N, H] in q's dtype. Scores and softmax are float32 and exist in memory: [B, K, G, T, S].
    """
    batch, time, heads, head_dim = q.shape
    kv_heads, groups = keys.k.shape[1], heads // keys.k.shape[1]
    # One matmul per (row, kv head) with G and T on one axis is 4 times faster on CPU than one einsum over all axes.
    rows = q.reshape(batch, time, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, groups * time, head_dim)
    scores = jnp.einsum("BKXH,BKHS->BKXS", rows, keys.k, preferred_element_type=jnp.float32) * head_dim**-0.5
    allowed = jnp.arange(keys.k.shape[3])[None, None, :] <= positions[:, :, None]  # [B, T, S]
    scores = scores.reshape(batch, kv_heads, groups, time, -1)
    scores = jnp.where(allowed[:, None, None], scores, NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(keys.v.dtype).reshape(batch, kv_heads, groups * time, -1)
    mixed = jnp.einsum("BKXS,BKSH->BKXH", weights, keys.v).reshape(batch, kv_heads, groups, time, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def row_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes the attention of rows to themselves: a query reads the keys of its row up to its own position.

    Right padding needs no mask, because no real query reads past itself. It is the plain way, with all scores in
    memory, for a few short rows such as those that check a model.

    Args:
        q: [B, T, N, H].
        k, v: [B, T, K, H].

    Returns:
        [B, T, N, H] in q's dtype.
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def packed_xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
    """Computes the attention of packed tokens: each reads its own segment up to itself, and the prefix of the segment.

    Args:
        q: [S, F, N, H].
        k, v: [S, K, F, H].

    Returns:
        [S, F, N, H] in q's dtype; at padding it is finite and meaningless. Scores and softmax are float32 and exist in
        memory: [S, N, F, F].
    """
    (shards, size, heads, head_dim), kv_heads = q.shape, k.shape[1]
    q = (q * head_dim**-0.5).reshape(shards, size, kv_heads, -1, head_dim)
    scores = jnp.einsum("SFKGH,SKEH->SKGFE", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(dense_mask(segments)[:, None, None], scores, NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("SKGFE,SKEH->SFKGH", weights, v).reshape(shards, size, heads, head_dim)


def packed_chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
    """Computes `packed_xla_attention` by the pairs of blocks that are read; arguments and result are the same."""

    def run(q, k, v, segments):
        # Each device has one shard, so that this loop runs once; trip counts of several at a time could not differ.
        return jax.lax.map(lambda xs: blocked_attention(xs[0], xs[1], xs[2], _reading(xs[3])), (q, k, v, segments))

    segments = segments._replace(chain=None)
    if jax.sharding.get_abstract_mesh().empty:
        return run(q, k, v, segments)
    rows, cache = spec(("batch", "time", "heads", "head_dim")), spec(caches.AXES)
    # check_vma is off because the trip counts of the loops differ between shards.
    run = jax.shard_map(run, in_specs=(rows, cache, cache, spec(("batch",))), out_specs=rows, check_vma=False)
    return run(q, k, v, segments)


def _reading(segments: Segments) -> Reading:
    """Returns what the tokens of one shard read."""
    return Reading(
        segments.segment, segments.parent, segments.position, segments.segment, segments.position, segments.blocks
    )


# The values of DecoderConfig.attention. "splash_interpret" emulates the TPU's kernel, for tests on other platforms.
PACKED: dict[str, Callable[..., jax.Array]] = {
    "xla": packed_xla_attention,
    "chunked": packed_chunked_attention,
    "cudnn": packed_cudnn_attention,
    "splash": packed_splash_attention,
    "splash_interpret": functools.partial(packed_splash_attention, interpret=True),
}


def choose(requested: str, mesh: jax.sharding.Mesh, dtype: str, head_dim: int) -> str:
    """Returns the implementation for a run, which is a key of PACKED, and logs it.

    Args:
        requested: config.learner.attention; "auto" takes the platform's kernel where there is one.
        dtype: dtype of the computation, such as "bfloat16".
        head_dim: H.

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
        chosen = next((name for name in ("splash", "cudnn") if name not in cannot), "chunked")
    logging.info("attention: %s (config.learner.attention = %s, %s)", chosen, requested, platform)
    return chosen
