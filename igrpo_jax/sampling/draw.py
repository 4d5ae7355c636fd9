"""Draws one token a row from logits, with temperature, top-k and top-p, but no random tensor or sort of the vocabulary.

1. top-k and top-p keep the entries at or above a threshold, which bisection on the bits of the float finds (31 passes);
   this runs only when one of them is on. Ties at the threshold are kept.
2. The token is the inverse of the cumulative distribution at one uniform number per row: summed by blocks of the
   vocabulary, then searched inside one block. The log-prob needs these sums too, so that no pass over the vocabulary
   is made for only this token. A Gumbel draw takes twenty times as long on a CPU.

Where the vocabulary is split over the mesh axis `tensor`, each device works on its part of the logits. Two small
exchanges are enough without filters: the sums of all parts, which say in which part the token lies, and then the token.
With filters the devices exchange weights, so that each has some rows of the complete vocabulary to filter.

Legend: B rows, V vocabulary (of one device inside of `_draw_in_parts`), S parts.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from igrpo_jax.models.sums import sums

BLOCK = 128


class Draw(NamedTuple):
    """One token per row, with its log-prob and the entropy of its distribution p = softmax(logits / temperature).

    p is the distribution before top-k and top-p, as the trainer computes it. At temperature 0, p is that of
    temperature 1.
    """

    token: jax.Array  # [B] int32
    logprob: jax.Array  # [B] float32, log p of the token, in nats
    entropy: jax.Array  # [B] float32, Shannon entropy of p, in nats


class _Parts(NamedTuple):
    """What every device knows of all parts of the vocabulary."""

    largest: jax.Array  # [S, B] float32, logit
    total: jax.Array  # [S, B] float32, sum of the weights w = exp((logit - largest) / scale) of the part
    below: jax.Array  # [S, B] float32, sum of w (largest - logit) / scale


def draw(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array, top_k: jax.Array) -> Draw:
    """Draws one token per row.

    Inside `shard_map` over the batch it splits the vocabulary over `tensor` itself, because the compiler would gather
    logits.

    Args:
        logits: [B, V] float32.
        keys: [B, 2] uint32, one threefry key per row.
        temperature, top_p, top_k: [], traced; temperature 0 takes the largest logit, top_p 1 and top_k 0 are off.
    """
    mesh, axis = jax.sharding.get_abstract_mesh(), "tensor"
    if mesh.empty or axis in mesh.manual_axes or mesh.shape[axis] == 1:
        return _draw_in_parts(None, logits, keys, temperature, top_p, top_k)
    each, whole = PartitionSpec(None, axis), PartitionSpec()
    run = jax.shard_map(
        functools.partial(_draw_in_parts, axis),
        in_specs=(each, *[whole] * 4),
        out_specs=whole,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )
    return run(logits, keys, jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k))


def _draw_in_parts(axis: str | None, logits: jax.Array, keys: jax.Array, temperature, top_p, top_k) -> Draw:
    """Computes `draw` from the logits of one device.

    Args:
        axis: axis of the mesh over which the vocabulary is split; None if it is not.
    """
    scale = jnp.where(temperature > 0, temperature, 1.0)
    logits = jax.lax.platform_dependent(logits, cpu=_by_rows, default=lambda logits: logits)
    blocks = _blocks(logits, -jnp.inf)
    # Finite also where all logits of a part are -inf.
    largest = jnp.maximum(logits.max(axis=-1), jnp.finfo(logits.dtype).min)
    weights_of = lambda x: jnp.exp((x - jnp.expand_dims(largest, range(1, x.ndim))) / scale)
    weights = weights_of(blocks)
    # An entry of weight 0 adds 0, also where its logit is -inf.
    below = jnp.where(weights > 0, weights * ((largest[:, None, None] - blocks) / scale), 0.0)
    # Without the barrier, XLA would sum the vocabulary once more for the sum of the blocks.
    of_blocks, below = jax.lax.optimization_barrier(sums(weights, below))  # [B, V / BLOCK]
    parts = _Parts(*_gathered(axis, jnp.stack([largest, of_blocks.sum(axis=-1), below.sum(axis=-1)]), 1))
    top = parts.largest.max(axis=0)
    lower = (top - parts.largest) / scale  # [S, B]
    factor = jnp.exp(-lower)
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.wrap_key_data(key)))(keys)

    # Each branch returns the part that holds the token, and the token's index in it, which is valid only on the device
    # that has this part. Only one branch runs, because XLA's argmax and the threshold search cost more than all else.
    def plain(_, blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
        part, rest = _part_of(uniform, factor * parts.total)
        return part, _inverse_cdf(of_blocks, lambda index: weights_of(_take(blocks, index)), rest)

    def filtered(logits: jax.Array, _) -> tuple[jax.Array, jax.Array]:
        kept = weights_of(logits) * factor[_own(axis)][:, None]
        keep = lambda weights: _keep_top_p(_keep_top_k(weights, top_k), top_p)
        kept = keep(kept) if axis is None else jnp.where(kept >= _least_kept(axis, kept, keep), kept, 0.0)
        part, rest = _part_of(uniform, _gathered(axis, kept.sum(axis=-1), 0))
        blocks = _blocks(kept, 0.0)
        return part, _inverse_cdf(blocks.sum(axis=-1), functools.partial(_take, blocks), rest)

    def greedy(logits: jax.Array, _) -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(parts.largest, axis=0).astype(jnp.int32), jnp.argmax(logits, axis=-1).astype(jnp.int32)

    branch = jnp.where(temperature > 0, ((top_p < 1) | (top_k > 0)).astype(jnp.int32), 2)
    part, place = jax.lax.switch(branch, (plain, filtered, greedy), logits, blocks)
    token, drawn = _from_part(axis, logits, part, place)
    total = (factor * parts.total).sum(axis=0)
    gap = jnp.where(factor * parts.total > 0, factor * (parts.below + parts.total * lower), 0.0).sum(axis=0)
    log_total = jnp.log(total)
    return Draw(token, (drawn - top) / scale - log_total, log_total + gap / total)


def _by_rows(logits: jax.Array) -> jax.Array:
    """Returns `logits` row by row in memory. XLA's CPU compiler would read a transposed product where it lies: for 8
    rows that takes four times as long."""
    return jax.lax.optimization_barrier(with_layout_constraint(logits, Layout((0, 1))))


def _gathered(axis: str | None, x: jax.Array, at: int) -> jax.Array:
    """Returns `x` of every part, with a new axis of parts at `at`."""
    return jnp.expand_dims(x, at) if axis is None else jax.lax.all_gather(x, axis, axis=at)


def _own(axis: str | None) -> jax.Array | int:
    """Returns the number of this device's part."""
    return 0 if axis is None else jax.lax.axis_index(axis)


def _least_kept(axis: str, weights: jax.Array, keep: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the smallest weight of each row that `keep` keeps, [B, 1].

    Each device filters some of the rows over the whole vocabulary, so that the bisection needs no communication.
    """
    rows, parts = len(weights), jax.lax.axis_size(axis)
    padded = jnp.pad(weights, ((0, -rows % parts), (0, 0)))
    kept = keep(jax.lax.all_to_all(padded, axis, split_axis=0, concat_axis=1, tiled=True))
    least = jnp.where(kept > 0, kept, jnp.inf).min(axis=-1, keepdims=True)
    return jax.lax.all_gather(least, axis, tiled=True)[:rows]


def _part_of(uniform: jax.Array, totals: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the part [B] int32 in which a token lies, and a number [B] in [0, 1] that says where in the part.

    Args:
        uniform: [B] in [0, 1).
        totals: [S, B], the weight of each part.
    """
    if len(totals) == 1:
        return jnp.zeros(uniform.shape, jnp.int32), uniform
    ends = jnp.cumsum(totals, axis=0)
    target = uniform * ends[-1]
    part = jnp.minimum(jnp.sum(ends <= target, axis=0), _last((totals > 0).T)[:, 0]).astype(jnp.int32)
    at = lambda x: jnp.take_along_axis(x, part[None], axis=0)[0]
    return part, jnp.clip(1 - (at(ends) - target) / at(totals), 0, 1)


def _from_part(axis: str | None, logits: jax.Array, part: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens [B] int32 and their logits [B], which the devices of their parts know."""
    drawn = jnp.take_along_axis(logits, place[:, None], axis=-1)[:, 0]
    if axis is None:
        return place, drawn
    own = _own(axis)
    # One exchange of float32, which holds tokens up to 2**24.
    both = jnp.stack([(place + own * logits.shape[1]).astype(jnp.float32), drawn])
    token, drawn = jax.lax.psum(jnp.where(part == own, both, 0.0), axis)
    return token.astype(jnp.int32), drawn


def _blocks(x: jax.Array, fill: float) -> jax.Array:
    """Returns `x` [B, V] by blocks of the vocabulary, the last one filled up: [B, V / BLOCK, BLOCK]."""
    rows, size = x.shape
    return jnp.pad(x, ((0, 0), (0, -size % BLOCK)), constant_values=fill).reshape(rows, -1, BLOCK)


def _take(blocks: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one block [B, BLOCK] of each row, by index [B, 1]."""
    return jnp.take_along_axis(blocks, index[..., None], axis=1)[:, 0]


def _inverse_cdf(of_blocks: jax.Array, weights_in: Callable[[jax.Array], jax.Array], uniform: jax.Array) -> jax.Array:
    """Returns an index [B] drawn in proportion to weights, by uniform numbers [B] in [0, 1).

    Args:
        of_blocks: [B, V / BLOCK], the weight of each block.
        weights_in: gives the weights [B, BLOCK] in one block of each row, by index [B, 1].
    """
    edges = jnp.cumsum(of_blocks, axis=-1)
    target = uniform[:, None] * edges[:, -1:]
    # Rounding may leave the target past the last edge, or in a block or entry of weight 0, which must not be picked.
    rises = edges > jnp.pad(edges, ((0, 0), (1, 0)))[:, :-1]
    index = jnp.minimum(jnp.sum(edges <= target, axis=-1, keepdims=True), _last(rises))
    start = jnp.where(index > 0, jnp.take_along_axis(edges, jnp.maximum(index - 1, 0), axis=-1), 0.0)
    inside = weights_in(index)
    offset = jnp.sum(jnp.cumsum(inside, axis=-1) <= target - start, axis=-1, keepdims=True)
    return (index * BLOCK + jnp.minimum(offset, _last(inside > 0)))[:, 0].astype(jnp.int32)


def _last(flags: jax.Array) -> jax.Array:
    """Returns the index of the last true entry of each row, [B, 1]."""
    return flags.shape[1] - 1 - jnp.argmax(flags[:, ::-1], axis=-1, keepdims=True)


def _keep_top_k(weights: jax.Array, top_k: jax.Array) -> jax.Array:
    """Keeps the `top_k` largest entries of each row, and puts 0 elsewhere."""
    enough = lambda keep: jnp.sum(keep, axis=-1) >= top_k
    return jnp.where(top_k > 0, _keep_smallest_set(weights, enough), weights)


def _keep_top_p(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps the largest entries of each row that hold `top_p` of its weight, and puts 0 elsewhere."""
    target = top_p * weights.sum(axis=-1)
    enough = lambda keep: jnp.sum(jnp.where(keep, weights, 0.0), axis=-1) >= target
    return jnp.where(top_p < 1, _keep_smallest_set(weights, enough), weights)


def _keep_smallest_set(weights: jax.Array, enough) -> jax.Array:
    """Keeps the smallest set {w >= threshold} of each row for which `enough(set [B, V]) -> [B]` holds, and puts 0
    elsewhere."""
    order = jax.lax.bitcast_convert_type(weights, jnp.int32)  # non-negative floats have the same order as their bits

    def halve(_, bounds):
        low, high = bounds  # `enough` holds at low and not at high
        middle = low + ((high - low) >> 1)
        ok = enough(order >= middle[:, None])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low = jnp.zeros(weights.shape[:1], jnp.int32)
    high = jnp.full(weights.shape[:1], jnp.iinfo(jnp.int32).max)
    threshold, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jnp.where(order >= threshold[:, None], weights, 0.0)
