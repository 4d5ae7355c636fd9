"""From the groups of a step to micro-batches: what shares a context stays together, what is as long lies together.

1. A unit is a context with completions of its group: all of them, or an equal share where there would be fewer units
   than shards of the batch or minibatches. The learner runs the context of a unit once.
2. Token weights are computed on all rows of an optimizer step, so that micro-batches are plain addition.
3. Units are sorted by length and cut into micro-batches of at most `learner.tokens_per_microbatch` padded tokens on
   each shard of the batch. Both lengths of a micro-batch are rounded up to one of a few sizes: one compiled program
   per pair of sizes that occurs.

Host side: numpy only.
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
    """A context and completions that share it, with what is known of each completion."""

    context: np.ndarray  # [L] int32
    completions: tuple[Completion, ...]  # G
    advantage: np.ndarray  # [G] float32
    weight: np.ndarray | None = None  # [G] float32, of every token of a completion; set per optimizer step
    entropy_weight: np.ndarray | None = None  # [G] float32, the same of its entropy
    old: list[np.ndarray] | None = None  # log pi_old, [T_i] float32 each; None until scored
    reference: list[np.ndarray] | None = None  # log pi_ref

    @property
    def stage(self) -> str:
        """Of its completions: "refine", or "draft" with algorithm.train_drafts."""
        return self.completions[0].stage

    @property
    def longest(self) -> int:
        return max(len(one.tokens) for one in self.completions)

    @property
    def tokens(self) -> int:
        """Tokens that the learner runs, padding left out."""
        return len(self.context) - 1 + sum(len(one.tokens) for one in self.completions)


def size_buckets(longest: int, levels: int = 4) -> tuple[int, ...]:
    """`longest` and its halves, quarters and eighths in tokens, rounded up to what kernels like; at least 16.

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
    """

    def __init__(self, config: Config, algorithm: objectives.Resolved, shards: int, max_context: int):
        self._algorithm, self._shards, self._minibatches = algorithm, shards, config.learner.minibatches
        self._budget, self._limit = config.learner.tokens_per_microbatch, config.rollout.max_completion_length
        self._prefix_sizes, self._completion_sizes = size_buckets(max_context - 1), size_buckets(self._limit)
        # Completions of a group by stage: refinements, and drafts where they are trained on.
        sizes = [config.algorithm.num_generations] + [config.algorithm.num_drafts] * config.algorithm.train_drafts
        sizes = [size for size in sizes if size]
        rows = [config.prompts_per_step * size for size in sizes]
        self.share = self._completions_per_unit(sizes, rows) if config.learner.shared_prefix else 1
        self._most_units = -(-max(rows) // self.share // self._minibatches // shards) * shards

    def _completions_per_unit(self, sizes: list[int], rows: list[int]) -> int:
        """The largest share of a group that gives every shard a unit, divides into minibatches and fits the budget."""
        prefix, width = self._prefix_sizes[-1], self._completion_sizes[-1]
        fitting = [
            share
            for share in range(2, min(sizes) + 1)
            if all(size % share == 0 for size in sizes)
            and all(count // share % self._minibatches == 0 for count in rows)
            and min(rows) // share // self._minibatches >= self._shards
            and prefix + share * width <= self._budget
        ]
        return max(fitting, default=1)

    @property
    def largest(self) -> Shape:
        """The shape of a micro-batch of the longest contexts and completions, for predictions."""
        return self._shape(self._prefix_sizes[-1], self._completion_sizes[-1])

    @property
    def shapes(self) -> list[Shape]:
        """Those that micro-batches may have."""
        return [self._shape(prefix, width) for prefix in self._prefix_sizes for width in self._completion_sizes]

    @property
    def fullest(self) -> Shape:
        """The shape of a micro-batch with most padded tokens, whose activations take most memory."""
        return max(self.shapes, key=lambda shape: (shape[0] * (shape[1] + shape[2] * shape[3]), shape == self.largest))

    def units(self, groups: Sequence[Group], advantages: np.ndarray) -> list[Unit]:
        """The units of some groups, in their order; `advantages` is [P, G] float32."""
        units = []
        for group, advantage in zip(groups, advantages, strict=True):
            for start in range(0, len(group.completions), self.share):
                part = slice(start, start + self.share)
                units.append(Unit(group.context, group.completions[part], advantage[part]))
        return units

    def set_weights(self, units: Sequence[Unit]) -> None:
        """Gives the units of one optimizer step the weights of their tokens."""
        rows = [one for unit in units for one in unit.completions]
        lengths = np.array([len(one.tokens) for one in rows])
        finished = np.array([one.finished for one in rows])
        weights = objectives.row_weights(self._algorithm, lengths, finished, self._limit)
        entropy_weights = objectives.entropy_weights(self._algorithm, lengths, finished)
        for i, unit in enumerate(units):
            own = slice(i * self.share, (i + 1) * self.share)
            unit.weight, unit.entropy_weight = weights[own], entropy_weights[own]

    def micro_batches(self, units: Sequence[Unit]) -> list[tuple[TrainBatch, list[Unit]]]:
        """Host arrays of each micro-batch with the units in it, in their order there; the longest first."""
        waiting = sorted(units, key=lambda unit: (unit.longest, len(unit.context)), reverse=True)
        batches = []
        while waiting:
            width = pick_bucket(self._completion_sizes, waiting[0].longest)
            # The prefix size that the units which fit with it need, the smallest first.
            for size in self._prefix_sizes:
                shape = self._shape(size, width)
                chosen = waiting[: shape[0]]
                if max(len(unit.context) - 1 for unit in chosen) <= size:
                    break
            waiting = waiting[len(chosen) :]
            batches.append((self.fill(chosen, shape), chosen))
        return batches

    def _shape(self, prefix: int, width: int) -> Shape:
        units = max(self._budget // (prefix + self.share * width), 1) * self._shards
        return min(units, self._most_units), prefix, self.share, width

    def fill(self, units: Sequence[Unit], shape: Shape) -> TrainBatch:
        """Host arrays of one micro-batch of `shape`."""
        count, prefix, share, width = shape
        wide = lambda: np.zeros((count, share, width), np.float32)
        batch = TrainBatch(
            prefix=np.zeros((count, prefix), np.int32),
            prefix_length=np.zeros((count,), np.int32),
            last=np.zeros((count,), np.int32),
            completions=np.zeros((count, share, width), np.int32),
            length=np.zeros((count, share), np.int32),
            advantage=np.zeros((count, share), np.float32),
            weight=wide(),
            entropy_weight=np.zeros((count, share), np.float32),
            old_logprob=wide(),
            reference_logprob=wide(),
            sampler_logprob=wide(),
        )
        for i, unit in enumerate(units):
            before = len(unit.context) - 1
            batch.prefix[i, :before], batch.last[i] = unit.context[:-1], unit.context[-1]
            batch.prefix_length[i], batch.advantage[i] = before, unit.advantage
            for j, one in enumerate(unit.completions):
                n = len(one.tokens)
                batch.completions[i, j, :n], batch.length[i, j] = one.tokens, n
                batch.sampler_logprob[i, j, :n] = one.logprobs
                if unit.weight is not None:
                    batch.weight[i, j, :n] = unit.weight[j]
                    batch.entropy_weight[i, j] = unit.entropy_weight[j]
                if unit.old is not None:
                    batch.old_logprob[i, j, :n] = unit.old[j]
                if unit.reference is not None:
                    batch.reference_logprob[i, j, :n] = unit.reference[j]
        return batch
