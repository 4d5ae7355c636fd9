"""What runs on the device while completions are sampled, as functions that `programs` compiles for each length.

1. `prefill` reads some prompts and keeps their caches and the logits after their last token.
2. `insert` forks one prefilled prompt to some slots and draws the first token of each.
3. `decode` draws up to K tokens in every active slot inside one `while_loop`.
4. `move` gathers the slots that are still active, so that `decode` need not run the others.
5. `harvest` reads the tokens, log-probs and entropies of finished slots.

Slots are split over the batch axes of the mesh (`data` and `fsdp`). Each shard decodes its own without communication
with the others, under `shard_map`; the compiler splits heads and vocabulary (`tensor`).

The key of a token is fold_in(fold_in(fold_in(stage key, prompt), sample), position in the completion). A sample
therefore does not depend on its slot, its neighbours, or the schedule.

Legend: B slots (of all shards, or of one inside shard_map), M tokens of the longest completion, W prompts or slots in
one call, P positions of a prefill bucket, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from igrpo_jax.distributed import sharding
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder
from igrpo_jax.models.cache import Cache
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.sampling.draw import draw

BATCH = sharding.RULES["batch"]


class Sampling(NamedTuple):
    """How tokens are drawn; all fields are traced."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0


class State(NamedTuple):
    """All slots. The `token` of a slot is the last one drawn, not yet in the cache; it stands at `position`."""

    cache: Cache
    token: jax.Array  # [B] int32
    position: jax.Array  # [B] int32
    count: jax.Array  # [B] int32, tokens drawn so far, `token` included
    limit: jax.Array  # [B] int32, most tokens to draw
    key: jax.Array  # [B, 2] uint32, key data of the sample
    active: jax.Array  # [B] bool
    entropy: jax.Array  # [B] float32, sum over the tokens drawn so far, in nats
    out: jax.Array  # [B, M] int32
    logprob: jax.Array  # [B, M] float32


class PrefilledPrompts(NamedTuple):
    """Prefilled prompts."""

    cache: Cache  # W rows of P positions
    logits: jax.Array  # [W, V] float32, after each prompt's last token
    length: jax.Array  # [W] int32


class Fork(NamedTuple):
    """Samples of one prefilled prompt, and the slots they take."""

    row: np.ndarray  # [] int32, row of the prompt in PrefilledPrompts
    slots: np.ndarray  # [W] int32; a number past the last slot means none
    samples: np.ndarray  # [W] int32
    limits: np.ndarray  # [W] int32, most tokens to draw
    key: np.ndarray  # [2] uint32, key data of the step and stage
    prompt: np.ndarray  # [] int32


class Status(NamedTuple):
    """What the host reads after a dispatch."""

    active: jax.Array  # [B] bool
    count: jax.Array  # [B] int32
    position: jax.Array  # [B] int32
    steps: jax.Array  # [shards] int32, decode steps that each shard ran


def empty(cfg: DecoderConfig, slots: int, length: int, max_completion: int, dtype: str) -> State:
    """Returns `slots` free slots with a cache of `length` positions."""
    ints = jnp.zeros((slots,), jnp.int32)
    return State(
        cache=caches.empty(cfg, slots, length, jnp.dtype(dtype)),
        token=ints,
        position=ints,
        count=ints,
        limit=ints,
        key=jnp.zeros((slots, 2), jnp.uint32),
        active=jnp.zeros((slots,), bool),
        entropy=jnp.zeros((slots,), jnp.float32),
        out=jnp.zeros((slots, max_completion), jnp.int32),
        logprob=jnp.zeros((slots, max_completion), jnp.float32),
    )


def prefill(
    cfg: DecoderConfig, chunk: int, weights: decoder.Params, tokens: jax.Array, lengths: jax.Array
) -> PrefilledPrompts:
    """Reads right-padded prompts, tokens [W, P] of `lengths` [W], at most `chunk` positions at a time.

    P is at most `chunk` or a multiple of it. Beyond the result, only the memory of the attention grows with P.
    """
    width, size = tokens.shape
    if size <= chunk:
        hidden, cache = decoder.apply(cfg, weights, tokens, _positions(0, tokens), length=lengths)
        last = _at(hidden, lengths - 1)
    else:

        def read(i, carry):
            cache, last = carry
            start = i * chunk
            piece = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
            before = caches.shared(cache, jnp.full((width,), start))
            real = jnp.clip(lengths - start, 0, chunk)
            hidden, new = decoder.apply(cfg, weights, piece, _positions(start, piece), before, real)
            end = lengths - 1 - start
            ends_here = (end >= 0) & (end < chunk)
            last = jnp.where(ends_here[:, None], _at(hidden, jnp.clip(end, 0, chunk - 1)), last)
            return caches.extend(cache, new, start), last

        dtype = weights["embedding"].dtype
        carry = caches.empty(cfg, width, size, dtype), jnp.zeros((width, cfg.hidden_size), dtype)
        cache, last = jax.lax.fori_loop(0, (lengths.max() + chunk - 1) // chunk, read, carry)
    return PrefilledPrompts(cache, decoder.logits(cfg, weights, last), lengths)


def _positions(start: jax.Array | int, tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)


def _at(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """Returns hidden [W, T, D] at one position of each row: [W, D]."""
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def insert(
    mesh: jax.sharding.Mesh, eos: jax.Array, state: State, prompts: PrefilledPrompts, fork: Fork, sampling: Sampling
) -> State:
    """Forks one of the prefilled prompts to slots and draws their first tokens."""
    prompt = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, fork.row, 1), prompts)
    width = fork.slots.shape[0]
    base = jax.random.fold_in(jax.random.wrap_key_data(fork.key), fork.prompt)
    keys = jax.vmap(lambda sample: jax.random.key_data(jax.random.fold_in(base, sample)))(fork.samples)
    first = jnp.zeros((width,), jnp.int32)
    logits = jnp.broadcast_to(prompt.logits, (width, prompt.logits.shape[-1]))
    token, logprob, entropy = draw(logits, _position_keys(keys, first), *sampling)
    active = ~jnp.isin(token, eos) & (fork.limits > 1)
    length = jnp.broadcast_to(prompt.length, (width,))
    rows = (token, length, first + 1, fork.limits, keys, active, entropy, token, logprob)

    def put(state: State, slots, cache, rows) -> State:
        # The caller counts slots over all shards; those of this shard are 0..B-1 here, and B means none.
        here = slots - jax.lax.axis_index(BATCH) * state.token.shape[0]
        here = jnp.where((here >= 0) & (here < state.token.shape[0]), here, state.token.shape[0])
        *vectors, out, logprob = state[1:]
        *new, token, first_logprob = rows
        return State(
            caches.insert(state.cache, caches.fork(cache, width), here),
            *(x.at[here].set(value, mode="drop") for x, value in zip(vectors, new, strict=True)),
            out.at[here, 0].set(token, mode="drop"),
            logprob.at[here, 0].set(first_logprob, mode="drop"),
        )

    return _per_shard(mesh, put, (True, False, False, False), True)(state, fork.slots, prompt.cache, rows)


def decode(
    cfg: DecoderConfig,
    mesh: jax.sharding.Mesh,
    eos: jax.Array,
    weights: decoder.Params,
    state: State,
    min_active: jax.Array,
    sampling: Sampling,
    *,
    rows: int,
    read: int,
    steps: int,
) -> tuple[State, Status]:
    """Draws up to `steps` tokens in each of the first `rows` slots of every shard.

    A shard stops early when fewer than its `min_active` [shards] of them are active. `read` positions of the cache are
    attended to: at least the largest position + `steps`, or all there are.
    """
    # Without tensor parallelism a shard may stop earlier than another, because its program communicates with nobody.
    # With it, all shards run as many steps as the longest needs.
    agree = mesh.shape["tensor"] > 1

    def run(weights, state: State, min_active, sampling) -> tuple[State, Status]:
        index, longest = jnp.arange(rows), state.out.shape[1]

        def goes_on(taken, active):
            running = jnp.sum(active)
            more = (taken < steps) & (running >= min_active[0]) & (running > 0)
            return jax.lax.pmax(more.astype(jnp.int32), BATCH) > 0 if agree else more

        def step(carry):
            taken, _, s = carry
            hidden, cache = decoder.apply(cfg, weights, s.token[:, None], s.position[:, None], s.cache)
            logits = decoder.logits(cfg, weights, hidden[:, 0])
            token, logprob, entropy = draw(logits, _position_keys(s.key, s.count), *sampling)
            at = jnp.where(s.active, s.count, longest)  # past the end: dropped
            more = s.active.astype(jnp.int32)
            active = s.active & ~jnp.isin(token, eos) & (s.count + 1 < s.limit)
            s = s._replace(
                cache=cache,
                token=jnp.where(s.active, token, s.token),
                position=s.position + more,
                count=s.count + more,
                active=active,
                entropy=s.entropy + jnp.where(s.active, entropy, 0.0),
                out=s.out.at[index, at].set(token, mode="drop"),
                logprob=s.logprob.at[index, at].set(logprob, mode="drop"),
            )
            return taken + 1, goes_on(taken + 1, active), s

        part = State(caches.window(state.cache, rows, read), *(x[:rows] for x in state[1:]))
        taken, _, part = jax.lax.while_loop(
            lambda carry: carry[1], step, (jnp.int32(0), goes_on(jnp.int32(0), part.active), part)
        )
        small = (old.at[:rows].set(new) for old, new in zip(state[1:], part[1:], strict=True))
        state = State(caches.restore(state.cache, part.cache, state.position[:rows], steps), *small)
        return state, Status(state.active, state.count, state.position, taken[None])

    run = _per_shard(mesh, run, (False, True, True, False), (True, True))
    return run(weights, state, min_active, sampling)


def move(mesh: jax.sharding.Mesh, state: State, source: jax.Array, target: jax.Array) -> State:
    """Copies slots to others of the same shard; source and target are [shards, W] int32, a target of B means none."""

    def run(state: State, source, target) -> State:
        source, target = source[0], target[0]
        small = (x.at[target].set(x[source], mode="drop") for x in state[1:])
        moved = State(caches.move(state.cache, source, target), *small)
        # Otherwise what was moved would go on in both slots.
        left = jnp.where(target < state.active.shape[0], source, state.active.shape[0])
        return moved._replace(active=moved.active.at[left].set(False, mode="drop"))

    return _per_shard(mesh, run, (True, True, True), True)(state, source, target)


def harvest(state: State, slots: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns tokens and log-probs [W, M] and the sum of the entropies [W] of some slots."""
    return state.out[slots], state.logprob[slots], state.entropy[slots]


def _per_shard(mesh: jax.sharding.Mesh, run, split_in: tuple[bool, ...], split_out):
    """Returns `run` for every shard of the batch by itself; arguments are split by their first dimension, or whole."""
    spec = lambda split: PartitionSpec(BATCH) if split else PartitionSpec()
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(map(spec, split_in)),
        out_specs=jax.tree.map(spec, split_out),
        axis_names=set(BATCH),
        check_vma=False,
    )


def _position_keys(keys: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the key data [B, 2] of the next token: fold_in(sample key, position in the completion)."""
    fold = lambda key, n: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), n))
    return jax.vmap(fold)(keys, counts)
