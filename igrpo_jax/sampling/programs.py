"""The programs of the sampler: the functions of `steps`, compiled for every shape that sampling may need.

Prompts are padded to one of a few lengths. Decoding reads one of a few lengths of the cache; at the end of a rollout,
when most slots are done, it runs only some of them. Temperature, top-p, top-k, limits and keys are traced, so that
they need no programs of their own.
"""

import itertools
from collections.abc import Callable, Iterator
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
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.costs import ModelCosts
from igrpo_jax.sampling import steps
from igrpo_jax.sampling.steps import Fork, PrefilledPrompts, Sampling, State

HARDLY_MORE = 1.125  # bytes that a decode step may move in place of 1, to save a program
WIDTH = 8  # slots that one call inserts, moves or harvests; more take several calls


@dataclass(frozen=True)
class Sizes:
    """What the programs of a sampler are compiled for."""

    shard_slots: int  # slots of each shard of the batch
    length: int  # positions of a slot's cache
    max_context: int  # tokens of the longest prompt
    max_completion: int  # most tokens of a completion (M)
    steps_per_dispatch: int  # decode steps of one call at most (K)
    prefill_chunk: int  # tokens of a prompt that are read at once


class SamplerPrograms:
    """One `Program` for each function of `steps`, on the part of the mesh that one process samples on.

    Args:
        mesh: the mesh of this process.
        eos_ids: the tokens that end a completion.

    Attributes:
        buckets: the lengths that decoding may read, by how many slots of a shard it runs.
        prefill_buckets: the lengths that prompts are padded to.
        state: all slots, as abstract arrays.
        weights: the rollout copy of the weights, as abstract arrays.
        batch_sharding: splits arrays over the shards of the batch by their first dimension.
        costs: the costs of the model on this mesh.
    """

    def __init__(self, cfg: DecoderConfig, mesh: jax.sharding.Mesh, eos_ids: tuple[int, ...], dtype: str, sizes: Sizes):
        self.prefill_buckets = _prefill_buckets(sizes.max_context, sizes.prefill_chunk)
        self.batch_sharding = sharding.batch_sharding(mesh)
        self.costs = ModelCosts(cfg, dtype, mesh)
        self.buckets = {
            rows: _worthwhile(reads, partial(self.costs.decode, rows))
            for rows, reads in _decode_buckets(sizes.shard_slots, sizes.length).items()
        }
        self.weights = _abstract_weights(cfg, mesh, dtype)
        self._cfg = cfg
        self._mesh = mesh
        self._sizes = sizes
        self._eos = np.asarray(eos_ids, np.int32)
        self._shards = sharding.batch_shards(mesh)
        self._replicated = sharding.replicated(mesh)
        cache = caches.shardings(cfg, mesh)
        vocab = NamedSharding(mesh, sharding.spec(("batch", "vocab")))
        self._prompts_sharding = PrefilledPrompts(cache, vocab, self.batch_sharding)
        self._state_sharding = State(cache, *[self.batch_sharding] * 9)
        slots = sizes.shard_slots * self._shards
        self._build_empty = partial(steps.empty, cfg, slots, sizes.length, sizes.max_completion, dtype)
        self.state = _with_shardings(jax.eval_shape(self._build_empty), self._state_sharding)

    def __iter__(self) -> Iterator[Program]:
        return iter((self.empty, self.harvest, self.move, self.prefill, self.insert, self.decode))

    @cached_property
    def empty(self) -> Program:
        """Makes all slots, free."""
        return Program(
            "empty",
            jax.jit(self._build_empty, out_shardings=self._state_sharding),
            lambda: (),
            self._mesh,
            cost=lambda: self.costs.cache_slots(self._sizes.shard_slots, self._sizes.length),
        )

    @cached_property
    def prefill(self) -> Program:
        """Reads prompts into a cache, one for each shard; the shape is the length that they are padded to."""
        return Program(
            "prefill",
            jax.jit(partial(steps.prefill, self._cfg, self._sizes.prefill_chunk), out_shardings=self._prompts_sharding),
            self._prefill_arguments,
            self._mesh,
            shapes=[(size,) for size in self.prefill_buckets],
            cost=self.costs.prefill,
        )

    @cached_property
    def insert(self) -> Program:
        """Forks a prefilled prompt to slots; the shape is the length that it was padded to."""
        return Program(
            "insert",
            jax.jit(partial(steps.insert, self._mesh, self._eos), donate_argnums=0, out_shardings=self._state_sharding),
            self._insert_arguments,
            self._mesh,
            shapes=[(size,) for size in self.prefill_buckets],
            cost=lambda size: self.costs.cache_slots(1 + WIDTH, size),
        )

    @cached_property
    def decode(self) -> Program:
        """Draws up to K tokens in each active slot; the shape is (slots of a shard to run, cache positions to read)."""
        sizes, run = self._sizes, partial(steps.decode, self._cfg, self._mesh, self._eos)
        return Program(
            "decode",
            jax.jit(
                partial(run, steps=sizes.steps_per_dispatch),
                donate_argnums=1,
                static_argnames=("rows", "read"),
                out_shardings=(self._state_sharding, self.batch_sharding),
            ),
            lambda rows, read: (self.weights, self.state, self._ints_of_shards(), _abstract_sampling()),
            self._mesh,
            shapes=[(rows, read) for rows, reads in self.buckets.items() for read in reads],
            # Reading the whole cache, and reading as much of it as is copied first.
            largest=[(sizes.shard_slots, read) for read in self.buckets[sizes.shard_slots][-2:]],
            static=("rows", "read"),
            cost=lambda rows, read: self.costs.decode(rows, read) * sizes.steps_per_dispatch,
        )

    @cached_property
    def move(self) -> Program:
        """Copies slots to others of their shard; a shard of one slot never needs it."""
        return Program(
            "move",
            jax.jit(partial(steps.move, self._mesh), donate_argnums=0, out_shardings=self._state_sharding),
            lambda: (self.state, self._ints_of_shards(WIDTH), self._ints_of_shards(WIDTH)),
            self._mesh,
            shapes=[()] * (self._sizes.shard_slots > 1),
            cost=lambda: self.costs.cache_slots(2 * WIDTH, self._sizes.length),
        )

    @cached_property
    def harvest(self) -> Program:
        """Reads the tokens, log-probs and entropies of some slots."""
        return Program(
            "harvest",
            jax.jit(steps.harvest, out_shardings=self._replicated),
            lambda: (self.state, self._ints(WIDTH)),
            self._mesh,
            cost=lambda: Cost(0, 2 * WIDTH * 8 * self._sizes.max_completion),
        )

    def _prefill_arguments(self, size: int) -> tuple:
        return self.weights, self._ints_of_shards(size), self._ints_of_shards()

    def _insert_arguments(self, size: int) -> tuple:
        with jax.set_mesh(self._mesh):
            prompts = jax.eval_shape(self.prefill.jitted, *self._prefill_arguments(size))
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        fork = Fork(self._ints(), self._ints(WIDTH), self._ints(WIDTH), self._ints(WIDTH), key, self._ints())
        return self.state, _with_shardings(prompts, self._prompts_sharding), fork, _abstract_sampling()

    def _ints(self, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.int32, sharding=self._replicated)

    def _ints_of_shards(self, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self._shards, *size), jnp.int32, sharding=self.batch_sharding)


def weight_shardings(cfg: DecoderConfig, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """Returns the shardings of the rollout copy of the weights, gathered over data and fsdp."""
    return {path: sharding.param_sharding(mesh, path, gathered=True) for path in decoder.shapes(cfg)}


def traced(sampling: Sampling) -> Sampling:
    """Returns `sampling` as numpy scalars of the dtypes that programs are compiled for."""
    return Sampling(np.float32(sampling.temperature), np.float32(sampling.top_p), np.int32(sampling.top_k))


def _abstract_sampling() -> Sampling:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), traced(Sampling(1.0)))


def _abstract_weights(cfg: DecoderConfig, mesh: jax.sharding.Mesh, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    shardings = weight_shardings(cfg, mesh)
    return {
        path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=shardings[path])
        for path, shape in decoder.shapes(cfg).items()
    }


def _with_shardings(tree: NamedTuple, shardings: NamedTuple) -> NamedTuple:
    """Returns `tree` of shapes with the sharding of each of its parts."""
    return jax.tree.map(lambda sharding, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shardings, tree)


def _decode_buckets(shard_slots: int, length: int) -> dict[int, tuple[int, ...]]:
    """Returns the lengths to read by how many slots of a shard decode.

    At the end of a rollout, when few slots are left, coarser lengths suffice.
    """
    halves = itertools.takewhile(lambda rows: rows >= 4, (shard_slots >> i for i in range(1, 32)))
    fine, coarse = length_buckets(length, 128), _doubled(length, 128)
    return dict.fromkeys(sorted({1, *halves}), coarse) | {shard_slots: fine}


def _worthwhile(reads: tuple[int, ...], cost: Callable[[int], Cost]) -> tuple[int, ...]:
    """Returns `reads` without the lengths in whose place the next one may be read for hardly more.

    That is the case where few slots decode: then a step reads the weights and little else. Each length is a program.

    Args:
        cost: maps a length to the cost of a decode step that reads it.
    """
    kept = [reads[-1]]
    for read in reversed(reads[:-1]):
        if cost(kept[0]).bytes > HARDLY_MORE * cost(read).bytes:
            kept.insert(0, read)
    return tuple(kept)


def _doubled(longest: int, smallest: int) -> tuple[int, ...]:
    """Returns lengths from `smallest`, each twice the one before, the last one `longest`."""
    sizes = itertools.takewhile(lambda size: size < longest, (smallest << i for i in range(32)))
    return (*sizes, longest)


def _prefill_buckets(longest: int, chunk: int) -> tuple[int, ...]:
    """Returns lengths up to a chunk, and multiples of a chunk beyond it.

    Where prompts are long, there are no short lengths: each length is a program, whose code stays on the device (161
    MiB for 28 layers on a TPU).
    """
    smallest = 32 if longest < 1024 else 128
    if longest <= chunk:
        return length_buckets(longest, smallest)
    multiples = {-(-size // chunk) * chunk for size in length_buckets(longest, chunk)}
    return (*length_buckets(chunk, smallest), *sorted(multiples - {chunk}))
