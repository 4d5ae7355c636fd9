"""Solutions to imitate: their columns, their text, their drafts."""

import json

import pytest
from model_files import error_of

from igrpo_jax.config import Config, DataConfig, EvaluationConfig, SftConfig
from igrpo_jax.data import solutions
from igrpo_jax.data.drafts import Draft

GSM8K = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
MATH = {"problem": "What is 2 + 3?", "solution": "It is {answer}: $\\boxed{5}$"}


def load(tmp_path, rows, opening="", **sft):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = Config(data=DataConfig(train=str(tmp_path / "x.jsonl")), sft=SftConfig(**sft))
    return solutions.load_solutions(config, opening)


@pytest.mark.parametrize(("row", "solution"), [(GSM8K, GSM8K["answer"]), (MATH, MATH["solution"])])
def test_the_solution_and_the_final_answer_are_in_the_form_that_the_instruction_asks_for(tmp_path, row, solution):
    ((found,), notes) = load(tmp_path, [row])
    assert found.text == f"<think>\n{solution}\n</think>\n<answer>5</answer>"
    assert found.drafts == () and "solution from" in notes[0][1]


def test_a_think_that_the_template_writes_is_not_imitated(tmp_path):
    ((found,), _) = load(tmp_path, [MATH], opening="<think>\n")
    assert found.text.startswith("It is") and found.text.endswith("</think>\n<answer>5</answer>")
    ((bare,), _) = load(tmp_path, [MATH], completion="{solution}")
    assert bare.text == MATH["solution"]  # of the base model's own form, and what it says is not filled in


TAGGED = MATH | {"solution": "<think>2 + 3</think>$\\boxed{5}$"}


def test_solutions_with_tags_of_their_own_are_not_put_into_others(tmp_path):
    """The traces of R1 got a second <think> around theirs."""
    message = error_of(lambda: load(tmp_path, [MATH, TAGGED]))
    assert message.startswith("config.sft.completion = ") and message.endswith("(row 2); set it to {solution}")
    for opening, text in (("", TAGGED["solution"]), ("<think>\n", TAGGED["solution"].removeprefix("<think>"))):
        ((found,), _) = load(tmp_path, [TAGGED], opening, completion="{solution}")
        assert found.text == text


def test_tags_of_a_reasoning_that_the_template_has_closed_are_refused(tmp_path):
    """Qwen3 without thinking writes an empty block, after which a stray </think> was imitated."""
    opening = "<think>\n\n</think>\n\n"
    plain = "{solution}\n<answer>{answer}</answer>"
    ((found,), _) = load(tmp_path, [MATH], opening, completion=plain)
    assert found.text == f"{MATH['solution']}\n<answer>5</answer>"
    for row, sft in ((MATH, {}), (TAGGED, {"completion": plain})):
        message = error_of(lambda: load(tmp_path, [row], opening, **sft))  # noqa: B023
        assert message.startswith("config.sft.completion = ") and "\n" not in message
        assert "the chat template closes the reasoning before a reply (<think> </think>)" in message


CHAT = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is \\boxed{5}"}]
SHARED = [{"from": "human", "value": "What is 2 + 3?"}, {"from": "gpt", "value": "It is \\boxed{5}"}]


@pytest.mark.parametrize(
    ("row", "sft", "name"),
    [
        ({"messages": CHAT}, {}, "messages"),
        ({"conversations": SHARED}, {}, "conversations"),
        ({"messages": CHAT, "answer": "5"}, {}, "messages"),  # the bare answer was imitated
        ({"messages": CHAT, "answer": "5"}, {"solution_column": "messages"}, "messages"),
        ({"problem": "What is 2 + 3?", "answer": "5", "messages": CHAT}, {"solution_column": "messages"}, "messages"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:], "answer": "5"}, {}, "completion"),  # as TRL's SFT takes them
    ],
)
def test_the_replies_of_chats_are_solutions(tmp_path, row, sft, name):
    ((found,), notes) = load(tmp_path, [row], **sft)
    assert found.text == "<think>\nIt is \\boxed{5}\n</think>\n<answer>5</answer>"
    assert found.row.question == "What is 2 + 3?" and f"solution from {name!r}" in notes[0][1]


def test_chats_without_a_reply_are_counted(tmp_path):
    rows = [{"messages": CHAT, "answer": "5"}, {"messages": CHAT[:1], "answer": "5"}]
    ((found,), notes) = load(tmp_path, rows, completion="{solution}")
    assert found.text == "It is \\boxed{5}" and ("problems without a solution", "1 of 2, left out") in notes
    ((found,), _) = load(
        tmp_path, [{"messages": CHAT, "output": "as named"}], solution_column="output", completion="{solution}"
    )
    assert found.text == "as named"


def test_rows_without_a_solution_or_a_draft_are_counted(tmp_path):
    rows = [MATH | {"mine": "no", "old": ["a", " ", "b"]}, MATH | {"mine": None, "old": "c"}, MATH | {"mine": "d"}]
    found, notes = load(tmp_path, rows, solution_column="mine", draft_column="old", draft_fraction=0.5)
    assert [each.drafts for each in found] == [(Draft("a", None), Draft("b", None)), ()]
    assert [each.row.index for each in found] == [0, 2]
    assert notes[1:] == [
        ("problems without a solution", "1 of 3, left out"),
        ("drafts", "2 from 'old'"),
        ("problems without a draft", "1, never shown with one"),
    ]


def test_what_is_left_out_of_a_run_is_left_out_here(tmp_path):
    """A repeat whose first row has no solution is the first that has one."""
    asked, other = MATH | {"problem": "What is 3 + 3?"}, MATH | {"problem": "What is 4 + 1?"}
    rows = [MATH | {"solution": " ", "answer": "5"}, MATH, MATH, asked, other, MATH | {"answer": " "}]
    rows = [{"answer": "5"} | row for row in rows]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "What is 3 + 3?", "answer": "6"}) + "\n", "utf-8")
    evaluation = EvaluationConfig(benchmarks=("mine",), data_dir=str(tmp_path))
    assert len(load(tmp_path, rows[:5])[0]) == 4
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = DataConfig(train=str(tmp_path / "x.jsonl"), clean=True)
    found, notes = solutions.load_solutions(Config(data=data, evaluation=evaluation))
    assert [each.row.question for each in found] == ["What is 2 + 3?", "What is 4 + 1?"]
    assert notes[1:] == [
        ("problems without an answer", "1, left out"),
        ("problems without a solution", "1 of 5, left out"),
        ("repeated problems", "1 of 4, left out"),
        ("training problems like mine's", "1 of 4, left out"),
    ]


def test_drafts_from_the_answers_of_a_run_have_its_verdicts(tmp_path):
    """They belong to the problem with their question, whatever its number; those of other problems are left."""
    answers = [("What is 2 + 3?", "5.", 1.0), ("What is 2 + 3?", "6.", 0.0), ("What is 2 + 9?", "11.", 1.0)]
    rows = [{"stage": "draft", "prompt": q, "text": text, "rewards": {"accuracy": x}} for q, text, x in answers]
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "samples" / "step_000001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"draft_fraction": 0.5, "drafts_from": str(tmp_path / "run")}
    found, notes = load(tmp_path, [MATH | {"problem": "Another?"}, MATH], **asked)
    assert [each.drafts for each in found] == [(), (Draft("5.", True), Draft("6.", False))]
    assert notes[1:] == [
        ("drafts", f"2 from {asked['drafts_from']!r}, 50% of 2 right"),
        ("problems without a draft", "1, never shown with one"),
    ]
    message = error_of(lambda: load(tmp_path, [MATH | {"problem": "Another?"}], **asked))
    assert "config.sft.drafts_from = " in message and "has no draft for any of the 1 problems" in message


@pytest.mark.parametrize(
    ("sft", "says"),
    [
        ({"solution_column": "work"}, "has no column of solutions 'work'; its other columns are solution"),
        ({"draft_column": "old", "draft_fraction": 0.5}, "has no column of drafts 'old'; .*config.sft.draft_column"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path, sft, says):
    import re

    assert re.search(says, error_of(lambda: load(tmp_path, [MATH], **sft)))


def test_of_several_right_answers_the_first_is_imitated(tmp_path):
    row = {"problem": "What is a half?", "solution": "1 / 2", "answer": ["0.5", "1/2"]}
    found, _ = load(tmp_path, [row], completion="{solution}: {answer}")
    assert [each.text for each in found] == ["1 / 2: 0.5"]
