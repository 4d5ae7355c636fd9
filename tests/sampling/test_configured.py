"""The slots of an engine that a configuration asks for, and the sizes that it is refused."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
import tiny_models

from igrpo_jax.config import Config, MeshConfig, SamplerMeshConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError
from igrpo_jax.sampling.configured import open_programs, with_slots_for

# With more devices in a group than it has key and value heads, each holds the cache of other slots.
SPLIT = tiny_models.tiny_config(num_kv_heads=2, head_dim=128, attention="splash_interpret")


def asking(slots, tensor, **rollout):
    """Settings with `slots` slots and `tensor` devices in a group."""
    settings = Config()
    rollout |= {"slots": slots, "mesh": SamplerMeshConfig(tensor=tensor)}
    return replace(settings, rollout=replace(settings.rollout, **rollout))


@pytest.mark.parametrize(
    "tensor, samples, expected",
    [
        (1, 5, 8),  # over four groups, each of which has equally many
        (4, 5, 8),  # of one group, whose devices may each hold other sequences
        (None, 5, 8),  # of as many groups as there may be
        (1, 1000, 64),  # no more than config.rollout.slots
    ],
)
def test_slots_are_hardly_more_than_samples(tensor, samples, expected):
    settings = asking(64, tensor)
    changed = with_slots_for(settings, SimpleNamespace(size=4), samples)
    assert changed == replace(settings, rollout=replace(settings.rollout, slots=expected))


@pytest.mark.parametrize("tensor, parts", [(2, 1), (4, 2), (8, 4)])
def test_a_single_sample_has_slots_in_every_layout(tensor, parts):
    """Also where several devices have the same key and value head, each for other slots."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:8])
    settings = with_slots_for(asking(64, tensor), mesh, 1)
    sizes = {"longest_prompt": 24, "max_completion": 8, "length": 32}
    assert open_programs(settings, SPLIT, mesh, (0,), None, **sizes).sizes.parts == parts


@pytest.mark.parametrize(
    ("slots", "page_size", "attention", "words"),
    [
        (1024, 64, "splash_interpret", "= 1024: .* the 512 slots of each group, up to 938 pages .*page_size to 256"),
        (1024, 256, "splash_interpret", None),
        (496, 64, "splash_interpret", None),
        (504, 64, "splash_interpret", "= 504: .* 252 slots .*page_size to 128"),
        (8192, 64, "splash_interpret", "= 8192: .* of completions$"),  # no pages are large enough
        (1024, 64, "chunked", None),  # reads no pages in place
    ],
)
def test_page_numbers_that_the_kernel_cannot_hold_are_refused_before_any_program(slots, page_size, attention, words):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:8])
    sizes = {"longest_prompt": 24, "max_completion": 59_976, "length": 60_000}
    with pytest.raises(InputError, match=words) if words else contextlib.nullcontext():
        settings = asking(slots, 4, page_size=page_size)
        open_programs(settings, replace(SPLIT, attention=attention), mesh, (0,), None, **sizes)
