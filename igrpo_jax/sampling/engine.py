"""The device side of sampling: a fixed number of slots and four jitted programs on them.

1. `prefill` runs some prompts and keeps their keys and values and the logits after their last token.
2. `insert` forks one prefilled prompt to some slots and draws the first token of each.
3. `decode` draws up to K tokens in every active slot inside one `while_loop`.
4. `harvest` reads the tokens of finished slots.

Programs are compiled once per length bucket; temperature, top-p, top-k, limits and keys are traced. The key of a token
is fold_in(fold_in(fold_in(stage key, prompt), sample), position in the completion), so a sample depends on nothing but
itself: not on its slot, its neighbours, or the schedule. When to call what is `scheduler`'s business.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from igrpo_jax import sharding
from igrpo_jax.batch import length_buckets, pick_bucket
from igrpo_jax.config import InputError
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder
from igrpo_jax.models.cache import Cache
from igrpo_jax.models.config import ModelConfig
from igrpo_jax.sampling.draw import draw


class Sampling(NamedTuple):
    """How tokens are drawn; all traced."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0


class State(NamedTuple):
    """All slots. A slot's `token` is its last drawn one, not yet in the cache; it stands at `position`."""

    cache: Cache
    token: jax.Array  # [B] int32
    position: jax.Array  # [B] int32
    count: jax.Array  # [B] int32, tokens drawn so far, `token` included
    limit: jax.Array  # [B] int32, most tokens to draw
    key: jax.Array  # [B, 2] uint32, of the sample
    active: jax.Array  # [B] bool
    out: jax.Array  # [B, M] int32
    logprob: jax.Array  # [B, M] float32


class Prefix(NamedTuple):
    """Prefilled prompts."""

    cache: Cache  # entries [W, K, P, H]
    logits: jax.Array  # [W, V] float32, after each prompt's last token
    length: jax.Array  # [W] int32


class Engine:
    """Compiled programs and static sizes; the state itself is passed in and donated.

    Args:
        max_context: longest prompt in tokens; max_completion: most tokens of a completion (M).
    """

    def __init__(
        self,
        c: ModelConfig,
        mesh: jax.sharding.Mesh,
        eos_ids: tuple[int, ...],
        *,
        slots: int,
        max_context: int,
        max_completion: int,
        dtype: str,
        steps_per_dispatch: int,
    ):
        shards = sharding.batch_shards(mesh)
        if slots % shards:
            raise InputError(
                f"config.rollout.slots = {slots}: must be a multiple of mesh.data x mesh.fsdp = {shards}, over which "
                "the slots are split"
            )
        self.c, self.mesh, self.dtype = c, mesh, dtype
        self.slots, self.max_context, self.max_completion = slots, max_context, max_completion
        self.steps_per_dispatch = steps_per_dispatch
        self.prefill_width = shards
        self.length = max_context + max_completion + steps_per_dispatch
        self.prefill_buckets = length_buckets(max_context, 32)
        self.read_buckets = length_buckets(self.length, 128)
        self.eos_ids = frozenset(eos_ids)
        self._eos = jnp.asarray(eos_ids, jnp.int32)
        state = jax.tree.map(lambda _: sharding.batch_sharding(mesh), jax.eval_shape(self._empty))
        cache = NamedSharding(mesh, sharding.spec(caches.AXES))
        self._state_sharding = state._replace(cache=jax.tree.map(lambda _: cache, state.cache))
        self._gathered = {path: sharding.param_sharding(mesh, path, gathered=True) for path in decoder.shapes(c)}
        self._cast = jax.jit(lambda params: decoder.cast(params, dtype), out_shardings=self._gathered)
        self._prefill = jax.jit(self._prefill_program)
        self._insert = jax.jit(self._insert_program, donate_argnums=0, out_shardings=self._state_sharding)
        self._decode = jax.jit(
            self._decode_program,
            static_argnames="read",
            donate_argnums=1,
            out_shardings=(self._state_sharding, sharding.replicated(mesh)),
        )
        self._take = jax.jit(lambda state, slots: (state.out[slots], state.logprob[slots]))

    def weights(self, params: decoder.Params) -> decoder.Params:
        """The rollout copy of the master weights: cast, and gathered over data and fsdp, once per step."""
        placed = all(x.sharding.is_equivalent_to(self._gathered[path], x.ndim) for path, x in params.items())
        return params if placed and all(x.dtype == self.dtype for x in params.values()) else self._cast(params)

    def empty(self) -> State:
        return jax.jit(self._empty, out_shardings=self._state_sharding)()

    def _empty(self) -> State:
        b, m = self.slots, self.max_completion
        ints = jnp.zeros((b,), jnp.int32)
        return State(
            cache=caches.empty(self.c, b, self.length, jnp.dtype(self.dtype)),
            token=ints,
            position=ints,
            count=ints,
            limit=ints,
            key=jnp.zeros((b, 2), jnp.uint32),
            active=jnp.zeros((b,), bool),
            out=jnp.zeros((b, m), jnp.int32),
            logprob=jnp.zeros((b, m), jnp.float32),
        )

    def prefill(self, weights: decoder.Params, prompts: list[np.ndarray]) -> Prefix:
        """Runs up to `prefill_width` prompts (each [L] int32, L <= max_context) in one call."""
        size = pick_bucket(self.prefill_buckets, max(len(tokens) for tokens in prompts))
        padded = np.zeros((self.prefill_width, size), np.int32)
        lengths = np.ones((self.prefill_width,), np.int32)
        for row, tokens in enumerate(prompts):
            padded[row, : len(tokens)], lengths[row] = tokens, len(tokens)
        return self._prefill(weights, padded, lengths)

    def _prefill_program(self, weights, tokens, lengths) -> Prefix:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, cache = decoder.apply(self.c, weights, tokens, positions)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return Prefix(cache, decoder.logits(self.c, weights, last), lengths)

    def insert(self, state: State, prefix: Prefix, row: int, slots: list[int], key, prompt, samples, limit, sampling):
        """Forks prompt `row` of `prefix` to `slots`, one for each of `samples`; returns the state.

        Args:
            key: [2] uint32 key data of the step and stage; prompt: int, samples: ints that derive each sample's own.
            limit: most tokens to draw, at most max_completion.
        """
        width = 1 << (len(slots) - 1).bit_length()  # few widths, few programs; spare rows fall off the end
        spare = width - len(slots)
        at = np.array([*slots, *[self.slots] * spare], np.int32)
        ids = np.array([*samples, *[0] * spare], np.int32)
        return self._insert(state, prefix, np.int32(row), at, key, np.int32(prompt), ids, np.int32(limit), sampling)

    def _insert_program(self, state, prefix, row, slots, key, prompt, samples, limit, sampling) -> State:
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), prefix)
        base = jax.random.fold_in(jax.random.wrap_key_data(key), prompt)
        keys = jax.vmap(lambda sample: jax.random.key_data(jax.random.fold_in(base, sample)))(samples)
        logits = jnp.broadcast_to(own.logits, (len(slots), own.logits.shape[-1]))
        token, logprob = draw(logits, _position_keys(keys, jnp.zeros_like(samples)), *sampling)
        put = lambda old, new: old.at[slots].set(new, mode="drop")  # noqa: E731
        return State(
            cache=caches.insert(state.cache, caches.fork(own.cache, len(slots)), slots),
            token=put(state.token, token),
            position=put(state.position, own.length[0]),
            count=put(state.count, 1),
            limit=put(state.limit, limit),
            key=put(state.key, keys),
            active=put(state.active, ~jnp.isin(token, self._eos) & (limit > 1)),
            out=state.out.at[slots, 0].set(token, mode="drop"),
            logprob=state.logprob.at[slots, 0].set(logprob, mode="drop"),
        )

    def decode(self, weights, state: State, read: int, min_active: int, sampling: Sampling):
        """Draws up to K tokens a slot, stopping early when fewer than `min_active` slots are active.

        Args:
            read: cache positions to attend to, from `read_buckets`; at least the largest position + K.

        Returns:
            the state, and the number of tokens drawn per slot [] int32.
        """
        return self._decode(weights, state, np.int32(min_active), sampling, read=read)

    def _decode_program(self, weights, state, min_active, sampling, *, read):
        rows = jnp.arange(self.slots)

        def busy(carry):
            steps, state = carry
            running = jnp.sum(state.active)
            return (steps < self.steps_per_dispatch) & (running >= min_active) & (running > 0)

        def step(carry):
            steps, s = carry
            hidden, cache = decoder.apply(
                self.c, weights, s.token[:, None], s.position[:, None], cache=s.cache, read=read
            )
            logits = decoder.logits(self.c, weights, hidden[:, 0])
            token, logprob = draw(logits, _position_keys(s.key, s.count), *sampling)
            at = jnp.where(s.active, s.count, self.max_completion)  # past the end: dropped
            more = s.active.astype(jnp.int32)
            return steps + 1, s._replace(
                cache=cache,
                token=jnp.where(s.active, token, s.token),
                position=s.position + more,
                count=s.count + more,
                active=s.active & ~jnp.isin(token, self._eos) & (s.count + 1 < s.limit),
                out=s.out.at[rows, at].set(token, mode="drop"),
                logprob=s.logprob.at[rows, at].set(logprob, mode="drop"),
            )

        steps, state = jax.lax.while_loop(busy, step, (jnp.int32(0), state))
        return state, steps

    def harvest(self, state: State, slots: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probs [len(slots), M] of some slots, on the host."""
        width = min(1 << (len(slots) - 1).bit_length(), self.slots)
        at = np.array([*slots, *[0] * (width - len(slots))], np.int32)
        return tuple(x[: len(slots)] for x in sharding.to_host(self._take(state, at)))


def _position_keys(keys: jax.Array, counts: jax.Array) -> jax.Array:
    """Key data [B, 2] of the next token: fold_in(sample key, position in the completion)."""
    fold = lambda key, n: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), n))  # noqa: E731
    return jax.vmap(fold)(keys, counts)
