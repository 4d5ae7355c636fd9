"""Log-probs of completions that were sampled before, under any parameters: the policy's, pi_old's or pi_ref's."""

from collections.abc import Sequence

import numpy as np

from igrpo_jax.distributed import sharding
from igrpo_jax.learning.packing import MicroBatch, Unit
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.models import decoder


def rescore_units(
    programs: LearnerPrograms,
    params: decoder.Params,
    frozen: decoder.Params,
    batches: Sequence[MicroBatch],
    units: Sequence[Unit],
) -> list[list[np.ndarray]]:
    """Returns, for each unit, the log-probs [T_i] float32 of each of its completions under `params`, in nats.

    Args:
        frozen: what LoRA adapts.
        batches: micro-batches that hold all completions of the units.
    """
    rescored: dict[int, list[np.ndarray]] = {id(unit): [np.zeros(0)] * len(unit.completions) for unit in units}
    for batch in batches:
        arrays = programs.rescore(params, programs.to_devices(programs.packer.fill(batch)), frozen, shape=(batch.size,))
        logprob = sharding.to_host(arrays)
        for shard, start, unit, i in batch.places():
            rescored[id(unit)][i] = logprob[shard, start : start + len(unit.completions[i].tokens)]
    return [rescored[id(unit)] for unit in units]
