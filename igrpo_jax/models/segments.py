"""Where each token of a packed sequence belongs: prefixes and completions of many groups lie in it without padding.

A segment is a prefix, or a completion that continues one. A token reads the tokens of its own segment up to itself, and
all tokens of the prefix that its segment continues. What works on single tokens needs to know nothing of this. What
mixes positions does: attention reads `blocks`, which says of each pair of blocks whether it can be left out, or
`spans`, and Mamba-2 reads `chain`.

`pack` makes these arrays on the host. The completions come before all prefixes, so that what is only wanted of
completions, such as their log-probs, is at the start of the packed sequence.

Legend: S shards of the batch, F tokens of the packed sequence, T queries, E keys, I and J blocks of BLOCK tokens, N
chunks of C tokens, M segments.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

# Tokens of a block; F is a multiple of it. On CPU, attention by blocks of 64 takes 0.55 to 0.8 of the time of blocks of
# 128, and about that of blocks of 32. Kernels read several blocks as one.
BLOCK = 64
KV_AXES = ("batch", "kv_heads", "time", "head_dim")  # of the keys and values of packed sequences
# cuDNN's gradient takes two float32 copies of all queries for each segment; this many bytes at most.
SPANS_BYTES = 6 << 30
SHORTEST = 16  # tokens: the shortest mean length of segments that the spans of a full one have space for


class Chain(NamedTuple):
    """The order in which the tokens of a packed sequence follow each other, for mixers whose state passes along it.

    Chunks hold neighbouring tokens of one segment each, those of prefixes come before those of completions, and chunks
    without tokens come at the end. The first chunk of a completion continues the last chunk of its prefix.
    """

    chunks: np.ndarray  # [S, N, C] int32, the tokens of each chunk in their order; F where there is none
    chunk_before: np.ndarray  # [S, N] int32, the chunk whose final state a chunk continues; N where there is none


class Ranges(NamedTuple):
    """Parts of a packed sequence that follow one another, perhaps with gaps."""

    start: np.ndarray  # [S, M + 1] int32, the first token of each, then the end of the last one; -1 from there on
    length: np.ndarray  # [S, M] int32, tokens of each; -1 if there is none


class Spans(NamedTuple):
    """The segments as ranges, for a kernel that takes these instead of a mask."""

    segments: Ranges  # of which each token reads its own up to itself
    readers: Ranges  # of each prefix group that has a prefix, all its completions
    prefixes: Ranges  # which they read whole


class Segments(NamedTuple):
    """The segments of a packed sequence."""

    segment: np.ndarray  # [S, F] int32, number of each token's segment from 1; 0 = padding
    parent: np.ndarray  # [S, F] int32, the prefix that the segment continues; that of a prefix is itself
    position: np.ndarray  # [S, F] int32, of each token in its text, the prefix included
    blocks: np.ndarray  # [S, I, J] bool, whether a query of block i reads a key of block j
    chain: Chain | None  # None if the model has no Mamba-2 sublayer
    spans: Spans | None = None  # None where attention does not read them


class PrefixGroup(NamedTuple):
    """Tokens that belong together: a prefix, which may be empty, and the completions that continue it."""

    prefix: int  # tokens
    completions: Sequence[int]  # tokens of each

    @property
    def tokens(self) -> int:
        """Tokens of all of them."""
        return self.prefix + sum(self.completions)


def chunk_count(group: PrefixGroup, chunk: int) -> int:
    """Returns the chunks of `chunk` tokens that a prefix group fills, each with tokens of one segment."""
    return sum(-(-length // chunk) for length in (group.prefix, *group.completions))


def most_chunks(size: int, chunk: int) -> int:
    """Returns N for `size` packed tokens: twice the chunks of one segment, so that many may be partly filled."""
    return 2 * -(-size // chunk)


def most_segments(size: int, width: int) -> int:
    """Returns M for `size` packed tokens with `width` query features on one device, N H."""
    return max(4, min(size // SHORTEST, SPANS_BYTES // (8 * size * width)))


def pack(
    shards: Sequence[Sequence[PrefixGroup]], size: int, chunk: int | None = None, most: int | None = None
) -> Segments:
    """Returns the segments of packed sequences of `size` tokens that hold the given prefix groups, in order.

    Args:
        shards: the prefix groups of each shard. Together they have at most `size` tokens, and at most `most_chunks`
            chunks where `chunk` is given, and at most `most` segments.
        size: F, a multiple of BLOCK.
        chunk: tokens of a chunk of Mamba-2, C; None = the model has no such sublayer.
        most: M of the spans, at least 4; None = attention does not read them.
    """
    packed = [_pack_shard(groups, size, chunk, most) for groups in shards]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *packed)


def starts(groups: Sequence[PrefixGroup]) -> list[tuple[int, list[int]]]:
    """Returns where the prefix and the completions of each prefix group begin in the sequence that `pack` packs."""
    at, of_completions = 0, []
    for group in groups:
        ends = np.cumsum([at, *group.completions]).tolist()
        of_completions.append(ends[:-1])
        at = ends[-1]
    of_prefixes = np.cumsum([at, *(group.prefix for group in groups)]).tolist()
    return list(zip(of_prefixes, of_completions, strict=False))


def _pack_shard(groups: Sequence[PrefixGroup], size: int, chunk: int | None, most: int | None) -> Segments:
    segment, parent, position = (np.zeros(size, np.int32) for _ in range(3))
    blocks = np.zeros((size // BLOCK, size // BLOCK), bool)
    number = 0
    for group, (prefix_start, completion_starts) in zip(groups, starts(groups), strict=True):
        prefix = slice(prefix_start, prefix_start + group.prefix)
        number += 1
        prefix_number = number
        segment[prefix], parent[prefix] = number, number
        position[prefix] = np.arange(group.prefix)
        _mark_causal(blocks, prefix)
        for start, length in zip(completion_starts, group.completions, strict=True):
            own = slice(start, start + length)
            number += 1
            segment[own], parent[own] = number, prefix_number
            position[own] = group.prefix + np.arange(length)
            _mark_causal(blocks, own)
            _mark(blocks, own, prefix)
    chain = None if chunk is None else _chain(groups, size, chunk)
    spans = None if most is None else _spans(groups, most)
    return Segments(segment, parent, position, blocks, chain, spans)


def _spans(groups: Sequence[PrefixGroup], most: int) -> Spans:
    completions, readers, prefixes = [], [], []
    for group, (prefix, of_completions) in zip(groups, starts(groups), strict=True):
        own = [part for part in zip(of_completions, group.completions, strict=True) if part[1]]
        completions += own
        if group.prefix:
            prefixes.append((prefix, group.prefix))
            readers.append((own[0][0], sum(group.completions)) if own else (prefix, 0))
    return Spans(_ranges([*completions, *prefixes], most), _ranges(readers, most // 2), _ranges(prefixes, most // 2))


def _ranges(parts: Sequence[tuple[int, int]], most: int) -> Ranges:
    """Returns parts of a packed sequence, each with its start and its tokens, as Ranges of one shard."""
    start, length = np.full(most + 1, -1, np.int32), np.full(most, -1, np.int32)
    for i, part in enumerate(parts):
        start[i], length[i] = part
    if parts:
        start[len(parts)] = sum(parts[-1])
    return Ranges(start, length)


def _touched(part: slice) -> slice:
    """Returns the blocks that hold tokens of `part`."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK) if part.stop > part.start else part.start // BLOCK)


def _mark(blocks: np.ndarray, queries: slice, keys: slice) -> None:
    """Notes in `blocks` that all `queries` read all `keys`."""
    blocks[_touched(queries), _touched(keys)] = True


def _mark_causal(blocks: np.ndarray, own: slice) -> None:
    """Notes in `blocks` that each token of a segment reads those up to itself."""
    touched = blocks[_touched(own), _touched(own)]
    touched |= np.tri(len(touched), dtype=bool)


def _chain(groups: Sequence[PrefixGroup], size: int, chunk: int) -> Chain:
    count = most_chunks(size, chunk)
    chunks, chunk_before = np.full((count, chunk), size, np.int32), np.full(count, count, np.int32)
    used = 0

    def add(start: int, length: int, last: int) -> int:
        """Adds a segment that continues the chunk `last`; returns its last chunk, or `last` where it is empty."""
        nonlocal used
        for at in range(start, start + length, chunk):
            tokens = np.arange(at, min(at + chunk, start + length))
            chunks[used, : len(tokens)], chunk_before[used] = tokens, last
            last, used = used, used + 1
        return last

    places = starts(groups)
    lasts = [add(start, group.prefix, count) for group, (start, _) in zip(groups, places, strict=True)]
    for group, (_, of_completions), last in zip(groups, places, lasts, strict=True):
        for own, length in zip(of_completions, group.completions, strict=True):
            add(own, length, last)
    return Chain(chunks, chunk_before)


def readable(
    segment: jax.Array, position: jax.Array, parent: jax.Array, key_segment: jax.Array, key_position: jax.Array
) -> jax.Array:
    """Returns whether each query reads each key, [..., T, E] bool.

    Args:
        segment, position, parent: [..., T] int32, of queries.
        key_segment, key_position: [..., E] int32, of keys.
    """
    keys = key_segment[..., None, :]
    same_group = (keys == segment[..., None]) | (keys == parent[..., None])
    return same_group & (key_position[..., None, :] <= position[..., None]) & (keys > 0)


def dense_mask(segments: Segments) -> jax.Array:
    """Returns whether each token reads each other token, [S, F, F] bool."""
    own = segments.segment, segments.position
    return readable(*own, segments.parent, *own)
