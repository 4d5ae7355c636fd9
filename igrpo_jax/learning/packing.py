"""Packs the groups of a step into micro-batches: completions of one context stay together, beside others as long.

1. A unit is a context with completions of its group: all of them, or an equal part where there would be fewer
   units than shards of the batch or minibatches. The learner runs the context of a unit once.
2. Token weights are computed on all rows of an optimizer step, so that micro-batches are plain addition.
3. Units are sorted by length and cut into micro-batches of at most `learner.tokens_per_microbatch` padded tokens on
   each shard of the batch. Both lengths of a micro-batch are rounded up to one of a few sizes, so that
   one program is compiled for each pair of sizes that occurs.

All of this is done on the host, with numpy alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.distributed.programs import pick_bucket
from igrpo_jax.learning import objectives
from igrpo_jax.records import Completion, Group, TrainBatch

Shape = tuple[int, int, int, int]  # Q units, P prefix positions, G completions of a unit, T completion positions


@dataclass
class Unit:
    """A context and completions that share it, with what the loss reads of each completion."""

    context: np.ndarray  # [L] int32
    completions: tuple[Completion, ...]  # G
    advantage: np.ndarray  # [G] float32
    weight: np.ndarray | None = None  # [G] float32, weight of every token of a completion; set per optimizer step
    entropy_weight: np.ndarray | None = None  # [G] float32, weight of every token's entropy; set per optimizer step
    old: list[np.ndarray] | None = None  # log pi_old, [T_i] float32 each; None until rescored
    reference: list[np.ndarray] | None = None  # log pi_ref, [T_i] float32 each; None until rescored

    @property
    def stage(self) -> str:
        """The stage of its completions: "refine", or "draft" with algorithm.train_drafts."""
        return self.completions[0].stage

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        return max(len(completion.tokens) for completion in self.completions)

    @property
    def tokens(self) -> int:
        """Tokens that the learner runs, without padding."""
        return len(self.context) - 1 + sum(len(completion.tokens) for completion in self.completions)


def size_buckets(longest: int, levels: int = 4) -> tuple[int, ...]:
    """Returns `longest` and its halves, quarters and eighths in tokens, rounded up to what kernels like; at least 16.

    Coarser than the sampler's `length_buckets`: programs that differentiate compile for minutes. For example 4096:
    512, 1024, 2048, 4096.
    """
    sizes = set()
    for level in range(levels):
        size = max(-(-longest // 2**level), 16)
        step = 128 if size >= 512 else 16
        sizes.add(-(-size // step) * step)
    return tuple(sorted(sizes))


class Packer:
    """Cuts the groups of a step for one configuration and mesh.

    Args:
        shards: ways in which the batch is split over devices.
        max_context: tokens of the longest q or q'.

    Attributes:
        completions_per_unit: how many completions of a group run their context once together.
    """

    def __init__(self, config: Config, algorithm: objectives.Resolved, shards: int, max_context: int):
        self._algorithm = algorithm
        self._shards = shards
        self._minibatches = config.learner.minibatches
        self._budget = config.learner.tokens_per_microbatch
        self._max_completion = config.rollout.max_completion_length
        self._prefix_sizes = size_buckets(max_context - 1)
        self._completion_sizes = size_buckets(self._max_completion)
        # Completions of a group by stage: refinements, and drafts where they are trained on.
        sizes = [config.algorithm.num_generations] + [config.algorithm.num_drafts] * config.algorithm.train_drafts
        sizes = [size for size in sizes if size]
        rows = [config.prompts_per_step * size for size in sizes]
        shared = config.learner.shared_prefix
        self.completions_per_unit = self._most_completions_per_unit(sizes, rows) if shared else 1
        self._most_units = -(-max(rows) // self.completions_per_unit // self._minibatches // shards) * shards

    def _most_completions_per_unit(self, sizes: list[int], rows: list[int]) -> int:
        """Returns the largest part of a group that leaves every shard a unit, divides minibatches and fits the budget.

        Args:
            sizes: completions of a group, by stage.
            rows: completions of a step, by stage.
        """
        prefix, length = self._prefix_sizes[-1], self._completion_sizes[-1]
        fitting = [
            part
            for part in range(2, min(sizes) + 1)
            if all(size % part == 0 for size in sizes)
            and all(count // part % self._minibatches == 0 for count in rows)
            and min(rows) // part // self._minibatches >= self._shards
            and prefix + part * length <= self._budget
        ]
        return max(fitting, default=1)

    @property
    def largest(self) -> Shape:
        """The shape of a micro-batch of the longest contexts and completions, for predictions."""
        return self._shape(self._prefix_sizes[-1], self._completion_sizes[-1])

    @property
    def shapes(self) -> list[Shape]:
        """All shapes that micro-batches may have."""
        return [self._shape(prefix, length) for prefix in self._prefix_sizes for length in self._completion_sizes]

    @property
    def fullest(self) -> Shape:
        """The shape with the most padded tokens, whose activations take the most memory."""
        return max(self.shapes, key=lambda shape: (shape[0] * (shape[1] + shape[2] * shape[3]), shape == self.largest))

    def units(self, groups: Sequence[Group], advantages: np.ndarray) -> list[Unit]:
        """Returns the units of `groups`, in their order; `advantages` is [P, G] float32."""
        units = []
        for group, advantage in zip(groups, advantages, strict=True):
            for start in range(0, len(group.completions), self.completions_per_unit):
                part = slice(start, start + self.completions_per_unit)
                units.append(Unit(group.context, group.completions[part], advantage[part]))
        return units

    def set_weights(self, units: Sequence[Unit]) -> None:
        """Gives the units of one optimizer step the weights of their tokens."""
        completions = [completion for unit in units for completion in unit.completions]
        lengths = np.array([len(completion.tokens) for completion in completions])
        finished = np.array([completion.finished for completion in completions])
        weights = objectives.row_weights(self._algorithm, lengths, finished, self._max_completion)
        entropy_weights = objectives.entropy_weights(self._algorithm, lengths, finished)
        for i, unit in enumerate(units):
            part = slice(i * self.completions_per_unit, (i + 1) * self.completions_per_unit)
            unit.weight = weights[part]
            unit.entropy_weight = entropy_weights[part]

    def micro_batches(self, units: Sequence[Unit]) -> list[tuple[TrainBatch, list[Unit]]]:
        """Returns the host arrays of each micro-batch and its units, in the order of its rows; the longest first."""
        waiting = sorted(units, key=lambda unit: (unit.longest, len(unit.context)), reverse=True)
        batches = []
        while waiting:
            length = pick_bucket(self._completion_sizes, waiting[0].longest)
            # The smallest prefix size that holds the prefixes of all units which fit into a micro-batch of it.
            for size in self._prefix_sizes:
                shape = self._shape(size, length)
                chosen = waiting[: shape[0]]
                if max(len(unit.context) - 1 for unit in chosen) <= size:
                    break
            waiting = waiting[len(chosen) :]
            batches.append((self.fill(chosen, shape), chosen))
        return batches

    def _shape(self, prefix: int, length: int) -> Shape:
        completions = self.completions_per_unit
        units = max(self._budget // (prefix + completions * length), 1) * self._shards
        return min(units, self._most_units), prefix, completions, length

    def fill(self, units: Sequence[Unit], shape: Shape) -> TrainBatch:
        """Returns host arrays of one micro-batch of `shape`."""
        count, prefix, completions, length = shape
        of_tokens = lambda: np.zeros((count, completions, length), np.float32)
        batch = TrainBatch(
            prefix=np.zeros((count, prefix), np.int32),
            prefix_length=np.zeros((count,), np.int32),
            last=np.zeros((count,), np.int32),
            completions=np.zeros((count, completions, length), np.int32),
            length=np.zeros((count, completions), np.int32),
            advantage=np.zeros((count, completions), np.float32),
            weight=of_tokens(),
            entropy_weight=np.zeros((count, completions), np.float32),
            old_logprob=of_tokens(),
            reference_logprob=of_tokens(),
            sampler_logprob=of_tokens(),
        )
        for i, unit in enumerate(units):
            before = len(unit.context) - 1
            batch.prefix[i, :before], batch.last[i] = unit.context[:-1], unit.context[-1]
            batch.prefix_length[i], batch.advantage[i] = before, unit.advantage
            for j, completion in enumerate(unit.completions):
                n = len(completion.tokens)
                batch.completions[i, j, :n], batch.length[i, j] = completion.tokens, n
                batch.sampler_logprob[i, j, :n] = completion.logprobs
                if unit.weight is not None:
                    batch.weight[i, j, :n] = unit.weight[j]
                    batch.entropy_weight[i, j] = unit.entropy_weight[j]
                if unit.old is not None:
                    batch.old_logprob[i, j, :n] = unit.old[j]
                if unit.reference is not None:
                    batch.reference_logprob[i, j, :n] = unit.reference[j]
        return batch
