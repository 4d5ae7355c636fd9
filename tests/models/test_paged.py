"""Attention to a cache of pages: each implementation against each sequence run alone, and what is written where.

The TPU's kernel is emulated. What its compiler makes of it is tested in `tests/aot/test_paged_kernel.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_attention
import pytest
from jax.sharding import PartitionSpec

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import paged, paged_splash
from igrpo_jax.models import ragged as ragged_pages
from igrpo_jax.models.attention import PACKED
from igrpo_jax.models.cache import PageLayout
from igrpo_jax.models.ragged import Paged, Ragged
from igrpo_jax.models.segments import BLOCK

SIZE, SPACE = 192, 5  # of a packed sequence: tokens, and sequences that it has space for
FAR = 40  # in keys and values that no token may read: whoever does is far off
# Of each sequence, the tokens before its new ones and the new ones.
CHUNKS = {
    "one sequence, continued from the chunk before": [(100, 192)],
    "several, the first continued, and padding": [(70, 90), (0, 1), (0, 64), (0, 20)],
    "several that begin here": [(0, 64), (0, 65), (0, 3)],
    "nothing but the last token of a prompt": [(128, 1)],
    "padding alone": [],
}
BY_KERNEL = {"several that are continued": [(70, 60), (33, 1), (63, 1), (0, 20), (3, 90)]}
RAGGED = CHUNKS["several, the first continued, and padding"]
DECODED = [(70, 1), (0, 1), (63, 1), None, (128, 1), (129, 1)]  # None: a row that is not active
OF_CHUNKS = ["xla", "chunked", "cudnn"]


@pytest.fixture(autouse=True)
def cudnn_by_xla(monkeypatch):
    """Computes with cuDNN's layout and mask on a machine without a GPU."""
    monkeypatch.setitem(paged.PAGED, "cudnn", functools.partial(paged.cudnn_paged_attention, implementation="xla"))


def ragged_of(sequences, page, space, shared, count, width):
    """Returns the Ragged of sequences in a pool of `count` pages, whose tables have `width` pages.

    The pages of all sequences are mixed, and the first `shared` pages of each are those of the first.
    """
    needed = [0 if lengths is None else -(-sum(lengths) // page) for lengths in sequences]
    free = iter(np.random.default_rng(1).permutation(count))
    length, start = np.zeros(space, np.int32), np.zeros(space + 1, np.int32)
    table = np.full((space, width), count, np.int32)
    for w, (lengths, pages) in enumerate(zip(sequences, needed, strict=True)):
        before, new = lengths or (0, 1)
        length[w], start[w + 1 :] = before + new, start[w] + new
        table[w, :pages] = [next(free) for _ in range(pages)]
        if w and pages:
            table[w, :shared] = table[0, :shared]
    return Ragged(length, table, start, np.array([len(sequences)], np.int32))


def inputs(sequences, page=16, kv_heads=2, groups=2, head_dim=8, dtype="float32", size=SIZE, space=SPACE, shared=0):
    """Returns q, k, v and their Paged; the outputs [F, N, H], 0 where they are meaningless; and the pages afterwards.

    The pool has more pages than are used, and a table has space for 320 positions.
    """
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    count, width = 480 // page + 8, 320 // page
    ragged = ragged_of(sequences, page, space, shared, count, width)
    q = draw(size, kv_heads * groups, head_dim)
    if dtype != "float32":
        q *= 8  # scores of up to 100, which would be off by a quarter in bfloat16
    k, v = (np.full((size, kv_heads, head_dim), FAR, dtype) for _ in "kv")
    pages, mixed = np.full((count, page, 2 * kv_heads, head_dim), FAR, dtype), np.zeros(q.shape)
    written = pages.copy()
    prefix = draw(shared * page, 2 * kv_heads, head_dim)
    for w, lengths in enumerate(sequences):
        own = slice(ragged.start[w], ragged.start[w + 1])
        if lengths is None:
            continue
        before, total = lengths[0], sum(lengths)
        text = np.concatenate([prefix, draw(total - len(prefix), 2 * kv_heads, head_dim)])
        keys, values = text[:, 0::2], text[:, 1::2]
        k[own], v[own] = keys[before:], values[before:]
        place = ragged.table[w, np.arange(total) // page], np.arange(total) % page
        written[place], pages[place[0][:before], place[1][:before]] = text, text[:before]
        for n in range(q.shape[1]):
            head = keys[:, n // groups], values[:, n // groups]
            mixed[own, n] = plain_attention.attend(q[own, n], *head, q[own, n]).mixed
    return (q, k, v, Paged(pages, ragged)), mixed, written


def is_real(arguments):
    """Returns which tokens belong to a sequence that has a page, [F] bool."""
    pages, ragged = arguments[3]
    real = np.zeros(arguments[0].shape[0], bool)
    for w in range(ragged.count[0]):
        real[ragged.start[w] : ragged.start[w + 1]] = ragged.table[w, 0] < pages.shape[0]
    return real


def check(results, arguments, mixed, written):
    """Compares outputs at real tokens, and all pages bit for bit."""
    out, pages = (np.asarray(x, np.float32) for x in results)
    assert results[0].shape == arguments[0].shape and results[0].dtype == arguments[0].dtype
    assert np.isfinite(out).all()
    out = np.where(is_real(arguments)[:, None, None], out, 0)
    if arguments[0].dtype == np.float32:
        np.testing.assert_allclose(out, mixed, atol=2e-5, rtol=2e-5)
    else:  # 8 bits: 0.004 each, over a few roundings
        assert np.abs(out - mixed).max() <= 0.02 * np.abs(mixed).max()
    np.testing.assert_array_equal(pages, written.astype(np.float32))


def run(name, arguments):
    return jax.jit(functools.partial(paged.paged_attention, name))(*arguments)


def test_every_implementation_has_one_for_pages():
    assert paged.PAGED.keys() == PACKED.keys()


@pytest.mark.parametrize("case", CHUNKS)
@pytest.mark.parametrize("name", OF_CHUNKS)
def test_a_chunk_equals_each_sequence_alone(name, case):
    arguments, mixed, written = inputs(CHUNKS[case])
    check(run(name, arguments), arguments, mixed, written)


@pytest.mark.parametrize(
    ("page", "kv_heads", "groups", "head_dim", "dtype"),
    [(64, 1, 3, 64, "float32"), (128, 3, 1, 128, "float32"), (16, 2, 2, 16, jnp.bfloat16)],
)
@pytest.mark.parametrize("name", OF_CHUNKS)
def test_other_pages_heads_and_dtypes(name, page, kv_heads, groups, head_dim, dtype):
    arguments, mixed, written = inputs(RAGGED, page, kv_heads, groups, head_dim, dtype)
    check(run(name, arguments), arguments, mixed, written)


def test_blocks_that_nothing_reads_are_skipped():
    """NaN in them reaches no output: a product with a masked weight of 0 would be NaN."""
    (q, k, v, (pages, ragged)), mixed, _ = inputs([(BLOCK, BLOCK), (0, BLOCK)], page=BLOCK)
    first, second, padding = (slice(i * BLOCK, (i + 1) * BLOCK) for i in range(3))

    def attend(unread, unread_pages):
        """Returns the outputs with NaN in the keys and values of some tokens and pages."""
        nan = k.copy(), v.copy(), pages.copy()
        nan[0][unread], nan[1][unread], nan[2][unread_pages] = np.nan, np.nan, np.nan
        return np.asarray(jax.jit(paged.chunked_paged_attention)(q, *nan[:2], Paged(nan[2], ragged)))

    held = ragged.table[0, 0]  # the page that was there before the chunk
    out = attend(padding, np.setdiff1d(np.arange(len(pages)), held))
    np.testing.assert_allclose(out[: 2 * BLOCK], mixed[: 2 * BLOCK], atol=2e-5)
    assert np.isfinite(out[padding]).all()
    of_others = attend(second, [])  # for the first sequence a later one, whose tokens come after its own
    np.testing.assert_array_equal(of_others[first], out[first])
    assert np.isnan(of_others[second]).all()
    of_others = attend(first, held)
    np.testing.assert_array_equal(of_others[second], out[second])
    assert np.isnan(of_others[first]).all()


def test_later_blocks_of_a_sequence_are_skipped():
    (q, k, v, entry), mixed, _ = inputs([(30, SIZE)])
    k[BLOCK:], v[BLOCK:] = np.nan, np.nan
    out = np.asarray(jax.jit(paged.chunked_paged_attention)(q, k, v, entry))
    np.testing.assert_allclose(out[:BLOCK], mixed[:BLOCK], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CHUNKS | BY_KERNEL)
def test_a_chunk_by_the_kernel(case):
    arguments, mixed, written = inputs((CHUNKS | BY_KERNEL)[case], page=64, head_dim=128)
    check(run("splash_interpret", arguments), arguments, mixed, written)


@pytest.mark.parametrize(
    ("page", "kv_heads", "groups", "dtype"),
    [
        (64, 1, 7, jnp.bfloat16),
        pytest.param(16, 2, 3, "float32", marks=pytest.mark.slow),
        pytest.param(128, 4, 1, "float32", marks=pytest.mark.slow),
    ],
)
def test_decoding_by_the_kernel(page, kv_heads, groups, dtype, monkeypatch):
    """In blocks of four rows, and of 64 positions unless a page is larger."""
    monkeypatch.setattr(paged_splash, "KEY_POSITIONS", 64)
    monkeypatch.setattr(paged_splash, "DECODE_QUERIES", 4)
    rows = len(DECODED)
    arguments, mixed, written = inputs(DECODED, page, kv_heads, groups, 128, dtype, rows, rows)
    check(run("splash_interpret", arguments), arguments, mixed, written)


def side_by_side(pages, heads):
    """Returns pages [P, C, 2K, H] with so many heads in each row: the keys of these heads, then their values."""
    rows = pages.reshape(*pages.shape[:2], -1, heads, 2, pages.shape[3])
    return rows.swapaxes(3, 4).reshape(*pages.shape[:2], -1, heads * pages.shape[3])


@pytest.mark.parametrize(
    ("sequences", "kv_heads", "groups", "head_dim", "size"),
    [
        (DECODED, 2, 7, 64, len(DECODED)),
        pytest.param(RAGGED, 4, 1, 64, SIZE, marks=pytest.mark.slow),
        pytest.param(RAGGED, 4, 2, 32, SIZE, marks=pytest.mark.slow),
    ],
)
def test_narrow_heads_share_the_rows_of_the_kernel(sequences, kv_heads, groups, head_dim, size):
    """Of distinct heads each query finds its own."""
    heads = paged.page_layout("splash_interpret", head_dim, kv_heads).heads_per_row
    space = len(sequences) if size == len(sequences) else SPACE
    (*new, entry), mixed, written = inputs(sequences, 16, kv_heads, groups, head_dim, size=size, space=space)
    arguments = (*new, entry._replace(pages=side_by_side(entry.pages, heads)))
    check(run("splash_interpret", arguments), arguments, mixed, side_by_side(written, heads))


def test_a_chunk_with_a_mask_has_no_token_that_reads_nothing(monkeypatch):
    """cuDNN's softmax over nothing would not be finite: padding reads itself, and all others what they read anyway."""
    (q, k, v, entry), _, _ = inputs(RAGGED)
    masks = []

    def attend(q, k, v, mask, implementation):
        masks.append(np.asarray(mask[0, 0]))
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    paged.cudnn_paged_attention(q, k, v, jax.tree.map(jnp.asarray, entry))
    size = sum(new for _, new in RAGGED)
    assert masks[0].sum(axis=1)[[0, 89, 90, 91]].tolist() == [71, 160, 1, 1]
    padding = masks[0][size:]
    np.testing.assert_array_equal(np.argwhere(padding)[:, 1], len(masks[0][0]) - SIZE + np.arange(size, SIZE))


def apart(pages):
    """Returns pages [P, C, 2K, H] with all keys before all values: [P, 2, C, K, H]."""
    return np.stack([pages[:, :, 0::2], pages[:, :, 1::2]], axis=1)


@pytest.mark.parametrize(("sequences", "size"), [(DECODED, len(DECODED)), (RAGGED, SIZE)])
def test_pages_with_keys_and_values_apart(sequences, size):
    """As cuDNN reads them; the page of a row that is not active is past the pool."""
    space = len(sequences) if size == len(sequences) else SPACE
    (*new, entry), mixed, written = inputs(sequences, size=size, space=space)
    arguments = (*new, entry._replace(pages=apart(entry.pages)))
    check(run("cudnn", arguments), arguments, mixed, apart(written))


@pytest.mark.slow
def test_sequences_that_share_pages():
    sequences = [(70, 1), (64, 1), (99, 1), (70, 1)]
    arguments, mixed, written = inputs(sequences, 16, 1, 2, 128, size=4, space=4, shared=4)
    table = arguments[3].ragged.table
    assert (table[:, :4] == table[0, :4]).all() and len(set(table[:, 4])) == 4
    check(run("splash_interpret", arguments), arguments, mixed, written)


def test_the_kernel_gets_pages_of_the_pool_alone(monkeypatch):
    """A TPU would read past the pool, where the emulated kernel reads its last page."""
    tables = []

    def kernel(q, pages, length, table, *_, **__):
        tables.append(table)
        return q

    monkeypatch.setattr(paged_splash, "_emulated_kernel", lambda: kernel)
    rows = len(DECODED)
    (q, k, v, (pages, ragged)), _, _ = inputs(DECODED, head_dim=128, size=rows, space=rows)
    table = np.where(ragged.table < len(pages), ragged.table, np.iinfo(np.int32).max)
    paged.paged_attention(
        "splash_interpret", q, k, v, Paged(jnp.asarray(pages), ragged._replace(table=jnp.asarray(table)))
    )
    np.testing.assert_array_equal(tables[0], np.minimum(table, len(pages) - 1))


def test_a_table_that_a_tpu_cannot_hold():
    def attend(slots, pages):
        q, k = (jax.ShapeDtypeStruct((slots, heads, 128), jnp.bfloat16) for heads in (12, 2))
        pool = jax.ShapeDtypeStruct((8, 64, 4, 128), jnp.bfloat16)
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(slots,), (slots, pages), (slots + 1,), (1,)]]
        jax.eval_shape(functools.partial(paged.paged_attention, "splash"), q, k, k, Paged(pool, Ragged(*ints)))

    attend(672, 384)
    with pytest.raises(AssertionError, match="672 x 385 page numbers"):
        attend(672, 385)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 64), (2, 48), (3, 128)])
def test_heads_that_the_kernel_does_not_suit(kv_heads, head_dim):
    """On this platform the kernel itself would fail."""
    assert paged.page_layout("splash", head_dim, kv_heads) is None
    arguments, mixed, written = inputs(RAGGED, kv_heads=kv_heads, head_dim=head_dim)
    check(run("splash", arguments), arguments, mixed, written)


@pytest.mark.parametrize(
    ("attention", "head_dim", "kv_heads", "expected"),
    [
        ("splash", 128, 1, PageLayout()),
        ("splash_interpret", 128, 16, PageLayout()),
        ("splash", 64, 4, PageLayout(heads_per_row=2)),
        ("splash", 64, 32, PageLayout(heads_per_row=2)),
        ("splash", 32, 4, PageLayout(heads_per_row=4)),
        ("splash", 64, 3, None),
        ("splash", 64, 6, None),
        ("splash", 48, 4, None),
        ("splash", 256, 4, None),
        ("splash", 128, 3, None),
        ("cudnn", 64, 3, PageLayout(apart=True)),
        ("chunked", 128, 4, None),
    ],
)
def test_where_a_kernel_reads_pages(attention, head_dim, kv_heads, expected):
    assert paged.page_layout(attention, head_dim, kv_heads) == expected


def test_what_has_no_page_is_dropped():
    """Padding, a sequence without pages, and a token beyond the table of its sequence."""
    (_, k, v, (pages, ragged)), _, _ = inputs([None, (0, 16), None], size=64)
    ragged = ragged._replace(length=np.array([1, 33, 1, 0, 0], np.int32), table=ragged.table[:, :1])
    assert ragged.table[1, 0] < len(pages)
    np.testing.assert_array_equal(jax.jit(ragged_pages.write)(pages, k, v, ragged), pages)


def test_the_pool_is_written_in_place():
    (_, k, v, (pages, ragged)), _, written = inputs(RAGGED)
    program = jax.jit(ragged_pages.write, donate_argnums=0).lower(pages, k, v, ragged).compile()
    assert program.memory_analysis().alias_size_in_bytes == pages.nbytes
    np.testing.assert_array_equal(program(jnp.asarray(pages), k, v, ragged), written)


def on_mesh(name, shards):
    """Returns `run` of each shard by itself, on a mesh that splits the heads too."""
    mesh = sharding.make_mesh(config.MeshConfig(2, 2, 2))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *shards)
    batch = PartitionSpec(sharding.RULES["batch"])

    def attend(q, k, v, entry):
        first = jax.tree.map(lambda x: x[0], (q, k, v, entry))
        return jax.tree.map(lambda x: x[None], paged.paged_attention(name, *first))

    split = jax.shard_map(
        attend, mesh=mesh, in_specs=batch, out_specs=batch, axis_names=set(sharding.RULES["batch"]), check_vma=False
    )
    with jax.set_mesh(mesh):
        return jax.jit(split)(*stacked)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OF_CHUNKS, "splash_interpret"])
def test_a_mesh_changes_nothing(name):
    """The shards have different sequences, and so loops of different lengths."""
    cases = [inputs(sequences, 64, 2, 3, 128) for sequences in list(CHUNKS.values())[:4]]
    results = on_mesh(name, [arguments for arguments, _, _ in cases])
    for i, case in enumerate(cases):
        check(jax.tree.map(lambda x, i=i: x[i], results), *case)
