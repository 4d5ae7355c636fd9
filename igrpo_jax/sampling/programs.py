"""The programs of the sampler: the functions of `steps` and `decoding`, compiled for the few shapes that they have.

Prompts of any length are read in chunks of tokens. Decoding runs all slots, or fewer where few are left. Where
attention reads pages in place, that is all. Elsewhere the positions of each row are copied side by side, and decoding
has some lengths to which it copies. Temperature, top-p, top-k, limits, tables of pages and keys are traced, so that
they need no programs of their own.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.programs import Cost, Program, length_buckets
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder
from igrpo_jax.models.cache import Cache
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.costs import ModelCosts
from igrpo_jax.models.paged import page_layout
from igrpo_jax.models.products import ByOutputs, shape_by_outputs, sharding_by_outputs
from igrpo_jax.models.segments import BLOCK
from igrpo_jax.sampling import decoding, state, steps
from igrpo_jax.sampling.layout import lies_by_outputs
from igrpo_jax.sampling.pages import pages_for
from igrpo_jax.sampling.state import Chunk, Fork, Rows, Sampling, State

# Work that a decode step may do in addition, to save a program: a share of its own, and what a CPU does in 0.1 ms.
MORE = 0.1
LITTLE = 5e6
MOST_DECODES = 13  # programs of decoding; with those of reading prompts and the others no more than 20
# On a CPU, as measured: operations of a product in the time of a byte of memory, and bytes in the time that a sublayer
# takes however little it does.
CPU_BALANCE = 8
CPU_SUBLAYER = 5e5
WIDTH = 16  # slots of a shard that one call starts, and slots that one call harvests; more take several calls
LANES = 8  # prompts of a shard that are being read, or wait for slots of their samples, at most


@dataclass(frozen=True)
class Sizes:
    """What the programs of a sampler are compiled for."""

    shard_slots: int  # slots of each shard of the batch (B), or of each part of one
    pages: int  # pages of each shard, or of each part
    page_size: int  # positions of a page
    length: int  # most tokens of a prompt and its completion
    max_context: int  # tokens of the longest prompt
    max_completion: int  # most tokens of a completion (M)
    steps_per_dispatch: int  # decode steps of one call at most (K)
    prefill_chunk: int  # tokens of a shard that are read at once, at most
    parts: int = 1  # of a shard, with slots, lanes and pages of their own: those of `DecoderConfig.row_parts`

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


class SamplerPrograms:
    """One `Program` for each function, on the part of the mesh that one team of processes samples on.

    Args:
        mesh: the mesh of this process's team.
        eos_ids: the tokens that end a completion.

    Attributes:
        reads: the lengths that decoding may copy side by side, by how many slots of a part it runs; where attention
            reads pages in place, the longest alone.
        chunks: the numbers of tokens that `prefill` may read.
        state: the pages, lanes and slots of all shards, as abstract arrays.
        weights: the rollout copy of the weights, as abstract arrays.
        batch_sharding: splits arrays over the shards of the batch by their first dimension.
        costs: the costs of the model on this mesh.
    """

    def __init__(self, cfg: DecoderConfig, mesh: jax.sharding.Mesh, eos_ids: tuple[int, ...], dtype: str, sizes: Sizes):
        self.batch_sharding = sharding.batch_sharding(mesh)
        # Every process of a team reads the results of all its shards.
        self._status_sharding = sharding.replicated(mesh) if sharding.processes(mesh) > 1 else self.batch_sharding
        self.costs = ModelCosts(cfg, dtype, mesh.shape["tensor"])
        layout = page_layout(cfg.attention, cfg.head_dim, cfg.num_kv_heads // mesh.shape["tensor"])
        self.in_place = layout is not None
        layout = layout or caches.ALTERNATING
        self.on_cpu, self.on_gpu = (mesh.devices.flat[0].platform == name for name in ("cpu", "gpu"))
        self.chunks = _chunks(min(sizes.prefill_chunk, sizes.parts * sizes.lanes * sizes.max_context), self.on_cpu)
        self.weights = _abstract_weights(cfg, mesh, dtype)
        self._cfg = cfg
        self._dtype = dtype
        self._mesh = mesh
        self._sizes = sizes
        self.reads = self._decode_shapes()
        self._eos = np.asarray(eos_ids, np.int32)
        self._shards = sharding.batch_shards(mesh)
        self._replicated = sharding.replicated(mesh)
        vocab = NamedSharding(mesh, sharding.spec(("batch", "vocab")))
        cache, lanes = caches.shardings(cfg, mesh, layout=layout), caches.shardings(cfg, mesh, "M")
        self._state_sharding = State(cache, lanes, vocab, *[self.batch_sharding] * 9)
        self._window_sharding = jax.tree.map(lambda x: x.sharding, self.windows(1, sizes.page_size))
        self._build_empty = partial(
            state.empty,
            cfg,
            slots=sizes.shard_slots * sizes.parts * self._shards,
            lanes=sizes.lanes * sizes.parts * self._shards,
            pages=sizes.pages * self._shards,
            page_size=sizes.page_size,
            layout=layout,
            max_completion=sizes.max_completion,
            dtype=dtype,
        )
        self.state = _with_shardings(jax.eval_shape(self._build_empty), self._state_sharding)

    def __iter__(self) -> Iterator[Program]:
        return iter((self.empty, self.harvest, self.fork, self.prefill, self.decode))

    @cached_property
    def empty(self) -> Program:
        """Makes all pages, lanes and slots, free."""
        pool = self._sizes.pages * self._sizes.page_size
        return Program(
            "empty",
            jax.jit(self._build_empty, out_shardings=self._state_sharding),
            lambda: (),
            self._mesh,
            cost=lambda: self.costs.cache_slots(1, pool),
        )

    @cached_property
    def prefill(self) -> Program:
        """Reads a chunk of prompts on each shard; the shape is the tokens of a chunk."""
        return Program(
            "prefill",
            jax.jit(
                partial(steps.prefill, self._cfg, self._mesh), donate_argnums=1, out_shardings=self._state_sharding
            ),
            lambda size: (self.weights, self.state, self._chunk(size)),
            self._mesh,
            shapes=[(size,) for size in self.chunks],
            cost=self.costs.prefill,
        )

    @cached_property
    def fork(self) -> Program:
        """Starts samples of prompts that are read."""
        run = partial(steps.fork, self._mesh, self._eos, self._sizes.parts)
        return Program(
            "fork",
            jax.jit(run, donate_argnums=0, out_shardings=self._state_sharding),
            lambda: (self.state, self._fork(), _abstract_sampling()),
            self._mesh,
            cost=lambda: self.costs.cache_slots(2 * WIDTH, self._sizes.page_size),
        )

    @cached_property
    def decode(self) -> Program:
        """Draws up to K tokens in each active row; the shape is (rows of a part, positions of each)."""
        sizes, run = self._sizes, partial(decoding.decode, self._cfg, self._mesh, self._eos)
        return Program(
            "decode",
            jax.jit(
                partial(run, steps=sizes.steps_per_dispatch, reads_pages=self.in_place),
                donate_argnums=(1, 2),
                keep_unused=True,  # the memory of the windows
                out_shardings=(self._state_sharding, self._window_sharding, self._status_sharding),
            ),
            lambda rows, read: (
                self.weights,
                self.state,
                self.windows(rows, read),
                self._rows(rows, read),
                _abstract_sampling(),
            ),
            self._mesh,
            shapes=[(rows, read) for rows, reads in self.reads.items() for read in reads],
            cost=lambda rows, read: self.costs.decode(rows * sizes.parts, read) * sizes.steps_per_dispatch,
        )

    @cached_property
    def harvest(self) -> Program:
        """Reads the tokens, log-probs and entropies of some slots."""
        return Program(
            "harvest",
            jax.jit(steps.harvest, out_shardings=self._replicated),
            lambda: (self.state, jax.ShapeDtypeStruct((WIDTH,), jnp.int32, sharding=self._replicated)),
            self._mesh,
            cost=lambda: Cost(0, 2 * WIDTH * 8 * self._sizes.max_completion),
        )

    def windows(self, rows: int, read: int) -> Cache:
        """Returns the windows of `decode` of this shape as abstract arrays; no arrays where attention reads pages."""
        if self.in_place:
            return (None,) * len(self._cfg.pattern)
        rows *= self._sizes.parts * self._shards
        return caches.abstract_windows(self._cfg, rows, read, jnp.dtype(self._dtype), self._mesh)

    def work(self, cost: Cost) -> float:
        """Returns the bytes of memory that pass in the time of a call of this cost, more or less."""
        if not self.on_cpu:  # waits for memory alone
            return cost.bytes
        return cost.bytes + cost.flops / CPU_BALANCE + len(self._cfg.pattern) * CPU_SUBLAYER

    @cached_property
    def next_chunk(self) -> list[int]:
        """The tokens of the next chunk, by how many are unread, up to those of the largest.

        It and those after it do least work together; of several such, it is the largest.
        """
        work = {size: round(self.work(self.costs.prefill(size))) for size in self.chunks}
        least, chosen = [0], [self.chunks[0]]
        for unread in range(1, self.chunks[-1] + 1):
            together = {size: work[size] + least[max(0, unread - size)] for size in reversed(self.chunks)}
            chosen.append(min(together, key=together.__getitem__))
            least.append(together[chosen[-1]])
        return chosen

    def _decode_shapes(self) -> dict[int, tuple[int, ...]]:
        """Returns the lengths that decoding copies side by side, by the rows of a shard that it runs, fewest first."""
        sizes = self._sizes
        length, slots = sizes.slot_pages * sizes.page_size, sizes.shard_slots
        if self.in_place:  # one program of few rows; on GPUs, which compile one in seconds, some between
            halvings = (0, 1, 2, 3) if self.on_gpu else (0, 3)
            return dict.fromkeys(sorted({slots >> i for i in halvings} - {0}), (length,))
        if self.on_cpu:
            lengths = dict.fromkeys(length_buckets(slots, max(1, slots >> 6)), length_buckets(length, 128))
        else:
            lengths = {slots >> 3: (length,), slots: tuple(max(1, length >> i) for i in (2, 1, 0))}
        shapes = [
            (rows, read)
            for rows, reads in lengths.items()
            if rows
            for read in dict.fromkeys(pages_for(read, sizes.page_size) * sizes.page_size for read in reads)
        ]
        kept = _worthwhile(shapes, [self.work(self.costs.decode(*shape)) for shape in shapes])
        return {rows: tuple(sorted(read for n, read in kept if n == rows)) for rows in sorted({n for n, _ in kept})}

    def _chunk(self, size: int) -> Chunk:
        lanes, pages = self._sizes.parts * self._sizes.lanes, pages_for(self._sizes.max_context, self._sizes.page_size)
        ints = self._ints
        return Chunk(ints(size), ints(lanes), ints(lanes, pages), ints(lanes + 1), ints(1), ints(lanes))

    def _fork(self) -> Fork:
        keys = jax.ShapeDtypeStruct((self._shards, WIDTH, 2), jnp.uint32, sharding=self.batch_sharding)
        return Fork(**dict.fromkeys(Fork._fields, self._ints(WIDTH)) | {"key": keys})

    def _rows(self, rows: int, read: int) -> Rows:
        rows *= self._sizes.parts
        runs = jax.ShapeDtypeStruct((self._shards, rows), jnp.bool_, sharding=self.batch_sharding)
        pages = read // self._sizes.page_size
        return Rows(self._ints(rows), runs, self._ints(rows, pages), self._ints())

    def _ints(self, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self._shards, *size), jnp.int32, sharding=self.batch_sharding)


def weight_shardings(cfg: DecoderConfig, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding | ByOutputs]:
    """Returns the shardings of the rollout copy of the weights, gathered over data and fsdp; on CPUs by outputs."""
    shardings = {path: sharding.param_sharding(mesh, path, gathered=True) for path in decoder.shapes(cfg)}
    if not lies_by_outputs(mesh):
        return shardings
    return {path: sharding_by_outputs(path, where) for path, where in shardings.items()}


def traced(sampling: Sampling) -> Sampling:
    """Returns `sampling` as numpy scalars of the dtypes that programs are compiled for."""
    return Sampling(np.float32(sampling.temperature), np.float32(sampling.top_p), np.int32(sampling.top_k))


def _abstract_sampling() -> Sampling:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), traced(Sampling(1.0)))


def _abstract_weights(cfg: DecoderConfig, mesh: jax.sharding.Mesh, dtype: str) -> dict:
    abstract = lambda shape, where: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)
    shapes = decoder.shapes(cfg)
    return {
        path: ByOutputs(abstract(shape_by_outputs(path, shapes[path]), where.stored))
        if isinstance(where, ByOutputs)
        else abstract(shapes[path], where)
        for path, where in weight_shardings(cfg, mesh).items()
    }


def _with_shardings(tree: NamedTuple, shardings: NamedTuple) -> NamedTuple:
    """Returns `tree` of shapes with the sharding of each of its parts."""
    return jax.tree.map(lambda sharding, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shardings, tree)


def _chunks(longest: int, on_cpu: bool) -> tuple[int, ...]:
    """Returns the tokens of a chunk, each a multiple of BLOCK: one number, or on a CPU some, since padding costs there.

    Args:
        longest: tokens that are read at once at most.
    """
    largest = -(-longest // BLOCK) * BLOCK
    smaller = itertools.takewhile(lambda size: size < largest, (BLOCK << 2 * i for i in range(16)))
    return (*smaller, largest) if on_cpu else (largest,)


def _hardly_more(work: np.ndarray) -> np.ndarray:
    """Returns the work that each decode step may do in place of its own, to save a program."""
    return work * (1 + MORE) + LITTLE


def _worthwhile(shapes: Sequence[tuple[int, int]], work: Sequence[float]) -> list[tuple[int, int]]:
    """Returns those of `shapes`, which are (rows, positions to read), that are worth a program.

    In place of a shape that has none, the one of least work runs that has as many rows and positions. One after another
    the shape goes that adds least to the work of all together, as if each were needed equally often: where there are
    more than MOST_DECODES, and where this does hardly more for none of them. Of the shapes with the same rows, the one
    of most positions goes last.

    Args:
        work: of a decode step of each.
    """
    (rows, reads), own = np.array(shapes).T, np.array(work)
    does = np.where((rows >= rows[:, None]) & (reads >= reads[:, None]), own, np.inf)  # [shape, the one that runs]
    kept = np.ones(len(shapes), bool)
    while True:
        options = []
        for i in np.flatnonzero(kept):
            left = kept & (np.arange(len(kept)) != i)
            if reads[i] < reads.max() or not left[rows == rows[i]].any():
                least = np.where(left, does, np.inf).min(axis=1)
                options.append((least.sum(), (least <= _hardly_more(own)).all(), i))
        if kept.sum() <= MOST_DECODES:
            options = [option for option in options if option[1]]
        if not options:
            return [shape for shape, is_kept in zip(shapes, kept, strict=True) if is_kept]
        kept[min(options)[2]] = False
