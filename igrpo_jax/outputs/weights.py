"""The weights of a run: those it starts from, those that LoRA adapts, and those that one of its checkpoints holds."""

from functools import partial
from pathlib import Path

import jax

from igrpo_jax.config import Config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import decoder, lora
from igrpo_jax.models.policy import Policy
from igrpo_jax.outputs.checkpoint import Checkpointer, read_params, saved_step
from igrpo_jax.outputs.console import Console


def load(policy: Policy, mesh: jax.sharding.Mesh, seed: int, dtype: str, console: Console) -> decoder.Params:
    """Weights of the model that a run is given; of a real one with a bar in bytes."""
    if not policy.path:
        return policy.load(mesh, seed, dtype)
    with console.phase("reading weights (MB)", policy.file_bytes >> 20) as update:
        return policy.load(mesh, seed, dtype, lambda done: update(done >> 20))


def first(
    config: Config,
    policy: Policy,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    dtype: str,
    console: Console,
    params: decoder.Params | None = None,
) -> decoder.Params:
    """The policy before the first update, in `dtype`, sharded as it is trained: pi_ref, and what LoRA adapts.

    A real model is read again from its files; what the built-in one had learned, `params`, is kept in
    workdir/reference.
    """
    if policy.path:
        return load(policy, mesh, config.seed, dtype, console)
    with Checkpointer(workdir / "reference", config.checkpoint) as store:
        if params is not None:
            store.save(0, params, {}, force=True)
        _, params, _ = store.restore(_abstract(decoder.shapes(policy.model), mesh, "float32"))
    return decoder.cast(params, dtype)


def adapters(config: Config, policy: Policy, mesh: jax.sharding.Mesh) -> decoder.Params:
    """Those that a LoRA run starts with. They change nothing yet: with them the policy is pi_ref."""
    return lora.init(config.model.lora, decoder.shapes(policy.model), jax.random.key(config.seed), mesh)


def saved(
    config: Config, policy: Policy, workdir: Path, mesh: jax.sharding.Mesh, console: Console, step: int | None = None
) -> tuple[decoder.Params, int]:
    """The policy of a checkpoint of the run `c` in `workdir`, the newest or that of `step`, and its step.

    In bfloat16; with LoRA adapters in float32 on weights in model.dtype. The run may be under way.

    Raises:
        InputError: there is no such checkpoint.
    """
    shapes, step = decoder.shapes(policy.model), saved_step(workdir, step)
    if not config.model.lora.rank:
        return read_params(workdir, step, _abstract(shapes, mesh, "bfloat16")), step
    trained = read_params(workdir, step, _abstract(lora.shapes(config.model.lora, shapes), mesh, "float32"))
    frozen = first(config, policy, workdir, mesh, config.model.dtype, console)
    return lora.attach(frozen, trained, config.model.lora.scaling), step


def _abstract(shapes: dict[str, tuple[int, ...]], mesh: jax.sharding.Mesh, dtype: str) -> dict:
    place = partial(sharding.param_sharding, mesh)
    return {path: jax.ShapeDtypeStruct(shape, dtype, sharding=place(path)) for path, shape in shapes.items()}
