"""Supervised steps: the learner's gradient is that of the cross-entropy, and drafts follow from seed and step."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from igrpo_jax.config import Config, LearnerConfig, RolloutConfig, SftConfig
from igrpo_jax.learning import objectives, supervised
from igrpo_jax.learning.loss import TokenValues, loss
from igrpo_jax.learning.supervised import Example, ExampleDraft
from igrpo_jax.records import Prompt


class Plain:
    """A renderer whose q' is the question's number, a draft, and 7 where the draft is right."""

    def with_draft(self, question, draft, is_right):
        return np.concatenate([[int(question)], draft, [7 if is_right else 6]])


def example(number, drafts=1):
    prompt = Prompt(str(number), number, str(number), "", np.array([number], np.int32))
    shown = (ExampleDraft(np.array([10 + i], np.int32), i == 0) for i in range(drafts))
    return Example(prompt, np.array([5, 6, 0], np.int32), tuple(shown))


def test_the_gradient_is_that_of_the_mean_cross_entropy():
    """Rows of 1, 3 and 2 tokens, in one packed sequence: every token has -1 / 6, and a padded one 0."""
    config = supervised.learner_config(Config(rollout=RolloutConfig(temperature=0.5)))
    algorithm = objectives.resolve(config.algorithm)
    lengths = np.array([1, 3, 2])
    weights = objectives.row_weights(algorithm, lengths, np.ones(3, bool), 99)
    row = jnp.array([[1, 2, 2, 2, 3, 3, 0]])
    of_row = jnp.array([0.0, *weights])
    logprob = jnp.array([[-0.5, -3.0, -20.0, -0.1, -1.0, -2.0, -9.0]])

    def objective(logprob):
        still, mask = jax.lax.stop_gradient(logprob), row > 0
        return loss(algorithm, TokenValues(logprob, still, None, mask.astype(jnp.float32), of_row[row], mask, row)).loss

    np.testing.assert_allclose(jax.grad(objective)(logprob), [[-1 / 6] * 6 + [0]], rtol=1e-6)
    assert config.rollout.temperature == 1.0 and config.learner.minibatches == 1


def test_which_draft_an_example_shows_follows_from_seed_and_step():
    config = Config(seed=3, sft=SftConfig(draft_column="d", draft_fraction=0.25))
    examples = [example(number, drafts=2) for number in range(400)]
    made = supervised.groups(config, examples, Plain(), 7)
    shown = [group.context.tolist() for group in made if len(group.context) > 1]
    assert 65 < len(shown) < 135 and {context[1] for context in shown} == {10, 11}  # 100 +- 8.7 are expected
    assert all(context[2] == {10: 7, 11: 6}[context[1]] for context in shown)
    again = supervised.groups(config, examples, Plain(), 7)
    assert [x.context.tolist() for x in again] == [x.context.tolist() for x in made]
    other = supervised.groups(config, examples, Plain(), 8)
    reseeded = supervised.groups(replace(config, seed=4), examples, Plain(), 7)
    for others in (other, reseeded):
        assert [x.context.tolist() for x in others] != [x.context.tolist() for x in made]
    assert {len(group.context) for group in supervised.groups(config, [example(1, drafts=0)] * 50, Plain(), 7)} == {1}


def test_what_a_step_says_of_its_examples():
    """Of four examples with three tokens each one shows a draft; the rest is what the update measured."""
    config = Config(sft=SftConfig(draft_column="d", draft_fraction=1.0))
    made = supervised.groups(config, [example(0), *(example(number, drafts=0) for number in (1, 2, 3))], Plain(), 1)
    names = ("grad_norm", "learning_rate", "nonfinite_steps", "entropy", "perf/padding_frac")
    learned = {"sampling/sampling_logp_difference/mean": 1.5, "loss": 7.0} | dict.fromkeys(names, 2.0)
    expected = {"sft/loss": 1.5, "sft/tokens": 12, "sft/draft_frac": 0.25} | dict.fromkeys(names, 2.0)
    assert supervised.metrics(learned, made) == expected


def test_shapes_hold_the_examples_of_a_step():
    """Of an odd number of examples too: shapes are sized by two completions for each of half as many prompts."""
    made = supervised.learner_config(Config(prompts_per_step=7, learner=LearnerConfig(minibatches=3)))
    assert made.prompts_per_step * made.algorithm.num_generations == 8 and not made.learner.shared_prefix
