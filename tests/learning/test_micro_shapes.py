"""The sizes of micro-batches, those of the shipped configurations too."""

import contextlib
import dataclasses
import runpy

import learner_cases
import pytest
import tiny_models
from learner_cases import LONGEST_PROMPT
from processes import ROOT

from igrpo_jax import config
from igrpo_jax.errors import InputError
from igrpo_jax.learning.micro_shapes import MicroShapes
from igrpo_jax.models.segments import BLOCK
from igrpo_jax.models.splash import MOST_TOKENS


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda file: file.stem)
def test_an_update_of_a_shipped_configuration_has_at_most_three_programs(file):
    """Of sizes that the kernel can index; the largest holds the longest context with one completion."""
    settings = config.freeze(runpy.run_path(str(file))["get_config"]())
    context = settings.data.max_prompt_length + settings.draft_limit
    for shards in (1, 4, 64):
        shapes = MicroShapes(settings, shards, context)
        assert 1 <= len(shapes.sizes) <= 3 and list(shapes.sizes) == sorted(set(shapes.sizes), reverse=True)
        assert all(size % BLOCK == 0 for size in shapes.sizes) and shapes.largest <= MOST_TOKENS
        assert shapes.largest >= context - 1 + settings.rollout.max_completion_length


def test_the_largest_size_holds_the_longest_text_whatever_the_budget():
    tree = config.default()
    tree.learner.tokens_per_microbatch, tree.rollout.max_completion_length = 64, 300
    assert MicroShapes(config.freeze(tree), 1, 500).largest >= 499 + 300


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learner__tokens_per_microbatch": MOST_TOKENS}, None),
        ({"learner__tokens_per_microbatch": MOST_TOKENS + 1}, "tokens_per_microbatch = 65537: needs .* 66,048 tokens"),
        ({"rollout__max_completion_length": MOST_TOKENS - LONGEST_PROMPT + 1}, None),
        # No budget helps, whatever it is.
        (
            {"rollout__max_completion_length": MOST_TOKENS},
            r"length = 65536 .after a context of 20 tokens\)",
        ),
        ({"rollout__max_completion_length": MOST_TOKENS, "learner__tokens_per_microbatch": 1 << 20}, "max_completion"),
    ],
)
def test_micro_batches_that_the_kernel_cannot_index_are_refused_before_any_program(changes, words):
    """By the setting that makes them so long, where attention has such a limit."""
    cfg = tiny_models.tiny_config(attention="splash_interpret")
    many = {"prompts_per_step": 1 << 16} | changes  # so that the budget is what bounds a micro-batch
    with pytest.raises(InputError, match=rf"{words}.*at most 65,536") if words else contextlib.nullcontext():
        assert learner_cases.make_learner(cfg, **many)[0].programs.packer.shapes.largest == MOST_TOKENS
    learner_cases.make_learner(dataclasses.replace(cfg, attention="chunked"), **many)
