"""The shapes that the programs of the sampler are compiled for: sizes of a run, rows and positions of a decode step,
and tokens that are prefilled at once.

Each shape is a program, which takes seconds to minutes to compile. Where attention reads pages in place, two to four
decode shapes serve all lengths. On a CPU, whose programs read about as many positions as are needed (`windows`), the
time of a decode step grows with the number of rows. Elsewhere it also grows with the number of positions that are
copied into windows. The few shapes that save the most time are chosen.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from igrpo_jax.distributed.programs import Cost, length_buckets
from igrpo_jax.models.costs import ModelCosts
from igrpo_jax.models.segments import BLOCK
from igrpo_jax.sampling.pages import pages_for

WIDTH = 16  # slots of a shard that one call starts, and slots that one call harvests; more take several calls
LANES = 8  # prompts of a shard that are being prefilled, or wait for slots of their samples, at most
MOST_DECODES = 13  # programs of decoding; with those of prefilling and the others no more than 20
# Extra work that a decode step may do to save a program: a fraction of its own, and the bytes of 0.1 ms on a CPU.
EXTRA_WORK_FRACTION = 0.1
EXTRA_WORK_BYTES = 5e6
# Measured on a CPU: FLOPs of a product in the time of a byte of memory traffic; the fixed time of a sublayer, in bytes
# of memory traffic; the time of a product with one row over that of one with two rows.
CPU_BALANCE = 8
CPU_SUBLAYER = 5e5
ONE_ROW_TIME_RATIO = 0.75


@dataclass(frozen=True)
class Sizes:
    """What the programs of a sampler are compiled for."""

    shard_slots: int  # slots of each shard of the batch (B), or of each part of one
    pages: int  # pages of each shard, or of each part
    page_size: int  # positions of a page
    length: int  # most tokens of a prompt and its completion
    longest_prompt: int  # tokens of the longest prompt
    max_completion: int  # most tokens of a completion (M)
    steps_per_dispatch: int  # decode steps of one call at most (K)
    prefill_chunk: int  # tokens of a shard that are prefilled at once, at most
    parts: int = 1  # of a shard, with slots, lanes and pages of their own: those of `DecoderConfig.row_parts`
    memory: float | None = None  # bytes of each device that bound the number of pages; None = nothing does

    @property
    def lanes(self) -> int:
        """Lanes of each part."""
        return min(max(1, LANES // self.parts), self.shard_slots)

    @property
    def slot_pages(self) -> int:
        """Most pages of a slot."""
        return pages_for(self.length, self.page_size)

    @property
    def least_pages(self) -> int:
        """The pages with which one sample can always be drawn: its own, and its prompt's partly filled one."""
        return self.slot_pages + 1

    @property
    def most_pages(self) -> int:
        """The pages of all slots where none are shared, and a partly filled one of each lane."""
        return self.shard_slots * self.slot_pages + self.lanes


def decode_shapes(sizes: Sizes, costs: ModelCosts, platform: str, reads_pages: bool) -> dict[int, tuple[int, ...]]:
    """Returns the lengths of decode's windows, by the number of rows of a part, fewest rows first.

    Args:
        platform: "cpu", "gpu" or "tpu".
        reads_pages: whether attention reads pages where they lie: the only length is the longest then, as on a CPU.
    """
    length, slots = sizes.slot_pages * sizes.page_size, sizes.shard_slots
    if reads_pages:  # one program of few rows; on GPUs, which compile one in seconds, some between
        halvings = (0, 1, 2, 3) if platform == "gpu" else (0, 3)
        return dict.fromkeys(sorted({slots >> i for i in halvings} - {0}), (length,))
    if platform == "cpu":
        lengths: dict[int, tuple[int, ...]] = dict.fromkeys(_row_counts(slots), (length,))
    else:
        lengths = {slots >> 3: (length,), slots: tuple(max(1, length >> i) for i in (2, 1, 0))}
    shapes = [
        (rows, window_length)
        for rows, of_rows in lengths.items()
        if rows
        for window_length in dict.fromkeys(pages_for(each, sizes.page_size) * sizes.page_size for each in of_rows)
    ]
    of_cost = _work(costs, platform)
    work = [of_cost(costs.decode(*shape)) for shape in shapes]
    if platform == "cpu":
        work = [ONE_ROW_TIME_RATIO * one if rows == 1 else one for (rows, _), one in zip(shapes, work, strict=True)]
    kept = _worthwhile(shapes, work)
    return {rows: tuple(sorted(each for n, each in kept if n == rows)) for rows in sorted({n for n, _ in kept})}


def _row_counts(slots: int) -> list[int]:
    """Returns numbers of rows for a CPU: all slots, and below from 8 on multiples of 8: 12 take as long as 16."""
    return sorted({rows for rows in (1, 2, 4, 8, *length_buckets(slots, 16)) if rows < slots} | {slots})


def chunk_sizes(sizes: Sizes, platform: str) -> tuple[int, ...]:
    """Returns numbers of tokens of a chunk, multiples of BLOCK: one, or on a CPU some, because padding costs there."""
    longest = min(sizes.prefill_chunk, sizes.parts * sizes.lanes * sizes.longest_prompt)
    largest = -(-longest // BLOCK) * BLOCK
    smaller = itertools.takewhile(lambda size: size < largest, (BLOCK << 2 * i for i in range(16)))
    return (*smaller, largest) if platform == "cpu" else (largest,)


def next_chunks(chunks: Sequence[int], costs: ModelCosts, platform: str) -> list[int]:
    """Returns the size of the next chunk, indexed by the number of tokens to prefill, from 0 to the largest size.

    It minimises the total work of this chunk and all later ones; of several minima it is the largest size.

    Args:
        chunks: the sizes that there are, smallest first.
    """
    of_cost = _work(costs, platform)
    work = {size: round(of_cost(costs.prefill(size))) for size in reversed(chunks)}
    least, chosen = [0], [chunks[0]]
    for to_prefill in range(1, chunks[-1] + 1):
        together = {size: work[size] + least[max(0, to_prefill - size)] for size in work}
        chosen.append(min(together, key=together.__getitem__))
        least.append(together[chosen[-1]])
    return chosen


def _work(costs: ModelCosts, platform: str) -> Callable[[Cost], float]:
    """Returns a function from the cost of a call to its approximate time, in bytes of memory traffic."""
    if platform != "cpu":
        return lambda cost: cost.bytes  # sampling waits only for memory
    sublayers = len(costs.cfg.pattern) * CPU_SUBLAYER
    return lambda cost: cost.bytes + cost.flops / CPU_BALANCE + sublayers


def _hardly_more(work: np.ndarray) -> np.ndarray:
    """Returns the work that each decode step may do instead of its own, to save a program."""
    return work * (1 + EXTRA_WORK_FRACTION) + EXTRA_WORK_BYTES


def _worthwhile(shapes: Sequence[tuple[int, int]], work: Sequence[float]) -> list[tuple[int, int]]:
    """Returns those of `shapes`, which are (rows, window length), that are worth a program.

    A shape without a program is served by the one of least work among those with at least as many rows and as long
    windows. One after another, the shape is dropped that adds least to the total work, with all shapes taken as equally
    frequent: any shape while more than MOST_DECODES are left, and then only one without which no decode step does more
    work than `_hardly_more`. The shape of the longest windows is dropped after all others with the same number of rows.

    Args:
        work: the work of a decode step of each shape.
    """
    (rows, lengths), own = np.array(shapes).T, np.array(work)
    does = np.where((rows >= rows[:, None]) & (lengths >= lengths[:, None]), own, np.inf)  # [shape, the one that runs]
    kept, most = np.ones(len(shapes), bool), _hardly_more(own)
    while True:
        options = []
        for i in np.flatnonzero(kept):
            left = kept & (np.arange(len(kept)) != i)
            if lengths[i] < lengths.max() or not left[rows == rows[i]].any():
                least = np.where(left, does, np.inf).min(axis=1)
                options.append((least.sum(), (least <= most).all(), i))
        if kept.sum() <= MOST_DECODES:
            options = [option for option in options if option[1]]
        if not options:
            return [shape for shape, is_kept in zip(shapes, kept, strict=True) if is_kept]
        kept[min(options)[2]] = False
