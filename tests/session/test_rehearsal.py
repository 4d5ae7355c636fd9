"""What rewards are tried with before a run. A right answer in a form that they do not read makes them look broken."""

import dataclasses
from types import SimpleNamespace

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
    closed = rehearsal._reply(settings(**{"data.instruction": instruction}), prompt, "7", "<think>\n\n</think>\n\n")
    assert closed == reply.partition("</think>")[2]


@pytest.mark.parametrize(
    ("answer", "stated", "note", "judged"),
    [
        ("7", "7", "1 for a right answer, 0 for a wrong one", "0.5 for a right answer"),
        ("", "0", "1 for an answer, 0 for another one", "0.5 for a made-up answer"),
    ],
)
def test_an_answer_is_made_up_where_a_problem_has_none(monkeypatch, answer, stated, note, judged):
    prompt = Prompt("a", 0, "3 + 4", answer, np.zeros(1, np.int32))
    shown = []  # by function and judge

    def called(rewards, batches, timeout, memory_gib, max_steps):
        assert max_steps == 4
        shown.extend((each.text, each.answer) for each in batches[0][:1])
        return [[[1, 0]] * len(batches)]

    def asked(_, question, answer, text):
        shown.append((text, answer))
        return 0.5

    monkeypatch.setattr(rehearsal.custom, "rehearse", called)
    monkeypatch.setattr(rehearsal.judge, "rehearse", asked)
    encodes = SimpleNamespace(encode_completion=lambda text: np.zeros(1, np.int32))
    run = settings(**{"rewards.functions": ("builtins:len",), "rewards.judge.weight": 1.0, "rewards.judge.model": "m"})
    assert rehearsal.rehearsed_rewards(run, [prompt], encodes, "", 4) == [("reward len", note)]
    assert rehearsal.rehearsed_judge(run, prompt, "") == [("reward judge", judged)]
    assert all(f"<answer>{stated}</answer>" in text and given == answer for text, given in shown) and len(shown) == 2


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"num_drafts": 4}, [("draft", False, "7"), ("refine", True, "7")]),
        ({"num_drafts": 0}, [("refine", False, "7")]),
        (
            {"num_drafts": 4, "second_stage": "verify", "train_drafts": True, "draft_selection": "first"},
            [("draft", False, "7"), ("verify", True, "0")],
        ),
    ],
)
def test_custom_rewards_are_called_in_each_stage(monkeypatch, changes, stages):
    """A function that fails on a refinement, or on a draft, would do so only in the run. The draft is a wrong one."""
    called = []

    def rehearse(rewards, batches, *_):
        called.extend(batches)
        return [[[1, 0]] * len(batches)]

    monkeypatch.setattr(rehearsal.custom, "rehearse", rehearse)
    encodes = SimpleNamespace(encode_completion=lambda text: np.zeros(1, np.int32))
    run = settings(**{"rewards.custom": "builtins:len"} | {f"algorithm.{name}": x for name, x in changes.items()})
    rehearsal.rehearsed_rewards(run, [Prompt("a", 0, "3 + 4", "7", np.zeros(1, np.int32))], encodes, "", 4)
    assert [(rows[0].stage, rows[0].draft is not None, rows[0].answer) for rows in called] == stages
    for (right, wrong), (_, has_draft, stated) in zip(called, stages, strict=True):
        assert f"<answer>{stated}</answer>" in right.text and rehearsal.WRONG_ANSWER in wrong.text
        assert right.draft == wrong.draft and (not has_draft or rehearsal.WRONG_ANSWER in right.draft)
