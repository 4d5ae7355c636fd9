"""Log-probs and entropy of given tokens by a loop over chunks of positions, so that [R, T, V] need not exist.

The logits of a chunk are computed, used and dropped, and computed again in the backward pass, unless they are to be
kept. That pass is written by hand: it keeps the logsumexp, and so needs one exponential and no reduction over the
vocabulary. Chunks past the last position that is asked for are left out: how many are run is known when the loop runs.

Each shard of the batch runs its own loop. The head is gathered once before the loop. Its gradient is summed over the
chunks in float32, and summed over the shards once after the loop. Without `shard_map` the compiler would gather and sum
in every chunk.

Legend: R rows, T positions, C positions of a chunk, X = R x C, S shards of the batch, F tokens of a packed sequence, D
model, V vocab.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from igrpo_jax.distributed import chips, cluster, sharding
from igrpo_jax.distributed.sharding import constrain
from igrpo_jax.models import decoder
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.segments import Segments
from igrpo_jax.models.sums import sums

BATCH = sharding.RULES["batch"]
# How arrays are split over the shards of the batch: [n, X, ...] by rows, [shards, ...] with one partial sum per shard,
# or not at all.
ROWS, PARTS, REPLICATED = PartitionSpec(None, BATCH), PartitionSpec(BATCH), PartitionSpec()

LOGITS_SHARE = 1 / 128  # of a device's memory, for the float32 logits of a chunk
# Most positions of a chunk, so that the last chunk, which may hold a single one, costs little. With fewer, the sum of
# the head's gradient, which is read and written once for each chunk, costs more: by the published peaks as much as the
# products of 300 positions on an H100 and of 170 on a v5p; on a CPU about as much as those of ten.
LONGEST_CHUNK = {"cpu": 256}
OTHER_LONGEST_CHUNK = 1024


def token_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float,
    chunk: int,
    tied: bool = False,
    entropy_gradient: bool = False,
    count: jax.Array | None = None,
    keep_logits: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-prob and entropy of the tempered policy softmax(logits / temperature).

    Args:
        hidden: [R, T, D], the state that predicts each target.
        head: [D, V] float32 master weight, or [V, D] where it is `tied` to the embedding, because a transposed copy
            would be as large as the weight. Its gradient accumulates in float32. A head that LoRA leaves as it is may
            have a narrower dtype.
        targets: [R, T] int32.
        temperature: sampling temperature; 0 (greedy) is read as 1.
        chunk: positions on each shard of the batch whose logits are computed at once, at least one per row.
        tied: whether `head` is the embedding.
        entropy_gradient: whether the entropy is differentiated. False where it is only a metric.
        count: [] int32, the first positions of each row that are wanted; None = all.
        keep_logits: whether the logits, [R, T, V] float32, stay in memory for the backward pass, which then computes
            three products instead of four.

    Returns:
        logprob [R, T] float32, and entropy [R, T] float32 in nats. Chunks after the one that holds the last wanted
        position, `count` - 1, are not computed: there both are 0 and have no gradient.
    """
    rows, time = targets.shape
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else sharding.batch_shards(mesh)
    length = min(max(1, chunk // -(-rows // shards)), time)
    chunks = -(-time // length)
    trips = jnp.int32(chunks) if count is None else (count + length - 1) // length
    pad = lambda x: jnp.pad(x, ((0, 0), (0, chunks * length - time), *[(0, 0)] * (x.ndim - 2)))
    split = lambda x: pad(x).reshape(rows, chunks, length, *x.shape[2:]).swapaxes(0, 1)
    # One axis, because XLA's CPU compiler transposes a copy of the chunk for a product over two axes.
    flat = lambda x: x.reshape(chunks, rows * length, *x.shape[3:])
    results = _chunked(
        flat(split(hidden)),
        head,
        flat(split(targets)),
        trips,
        temperature=temperature or 1.0,
        axes="VD" if tied else "DV",
        entropy_gradient=entropy_gradient,
        keep_logits=keep_logits,
    )
    return tuple(x.reshape(chunks, rows, length).swapaxes(0, 1).reshape(rows, -1)[:, :time] for x in results)


def chunk_positions(asked: int | None, vocab_size: int, mesh: jax.sharding.Mesh) -> int:
    """Returns the positions of a chunk: those that are `asked` for or, for None, as many as LOGITS_SHARE of a device's
    memory holds, so that a larger vocabulary needs no more of it. All processes call it, because process 0 decides."""
    if asked:
        return asked
    device = mesh.devices.flat[0]
    longest = LONGEST_CHUNK.get(device.platform, OTHER_LONGEST_CHUNK)
    usable = cluster.from_first(functools.partial(chips.usable_bytes, device))  # hosts may report different numbers
    held = int(LOGITS_SHARE * usable / (4 * vocab_size / mesh.shape["tensor"]))
    return max(1, min(longest, held))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _chunked(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    trips: jax.Array,
    temperature: float,
    axes: str,
    entropy_gradient: bool,
    keep_logits: bool,
):
    """Returns log-prob and entropy [n, X] float32 of n chunks, of which the first `trips` are computed.

    Args:
        hidden: [n, X, D].
        targets: [n, X] int32.
        trips: [] int32.
        axes: the axes of head, "DV" or "VD".
    """
    return _forward(hidden, head, targets, trips, temperature, axes, entropy_gradient, False)[0]


def _loop(trips: jax.Array, body: Callable, carry, xs):
    """Does what `jax.lax.scan` does for the first `trips` chunks of `xs`; what it returns of the others is 0."""
    chunk = lambda i: jax.tree.map(lambda x: x[i], xs)
    shapes = jax.eval_shape(lambda carry: body(carry, chunk(0))[1], carry)
    count = jax.tree.leaves(xs)[0].shape[0]
    results = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)

    def step(i, state):
        carry, results = state
        carry, result = body(carry, chunk(i))
        return carry, jax.tree.map(lambda every, new: every.at[i].set(new), results, result)

    return jax.lax.fori_loop(0, trips, step, (carry, results))


def _logits(hidden: jax.Array, head: jax.Array, temperature: float, axes: str, order: str) -> jax.Array:
    """Returns the tempered logits, float32 with the axes of `order`, "XV" or "VX", of hidden [X, D]."""
    logits = jnp.einsum(f"XD,{axes}->{order}", hidden, head, preferred_element_type=jnp.float32)
    return constrain(logits / temperature, *("vocab" if axis == "V" else None for axis in order))


def _is_target(logits: jax.Array, targets: jax.Array, vocab_axis: int) -> jax.Array:
    """Returns whether each of `logits` is its position's target; a gather would collect a sharded vocabulary."""
    words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, vocab_axis)
    return words == jnp.expand_dims(targets, vocab_axis)


def _vocab_shards() -> int:
    """Returns the number of devices over which the vocabulary is split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[sharding.RULES["vocab"]]


def _per_shard(run: Callable, in_specs: tuple, out_specs: tuple) -> Callable:
    """Returns a function that runs `run` on every shard of the batch separately."""
    if jax.sharding.get_abstract_mesh().empty:
        return run
    # check_vma is off because it does not distinguish partial sums from values that are equal on all shards.
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, axis_names=set(BATCH), check_vma=False)


def _constrained(head: jax.Array, axes: str, embed: str | None = None) -> jax.Array:
    """Returns a head, or its gradient, with its vocabulary sharded, and with its width sharded by `embed`."""
    return constrain(head, *("vocab" if axis == "V" else embed for axis in axes))


def _forward(hidden, head, targets, trips, temperature, axes, entropy_gradient, keep_logits):
    """Returns (log-prob, entropy), and what the backward pass keeps."""

    def run(head, trips, *xs):
        head = _constrained(head, axes)

        def body(_, xs):
            h, target = xs
            logits = _logits(h, head, temperature, axes, "XV")
            top = jnp.max(logits, axis=-1)
            weight = jnp.exp(logits - top[..., None])
            at_target = jnp.where(_is_target(logits, target, 1), logits, 0.0)
            total, weighted, picked = sums(weight, weight * logits, at_target, shards=_vocab_shards())
            lse = top + jnp.log(total)
            entropy = lse - weighted / total
            return None, (picked - lse, entropy, lse, logits if keep_logits else None)

        return _loop(trips, body, None, xs)[1]

    run = _per_shard(run, (REPLICATED, REPLICATED, ROWS, ROWS), (ROWS,) * 4)
    logprob, entropy, lse, logits = run(head.astype(hidden.dtype), trips, hidden, targets)
    return (logprob, entropy), (hidden, head, targets, trips, lse, entropy, logits)


def _backward(temperature, axes, entropy_gradient, keep_logits, kept, gradients):
    """Returns the gradients of hidden and head, by d log p / d z = [target] - p and d H / d z = -p (log p + H).

    Here z are the tempered logits, p their softmax and H the entropy.
    """
    hidden, head, targets, trips, lse, entropy, logits = kept
    logprob_gradients, entropy_gradients = gradients
    # No sum over the vocabulary needs "XV" here, and XLA's CPU compiler takes 1.4 times as long for XV,XD->VD as for
    # VX,XD->VD. Kept logits stay as they are.
    order = "XV" if keep_logits else "VX"
    vocab_axis = order.index("V")
    along_x = lambda values: jnp.expand_dims(values, vocab_axis)

    def run(head, trips, *xs):
        head = _constrained(head, axes)

        def body(dhead, xs):
            h, target, chunk_lse, gradient, kept, *of_entropy = xs
            logits = _logits(h, head, temperature, axes, order) if kept is None else kept
            logp = logits - along_x(chunk_lse)
            probability = jnp.exp(logp)
            dlogits = jnp.where(_is_target(logits, target, vocab_axis), 1.0, 0.0) - probability
            dlogits = dlogits * along_x(gradient / temperature)
            if entropy_gradient:
                chunk_entropy, entropy_grad = of_entropy
                dlogits -= probability * (logp + along_x(chunk_entropy)) * along_x(entropy_grad / temperature)
            dlogits = dlogits.astype(h.dtype)
            dhead += jnp.einsum(f"{order},XD->{axes}", dlogits, h, preferred_element_type=jnp.float32)
            return _constrained(dhead, axes), jnp.einsum(f"{order},{axes}->XD", dlogits, head)

        dhead, dhidden = _loop(trips, body, _constrained(jnp.zeros(head.shape, jnp.float32), axes), xs)
        return dhead[None], dhidden

    xs = (hidden, targets, lse, logprob_gradients, logits, *([entropy, entropy_gradients] if entropy_gradient else []))
    run = _per_shard(run, (REPLICATED, REPLICATED, *[ROWS] * len(xs)), (PARTS, ROWS))
    dheads, dhidden = run(head.astype(hidden.dtype), trips, *xs)
    return dhidden, _constrained(dheads.sum(axis=0), axes, "embed").astype(head.dtype), None, None


_chunked.defvjp(_forward, _backward)


@functools.partial(jax.named_call, name="packed_logprobs")
def packed_logprobs(
    cfg: DecoderConfig,
    params: decoder.Params,
    tokens: jax.Array,
    targets: jax.Array,
    segments: Segments,
    count: jax.Array,
    *,
    dtype: str,
    temperature: float,
    chunk: int,
    remat: str,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probs and entropies of the completions in packed sequences, where what they share stands once.

    The last token of a context is not part of its prefix. It is the first token of each completion's segment, because
    its state predicts the first token of the completion. So a segment has as many tokens as its completion.

    Args:
        params: float32 master weights, or weights of any dtype, some of them with a LoRA change.
        tokens: [S, F] int32.
        targets: [S, F] int32, the token of a completion that each token predicts; read at the first `count`.
        segments: segments of the tokens.
        count: [] int32, the tokens of completions on the shard with the most of them.
        dtype: dtype of the computation.
        temperature, chunk, entropy_gradient: as for `token_logprobs`.
        remat: what the backward pass computes again: only logits ("logits"), nothing ("none"), or logits and what
            `decoder.apply` says.

    Returns:
        Log-prob and entropy (nats), each [S, F] float32; meaningless at positions that predict no completion token.
    """
    weights = decoder.cast(params, dtype)
    of_sublayers = "none" if remat == "logits" else remat
    hidden, _ = decoder.apply(cfg, weights, tokens, segments.position, segments, remat=of_sublayers)
    head = params["embedding" if cfg.tie_embeddings else "lm_head"]
    return token_logprobs(
        hidden,
        head,
        targets,
        temperature,
        chunk,
        tied=cfg.tie_embeddings,
        entropy_gradient=entropy_gradient,
        count=count,
        keep_logits=remat == "none",
    )
