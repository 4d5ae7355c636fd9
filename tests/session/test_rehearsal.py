"""What rewards are tried with before a run. A right answer in a form that they do not read makes them look broken."""

import dataclasses

import numpy as np
import pytest
from whole_runs import settings

from igrpo_jax.records import Prompt
from igrpo_jax.session import rehearsal


@pytest.mark.parametrize(
    ("instruction", "reply"),
    [
        ("", r"<think>It is \boxed{7}. Done.</think><answer>7</answer>"),
        ("Answer inside <answer> and </answer>.", "<think>Done.</think><answer>7</answer>"),
        (r"Put the answer into \boxed{}.", r"<think>Done.</think>\boxed{7}"),
        (r"Answer inside <answer>, as \boxed{}.", r"<think>Done.</think><answer>\boxed{7}</answer>"),
    ],
)
def test_custom_rewards_are_called_with_answers_in_the_form_that_is_asked_for(instruction, reply):
    """It was always that of the tags, so that rewards of boxes had 0 for a right answer."""
    prompt = Prompt("a", 0, "3 + 4", "7", np.zeros(1, np.int32))
    for name in ("instruction", "system_prompt"):
        assert rehearsal._reply(settings(**{f"data.{name}": instruction}), prompt, "7", "") == reply
    assert (
        rehearsal._reply(settings(), dataclasses.replace(prompt, question=f"{instruction} 3 + 4"), "7", "<think>")
        == reply[7:]
    )
