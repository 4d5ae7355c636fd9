"""Which blocks a kernel visits in a packed sequence: those that hold what is read, and few others."""

import jax.numpy as jnp
import numpy as np
import pytest

from igrpo_jax.models import segments as packed
from igrpo_jax.models import splash, visits
from igrpo_jax.models.segments import PrefixGroup
from igrpo_jax.models.visits import Lengths, Visits


def arrays(groups, size):
    """segment, parent and blocks of one packed sequence."""
    segments = packed.pack([groups], size)
    return tuple(jnp.asarray(x[0]) for x in (segments.segment, segments.parent, segments.blocks))


def random_groups(rng, size):
    """Groups that fill a packed sequence of `size` tokens at most, of many short segments or of a few long ones."""
    groups, longest = [], rng.choice([4, 60, 400])
    while True:
        group = PrefixGroup(
            rng.integers(0, rng.choice([2, 300])), rng.integers(0, longest, rng.integers(1, 9)).tolist()
        )
        size -= group.tokens
        if size < 0 or len(groups) == 60:
            return groups
        groups.append(group)


@pytest.mark.parametrize("block", [128, 256, 512])
def test_they_hold_what_is_read(block):
    """What ids, intervals and visits together let the kernel read is the mask, and each key is read once."""
    rng, size = np.random.default_rng(block), 1024
    for _ in range(8):
        groups = random_groups(rng, size)
        segment, parent, blocks = arrays(groups, size)
        needed = visits.visits(segment, parent, blocks, block)
        assert visits.fit(needed, visits.lengths(size // block)[1])
        query_ids, *key_ids = splash._ids(segment, parent)
        read = splash._reads(size)(splash._intervals(segment)[:, None], jnp.arange(2 * size))
        read &= query_ids[:, None] == jnp.concatenate(key_ids)
        read &= jnp.repeat(jnp.repeat(jnp.concatenate(needed, axis=1), block, axis=0), block, axis=1)
        expected = packed.dense_mask(packed.pack([groups], size))[0]
        np.testing.assert_array_equal(read.reshape(size, 2, size).sum(axis=1), expected)


def test_blocks_out_of_sight_are_not_visited():
    """Two groups with two blocks of completions and one of prefix each: [c c C C p P]."""
    needed = visits.visits(*arrays([PrefixGroup(128, [128, 128]), PrefixGroup(128, [256])], 768), 128)
    assert np.argwhere(needed.own).tolist() == [[0, 0], [1, 1], [2, 2], [3, 2], [3, 3], [4, 4], [5, 5]]
    assert np.argwhere(needed.prefix).tolist() == [[0, 4], [1, 4], [2, 5], [3, 5]]


@pytest.mark.parametrize("queries", [1, 2, 3, 8])
def test_each_visit_is_one_of_a_piece(queries):
    rng = np.random.default_rng(queries)
    prefix = rng.random((8, 8)) < rng.random(8)
    pieces = int(sum(-(-prefix.sum(axis=0) // queries)))
    block_of, visited = (np.asarray(x) for x in visits.divide(jnp.asarray(prefix), Lengths(pieces, 8, queries)))
    assert visited.sum(axis=0).max() <= queries and visited.any(axis=0).all()
    found = np.zeros((8, 8), int)
    for i, piece in np.argwhere(visited):
        found[i, block_of[piece]] += 1
    np.testing.assert_array_equal(found, prefix)


def test_pieces_that_are_not_needed_are_not_visited():
    prefix = jnp.array([[0, 1, 0], [0, 1, 0], [0, 1, 0]], bool)
    block_of, visited = visits.divide(prefix, Lengths(pieces=4, keys=2, queries=2))
    assert block_of[:2].tolist() == [1, 1] and block_of.max() <= 2
    assert visited.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("short", ["keys", "queries", "pieces"])
def test_what_does_not_fit(short):
    own, prefix = [[1, 0, 0], [0, 1, 0], [0, 1, 1]], [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
    needed = Visits(jnp.array(own, bool), jnp.array(prefix, bool))
    given = Lengths(pieces=2, keys=2, queries=2)
    assert visits.fit(needed, given)
    assert not visits.fit(needed, given._replace(**{short: getattr(given, short) - 1}))


def test_a_row_repeats_its_last():
    visited = jnp.array([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    following, exists = visits.listed(visited, 3)
    assert following.tolist() == [[1, 3, 3], [0, 0, 0], [0, 0, 0]]
    assert exists.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("size, mean, longest, prompt", [(16384, 800, 4096, 300), (32768, 800, 4096, 1300)])
def test_short_loops_are_enough_for_usual_lengths(size, mean, longest, prompt):
    """Groups of 8 completions of lognormal lengths."""
    rng, groups = np.random.default_rng(0), []
    while True:
        lengths = np.clip(rng.lognormal(np.log(mean) - 0.32, 0.8, 8), 1, longest).astype(int)
        groups.append(PrefixGroup(int(rng.integers(prompt // 2, 2 * prompt)), lengths.tolist()))
        if sum(group.tokens for group in groups) > size:
            break
    needed = visits.visits(*arrays(groups[:-1], size), 512)
    short, full = visits.lengths(size // 512)
    assert visits.fit(needed, short) and short.keys * 2.5 < full.keys
