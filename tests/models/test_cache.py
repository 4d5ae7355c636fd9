"""The cache of a decoder: pages side by side and back, and what a sample takes from its prompt; each against numpy.

What Mamba-2's states do in it is in `test_mamba2.py`, and what attention writes to pages in `test_paged.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import KV, MambaState

CFG = dataclasses.replace(tiny_models.hybrid_config(), pattern="M*-*M", num_kv_heads=4)
PAGES, SIZE, SLOTS, LANES = 12, 4, 5, 3
# Four rows of three pages, in a random order. The first two share their first page, and the last one has two pages.
TABLE = np.array([[7, 2, 11], [7, 5, 0], [9, 1, 4], [3, 10, PAGES]], np.int32)


def noise(cache, seed):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda x: draw(size=x.shape).astype(x.dtype), cache)


def random_cache(seed=0, slots=SLOTS, dtype="float32"):
    return noise(caches.empty(CFG, PAGES, SIZE, slots, jnp.dtype(dtype)), seed)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def pools(cache):
    return [entry for kind, entry in zip(CFG.pattern, cache, strict=True) if kind == "*"]


def states(cache):
    return [entry for kind, entry in zip(CFG.pattern, cache, strict=True) if kind == "M"]


def assert_equal(cache, expected):
    assert jax.tree.structure(cache) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(cache), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_what_is_kept_of_each_kind_of_sublayer():
    cache, lanes = (
        caches.empty(CFG, PAGES, SIZE, SLOTS, jnp.bfloat16),
        caches.empty_lanes(CFG, LANES, jnp.bfloat16),
    )
    for kind, entry, lane in zip(CFG.pattern, cache, lanes, strict=True):
        if kind == "*":
            assert entry.shape == (PAGES, SIZE, 8, 8) and entry.dtype == jnp.bfloat16
            assert lane is None
        elif kind == "M":
            assert isinstance(entry, MambaState) and entry.state.dtype == lane.state.dtype == jnp.float32
            assert {len(x) for x in entry} == {SLOTS} and {len(x) for x in lane} == {LANES}
        else:
            assert entry is None and lane is None


@pytest.mark.parametrize("copied", [None, caches._by_pages, caches._by_heads])
@pytest.mark.parametrize("width", [1, 3])
def test_a_window_has_the_positions_of_each_row_in_their_order(monkeypatch, width, copied):
    """By the way of this platform, and by each way in the place of both."""
    cache = random_cache(slots=len(TABLE))
    if copied is not None:
        monkeypatch.setattr(caches, "_by_pages", copied)
        monkeypatch.setattr(caches, "_by_heads", copied)
    part = jax.jit(lambda *of: caches.window(*of))(cache, TABLE[:, :width])
    assert_equal(states(part), states(cache))
    assert part[CFG.pattern.index("-")] is None
    for pool, rows in zip(pools(cache), pools(part), strict=True):
        assert isinstance(rows, KV) and rows.v.shape == (len(TABLE), 4, width * SIZE, 8)
        assert rows.k.shape == (len(TABLE), 4, 8, width * SIZE)
        for row, position in np.ndindex(len(TABLE), width * SIZE):
            page = TABLE[row, position // SIZE]
            if page < PAGES:
                of_position = pool[page, position % SIZE]  # key, value, key, value
                np.testing.assert_array_equal(rows.k[row, :, :, position], of_position[0::2])
                np.testing.assert_array_equal(rows.v[row, :, position], of_position[1::2])


@pytest.mark.parametrize("stale", [[], [2], [3, 0], [0, 1, 2, 3]])
def test_only_stale_windows_are_copied(stale):
    """The others stay as they are, and so do the numbers of rows past the count."""
    cache = on_device(random_cache(slots=len(TABLE)))
    table = np.where(TABLE < PAGES, TABLE, 8)  # what stands in the place of no page is meaningless
    fresh = caches.window(cache, table)
    held = tuple(x if isinstance(x, KV) else None for x in noise(fresh, 1))
    rows = np.array([*stale, *[3] * (len(TABLE) - len(stale))], np.int32)
    part = jax.jit(caches.update_windows)(held, cache, table, rows, np.int32(len(stale)))
    assert_equal(states(part), states(cache))
    assert len(part) == len(cache) and part[CFG.pattern.index("-")] is None
    for new, old, copied in zip(pools(part), pools(held), pools(fresh), strict=True):
        expected = jax.tree.map(lambda x, y: np.array(x).copy(), old, copied)
        for row in stale:
            for x, y in zip(expected, copied, strict=True):
                x[row] = y[row]
        assert_equal(new, expected)


# Of each row the new positions, from `begin` on: of none, within a page, from one page to the next, up to the end.
NEW = [([6, 8, 3, 5], [6, 8, 3, 5]), ([6, 8, 4, 5], [8, 9, 4, 7]), ([9, 12, 2, 5], [12, 12, 5, 8])]


@pytest.mark.parametrize("most", [3, 5, 99])
@pytest.mark.parametrize(("begin", "end"), NEW)
def test_only_new_positions_are_restored(begin, end, most):
    """All other positions of all pages stay as they are, bit for bit."""
    cache = random_cache(slots=len(TABLE))
    part = noise(caches.window(on_device(cache), TABLE), 1)
    expected = [pool.copy() for pool in pools(cache)]
    for pool, rows in zip(expected, pools(part), strict=True):
        for row in range(len(TABLE)):
            for position in range(begin[row], end[row]):
                of_position = pool[TABLE[row, position // SIZE], position % SIZE]
                of_position[0::2], of_position[1::2] = rows.k[row, :, :, position], rows.v[row, :, position]
    restore = jax.jit(caches.restore, static_argnames="most")
    after = restore(cache, part, TABLE, np.array(begin), np.array(end), most=most)
    assert_equal(pools(after), expected)
    assert_equal(states(after), states(part))
    assert len(after) == len(cache) and after[CFG.pattern.index("-")] is None


def test_what_has_no_page_is_not_restored():
    cache = random_cache(slots=len(TABLE))
    part = noise(caches.window(on_device(cache), TABLE), 1)
    begin, end = np.array([0, 0, 0, 8]), np.array([0, 0, 0, 12])  # in the last row the third page is none
    assert_equal(pools(caches.restore(on_device(cache), part, TABLE, begin, end, 4)), pools(cache))


def test_a_window_that_nothing_changed_restores_the_cache():
    """In every position that has a page, in bfloat16 too."""
    cache = on_device(random_cache(slots=len(TABLE), dtype="bfloat16"))
    part, zeros = caches.window(cache, TABLE), jax.tree.map(jnp.zeros_like, cache)
    begin, end = np.zeros(4, np.int32), np.full(4, 12, np.int32)
    after = caches.restore(zeros, part, TABLE, begin, end, 12)
    for pool, old in zip(pools(after), pools(cache), strict=True):
        assert pool.dtype == jnp.bfloat16
        held = np.unique(TABLE[TABLE < PAGES])
        np.testing.assert_array_equal(pool[held], old[held])
        assert not pool[np.setdiff1d(np.arange(PAGES), held)].any()


def test_rows_are_the_states_of_their_slots():
    cache = random_cache()
    rows = jax.jit(caches.rows_of)(
        cache, np.array([4, 0, SLOTS])
    )  # the last row is of no slot: its state means nothing
    assert_equal(pools(rows), pools(cache))
    for row, old in zip(jax.tree.leaves(states(rows)), jax.tree.leaves(states(cache)), strict=True):
        np.testing.assert_array_equal(row[:2], old[[4, 0]])


def test_rows_are_put_into_their_slots_and_those_of_no_slot_are_dropped():
    cache, rows = random_cache(), random_cache(1, slots=3)
    after = jax.jit(caches.put_rows)(cache, rows, np.array([4, SLOTS, 0]))
    expected = states(cache)
    for old, new in zip(jax.tree.leaves(expected), jax.tree.leaves(states(rows)), strict=True):
        old[[4, 0]] = new[[0, 2]]
    assert_equal(states(after), expected)
    assert_equal(pools(after), pools(rows))


def test_rows_take_the_dtype_of_the_cache():
    cache = on_device(random_cache(dtype="bfloat16"))
    after = caches.put_rows(cache, random_cache(1, slots=1), np.array([1]))
    dtypes = [jax.tree.map(lambda x: x.dtype, states(tree)) for tree in (after, cache)]
    assert dtypes[0] == dtypes[1]


def test_a_fork_copies_pages_and_the_state_of_a_lane():
    """Two samples of one prompt and one of another; the third shares all pages, and the last names no slot at all.

    A page that is copied may be given to another sample in the same call: all are read before any is written.
    """
    cache, lanes = random_cache(), noise(caches.empty_lanes(CFG, LANES, jnp.float32), 2)
    lane, slot = np.array([2, 2, 0, 1]), np.array([4, 1, 0, SLOTS])
    source, target = np.array([7, 7, 3, 5]), np.array([2, 3, PAGES, PAGES])
    after = jax.jit(caches.fork)(cache, lanes, lane, slot, source, target)
    expected = jax.tree.map(np.copy, cache)
    for pool in pools(expected):
        pool[2] = pool[3] = pool[7]
    for old, new in zip(jax.tree.leaves(states(expected)), jax.tree.leaves(states(lanes)), strict=True):
        old[[4, 1, 0]] = new[[2, 2, 0]]
    assert_equal(after, expected)
    moved = caches.fork(on_device(cache), on_device(lanes), lane, slot, np.array([7, 2, 3, 5]), target)
    for pool, old in zip(pools(moved), pools(cache), strict=True):
        np.testing.assert_array_equal(np.asarray(pool)[[2, 3]], old[[7, 2]])
