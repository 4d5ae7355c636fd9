"""What a resume says of the learning rate, of changed rewards, and of an end that is behind it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_files import error_of

from igrpo_jax import config
from igrpo_jax.rewards import functions
from igrpo_jax.rewards.functions import CustomReward
from igrpo_jax.session import resuming


def test_another_number_of_steps_changes_the_learning_rate_and_says_so():
    """A cosine without a warm-up: half of its peak in the middle, and next to nothing before the last step."""
    tree = config.default()
    tree.steps, tree.optimizer.learning_rate, tree.optimizer.warmup_ratio = 100, 1e-3, 0.0
    tree.optimizer.min_lr_ratio = 0.0
    settings = config.freeze(tree)
    told = resuming.new_schedule(settings, 50, 100, 50)
    assert told.startswith("100 steps instead of 50: the learning rate rises and falls as in a run of 100 steps")
    assert told.endswith("it was 9.87e-07 at the end of step 50, and is 0.0005 in step 51")
    tree.learner.minibatches, tree.algorithm.num_iterations = 2, 2
    several = resuming.new_schedule(config.freeze(tree), 50, 100, 50)  # four optimizer steps in each
    assert several.endswith("it was 6.17e-08 at the end of step 50, and is 0.0005 in step 51")
    assert not resuming.new_schedule(settings, 100, 100, 50) and not resuming.new_schedule(settings, 50, 100, 0)


@pytest.mark.parametrize(("rows", "is_told"), [(2, True), (3, False), (4, False)])
def test_rows_that_are_lost_are_missed(rows, is_told):
    """Three were written; an evaluation may have added one since the checkpoint."""
    told = []
    resuming.tell_lost_rows(rows, 3, 7, SimpleNamespace(message=told.append))
    lost = f"metrics.jsonl has {rows} rows up to step 7, 3 were written: the missing rows cannot be recovered"
    assert told == [lost] * is_told


@pytest.mark.parametrize(("steps", "asked"), [(3, "config.steps = 3"), (0, "config.epochs = 1")])
def test_an_end_that_is_behind_a_run_is_refused_with_a_setting_that_may_change(steps, asked):
    settings = config.Config(steps=steps)
    resuming.check_not_past_end(settings, 5, Path("run"), 5)
    message = error_of(resuming.check_not_past_end, settings, 3, Path("run"), 5)
    assert message.startswith(f"{asked}: ends after step 3, but the run in run has already reached step 5; ")
    assert "set config.steps to at least 5, or" in message and "steps" in config.MAY_CHANGE_ON_RESUME


def test_rewards_whose_file_has_changed_are_named(tmp_path, monkeypatch):
    """A resume took the new ones without a word. One without a hash is of an older version, and says nothing."""
    file, text = tmp_path / "edited_rewards.py", "def short(completions, **columns):\n    return [0.0]\n"
    file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = [CustomReward("edited_rewards:short"), CustomReward("sys:exit")]  # which has no file
    before = functions.sources(rewards)
    assert not resuming.changed_rewards(before, functions.sources(rewards), 4)
    file.write_text(text.replace("0.0", "1.0"))
    told = resuming.changed_rewards(before, functions.sources(rewards), 4)
    assert told.startswith("the file of edited_rewards, which config.rewards names, has changed: from step 5 on")
    assert not resuming.changed_rewards({}, functions.sources(rewards), 4)
    before, now = (dict.fromkeys(("edited_rewards", resuming.COLUMNS), each) for each in "ab")
    told = resuming.changed_rewards(before, now, 4)
    assert told.startswith("the file of edited_rewards, which config.rewards names, has changed, and columns of config")
    assert "from step 5 on the rewards are those of the new functions and columns, and" in told
    del sys.modules["edited_rewards"]
