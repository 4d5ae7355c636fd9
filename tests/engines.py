"""Engines of sizes that a test gives."""

import jax

from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.sampling.configured import make_programs
from igrpo_jax.sampling.engine import Engine


def make_engine(cfg: DecoderConfig, mesh: jax.sharding.Mesh, eos_ids: tuple[int, ...], **sizes) -> Engine:
    """Returns an engine with as many pages as `make_programs` gives it."""
    return Engine(cfg, mesh, make_programs(cfg, mesh, eos_ids, **sizes))
