"""Builds the input arrays of the sampler's programs from the host's record of each shard.

Where attention splits sequences, the shards of the host are parts of a group of devices (`Sizes.parts`). The programs
count the slots, lanes and pages of all parts of a group together.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from igrpo_jax.sampling.pages import pages_for
from igrpo_jax.sampling.shapes import WIDTH, Sizes
from igrpo_jax.sampling.state import Chunk, Fork, Rows

Item = TypeVar("Item")


class PromptChunk(NamedTuple):
    """Tokens of a prompt that are prefilled in one chunk."""

    lane: int
    tokens: np.ndarray  # [T] int32
    before: int  # tokens of the prompt that earlier chunks have prefilled
    pages: Sequence[int]  # of the prompt


class SlotAssignment(NamedTuple):
    """A sample of a prefilled prompt, and the slot that it takes."""

    lane: int  # of the prompt
    slot: int
    sample: int  # derives, with `prompt` and `key`, the key of the sample
    prompt: int
    key: np.ndarray  # [2] uint32, key data of the step and stage
    length: int  # tokens of the prompt
    limit: int  # most tokens to draw, at most max_completion
    copied: tuple[int, int] | None  # the prompt's partly filled last page, and the page that becomes its copy


def chunk(sizes: Sizes, size: int, pieces: Sequence[Sequence[PromptChunk]]) -> Chunk:
    """Returns a chunk of `size` tokens for each group with the `pieces` of its shards, in their order."""

    def placed(piece: PromptChunk, part: int) -> PromptChunk:
        pages = [page + part * sizes.pages for page in piece.pages]
        return piece._replace(lane=piece.lane + part * sizes.lanes, pages=pages)

    groups = len(pieces) // sizes.parts
    lanes, table_pages = sizes.parts * sizes.lanes, pages_for(sizes.longest_prompt, sizes.page_size)
    made = Chunk(
        tokens=np.zeros((groups, size), np.int32),
        length=np.ones((groups, lanes), np.int32),
        table=np.full((groups, lanes, table_pages), sizes.parts * sizes.pages, np.int32),
        start=np.zeros((groups, lanes + 1), np.int32),
        prompts=np.zeros((groups, 1), np.int32),
        lane=np.full((groups, lanes), lanes, np.int32),
    )
    for group, own in enumerate(_of_groups(sizes, pieces, placed)):
        ends = np.cumsum([0, *(len(piece.tokens) for piece in own)])
        made.start[group] = np.append(ends, [ends[-1]] * (lanes - len(own)))
        made.prompts[group] = len(own)
        for i, piece in enumerate(own):
            made.tokens[group, ends[i] : ends[i + 1]] = piece.tokens
            made.length[group, i] = piece.before + len(piece.tokens)
            made.table[group, i, : len(piece.pages)] = piece.pages
            made.lane[group, i] = piece.lane
    return made


def forks(sizes: Sizes, assignments: Sequence[Sequence[SlotAssignment]]) -> Iterator[Fork]:
    """Yields the `assignments` of each shard, up to WIDTH of a group at a time."""

    def placed(assignment: SlotAssignment, part: int) -> SlotAssignment:
        first, copied = part * sizes.pages, assignment.copied
        return assignment._replace(
            lane=assignment.lane + part * sizes.lanes,
            slot=assignment.slot + part * sizes.shard_slots,
            copied=copied and (copied[0] + first, copied[1] + first),
        )

    of_groups = _of_groups(sizes, assignments, placed)
    shape = len(of_groups), WIDTH
    for first in range(0, max(map(len, of_groups)), WIDTH):
        made = Fork(*(np.zeros(shape, np.int32) for _ in Fork._fields))._replace(key=np.zeros((*shape, 2), np.uint32))
        made.slot[:] = sizes.parts * sizes.shard_slots
        made.target[:] = sizes.parts * sizes.pages
        for group, own in enumerate(of_groups):
            for i, assignment in enumerate(own[first : first + WIDTH]):
                for name in ("lane", "slot", "sample", "prompt", "key", "length", "limit"):
                    getattr(made, name)[group, i] = getattr(assignment, name)
                if assignment.copied:
                    made.source[group, i], made.target[group, i] = assignment.copied
        yield made


def rows(
    sizes: Sizes,
    width: int,
    window_length: int,
    slots: Sequence[Sequence[int]],
    tables: Sequence[np.ndarray],
    min_active: Sequence[int],
    before: Sequence[dict[int, int]],
) -> tuple[Rows, list[dict[int, int]]]:
    """Returns the Rows of a dispatch, and for each group a map from each of its slots to the slot's row.

    Args:
        width: rows of a shard.
        window_length: positions of a row that attention may read.
        slots, tables, min_active: as in `Engine.decode`.
        before: for each group, the row of each slot whose window is up to date. Such a slot keeps its row.
    """
    groups, size, every = len(slots) // sizes.parts, width * sizes.parts, sizes.shard_slots * sizes.parts
    index = np.full((groups, size), every, np.int32)
    runs = np.zeros((groups, size), bool)
    table = np.zeros((groups, size, window_length // sizes.page_size), np.int32)
    stale, counts, held = np.zeros((groups, size), np.int32), np.zeros(groups, np.int32), []
    for group, own in enumerate(_of_groups(sizes, slots, lambda slot, part: slot + part * sizes.shard_slots)):
        # All slots are in their order, so that their states need no copy.
        kept = before[group]
        place = own if size == every else _places(own, kept, size)
        new = [row for slot, row in zip(own, place, strict=True) if slot not in kept]
        stale[group, : len(new)], counts[group] = new, len(new)
        held.append(dict(zip(own, place, strict=True)))
        index[group, place], runs[group, place] = own, True
        of_parts = tables[group * sizes.parts : (group + 1) * sizes.parts]
        pages = np.concatenate([of_part + part * sizes.pages for part, of_part in enumerate(of_parts)])
        table[group, place] = pages[own, : table.shape[2]]
    if size == every:
        index[:] = np.arange(size)
    # The parts of a group run in one program, which stops early by the sum of their active slots, not by each part's.
    fewest = [min(n, len(own)) for n, own in zip(min_active, slots, strict=True)]
    min_active_of_groups = np.reshape(fewest, (groups, -1)).sum(axis=1, dtype=np.int32)
    return Rows(index, runs, table, min_active_of_groups, stale, counts), held


def _places(slots: Sequence[int], kept: dict[int, int], size: int) -> list[int]:
    """Returns one of `size` rows for each of `slots`: that of `kept`, or else the first that is free."""
    taken = {kept[slot] for slot in slots if slot in kept}
    free = iter([row for row in range(size) if row not in taken])
    return [kept[slot] if slot in kept else next(free) for slot in slots]


def _of_groups(
    sizes: Sizes, of_shards: Sequence[Sequence[Item]], placed: Callable[[Item, int], Item]
) -> list[list[Item]]:
    """Returns the items of each group of devices: those of its parts, one part after another.

    Args:
        of_shards: the items of each shard, which is one part of a group.
        placed: takes an item and the number of its part, and returns the item with its slots, lanes and pages numbered
            as in the programs, over all parts of the group.
    """
    groups = (of_shards[first : first + sizes.parts] for first in range(0, len(of_shards), sizes.parts))
    return [[placed(item, part) for part, own in enumerate(group) for item in own] for group in groups]
