"""Log-probs and entropy of given tokens by a scan over chunks of positions, so that [R, T, V] never exists.

The logits of a chunk are computed, used and dropped, and computed again in the backward pass. That pass is written by
hand: it keeps the logsumexp, and so needs one exponential and no reduction over the vocabulary.

Each shard of the batch runs its own loop. The head is gathered once before the loop. Its gradient is summed over the
chunks in float32, and summed over the shards once after the loop. Without `shard_map` the compiler would gather and sum
in every chunk.

Legend: R rows, T completion positions, C positions of a chunk, D model, V vocab.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.sharding import constrain
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder
from igrpo_jax.models.config import DecoderConfig

BATCH = sharding.RULES["batch"]
# How arrays are split over the shards of the batch: [n, R, ...] by rows, [shards, ...] with one partial sum per shard,
# or not at all.
ROWS, PARTS, REPLICATED = PartitionSpec(None, BATCH), PartitionSpec(BATCH), PartitionSpec()

LOGITS_BYTES = 128 << 20  # bytes of a chunk's float32 logits on one device, where no other size is asked for


def token_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float,
    chunk: int | None = None,
    tied: bool = False,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-prob and entropy of the tempered policy softmax(logits / temperature).

    Args:
        hidden: [R, T, D], the state that predicts each target.
        head: [D, V] float32 master weight, or [V, D] where it is `tied` to the embedding, because a transposed copy
            would be as large as the weight. Its gradient accumulates in float32. A head that LoRA leaves as it is may
            have a narrower dtype.
        targets: [R, T] int32.
        temperature: sampling temperature; 0 (greedy) is read as 1.
        chunk: positions on each shard of the batch whose logits exist at once, at least one per row; None = as many as
            LOGITS_BYTES hold, so that a larger vocabulary needs no more memory.
        tied: whether `head` is the embedding.
        entropy_gradient: whether the entropy is differentiated. False where it is only a metric.

    Returns:
        logprob [R, T] float32, and entropy [R, T] float32 in nats.
    """
    rows, time = targets.shape
    mesh = jax.sharding.get_abstract_mesh()
    shards, parts = (1, 1) if mesh.empty else (sharding.batch_shards(mesh), mesh.shape["tensor"])
    if chunk is None:
        chunk = LOGITS_BYTES // (4 * head.shape[0 if tied else 1] // parts)
    # All chunks have about the same size, because padding at the end would cost as much as real positions.
    per_row = max(1, chunk // -(-rows // shards))
    chunks = -(-time // per_row)
    length = -(-time // chunks)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, chunks * length - time), *[(0, 0)] * (x.ndim - 2)))
    split = lambda x: pad(x).reshape(rows, chunks, length, *x.shape[2:]).swapaxes(0, 1)
    axes = "VD" if tied else "DV"
    results = _chunked(split(hidden), head, split(targets), temperature or 1.0, axes, entropy_gradient)
    return tuple(x.swapaxes(0, 1).reshape(rows, -1)[:, :time] for x in results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _chunked(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float, axes: str, entropy_gradient: bool
):
    """Returns log-prob and entropy [n, R, C] float32 of n chunks.

    Args:
        hidden: [n, R, C, D].
        targets: [n, R, C] int32.
        axes: the axes of head, "DV" or "VD".
    """
    return _forward(hidden, head, targets, temperature, axes, entropy_gradient)[0]


def _logits(hidden: jax.Array, head: jax.Array, temperature: float, axes: str) -> jax.Array:
    """Returns the tempered logits [R, C, V] float32 of hidden [R, C, D]."""
    logits = jnp.einsum(f"RCD,{axes}->RCV", hidden, head, preferred_element_type=jnp.float32)
    return constrain(logits / temperature, "batch", "time", "vocab")


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns [R, C, V] bool. A gather of the targets' logits would collect a sharded vocabulary on every device."""
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def _per_shard(run: Callable, in_specs: tuple, out_specs: tuple) -> Callable:
    """Returns a function that runs `run` on every shard of the batch separately."""
    if jax.sharding.get_abstract_mesh().empty:
        return run
    # check_vma is off because it does not distinguish partial sums from values that are equal on all shards.
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, axis_names=set(BATCH), check_vma=False)


def _constrained(head: jax.Array, axes: str, embed: str | None = None) -> jax.Array:
    """Returns a head, or its gradient, with its vocabulary sharded, and with its width sharded by `embed`."""
    return constrain(head, *("vocab" if axis == "V" else embed for axis in axes))


def _forward(hidden, head, targets, temperature, axes, entropy_gradient):
    """Returns (log-prob, entropy), and what the backward pass keeps."""

    def run(head, *xs):
        head = _constrained(head, axes)

        def body(_, xs):
            h, target = xs
            logits = _logits(h, head, temperature, axes)
            top = jnp.max(logits, axis=-1)
            weight = jnp.exp(logits - top[..., None])
            total = jnp.sum(weight, axis=-1)
            lse = top + jnp.log(total)
            entropy = lse - jnp.sum(weight * logits, axis=-1) / total
            picked = jnp.sum(jnp.where(_is_target(logits, target), logits, 0.0), axis=-1)
            return None, (picked - lse, entropy, lse)

        return jax.lax.scan(body, None, xs)[1]

    run = _per_shard(run, (REPLICATED, ROWS, ROWS), (ROWS,) * 3)
    logprob, entropy, lse = run(head.astype(hidden.dtype), hidden, targets)
    return (logprob, entropy), (hidden, head, targets, lse, entropy)


def _backward(temperature, axes, entropy_gradient, kept, gradients):
    """Returns the gradients of hidden and head, by d log p / d z = [target] - p and d H / d z = -p (log p + H).

    Here z are the tempered logits, p their softmax and H the entropy.
    """
    hidden, head, targets, lse, entropy = kept
    logprob_gradients, entropy_gradients = gradients

    def run(head, *xs):
        head = _constrained(head, axes)

        def body(total, xs):
            h, target, norm, gradient, *of_entropy = xs
            logits = _logits(h, head, temperature, axes)
            logp = logits - norm[..., None]
            probability = jnp.exp(logp)
            inner = jnp.where(_is_target(logits, target), 1.0, 0.0) - probability
            inner = inner * (gradient / temperature)[..., None]
            if entropy_gradient:
                nats, slope = of_entropy
                inner -= probability * (logp + nats[..., None]) * (slope / temperature)[..., None]
            inner = inner.astype(h.dtype)
            # Rows and positions become one axis, because XLA's CPU compiler transposes a copy of the chunk for a
            # product over two axes.
            flat = inner.reshape(-1, inner.shape[-1])
            total += jnp.einsum(f"XD,XV->{axes}", h.reshape(-1, h.shape[-1]), flat, preferred_element_type=jnp.float32)
            return _constrained(total, axes), jnp.einsum(f"RCV,{axes}->RCD", inner, head)

        total, inner = jax.lax.scan(body, _constrained(jnp.zeros(head.shape, jnp.float32), axes), xs)
        return total[None], inner

    xs = (hidden, targets, lse, logprob_gradients, *([entropy, entropy_gradients] if entropy_gradient else []))
    run = _per_shard(run, (REPLICATED, *[ROWS] * len(xs)), (PARTS, ROWS))
    totals, inner = run(head.astype(hidden.dtype), *xs)
    return inner, _constrained(totals.sum(axis=0), axes, "embed").astype(head.dtype), None


_chunked.defvjp(_forward, _backward)


@functools.partial(jax.named_call, name="completion_logprobs")
def completion_logprobs(
    cfg: DecoderConfig,
    params: decoder.Params,
    prefix: jax.Array,
    prefix_length: jax.Array,
    last: jax.Array,
    completions: jax.Array,
    *,
    dtype: str,
    temperature: float,
    chunk: int | None,
    remat: str,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probs and entropies of completions. The prefix that the G completions of a context share runs once.

    The last token of a context is not part of the prefix. It is the first token of each completion's row, because its
    state predicts the first token of the completion. So a row has as many positions as its completion, and only the
    cache of the prefix is needed: keys and values, and the states of Mamba-2 after its last token.

    Args:
        params: float32 master weights, or weights of any dtype of which some have a LoRA change.
        prefix: [Q, P] int32, each context without its last token, padded on the right.
        prefix_length: [Q] int32, real tokens of each prefix; may be 0.
        last: [Q] int32, the last token of each context.
        completions: [Q, G, T] int32, padded on the right.
        dtype: dtype of the computation.
        temperature, chunk, entropy_gradient: as for `token_logprobs`.
        remat: as for `decoder.apply`.

    Returns:
        Log-prob and entropy (nats), each [Q, G, T] float32. Past the end of a completion they are meaningless.
    """
    shape = completions.shape
    weights = decoder.cast(params, dtype)
    positions = jnp.broadcast_to(jnp.arange(prefix.shape[1]), prefix.shape)
    _, cache = decoder.apply(cfg, weights, prefix, positions, length=prefix_length, remat=remat)
    firsts = jnp.broadcast_to(last[:, None, None], (*shape[:2], 1))
    tokens = jnp.concatenate([firsts, completions[..., :-1]], axis=-1)
    positions = jnp.broadcast_to(prefix_length[:, None, None] + jnp.arange(shape[2]), shape)
    rows = lambda x: x.reshape(-1, shape[2])
    cache = caches.shared(cache, prefix_length)
    hidden, _ = decoder.apply(cfg, weights, rows(tokens), rows(positions), cache, remat=remat)
    head = params["embedding" if cfg.tie_embeddings else "lm_head"]
    logprob, entropy = token_logprobs(
        hidden, head, rows(completions), temperature, chunk, cfg.tie_embeddings, entropy_gradient
    )
    return logprob.reshape(shape), entropy.reshape(shape)
