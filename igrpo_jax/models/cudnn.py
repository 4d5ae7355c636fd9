"""The kernels of cuDNN that `jax.nn.dot_product_attention` does not reach: for pages, and for packed sequences.

JAX binds them for its own functions, under names that are not public. A change of these names or of their arguments
shows here alone.

Legend: F tokens of a packed sequence, M ranges, N heads, K kv heads, H head dim, W rows, R pages of a row, P pages of C
positions.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as kernels

from igrpo_jax.models.segments import Ranges

MaskType = kernels.MaskType


def read_pages(q: jax.Array, pages: jax.Array, k_table: jax.Array, v_table: jax.Array, length: jax.Array) -> jax.Array:
    """Computes the attention of one query of each row to the positions that its pages hold.

    Args:
        q: [W, N, H] bfloat16.
        pages: [P, C, K, H] of keys or of values.
        k_table, v_table: [W, R] int32, the pages of each row, all below P.
        length: [W] int32, positions of each row, at least 1.

    Returns:
        [W, N, H].
    """
    none = jnp.zeros(0, q.dtype)
    tables = (table[:, None, :, None] for table in (k_table, v_table))
    lengths = jnp.ones_like(length), length
    out, *_ = _forward(q[:, None], pages, pages, *lengths, none, none, *tables, mask=MaskType.PADDING, stats=False)
    return out[:, 0]


def runs_on(device: jax.Device) -> bool:
    """Returns whether cuDNN's flash attention runs on a device: on NVIDIA's from Ampere on (compute capability 8.0)."""
    return _capability(device) >= (8, 0)


def takes_ranges(device: jax.Device) -> bool:
    """Returns whether `read_ranges` runs on a device: on NVIDIA's from Hopper on (compute capability 9.0)."""
    return _capability(device) >= (9, 0)


def _capability(device: jax.Device) -> tuple[int, ...]:
    """Returns the compute capability of one of NVIDIA's GPUs, (0,) of another device, such as AMD's "gfx942"."""
    parts = str(getattr(device, "compute_capability", "0")).split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else (0,)


def read_ranges(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Ranges, keys: Ranges, mask: kernels.MaskType
) -> tuple[jax.Array, jax.Array]:
    """Computes the attention of each range of queries to the range of keys of the same number.

    Args:
        q: [1, F, N, H] bfloat16.
        k, v: [1, F, K, H].
        queries, keys: of one packed sequence, [1, M + 1] and [1, M].
        mask: PADDING, or PADDING_CAUSAL where both ranges are the same and a token reads up to itself.

    Returns:
        [1, F, N, H], and the log of each query's sum of exponentials, by range and number within it: [M, N, F] float32.
        What is not of a range is anything, NaN too.
    """
    none = jnp.zeros(0, q.dtype)
    ranges = queries.length, keys.length, queries.start, keys.start
    out, stats = _forward(q, k, v, *ranges, none, none, mask=mask, stats=True)
    return out, stats


def read_ranges_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Ranges,
    keys: Ranges,
    mask: kernels.MaskType,
    stats: jax.Array,
    out: jax.Array,
    out_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v behind `read_ranges`.

    `stats` and `out` may be those of a softmax over more keys than these: the gradients are then this part's share of
    the whole one's, because the probabilities and the term that a softmax subtracts follow from only these two
    (Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2).
    """
    none = jnp.zeros(0, q.dtype)
    ranges = queries.length, keys.length, queries.start, keys.start
    settings = _settings(kernels._dot_product_attention_bwd_impl, q, mask)
    gradients = kernels._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, none, *ranges, none, none, stats, out, out_gradient, **settings
    )
    return tuple(gradients[:3])


def _forward(
    q, k, v, q_length, k_length, q_start, k_start, k_table, v_table, *, mask: kernels.MaskType, stats: bool
) -> list:
    """Runs the kernel of the forward pass."""
    settings = _settings(kernels._dot_product_attention_fwd_impl, q, mask) | {"is_training": stats}
    bias = jnp.zeros(0, q.dtype)
    return kernels._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, bias, q_length, k_length, q_start, k_start, k_table, v_table, **settings
    )


def _settings(implementation: Any, q: jax.Array, mask: kernels.MaskType) -> dict[str, Any]:
    """Returns the arguments by name of a kernel: no dropout, no bias, no window."""
    settings = {
        "scale": q.shape[-1] ** -0.5,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": mask,
        "layout": kernels.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    if "score_mod" in inspect.signature(implementation).parameters:  # since jax 0.12
        settings["score_mod"] = None
    return settings
