"""Runs the sampler's programs on values of the host, such as lists of slots. `scheduler` decides when."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from igrpo_jax.distributed import sharding, teams
from igrpo_jax.distributed.compiling import ProgramShapes, all_shapes, compile_all
from igrpo_jax.distributed.programs import pick_bucket, tree_bytes
from igrpo_jax.models import decoder
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.windows import Windows
from igrpo_jax.sampling import inputs, lockstep
from igrpo_jax.sampling.inputs import PromptChunk, SlotAssignment
from igrpo_jax.sampling.lockstep import Call
from igrpo_jax.sampling.programs import SamplerPrograms, traced, weight_shardings
from igrpo_jax.sampling.shapes import WIDTH
from igrpo_jax.sampling.state import Sampling, State, Status
from igrpo_jax.sampling.weights import WeightSync


class Engine:
    """Holds compiled programs and static sizes. The state is passed in and donated; only the windows are kept here.

    It samples on its own mesh over the devices of the run (`layout.sampler_mesh`), to which `weights` brings the
    weights. Where this mesh needs more key and value heads than the model has, it samples with copies of them
    (`models.heads`). Where devices with copies of one head split the sequences, each shard of the slots has several
    parts, and the caller counts each part as a shard. With several processes, each team has its part of this mesh and
    of the slots, and no team waits for another while it samples. Within a team the leader calls the methods, and the
    others `follow`.

    Args:
        cfg: the model as it is trained.
        mesh: the mesh of the run, which the weights come from.
        programs: all programs of the sampler, on the part of its mesh that belongs to this process's team.

    Attributes:
        sync: the programs behind `weights`.
        team: the processes that sample together with this one.
        mesh: the part of the sampler's mesh that belongs to the team.
        tensor: devices that share one copy of the weights.
        groups: number of groups over all processes. Each has `tensor` devices and is one shard of the batch.
        sizes: what the programs are compiled for.
        shards: the shards of the slots of the team: its groups, or the parts of them.
        slots, shard_slots: completions decoded at once by the team, and by each of its shards.
    """

    def __init__(self, cfg: DecoderConfig, mesh: jax.sharding.Mesh, programs: SamplerPrograms):
        self.programs = programs
        self.sizes = programs.sizes
        self.mesh = programs.mesh
        self.dtype = programs.dtype
        self.eos_ids = frozenset(programs.eos_ids)
        self.tensor = self.mesh.shape["tensor"]
        self._whole_mesh = teams.sampler_mesh(mesh, self.tensor)
        self.team = teams.team_of(self._whole_mesh)
        self._own_groups = sharding.batch_shards(self.mesh)
        self.shards = self._own_groups * self.sizes.parts
        self.groups = sharding.batch_shards(self._whole_mesh)
        self.shard_slots = self.sizes.shard_slots
        self.slots = self.shard_slots * self.shards
        self.sync = WeightSync(cfg, mesh, self._whole_mesh, self.dtype)
        self._team_shardings = weight_shardings(programs.cfg, self.mesh)
        self._kept: tuple[tuple[int, ...], Windows] | None = None  # windows of the last dispatch, by its shape
        # By group: slot -> the row whose window is up to date with the slot's pages.
        self._window_row: list[dict[int, int]] = [{} for _ in range(self._own_groups)]

    @property
    def program_shapes(self) -> ProgramShapes:
        """The programs that sampling may need, with their shapes."""
        return all_shapes(list(self.programs))

    def first_program_shapes(self, lengths: Sequence[int], samples: int) -> ProgramShapes:
        """Returns the programs that a rollout needs until its first dispatch has ended.

        Args:
            lengths: tokens of each prompt in the queue.
            samples: completions of each.
        """
        if not lengths:
            return []
        programs, sizes = self.programs, self.sizes
        admitted = lengths[: min(-(-self.slots // samples), sizes.lanes * self.shards)]
        to_prefill = max(max(admitted), -(-sum(admitted) // self._own_groups))
        rows = self.row_bucket(min(-(-len(lengths) * samples // self.shards), self.shard_slots))
        furthest = min(max(admitted) + sizes.steps_per_dispatch, sizes.length)
        window_length = pick_bucket(programs.window_lengths[rows], furthest)
        calls = [(programs.prefill, (self.chunk_size(to_prefill),)), (programs.fork, ())]
        return [(programs.decode, (rows, window_length)), *calls, (programs.empty, ()), (programs.harvest, ())]

    @property
    def state_bytes(self) -> int:
        """Bytes of all pages, lanes and slots on each device."""
        return tree_bytes(self.programs.state)

    def compile(self, report: Callable[[int], None] = lambda done: None) -> None:
        """Compiles all programs; `report` is given the number done so far."""
        compile_all(self.program_shapes, report)

    def weights(self, params: decoder.Params) -> decoder.Params:
        """Returns the rollout copy of the policy's parameters: LoRA's changes merged, cast, with the heads that the
        sampler's mesh needs, and brought to that mesh, once per step."""
        params = self.sync(params)
        return params if self.mesh == self._whole_mesh else teams.team_view(params, self._team_shardings)

    def empty(self) -> State:
        """Returns a state in which all pages, lanes and slots are free."""
        self._forget_windows()
        return self.programs.empty()

    def chunk_size(self, to_prefill: int) -> int:
        """Returns the tokens of the next chunk where a group has at most `to_prefill` tokens to prefill."""
        return self.programs.next_chunk[min(to_prefill, self.programs.chunks[-1])]

    def prefill(
        self, weights: decoder.Params, state: State, size: int, pieces: Sequence[Sequence[PromptChunk]]
    ) -> State:
        """Prefills the pieces of each shard, at most `size` tokens per group; only the first of a shard may continue a
        prompt whose beginning was in an earlier chunk."""
        call = Call("prefill", (size,), inputs.chunk(self.sizes, size, pieces), None)
        return self._run(call, state, weights)[0]

    def fork(self, state: State, assignments: Sequence[Sequence[SlotAssignment]], sampling: Sampling) -> State:
        """Starts the given samples of each shard, and returns the state."""
        for shard, own in enumerate(assignments):
            group, part = divmod(shard, self.sizes.parts)
            for assignment in own:
                self._window_row[group].pop(assignment.slot + part * self.shard_slots, None)
        for fork in inputs.forks(self.sizes, assignments):
            state, _ = self._run(Call("fork", (), fork, traced(sampling)), state)
        return state

    def row_bucket(self, needed: int) -> int:
        """Returns how many rows of a shard decode where `needed` slots run."""
        return pick_bucket(tuple(self.programs.window_lengths), needed)

    def decode(
        self,
        weights: decoder.Params,
        state: State,
        slots: Sequence[Sequence[int]],
        tables: Sequence[np.ndarray],
        furthest: int,
        min_active: Sequence[int],
        sampling: Sampling,
    ) -> tuple[State, Status]:
        """Draws up to K tokens in each of the given slots.

        Args:
            slots: slots to decode, per shard.
            tables: pages of all slots, [B, pages] per shard.
            furthest: the largest number of positions that a slot may have after the dispatch.
            min_active: a shard with fewer active slots than this stops early. The parts of a group stop by their sum,
                and with `tensor` > 1 all shards stop together, when each has too few.
        """
        width = self.row_bucket(max(map(len, slots)))
        window_length = pick_bucket(self.programs.window_lengths[width], min(furthest, self.sizes.length))
        shape = width, window_length
        if not self._kept or self._kept[0] != shape:
            self._forget_windows()
        rows, self._window_row = inputs.rows(self.sizes, *shape, slots, tables, min_active, self._window_row)
        return self._run(Call("decode", shape, rows, traced(sampling)), state, weights)

    def harvest(self, state: State, slots: Sequence[int]) -> list[tuple[jax.Array, ...]]:
        """Returns tokens and log-probs [WIDTH, M] and summed entropies [WIDTH] of `slots`, WIDTH at a time.

        Slots are counted over all shards. The arrays are still on the device.
        """
        padded = np.zeros(-(-len(slots) // WIDTH) * WIDTH, np.int32)
        padded[: len(slots)] = slots
        return [self._run(Call("harvest", (), None, piece), state)[1] for piece in padded.reshape(-1, WIDTH)]

    def follow(self, weights: decoder.Params, state: State) -> None:
        """Runs what the leader of the team runs, with `weights` and from `state`, until `release_followers`."""
        for call in lockstep.received(self.team):
            state, _ = self._execute(call, state, weights)
        self._forget_windows()

    def release_followers(self) -> None:
        """Tells the following processes that nothing more runs until the next `empty`."""
        lockstep.send(self.team, None)
        self._forget_windows()

    def _run(self, call: Call, state: State, weights: decoder.Params | None = None) -> tuple[State, Any]:
        """Runs a program on all processes of the team, and returns what `_execute` returns."""
        lockstep.send(self.team, call)
        return self._execute(call, state, weights)

    def _execute(self, call: Call, state: State, weights: decoder.Params | None = None) -> tuple[State, Any]:
        """Runs a program with what is on the devices and what `call` brings.

        Returns:
            The state after it, and what else the program gives: the Status of "decode", the arrays of "harvest", or
            None.
        """
        programs = self.programs
        split = None if call.split is None else self._split(call.split)
        if call.program == "prefill":
            return programs.prefill(weights, state, split, shape=call.shape), None
        if call.program == "fork":
            return programs.fork(state, split, call.whole), None
        if call.program == "harvest":
            return state, programs.harvest(state, call.whole)
        windows = self._windows(call.shape)
        state, windows, status = programs.decode(weights, state, windows, split, call.whole, shape=call.shape)
        self._kept = call.shape, windows
        return state, status

    def _forget_windows(self) -> None:
        """Lets the windows of the last dispatch go."""
        self._kept = None
        self._window_row = [{} for _ in self._window_row]

    def _windows(self, shape: tuple[int, ...]) -> Windows:
        """Returns the windows of the last dispatch if they have the shape for this one, or else new ones."""
        kept, self._kept = self._kept, None  # they are donated, or make room
        if kept and kept[0] == shape:
            return kept[1]
        zeros = lambda x: sharding.to_global(np.zeros(x.shape, x.dtype), x.sharding)
        return jax.tree.map(zeros, self.programs.windows(*shape))

    def _split(self, tree: NamedTuple) -> NamedTuple:
        """Returns `tree`, numpy arrays split over the shards by their first dimension, as a program takes it."""
        # Given numpy arrays, a program puts them on devices of this process in a quarter of the time of `device_put`.
        return tree if len(self.team.processes) == 1 else sharding.to_global(tree, self.programs.batch_sharding)
