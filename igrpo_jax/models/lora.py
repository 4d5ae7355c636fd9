"""LoRA (arXiv 2106.09685): for some weights W only a low-rank change is trained, and W itself stays fixed.

    W' = W + (alpha / rank) A B,    A: inputs of W -> rank,    B: rank -> outputs of W

Both the trainer and the sampler compute this sum, and not x W + (x A) B. So the weights that sample are exactly those
that are trained, including rounding, as they are without LoRA. The trainer computes the sum inside each rematted
sublayer, so that only one sublayer's sum exists at a time; the sampler computes it once per step. A starts random and B
at zero: the policy starts as the base model, bit for bit, and fresh adapters are the reference model.

Paths: "blocks/0/mixer/q_proj/lora_a" and "…/lora_b" belong to "blocks/0/mixer/q_proj".

Legend: R rank.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from igrpo_jax.config import LoraConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError

Shapes = dict[str, tuple[int, ...]]

ALL = "all-linear"  # peft's name for every weight but embedding and head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A weight and its change, instead of their sum."""

    weight: jax.Array  # [inputs..., outputs...]
    a: jax.Array  # [inputs..., R] float32
    b: jax.Array  # [R, outputs...] float32
    scaling: float = field(metadata={"static": True})

    def astype(self, dtype: str) -> "Adapted":
        """Returns it with the weight, and therefore the sum, in `dtype`."""
        return replace(self, weight=self.weight.astype(dtype))

    def merged(self) -> jax.Array:
        """Returns the sum, computed in float32 and rounded once."""
        rank = self.b.shape[0]
        change = jnp.dot(self.a.reshape(-1, rank), self.b.reshape(rank, -1)).reshape(self.weight.shape)
        return (self.weight.astype(jnp.float32) + self.scaling * change).astype(self.weight.dtype)


def adapted(settings: LoraConfig, shapes: Shapes) -> list[str]:
    """Returns the paths of the weights that `settings.targets` names, in a model whose parameters have these `shapes`.

    Raises:
        InputError: a target that is not a weight of the model.
    """
    linear = {path: path.rpartition("/")[2] for path in shapes if sharding.is_linear(path)}
    names = sorted(set(linear.values()))
    for target in settings.targets:
        if target != ALL and target not in names:
            raise InputError(
                f"config.model.lora.targets = {settings.targets!r}: {target!r} matches no weight of the model; give "
                f"some of {', '.join(names)}, or {ALL} for all of them"
            )
    return [path for path, name in linear.items() if name in settings.targets or ALL in settings.targets]


def shapes(settings: LoraConfig, base: Shapes) -> Shapes:
    """Returns the shapes of the adapters of a model whose parameters have the shapes `base`."""
    result = {}
    for path in adapted(settings, base):
        cut = sharding.input_axes(path)
        result[f"{path}/lora_a"] = (*base[path][:cut], settings.rank)
        result[f"{path}/lora_b"] = (settings.rank, *base[path][cut:])
    return result


def init(settings: LoraConfig, base: Shapes, key: jax.Array, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Returns new float32 adapters in their shardings: A uniform within 1 / sqrt(inputs) of 0, as in peft; B zero."""
    adapters = {}
    for i, (path, shape) in enumerate(shapes(settings, base).items()):
        build = _zeros if path.endswith("lora_b") else _uniform
        adapters[path] = build(shape, sharding.param_sharding(mesh, path))(jax.random.fold_in(key, i))
    return adapters


@functools.cache
def _uniform(shape: tuple[int, ...], where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """Returns the jitted function that draws A with a key. There is one for each shape: in one for all adapters XLA
    compiles each of them again, which takes 20 s of CPU time for 30 layers."""
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.jit(lambda key: jax.random.uniform(key, shape, jnp.float32, -bound, bound), out_shardings=where)


@functools.cache
def _zeros(shape: tuple[int, ...], where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """Returns the jitted function that makes B, whatever the key is."""
    return jax.jit(lambda key: jnp.zeros(shape, jnp.float32), out_shardings=where)


def attach(frozen: dict[str, jax.Array], trained: dict[str, jax.Array], scaling: float) -> dict:
    """Returns the policy's parameters: frozen ones, trained ones, and an Adapted for each weight with adapters.

    With nothing frozen, these are `trained` unchanged.
    """
    params = frozen | {path: x for path, x in trained.items() if not path.endswith(("/lora_a", "/lora_b"))}
    for path in [path.removesuffix("/lora_a") for path in trained if path.endswith("/lora_a")]:
        params[path] = Adapted(frozen[path], trained[f"{path}/lora_a"], trained[f"{path}/lora_b"], scaling)
    return params


def detach(params: dict) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the frozen and the trained parameters of what `attach` returned; nothing is frozen without adapters."""
    adapted = {path: x for path, x in params.items() if _is_adapted(x)}
    if not adapted:
        return {}, params
    frozen = {path: x.weight if path in adapted else x for path, x in params.items()}
    trained = {f"{path}/lora_a": x.a for path, x in adapted.items()} | {
        f"{path}/lora_b": x.b for path, x in adapted.items()
    }
    return frozen, trained


def merge(tree):
    """Returns `tree` with every Adapted replaced by its sum."""
    return jax.tree.map(lambda x: x.merged() if _is_adapted(x) else x, tree, is_leaf=_is_adapted)


def lost_by(tree, dtype: str) -> float:
    """Returns the part of LoRA's change that is lost where the sums of `tree` are rounded to `dtype`.

    It is |rounded sum - sum| / |sum - weight| over all adapted weights, with the sums as they are trained, in the dtype
    of the weights: 0 where they are of `dtype` already, and 0 where nothing is adapted or changed yet.
    """
    adapted = [x for x in jax.tree.leaves(tree, is_leaf=_is_adapted) if _is_adapted(x)]
    squares = [sharding.to_host(_squares(dtype, x.weight.sharding.mesh)(x)) for x in adapted]
    error, change = np.array([np.zeros(2), *squares]).sum(axis=0).tolist()
    return math.sqrt(error / change) if change else 0.0


@functools.cache
def _squares(dtype: str, mesh: jax.sharding.Mesh) -> Callable[[Adapted], jax.Array]:
    """Returns the jitted function that gives the squared norms of an Adapted's rounding error and change, [2]."""
    precision = jnp.finfo(dtype)

    def squares(x: Adapted) -> jax.Array:
        weight, merged = x.weight.astype(jnp.float32), x.merged().astype(jnp.float32)
        # Of two conversions, there and back, XLA may make none.
        error = jax.lax.reduce_precision(merged, precision.nexp, precision.nmant) - merged
        return jnp.stack([jnp.sum(error**2), jnp.sum((merged - weight) ** 2)])

    return jax.jit(squares, out_shardings=sharding.replicated(mesh))


def merge_after(x: jax.Array, tree) -> tuple[jax.Array, Any]:
    """Returns `x` and the merged `tree`, which is not merged before `x` has been computed.

    Sums don't depend on activations: without the barrier XLA computes those of all sublayers before the first one runs.
    """
    if any(map(_is_adapted, jax.tree.leaves(tree, is_leaf=_is_adapted))):
        x, tree = jax.lax.optimization_barrier((x, tree))
    return x, merge(tree)


def each(apply: Callable[[jax.Array, str], jax.Array], path: str, weight: jax.Array | Adapted) -> jax.Array | Adapted:
    """Returns a weight after `apply` to it and to the two matrices of its change, if any, each with its path."""
    if not _is_adapted(weight):
        return apply(weight, path)
    a, b = apply(weight.a, f"{path}/lora_a"), apply(weight.b, f"{path}/lora_b")
    return replace(weight, weight=apply(weight.weight, path), a=a, b=b)


def _is_adapted(x) -> bool:
    return isinstance(x, Adapted)
