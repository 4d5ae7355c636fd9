"""The inputs and outputs of the sampler's programs: the state of all slots, and the host's instructions.

Legend: Z shards, B slots of a shard, L lanes of a shard, M tokens of the longest completion, F tokens of a chunk,
W prompts of a chunk or slots of a call, n rows that decode, R pages of a row, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import Cache
from igrpo_jax.models.config import DecoderConfig


class Sampling(NamedTuple):
    """How tokens are drawn; all fields are traced."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0


class State(NamedTuple):
    """Pages, lanes and slots: those of one shard inside `shard_map`, and those of all shards outside."""

    cache: Cache  # the pools of pages of attention, and the Mamba-2 states of the slots
    lanes: Cache  # the Mamba-2 states of the prompts in the lanes
    logits: jax.Array  # [L, V] float32, after the last prefilled token of each lane's prompt
    token: jax.Array  # [B] int32, the last one drawn, not yet in the cache
    length: jax.Array  # [B] int32, tokens of the prompt
    count: jax.Array  # [B] int32, tokens drawn so far, `token` included
    limit: jax.Array  # [B] int32, most tokens to draw
    key: jax.Array  # [B, 2] uint32, key data of the sample
    active: jax.Array  # [B] bool, False once the completion has ended
    entropy: jax.Array  # [B] float32, sum over the tokens drawn so far, in nats
    out: jax.Array  # [B, M] int32
    logprob: jax.Array  # [B, M] float32


class Chunk(NamedTuple):
    """Tokens of prompts, one prompt after another, with what `Ragged` says of them."""

    tokens: np.ndarray  # [Z, F] int32
    length: np.ndarray  # [Z, W] int32, tokens of each prompt up to the end of the chunk
    table: np.ndarray  # [Z, W, R] int32, its pages
    start: np.ndarray  # [Z, W + 1] int32, where the tokens of each prompt begin
    prompts: np.ndarray  # [Z, 1] int32, how many prompts
    lane: np.ndarray  # [Z, W] int32, the lane of each prompt; L = none


class Fork(NamedTuple):
    """Samples of prompts, and the slots that they take."""

    lane: np.ndarray  # [Z, W] int32, of the sample's prompt
    slot: np.ndarray  # [Z, W] int32; B = none
    sample: np.ndarray  # [Z, W] int32, its number within the prompt; derives its key
    prompt: np.ndarray  # [Z, W] int32, Request.index; derives its key
    key: np.ndarray  # [Z, W, 2] uint32, key data of the step and stage
    length: np.ndarray  # [Z, W] int32, tokens of the prompt
    limit: np.ndarray  # [Z, W] int32, most tokens to draw
    source: np.ndarray  # [Z, W] int32, the partly filled last page of the prompt
    target: np.ndarray  # [Z, W] int32, the page that becomes its copy; past the last page = none


class Rows(NamedTuple):
    """The slots that a dispatch decodes."""

    slot: np.ndarray  # [Z, n] int32; B = none. Where n = B: 0 to B - 1
    runs: np.ndarray  # [Z, n] bool, False for a slot without a sample, as after a preemption
    table: np.ndarray  # [Z, n, R] int32, its pages
    min_active: np.ndarray  # [Z] int32, a shard stops when fewer of its rows are active
    stale: np.ndarray  # [Z, n] int32; the first `stale_count` are the rows whose windows lack positions of their pages
    stale_count: np.ndarray  # [Z] int32


class Status(NamedTuple):
    """What the host fetches after a dispatch."""

    active: jax.Array  # [Z B] bool
    count: jax.Array  # [Z B] int32
    steps: jax.Array  # [Z] int32, decode steps that each shard ran


def empty(
    cfg: DecoderConfig,
    *,
    slots: int,
    lanes: int,
    pages: int,
    page_size: int,
    layout: caches.PageLayout,
    max_completion: int,
    dtype: str,
) -> State:
    """Returns a state in which all slots, lanes and pages, counted over all shards, are free."""
    ints = jnp.zeros((slots,), jnp.int32)
    return State(
        cache=caches.empty(cfg, pages, page_size, slots, jnp.dtype(dtype), layout),
        lanes=caches.empty_lanes(cfg, lanes, jnp.dtype(dtype)),
        logits=jnp.zeros((lanes, cfg.vocab_size), jnp.float32),
        token=ints,
        length=ints,
        count=ints,
        limit=ints,
        key=jnp.zeros((slots, 2), jnp.uint32),
        active=jnp.zeros((slots,), bool),
        entropy=jnp.zeros((slots,), jnp.float32),
        out=jnp.zeros((slots, max_completion), jnp.int32),
        logprob=jnp.zeros((slots, max_completion), jnp.float32),
    )
