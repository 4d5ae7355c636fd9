"""The engine that a configuration asks for."""

from dataclasses import replace

import jax

from igrpo_jax.config import Config
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.sampling.engine import Engine


def open_engine(
    config: Config,
    cfg: DecoderConfig,
    mesh: jax.sharding.Mesh,
    eos_ids: tuple[int, ...],
    memory: int | None,
    *,
    longest_prompt: int,
    max_completion: int,
    length: int,
) -> Engine:
    """Returns an engine with the settings of `config`, of the sizes that `Engine` describes.

    Args:
        memory: bytes of each device that sampling may use; None = any.
    """
    return Engine(
        cfg,
        mesh,
        eos_ids,
        tensor=config.rollout.mesh.tensor,
        slots=config.rollout.slots,
        longest_prompt=longest_prompt,
        max_completion=max_completion,
        length=length,
        dtype=config.model.dtype,
        steps_per_dispatch=config.rollout.steps_per_dispatch,
        pages=config.rollout.pages,
        page_size=config.rollout.page_size,
        memory=memory,
    )


def with_slots_for(config: Config, mesh: jax.sharding.Mesh, samples: int) -> Config:
    """Returns `config` with no more slots than `samples` need, rounded up to a multiple of the shards."""
    shards = max(1, mesh.size // (config.rollout.mesh.tensor or 1))  # at most, whatever the layout is
    slots = min(config.rollout.slots, -(-samples // shards) * shards)
    return replace(config, rollout=replace(config.rollout, slots=slots))
