"""Log-probs and entropy of given tokens without ever holding [R, T, V]: a scan over chunks of completion positions.

Each chunk's logits are computed, used and dropped, and computed again in the backward pass (`jax.checkpoint`).

Legend: R rows, T completion positions, D model, V vocab.
"""

import functools

import jax
import jax.numpy as jnp

from igrpo_jax.models import decoder
from igrpo_jax.models.config import ModelConfig
from igrpo_jax.sharding import constrain


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Log-prob and entropy of the tempered policy softmax(logits / temperature).

    Args:
        hidden: [R, T, D], the state that predicts each target.
        head: [D, V] float32 master weight; cast inside the scan, so that its gradient accumulates in float32.
        targets: [R, T] int32.
        temperature: of sampling; 0 (greedy) is read as 1.
        chunk: positions per row whose logits exist at once.

    Returns:
        logprob [R, T] float32, and entropy [R, T] float32 in nats, without gradient.
    """
    rows, time = targets.shape
    chunk = min(chunk, time)
    padded = -time % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padded), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padded)))
    temperature = temperature or 1.0

    @jax.checkpoint
    def body(_, xs):
        h, target = xs  # [R, chunk, D], [R, chunk]
        logits = jnp.einsum("RTD,DV->RTV", h, head.astype(h.dtype), preferred_element_type=jnp.float32)
        logits = constrain(logits / temperature, "batch", "time", "vocab")
        lse = jax.nn.logsumexp(logits, axis=-1)
        # A one-hot product instead of a gather: with the vocabulary sharded, a gather would collect the logits.
        picked = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0.0), axis=-1)
        free = jax.lax.stop_gradient(logits)
        entropy = jax.lax.stop_gradient(lse) - jnp.sum(jax.nn.softmax(free) * free, axis=-1)
        return None, (picked - lse, entropy)

    def split(x):  # [R, T', ...] -> [T' / chunk, R, chunk, ...]
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    _, (logprob, entropy) = jax.lax.scan(body, None, (split(hidden), split(targets)))
    join = lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :time]  # noqa: E731
    return join(logprob), join(entropy)


@functools.partial(jax.named_call, name="completion_logprobs")
def completion_logprobs(
    c: ModelConfig,
    params: decoder.Params,
    tokens: jax.Array,
    context_length: jax.Array,
    width: int,
    *,
    dtype: str,
    temperature: float,
    chunk: int,
    remat: str,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies of the completions of rows `[context | completion | padding]`.

    Args:
        params: float32 master weights.
        tokens: [R, S] int32.
        context_length: [R] int32; the completion starts there.
        width: T, positions per row to score; those past a completion's end hold values that mean nothing.

    Returns:
        logprob and entropy, [R, T] float32.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder.apply(c, decoder.cast(params, dtype), tokens, positions, remat=remat)
    at = jnp.minimum(context_length[:, None] + jnp.arange(width), tokens.shape[1] - 1)  # [R, T] of the targets
    targets = jnp.take_along_axis(tokens, at, axis=1)
    before = jnp.maximum(at - 1, 0)
    states = jnp.take_along_axis(hidden, before[..., None], axis=1)
    states = constrain(states, "batch", "time", "features")
    return token_logprobs(states, decoder.head(c, params), targets, temperature, chunk)
