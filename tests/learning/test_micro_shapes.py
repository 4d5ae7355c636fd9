"""The sizes of micro-batches, those of the shipped configurations too."""

import runpy

import pytest
from processes import ROOT

from igrpo_jax import config
from igrpo_jax.learning.micro_shapes import MicroShapes
from igrpo_jax.models.segments import BLOCK
from igrpo_jax.models.splash import INDEX_BITS


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda file: file.stem)
def test_an_update_of_a_shipped_configuration_has_at_most_three_programs(file):
    """Of sizes that the kernel can index; the largest holds the longest context with one completion."""
    settings = config.freeze(runpy.run_path(str(file))["get_config"]())
    context = settings.data.max_prompt_length + settings.draft_limit
    for shards in (1, 4, 64):
        shapes = MicroShapes(settings, shards, context)
        assert 1 <= len(shapes.sizes) <= 3 and list(shapes.sizes) == sorted(set(shapes.sizes), reverse=True)
        assert all(size % BLOCK == 0 for size in shapes.sizes) and shapes.largest <= 2**INDEX_BITS
        assert shapes.largest >= context - 1 + settings.rollout.max_completion_length


def test_the_largest_size_holds_the_longest_text_whatever_the_budget():
    tree = config.default()
    tree.learner.tokens_per_microbatch, tree.rollout.max_completion_length = 64, 300
    assert MicroShapes(config.freeze(tree), 1, 500).largest >= 499 + 300
