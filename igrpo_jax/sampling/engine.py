"""The sampler's programs: which shapes there are, compiled ahead of time, called with host values.

Each program of `steps` is compiled once per length bucket; decoding also for fewer slots than all, for the end of a
rollout, when most are done. Temperature, top-p, top-k, limits and keys are traced. When to call what is `scheduler`'s
business.
"""

import collections
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.programs import Key, Programs, length_buckets, pick_bucket, tree_bytes
from igrpo_jax.errors import InputError
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder, lora
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.sampling import steps
from igrpo_jax.sampling.steps import Fork, PrefilledPrompts, Sampling, State, Status

WIDTH = 8  # slots that one call inserts, moves or harvests; more take several calls


class Engine:
    """Compiled programs and static sizes; the state itself is passed in and donated.

    On several processes each has an engine of its own, on its part of the mesh and of the slots, and none waits for
    another while it samples.

    Args:
        mesh: of the run.
        slots: completions decoded at once, over all processes.
        max_context: longest prompt in tokens; max_completion: most tokens of a completion (M); length: most tokens of
            the two together, None = their sum.
        steps_per_dispatch: decode steps of one call at most (K).
        prefill_chunk: tokens of a prompt that are read at once.

    Raises:
        InputError: the slots don't divide over the mesh, or a replica of the weights spans processes.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        mesh: jax.sharding.Mesh,
        eos_ids: tuple[int, ...],
        *,
        slots: int,
        max_context: int,
        max_completion: int,
        length: int | None = None,
        dtype: str,
        steps_per_dispatch: int,
        prefill_chunk: int = 2048,
    ):
        everywhere = sharding.batch_shards(mesh)
        if slots % everywhere:
            raise InputError(
                f"config.rollout.slots = {slots}: must be a multiple of mesh.data x mesh.fsdp = {everywhere}, over "
                "which the slots are split"
            )
        self.cfg, self.dtype, self.eos_ids = cfg, dtype, frozenset(eos_ids)
        self._global, self.mesh = mesh, sharding.local_mesh(mesh)
        self.shards = sharding.batch_shards(self.mesh)
        self.shard_slots = slots // everywhere
        self.slots = self.shard_slots * self.shards
        self.max_context, self.max_completion = max_context, max_completion
        self.length = length or max_context + max_completion
        self.steps_per_dispatch, self.prefill_chunk = steps_per_dispatch, prefill_chunk
        self.prefill_width = self.shards
        self.prefill_buckets = _prefill_buckets(max_context, prefill_chunk)
        # Of a decode step, by how many slots of a shard it runs: the lengths to read. At the end of a rollout, when few
        # are left, coarser lengths will do.
        halves = itertools.takewhile(lambda rows: rows >= 4, (self.shard_slots >> i for i in range(1, 32)))
        fine, coarse = length_buckets(self.length, 128), _doubled(self.length, 128)
        self.buckets = dict.fromkeys(sorted({1, *halves}), coarse) | {self.shard_slots: fine}
        self._eos = np.asarray(eos_ids, np.int32)
        self._split = sharding.batch_sharding(self.mesh)
        self._whole = sharding.replicated(self.mesh)
        cache = caches.shardings(cfg, self.mesh)
        vocab = NamedSharding(self.mesh, sharding.spec(("batch", "vocab")))
        build = partial(steps.empty, cfg, self.slots, self.length, max_completion, dtype)
        self._state = _placed(jax.eval_shape(build), State(cache, *[self._split] * 8))
        self._prefix = PrefilledPrompts(cache, vocab, self._split)  # where its parts are
        self._gathered = self._places(self._global)
        self._jitted = self._jit(build)
        self._programs = Programs(self.lower)
        self._cast = jax.jit(lambda params: lora.merge(decoder.cast(params, dtype)), out_shardings=self._gathered)

    @property
    def keys(self) -> list[Key]:
        """Of all programs that sampling may need."""
        reads = [("decode", rows, read) for rows, sizes in self.buckets.items() for read in sizes]
        prompts = [(kind, size) for kind in ("prefill", "insert") for size in self.prefill_buckets]
        return [("empty",), ("harvest",), *[("move",)] * (self.shard_slots > 1), *prompts, *reads]

    @property
    def largest(self) -> list[Key]:
        """Of each kind of program the one that needs most memory, for predictions.

        Of decoding these are two: reading the whole cache, and reading as much of it as is copied first.
        """
        alone = [key for key in self.keys if len(key) == 1]
        prompts = [(kind, self.prefill_buckets[-1]) for kind in ("prefill", "insert")]
        reads = [("decode", self.shard_slots, read) for read in self.buckets[self.shard_slots][-2:]]
        return [*alone, *prompts, *reads]

    @property
    def counts(self) -> collections.Counter[str]:
        """How many programs of each kind sampling may need."""
        return collections.Counter(key[0] for key in self.keys)

    @property
    def weight_bytes(self) -> int:
        """Of the rollout copy of the weights, on each device."""
        return tree_bytes(self._abstract_weights())

    @property
    def state_bytes(self) -> int:
        """Of all slots, on each device."""
        return tree_bytes(self._state)

    def lower_weights(self, params: decoder.Params) -> jax.stages.Lowered:
        """The traced program of `weights`, for shapes of a policy's parameters."""
        return self._cast.lower(params)

    def compile(self, report: Callable[[int], None] = lambda done: None) -> None:
        """Compiles all of them; `report` is given the number done so far."""
        self._programs.compile(self.keys, report)

    def predicted_bytes(self) -> int:
        """Bytes on each device while the largest program compiled so far runs, weights and state included."""
        peak = self._programs.peak_bytes
        return max(peak({"decode"}), peak({"prefill"}) + self.state_bytes, peak({"insert", "move"}) + self.weight_bytes)

    def weights(self, params: decoder.Params) -> decoder.Params:
        """The rollout copy of the policy's parameters: LoRA's changes merged, cast, and gathered over data and fsdp,
        once per step."""
        ready = lambda path, x: (
            isinstance(x, jax.Array)
            and x.dtype == self.dtype
            and x.sharding.is_equivalent_to(self._gathered[path], x.ndim)
        )
        if not all(ready(path, x) for path, x in params.items()):
            params = self._cast(params)
        return sharding.local_view(params, self._places(self.mesh)) if self.mesh is not self._global else params

    def empty(self) -> State:
        return self._programs[("empty",)]()

    def prefill(self, weights: decoder.Params, prompts: Sequence[np.ndarray]) -> PrefilledPrompts:
        """Runs up to `prefill_width` prompts (each [L] int32, L <= max_context) in one call."""
        size = pick_bucket(self.prefill_buckets, max(len(tokens) for tokens in prompts))
        padded = np.zeros((self.prefill_width, size), np.int32)
        lengths = np.ones((self.prefill_width,), np.int32)
        for row, tokens in enumerate(prompts):
            padded[row, : len(tokens)], lengths[row] = tokens, len(tokens)
        return self._programs["prefill", size](weights, *jax.device_put((padded, lengths), self._split))

    def insert(
        self,
        state: State,
        prefix: PrefilledPrompts,
        row: int,
        slots: Sequence[int],
        samples: Sequence[int],
        *,
        key: np.ndarray,
        prompt: int,
        limits: Sequence[int],
        sampling: Sampling,
    ) -> State:
        """Forks prompt `row` of `prefix` to `slots`, one for each of `samples`; returns the state.

        Args:
            key: [2] uint32 key data of the step and stage; prompt: int, samples: ints that derive each sample's own.
            limits: most tokens to draw of each, at most max_completion.
        """
        # A model without attention keeps as much of any prompt: its programs are all the same.
        program = self._programs["insert", caches.positions(prefix.cache) or self.prefill_buckets[0]]
        for start in range(0, len(slots), WIDTH):
            at, ids, most = (x[start : start + WIDTH] for x in (slots, samples, limits))
            at, ids, most = _padded(at, self.slots), _padded(ids, 0), _padded(most, 1)
            fork = Fork(np.int32(row), at, ids, most, key, np.int32(prompt))
            state = program(state, prefix, fork, _traced(sampling))
        return state

    def decode(
        self,
        weights: decoder.Params,
        state: State,
        rows: int,
        read: int,
        min_active: Sequence[int],
        sampling: Sampling,
    ) -> tuple[State, Status]:
        """Draws up to K tokens a slot; a shard with fewer than its `min_active` [shards] active slots stops early.

        Args:
            rows: slots of each shard to run, from `buckets`; those after them must be inactive.
            read: cache positions to attend to, from `buckets[rows]`; at least the largest position + K, or `length`.
        """
        least = jax.device_put(np.asarray(min_active, np.int32), self._split)
        return self._programs["decode", rows, read](weights, state, least, _traced(sampling))

    def move(self, state: State, pairs: Sequence[tuple[int, int]]) -> State:
        """Moves active slots to free ones: (from, to), both counted over all shards and of the same one."""
        of_shard = [[pair for pair in pairs if pair[0] // self.shard_slots == shard] for shard in range(self.shards)]
        for start in range(0, max(map(len, of_shard)), WIDTH):
            source = np.zeros((self.shards, WIDTH), np.int32)
            target = np.full((self.shards, WIDTH), self.shard_slots, np.int32)
            for shard, own in enumerate(of_shard):
                for i, (old, new) in enumerate(own[start : start + WIDTH]):
                    source[shard, i], target[shard, i] = old % self.shard_slots, new % self.shard_slots
            state = self._programs[("move",)](state, *jax.device_put((source, target), self._split))
        return state

    def harvest(self, state: State, slots: Sequence[int]) -> list[tuple[jax.Array, jax.Array]]:
        """Tokens and log-probs [WIDTH, M] of some slots, in pieces, still on the device."""
        pieces = [_padded(slots[start : start + WIDTH], 0) for start in range(0, len(slots), WIDTH)]
        return [self._programs[("harvest",)](state, piece) for piece in pieces]

    def _jit(self, build) -> dict[str, jax.stages.Wrapped]:
        cfg, mesh, eos = self.cfg, self.mesh, self._eos
        state = jax.tree.map(lambda x: x.sharding, self._state)
        reads = partial(steps.decode, cfg, mesh, eos, steps=self.steps_per_dispatch)
        return {
            "empty": jax.jit(_named("empty", build), out_shardings=state),
            "prefill": jax.jit(
                _named("prefill", partial(steps.prefill, cfg, self.prefill_chunk)), out_shardings=self._prefix
            ),
            "insert": jax.jit(
                _named("insert", partial(steps.insert, mesh, eos)), donate_argnums=0, out_shardings=state
            ),
            "decode": jax.jit(
                _named("decode", reads),
                donate_argnums=1,
                static_argnames=("rows", "read"),
                out_shardings=(state, self._split),
            ),
            "move": jax.jit(_named("move", partial(steps.move, mesh)), donate_argnums=0, out_shardings=state),
            "harvest": jax.jit(_named("harvest", steps.harvest), out_shardings=self._whole),
        }

    def lower(self, key: Key) -> jax.stages.Lowered:
        """The traced program of `key`, one of `keys`."""
        kind, *shape = key
        ints = lambda *size, place=self._whole: jax.ShapeDtypeStruct(size, jnp.int32, sharding=place)
        sampling = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), _traced(Sampling(1.0)))
        weights = self._abstract_weights()
        spread = partial(ints, self.shards, place=self._split)
        static, args = {}, ()
        if kind == "prefill":
            args = weights, spread(*shape), spread()
        elif kind == "insert":
            with jax.set_mesh(self.mesh):
                prefix = jax.eval_shape(self._jitted["prefill"], weights, spread(*shape), spread())
            fork = Fork(ints(), *[ints(WIDTH)] * 3, jax.ShapeDtypeStruct((2,), jnp.uint32), ints())
            args = self._state, _placed(prefix, self._prefix), fork, sampling
        elif kind == "decode":
            args, static = (weights, self._state, spread(), sampling), dict(zip(("rows", "read"), shape, strict=True))
        elif kind == "move":
            args = self._state, spread(WIDTH), spread(WIDTH)
        elif kind == "harvest":
            args = self._state, ints(WIDTH)
        with jax.set_mesh(self.mesh):
            return self._jitted[kind].lower(*args, **static)

    def _abstract_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        places, dtype = self._places(self.mesh), jnp.dtype(self.dtype)
        shapes = decoder.shapes(self.cfg).items()
        return {path: jax.ShapeDtypeStruct(size, dtype, sharding=places[path]) for path, size in shapes}

    def _places(self, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
        return {path: sharding.param_sharding(mesh, path, gathered=True) for path in decoder.shapes(self.cfg)}


def _doubled(longest: int, smallest: int) -> tuple[int, ...]:
    """Lengths from `smallest`, each twice the one before, the last one `longest`."""
    sizes = itertools.takewhile(lambda size: size < longest, (smallest << i for i in range(32)))
    return (*sizes, longest)


def _prefill_buckets(longest: int, chunk: int) -> tuple[int, ...]:
    """Lengths up to a chunk, and whole chunks beyond it.

    Each is a program, whose code stays on the device (161 MiB for 28 layers on a TPU): no short ones beside long ones.
    """
    smallest = 32 if longest < 1024 else 128
    if longest <= chunk:
        return length_buckets(longest, smallest)
    whole = {-(-size // chunk) * chunk for size in length_buckets(longest, chunk)}
    return (*length_buckets(chunk, smallest), *sorted(whole - {chunk}))


def _placed(tree: NamedTuple, places: NamedTuple) -> NamedTuple:
    """`tree` of shapes with the sharding of each part."""
    place = lambda where, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, places, tree)


def _padded(values: Sequence[int], fill: int) -> np.ndarray:
    return np.array([*values, *[fill] * (WIDTH - len(values))], np.int32)


def _traced(sampling: Sampling) -> Sampling:
    return Sampling(np.float32(sampling.temperature), np.float32(sampling.top_p), np.int32(sampling.top_k))


def _named(name: str, function: Callable) -> Callable:
    """`function` under the name that profiles and warnings show."""

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call
