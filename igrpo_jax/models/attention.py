"""Grouped-query attention: of decoded tokens over windows, of plain rows, and of packed segments in training.

Attention over packed segments has four implementations; `choose` selects one for a run. `paged` has implementations of
the same names for tokens whose keys lie in pages. Each computes one float32 softmax over all keys that a query reads.

- xla: holds all scores in memory. It is the reference for the others.
- chunked: flash attention in plain JAX, which holds the scores of one pair of blocks.
- cudnn: the flash kernel for NVIDIA GPUs.
- splash: the flash kernel for TPUs.

Legend: B batch, T query, E keys, N heads, K kv heads, G heads per kv head (N = K * G), H head dim; of packed sequences
S shards of the batch, F tokens.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging

from igrpo_jax.distributed.sharding import spec
from igrpo_jax.errors import InputError
from igrpo_jax.models import cudnn, splash, windows
from igrpo_jax.models.blocked import NEVER, Reading, blocked_attention
from igrpo_jax.models.cache import KV
from igrpo_jax.models.segments import KV_AXES, Segments, dense_mask
from igrpo_jax.models.spans import packed_cudnn_attention
from igrpo_jax.models.windows import Window, Windowed


def windowed_attention(q: jax.Array, k: jax.Array, v: jax.Array, entry: Windowed) -> tuple[jax.Array, KV]:
    """Computes the attention of one decoded token of each row to its window, to what the dispatch added, and to itself.

    Args:
        q: [B, 1, N, H].
        k, v: [B, 1, K, H].
        entry: the windows, of which the blocks up to `last` are read, and what the steps before have added.

    Returns:
        [B, 1, N, H] in q's dtype, and `entry.added` with the new keys and values. Scores and softmax are float32 and
        exist in memory: [B, K, G, E].
    """
    added = windows.add(entry.added, k, v, entry.step)
    rows = q.reshape(q.shape[0], k.shape[2], -1, q.shape[3])  # one matmul per row and kv head
    reads = [functools.partial(_read_blocks, entry.window[: last + 1]) for last in range(len(entry.window))]
    operands = rows, added, entry.length, entry.step
    mixed = jax.lax.switch(entry.last, reads, *operands)
    return mixed.reshape(q.shape), added


def _read_blocks(window: Window, q: jax.Array, added: KV, length: jax.Array, step: jax.Array) -> jax.Array:
    """Returns what `q` [B, K, G, H] reads of the blocks of `window`, and of `added`, in its shape and dtype.

    Args:
        length: [B] int32, positions of each row in the window.
        step: [] int32, the last place of `added` that is read.
    """
    blocks = (*window, added)
    score = lambda block: jnp.einsum("BKGH,BKHE->BKGE", q, block.k, preferred_element_type=jnp.float32)
    scores = jnp.concatenate([*map(score, blocks)], axis=-1) * q.shape[3] ** -0.5
    position, before = jnp.arange(scores.shape[3]), scores.shape[3] - added.v.shape[2]
    allowed = jnp.where(position < before, position < length[:, None], position <= before + step)  # [B, E]
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, NEVER), axis=-1).astype(added.v.dtype)
    mixed, start = jnp.zeros(q.shape, jnp.float32), 0
    for block in blocks:
        end = start + block.v.shape[2]
        own = weights[..., start:end]
        mixed += jnp.einsum("BKGE,BKEH->BKGH", own, block.v, preferred_element_type=jnp.float32)
        start = end
    return mixed.astype(q.dtype)


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
        # Each device has one shard, so that this loop runs once; under a vmap over shards trip counts could not differ.
        return jax.lax.map(lambda xs: blocked_attention(xs[0], xs[1], xs[2], _reading(xs[3])), (q, k, v, segments))

    segments = segments._replace(chain=None)
    if jax.sharding.get_abstract_mesh().empty:
        return run(q, k, v, segments)
    rows, keys = spec(("batch", "time", "heads", "head_dim")), spec(KV_AXES)
    # check_vma is off because the trip counts of the loops differ between shards.
    run = jax.shard_map(run, in_specs=(rows, keys, keys, spec(("batch",))), out_specs=rows, check_vma=False)
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
    "splash": splash.packed_splash_attention,
    "splash_interpret": functools.partial(splash.packed_splash_attention, interpret=True),
}

# The most tokens of a packed sequence, where an implementation has such a limit.
MOST_TOKENS = {"splash": splash.MOST_TOKENS, "splash_interpret": splash.MOST_TOKENS}


def check_tokens(attention: str, tokens: int, setting: str) -> None:
    """Raises InputError if `attention` cannot compute a packed sequence of `tokens` tokens, which `setting` asks for.

    Args:
        attention: a key of PACKED.
        setting: the field to lower, with its value.
    """
    most = MOST_TOKENS.get(attention, tokens)
    if tokens > most:
        raise InputError(
            f"{setting}: needs a packed sequence of {tokens:,} tokens, and attention = {attention} takes at most "
            f"{most:,}; lower it, or set config.learner.attention to chunked"
        )


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
        cannot["splash"] = f"is for TPUs, but the mesh has {platform} devices"
    if platform != "gpu":
        cannot["cudnn"] = f"is for GPUs, but the mesh has {platform} devices"
    elif not cudnn.runs_on(mesh.devices.flat[0]):
        cannot["cudnn"] = "needs NVIDIA's GPUs, from Ampere on (compute capability 8.0)"
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
