"""Attention to a cache of pages, for new tokens of several sequences, packed one after another.

The cache is a pool of pages, and a table says which pages hold a sequence. The new tokens are written first. Then they
attend, in one of three ways:

- The TPU's kernel reads the pages of every sequence. It serves decoding, where each sequence has one new token, and
  chunks of prompts.
- cuDNN's kernel for pages reads those of every sequence too. It serves decoding.
- All other cases gather the keys as [pages of the first sequence | new tokens]. That serves chunks of prompts only, in
  which no sequence but the first can have tokens before the chunk.

Each computes one float32 softmax over all keys that a query reads, as `attention` does.

Legend: F new tokens, W sequences, R pages of a sequence, P pages of the pool, C positions of a page, N heads, K kv
heads, G heads per kv head (N = K * G), H head dim, E keys, I blocks of queries, J blocks of keys.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igrpo_jax.distributed.sharding import spec
from igrpo_jax.models import cache as caches
from igrpo_jax.models import cudnn
from igrpo_jax.models.blocked import NEVER, Reading, blocked_attention
from igrpo_jax.models.cache import PageLayout
from igrpo_jax.models.paged_splash import HEAD_DIM, TILES, splash_paged_attention
from igrpo_jax.models.ragged import Paged, Places, Ragged, places, write
from igrpo_jax.models.segments import BLOCK, readable


def page_layout(attention: str, head_dim: int, kv_heads: int) -> PageLayout | None:
    """Returns the layout of pages for a kernel that reads them in place when tokens are decoded; None without one.

    On TPUs several narrow heads share one row of the kernel's HEAD_DIM: a query is zero at the features of other heads.

    Args:
        attention: `attention` of DecoderConfig.
        head_dim: H.
        kv_heads: K of one device, which is that of the model over the size of the mesh axis `tensor`.
    """
    if attention == "cudnn":
        return PageLayout(apart=True)
    together, rest = divmod(HEAD_DIM, head_dim)
    if attention not in ("splash", "splash_interpret") or rest or kv_heads % together:
        return None
    rows = kv_heads // together
    return PageLayout(heads_per_row=together) if rows in TILES or rows % 8 == 0 else None


def paged_attention(
    implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, entry: Paged, parts: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Writes new tokens to their pages, and computes their attention to their sequences.

    Inside `shard_map` over the batch it splits the heads over `tensor` itself, because the compiler cannot split the
    kernel, and nothing may communicate in loops whose trip counts differ between shards.

    Args:
        implementation: a key of `attention.PACKED`. "splash" stands for "chunked" where `page_layout` says that the
            TPU's kernel does not run. Without a kernel that reads pages, only the first sequence can have tokens before
            the new ones.
        q: [F, N, H]; for "chunked", F is a multiple of BLOCK.
        k, v: [F, K, H].
        parts: neighbours on `tensor` that hold the same kv head, each for other sequences: part i those whose pages
            have the numbers i P to (i + 1) P - 1.

    Returns:
        [F, N, H] in q's dtype, which is finite and meaningless at padding, and the pages with the new tokens.
    """
    run = functools.partial(_on_one_device, implementation)
    if parts > 1:
        run = functools.partial(_of_own_part, run, parts)
    mesh = jax.sharding.get_abstract_mesh()
    split = set(mesh.axis_names) - set(mesh.manual_axes)
    if not split:
        return run(q, k, v, entry)
    heads, kv_heads = (spec(("time", name, "head_dim")) for name in ("heads", "kv_heads"))
    pages = spec((None, *caches.pool_axes(entry.pages.ndim)[1:]))
    in_specs = heads, kv_heads, kv_heads, Paged(pages, Ragged(*[spec(())] * len(Ragged._fields)))
    # check_vma is off because the results of a Pallas kernel do not say over which axes they vary.
    on_devices = jax.shard_map(run, in_specs=in_specs, out_specs=(heads, pages), axis_names=split, check_vma=False)
    return on_devices(q, k, v, entry)


def _on_one_device(implementation, q, k, v, entry):
    """Computes `paged_attention` of the heads of one device."""
    entry = entry._replace(pages=write(entry.pages, k, v, entry.ragged))
    kv_heads, head_dim = k.shape[1:]
    if implementation.startswith("splash") and page_layout(implementation, head_dim, kv_heads) is None:
        implementation = "chunked"
    return PAGED[implementation](q, k, v, entry), entry.pages


def _of_own_part(run, parts: int, q: jax.Array, k: jax.Array, v: jax.Array, entry: Paged):
    """Computes `run` of the sequences that this device holds, for the query heads of all devices with its kv head.

    Each device sends its query heads to the others, and gets back what these heads read of every sequence.
    """
    (pages, ragged), size = entry, jax.lax.axis_size("tensor")
    neighbours = [list(range(first, first + parts)) for first in range(0, size, parts)]
    table = caches.own_pages(ragged.table, len(pages), parts)
    is_own = table[:, 0] < len(pages)
    # For sequences of other parts the kernel reads as little as it can, and nothing is written.
    length = jnp.where(is_own, ragged.length, jnp.maximum(jnp.diff(ragged.start), 1))
    q = jax.lax.all_gather(q, "tensor", axis=1, tiled=True, axis_index_groups=neighbours)
    mixed, pages = run(q, k, v, Paged(pages, ragged._replace(table=table, length=length)))
    of_token = is_own.at[places(ragged, q.shape[0]).sequence].get(mode="fill", fill_value=False)
    mixed = jnp.where(of_token[:, None, None], mixed, 0)
    scatter = functools.partial(jax.lax.psum_scatter, scatter_dimension=1, tiled=True, axis_index_groups=neighbours)
    return scatter(mixed, "tensor"), pages


class _Keys(NamedTuple):
    """What a chunk reads: the positions that the pages of the first sequence hold, then the new tokens."""

    k: jax.Array  # [E, K, H]
    v: jax.Array  # [E, K, H]
    sequence: jax.Array  # [E] int32, number of each key's sequence from 1; 0 = read by nobody
    position: jax.Array  # [E] int32


def _keys(k: jax.Array, v: jax.Array, entry: Paged, block: int = 1) -> _Keys:
    """Returns the keys of a chunk; those of the pages are padded to a multiple of `block`."""
    ragged = entry.ragged
    # The pages are read after the write, so that it stays in place. The tokens just written are read from k and v only.
    held_k, held_v = (
        jnp.pad(x, ((0, -len(x) % block), (0, 0), (0, 0))) for x in caches.take(entry.pages, ragged.table[0])
    )
    position = jnp.arange(len(held_k), dtype=jnp.int32)
    is_before = (position < _before(ragged)).astype(jnp.int32)
    own = places(ragged, k.shape[0])
    return _Keys(
        jnp.concatenate([held_k.astype(k.dtype), k]),
        jnp.concatenate([held_v.astype(v.dtype), v]),
        jnp.concatenate([is_before, _numbers(own, ragged)]),
        jnp.concatenate([position, own.position]),
    )


def _before(ragged: Ragged) -> jax.Array:
    """Returns how many tokens of the first sequence come before its new ones, [] int32."""
    return ragged.length[0] - (ragged.start[1] - ragged.start[0])


def _numbers(own: Places, ragged: Ragged) -> jax.Array:
    """Returns the number of each token's sequence from 1, and 0 at padding: [F] int32."""
    return jnp.where(own.sequence < ragged.length.shape[0], own.sequence + 1, 0)


def _mask(keys: _Keys, size: int) -> jax.Array:
    """Returns which keys each of the `size` new tokens reads, [F, E] bool."""
    number, position = keys.sequence[-size:], keys.position[-size:]
    return readable(number, position, number, keys.sequence, keys.position)


def xla_paged_attention(q: jax.Array, k: jax.Array, v: jax.Array, entry: Paged) -> jax.Array:
    """Computes the attention of a chunk with all scores in memory, [N, F, E] float32.

    Args:
        q: [F, N, H].
        k, v: [F, K, H].
        entry: with pages that hold the new tokens already.

    Returns:
        [F, N, H] in q's dtype.
    """
    (size, heads, head_dim), kv_heads = q.shape, k.shape[1]
    keys = _keys(k, v, entry)
    grouped = (q * head_dim**-0.5).reshape(size, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("FKGH,EKH->KGFE", grouped, keys.k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(_mask(keys, size), scores, NEVER), axis=-1).astype(v.dtype)
    return jnp.einsum("KGFE,EKH->FKGH", weights, keys.v).reshape(q.shape)


def chunked_paged_attention(q: jax.Array, k: jax.Array, v: jax.Array, entry: Paged) -> jax.Array:
    """Computes `xla_paged_attention` by the pairs of blocks that are read; arguments and result are the same."""
    keys, size, ragged = _keys(k, v, entry, BLOCK), q.shape[0], entry.ragged
    number, position = keys.sequence[-size:], keys.position[-size:]
    first = jnp.arange(0, keys.k.shape[0] - size, BLOCK)  # of each block of pages, its first position
    row = jnp.arange(size // BLOCK)
    is_real = row * BLOCK < ragged.start[-1]
    continues = row * BLOCK < ragged.start[1]  # blocks that hold tokens of the first sequence
    held = continues[:, None] & (first < _before(ragged))
    # Sequences lie in order, so that two blocks share a sequence if the later block begins with the one that the
    # earlier block ends with.
    sequence = places(ragged, size).sequence.reshape(-1, BLOCK)
    own = (row <= row[:, None]) & (sequence[:, -1] >= sequence[:, :1]) & is_real[:, None]
    blocks = jnp.concatenate([held, own], axis=1)
    reading = Reading(number, number, position, keys.sequence, keys.position, blocks)
    return blocked_attention(q, keys.k.swapaxes(0, 1), keys.v.swapaxes(0, 1), reading)


def cudnn_paged_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, entry: Paged, implementation: str = "cudnn"
) -> jax.Array:
    """Computes the attention of new tokens with cuDNN: in decoding with its kernel for pages, else with a mask [F, E].

    Arguments and result are those of `xla_paged_attention`.

    Args:
        implementation: "cudnn", or for tests without a GPU "xla".
    """
    size = q.shape[0]
    if size == entry.ragged.table.shape[0]:  # a chunk has more tokens than sequences
        pages, ragged = entry
        halves = pages.reshape(-1, *pages.shape[2:])  # the keys of a page, then its values
        table = jnp.minimum(ragged.table, len(pages) - 1)  # the kernel would read past the pool
        decode = cudnn.read_pages if implementation == "cudnn" else _gathered
        return decode(q, halves, 2 * table, 2 * table + 1, ragged.length)
    keys = _keys(k, v, entry)
    # Padding reads itself, because a softmax over nothing would not be finite.
    itself = jnp.eye(size, keys.k.shape[0], keys.k.shape[0] - size, dtype=bool)
    mask = (_mask(keys, size) | itself)[None, None]
    mixed = jax.nn.dot_product_attention(q[None], keys.k[None], keys.v[None], mask=mask, implementation=implementation)
    return mixed[0]


def _gathered(q: jax.Array, pages: jax.Array, k_table: jax.Array, v_table: jax.Array, length: jax.Array) -> jax.Array:
    """Computes `cudnn.read_pages` in plain JAX, for tests."""

    def of_row(q: jax.Array, k_table: jax.Array, v_table: jax.Array, length: jax.Array) -> jax.Array:
        k, v = (pages[table].reshape(-1, *pages.shape[2:]) for table in (k_table, v_table))
        grouped = q.reshape(k.shape[1], -1, q.shape[1]) * q.shape[1] ** -0.5
        scores = jnp.einsum("KGH,EKH->KGE", grouped, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(jnp.arange(len(k)) < length, scores, NEVER), axis=-1).astype(v.dtype)
        return jnp.einsum("KGE,EKH->KGH", weights, v).reshape(q.shape)

    return jax.vmap(of_row)(q, k_table, v_table, length)


# The values of DecoderConfig.attention, as in `attention.PACKED`.
PAGED: dict[str, Callable[..., jax.Array]] = {
    "xla": xla_paged_attention,
    "chunked": chunked_paged_attention,
    "cudnn": cudnn_paged_attention,
    "splash": splash_paged_attention,
    "splash_interpret": functools.partial(splash_paged_attention, interpret=True),
}
