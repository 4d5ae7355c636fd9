"""Where each token of a packed sequence belongs."""

import numpy as np
import pytest

from igrpo_jax.models.segments import SPANS_BYTES, PrefixGroup, chunk_count, most_chunks, most_segments, pack, starts

SIZE = 256


def random_shard(rng, chunk):
    """Returns groups that fit SIZE packed tokens and their chunks; one in eight shards is padding alone."""
    groups, tokens, chunks = [], 0, 0
    while rng.random() < 7 / 8:
        group = PrefixGroup(int(rng.choice([0, 1, rng.integers(60)])), rng.integers(1, 40, rng.integers(5)).tolist())
        tokens += group.prefix + sum(group.completions)
        chunks += chunk_count(group, chunk)
        if tokens > SIZE or chunks > most_chunks(SIZE, chunk):
            break
        groups.append(group)
    return groups


def walk(groups):
    """Yields each segment, prefixes first: its tokens, and the tokens of the prefix that it continues."""
    places = []
    for group, (start, own) in zip(groups, starts(groups), strict=True):
        completions = [range(at, at + length) for at, length in zip(own, group.completions, strict=True)]
        places.append((range(start, start + group.prefix), completions))
    yield from ((prefix, range(0)) for prefix, _ in places)
    yield from ((own, prefix) for prefix, completions in places for own in completions)


@pytest.mark.parametrize("chunk", [1, 4, 32, 100])
def test_a_chain_holds_every_token_once_and_in_order(chunk):
    """Of random groups: the chunks of each segment, and the chunk that each continues."""
    rng = np.random.default_rng(chunk)
    shards = [random_shard(rng, chunk) for _ in range(8)]
    assert any(group.prefix and len(group.completions) > 1 for groups in shards for group in groups)
    chain = pack(shards, SIZE, chunk).chain
    for shard, groups in enumerate(shards):
        before = np.full(SIZE, SIZE)
        of_token = {}  # the chunk that ends with a token
        filled = 0
        for own, prefix in walk(groups):
            last = prefix[-1] if prefix else SIZE
            for token in own:
                before[token] = last
                last = token
            for at in range(0, len(own), chunk):
                tokens = own[at : at + chunk]
                assert chain.chunks[shard, filled].tolist() == [*tokens, *[SIZE] * (chunk - len(tokens))]
                continued = of_token.get(before[tokens[0]], chain.chunks.shape[1])
                assert chain.chunk_before[shard, filled] == continued
                assert continued < filled or continued == chain.chunks.shape[1]
                of_token[tokens[-1]] = filled
                filled += 1
        assert filled == sum(chunk_count(group, chunk) for group in groups)
        assert (chain.chunks[shard, filled:] == SIZE).all()
        assert (chain.chunk_before[shard, filled:] == chain.chunks.shape[1]).all()


def test_spans_hold_every_segment_once_and_of_each_group_who_reads_its_prefix():
    rng = np.random.default_rng(0)
    shards = [random_shard(rng, 4) for _ in range(8)]
    segments = pack(shards, SIZE, most=64)
    for shard, groups in enumerate(shards):
        spans = [
            [(int(start), int(start + length)) for start, length in zip(ranges.start[shard, :-1], own, strict=True)]
            for ranges in segments.spans
            for own in [ranges.length[shard]]
        ]
        counts = [int((ranges.length[shard] >= 0).sum()) for ranges in segments.spans]
        filled = [(own.start, own.stop) for own, _ in walk(groups) if own]
        assert sorted(spans[0][: counts[0]]) == sorted(filled)
        assert spans[0][: counts[0]] == sorted(filled)  # in the order of the packed sequence
        with_prefix = [group for group in groups if group.prefix]
        assert counts[1] == counts[2] == len(with_prefix)
        for (start, stop), (first, last), group in zip(spans[1], spans[2], with_prefix, strict=False):
            number = segments.segment[shard, first]
            assert (segments.segment[shard, first:last] == number).all() and last - first == group.prefix
            reads = np.flatnonzero((segments.parent[shard] == number) & (segments.segment[shard] != number))
            assert reads.tolist() == list(range(start, stop))
        for ranges, count in zip(segments.spans, counts, strict=True):
            assert (ranges.start[shard, count + 1 :] == -1).all() and (ranges.length[shard, count:] == -1).all()
            if count:
                assert ranges.start[shard, count] == ranges.start[shard, count - 1] + ranges.length[shard, count - 1]


@pytest.mark.parametrize("size", [64, 4096, 16384])
@pytest.mark.parametrize("width", [64, 1536, 8192])
def test_the_workspace_of_spans_is_bounded(size, width):
    most = most_segments(size, width)
    assert most == 4 or (8 * most * size * width <= SPANS_BYTES and most <= size / 16)
