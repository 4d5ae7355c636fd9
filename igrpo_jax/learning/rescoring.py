"""Log-probs of completions that were sampled before, under any parameters: the policy's, pi_old's or pi_ref's."""

from collections.abc import Sequence

import numpy as np

from igrpo_jax.distributed import sharding
from igrpo_jax.learning.packing import Packer, Unit
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.models import decoder


def rescore_units(
    programs: LearnerPrograms,
    packer: Packer,
    params: decoder.Params,
    frozen: decoder.Params,
    units: Sequence[Unit],
) -> list[list[np.ndarray]]:
    """Returns for each unit the log-probs [T_i] float32 of each of its completions under `params`, in nats.

    Args:
        frozen: what LoRA adapts.
    """
    rescored: dict[int, list[np.ndarray]] = {}
    for batch, chosen in packer.micro_batches(units):
        arrays = programs.rescore(params, programs.to_devices(batch), frozen, shape=(batch.shape,))
        logprob = sharding.to_host(arrays)
        for i, unit in enumerate(chosen):
            rescored[id(unit)] = [
                logprob[i, j, : len(completion.tokens)] for j, completion in enumerate(unit.completions)
            ]
    return [rescored[id(unit)] for unit in units]
