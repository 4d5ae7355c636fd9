"""Files of problems that users have: broken lines, printed lists, solutions, Alpaca, chats, several right answers."""

import decimal
import json
from pathlib import Path

import pytest
from model_files import error_of

from igrpo_jax import config, generate
from igrpo_jax.config import Config, DataConfig, EvaluationConfig, RewardsConfig
from igrpo_jax.data import columns, messages, problems, readers
from igrpo_jax.rewards.mathematics import golds, grader


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


def load(path, rows, **more):
    return problems.load_rows(DataConfig(train=write(path / "x.jsonl", rows), **more))[0]


def only(path, row, **more):
    """The question and the answer of a file with one row."""
    (loaded,) = load(path, [row], **more)
    return loaded.question, loaded.answer


def right(answer, gold):
    return grader.grade(f"\\boxed{{{answer}}}", gold)[0] == 1.0


# ------------------------------------------------------------------------------------------------------ broken lines

GOOD = b'{"question": "1+1?", "answer": "2"}'


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lone_surrogates_and_bad_bytes_become_a_character_and_are_named(tmp_path, caplog, end):
    lines = [
        rb'{"question":"What is 2+2? \ud83d","answer":"4"}',
        rb'{"question":"\ud83d\ude00?","answer":"4"}',  # a pair is one character
        b'{"question":"\xff?","answer":"4","extra":{"a":["x"]}}',
        '{"question":"é?","answer":"4"}'.encode(),
        rb'{"question":"x?","answer":"4","extra":{"\udc00":["\udfff"]}}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + end.join(lines) + end)
    rows = problems.load_rows(DataConfig(train=str(tmp_path / "x.jsonl")))[0]
    assert [row.question for row in rows] == ["What is 2+2? \ufffd", "\U0001f600?", "\ufffd?", "é?", "x?"]
    assert rows[4].columns["extra"] == {"\ufffd": ["\ufffd"]}
    (record,) = caplog.records
    assert "x.jsonl" in record.getMessage() and "3 of 5 lines hold" in record.getMessage()
    assert record.getMessage().endswith("U+FFFD: line 1, 3, 5")


@pytest.mark.parametrize("line", [b'{"question": "x", "ans', b"[1]", b"{'question': 'x'}", b"[" * 100_000])
def test_a_broken_line_costs_that_row_and_is_named(tmp_path, caplog, line):
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([GOOD, line, GOOD, b"\xef\xbb\xbf" + GOOD]))
    rows = problems.load_rows(DataConfig(train=str(tmp_path / "x.jsonl")))[0]
    assert [row.id for row in rows] == ["1", "3", "4"]
    (record,) = caplog.records
    assert "1 of 4 lines are broken and left out: line 2" in record.getMessage()
    assert str(tmp_path / "x.jsonl") in record.getMessage()


def test_the_files_of_a_folder_are_named(tmp_path, caplog):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(GOOD + b"\n" + (b"{" if name == "b" else GOOD))
    assert len(readers.read(str(tmp_path), "source")) == 3
    assert "source: b.jsonl: 1 of 2 lines are broken and left out: line 2" in caplog.records[0].getMessage()


def test_evaluate_and_generate_read_them_too(tmp_path, caplog):
    lines = rb'{"question": "2+2? \ud83d", "answer": "4"}' + b"\n{\n" + GOOD
    (tmp_path / "mine.jsonl").write_bytes(lines)
    rows = problems.benchmark_rows("mine", EvaluationConfig(data_dir=str(tmp_path)))
    assert [row.question for row in rows] == generate.read(str(tmp_path / "mine.jsonl"), "") == ["2+2? \ufffd", "1+1?"]
    assert len(caplog.records) == 4  # a broken line and a mended one, twice
    (tmp_path / "mine.txt").write_bytes(b"\xef\xbb\xbf1+1?\r\n2+2?\r\n")
    assert generate.read(str(tmp_path / "mine.txt"), "") == ["1+1?", "2+2?"]


# ----------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("printed", "gold"),
    [
        ("['58']", "58"),
        ('["34"]', "34"),
        ('["\\\\frac{1}{2}"]', "\\frac{1}{2}"),
        ("['\\\\frac{1}{2}']", "\\frac{1}{2}"),
        ("['\\frac{1}{2}']", "\\frac{1}{2}"),  # written by hand: \f is no escape
        ("['2', '-2']", "2, -2"),
        ("('58',)", "58"),
        ("array(['58'], dtype=object)", "58"),
        ("['1' '2']", "1, 2"),
        ('["\\\\boxed{7}"]', "7"),
        ('["caf\\u00e9"]', "café"),
        ('["The answer is 7."]', "7"),
        # No lists:
        ("[2, 5]", "[2, 5]"),
        ("(0,1]", "(0,1]"),
        ("f'(x)", "f'(x)"),
        ("(f'(0), g'(0))", "(f'(0), g'(0))"),
        ("['a", "['a"),
    ],
)
def test_printed_lists_are_read(tmp_path, printed, gold):
    row = {"prompt": [{"role": "user", "content": "How many?"}], "reward_model": {"ground_truth": printed}}
    assert only(tmp_path, row) == ("How many?", gold)
    assert right(gold, printed)  # also where the grader itself gets it
    assert not right("1234567", printed)


@pytest.mark.parametrize("blank", ["[]", "['']", [], [""], [None], None, " ", float("nan")])
def test_answers_that_are_empty_are_blank(tmp_path, blank):
    rows = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": blank}]
    assert "1 of 2 rows has a blank 'answer': row 2;" in error_of(load, tmp_path, rows)
    assert len(load(tmp_path, rows, clean=True)) == 1


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("Let the rate be r. Then 2r=36 and r=18.\n\nTherefore, the answer is: 180.", "180"),
        ("We get x = 4.\nSo the final answer is $\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("It is long.\n**Answer:** 12", "12"),
        ("#### Step 1\nThree and four.\n#### Final Answer\nSo the total is $\\boxed{7}$.", "7"),
        ("<think>no</think><answer>9</answer>", "9"),
        ("x = 5", "x = 5"),
        ("no solution", "no solution"),
    ],
)
def test_the_final_answer_of_a_solution(tmp_path, solution, gold):
    assert only(tmp_path, {"problem": "How long?", "solution": solution}) == ("How long?", gold)


PROSE = "We let x be the rate. Then it follows that the rate is known. So the trip takes three hours more."


def test_answers_that_nothing_can_equal_are_counted_and_named(tmp_path):
    rows = [{"problem": f"{i}", "answer": "\\frac{1}{2}"} for i in range(20)]
    rows[4]["answer"], rows[11]["answer"] = PROSE, "\\frac{1}{2"
    train = DataConfig(train=write(tmp_path / "x.jsonl", rows))
    training = problems.training_set(Config(data=train), {})
    assert ("answers that no completion can match", "2 of 20: rows 5, 12, kept") in training.notes
    cleaned = problems.training_set(Config(data=DataConfig(train=train.train, clean=True)), {})
    assert ("answers that no completion can match", "2 of 20: rows 5, 12, left out") in cleaned.notes
    assert len(cleaned.rows) == 18
    rows[7]["answer"] = "x" * 2000
    write(tmp_path / "x.jsonl", rows)
    message = error_of(problems.training_set, Config(data=train), {})
    assert "answers of 3 of 20: rows 5, 8, 12, more than 10%" in message
    assert "We let x be the rate." in message and "config.data.answer_column" in message
    judged = RewardsConfig(accuracy=0.0)  # a judge or a function of the user's may read prose
    assert len(problems.training_set(Config(data=train, rewards=judged), {}).rows) == 20


def test_answers_of_a_benchmark_that_nothing_can_equal_are_named(tmp_path, caplog):
    rows = [{"problem": f"{i}", "answer": PROSE if i == 0 else "1"} for i in range(10)]
    write(tmp_path / "mine.jsonl", rows)
    settings = EvaluationConfig(data_dir=str(tmp_path))
    assert len(problems.benchmark_rows("mine", settings)) == 10
    assert "no completion can match the reference answers of 1 of 10: row 1; fix them" in caplog.records[0].getMessage()
    rows[3]["answer"] = PROSE
    write(tmp_path / "mine.jsonl", rows)
    message = error_of(problems.benchmark_rows, "mine", settings)
    assert "mine.jsonl: no completion can match the reference answers of 2 of 10: rows 1, 4, more than 10%" in message
    assert "We let x be the rate." in message and "config.evaluation.answer_column names another" in message
    write(tmp_path / "aime24.jsonl", rows)  # those of a known benchmark are what they are
    assert len(problems.benchmark_rows("aime24", settings)) == 10
    assert "answers of 2 of 10: rows 1, 4; fix them" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    "gold",
    [
        PROSE,
        "Since 2r=36 we get r=18, and the total time is 180 minutes",
        "设速度为 r。那么 2r=36，所以 r=18。",
        "Пусть скорость равна r. Тогда время равно 18.",
        "We have 3 apples and 4 pears so 7 fruits.",
        "Then x=3. Therefore 12",
        "It is 12",
        "The total is 12",
        "The total is 12 because 3 times 4 is 12.",
        "What is the capital of France?",
        "How many are left?\n",
        "\\frac{1}{2",
        "5}",
        "x" * 1001,
    ],
)
def test_golds_that_nothing_can_equal(gold):
    assert not grader.accepts_itself(gold)
    assert not grader.accepts_itself(golds.any_of([gold, PROSE])) and grader.accepts_itself(golds.any_of([gold, "7"]))


def test_every_row_with_such_an_answer_is_found():
    rows = [problems.Row(str(i), i, "q", ("7", PROSE, "\\frac{1")[i % 3], {}) for i in range(9)]
    assert problems.unequal_rows(rows) == [1, 2, 4, 5, 7, 8]


@pytest.mark.parametrize(
    "gold",
    [
        *("12", "x = 5", "\\text{Monday, Tuesday and Friday}", "(D) The cat sat on the mat", "π", "无解", "是的。"),
        *("(D) How many are left?", "x = ?"),
        *("every even integer", "no solution", "All real numbers", "There are no solutions", "12 square inches"),
        *("The answer is 12", "(D) It is 12", "D: 2 is even, so 12", "n is a multiple of 3", "rotations of SO(3)"),
    ],
)
def test_ordinary_golds_accept_themselves(gold):
    assert grader.accepts_itself(gold)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (3.0, "3"),
        (0.5, "0.5"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        (-2.5e-8, "-0.000000025"),
        ("3.0", "3.0"),
        ([3.0], "3"),
        (["1/2", "0.50"], 'any of ["1/2", "0.50"]'),
        (["7", 7, "7"], "7"),
        (["\\boxed{\\frac{1}{2}}", None, "so\n#### 1,000"], 'any of ["\\\\frac{1}{2}", "1000"]'),
        (decimal.Decimal("27.00"), "27"),  # as Parquet has them
        (decimal.Decimal("0.50"), "0.5"),
        (decimal.Decimal("-1E-7"), "-0.0000001"),
    ],
)
def test_numbers_and_lists_of_answers(tmp_path, value, text):
    assert columns.answer(value) == text
    if not isinstance(value, decimal.Decimal):  # which JSON lacks
        assert only(tmp_path, {"question": "q", "answer": value}) == ("q", text)


def test_a_list_of_lists_is_no_answer(tmp_path, caplog):
    """A matrix as rows of numbers is one answer, which "any of 0, 1" is not: every 0 and every 1 would be right."""
    rows = [{"question": "q", "answer": answer} for answer in ("1", [[0, 1], [1, 0]], "[[0,1],[1,0]]")]
    assert [row.answer for row in load(tmp_path, rows)] == ["1", "[[0,1],[1,0]]"]
    said = "1 of 3 rows has no readable 'answer' (a list in a list; write each right answer as one text): row 2"
    assert said in caplog.records[0].getMessage()
    assert "1 of 1 rows has no readable 'answer'" in error_of(load, tmp_path, rows[1:2])


def test_any_of_several_answers_is_right():
    gold = golds.any_of(["\\frac{1}{2}", "x+1", "Paris"])
    for answer, expected in (("0.5", True), ("1+x", True), ("paris", True), ("2", False), ("0.5, x+1", False)):
        assert right(answer, gold) is expected
    assert golds.alternatives(gold) == ["\\frac{1}{2}", "x+1", "Paris"] and grader.accepts_itself(gold)
    assert not right('any of ["1", "2", "3"]', "2")  # what a policy writes is no list of answers
    assert golds.alternatives("any of [1") == ["any of [1"] and golds.alternatives("any of [1]") == ["any of [1]"]


# --------------------------------------------------------------------------------------------------------- questions


def test_alpacas_instruction_and_input_are_both_asked(tmp_path):
    rows = [
        {"instruction": "Add the two numbers.", "input": "3 and 4", "output": "7"},
        {"instruction": "What is 2+2?", "input": "", "output": "4"},
        {"instruction": "What is 3+3?", "output": "6", "system": "s"},
    ]
    loaded, mapping, _ = problems.load_rows(DataConfig(train=write(tmp_path / "x.jsonl", rows)))
    asked = ["Add the two numbers.\n\n3 and 4", "What is 2+2?", "What is 3+3?"]
    assert [row.question for row in loaded] == generate.read(str(tmp_path / "x.jsonl"), "") == asked
    assert [row.columns.keys() - {"output"} for row in loaded] == [set(), set(), {"system"}]
    assert (mapping.prompt, mapping.answer) == ("instruction+input", "output")
    assert only(tmp_path, {"instruction": "Q", "answer": "1"}) == ("Q", "1")
    assert only(tmp_path, rows[0], prompt_column="input") == ("3 and 4", "7")  # what the user names
    named = {"context": "C", "body": {"text": "B"}, "answer": "1"}
    assert only(tmp_path, named, prompt_column="context+body.text") == ("C\n\nB", "1")
    wrong = [{"instruction": {"a": 1}, "input": "x", "output": "1"}]
    assert "has no readable 'instruction+input' (not text): row 1;" in error_of(load, tmp_path, wrong)
    assert "blank 'instruction+input': row 1;" in error_of(
        load, tmp_path, [{"instruction": "", "input": " ", "output": 1}]
    )


USER, SYSTEM = {"role": "user", "content": "Q"}, {"role": "system", "content": "S"}
REPLY = {"role": "assistant", "content": "So it is \\boxed{5}."}
SHAREGPT = [
    {"from": "system", "value": "S"},
    {"from": "human", "value": "Q"},
    {"from": "gpt", "value": "The answer is 5"},
]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"messages": [USER, REPLY]}, "Q"),
        ({"messages": [SYSTEM, USER, REPLY], "source": "x"}, "S\n\nQ"),
        ({"conversations": SHAREGPT}, "S\n\nQ"),
        ({"conversations": SHAREGPT[1:], "id": 3}, "Q"),
        ({"messages": [USER], "answer": 5}, "Q"),
        ({"messages": [USER, REPLY], "answer": "5"}, "Q"),
        ({"prompt": [USER, {"role": "assistant", "content": "5"}]}, "Q"),
        ({"prompt": [{"role": "developer", "content": "S"}, USER], "answer": "5"}, "S\n\nQ"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}], "answer": "5"}, "Q"),
        ({"prompt": USER, "answer": "5"}, "Q"),
        ({"prompt": json.dumps([SYSTEM, USER]), "answer": "5"}, "S\n\nQ"),
        ({"prompt": str([USER]), "answer": "5"}, "Q"),
        ({"messages": json.dumps([USER, REPLY])}, "Q"),
    ],
)
def test_chats(tmp_path, row, question):
    assert only(tmp_path, row) == (question, "5")


@pytest.mark.parametrize("text", ["[{1, 2}]", '{"a": 1}', "[{", "{'x'}", '[{"role"', "[{}]", "{'a': __import__('os')}"])
def test_texts_that_are_no_chats(tmp_path, text):
    assert messages.parse(text) is None
    assert only(tmp_path, {"prompt": text, "answer": "1"}) == (text, "1")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, REPLY, USER, REPLY]}, "messages with the roles user, assistant, user, assistant"),
        ({"messages": [USER, REPLY], "answer": [REPLY, USER]}, "messages without a reply from the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}, "content is not text"),
        ({"messages": [{"role": "user"}], "answer": "1"}, "content is not text"),
        ({"messages": [USER]}, "has no column 'answer'"),
    ],
)
def test_chats_that_are_no_problem_with_an_answer(tmp_path, row, expected):
    assert expected in error_of(load, tmp_path, [row])


def test_a_chat_of_several_turns_costs_that_row(tmp_path, caplog):
    """The first row too, although it is the first of which the columns are told."""
    rows = [{"messages": [USER, REPLY] * 2}, {"messages": [USER, REPLY]}, {"messages": [{**USER, "content": 5}, REPLY]}]
    rows += [{"messages": [SYSTEM, USER, REPLY]}] * 2
    assert [(row.id, row.question, row.answer) for row in load(tmp_path, rows)] == [
        ("2", "Q", "5"),
        ("4", "S\n\nQ", "5"),
        ("5", "S\n\nQ", "5"),
    ]
    (record,) = caplog.records
    said = "2 of 5 rows have no readable 'messages' (messages with the roles user, assistant, user, assistant"
    assert said in record.getMessage() and record.getMessage().endswith("rows 1, 3; left out")
    rows[0]["messages"] = [USER]  # it has no reply, and the others tell where the answers are
    assert [row.id for row in load(tmp_path, rows)] == ["2", "4", "5"]
    assert generate.read(str(tmp_path / "x.jsonl"), "") == ["Q", "Q", "S\n\nQ", "S\n\nQ"]


def test_the_settings_name_what_is_found():
    """The comments of data.prompt_column and answer_column list the names that are looked for."""
    text = " ".join(Path(config.__file__).read_text("utf-8").replace("#", " ").split())
    assert ", ".join(columns.PROMPTS) in text and ", ".join(columns.ANSWERS) in text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "parquet"])
def test_an_ending_in_capitals_is_read_like_one_in_small_letters(tmp_path, kind):
    import pandas

    row = {"question": "1+1?", "answer": "2"}
    file, folder = tmp_path / f"MINE.{kind.upper()}", str(tmp_path)
    if kind == "parquet":
        pandas.DataFrame([row]).to_parquet(file)
    else:
        file.write_text("question,answer\n1+1?,2\n" if kind == "csv" else json.dumps(row) + "\n", "utf-8")
    for read in (
        lambda: problems.load_rows(DataConfig(train=str(file)))[0],
        lambda: problems.load_rows(DataConfig(train=folder))[0],
        lambda: problems.benchmark_rows("MINE", EvaluationConfig(data_dir=folder)),
    ):
        assert [(each.question, each.answer) for each in read()] == [("1+1?", "2")]
    assert generate.read(str(file), "") == ["1+1?"]
