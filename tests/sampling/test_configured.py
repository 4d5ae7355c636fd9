"""The slots of an engine that a configuration asks for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from igrpo_jax.config import Config, SamplerMeshConfig
from igrpo_jax.sampling.configured import with_slots_for


@pytest.mark.parametrize(
    "tensor, samples, expected",
    [
        (1, 5, 8),  # over four groups, each of which has equally many
        (4, 5, 5),  # of one group
        (None, 5, 8),  # of as many groups as there may be
        (1, 1000, 64),  # no more than config.rollout.slots
    ],
)
def test_slots_are_hardly_more_than_samples(tensor, samples, expected):
    config = Config()
    config = replace(config, rollout=replace(config.rollout, slots=64, mesh=SamplerMeshConfig(tensor=tensor)))
    changed = with_slots_for(config, SimpleNamespace(size=4), samples)
    assert changed == replace(config, rollout=replace(config.rollout, slots=expected))
