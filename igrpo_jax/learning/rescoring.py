"""Log-probs of completions that were sampled before, under any parameters: the policy's, pi_old's or pi_ref's."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from igrpo_jax.distributed import sharding
from igrpo_jax.learning.packing import Packer, Unit
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.models import decoder


class TokenLogprobs(NamedTuple):
    """The log-prob and the entropy of every token of the completions of a unit, in nats."""

    logprobs: list[np.ndarray]  # [T_i] float32 each
    entropies: list[np.ndarray]  # [T_i] float32 each


def rescore_units(
    programs: LearnerPrograms,
    packer: Packer,
    params: decoder.Params,
    frozen: decoder.Params,
    units: Sequence[Unit],
) -> list[TokenLogprobs]:
    """Returns log-probs and entropies of each unit under `params`; `frozen` is what LoRA adapts."""
    rescored: dict[int, TokenLogprobs] = {}
    for batch, chosen in packer.micro_batches(units):
        arrays = programs.rescore(params, programs.to_devices(batch), frozen, shape=(batch.shape,))
        logprob, entropy = sharding.to_host(arrays)
        for i, unit in enumerate(chosen):
            lengths = [len(completion.tokens) for completion in unit.completions]
            rescored[id(unit)] = TokenLogprobs(
                logprobs=[logprob[i, j, :length] for j, length in enumerate(lengths)],
                entropies=[entropy[i, j, :length] for j, length in enumerate(lengths)],
            )
    return [rescored[id(unit)] for unit in units]
