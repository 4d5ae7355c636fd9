"""From groups to micro-batches: what shares a context, what lies together, and what each token weighs."""

from dataclasses import replace

import numpy as np
import pytest

from igrpo_jax import config
from igrpo_jax.learning import objectives
from igrpo_jax.learning.micro_shapes import MicroShapes
from igrpo_jax.learning.packing import MicroBatch, Packer, Piece
from igrpo_jax.models import segments
from igrpo_jax.records import Completion, Group, Prompt

LONGEST_PROMPT, MAX_COMPLETION = 100, 60
LONGEST = 99 + 8 * 60  # tokens of the longest unit of a prompt and its 8 completions


def make_packer(shards=1, chunk=None, width=None, **changes):
    tree = config.default()
    settings = {"prompts_per_step": 4, "rollout.max_completion_length": MAX_COMPLETION, "algorithm.num_generations": 8}
    tree.update_from_flattened_dict(settings | {name.replace("__", "."): x for name, x in changes.items()})
    c = config.freeze(tree)
    return Packer(objectives.resolve(c.algorithm), MicroShapes(c, shards, LONGEST_PROMPT), chunk, width)


def completion(i, tokens, finished=True):
    tokens = np.asarray(tokens, np.int32)
    return Completion("refine", i, tokens, -np.arange(1, len(tokens) + 1, dtype=np.float32), finished)


def make_group(context, completions):
    context = np.asarray(context, np.int32)
    draft = completion(0, [1, 2, 3])
    return Group(Prompt("", 0, "", "", context), (draft,), 0, context, tuple(completions))  # a draft is no row


def random_groups(rng, prompts=4, generations=8):
    """Every completion has a first token of its own, from 1000."""
    groups = []
    for i in range(prompts):
        sizes = rng.integers(1, MAX_COMPLETION + 1, generations)
        rows = [completion(j, [1000 + i * generations + j, *range(size - 1)]) for j, size in enumerate(sizes)]
        groups.append(make_group(rng.integers(0, 64, rng.integers(1, LONGEST_PROMPT + 1)), rows))
    return groups


@pytest.mark.parametrize(
    ("sizes", "shards", "changes"),
    [
        # As many tokens as a step can have, 4 x 579 = 2316, where the budget allows them.
        ((2560, 1280, 320), 1, {}),
        ((1280, 640, 192), 2, {}),
        ((640, 320, 128), 4, {}),
        ((1280, 640, 192), 1, {"learner__minibatches": 2}),
        ((1024, 512, 128), 1, {"learner__tokens_per_microbatch": 1024}),
        ((1024, 512, 128), 4, {"learner__tokens_per_microbatch": 1024, "prompts_per_step": 64}),
        ((192, 128, 64), 1, {"learner__tokens_per_microbatch": 1}),  # a context of 100 and a completion of 60
        ((1024,), 1, {"learner__tokens_per_microbatch": 1024, "learner__microbatch_sizes": (1.0,)}),
        (
            (1024, 768, 512, 256),
            1,
            {"learner__tokens_per_microbatch": 1024, "learner__microbatch_sizes": (1.0, 0.75, 0.5, 0.25)},
        ),
    ],
)
def test_the_sizes_of_programs(sizes, shards, changes):
    assert make_packer(shards, **changes).shapes.sizes == sizes


# Of 4 prompts with 8 completions.
@pytest.mark.parametrize(
    ("share", "shards", "changes"),
    [
        (8, 1, {}),
        (8, 4, {}),  # 4 units for 4 shards
        (4, 8, {}),
        (2, 16, {}),
        (1, 32, {}),
        (1, 64, {}),  # more shards than completions
        (4, 6, {}),  # 8 units for 6 shards: 4 are padding
        (8, 1, {"learner__minibatches": 4}),
        (4, 1, {"learner__minibatches": 8}),
        (2, 4, {"learner__minibatches": 4}),  # 32 / 2 / 4 = 4 units a minibatch; of 4 completions it would be 2
        (3, 1, {"algorithm__num_generations": 6, "learner__minibatches": 8}),  # 8 units of 3, a divisor that is odd
        (1, 8, {"algorithm__num_generations": 7}),  # a prime: 4 units of 7, or 28
        (8, 1, {"learner__tokens_per_microbatch": 176}),  # what is too long in fact is cut when it is packed
        (1, 1, {"learner__shared_prefix": False}),
        # With 4 x N drafts as rows too: units of both stages are alike.
        (4, 1, {"algorithm__train_drafts": True}),  # N = 4
        (2, 1, {"algorithm__train_drafts": True, "algorithm__num_drafts": 6}),
        (1, 1, {"algorithm__train_drafts": True, "algorithm__num_drafts": 3}),
        (2, 1, {"algorithm__train_drafts": True, "learner__minibatches": 8}),  # of 4 drafts each 4 units, not 8
        (2, 8, {"algorithm__train_drafts": True}),
        (8, 1, {"algorithm__train_drafts": True, "algorithm__num_drafts": 0}),
    ],
)
def test_how_many_completions_share_a_context(share, shards, changes):
    assert make_packer(shards, **changes).shapes.completions_per_unit == share


def test_units_keep_the_order_of_groups_and_completions():
    packer = make_packer(shards=8)
    groups, advantages = random_groups(np.random.default_rng(0)), np.arange(32, dtype=np.float32).reshape(4, 8)
    units = packer.units(groups, advantages)
    assert [one.tokens[0] for unit in units for one in unit.completions] == list(range(1000, 1032))
    np.testing.assert_array_equal([unit.advantage for unit in units], advantages.reshape(8, 4))
    for i, unit in enumerate(units):
        assert unit.context is groups[i // 2].context
        assert unit.tokens == len(unit.context) - 1 + sum(len(one.tokens) for one in unit.completions)


def placed(batch):
    """The completions of a micro-batch by (shard, start), with the tokens of their contexts."""
    return {(shard, start): unit.completions[i] for shard, start, unit, i in batch.places()}


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize(
    ("shards", "changes"),
    [
        (1, {}),
        (1, {"learner__tokens_per_microbatch": 700}),
        (1, {"learner__tokens_per_microbatch": 200}),
        (4, {"learner__tokens_per_microbatch": 400}),
        (8, {}),
        (6, {}),
        (64, {}),
        (1, {"learner__shared_prefix": False, "learner__tokens_per_microbatch": 500}),
    ],
)
def test_micro_batches(shards, changes, chunk):
    """Every completion once and whole, with its context on the same shard, in packed sequences of the known sizes."""
    packer, rng = make_packer(shards, chunk, **changes), np.random.default_rng(1)
    for _ in range(20):
        groups = random_groups(rng)
        contexts = {int(one.tokens[0]): group.context for group in groups for one in group.completions}
        seen = []
        for batch in packer.micro_batches(packer.units(groups, np.zeros((4, 8), np.float32))):
            arrays = packer.fill(batch)
            assert arrays.tokens.shape == (shards, batch.size) and batch.size in packer.shapes.sizes
            own, positions = arrays.segments.segment, arrays.segments.position
            for (shard, start), one in placed(batch).items():
                end = start + len(one.tokens)
                assert arrays.mask[shard, start:end].all() and len(set(own[shard, start:end])) == 1
                np.testing.assert_array_equal(arrays.targets[shard, start:end], one.tokens)
                np.testing.assert_array_equal(arrays.tokens[shard, start + 1 : end], one.tokens[:-1])
                context = contexts[int(one.tokens[0])]
                assert arrays.tokens[shard, start] == context[-1]
                parent = own[shard] == arrays.segments.parent[shard, start]
                np.testing.assert_array_equal(arrays.tokens[shard, parent], context[:-1])
                np.testing.assert_array_equal(positions[shard, parent], np.arange(len(context) - 1))
                np.testing.assert_array_equal(positions[shard, start:end], len(context) - 1 + np.arange(end - start))
                seen.append(int(one.tokens[0]))
            assert arrays.completion_tokens == arrays.mask.sum(axis=1).max()
            assert arrays.mask.sum() == sum(len(one.tokens) for one in placed(batch).values())
        assert sorted(seen) == list(range(1000, 1032))


def test_a_micro_batch_is_filled_from_the_front_with_completions():
    """The head runs over the first tokens alone."""
    packer = make_packer()
    (batch,) = packer.micro_batches(packer.units(random_groups(np.random.default_rng(2)), np.zeros((4, 8))))[:1]
    arrays = packer.fill(batch)
    count = int(arrays.completion_tokens)
    assert arrays.mask[0, :count].all() and not arrays.mask[0, count:].any()


def lognormal_groups(rng, prompts, longest):
    sizes = rng.lognormal(np.log(64) - 0.5, 1.0, (prompts, 8)).round().clip(1, longest).astype(int)
    return [make_group(np.ones(64), [completion(i, np.ones(n)) for i, n in enumerate(row)]) for row in sizes]


@pytest.mark.parametrize("seed", range(5))
def test_little_is_padding_where_lengths_differ(seed):
    """Lognormal lengths of mean 64 and sigma 1, up to 256, of 16 prompts; rectangles would be padding for the most."""
    changes = {"prompts_per_step": 16, "rollout__max_completion_length": 256, "learner__tokens_per_microbatch": 8192}
    packer = make_packer(**changes)
    units = packer.units(lognormal_groups(np.random.default_rng(seed), 16, 256), np.zeros((16, 8), np.float32))
    run = sum(batch.padded_tokens for batch in packer.micro_batches(units))
    assert 1 - sum(unit.tokens for unit in units) / run < 0.1


def test_the_cheapest_sizes_are_chosen():
    """Of 1,024, 512 and 128 tokens; each micro-batch costs 32 tokens more than it has."""
    packer = make_packer(learner__tokens_per_microbatch=1024, prompts_per_step=64)
    sizes = lambda lengths: [
        batch.size
        for batch in packer.micro_batches(
            packer.units(
                [make_group(np.ones(1), [completion(0, np.ones(n))]) for n in lengths], np.zeros((len(lengths), 1))
            )
        )
    ]
    assert sizes([60]) == [128]
    assert sizes([60] * 4) == [128, 128]
    assert sizes([60] * 9) == [512, 128]  # 5 x 128 would cost more than 512 + 128
    assert sizes([60] * 17) == [1024]
    assert sizes([60] * 19) == [1024, 128]
    assert sizes([60] * 17 * 3) == [1024, 1024, 1024]


def test_a_unit_that_is_too_long_is_cut():
    """Of 8 completions of 60 tokens after 99, packed sequences of 320 tokens hold three."""
    packer = make_packer(learner__tokens_per_microbatch=320)
    (unit,) = packer.units([make_group(np.ones(100), [completion(i, np.ones(60)) for i in range(8)])], np.zeros((1, 8)))
    pieces = [piece for batch in packer.micro_batches([unit]) for pieces in batch.shards for piece in pieces]
    assert sorted((piece.start, piece.stop) for piece in pieces) == [(0, 3), (3, 6), (6, 8)]


def test_chunks_of_a_state_space_model_are_counted():
    """32 completions of one token fill 32 chunks of 64, and a packed sequence of 640 tokens has 20."""
    packer = make_packer(chunk=64, learner__tokens_per_microbatch=640, prompts_per_step=64)
    groups = [make_group([1], [completion(i, [5]) for i in range(8)]) for _ in range(4)]
    batches = packer.micro_batches(packer.units(groups, np.zeros((4, 8), np.float32)))
    for batch in batches:
        used = sum(segments.chunk_count(piece.prefix_group, 64) for pieces in batch.shards for piece in pieces)
        assert used <= segments.most_chunks(batch.size, 64)
    assert sum(len(placed(batch)) for batch in batches) == 32


def test_segments_are_counted_where_attention_reads_spans():
    """32 completions and 4 contexts, of which 512 packed tokens have at most 8 where a segment takes 2**28 bytes."""
    width = segments.SPANS_BYTES // (8 * 512 * 8)
    packer = make_packer(width=width, learner__tokens_per_microbatch=512, prompts_per_step=64)
    groups = [make_group([1, 2], [completion(i, [5]) for i in range(8)]) for _ in range(4)]
    batches = packer.micro_batches(packer.units(groups, np.zeros((4, 8), np.float32)))
    for batch in batches:
        most, spans = segments.most_segments(batch.size, width), packer.fill(batch).segments.spans
        assert spans.segments.length.shape == (1, most)
        used = sum(1 + len(piece.prefix_group.completions) for piece in batch.shards[0])
        assert (spans.segments.length >= 0).sum() == used <= most
    assert len(batches) >= 4 and sum(len(placed(batch)) for batch in batches) == 32


def test_the_first_units_fill_a_shard():
    """Of 640 tokens and 20 chunks: 16 units of 40 tokens, but only 10 where each fills two chunks of 64."""
    groups = [make_group(np.ones(21), [completion(0, np.ones(20))]) for _ in range(40)]
    for chunk, expected in ((None, 16), (64, 10)):
        packer = make_packer(2, chunk, learner__tokens_per_microbatch=640, prompts_per_step=64)
        units = packer.units(groups, np.zeros((40, 1), np.float32))
        batch = packer.leading(units)
        assert batch.size == 640 and [piece.unit for piece in batch.shards[0]] == units[:expected]
        assert batch.shards[1] == [] and packer.fill(batch).mask.sum() == 20 * expected


def test_shards_have_equal_work():
    packer = make_packer(4, learner__tokens_per_microbatch=1024, prompts_per_step=8)
    groups = [make_group(np.ones(41), [completion(i, np.ones(10)) for i in range(8)]) for _ in range(8)]
    for batch in packer.micro_batches(packer.units(groups, np.zeros((8, 8), np.float32))):
        assert [sum(piece.prefix_group.tokens for piece in pieces) for pieces in batch.shards] == [120] * 4


SMALL = {"prompts_per_step": 2, "algorithm__num_generations": 2}


def small_groups():
    """Contexts of 3 tokens and of 1; completions of 2, 4, 3 and 1 tokens, of which the one of 4 was cut."""
    return [
        make_group([7, 0, 9], [completion(0, [5, 0]), completion(1, [6, 6, 6, 6], finished=False)]),
        make_group([8], [completion(0, [4, 4, 0]), completion(1, [0])]),
    ]


def test_the_arrays_of_a_micro_batch():
    """By hand: completions from the front, then contexts. The id 0 is the padding, an EOS, and a token of a context."""
    packer = make_packer(**SMALL)
    advantages = np.array([[1.0, -1.0], [0.5, 2.0]], np.float32)
    units = packer.units(small_groups(), advantages)
    packer.set_weights(units)
    units[1].old = [np.full(3, -2.5, np.float32), np.full(1, -3.5, np.float32)]
    units[1].reference = [np.full(3, -4.5, np.float32), np.full(1, -5.5, np.float32)]
    batch = packer.fill(MicroBatch(64, [[Piece(unit, 0, 2) for unit in units], []]))
    by_hand = {
        "tokens": [9, 5, 9, 6, 6, 6, 8, 4, 4, 8, 7, 0],
        "targets": [5, 0, 6, 6, 6, 6, 4, 4, 0, 0, 0, 0],
        "mask": [1] * 10 + [0, 0],
        "advantage": [1, 1, -1, -1, -1, -1, 0.5, 0.5, 0.5, 2, 0, 0],
        "weight": [1 / 8] * 2 + [1 / 16] * 4 + [1 / 12] * 3 + [1 / 4, 0, 0],  # 1 / (4 rows x tokens)
        "sampler_logprob": [-1, -2, -1, -2, -3, -4, -1, -2, -3, -1, 0, 0],
        "old_logprob": [0] * 6 + [-2.5] * 3 + [-3.5, 0, 0],  # zeros where none are known
        "reference_logprob": [0] * 6 + [-4.5] * 3 + [-5.5, 0, 0],
    }
    for name, first in by_hand.items():
        expected = np.zeros((2, 64))
        expected[0, :12] = first
        np.testing.assert_allclose(getattr(batch, name), expected, rtol=1e-6, err_msg=name)
    assert batch.completion_tokens == 10
    np.testing.assert_array_equal(batch.segments.segment[0, :13], [2, 2, 3, 3, 3, 3, 5, 5, 5, 6, 1, 1, 0])
    np.testing.assert_array_equal(batch.segments.parent[0, :13], [1] * 6 + [4] * 4 + [1, 1, 0])
    np.testing.assert_array_equal(batch.segments.position[0, :13], [2, 3, 2, 3, 4, 5, 0, 1, 2, 0, 0, 1, 0])
    assert not batch.segments.segment[1].any()


def test_refinements_can_be_credited_to_the_plain_prompt():
    """By hand: the tokens stand after the prompt [3, 2] and not after what they were sampled with, [7, 9].

    Only completions that saw a draft are marked; their masks and weights stay. A draft is a row like any other.
    """
    first, second = (replace(group, prompt=replace(group.prompt, tokens=np.array([3, 2]))) for group in small_groups())
    groups = [first, replace(second, kept=None), first.of_drafts]
    ones = [np.ones(len(group.completions), np.float32) for group in groups]
    packer = make_packer(**SMALL, algorithm__refine_credit="plain")
    units = packer.units(groups, ones)
    packer.set_weights(units)
    batch = packer.fill(MicroBatch(64, [[Piece(unit, 0, len(unit.completions)) for unit in units]]))
    tokens = [2, 5, 2, 6, 6, 6, 2, 4, 4, 2, 2, 1, 2, 3, 3, 3]  # completions, then three prefixes of one token
    np.testing.assert_array_equal(batch.tokens[0, :17], [*tokens, 0])
    np.testing.assert_array_equal(batch.targets[0, :14], [5, 0, 6, 6, 6, 6, 4, 4, 0, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(batch.mask[0], np.arange(64) < 13)
    np.testing.assert_array_equal(batch.shaped[0], np.arange(64) < 6)
    np.testing.assert_array_equal(batch.segments.position[0, :14], [1, 2, 1, 2, 3, 4, 1, 2, 3, 1, 1, 2, 3, 0])
    for credit in ({}, {"algorithm__refine_credit": "plain", "algorithm__credit_gamma": 0.0}):
        assert make_packer(**SMALL, **credit).empty(64).shaped is None


def test_weights_are_those_of_the_units_given():
    """DAPO: 1 / all tokens. Of both units 10, of the second 4; a mean per micro-batch would be one of its tokens."""
    packer = make_packer(**SMALL, algorithm__loss_type="dapo")
    units = packer.units(small_groups(), np.zeros((2, 2), np.float32))
    packer.set_weights(units)
    np.testing.assert_allclose([unit.weight for unit in units], 1 / 10, rtol=1e-6)
    packer.set_weights(units[1:])
    np.testing.assert_allclose(units[1].weight, 1 / 4, rtol=1e-6)


def test_the_entropy_of_every_token_weighs_the_same():
    """0.2 over 10 tokens, over 6 where the one of 4 is masked; by GRPO's own weights each row would weigh the same."""
    for masked, expected in ((False, [[0.02, 0.02], [0.02, 0.02]]), (True, [[1 / 30, 0], [1 / 30, 1 / 30]])):
        changes = {"algorithm__entropy_coef": 0.2, "algorithm__mask_truncated_completions": masked}
        packer = make_packer(**SMALL, **changes)
        units = packer.units(small_groups(), np.zeros((2, 2), np.float32))
        packer.set_weights(units)
        np.testing.assert_allclose([unit.entropy_weight for unit in units], expected, rtol=1e-6)


def test_a_cut_completion_can_be_masked():
    packer = make_packer(**SMALL, algorithm__mask_truncated_completions=True)
    units = packer.units(small_groups(), np.zeros((2, 2), np.float32))
    packer.set_weights(units)
    np.testing.assert_allclose([unit.weight for unit in units], [[1 / 8, 0], [1 / 12, 1 / 4]], rtol=1e-6)
    assert packer.fill(MicroBatch(64, [[Piece(units[0], 0, 2)]])).mask.sum() == 6  # its entropy still counts
