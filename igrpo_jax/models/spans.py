"""Attention of packed tokens with cuDNN: of each segment to itself and of completions to their prefix, then merged.

No kernel of cuDNN takes the two ranges that a completion reads, its prefix and itself, as one. So each part has a
softmax of its own, and both are merged by their log-sum-exps. The gradient is written by hand: the kernel for it takes
the merged log-sum-exp and output instead of its own, which makes the gradients of both parts exact.

Legend: F tokens of the packed sequence of one shard, M ranges, N heads, K kv heads, H head dim.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from igrpo_jax.distributed.sharding import spec
from igrpo_jax.models import cudnn
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.cudnn import MaskType
from igrpo_jax.models.segments import Ranges, Segments, Spans, dense_mask


def packed_cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, kernels: ModuleType = cudnn
) -> jax.Array:
    """Computes `attention.packed_xla_attention` with cuDNN's kernels; arguments and result are the same.

    Without spans a mask [S, 1, F, F] says what is read, and no pair of tokens is left out.

    Args:
        kernels: has `read_ranges` and `read_ranges_gradient` of `cudnn`; tests without a GPU bring their own.
    """
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if segments.spans is None:
        # Padding reads itself, because a softmax over nothing would not be finite.
        mask = dense_mask(segments) | jnp.eye(q.shape[1], dtype=bool)
        name = "cudnn" if kernels is cudnn else "xla"
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=name)

    def run(q, k, v, spans):
        # Each device has one shard, so that this loop runs once.
        attend = lambda xs: _attend(kernels, *jax.tree.map(lambda x: x[None], xs))[0]
        return jax.lax.map(attend, (q, k, v, spans))

    if jax.sharding.get_abstract_mesh().empty:
        return run(q, k, v, segments.spans)
    rows, keys = (spec(("batch", "time", name, "head_dim")) for name in ("heads", "kv_heads"))
    # check_vma is off because the results of the kernels do not say over which axes they vary.
    run = jax.shard_map(run, in_specs=(rows, keys, keys, spec(("batch",))), out_specs=rows, check_vma=False)
    return run(q, k, v, segments.spans)


def width(cfg: DecoderConfig, tensor: int) -> int | None:
    """Returns the query features of a sublayer on one device, where attention reads spans; None if it does not."""
    reads = cfg.attention == "cudnn" and cudnn.takes_ranges(jax.devices()[0])
    return cfg.num_heads * cfg.head_dim // tensor if reads else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernels: ModuleType, q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
    """Computes the attention of one shard.

    Args:
        q: [1, F, N, H].
        k, v: [1, F, K, H].
        spans: spans of [1, M] ranges.

    Returns:
        [1, F, N, H], 0 at padding.
    """
    return _attend_forward(kernels, q, k, v, spans)[0]


def _attend_forward(kernels, q, k, v, spans: Spans):
    outs, sums = [], []
    for queries, keys, mask in _parts(spans):
        part, stats = kernels.read_ranges(q, k, v, queries, keys, mask)
        outs.append(part)
        sums.append(_by_token(stats, queries))  # [F, N]
    total = jnp.logaddexp(*sums)
    out = jnp.zeros(q.shape, jnp.float32)
    for part, of_part in zip(outs, sums, strict=True):
        is_read = jnp.isfinite(of_part)[None, ..., None]
        weight = jnp.exp(jnp.where(is_read, (of_part - total)[None, ..., None], 0.0))
        out += jnp.where(is_read, weight * part, 0.0)
    out = out.astype(q.dtype)
    return out, (q, k, v, spans, out, total)


def _attend_backward(kernels, saved, out_gradient):
    q, k, v, spans, out, total = saved
    sums = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    for queries, keys, mask in _parts(spans):
        stats = _by_range(total, queries)
        gradients = kernels.read_ranges_gradient(q, k, v, queries, keys, mask, stats, out, out_gradient)
        for i, (gradient, ranges) in enumerate(zip(gradients, (queries, keys, keys), strict=True)):
            is_inside = _places(ranges, q.shape[1])[2]  # the kernel writes nothing elsewhere
            sums[i] += jnp.where(is_inside[None, :, None, None], gradient, 0)
    return *(x.astype(like.dtype) for x, like in zip(sums, (q, k, v), strict=True)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _parts(spans: Spans) -> tuple[tuple[Ranges, Ranges, cudnn.kernels.MaskType], ...]:
    """Returns the ranges of queries and keys, and the mask, of the two parts: segments alone, and their prefixes."""
    return (
        (spans.segments, spans.segments, MaskType.PADDING_CAUSAL),
        (spans.readers, spans.prefixes, MaskType.PADDING),
    )


def _places(ranges: Ranges, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns for each token: its range, its offset in it, and whether it lies in one; three arrays [F]."""
    start, length = ranges.start[0, :-1], ranges.length[0]
    token = jnp.arange(size, dtype=jnp.int32)
    ends = jnp.where(length < 0, size, start + length)
    number = jnp.minimum(jnp.searchsorted(ends, token, side="right", method="compare_all"), len(length) - 1)
    place = token - start[number]
    return number, place, (place >= 0) & (place < length[number])


def _by_token(stats: jax.Array, ranges: Ranges) -> jax.Array:
    """Returns statistics of ranges [M, N, F] by token, [F, N]: minus infinity where a token has no range."""
    number, place, is_inside = _places(ranges, stats.shape[2])
    return jnp.where(is_inside[:, None], stats[number, :, place], -jnp.inf)


def _by_range(by_token: jax.Array, ranges: Ranges) -> jax.Array:
    """Returns statistics of tokens [F, N] as the kernel has them, [M, N, F]; past the end of a range they are any."""
    size = len(by_token)
    at = jnp.minimum(jnp.maximum(ranges.start[0, :-1, None], 0) + jnp.arange(size), size - 1)
    return jnp.where(jnp.isfinite(by_token), by_token, 0.0)[at].swapaxes(1, 2)
