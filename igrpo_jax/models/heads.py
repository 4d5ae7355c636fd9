"""More heads than a model has, so that its attention can be split over more devices than it has key and value heads.

The sampler may split heads over a mesh axis `tensor` that does not divide K. Then each key and value head is copied R
times, and the G query heads that read it are dealt to the copies. Where R does not divide G, query heads of zeros fill
up the last copy; the output projection reads nothing from these. The result is that of the model itself: nothing is
approximated.

Where every copy lies on its own device, and the TPU's kernel reads pages, the devices with copies of one head
split the sequences instead of holding each of them R times: the keys of a sequence lie on only one of them, in one of
R parts, and this one attends for the query heads of all R (`paged`). That takes two exchanges per sublayer.

Legend: D model, N query heads, K key and value heads, G query heads of each (N = K G), R copies, H head dim.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp

from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.paged import page_layout

QUERIES = {"q_proj": 1, "q_bias": 0, "o_proj": 0}  # the axis of the query heads, by the name of the parameter
KEYS = {"k_proj": 1, "v_proj": 1, "k_bias": 0, "v_bias": 0}  # the axis of the key and value heads


def copies(cfg: DecoderConfig, tensor: int) -> int:
    """Returns how often each key and value head is copied so that `tensor` divides their number."""
    return tensor // math.gcd(cfg.num_kv_heads, tensor) if "*" in cfg.pattern else 1


def spread_config(cfg: DecoderConfig, tensor: int) -> DecoderConfig:
    """Returns the shape of the model after `spread`, and into how many parts its attention splits sequences."""
    times = copies(cfg, tensor)
    kv_heads = cfg.num_kv_heads * times
    of_copy = -(-cfg.num_heads // kv_heads)
    # The states of Mamba-2 are not split by sequences, and other kernels read chunks of one sequence that continues.
    in_place = cfg.attention.startswith("splash") and page_layout(cfg.attention, cfg.head_dim, 1) is not None
    parts = times if kv_heads == tensor and in_place and "M" not in cfg.pattern else 1
    return replace(cfg, num_heads=kv_heads * of_copy, num_kv_heads=kv_heads, row_parts=parts)


def spread(cfg: DecoderConfig, tensor: int, path: str, weight: jax.Array) -> jax.Array:
    """Returns the parameter at `path` with the heads of `spread_config`; all but those of attention are unchanged."""
    times, (_, _, name) = copies(cfg, tensor), path.rpartition("/")
    if times == 1 or not _is_attention(cfg, path):
        return weight
    if name in KEYS:
        return jnp.repeat(weight, times, axis=KEYS[name])
    return _dealt(weight, cfg.num_kv_heads, times, QUERIES[name]) if name in QUERIES else weight


def _is_attention(cfg: DecoderConfig, path: str) -> bool:
    """Returns whether `path` is a parameter of attention; Mamba-2 has an o_proj too."""
    top, *rest = path.split("/")
    return top == "blocks" and cfg.pattern[int(rest[0])] == "*"


def _dealt(weight: jax.Array, kv_heads: int, times: int, axis: int) -> jax.Array:
    """Returns `weight` with the query heads of each key head dealt to its copies, and zeros where none are left."""
    before, heads, after = weight.shape[:axis], weight.shape[axis], weight.shape[axis + 1 :]
    group = heads // kv_heads
    padding = [(0, 0)] * weight.ndim + [(0, 0)]
    padding[axis + 1] = (0, -group % times)
    padded = jnp.pad(weight.reshape(*before, kv_heads, group, *after), padding)
    return padded.reshape(*before, -1, *after)
