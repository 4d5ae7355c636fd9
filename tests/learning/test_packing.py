"""From groups to micro-batches: what shares a context, what lies together, and what each token weighs."""

import numpy as np
import pytest

from igrpo_jax import config
from igrpo_jax.learning import objectives
from igrpo_jax.learning.packing import Packer, size_buckets
from igrpo_jax.records import Completion, Group, Prompt

MAX_CONTEXT, MAX_COMPLETION = 100, 60
PREFIXES, WIDTHS = (16, 32, 64, 112), (16, 32, 64)


def make_packer(shards=1, **changes):
    tree = config.default()
    settings = {"prompts_per_step": 4, "rollout.max_completion_length": MAX_COMPLETION, "algorithm.num_generations": 8}
    tree.update_from_flattened_dict(settings | {name.replace("__", "."): x for name, x in changes.items()})
    c = config.freeze(tree)
    return Packer(c, objectives.resolve(c.algorithm), shards, MAX_CONTEXT)


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
        groups.append(make_group(rng.integers(0, 64, rng.integers(1, MAX_CONTEXT + 1)), rows))
    return groups


@pytest.mark.parametrize(
    ("longest", "sizes"),
    [
        (4096, (512, 1024, 2048, 4096)),
        (99, PREFIXES),  # 99, 50, 25, 13
        (60, WIDTHS),  # 60, 30, 15, 8
        (700, (96, 176, 352, 768)),  # 700, 350, 175, 88; from 512 in steps of 128
        (1, (16,)),
        (0, (16,)),
    ],
)
def test_the_sizes_of_programs(longest, sizes):
    assert size_buckets(longest) == sizes


# Of 4 prompts with 8 completions; the longest unit of all 8 is 112 + 8 x 64 = 624 tokens.
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
        (8, 1, {"learner__tokens_per_microbatch": 624}),
        (4, 1, {"learner__tokens_per_microbatch": 623}),
        (1, 1, {"learner__tokens_per_microbatch": 176}),
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
    assert make_packer(shards, **changes).completions_per_unit == share


def test_units_keep_the_order_of_groups_and_completions():
    packer = make_packer(shards=8)
    groups, advantages = random_groups(np.random.default_rng(0)), np.arange(32, dtype=np.float32).reshape(4, 8)
    units = packer.units(groups, advantages)
    assert [one.tokens[0] for unit in units for one in unit.completions] == list(range(1000, 1032))
    np.testing.assert_array_equal([unit.advantage for unit in units], advantages.reshape(8, 4))
    for i, unit in enumerate(units):
        assert unit.context is groups[i // 2].context
        assert unit.tokens == len(unit.context) - 1 + sum(len(one.tokens) for one in unit.completions)


@pytest.mark.parametrize(
    ("shards", "changes"),
    [
        (1, {}),
        (1, {"learner__tokens_per_microbatch": 700}),
        (1, {"learner__tokens_per_microbatch": 200}),
        (4, {"learner__tokens_per_microbatch": 1500}),
        (8, {}),
        (6, {}),
        (64, {}),
        (1, {"learner__shared_prefix": False, "learner__tokens_per_microbatch": 500}),
    ],
)
def test_micro_batches(shards, changes):
    """Every completion once, the longest first, on whole shards, within the budget, in one of few shapes."""
    packer, rng, shapes = make_packer(shards, **changes), np.random.default_rng(1), set()
    budget = changes.get("learner__tokens_per_microbatch", 16384)
    for _ in range(20):
        units = packer.units(random_groups(rng), np.zeros((4, 8), np.float32))
        batches = packer.micro_batches(units)
        seen, longest = [], []
        for batch, chosen in batches:
            count, prefix, share, width = batch.shape
            assert (
                prefix in PREFIXES and width in WIDTHS and share == packer.completions_per_unit and count % shards == 0
            )
            assert count // shards * (prefix + share * width) <= budget and len(chosen) <= count
            shapes.add(batch.shape)
            lengths = batch.length.max(axis=1)
            assert list(lengths) == [unit.longest for unit in chosen] + [0] * (count - len(chosen))
            longest += [unit.longest for unit in chosen]
            seen += [int(row[0]) for rows in batch.completions[: len(chosen)] for row in rows]
        assert sorted(seen) == list(range(1000, 1032))
        assert longest == sorted(longest, reverse=True)
    assert len({shape[1::2] for shape in shapes}) == len(shapes) <= len(PREFIXES) * len(WIDTHS)


def test_the_largest_shape_is_that_of_the_longest_rows():
    """Per shard one unit of 624 tokens fits into 1,200, and two into 1,300; there are never more than the step has."""
    assert make_packer(4, learner__tokens_per_microbatch=1200).largest == (4, 112, 8, 64)
    assert make_packer(2, learner__tokens_per_microbatch=1300).largest == (4, 112, 8, 64)
    assert make_packer(1, learner__tokens_per_microbatch=1 << 20).largest == (4, 112, 8, 64)
    assert make_packer(1, learner__tokens_per_microbatch=1 << 20, learner__minibatches=2).largest == (2, 112, 8, 64)
    assert make_packer(6).largest == (12, 112, 4, 64)


def test_a_prefix_size_is_chosen_for_the_units_that_are_in_it():
    """Long completions after short contexts, and the reverse: of 480 tokens 3 x (16 + 2 x 64), 2 x (112 + 2 x 32)."""
    packer = make_packer(learner__tokens_per_microbatch=480, algorithm__num_generations=2, prompts_per_step=5)
    rows = lambda size: [completion(i, np.ones(size)) for i in range(2)]
    sizes = ((100, 20), (17, 60), (1, 50), (90, 10), (9, 40))
    units = packer.units([make_group(np.ones(n), rows(size)) for n, size in sizes], np.zeros((5, 2), np.float32))
    assert [batch.shape for batch, _ in packer.micro_batches(units)] == [(3, 16, 2, 64), (2, 112, 2, 32)]


SMALL = {"prompts_per_step": 2, "algorithm__num_generations": 2}


def small_groups():
    """Contexts of 3 tokens and of 1; completions of 2, 4, 3 and 1 tokens, of which the one of 4 was cut."""
    return [
        make_group([7, 0, 9], [completion(0, [5, 0]), completion(1, [6, 6, 6, 6], finished=False)]),
        make_group([8], [completion(0, [4, 4, 0]), completion(1, [0])]),
    ]


def test_the_arrays_of_a_micro_batch():
    """By hand, with a unit of padding. The id 0 is the padding, an EOS, and a token of a context."""
    packer = make_packer(**SMALL)
    advantages = np.array([[1.0, -1.0], [0.5, 2.0]], np.float32)
    units = packer.units(small_groups(), advantages)
    packer.set_weights(units)
    units[1].old = [np.full(3, -2.5, np.float32), np.full(1, -3.5, np.float32)]
    units[1].reference = [np.full(3, -4.5, np.float32), np.full(1, -5.5, np.float32)]
    batch = packer.fill(units, (3, 4, 2, 5))
    assert batch.shape == (3, 4, 2, 5) and batch.padded_tokens == 3 * 4 + 3 * 2 * 5
    np.testing.assert_array_equal(batch.prefix, [[7, 0, 0, 0], [0] * 4, [0] * 4])
    np.testing.assert_array_equal(batch.prefix_length, [2, 0, 0])
    np.testing.assert_array_equal(batch.last, [9, 8, 0])
    tokens = [[[5, 0, 0, 0, 0], [6, 6, 6, 6, 0]], [[4, 4, 0, 0, 0], [0] * 5], [[0] * 5] * 2]
    np.testing.assert_array_equal(batch.completions, tokens)
    np.testing.assert_array_equal(batch.length, [[2, 4], [3, 1], [0, 0]])
    np.testing.assert_array_equal(batch.advantage, [*advantages, [0, 0]])
    weights = np.zeros((3, 2, 5))  # 1 / (4 rows x tokens)
    weights[0, 0, :2], weights[0, 1, :4], weights[1, 0, :3], weights[1, 1, :1] = 1 / 8, 1 / 16, 1 / 12, 1 / 4
    np.testing.assert_allclose(batch.weight, weights, rtol=1e-6)
    sampler = [[[-1, -2, 0, 0, 0], [-1, -2, -3, -4, 0]], [[-1, -2, -3, 0, 0], [-1, 0, 0, 0, 0]], [[0] * 5] * 2]
    np.testing.assert_array_equal(batch.sampler_logprob, sampler)
    old = [[[0] * 5] * 2, [[-2.5] * 3 + [0] * 2, [-3.5] + [0] * 4], [[0] * 5] * 2]  # zeros where none are known
    np.testing.assert_array_equal(batch.old_logprob, old)
    np.testing.assert_array_equal(batch.reference_logprob, np.array(old) - 2 * (np.array(old) != 0))
    for x in batch:
        assert x.dtype in (np.int32, np.float32)


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
        np.testing.assert_allclose(packer.fill(units, (3, 4, 2, 5)).entropy_weight, [*expected, [0, 0]], rtol=1e-6)


def test_a_cut_completion_can_be_masked():
    packer = make_packer(**SMALL, algorithm__mask_truncated_completions=True)
    units = packer.units(small_groups(), np.zeros((2, 2), np.float32))
    packer.set_weights(units)
    np.testing.assert_allclose([unit.weight for unit in units], [[1 / 8, 0], [1 / 12, 1 / 4]], rtol=1e-6)
    assert packer.fill(units, (2, 16, 2, 16)).length[0, 1] == 4  # its entropy still counts
