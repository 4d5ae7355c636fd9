"""The cache of a decoder: what is kept, and what a sample takes from its prompt; each against numpy.

What Mamba-2's states do in it is in `test_mamba2.py`, what attention writes to pages in `test_paged.py`, and pages side
by side in `test_windows.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models

from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import MambaState

CFG = dataclasses.replace(tiny_models.hybrid_config(), pattern="M*-*M", num_kv_heads=4)
PAGES, SIZE, SLOTS, LANES = 12, 4, 5, 3


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
