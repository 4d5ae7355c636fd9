"""Products of activations with weights, in whichever order a weight lies in memory.

A weight of a sublayer is [inputs..., outputs...], as it is trained. XLA's CPU backend multiplies few rows twice as fast
where the weight is the left factor and lies by outputs, so the sampler on CPUs has its copy in that order.

Legend, where a product is one of matrices: R rows, I inputs, O outputs. Other letters are those of the caller.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from igrpo_jax.distributed import sharding

# Up to this many rows, a product with the weight on the left is faster: 2 times with 4 and 8, 1.6 with 16 and 32 rows
# of SmolLM2-135M on two cores, and as fast with 64.
FEW_ROWS = 64

NAME = "product"  # by which a policy of jax.checkpoint finds the products of activations with weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputMajor:
    """A weight [outputs..., inputs...], or what stands for one: its shape, or its sharding."""

    stored: Any


def output_major(path: str, weight: jax.Array) -> jax.Array | OutputMajor:
    """Returns the weight at `path` output-major, and what is not a weight of a sublayer unchanged."""
    if not sharding.is_linear(path):
        return weight
    return OutputMajor(jnp.transpose(weight, _turned(path, tuple(range(weight.ndim)))))


def as_trained(path: str, weight: jax.Array | OutputMajor) -> jax.Array:
    """Returns the weight at `path` [inputs..., outputs...] that `output_major` got."""
    if not isinstance(weight, OutputMajor):
        return weight
    outputs = weight.stored.ndim - sharding.input_axes(path)
    return jnp.moveaxis(weight.stored, range(outputs), range(-outputs, 0))


def output_major_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of what `output_major` stores."""
    return _turned(path, shape) if sharding.is_linear(path) else shape


def output_major_sharding(path: str, where: NamedSharding) -> NamedSharding | OutputMajor:
    """Returns the sharding of what `output_major` returns of a weight with the sharding `where`."""
    if not sharding.is_linear(path):
        return where
    return OutputMajor(NamedSharding(where.mesh, PartitionSpec(*_turned(path, tuple(where.spec)))))


def _turned(path: str, axes: tuple) -> tuple:
    """Returns what `axes` says of the axes of a weight in the order that `OutputMajor` has."""
    cut = sharding.input_axes(path)
    return *axes[cut:], *axes[:cut]


def product(subscripts: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
    """Returns the product of activations with a weight.

    Args:
        subscripts: subscripts of an einsum of `x` and the weight [inputs..., outputs...], such as "BTD,DF->BTF". The
            axes of the result are those of `x` that are not inputs, and then the outputs.
        weight: parameter whose value is an array, or an OutputMajor.
    """
    value = weight.get_value()
    if not isinstance(value, OutputMajor):
        return checkpoint_name(_product(subscripts, x, value), NAME)
    left, right, _ = _axes(subscripts)
    inputs = sum(axis in left for axis in right)
    rows, outputs = x.shape[: len(left) - inputs], value.stored.shape[: len(right) - inputs]
    # As matrices, because XLA would turn round a weight that has two axes of inputs.
    flat = x.reshape(math.prod(rows), -1)
    matrix = value.stored.reshape(math.prod(outputs), -1)
    if len(flat) > FEW_ROWS:
        return jnp.einsum("RI,OI->RO", flat, matrix).reshape(*rows, *outputs)
    # Without the barrier XLA would put the activations on the left again.
    return jax.lax.optimization_barrier(jnp.einsum("OI,RI->OR", matrix, flat)).T.reshape(*rows, *outputs)


def _axes(subscripts: str) -> tuple[str, str, str]:
    """Returns the axes of the activations, of the weight and of their product."""
    factors, result = subscripts.split("->")
    left, right = factors.split(",")
    return left, right, result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the einsum of activations and a weight as it is trained.

    The gradient of the weight is written by hand, with the narrower one of its factors on the left: XLA's CPU compiler
    makes a transposed copy of that one together with what it is computed from, element by element. In JAX's own rule
    the gradient of the result is always on the left, and copies of those of an MLP, with the derivative of silu, took
    a tenth of the time of SmolLM2-135M's updates.
    """
    return jnp.einsum(subscripts, x, weight)


def _forward(subscripts: str, x: jax.Array, weight: jax.Array):
    return _product(subscripts, x, weight), (x, weight)


def _backward(subscripts: str, kept: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, weight = kept
    left, right, result = _axes(subscripts)
    inputs = "".join(axis for axis in right if axis in left)
    outputs = right.removeprefix(inputs)
    of_x = jnp.einsum(f"{result},{right}->{left}", gradient, weight)
    if x.size <= gradient.size:
        return of_x, jnp.einsum(f"{left},{result}->{right}", x, gradient)
    turned = jnp.einsum(f"{result},{left}->{outputs}{inputs}", gradient, x)  # in one step einsum would swap the factors
    return of_x, jnp.moveaxis(turned, range(len(outputs)), range(-len(outputs), 0))


_product.defvjp(_forward, _backward)
