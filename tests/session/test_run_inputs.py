"""Which prompts a step has, and whether there are enough."""

import dataclasses
import datetime
import json
from types import SimpleNamespace

import numpy as np
import pytest
from model_files import error_of
from whole_runs import settings

from igrpo_jax import config
from igrpo_jax.records import Prompt
from igrpo_jax.session import resuming, run_inputs
from igrpo_jax.session.run_inputs import (
    RunInputs,
    check_positions,
    check_profiled,
    check_prompts_per_step,
    open_inputs,
)


def test_alternating_steps_share_their_prompts():
    """Steps 1 and 2 have those that step 1 has alone, steps 3 and 4 those of step 2; so have their redraws."""

    def step_prompts(step, redraw=0, **algorithm):
        settings = config.Config(prompts_per_step=4, algorithm=config.AlgorithmConfig(**algorithm))
        return RunInputs.step_prompts(SimpleNamespace(config=settings, prompts=list(range(24))), step, redraw)

    for redraw in (0, 1):
        shared = [step_prompts(step, redraw, alternate=True) for step in (1, 2, 3, 4)]
        alone = [step_prompts(step, redraw) for step in (1, 2)]
        assert shared == [alone[0], alone[0], alone[1], alone[1]] and alone[0] != alone[1]


def test_the_order_of_problems_and_of_redraws_follows_from_the_seed():
    def step_prompts(redraw=0, **changes):
        fields = SimpleNamespace(config=config.Config(prompts_per_step=4, **changes), prompts=list(range(24)))
        return RunInputs.step_prompts(fields, 2, redraw)

    for redraw in (0, 1, 2):
        assert step_prompts(redraw) == step_prompts(redraw) != step_prompts(redraw, seed=1)
    assert not {*step_prompts(0)} & {*step_prompts(1)} and not {*step_prompts(1)} & {*step_prompts(2)}


def test_a_resume_needs_the_same_prompts_and_answers_in_the_same_order():
    def fingerprint(*rows):
        prompts = [Prompt("", 0, "", answer, np.array(tokens, np.int32)) for tokens, answer in rows]
        return RunInputs.fingerprint.func(SimpleNamespace(prompts=prompts))

    first, second = ([1, 2], "3"), ([4], "5")
    found = fingerprint(first, second)
    assert found == fingerprint(first, second)
    assert found not in (fingerprint(([1, 2], "4"), second), fingerprint(([1, 7], "3"), second))
    assert found not in (fingerprint(second, first), fingerprint(first))


def test_a_resume_is_told_of_other_columns_where_rewards_of_ones_own_get_them():
    """A reward that reads the column `level` went from 3.5 to 53 without a word where the file was edited."""

    def sources(*columns, rewards=("builtins:len",)):
        prompts = [Prompt("", 0, "", "3", np.zeros(1, np.int32), each) for each in columns]
        run = config.Config(rewards=config.RewardsConfig(functions=rewards))
        return RunInputs.reward_sources.func(SimpleNamespace(config=run, prompts=prompts))

    class Image:
        """Is printed with its place in memory."""

    first, second = {"level": 2, "at": datetime.date(2026, 1, 1), "image": Image()}, {"level": 3, "about": {"a": [1]}}
    found = sources(first, second)
    assert found == sources(dict(reversed([*(first | {"image": Image()}).items()])), second)
    assert sources(first, second, rewards=()) == {}  # which may have been edited as one likes
    for changed in (first | {"level": 200}, first | {"at": datetime.date(2026, 1, 2)}, first | {"more": 1}):
        told = resuming.changed_rewards(found, sources(changed, second), 4)
        assert told.startswith("columns of config.data.train, which rewards of your own get, have changed: from step 5")
    assert not resuming.changed_rewards({}, found, 4)  # a checkpoint of an older version


def test_the_longest_prompt_is_that_of_stage_2_and_fits_the_models_positions():
    """Its draft may be as long as a completion; to the token, and without drafts it is the plain prompt."""
    for drafts in (0, 2):
        inputs = open_inputs(settings(**{"algorithm.num_drafts": drafts}))
        plain = max(len(prompt.tokens) for prompt in inputs.prompts)
        draft = np.full(24, inputs.prompts[0].tokens[1], np.int32)  # a digit
        with_draft = max(len(inputs.renderer.with_draft(prompt.question, draft)) for prompt in inputs.prompts)
        assert inputs.longest_prompt >= with_draft > plain if drafts else inputs.longest_prompt == plain
    check_positions(inputs.config, inputs.longest_prompt + 24, inputs.longest_prompt)
    said = error_of(check_positions, inputs.config, inputs.longest_prompt + 23, inputs.longest_prompt)
    assert f"may reach {inputs.longest_prompt + 24} tokens, but the model's context is" in said


def test_prompts_keep_the_columns_of_their_rows(tmp_path):
    """Rewards read them."""
    rows = [{"prompt": f"{i}+1", "answer": f"{i + 1}", "level": i} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = settings()  # `freeze` would say that the built-in model has never seen such data
    inputs = open_inputs(
        dataclasses.replace(own, data=dataclasses.replace(own.data, train=str(tmp_path / "train.jsonl")))
    )
    assert [(x.question, x.answer, x.columns["level"]) for x in inputs.prompts] == [
        (row["prompt"], row["answer"], row["level"]) for row in rows
    ]


def test_an_epoch_of_alternating_steps_has_twice_as_many():
    """Of 10 problems, 4 a step, 3 epochs are 7 batches; each serves two steps."""
    for alternate, steps in ((False, 7), (True, 14)):
        fields = {"steps": 0, "epochs": 3.0, "algorithm.alternate": alternate}
        assert open_inputs(settings(**fields)).total_steps == steps


def test_examples_of_a_warm_start_are_split_over_the_batch():
    message = error_of(open_inputs, settings(**{"warm_start.batch_size": 12, "warm_start.steps": 1}))
    assert message.startswith("config.warm_start.batch_size = 12: must be a multiple of mesh.data x mesh.fsdp = 8,")
    open_inputs(settings(**{"warm_start.batch_size": 12, "warm_start.steps": 0}))


@pytest.mark.parametrize("training", [(30, 50), (9, 90), (60, 7)])
def test_the_sampler_holds_what_training_and_evaluations_ask(monkeypatch, training):
    """The longest prompt, completion and sum of both may each be of either."""
    monkeypatch.setattr(run_inputs, "open_programs", lambda *args, **sizes: sizes)
    own = settings(**{"rollout.max_completion_length": training[1]})
    plan = SimpleNamespace(longest_prompt=20, max_completion=55, length=70)
    sizes = run_inputs.open_run_programs(own, None, None, (0,), training[0], plan, None)
    prompt, completion = max(training[0], 20), max(training[1], 55)
    assert sizes == {"longest_prompt": prompt, "max_completion": completion, "length": max(sum(training), 70)}


def test_problems_that_are_too_long_for_a_step_of_all_are_counted():
    settings = config.Config(prompts_per_step=4, data=config.DataConfig(max_prompt_length=64))
    check_prompts_per_step(settings, 4, 2)
    message = error_of(check_prompts_per_step, settings, 2, 2)
    assert "there are 2 training problems left of 4 (config.data.max_prompt_length = 64 leaves out 2)" in message
    assert message.endswith("set it to 2 or less, or raise that limit, or give more problems")
    assert "there are 2 training problems, so" in error_of(check_prompts_per_step, settings, 2, 0)


def test_a_profile_of_a_step_that_never_comes_is_refused():
    check_profiled(config.LogConfig(profile_steps=(1, 5)), 5)
    check_profiled(config.LogConfig(), 5)
    message = error_of(open_inputs, settings(**{"log.profile_steps": (2, 6)}))
    assert message == "config.log.profile_steps = (2, 6): the run ends after step 5; name steps from 1 to 5"
