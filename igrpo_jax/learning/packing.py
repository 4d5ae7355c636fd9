"""Packs the groups of a step into micro-batches of real tokens.

1. A unit is a context with completions of its group: all of them, or an equal part where there would be fewer
   units than shards of the batch or minibatches.
2. Token weights are computed on all rows of an optimizer step, so that micro-batches are plain addition.
3. A micro-batch is one packed sequence per shard: the completions of its units one after another, then their contexts,
   each once. `micro_shapes` says how few lengths of it there are.
4. The micro-batches are the first choice of `micro_shapes` that holds all units. Units are placed from the longest to
   the shortest, each where the most space is left, so that shards have equal work. If some find no place, all are
   placed again where the least space is left (best fit).

All of this is done on the host, with numpy only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from igrpo_jax.learning import objectives
from igrpo_jax.learning.micro_shapes import MicroShapes
from igrpo_jax.models import segments
from igrpo_jax.models.segments import PrefixGroup, Segments
from igrpo_jax.records import Completion, Group


@dataclass
class Unit:
    """A context and completions that share it, with what the loss reads of each completion."""

    context: np.ndarray  # [L] int32
    completions: tuple[Completion, ...]  # G
    advantage: np.ndarray  # [G] float32
    shaped: bool = False  # the tokens enter the loss as p / (p + credit_gamma), because another context sampled them
    weight: np.ndarray | None = None  # [G] float32, weight of every token of a completion; set per optimizer step
    entropy_weight: np.ndarray | None = None  # [G] float32, weight of every token's entropy; set per optimizer step
    old: list[np.ndarray] | None = None  # log pi_old, [T_i] float32 each; None until rescored
    reference: list[np.ndarray] | None = None  # log pi_ref, [T_i] float32 each; None until rescored

    @property
    def stage(self) -> str:
        """The stage of its completions: "refine" or "verify", or "draft" with algorithm.train_drafts."""
        return self.completions[0].stage

    @property
    def tokens(self) -> int:
        """Tokens that the learner runs."""
        return len(self.context) - 1 + sum(len(completion.tokens) for completion in self.completions)


class Piece(NamedTuple):
    """Completions `start` to `stop` of a unit, placed on one shard with their own copy of the context."""

    unit: Unit
    start: int
    stop: int

    @property
    def prefix_group(self) -> PrefixGroup:
        """The tokens of its context, without the last one, and of its completions."""
        completions = self.unit.completions[self.start : self.stop]
        return PrefixGroup(len(self.unit.context) - 1, [len(completion.tokens) for completion in completions])


class TrainBatch(NamedTuple):
    """The arrays of a micro-batch on S shards of F tokens; see `models.segments` for what lies where.

    A context is split into its last token, whose state predicts the first token of a completion, and all before it. So
    a completion's segment begins with the last token of the context and lacks its own last token.
    """

    tokens: np.ndarray  # [S, F] int32
    targets: np.ndarray  # [S, F] int32, the token of a completion that each token predicts; 0 off the completions
    segments: Segments
    completion_tokens: np.ndarray  # [] int32, the tokens of completions on the shard with the most of them
    mask: np.ndarray  # [S, F] bool, where a completion's token is predicted; all below are 0 elsewhere
    advantage: np.ndarray  # [S, F] float32
    weight: np.ndarray  # [S, F] float32 token weights of the whole optimizer step
    entropy_weight: np.ndarray  # [S, F] float32, of each token's entropy; read where entropy_coef > 0
    old_logprob: np.ndarray  # [S, F] float32 log pi_old; read where off-policy
    reference_logprob: np.ndarray  # [S, F] float32 log pi_ref; read where beta > 0
    sampler_logprob: np.ndarray  # [S, F] float32, of the sampler that drew the tokens
    shaped: np.ndarray | None = None  # [S, F] bool, see `Unit`; None where credit_gamma = 0


class Space(NamedTuple):
    """What a prefix group needs, or a packed sequence has left; chunks and segments are 0 if not limited."""

    tokens: int
    chunks: int
    segments: int

    def fits(self, left: "Space") -> bool:
        """Returns whether `left` has as much."""
        return all(own <= space for own, space in zip(self, left, strict=True))

    def minus(self, taken: "Space") -> "Space":
        """Returns what is left when `taken` is gone."""
        return Space(*(own - part for own, part in zip(self, taken, strict=True)))


@dataclass(frozen=True)
class MicroBatch:
    """The pieces that are placed on each shard of a micro-batch."""

    size: int  # F, tokens of the packed sequence of a shard
    shards: list[list[Piece]]  # S

    @property
    def padded_tokens(self) -> int:
        """Number of tokens that its program runs on all shards, padding included."""
        return self.size * len(self.shards)

    def places(self) -> Iterator[tuple[int, int, Unit, int]]:
        """Yields (shard, start of its segment, unit, number within the unit) for each completion."""
        for shard, pieces in enumerate(self.shards):
            starts = segments.starts([piece.prefix_group for piece in pieces])
            for piece, (_, of_completions) in zip(pieces, starts, strict=True):
                for i, start in enumerate(of_completions, piece.start):
                    yield shard, start, piece.unit, i


class Packer:
    """Cuts the groups of a step for one objective, mesh and choice of shapes.

    Args:
        chunk: tokens of a chunk of Mamba-2; None = the model has no such sublayer.
        width: query features of a sublayer on one device, where attention reads spans; None if it does not.
    """

    def __init__(
        self,
        objective: objectives.ResolvedObjective,
        shapes: MicroShapes,
        chunk: int | None,
        width: int | None,
    ):
        self.shapes = shapes
        self._objective = objective
        self._chunk = chunk
        self._width = width

    def units(self, groups: Sequence[Group], advantages: Sequence[np.ndarray]) -> list[Unit]:
        """Returns the units of `groups`, in their order.

        With algorithm.refine_credit = "plain" their context is the plain prompt, whatever they were sampled with.

        Args:
            advantages: advantages of the completions of each group, [G] float32.
        """
        units, size = [], self.shapes.completions_per_unit
        for group, advantage in zip(groups, advantages, strict=True):
            context = group.prompt.tokens if self._objective.plain_credit else group.context
            shaped = self._objective.credit_gamma > 0 and group.kept is not None
            for start in range(0, len(group.completions), size):
                part = slice(start, start + size)
                units.append(Unit(context, group.completions[part], advantage[part], shaped))
        return units

    def set_weights(self, units: Sequence[Unit]) -> None:
        """Gives the units of one optimizer step the weights of their tokens."""
        completions = [completion for unit in units for completion in unit.completions]
        lengths = np.array([len(completion.tokens) for completion in completions])
        finished = np.array([completion.finished for completion in completions])
        weights = objectives.row_weights(self._objective, lengths, finished, self.shapes.max_completion)
        entropy_weights = objectives.entropy_weights(self._objective, lengths, finished)
        # Every unit has exactly completions_per_unit completions, because that number divides every group
        # (`MicroShapes`).
        size = self.shapes.completions_per_unit
        for i, unit in enumerate(units):
            unit.weight = weights[i * size : (i + 1) * size]
            unit.entropy_weight = entropy_weights[i * size : (i + 1) * size]

    def micro_batches(self, units: Sequence[Unit]) -> list[MicroBatch]:
        """Returns the micro-batches of the first choice that holds all `units`; the largest first."""
        pieces = sorted(self._pieces(units), key=lambda piece: piece.prefix_group.tokens, reverse=True)
        if not pieces:
            return []
        groups = [piece.prefix_group for piece in pieces]
        needs = [self._needs(group) for group in groups]
        choices = self.shapes.choices(sum(needed.tokens for needed in needs))
        # choices never ends, but this loop does: at the latest when there is a full micro-batch for each piece.
        for sizes in choices:
            packed = [size for size in sizes for _ in range(self.shapes.shards)]
            places = self._places(needs, packed, max) or self._places(needs, packed, min)
            if places:
                break
        bins: list[list[Piece]] = [[] for _ in packed]
        for piece, place in zip(pieces, places, strict=True):
            bins[place].append(piece)
        by_batch = (bins[i : i + self.shapes.shards] for i in range(0, len(bins), self.shapes.shards))
        return [MicroBatch(size, shards) for size, shards in zip(sizes, by_batch, strict=True)]

    def leading(self, units: Sequence[Unit]) -> MicroBatch:
        """Returns a full micro-batch with the first of `units`, as many as one shard of it holds."""
        pieces: list[Piece] = []
        left = self._space(self.shapes.largest)
        for unit in units:
            piece = Piece(unit, 0, len(unit.completions))
            needed = self._needs(piece.prefix_group)
            if not needed.fits(left):
                break
            left = left.minus(needed)
            pieces.append(piece)
        return MicroBatch(self.shapes.largest, [pieces, *([] for _ in range(self.shapes.shards - 1))])

    def _pieces(self, units: Sequence[Unit]) -> Iterator[Piece]:
        """Yields the units, cut where one has more tokens than the longest packed sequence."""
        for unit in units:
            start = 0
            for stop in range(1, len(unit.completions) + 1):
                if stop - start > 1 and not self._fits(Piece(unit, start, stop).prefix_group):
                    yield Piece(unit, start, stop - 1)
                    start = stop - 1
            yield Piece(unit, start, len(unit.completions))

    def _fits(self, group: PrefixGroup) -> bool:
        return self._needs(group).fits(self._space(self.shapes.largest))

    def _needs(self, group: PrefixGroup) -> Space:
        """Returns what a prefix group takes of a packed sequence."""
        chunks = segments.chunk_count(group, self._chunk) if self._chunk else 0
        return Space(group.tokens, chunks, 1 + len(group.completions) if self._width else 0)

    def _space(self, size: int) -> Space:
        """Returns what a packed sequence of `size` tokens has."""
        chunks = segments.most_chunks(size, self._chunk) if self._chunk else 0
        return Space(size, chunks, segments.most_segments(size, self._width) if self._width else 0)

    def _places(self, needs: Sequence[Space], sizes: Sequence[int], choose: Callable) -> list[int] | None:
        """Returns in which of the packed sequences of these `sizes` each piece lies; None if a piece finds no place.

        Args:
            needs: what each piece takes.
            choose: `max` puts each piece where the most space is left, `min` where the least is.
        """
        places = []
        left = [self._space(size) for size in sizes]
        for needed in needs:
            fitting = [i for i, space in enumerate(left) if needed.fits(space)]
            if not fitting:
                return None
            place = choose(fitting, key=lambda i: left[i].tokens)
            places.append(place)
            left[place] = left[place].minus(needed)
        return places

    def fill(self, batch: MicroBatch) -> TrainBatch:
        """Returns the host arrays of a micro-batch."""
        most = segments.most_segments(batch.size, self._width) if self._width else None
        return fill(batch, self._chunk, most, has_shaped=self._objective.credit_gamma > 0)

    def empty(self, size: int) -> TrainBatch:
        """Returns the arrays of a micro-batch of padding, for their shapes and dtypes."""
        return self.fill(MicroBatch(size, [[] for _ in range(self.shapes.shards)]))


def fill(batch: MicroBatch, chunk: int | None, most: int | None = None, has_shaped: bool = False) -> TrainBatch:
    """Returns the host arrays of a micro-batch.

    Args:
        chunk, most: as for `segments.pack`.
        has_shaped: whether `shaped` is wanted.
    """
    of_tokens = lambda dtype: np.zeros((len(batch.shards), batch.size), dtype)
    groups = [[piece.prefix_group for piece in pieces] for pieces in batch.shards]
    arrays = TrainBatch(
        tokens=of_tokens(np.int32),
        targets=of_tokens(np.int32),
        segments=segments.pack(groups, batch.size, chunk, most),
        completion_tokens=np.array(max(sum(sum(group.completions) for group in shard) for shard in groups), np.int32),
        mask=of_tokens(bool),
        advantage=of_tokens(np.float32),
        weight=of_tokens(np.float32),
        entropy_weight=of_tokens(np.float32),
        old_logprob=of_tokens(np.float32),
        reference_logprob=of_tokens(np.float32),
        sampler_logprob=of_tokens(np.float32),
        shaped=of_tokens(bool) if has_shaped else None,
    )
    for shard, pieces in enumerate(batch.shards):
        for piece, (start, _) in zip(pieces, segments.starts(groups[shard]), strict=True):
            context = piece.unit.context
            arrays.tokens[shard, start : start + len(context) - 1] = context[:-1]
    for shard, start, unit, i in batch.places():
        _fill_completion(arrays, (shard, slice(start, start + len(unit.completions[i].tokens))), unit, i)
    return arrays


def _fill_completion(arrays: TrainBatch, at: tuple[int, slice], unit: Unit, i: int) -> None:
    """Writes completion `i` of a unit to the place `at` of the arrays."""
    completion = unit.completions[i]
    arrays.tokens[at] = [unit.context[-1], *completion.tokens[:-1]]
    arrays.targets[at], arrays.mask[at] = completion.tokens, True
    arrays.advantage[at], arrays.sampler_logprob[at] = unit.advantage[i], completion.logprobs
    if arrays.shaped is not None:
        arrays.shaped[at] = unit.shaped
    if unit.weight is not None:
        arrays.weight[at], arrays.entropy_weight[at] = unit.weight[i], unit.entropy_weight[i]
    if unit.old is not None:
        arrays.old_logprob[at] = unit.old[i]
    if unit.reference is not None:
        arrays.reference_logprob[at] = unit.reference[i]
