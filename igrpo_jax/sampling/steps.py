"""The device functions of the sampler except decoding (`decoding`); `programs` compiles them.

1. `prefill` runs a chunk of tokens of some prompts, fills their pages, and keeps the logits after each prompt's last
   token in its lane.
2. `fork` gives a slot to each of some samples of prefilled prompts, and draws their first tokens.
3. `decode` (`decoding`) draws up to K tokens in every running slot.
4. `harvest` reads the tokens, log-probs and entropies of finished slots.

Slots, lanes and pages are split over the batch axes of the mesh (`data` and `fsdp`). Each shard works on its own,
without communication with the others, under `shard_map`; the compiler splits heads, MLP and vocabulary (`tensor`), and
`draw` splits what it does with logits.

The key of a token is fold_in(fold_in(fold_in(stage key, prompt), sample), position in the completion). A sample
therefore does not depend on its slot, its pages, its neighbours, or the schedule, and one that is begun again draws the
same tokens.

For the letters of shapes see `state`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from igrpo_jax.distributed import sharding
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.lane_scan import Lanes
from igrpo_jax.models.ragged import Paged, Ragged, places
from igrpo_jax.sampling.draw import draw
from igrpo_jax.sampling.state import Chunk, Fork, Sampling, State

BATCH = sharding.RULES["batch"]


def prefill(cfg: DecoderConfig, mesh: jax.sharding.Mesh, weights: decoder.Params, state: State, chunk: Chunk) -> State:
    """Prefills a chunk of prompts into their pages and lanes.

    Only the first prompt may have tokens before the chunk.
    """

    def run(weights, state: State, chunk: Chunk) -> State:
        tokens, length, table, start, count, lane = (x[0] for x in chunk)
        ragged = Ragged(length, table, start, count)
        pools, states = state.cache, state.lanes

        def entry(pool, lanes):  # of one sublayer: Mamba-2 has lanes, attention a pool, an MLP neither
            if lanes:
                return Lanes(lanes, lane, ragged)
            return None if pool is None else Paged(pool, ragged)

        entries = tuple(entry(pool, own) for pool, own in zip(pools, states, strict=True))
        position = places(ragged, len(tokens)).position
        hidden, kept = decoder.apply(cfg, weights, tokens[None], position[None], entries)
        last = hidden[0, jnp.maximum(start[1:] - 1, 0)]  # [W, D]
        logits = sharding.constrain(decoder.logits(cfg, weights, last), "batch", "vocab")
        lane = jnp.where(jnp.arange(len(lane)) < count, lane, len(state.logits))
        return state._replace(
            cache=tuple(pool if own else new for pool, own, new in zip(pools, states, kept, strict=True)),
            lanes=tuple(new if own else None for own, new in zip(states, kept, strict=True)),
            logits=state.logits.at[lane].set(logits, mode="drop"),
        )

    return per_shard(mesh, run, (False, True, True), True)(weights, state, chunk)


def fork(mesh: jax.sharding.Mesh, eos: jax.Array, parts: int, state: State, fork: Fork, sampling: Sampling) -> State:
    """Gives slots to samples of prefilled prompts, and draws the first token of each.

    Args:
        parts: as for `caches.own_pages`.
    """

    def run(state: State, fork: Fork, sampling: Sampling) -> State:
        fork = Fork(*(x[0] for x in fork))
        keys = jax.vmap(_sample_key)(fork.key, fork.prompt, fork.sample)
        first = jnp.zeros_like(fork.slot)
        token, logprob, entropy = draw(state.logits[fork.lane], position_keys(keys, first), *sampling)
        active = ~jnp.isin(token, eos) & (fork.limit > 1)
        put = lambda x, value: x.at[fork.slot].set(value, mode="drop")
        return State(
            cache=caches.fork(state.cache, state.lanes, fork.lane, fork.slot, fork.source, fork.target, parts),
            lanes=state.lanes,
            logits=state.logits,
            token=put(state.token, token),
            length=put(state.length, fork.length),
            count=put(state.count, first + 1),
            limit=put(state.limit, fork.limit),
            key=put(state.key, keys),
            active=put(state.active, active),
            entropy=put(state.entropy, entropy),
            out=state.out.at[fork.slot, 0].set(token, mode="drop"),
            logprob=state.logprob.at[fork.slot, 0].set(logprob, mode="drop"),
        )

    return per_shard(mesh, run, (True, True, False), True)(state, fork, sampling)


def harvest(state: State, slots: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns tokens and log-probs [W, M] and the sum of the entropies [W] of some slots, counted over all shards."""
    return state.out[slots], state.logprob[slots], state.entropy[slots]


def per_shard(mesh: jax.sharding.Mesh, run, split_in: tuple[bool, ...], split_out):
    """Returns a function that runs `run` on each shard of the batch by itself.

    Each argument is split by its first dimension, or given whole.
    """
    spec = lambda split: PartitionSpec(BATCH) if split else PartitionSpec()
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(map(spec, split_in)),
        out_specs=jax.tree.map(spec, split_out),
        axis_names=set(BATCH),
        check_vma=False,
    )


def position_keys(keys: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the key data [B, 2] of the next token: fold_in(sample key, position in the completion)."""
    fold = lambda key, n: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), n))
    return jax.vmap(fold)(keys, counts)


def _sample_key(key: jax.Array, prompt: jax.Array, sample: jax.Array) -> jax.Array:
    """Returns the key data [2] of a sample: fold_in(fold_in(stage key, prompt), sample)."""
    of_prompt = jax.random.fold_in(jax.random.wrap_key_data(key), prompt)
    return jax.random.key_data(jax.random.fold_in(of_prompt, sample))
