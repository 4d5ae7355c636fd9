"""Windows: pages side by side in blocks, what decode steps add, and attention to both; each against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plain_attention
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from igrpo_jax.models import attention, windows
from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import KV

CFG = dataclasses.replace(tiny_models.hybrid_config(), pattern="M*-*M", num_kv_heads=4)
PAGES, SIZE, ROWS = 12, 4, 4
# Four rows of three pages, in a random order. The first two share their first page, and the last one has two pages.
TABLE = np.array([[7, 2, 11], [7, 5, 0], [9, 1, 4], [3, 10, PAGES]], np.int32)
ENDS = (4, 12)  # of the blocks of a window of three pages


def noise(tree, seed):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape).astype(x.dtype)), tree)


def random_cache(seed=0, dtype="float32"):
    return noise(caches.empty(CFG, PAGES, SIZE, ROWS, jnp.dtype(dtype)), seed)


def of_attention(tree):
    return [np.asarray(entry) if isinstance(entry, jax.Array) else entry for entry in tree[1:4:2]]


def states(cache):
    return [cache[0], cache[4]]


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def in_blocks(one_block):
    """Windows of one block, cut into blocks."""
    spans = list(zip((0, *ENDS), ENDS, strict=False))
    cut = lambda block: tuple(KV(block.k[..., start:end], block.v[:, :, start:end]) for start, end in spans)
    return tuple(window and cut(window[0]) for window in one_block)


@given(st.integers(1, 80), st.sampled_from([4, 16, 64]))
def test_blocks_are_of_whole_pages_and_end_with_the_window(pages, page_size):
    ends = windows.block_ends(pages * page_size, page_size)
    assert ends[-1] == pages * page_size and list(ends) == sorted(set(ends)) and len(ends) <= windows.BLOCKS
    assert all(end % page_size == 0 for end in ends) and (len(ends) == 1 or ends[0] >= windows.MIN_BLOCK)


@pytest.mark.parametrize("copied", [windows._by_pages, windows._by_heads])
@pytest.mark.parametrize("width", [1, 3])
def test_a_window_has_the_positions_of_each_row_in_their_order(monkeypatch, width, copied):
    cache = random_cache()
    monkeypatch.setattr(windows, "_by_pages", copied)
    seen = jax.jit(lambda *of: windows.of_pages(*of))(cache, TABLE[:, :width])
    assert [window is None for window in seen] == [True, False, True, False, True]
    for pool, (rows,) in zip(of_attention(cache), of_attention(seen), strict=True):
        assert rows.v.shape == (ROWS, 4, width * SIZE, 8) and rows.k.shape == (ROWS, 4, 8, width * SIZE)
        for row, position in np.ndindex(ROWS, width * SIZE):
            page = TABLE[row, position // SIZE]
            if page < PAGES:
                of_position = pool[page, position % SIZE]  # key, value, key, value
                np.testing.assert_array_equal(rows.k[row, :, :, position], of_position[0::2])
                np.testing.assert_array_equal(rows.v[row, :, position], of_position[1::2])


@pytest.mark.parametrize("stale", [[], [2], [3, 0], [0, 1, 2, 3]])
def test_only_blocks_of_stale_rows_that_hold_positions_are_copied(stale):
    """The others stay as they are, and so do the numbers of rows past the count."""
    cache, length = random_cache(), np.array([9, 4, 5, 3], np.int32)
    table = np.where(TABLE < PAGES, TABLE, 8)  # what stands in the place of no page is meaningless
    fresh = in_blocks(windows.of_pages(cache, table))
    held = noise(fresh, 1)
    rows = np.array([*stale, *[3] * (ROWS - len(stale))], np.int32)
    after = jax.jit(windows.update)(held, cache, table, rows, np.int32(len(stale)), length)
    expected = jax.tree.map(np.array, held)
    for window, copied in zip(of_attention(expected), of_attention(fresh), strict=True):
        for row in stale:
            for start, block, new in zip((0, *ENDS), window, copied, strict=False):
                if length[row] > start:
                    block.k[row], block.v[row] = new.k[row], new.v[row]
    assert_equal(after, expected)


# Of each row the new positions, from `begin` on: of none, within a page, from one page to the next, up to the end.
NEW = [([6, 8, 3, 5], [6, 8, 3, 5]), ([6, 8, 4, 5], [8, 9, 4, 7]), ([9, 12, 2, 5], [12, 12, 5, 8])]


@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize(("begin", "end"), NEW)
def test_only_new_positions_are_written(begin, end, steps):
    """All other positions of all pages and windows stay as they are, bit for bit."""
    cache, begin, end = random_cache(), np.array(begin, np.int32), np.array(end, np.int32)
    added = noise(windows.new_token_buffers(cache, ROWS, steps), 1)
    held = noise(in_blocks(windows.of_pages(cache, TABLE)), 2)
    expected = [pool.copy() for pool in of_attention(cache)], jax.tree.map(np.array, of_attention(held))
    for pool, window, new in zip(*expected, of_attention(added), strict=True):
        for row in range(ROWS):
            for step, position in enumerate(range(begin[row], end[row])):
                of_position = pool[TABLE[row, position // SIZE], position % SIZE]
                of_position[0::2], of_position[1::2] = new.k[row, :, :, step], new.v[row, :, step]
                block, start = (window[0], 0) if position < ENDS[0] else (window[1], ENDS[0])
                block.k[row, :, :, position - start] = new.k[row, :, :, step]
                block.v[row, :, position - start] = new.v[row, :, step]
    after = jax.jit(windows.write_back)(cache, added, TABLE, begin, end)
    assert_equal(of_attention(after), expected[0])
    assert_equal(states(after), states(added))
    assert len(after) == len(cache) and after[CFG.pattern.index("-")] is None
    longer = jax.jit(windows.extend)(held, added, begin, end)
    assert_equal(of_attention(longer), expected[1])
    assert longer[0] is longer[2] is longer[4] is None


def test_what_has_no_page_is_not_written():
    cache = random_cache()
    added = noise(windows.new_token_buffers(cache, ROWS, 4), 1)
    begin, end = np.array([0, 0, 0, 8]), np.array([0, 0, 0, 12])  # in the last row the third page is none
    after = jax.jit(windows.write_back)(cache, added, TABLE, begin, end)
    assert_equal(of_attention(after), of_attention(cache))


def test_what_is_added_has_the_dtype_of_the_pages():
    added = windows.new_token_buffers(random_cache(dtype="bfloat16"), ROWS, 2)
    k, v = np.random.default_rng(0).normal(size=(2, ROWS, 1, 4, 8)).astype("float32")
    after = windows.add(added[1], k, v, np.int32(1))
    assert after.k.dtype == after.v.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after.k[..., 1], k[:, 0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(after.v[:, :, 1], v[:, 0].astype(jnp.bfloat16))
    assert not after.k[..., 0].any() and not after.v[:, :, 0].any()


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16])
@pytest.mark.parametrize("lengths", [[4, 1, 3], [5, 12, 9], [7, 3, 12]])
def test_decoded_tokens_read_their_window_and_what_was_added(dtype, lengths):
    """Some steps, for which the first block alone is enough, or both are needed; whoever reads anything else is far
    off, and a block that no row needs is not read at all."""
    draw, lengths, steps, groups = np.random.default_rng(0).normal, np.array(lengths, np.int32), 3, 3
    k, v = (draw(size=(3, 2, ENDS[-1] + steps, 8)).astype(dtype) for _ in "kv")  # by position
    held_k, held_v = k[:, :, : ENDS[-1]].copy(), v[:, :, : ENDS[-1]].copy()
    for row, length in enumerate(lengths):
        held_k[row, :, length:], held_v[row, :, length:] = 40, 40
    window = in_blocks(((KV(jnp.asarray(held_k.swapaxes(2, 3)), jnp.asarray(held_v)),),))
    added = KV(jnp.full((3, 2, 8, steps), 40, dtype), jnp.full((3, 2, steps, 8), 40, dtype))
    for step in range(steps):
        q, at = (8 * draw(size=(3, 1, 2 * groups, 8))).astype(dtype), lengths + step  # scores of up to 100
        new_k, new_v = (x[np.arange(3), :, at][:, None] for x in (k, v))
        (entry,) = windows.entries(window, (added,), lengths, np.array([True] * 3), np.int32(step))
        needed = 1 if lengths.max() <= ENDS[0] else 2
        unread = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), entry.window[needed:])
        entry = entry._replace(window=(*entry.window[:needed], *unread))
        mixed, added = jax.jit(attention.windowed_attention)(q, new_k, new_v, entry)
        expected = np.zeros(q.shape)
        for b, n in np.ndindex(3, 2 * groups):
            of_row = b, n // groups, slice(0, at[b] + 1)
            own = q[b, :, n]
            expected[b, :, n] = plain_attention.attend(own, k[of_row], v[of_row], own).mixed
        assert mixed.dtype == q.dtype
        atol = 5e-5 if dtype == "float32" else 0.02 * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(mixed, np.float32), expected, atol=atol, rtol=0)


def test_rows_that_are_not_active_need_no_block():
    cache = random_cache()
    seen, added = in_blocks(windows.of_pages(cache, TABLE)), windows.new_token_buffers(cache, ROWS, 1)
    active = np.array([True, True, False, True])
    needed = lambda length: int(windows.entries(seen, added, np.array(length), active, 0)[1].last)
    assert needed([4, 1, 12, 2]) == 0 and needed([5, 1, 12, 2]) == 1
