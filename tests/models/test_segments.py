"""Where each token of a packed axis belongs."""

import numpy as np
import pytest

from igrpo_jax.models.segments import Family, chunk_count, most_chunks, pack, starts

SIZE = 256


def random_shard(rng, chunk):
    """Returns families that fit an axis of SIZE tokens and its chunks; one in eight shards is padding alone."""
    families, tokens, chunks = [], 0, 0
    while rng.random() < 7 / 8:
        family = Family(int(rng.choice([0, 1, rng.integers(60)])), rng.integers(1, 40, rng.integers(5)).tolist())
        tokens += family.prefix + sum(family.completions)
        chunks += chunk_count(family, chunk)
        if tokens > SIZE or chunks > most_chunks(SIZE, chunk):
            break
        families.append(family)
    return families


def walk(families):
    """Yields each segment, prefixes first: its tokens, and the tokens of the prefix that it continues."""
    places = []
    for family, (start, own) in zip(families, starts(families), strict=True):
        completions = [range(at, at + length) for at, length in zip(own, family.completions, strict=True)]
        places.append((range(start, start + family.prefix), completions))
    yield from ((prefix, range(0)) for prefix, _ in places)
    yield from ((own, prefix) for prefix, completions in places for own in completions)


@pytest.mark.parametrize("chunk", [1, 4, 32, 100])
def test_a_chain_holds_every_token_once_and_in_order(chunk):
    """Of random families: the chunks of each segment, and the chunk that each continues."""
    rng = np.random.default_rng(chunk)
    shards = [random_shard(rng, chunk) for _ in range(8)]
    assert any(family.prefix and len(family.completions) > 1 for families in shards for family in families)
    chain = pack(shards, SIZE, chunk).chain
    for shard, families in enumerate(shards):
        before = np.full(SIZE, SIZE)
        of_token = {}  # the chunk that ends with a token
        filled = 0
        for own, prefix in walk(families):
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
        assert filled == sum(chunk_count(family, chunk) for family in families)
        assert (chain.chunks[shard, filled:] == SIZE).all()
        assert (chain.chunk_before[shard, filled:] == chain.chunks.shape[1]).all()
