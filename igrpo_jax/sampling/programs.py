"""The programs of the sampler: the functions of `steps` and `decoding`, compiled for the few shapes that they have.

Prompts of any length are prefilled in chunks of tokens. Decoding runs all slots, or fewer rows where few slots are
left. Where attention does not read pages in place, the positions of each row are copied into a window; except on CPUs,
decode programs are then compiled for several window lengths (`shapes`). Temperature, top-p, top-k, limits, page tables
and random keys are traced, so that they need no programs of their own.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.programs import Cost, Program, tree_bytes
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder, windows
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.costs import ModelCosts
from igrpo_jax.models.paged import page_layout
from igrpo_jax.models.products import OutputMajor, output_major_shape, output_major_sharding
from igrpo_jax.models.windows import Windows
from igrpo_jax.sampling import decoding, shapes, state, steps
from igrpo_jax.sampling.layout import reads_pages, uses_output_major
from igrpo_jax.sampling.pages import pages_for
from igrpo_jax.sampling.shapes import WIDTH, Sizes
from igrpo_jax.sampling.state import Chunk, Fork, Rows, Sampling, State


class SamplerPrograms:
    """One `Program` for each function, on the part of the mesh that one team of processes samples on.

    Args:
        mesh: the mesh of this process's team.
        eos_ids: the tokens that end a completion.

    Attributes:
        window_lengths: the lengths of decode's windows, by the number of rows of a part; on CPUs and where attention
            reads pages in place, only the longest.
        reads_pages: whether attention reads pages where they lie, so that decode needs no windows.
        chunks: the sizes in tokens of the chunks of `prefill`.
        next_chunk: the size of the next chunk, indexed by the number of tokens to prefill, up to the largest size.
        state: the pages, lanes and slots of all shards, as abstract arrays.
        weights: the rollout copy of the weights, as abstract arrays.
        batch_sharding: splits arrays over the shards of the batch by their first dimension.
        costs: the costs of the model on this mesh.
        cfg: the model as it samples, with copies of key and value heads where the mesh needs them.
        sizes: what they are compiled for.
        resized: returns the programs of other sizes.
    """

    def __init__(self, cfg: DecoderConfig, mesh: jax.sharding.Mesh, eos_ids: tuple[int, ...], dtype: str, sizes: Sizes):
        self.resized = partial(SamplerPrograms, cfg, mesh, eos_ids, dtype)
        self.cfg = cfg
        self.mesh = mesh
        self.eos_ids = eos_ids
        self.dtype = dtype
        self.sizes = sizes
        self.batch_sharding = sharding.batch_sharding(mesh)
        # Every process of a team reads the results of all its shards.
        self._status_sharding = sharding.replicated(mesh) if sharding.processes(mesh) > 1 else self.batch_sharding
        tensor = mesh.shape["tensor"]
        self.costs = ModelCosts(cfg, dtype, tensor)
        self.reads_pages = reads_pages(cfg, tensor)
        layout = page_layout(cfg.attention, cfg.head_dim, cfg.num_kv_heads // tensor) or caches.ALTERNATING
        platform = mesh.devices.flat[0].platform
        self._on_cpu = platform == "cpu"
        self.window_lengths = shapes.decode_shapes(sizes, self.costs, platform, self.reads_pages)
        self.chunks = shapes.chunk_sizes(sizes, platform)
        self.next_chunk = shapes.next_chunks(self.chunks, self.costs, platform)
        self.weights = _abstract_weights(cfg, mesh, dtype)
        self._eos = np.asarray(eos_ids, np.int32)
        self._shards = sharding.batch_shards(mesh)
        self._replicated = sharding.replicated(mesh)
        vocab = NamedSharding(mesh, sharding.spec(("batch", "vocab")))
        cache, lanes = caches.shardings(cfg, mesh, layout=layout), caches.shardings(cfg, mesh, "M")
        self._state_sharding = State(
            **dict.fromkeys(State._fields, self.batch_sharding) | {"cache": cache, "lanes": lanes, "logits": vocab}
        )
        self._build_empty = partial(
            state.empty,
            cfg,
            slots=sizes.shard_slots * sizes.parts * self._shards,
            lanes=sizes.lanes * sizes.parts * self._shards,
            # Not times parts: each part has its own copies of the kv heads, and these hold the pages of that part
            # alone.
            pages=sizes.pages * self._shards,
            page_size=sizes.page_size,
            layout=layout,
            max_completion=sizes.max_completion,
            dtype=dtype,
        )
        self.state = _with_shardings(jax.eval_shape(self._build_empty), self._state_sharding)

    def __iter__(self) -> Iterator[Program]:
        return iter((self.empty, self.harvest, self.fork, self.prefill, self.decode))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the rollout copy of the weights on each device."""
        return tree_bytes(self.weights)

    @property
    def predicted_bytes(self) -> int:
        """Bytes on each device, weights and state included, while the largest program compiled so far runs."""
        return max(self.decode.peak_bytes, self.prefill.peak_bytes, self.fork.peak_bytes + self.weight_bytes)

    @cached_property
    def empty(self) -> Program:
        """Makes all pages, lanes and slots, free."""
        pool = self.sizes.pages * self.sizes.page_size
        return Program(
            "empty",
            jax.jit(self._build_empty, out_shardings=self._state_sharding),
            lambda: (),
            self.mesh,
            cost=lambda: self.costs.cache_slots(1, pool),
        )

    @cached_property
    def prefill(self) -> Program:
        """Prefills a chunk of prompts on each shard; the shape is the tokens of a chunk."""
        return Program(
            "prefill",
            jax.jit(partial(steps.prefill, self.cfg, self.mesh), donate_argnums=1, out_shardings=self._state_sharding),
            lambda size: (self.weights, self.state, self._chunk(size)),
            self.mesh,
            shapes=[(size,) for size in self.chunks],
            cost=self.costs.prefill,
        )

    @cached_property
    def fork(self) -> Program:
        """Starts samples of prefilled prompts."""
        run = partial(steps.fork, self.mesh, self._eos, self.sizes.parts)
        return Program(
            "fork",
            jax.jit(run, donate_argnums=0, out_shardings=self._state_sharding),
            lambda: (self.state, self._fork(), _abstract_sampling()),
            self.mesh,
            cost=lambda: self.costs.cache_slots(2 * WIDTH, self.sizes.page_size),
        )

    @cached_property
    def decode(self) -> Program:
        """Draws up to K tokens in each active row; the shape is (rows of a part, window length)."""
        sizes, run = self.sizes, partial(decoding.decode, self.cfg, self.mesh, self._eos)
        return Program(
            "decode",
            jax.jit(
                partial(run, steps=sizes.steps_per_dispatch, reads_pages=self.reads_pages),
                donate_argnums=(1, 2),
                keep_unused=True,  # unread windows are still arguments: their memory is donated
                out_shardings=(self._state_sharding, windows.sharding(self.mesh), self._status_sharding),
            ),
            lambda rows, window_length: (
                self.weights,
                self.state,
                self.windows(rows, window_length),
                self._rows(rows, window_length),
                _abstract_sampling(),
            ),
            self.mesh,
            shapes=[(rows, length) for rows, lengths in self.window_lengths.items() for length in lengths],
            cost=lambda rows, length: self.costs.decode(rows * sizes.parts, length) * sizes.steps_per_dispatch,
        )

    @cached_property
    def harvest(self) -> Program:
        """Reads the tokens, log-probs and entropies of some slots."""
        return Program(
            "harvest",
            jax.jit(steps.harvest, out_shardings=self._replicated),
            lambda: (self.state, jax.ShapeDtypeStruct((WIDTH,), jnp.int32, sharding=self._replicated)),
            self.mesh,
            cost=lambda: Cost(0, 2 * WIDTH * 8 * self.sizes.max_completion),
        )

    def windows(self, rows: int, window_length: int) -> Windows:
        """Returns the windows of `decode` of this shape as abstract arrays: none where attention reads pages, or on
        accelerators, whose memory XLA keeps."""
        if self.reads_pages or not self._on_cpu:
            return (None,) * len(self.cfg.pattern)
        rows *= self.sizes.parts * self._shards
        page_size, dtype = self.sizes.page_size, jnp.dtype(self.dtype)
        return windows.abstract(self.cfg, rows, window_length, page_size, dtype, self.mesh)

    def _chunk(self, size: int) -> Chunk:
        lanes, pages = self.sizes.parts * self.sizes.lanes, pages_for(self.sizes.longest_prompt, self.sizes.page_size)
        ints = self._ints
        return Chunk(
            tokens=ints(size),
            length=ints(lanes),
            table=ints(lanes, pages),
            start=ints(lanes + 1),
            prompts=ints(1),
            lane=ints(lanes),
        )

    def _fork(self) -> Fork:
        keys = jax.ShapeDtypeStruct((self._shards, WIDTH, 2), jnp.uint32, sharding=self.batch_sharding)
        return Fork(**dict.fromkeys(Fork._fields, self._ints(WIDTH)) | {"key": keys})

    def _rows(self, rows: int, window_length: int) -> Rows:
        rows *= self.sizes.parts
        runs = jax.ShapeDtypeStruct((self._shards, rows), jnp.bool_, sharding=self.batch_sharding)
        pages = window_length // self.sizes.page_size
        ints = self._ints
        return Rows(
            slot=ints(rows), runs=runs, table=ints(rows, pages), min_active=ints(), stale=ints(rows), stale_count=ints()
        )

    def _ints(self, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self._shards, *size), jnp.int32, sharding=self.batch_sharding)


def weight_shardings(cfg: DecoderConfig, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding | OutputMajor]:
    """Returns the shardings of the rollout copy of the weights, gathered over data and fsdp; output-major on CPUs."""
    shardings = {path: sharding.param_sharding(mesh, path, gathered=True) for path in decoder.shapes(cfg)}
    if not uses_output_major(mesh):
        return shardings
    return {path: output_major_sharding(path, where) for path, where in shardings.items()}


def traced(sampling: Sampling) -> Sampling:
    """Returns `sampling` as numpy scalars of the dtypes that programs are compiled for."""
    return Sampling(np.float32(sampling.temperature), np.float32(sampling.top_p), np.int32(sampling.top_k))


def _abstract_sampling() -> Sampling:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), traced(Sampling(1.0)))


def _abstract_weights(cfg: DecoderConfig, mesh: jax.sharding.Mesh, dtype: str) -> dict:
    abstract = lambda shape, where: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)
    shapes = decoder.shapes(cfg)
    return {
        path: OutputMajor(abstract(output_major_shape(path, shapes[path]), where.stored))
        if isinstance(where, OutputMajor)
        else abstract(shapes[path], where)
        for path, where in weight_shardings(cfg, mesh).items()
    }


def _with_shardings(tree: NamedTuple, shardings: NamedTuple) -> NamedTuple:
    """Returns `tree` of shapes with the sharding of each of its parts."""
    return jax.tree.map(lambda sharding, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shardings, tree)
