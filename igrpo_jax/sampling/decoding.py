"""Decoding: up to K tokens in every running slot, inside one `while_loop` on the device.

Each dispatch lists the slots that it decodes, so that at the end of a rollout a program with few rows can decode the
remaining slots, whatever their numbers. Attention reads pages in place if there is a kernel for that. Otherwise the
pages of each row are copied side by side into a window (`models.windows`) before the loop, and the positions that the
loop adds are written back to the pages after it.

For the letters of shapes see `state`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder
from igrpo_jax.models import windows as window_ops
from igrpo_jax.models.cache import Cache
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.ragged import Paged, Ragged
from igrpo_jax.models.rotary import Positions, with_angles
from igrpo_jax.models.windows import Windows
from igrpo_jax.sampling.draw import draw
from igrpo_jax.sampling.state import Rows, Sampling, State, Status
from igrpo_jax.sampling.steps import BATCH, per_shard, position_keys


class _Carry(NamedTuple):
    """What changes from one decode step to the next."""

    taken: jax.Array  # [] int32, decode steps
    goes_on: jax.Array  # [] bool
    cache: Cache  # the pools, or the keys and values to add to the windows; and the Mamba-2 states of the rows
    token: jax.Array  # [n]
    # [n, 1], of the tokens, with sines and cosines. The previous step computes them, because within a step XLA's CPU
    # compiler would recompute them in each sublayer.
    position: Positions
    count: jax.Array  # [n]
    active: jax.Array  # [n]
    entropy: jax.Array  # [n]
    out: jax.Array  # [B, M], of all slots
    logprob: jax.Array  # [B, M], of all slots


def decode(
    cfg: DecoderConfig,
    mesh: jax.sharding.Mesh,
    eos: jax.Array,
    weights: decoder.Params,
    state: State,
    windows: Windows,
    rows: Rows,
    sampling: Sampling,
    *,
    steps: int,
    reads_pages: bool,
) -> tuple[State, Windows, Status]:
    """Draws up to `steps` tokens in each of `rows`, whose page tables already have room for the new positions.

    A shard stops early when fewer than its `rows.min_active` rows are active; with tensor parallelism all stop
    together, when that holds of each.

    Args:
        windows: the windows of the rows, donated, and returned for the next dispatch. Windows of `stale` rows may have
            any finite content. They are reused because on a CPU the operating system must clear newly allocated
            memory, which takes longer than the copies. All are None where windows live for one dispatch only, or
            where attention reads pages.
        reads_pages: whether attention reads pages in place.
    """
    run = functools.partial(_decode_shard, cfg, mesh, eos, steps=steps, reads_pages=reads_pages)
    run = per_shard(mesh, run, (False, True, True, True, False), (True, True, True))
    return run(weights, state, windows, rows, sampling)


def _decode_shard(
    cfg, mesh, eos, weights, state: State, windows: Windows, rows: Rows, sampling: Sampling, *, steps, reads_pages
) -> tuple[State, Windows, Status]:
    """Computes `decode` of one shard; `rows` have a first axis of length 1."""
    rows = Rows(*(x[0] for x in rows))
    of_rows = lambda x: x.at[rows.slot].get(mode="clip")
    before = of_rows(state.length) - 1 + of_rows(state.count)  # the position of each row's token
    goes_on = _condition(mesh, rows.min_active, steps)
    active = of_rows(state.active) & rows.runs
    cache = state.cache if _is_all(state, rows) else caches.rows_of(state.cache, rows.slot)
    if reads_pages:
        entries = lambda carry: _entries(carry, rows.table)
    else:
        seen = _windows(windows, cache, rows, before)
        cache = window_ops.new_token_buffers(cache, len(before), steps)
        entries = lambda carry: window_ops.entries(seen, carry.cache, before, active, carry.taken)
    start = _Carry(
        taken=jnp.int32(0),
        goes_on=goes_on(jnp.int32(0), active),
        cache=cache,
        token=of_rows(state.token),
        position=with_angles(cfg, before[:, None]),
        count=of_rows(state.count),
        active=active,
        entropy=of_rows(state.entropy),
        out=state.out,
        logprob=state.logprob,
    )
    step = _step(cfg, eos, weights, state, rows, sampling, goes_on, entries)
    end = jax.lax.while_loop(lambda carry: carry.goes_on, step, start)
    if not reads_pages:
        new = before, before + end.count - of_rows(state.count)
        windows = window_ops.extend(seen, end.cache, *new) if any(windows) else windows
        end = end._replace(cache=window_ops.write_back(state.cache, end.cache, rows.table, *new))
    state = _put_back(state, rows, end)
    return state, windows, Status(state.active, state.count, end.taken[None])


def _condition(mesh: jax.sharding.Mesh, min_active: jax.Array, steps: int):
    """Returns the condition of the loop: a function of the steps taken and of the rows that are active."""
    # Without tensor parallelism a shard may stop earlier than another, because its program communicates with nobody.
    # With it, all shards run as many steps as the longest needs.
    agree = mesh.shape["tensor"] > 1

    def goes_on(taken: jax.Array, active: jax.Array) -> jax.Array:
        running = jnp.sum(active)
        more = (taken < steps) & (running >= min_active) & (running > 0)
        return jax.lax.pmax(more.astype(jnp.int32), BATCH) > 0 if agree else more

    return goes_on


def _is_all(state: State, rows: Rows) -> bool:
    """Returns whether the rows are all slots in their order, whose states need no copy."""
    return len(rows.slot) == len(state.token)


def _put_back(state: State, rows: Rows, end: _Carry) -> State:
    """Returns the state with what the loop has made of the rows; the cache of `end` has the pools."""
    put = lambda x, value: x.at[rows.slot].set(value, mode="drop")
    return state._replace(
        cache=end.cache if _is_all(state, rows) else caches.put_rows(state.cache, end.cache, rows.slot),
        token=put(state.token, end.token),
        count=put(state.count, end.count),
        active=put(state.active, end.active),
        entropy=put(state.entropy, end.entropy),
        out=end.out,
        logprob=end.logprob,
    )


def _windows(windows: Windows, cache: Cache, rows: Rows, length: jax.Array) -> Windows:
    """Returns the windows of the rows, from those of the last dispatch where there are any."""
    if any(windows):
        return window_ops.update(windows, cache, rows.table, rows.stale, rows.stale_count, length)
    return window_ops.of_pages(cache, rows.table)


def _step(cfg, eos, weights, state: State, rows: Rows, sampling: Sampling, goes_on, entries):
    """Returns the body of the loop: one token in each active row."""
    slots = len(state.token)
    length, limit, key = (x.at[rows.slot].get(mode="clip") for x in (state.length, state.limit, state.key))

    def step(carry: _Carry) -> _Carry:
        hidden, cache = decoder.apply(cfg, weights, carry.token[:, None], carry.position, entries(carry))
        token, logprob, entropy = draw(
            decoder.logits(cfg, weights, hidden[:, 0]), position_keys(key, carry.count), *sampling
        )
        active = carry.active & ~jnp.isin(token, eos) & (carry.count + 1 < limit)
        slot = jnp.where(carry.active, rows.slot, slots)  # past the last slot: dropped
        count = carry.count + carry.active
        return _Carry(
            taken=carry.taken + 1,
            goes_on=goes_on(carry.taken + 1, active),
            cache=cache,
            token=jnp.where(carry.active, token, carry.token),
            position=with_angles(cfg, (length - 1 + count)[:, None]),
            count=count,
            active=active,
            entropy=carry.entropy + jnp.where(carry.active, entropy, 0.0),
            out=carry.out.at[slot, carry.count].set(token, mode="drop"),
            logprob=carry.logprob.at[slot, carry.count].set(logprob, mode="drop"),
        )

    return step


def _entries(carry: _Carry, table: jax.Array) -> Cache:
    """Returns the cache with the page tables that attention reads; inactive rows write to no page."""
    count = jnp.full((1,), len(table), jnp.int32)
    length = jnp.where(carry.active, carry.position.number[:, 0] + 1, 1)
    largest = jnp.iinfo(jnp.int32).max
    ragged = Ragged(length, jnp.where(carry.active[:, None], table, largest), jnp.arange(len(table) + 1), count)
    return tuple(Paged(entry, ragged) if isinstance(entry, jax.Array) else entry for entry in carry.cache)
