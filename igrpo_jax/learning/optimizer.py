"""The optimizers of optax behind a global-norm clip, with a linear warm-up and then a cosine, and how their state
is sharded.

- adamw: two moments for each parameter.
- muon: one momentum for each weight of a sublayer, orthogonalized as a matrix [inputs, outputs]. Heads and their width
  are one axis, so that q_proj is the matrix that a Hugging Face file holds; Mamba-2's projections and LoRA's two
  factors are matrices too. Embedding, head, convolutions, norms and biases take AdamW with Nesterov's momentum, as
  optax.contrib.muon has it. Steps have 0.2 as their root mean square, like AdamW's (arXiv 2502.16982), so that a
  learning rate is worth about the same with either.
- adafactor: of a matrix with at least 128 inputs and outputs only the means over rows and columns of the squared
  gradient, without momentum (arXiv 1804.04235); steps are not scaled by the size of the parameters.

Weight decay is decoupled, as in AdamW, for all of them. There are no 8-bit moments: optax has none, and
bitsandbytes and torchao, which have them, are for PyTorch.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib
from jax.sharding import NamedSharding, PartitionSpec

from igrpo_jax.config import OptimizerConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.models import decoder

Shapes = Mapping[str, tuple[int, ...]]
ROOT_MEAN_SQUARE = 0.2  # of Muon's steps before the learning rate
# Muon's own coefficients, once for each of its five steps, so that optax runs these in a loop. With coefficients given
# only once it unrolls the steps, and a program with hundreds of matrices takes minutes to compile.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def make_optimizer(
    config: OptimizerConfig, total_optimizer_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of a run of `total_optimizer_steps`, and the learning rate by the number of steps made."""
    schedule = make_schedule(config, total_optimizer_steps)
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    if config.name == "adamw":
        adamw = optax.adamw(
            schedule,
            config.b1,
            config.b2,
            weight_decay=config.weight_decay,
            mask=_decays,
            mu_dtype=config.mu_dtype,
        )
        return optax.chain(clip, adamw), schedule
    # Muon and Adafactor cannot mask weight decay for all parameters: it is added to their updates of learning rate 1.
    step = _muon(config) if config.name == "muon" else _adafactor()
    decay = optax.add_decayed_weights(-config.weight_decay, mask=_decays)
    return optax.chain(clip, step, decay, optax.scale_by_schedule(schedule)), schedule


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.contrib.muon(
        1.0,
        NEWTON_SCHULZ,
        beta=config.b1,
        adam_b1=config.b1,
        adam_b2=config.b2,
        mu_dtype=config.mu_dtype,
        muon_weight_dimension_numbers=lambda params: {path: _dimensions(path) for path in params},
        consistent_rms=ROOT_MEAN_SQUARE,
    )


def _dimensions(path: str) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns which axes of a parameter are the inputs and the outputs of a matrix; None if it is not a matrix."""
    inputs = sharding.matrix_inputs(path)
    if inputs is None:
        return None
    axes = tuple(range(len(sharding.logical_axes(path))))
    return optax.contrib.MuonDimensionNumbers(reduction_axis=axes[:inputs], output_axis=axes[inputs:])


def _adafactor() -> optax.GradientTransformation:
    """Returns Adafactor on matrices: optax factors the two largest axes, which of [embed, heads, head_dim] may be
    any two."""
    inner = optax.adafactor(multiply_by_parameter_scale=False)

    def init(params: decoder.Params) -> optax.OptState:
        return inner.init(_as_matrices(params))

    def update(grads: decoder.Params, state: optax.OptState, params: decoder.Params) -> tuple[dict, optax.OptState]:
        steps, state = inner.update(_as_matrices(grads), state, _as_matrices(params))
        return {path: step.reshape(params[path].shape) for path, step in steps.items()}, state

    return optax.GradientTransformation(init, update)


def _as_matrices(tree: decoder.Params) -> decoder.Params:
    return {path: x.reshape(_matrix_shape(path, x.shape)) for path, x in tree.items()}


def _matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    inputs = sharding.matrix_inputs(path)
    return shape if inputs is None else (math.prod(shape[:inputs]), math.prod(shape[inputs:]))


def _decays(params: decoder.Params) -> dict[str, bool]:
    return {path: not path.endswith(("scale", "_bias", "a_log", "skip")) for path in params}


def state_shardings(mesh: jax.sharding.Mesh, opt_state: Any, shapes: Shapes) -> Any:
    """Returns the sharding of each array of an optimizer's state: that of its parameter, on the axes that it has.

    Args:
        opt_state: arrays, or abstract ones.
        shapes: the shapes of the parameters by path.
    """

    def place(keys: tuple, x: jax.ShapeDtypeStruct) -> NamedSharding:
        paths = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey) and key.key in shapes]
        if not paths:
            return sharding.replicated(mesh)
        fields = [key.name for key in keys if isinstance(key, jax.tree_util.GetAttrKey)]
        return NamedSharding(mesh, _spec(paths[-1], shapes[paths[-1]], fields[-1], x.shape))

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _spec(path: str, shape: tuple[int, ...], field: str, kept: tuple[int, ...]) -> PartitionSpec:
    """Returns the mesh axes of a part of the state that has the shape `kept` and is called `field` there."""
    axes = sharding.spec(sharding.logical_axes(path))
    if kept == shape:
        return axes
    inputs, matrix = sharding.matrix_inputs(path), _matrix_shape(path, shape)
    if inputs is not None:
        axes = PartitionSpec(axes[0], axes[inputs])  # of merged axes only the first may be sharded
    if kept == matrix or len(matrix) < 2:
        return axes if kept == matrix else PartitionSpec()
    *_, second, first = np.argsort(
        matrix
    )  # the two largest axes: optax sums rows over the first, columns over the other
    for name, summed in (("v_row", first), ("v_col", second)):
        left = [axis for axis in range(len(matrix)) if axis != summed]
        if field == name and kept == tuple(matrix[axis] for axis in left):
            return PartitionSpec(*(axes[axis] for axis in left))
    return PartitionSpec()  # the place of a part that this parameter does not have


def make_schedule(config: OptimizerConfig, total_optimizer_steps: int) -> optax.Schedule:
    """Returns the learning rate by the number of optimizer steps made: a linear warm-up, then a cosine down to
    min_lr_ratio of the peak."""
    warmup = min(round(config.warmup_ratio * total_optimizer_steps), max(total_optimizer_steps - 1, 0))
    peak = config.learning_rate
    # The warm-up begins above 0 and reaches the peak at its last step, so that the first step already learns.
    rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    falling = optax.cosine_decay_schedule(peak, max(total_optimizer_steps - warmup, 1), alpha=config.min_lr_ratio)
    return optax.join_schedules([rising, falling], [warmup])
