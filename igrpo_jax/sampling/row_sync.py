"""Brings one large matrix, the embedding or the head, to the sampler's mesh, some of its rows at a time.

While a matrix is exchanged, the compiler holds up to two and a half times its result. Piece by piece, this overhead
applies to one piece only.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.programs import Cost, Program, tree_bytes

TILE = 16  # rows of bfloat16 that lie together in a TPU's memory
SPLIT = "split"  # devices of a group of the sampler that are neighbours on the axis fsdp of the training


class SyncProgram(NamedTuple):
    """A program of the sync of weights."""

    program: Program
    calls: int  # of a sync
    held: int  # bytes on each device of its arguments and its result


class RowSync:
    """The program that fills some rows of the rollout copy of a matrix.

    The first axis is cut into blocks fine enough for the source, intermediate and target shardings. A piece takes rows
    from each block, so that all devices take part in it, and none holds a larger share of it than of the whole matrix.

    Args:
        path: path of the parameter.
        shape: shape of the matrix.
        mesh: mesh of the training.
        copy: sharding and mesh of the copy; its devices are those of `mesh`, in the same order.
        dtype: dtype of the copy.
        pieces: number of pieces.
    """

    def __init__(
        self, path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh, copy: NamedSharding, dtype: str, pieces: int
    ):
        self._path = path
        self._mesh = mesh
        self._whole = jax.ShapeDtypeStruct(shape, dtype, sharding=copy)
        self._way = [sharding.param_sharding(mesh, path), *between(mesh, copy.mesh, path), copy]
        self._blocks = math.lcm(*(shape[0] // way.shard_shape(shape)[0] for way in self._way))
        self._rows = shape[0] // self._blocks
        self._taken = min(self._rows, -(-self._rows // pieces // TILE) * TILE)
        self._starts = range(0, self._rows, self._taken)  # the last piece begins earlier where it would be shorter
        self._empty = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=copy)
        self._fill = jax.jit(self._filled, out_shardings=copy, donate_argnums=0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the rollout copy of the matrix `x`."""
        copy = self._empty()
        for start in self._starts:
            copy = self._fill(copy, x, np.int32(start))
        return copy

    def program(self, x: jax.ShapeDtypeStruct) -> SyncProgram:
        """Returns the program that fills one piece, as `aot` compiles it, for the abstract matrix `x`.

        Its only shape is the path. A run calls the jitted function itself.
        """
        start = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(self._mesh))
        arguments, held, calls = (self._whole, x, start), tree_bytes([x, self._whole]), len(self._starts)
        cost = lambda path: Cost(0, held / calls)
        shapes = [(self._path,)]
        program = Program("weights", self._fill, lambda path: arguments, self._mesh, shapes=shapes, cost=cost)
        return SyncProgram(program, calls, held)

    def _filled(self, copy: jax.Array, x: jax.Array, start: jax.Array) -> jax.Array:
        """Returns `copy` with the rows from `start` on of each block of `x`."""
        start = jnp.minimum(start, self._rows - self._taken)
        piece = self._taken_from(x, start).astype(copy.dtype)
        for way in self._way:
            piece = jax.lax.with_sharding_constraint(piece, way)
        # As they are taken, block by block: the compiler may have laid the copy out by columns.
        of_shards = self._of_shards(copy, self._way[-1])
        pieces = piece.reshape(len(of_shards), -1, self._taken, *x.shape[1:])
        for i, row in enumerate(range(0, of_shards.shape[1], self._rows)):
            of_shards = jax.lax.dynamic_update_slice_in_dim(of_shards, pieces[:, i], row + start, axis=1)
        return of_shards.reshape(x.shape)

    def _taken_from(self, x: jax.Array, start: jax.Array) -> jax.Array:
        """Returns the rows from `start` on of each block of `x`, one block after another.

        Each block of a device is sliced by itself: in a reshape of all blocks the compiler may copy the matrix.
        """
        of_shards = self._of_shards(x, self._way[0])
        first = range(0, of_shards.shape[1], self._rows)
        taken = [jax.lax.dynamic_slice_in_dim(of_shards, row + start, self._taken, axis=1) for row in first]
        return jnp.stack(taken, axis=1).reshape(-1, *x.shape[1:])

    def _of_shards(self, x: jax.Array, where: NamedSharding) -> jax.Array:
        """Returns `x`, which is sharded as `where` says, with the shards of its rows as another first axis."""
        return x.reshape(x.shape[0] // where.shard_shape(x.shape)[0], -1, *x.shape[1:])


def between(mesh: jax.sharding.Mesh, sampler: jax.sharding.Mesh, path: str) -> list[NamedSharding]:
    """Returns the sharding that a matrix has on its way from one mesh to the other, at most one.

    With it the compiler first exchanges blocks within each group of the sampler, and then gathers those of the groups.
    Without it some pieces are brought to every device whole. No such sharding exists where groups cross
    the axis `data`, or do not divide into the training mesh's groups of `tensor` devices.
    """
    data, fsdp, tensor = mesh.devices.shape
    group = sampler.shape["tensor"]
    if group % tensor or (fsdp * tensor) % group:
        return []
    split = group // tensor
    devices = mesh.devices.reshape(data, fsdp // split, split, tensor)
    axes = ("data", "fsdp", SPLIT, "tensor")
    wanted = sharding.spec(sharding.logical_axes(path))
    spec = PartitionSpec(*((SPLIT, "tensor") if axis == "tensor" else axis for axis in wanted))
    return [NamedSharding(jax.sharding.Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes)), spec)]
