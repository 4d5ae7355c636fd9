"""Calls the sampler's programs with values of the host, such as lists of slots. `scheduler` decides when."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.compiling import Wanted, all_shapes, compile_all
from igrpo_jax.distributed.programs import pick_bucket, tree_bytes
from igrpo_jax.errors import InputError
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder, lora
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.sampling.programs import WIDTH, SamplerPrograms, Sizes, traced, weight_shardings
from igrpo_jax.sampling.steps import Fork, PrefilledPrompts, Sampling, State, Status


class Engine:
    """Compiled programs and static sizes; the state itself is passed in and donated.

    On several processes each has an engine of its own, on its part of the mesh and of the slots, and none waits for
    another while it samples.

    Args:
        mesh: the mesh of the run.
        slots: completions decoded at once, over all processes.
        max_context: longest prompt in tokens.
        max_completion: most tokens of a completion (M).
        length: most tokens of the two together; None = their sum.
        steps_per_dispatch: decode steps of one call at most (K).
        prefill_chunk: tokens of a prompt that are read at once.

    Attributes:
        programs: all programs of the sampler.
        gather: the jitted function behind `weights`.
        mesh: the part of the mesh that this process samples on.
        slots, shard_slots: completions decoded at once by this process, and by each of its shards.
        buckets: the lengths of the cache that `decode` may read, by how many slots of a shard it runs.

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
        all_shards = sharding.batch_shards(mesh)
        if slots % all_shards:
            raise InputError(
                f"config.rollout.slots = {slots}: must be a multiple of mesh.data x mesh.fsdp = {all_shards}, over "
                "which the slots are split"
            )
        self.dtype = dtype
        self.eos_ids = frozenset(eos_ids)
        self.mesh = sharding.local_mesh(mesh)
        self.shards = sharding.batch_shards(self.mesh)
        self.shard_slots = slots // all_shards
        self.slots = self.shard_slots * self.shards
        self.max_context = max_context
        self.max_completion = max_completion
        self.length = length or max_context + max_completion
        self.steps_per_dispatch = steps_per_dispatch
        self.prefill_width = self.shards
        sizes = Sizes(
            shard_slots=self.shard_slots,
            length=self.length,
            max_context=max_context,
            max_completion=max_completion,
            steps_per_dispatch=steps_per_dispatch,
            prefill_chunk=prefill_chunk,
        )
        self.programs = SamplerPrograms(cfg, self.mesh, eos_ids, dtype, sizes)
        self.buckets = self.programs.buckets
        self._whole_mesh = mesh
        self._global_shardings = weight_shardings(cfg, mesh)
        self._local_shardings = weight_shardings(cfg, self.mesh)
        self.gather = jax.jit(partial(_gather, dtype), out_shardings=self._global_shardings)

    @property
    def wanted(self) -> Wanted:
        """The programs that sampling may need, with their shapes."""
        return all_shapes(list(self.programs))

    def first_wanted(self, lengths: Sequence[int], samples: int) -> Wanted:
        """Returns the programs that a rollout needs until its first dispatch has ended.

        Args:
            lengths: tokens of each prompt in the queue.
            samples: completions of each.
        """
        if not lengths:
            return []
        programs, drawn = self.programs, len(lengths) * samples
        admitted = lengths[: -(-self.slots // samples)]
        batches = [lengths[i : i + self.prefill_width] for i in range(0, len(admitted), self.prefill_width)]
        sizes = {pick_bucket(programs.prefill_buckets, max(batch)) for batch in batches}
        rows = self.shard_slots if drawn > self.slots else pick_bucket(tuple(self.buckets), -(-drawn // self.shards))
        read = pick_bucket(self.buckets[rows], min(max(admitted) + self.steps_per_dispatch, self.length))
        prompts = [(program, (size,)) for size in sorted(sizes) for program in (programs.prefill, programs.insert)]
        return [(programs.decode, (rows, read)), *prompts, (programs.empty, ()), (programs.harvest, ())]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the rollout copy of the weights on each device."""
        return tree_bytes(self.programs.weights)

    @property
    def state_bytes(self) -> int:
        """Bytes of all slots on each device."""
        return tree_bytes(self.programs.state)

    def compile(self, report: Callable[[int], None] = lambda done: None) -> None:
        """Compiles all programs; `report` is given the number done so far."""
        compile_all(self.wanted, report)

    def predicted_bytes(self) -> int:
        """Returns the bytes on each device, weights and state included, while the largest compiled program runs."""
        programs = self.programs
        return max(
            programs.decode.peak_bytes,
            programs.prefill.peak_bytes + self.state_bytes,
            max(programs.insert.peak_bytes, programs.move.peak_bytes) + self.weight_bytes,
        )

    def weights(self, params: decoder.Params) -> decoder.Params:
        """Returns the rollout copy of the policy's parameters: LoRA's changes merged, cast, and gathered over data and
        fsdp, once per step."""
        ready = lambda path, x: (
            isinstance(x, jax.Array)
            and x.dtype == self.dtype
            and x.sharding.is_equivalent_to(self._global_shardings[path], x.ndim)
        )
        if not all(ready(path, x) for path, x in params.items()):
            params = self.gather(params)
        return params if self.mesh is self._whole_mesh else sharding.local_view(params, self._local_shardings)

    def empty(self) -> State:
        """Returns a state in which all slots are free."""
        return self.programs.empty()

    def prefill(self, weights: decoder.Params, prompts: Sequence[np.ndarray]) -> PrefilledPrompts:
        """Reads up to `prefill_width` prompts (each [L] int32, L <= max_context) in one call."""
        size = pick_bucket(self.programs.prefill_buckets, max(len(tokens) for tokens in prompts))
        padded = np.zeros((self.prefill_width, size), np.int32)
        lengths = np.ones((self.prefill_width,), np.int32)
        for row, tokens in enumerate(prompts):
            padded[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        on_device = jax.device_put((padded, lengths), self.programs.batch_sharding)
        return self.programs.prefill(weights, *on_device, shape=(size,))

    def insert(
        self,
        state: State,
        prefilled: PrefilledPrompts,
        row: int,
        slots: Sequence[int],
        samples: Sequence[int],
        *,
        key: np.ndarray,
        prompt: int,
        limits: Sequence[int],
        sampling: Sampling,
    ) -> State:
        """Forks prompt `row` of `prefilled` to `slots`, one for each of `samples`, and returns the state.

        Args:
            key: [2] uint32 key data of the step and stage.
            prompt, samples: integers that derive each sample's own key from it.
            limits: most tokens to draw of each sample, at most max_completion.
        """
        # A model without attention keeps a state of one size for any prompt, so that one program serves all lengths.
        size = caches.positions(prefilled.cache) or self.programs.prefill_buckets[0]
        for start in range(0, len(slots), WIDTH):
            part = slice(start, start + WIDTH)
            fork = Fork(
                row=np.int32(row),
                slots=_padded(slots[part], self.slots),
                samples=_padded(samples[part], 0),
                limits=_padded(limits[part], 1),
                key=key,
                prompt=np.int32(prompt),
            )
            state = self.programs.insert(state, prefilled, fork, traced(sampling), shape=(size,))
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
        min_active = jax.device_put(np.asarray(min_active, np.int32), self.programs.batch_sharding)
        return self.programs.decode(weights, state, min_active, traced(sampling), shape=(rows, read))

    def move(self, state: State, pairs: Sequence[tuple[int, int]]) -> State:
        """Moves active slots to free ones, by pairs of (from, to) in one shard, both counted over all shards."""
        pairs_by_shard = [
            [pair for pair in pairs if pair[0] // self.shard_slots == shard] for shard in range(self.shards)
        ]
        for start in range(0, max(map(len, pairs_by_shard)), WIDTH):
            source = np.zeros((self.shards, WIDTH), np.int32)
            target = np.full((self.shards, WIDTH), self.shard_slots, np.int32)
            for shard, own in enumerate(pairs_by_shard):
                for i, (old, new) in enumerate(own[start : start + WIDTH]):
                    source[shard, i], target[shard, i] = old % self.shard_slots, new % self.shard_slots
            on_device = jax.device_put((source, target), self.programs.batch_sharding)
            state = self.programs.move(state, *on_device)
        return state

    def harvest(self, state: State, slots: Sequence[int]) -> list[tuple[jax.Array, ...]]:
        """Returns tokens and log-probs [WIDTH, M] and summed entropies [WIDTH] of `slots`, WIDTH at a time.

        The arrays are still on the device.
        """
        pieces = [_padded(slots[start : start + WIDTH], 0) for start in range(0, len(slots), WIDTH)]
        return [self.programs.harvest(state, piece) for piece in pieces]


def _gather(dtype: str, params: decoder.Params) -> decoder.Params:
    return lora.merge(decoder.cast(params, dtype))


def _padded(values: Sequence[int], fill: int) -> np.ndarray:
    """Returns `values` as [WIDTH] int32, filled up."""
    return np.array([*values, *[fill] * (WIDTH - len(values))], np.int32)
