"""Rows, their order, and what is said of files that can't be used."""

import gzip
import json
import logging
import os
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
from model_files import error_of
from pyarrow import parquet

from igrpo_jax.config import ArithmeticConfig, Config, DataConfig, EvaluationConfig, JudgeConfig, RewardsConfig
from igrpo_jax.data import overlap, problems, readers
from igrpo_jax.data.catalog import BENCHMARKS, TRAINING_SETS
from igrpo_jax.errors import InputError
from igrpo_jax.rewards.mathematics import grader


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


def sums(count):
    return [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(count)]


def load(path, prompt="prompt", answer="answer", **more):
    return problems.load_rows(DataConfig(train=str(path), prompt_column=prompt, answer_column=answer, **more))[0]


def test_json_lines_keep_ids_columns_and_text(tmp_path):
    rows = [{"id": "a/7", "q": "1+1 = ½·4?", "a": "2", "level": 3}, {"q": "0?", "a": 0, "level": None}]
    first, second = load(write(tmp_path / "x.jsonl", rows), "q", "a")
    # A reward that asks for the answer by the name of its column gets the cell as it is.
    assert first == problems.Row("a/7", 0, "1+1 = ½·4?", "2", {"id": "a/7", "a": "2", "level": 3})
    zeros = write(tmp_path / "y.jsonl", [row | {"id": 0} for row in rows])
    assert [row.id for row in load(zeros, "q", "a")] == ["0", "0"]
    # Answer 0 is not blank; the id is the row's number.
    assert second == problems.Row("2", 1, "0?", "0", {"a": 0, "level": None})


def test_json_lines_accept_a_byte_order_mark_and_blank_lines(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes('\ufeff{"prompt": "é", "answer": "1"}\n\n{"prompt": "b", "answer": "2"}\n\n'.encode())
    rows = load(str(file), "prompt", "answer")
    assert [(row.id, row.index, row.question) for row in rows] == [("1", 0, "é"), ("3", 1, "b")]


def test_csv_cells_stay_text(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text('prompt,answer\n"Sum, of 20 and 5?",025\nSymbol?,NA\n', "utf-8")
    rows = load(str(file), "prompt", "answer")
    assert [(row.question, row.answer) for row in rows] == [("Sum, of 20 and 5?", "025"), ("Symbol?", "NA")]


def test_a_column_of_csv_without_a_name_is_left_out(tmp_path):
    """As the index that pandas writes: nobody can ask for it, and a custom reward would get an argument "" with it."""
    (tmp_path / "x.csv").write_text(",prompt,answer,\n0,a,1,\n1,b,2,x\n", "utf-8")
    table = readers.read(str(tmp_path / "x.csv"), "x.csv")
    assert table == [(1, {"prompt": "a", "answer": "1"}), (2, {"prompt": "b", "answer": "2"})]


@pytest.mark.slow
def test_numbers_of_single_precision_have_their_short_decimals(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    kinds = {"answer": "float32", "half": "float16", "question": "string"}
    rows = {"answer": [0.1, 1 / 3, None], "half": [0.1, 2.0, 0.5], "question": ["a", "b", "c"]}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
    features["image"] = datasets.Array2D((1, 2), "float32")  # has a dtype too, and is no number
    rows["image"] = [[[0.5, 1.0]]] * 3
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    table = readers.read(str(tmp_path / "x.parquet"), "config.data.train", "", "train")
    assert [columns["answer"] for _, columns in table] == [0.1, 0.33333334, None]
    assert [columns["half"] for _, columns in table] == [0.1, 2.0, 0.5]


def test_json_and_parquet_go_through_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.json").write_text(json.dumps(sums(3)), "utf-8")
    datasets.Dataset.from_list(sums(3)).to_parquet(str(tmp_path / "x.parquet"))
    for name in ("x.json", "x.parquet"):
        rows = load(str(tmp_path / name), "prompt", "answer")
        assert [(row.index, row.answer) for row in rows] == [(0, "1"), (1, "2"), (2, "3")]
    (tmp_path / "bad.parquet").write_bytes(b"nothing of the sort")
    assert "can't be loaded" in error_of(load, str(tmp_path / "bad.parquet"), "prompt", "answer")


def test_folders_of_save_to_disk(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(sums(3))
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, test=rows.select([2])).save_to_disk(str(tmp_path / "splits"))
    read = lambda name, split: [columns for _, columns in readers.read(str(tmp_path / name), "F", split=split)]
    assert read("one", "train") == read("splits", "train") == sums(3)
    assert read("splits", "test") == sums(3)[2:]
    assert "F: was saved with splits test, train, and has none named 'dev'" in error_of(read, "splits", "dev")
    for file in (tmp_path / "one").glob("*.arrow"):  # as the copy of one in a bucket
        file.unlink()
    assert "F: can't be loaded (" in error_of(read, "one", "train")


def test_a_missing_file_is_named(tmp_path):
    message = error_of(load, str(tmp_path / "none.jsonl"), "prompt", "answer")
    assert message.startswith(f"config.data.train = {str(tmp_path / 'none.jsonl')!r}: no such file")
    assert "no such file" in error_of(load, "a/b/c", "prompt", "answer")
    (tmp_path / "x.txt").write_text("x")
    assert ".jsonl" in error_of(load, str(tmp_path / "x.txt"), "prompt", "answer")


def test_a_hub_id_that_can_not_be_had(monkeypatch, caplog):
    """One line, without those of the hub's own retries before it."""
    import datasets

    def offline(*args, **kwargs):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = error_of(load, "nobody/none-such", "prompt", "answer")
    assert message.startswith("config.data.train = 'nobody/none-such': can't be loaded")
    assert "local file" in message and not caplog.records


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("x.jsonl", ""), ("x.jsonl", "\n\n"), ("x.csv", ""), ("x.json", ""), ("x.parquet", "")],
        *[("x.json", "[]"), ("x.json", " [\n]\n"), ("x.parquet", None)],
    ],
)
def test_an_empty_file(tmp_path, capfd, name, text):
    if text is None:
        empty = {name: pyarrow.array([], pyarrow.string()) for name in ("prompt", "answer")}
        parquet.write_table(pyarrow.table(empty), tmp_path / name)
    else:
        (tmp_path / name).write_text(text)
    message = error_of(load, str(tmp_path / name), "prompt", "answer")
    assert message.endswith(f"{name}': is empty; give a file with at least one problem") and not capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"), [("x.parquet", "ArrowInvalid: Parquet magic bytes not found"), ("x.json", "ValueError: ")]
)
def test_a_file_that_was_cut_off_is_reported_once_with_the_reason(tmp_path, caplog, capfd, name, reason):
    """`datasets` logged it too, and of .json the error said only that there was one."""
    if name == "x.parquet":
        parquet.write_table(pyarrow.table({"prompt": ["2 + 2?"] * 100, "answer": ["4"] * 100}), tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(sums(9)))
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = error_of(load, file)
    assert f"can't be loaded ({reason}" in message and message.endswith("; give a whole file, or one in JSON Lines")
    assert not caplog.records and not capfd.readouterr().err


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_a_file_in_utf_16_is_named(tmp_path, name):
    text = "prompt,answer\na,1\n" if name == "x.csv" else '{"prompt": "a", "answer": "1"}\n'
    for encoding in ("utf-16", "utf-16-be"):
        (tmp_path / name).write_bytes(("\ufeff" * (encoding != "utf-16") + text).encode(encoding))
        message = error_of(load, str(tmp_path / name), "prompt", "answer")
        assert message.endswith(f"{name}': is UTF-16; save it as utf-8")


def test_a_packed_file_is_to_be_unpacked(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "answer": "1"}\n'))
    assert "x.jsonl.gz': is packed; unpack it first, and give" in error_of(load, str(tmp_path / "x.jsonl.gz"))


def test_bars_are_drawn_on_a_terminal_alone(tmp_path, monkeypatch, capfd):
    (tmp_path / "x.json").write_text(json.dumps(sums(3)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert len(readers.read(str(tmp_path / "x.json"), "F")) == 3
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "x", "answer"', "line 2 is not JSON"),
        (b"\xff\xfe{", "line 2 is not JSON"),
        (b'["x", "1"]', "line 2 holds no JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    """More than half of such lines are an error; test_users_data.py has files with fewer of them."""
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "x", "answer": "1"}\n' + (line + b"\n") * 2)
    message = error_of(load, str(tmp_path / "x.jsonl"), "prompt", "answer")
    assert said in message and "one of 2 broken lines of 3; give one object per line" in message


GOOD_CSV = b"prompt,answer\na,1\nb,2\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"b, or c,2", "has more cells than the header"),
        (b"\xe9t\xe9,2", "has bytes that are not utf-8"),
        (b'"What is "x" here?",2', "is not valid CSV ('"),
    ],
)
def test_a_broken_row_of_csv_costs_that_row_and_is_named(tmp_path, caplog, row, said):
    (tmp_path / "x.csv").write_bytes(GOOD_CSV + row + b'\n\n"d ""quoted"", and\nmore",4\n')
    rows = problems.load_rows(DataConfig(train=str(tmp_path / "x.csv")))[0]
    assert [(row.id, row.question, row.answer) for row in rows] == [
        ("1", "a", "1"),
        ("2", "b", "2"),
        ("4", 'd "quoted", and\nmore', "4"),
    ]
    (record,) = caplog.records
    assert f"x.csv': 1 of 4 rows are broken and left out: row 3 {said}" in record.getMessage()
    (tmp_path / "x.csv").write_bytes(GOOD_CSV + (row + b"\n") * 3)
    message = error_of(load, str(tmp_path / "x.csv"), "prompt", "answer")
    assert f"row 3 {said}" in message and "one of 3 broken rows of 5; save it as CSV in utf-8" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD_CSV + b'"c,3\nd,4\n', "row 3 opens a quote that is never closed"),  # or the rest would be its cell
        (b"probl\xe8me,answer\na,1\n", "the header has bytes that are not utf-8"),
        (b'"a"b,c\na,1\n', "the header is not valid CSV"),
        (b"prompt,answer,answer\na,1,2\n", "the header names 'answer' twice"),
        (b"prompt;answer\na;1\n", "the header has one cell, 'prompt;answer', without a comma"),
    ],
)
def test_a_csv_file_of_which_rows_would_be_lost_is_refused(tmp_path, text, said):
    (tmp_path / "x.csv").write_bytes(text)
    message = error_of(load, str(tmp_path / "x.csv"), "", "")
    assert f"x.csv': {said}" in message and "save it as CSV in utf-8" in message


def test_a_column_that_is_not_there(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"problem": "x", "answers": "1"}] * 2)
    message = error_of(load, file, "prompt", "answers")
    assert "no column 'prompt'" in message
    assert "problem, answers" in message
    assert "nearest is 'problem'" in message
    assert "config.data.prompt_column" in message
    message = error_of(load, file, "problem", "answer")
    assert "nearest is 'answers'" in message
    assert "config.data.answer_column" in message
    file = write(tmp_path / "x.jsonl", [{"Question": "x", "Answer": "1"}] * 2)
    assert "its columns are Question, Answer; the nearest is 'Question'" in error_of(load, file, "", "")
    assert "the nearest is 'Answer'" in error_of(load, file, "Question", "")
    assert "the nearest is 'Question'" in error_of(load, file, "question", "")
    file = write(tmp_path / "x.jsonl", [{"problem": "x", "expected": "1"}] * 2)  # not the column of the questions
    assert "its columns are problem, expected; the nearest is 'expected'" in error_of(load, file, "", "")


@pytest.mark.parametrize(
    ("rewards", "fix"),
    [
        (RewardsConfig(), "training needs no answers with config.rewards.accuracy = 0)"),
        (
            RewardsConfig(judge=JudgeConfig(weight=1.0, model="m")),
            "with config.rewards.accuracy = 0 and config.rewards.judge.show_reference = False)",
        ),
        (RewardsConfig(accuracy=0.0, judge=JudgeConfig(weight=1.0, model="m")), "judge.show_reference = False)"),
        (RewardsConfig(accuracy=0.0, judge=JudgeConfig(weight=1.0, model="m", show_reference=False)), ""),
        (RewardsConfig(accuracy=0.0, judge=JudgeConfig(show_reference=True)), ""),
    ],
)
@pytest.mark.parametrize("question", ["2 + 2?", [{"role": "user", "content": "2 + 2?"}]])
def test_problems_without_answers_need_rewards_that_read_none(tmp_path, rewards, fix, question):
    """The data sets of TRL's examples with a column `prompt` alone were refused whatever the rewards."""
    rows = [{"prompt": question, "options": ["3", "4"], "level": i} for i in range(2)]
    file = write(tmp_path / "x.jsonl", [{**row, "id": i} for i, row in enumerate(rows)])
    data = DataConfig(train=file, clean=True, prompt_column="prompt")
    found = lambda **more: problems.training_set(Config(data=replace(data, **more), rewards=rewards), {})
    if fix:
        assert error_of(found).endswith(fix)
        return
    (first,), notes = found().rows, dict(found().notes)
    assert (first.id, first.question, first.answer, first.columns["level"]) == ("0", "2 + 2?", "", 0)
    assert notes["columns"] == "question from 'prompt', no answers" and notes["repeated problems"].startswith("1 of 2")
    asked = found(prompt_column="", clean=False).rows
    assert [(row.question[:24], row.answer) for row in asked] == [("2 + 2?\n\nA) 3\nB) 4\n\nThe f", "")] * 2
    assert "no column 'answer'" in error_of(lambda: found(answer_column="answer"))  # a named one must be there
    assert "no column 'answer'" in error_of(problems.load_rows, data)  # SFT states answers
    write(tmp_path / "x.jsonl", [{"prompt": question, "answer": blank} for blank in (None, "", " ")])
    assert [row.answer for row in found(clean=False).rows] == [""] * 3  # a blank column is none
    assert "a blank 'answer'" in error_of(lambda: found(answer_column="answer", clean=False))
    write(tmp_path / "x.jsonl", [{"prompt": question, "options": "3, 4"}])
    assert "clear what they are in 1 of 1 rows: row 1; write them" in error_of(lambda: found(prompt_column=""))


def test_blank_cells_are_counted_and_their_rows_named(tmp_path):
    rows = sums(100)
    rows[3]["answer"], rows[16]["answer"] = "", "  \n"
    del rows[59]["answer"]
    file = write(tmp_path / "x.jsonl", rows)
    message = error_of(load, file, "prompt", "answer")
    assert f"config.data.train = {file!r}: 3 of 100 rows have a blank 'answer': rows 4, 17, 60;" in message
    for i in range(8):
        rows[i]["prompt"] = None
    message = error_of(load, write(tmp_path / "x.jsonl", rows), "prompt", "answer")
    assert "8 of 100 rows have a blank 'prompt': rows 1, 2, 3, 4, 5, ...;" in message


@pytest.mark.parametrize(
    ("name", "cell", "reason"),
    [
        ("prompt", [{"role": role, "content": "x"} for role in ("user", "assistant", "user")], "messages with"),
        ("prompt", 5, "not text"),
        ("prompt", ["a"], "not text"),
        ("answer", {"value": 1}, "not text"),
        ("answer", [{"role": "user", "content": "x"}], "messages without a reply"),
    ],
)
def test_a_row_that_can_not_be_read_costs_that_row_and_is_named(tmp_path, caplog, name, cell, reason):
    rows = sums(4)
    rows[1][name] = cell
    file = write(tmp_path / "x.jsonl", rows)
    loaded = load(file)
    assert [(row.id, row.index) for row in loaded] == [("1", 0), ("3", 1), ("4", 2)]
    assert [row.question for row in loaded] == [rows[at]["prompt"] for at in (0, 2, 3)]
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"config.data.train = {file!r}: 1 of 4 rows has no readable {name!r} ({reason}")
    assert message.endswith(": row 2; left out")
    rows[2][name] = cell
    assert len(load(write(tmp_path / "x.jsonl", rows))) == 2  # half of them
    rows[3][name] = cell
    message = error_of(load, write(tmp_path / "x.jsonl", rows))
    assert "3 of 4 rows have" in message and message.endswith(": rows 2, 3, 4; write it as a string")


def test_rows_that_can_not_be_read_are_counted_over_both_columns(tmp_path):
    rows = sums(5)
    rows[0]["prompt"] = rows[3]["answer"] = rows[4]["answer"] = {"a": 1}
    assert "2 of 5 rows have no readable 'answer' (not text): rows 4, 5;" in error_of(
        load, write(tmp_path / "x.jsonl", rows)
    )


@pytest.mark.parametrize(
    ("row", "question", "answer", "mapping"),
    [
        ({"problem": "Q", "answer": "7"}, "Q", "7", ("problem", "answer")),
        ({"input": "Q", "output": 27.0}, "Q", "27", ("input", "output")),
        ({"input": "x", "question": "Q", "ground_truth": 0.5, "solution": "7"}, "Q", "7", ("question", "solution")),
        (
            {"problem": "Q", "solution": "#### Step 1\nAdd.\n#### Final Answer\nSo it is $\\boxed{7}$."},
            *("Q", "7", ("problem", "solution")),
        ),
        ({"question": "Q", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,234"}, "Q", "1234", ("question", "answer")),
        (
            {"problem": "Q", "solution": "Thus $\\boxed{1}$, so $\\boxed{\\frac{1}{2}}$."},
            "Q",
            "\\frac{1}{2}",
            ("problem", "solution"),
        ),
        (
            {
                "data_source": "openai/gsm8k",
                "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
                "reward_model": {"style": "rule", "ground_truth": "72"},
            },
            "S\n\nQ",
            "72",
            ("prompt", "reward_model.ground_truth"),
        ),
        ({"prompt": [{"role": "user", "content": "Q"}], "answer": ["3"]}, "Q", "3", ("prompt", "answer")),
    ],
)
def test_columns_are_found_by_their_names(tmp_path, row, question, answer, mapping):
    """Each is a form that published data sets have. `input` beside `question` loses: the order of names counts."""
    rows, found, notes = problems.load_rows(DataConfig(train=write(tmp_path / "x.jsonl", [row])))
    assert (rows[0].question, rows[0].answer, (found.prompt, found.answer)) == (question, answer, mapping)
    question_columns = {mapping[0], *mapping[0].split("+")}
    assert rows[0].columns == {name: value for name, value in row.items() if name not in question_columns}
    assert mapping[0] in str(found) and mapping[1] in str(found)
    assert [name for name, _ in notes] == ["system turns"] * question.startswith("S\n")


def test_a_named_column_wins_over_those_found(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"problem": "P", "question": "Q", "answer": "1", "extra": {"gold": "2"}}])
    (row,) = load(file, "question", "extra.gold")
    assert (row.question, row.answer) == ("Q", "2")


def test_one_column_is_question_and_answer_of_chats_alone(tmp_path):
    """The answer stood in the prompt, and all was accepted."""
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    file = write(tmp_path / "x.jsonl", [{"solution": "2 + 2 is 4", "answer": "4", "output": chat}])
    message = error_of(load, file, "solution", "solution")
    assert "question and answer are both column 'solution', so the question shows its answer (config.data" in message
    assert [(row.question, row.answer) for row in load(file, "output", "output")] == [("2 + 2?", "4")]
    (row,) = load(file, "answer", "")  # which is not found as the answer of itself
    assert (row.question, row.answer) == ("4", "2 + 2 is 4")
    assert "has no column" in error_of(load, write(tmp_path / "x.jsonl", [{"answer": "4"}]), "answer", "")


def test_a_dot_reaches_into_columns_however_deep_they_lie(tmp_path):
    """As in extra_info of veRL; and an error still names the nearest column."""
    row = {"prompt": "Q", "extra_info": {"split": "train", "reward": {"ground_truth": "2", "style": {"kind": "rule"}}}}
    file = write(tmp_path / "x.jsonl", [row])
    assert [row.answer for row in load(file, "", "extra_info.reward.ground_truth")] == ["2"]
    assert [row.answer for row in load(file, "", "extra_info.reward.style.kind")] == ["rule"]
    assert "the nearest is 'extra_info.reward.ground_truth'" in error_of(load, file, "", "reward.ground_truth")


def test_no_column_of_a_known_name(tmp_path):
    message = error_of(load, write(tmp_path / "x.jsonl", [{"text": "x", "label": "1"}]), "", "")
    known = "'prompt', 'problem', 'question', 'instruction+input', 'input', 'instruction', 'messages'"
    assert f"has no column {known} or 'conversations'" in message
    assert "its columns are text, label" in message and "config.data.prompt_column" in message


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name, first in (("b", 2), ("a", 0)):
        write(tmp_path / f"{name}.jsonl", sums(4)[first : first + 2])
    assert [(row.id, row.index, row.answer) for row in load(tmp_path)] == [
        ("1", 0, "1"),
        ("2", 1, "2"),
        ("3", 2, "3"),
        ("4", 3, "4"),
    ]
    (tmp_path / "c.csv").write_text("prompt,answer\n")
    assert "several kinds (.csv, .jsonl)" in error_of(load, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no file" in error_of(load, tmp_path / "empty")


def test_of_a_folder_whose_files_are_named_after_splits_one_is_read(tmp_path):
    """As a data set's folder on the hub has them; red where its test problems would be trained on."""
    files = {"train-00001-of-2": 2, "train-00000-of-2": 0, "gsm8k_Test": 4, "notes": 6}
    for name, first in files.items():
        write(tmp_path / f"{name}.jsonl", sums(8)[first : first + 2])
    assert [row.answer for row in load(tmp_path)] == ["1", "2", "3", "4"]
    assert [row.answer for row in load(tmp_path, split="test")] == ["5", "6"]
    message = error_of(lambda: load(tmp_path, split="dev"))
    assert "has files of test, train, but none of the split 'dev'; set config.data.split" in message


def test_presets_and_hub_ids_ask_the_hub_for_the_right_thing(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        return [{"problem": "Q", "question": "Q", "answer": "1 #### 2", "solution": "\\boxed{2}", "other": "3"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in TRAINING_SETS:
        assert [(row.question, row.answer) for row in load(name, "", "")] == [("Q", "2")]
    load("owner/name", "", "", subset="hard", split="test")
    for name in ("aime24", "aime25", "math500", "amc23", "gsm8k", "minerva"):  # test_choices.py has the others
        assert [(row.question, row.answer) for row in problems.benchmark_rows(name, EvaluationConfig())] == [("Q", "2")]
    assert asked[:5] == [
        ("DigitalLearningGmbH/MATH-lighteval", None, "train"),
        ("nvidia/AceReason-Math", None, "train"),
        ("open-r1/OpenR1-Math-220k", "default", "train"),
        ("openai/gsm8k", "main", "train"),
        ("owner/name", "hard", "test"),
    ]
    assert [row.answer for row in load("math", "", "other")] == ["3"]  # a column that is named
    assert ("openai/gsm8k", "main", "test") in asked[5:] and ("HuggingFaceH4/aime_2024", None, "train") in asked[5:]


@pytest.mark.parametrize(("name", "value"), [("subset", "socratic"), ("split", "test")])
def test_the_name_of_a_data_set_stands_for_one_part_of_it(name, value):
    settings = DataConfig(train="gsm8k", **{name: value})
    fix = "'gsm8k' stands for one part of openai/gsm8k; set config.data.train = 'openai/gsm8k' for another"
    assert error_of(problems.load_rows, settings) == f"config.data.{name} = '{value}': {fix}"


@pytest.mark.parametrize(("name", "value"), [("subset", "hard"), ("split", "validation")])
def test_a_part_is_not_asked_of_a_file_or_folder_that_has_none(tmp_path, name, value):
    """All of it was trained on, without a word."""
    import datasets

    rows = datasets.Dataset.from_list(sums(3))
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(validation=rows).save_to_disk(str(tmp_path / "saved of splits"))
    for path in ("rows", "named/validation"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{path}.jsonl", sums(3))
    (tmp_path / "unnamed").mkdir()
    write(tmp_path / "unnamed" / "rows.jsonl", sums(3))
    has_splits = {"rows.jsonl": False, "saved": False, "unnamed": False, "named": True, "saved of splits": True}
    for path, has in has_splits.items():
        read = lambda path=path: load(tmp_path / path, **{name: value})
        if has and name == "split":
            assert [row.answer for row in read()] == ["1", "2", "3"]
            continue
        kind = "file" if path == "rows.jsonl" else "folder"
        said = f"config.data.{name} = {value!r}: {str(tmp_path / path)!r} is a local {kind} without {name}s; leave"
        assert said in error_of(read)
    assert "no such file" in error_of(lambda: load(tmp_path / "other.jsonl", **{name: value}))


def test_a_folder_with_the_name_of_a_preset_is_read_itself(tmp_path, monkeypatch):
    (tmp_path / "math").mkdir()
    write(tmp_path / "math" / "x.jsonl", sums(3))
    monkeypatch.chdir(tmp_path)
    assert [row.answer for row in load("math", "", "")] == ["1", "2", "3"]


def test_brackets_make_another_problem():
    assert overlap.overlapping(["(1 + 2) * 3", "1+2*3."], ["1 + 2 * 3"]) == {1: 0}


def test_a_benchmark_without_the_hub_says_how_to_give_a_file():
    message = error_of(problems.benchmark_rows, "math500", EvaluationConfig())  # the suite is offline
    assert message.startswith("config.evaluation.benchmarks = 'math500': can't be loaded")
    assert "config.evaluation.data_dir=FOLDER with math500.jsonl" in message


def test_the_columns_of_a_benchmarks_file_can_be_named(tmp_path):
    """Of columns that would be found by name too, the named ones are read."""
    (tmp_path / "mine.jsonl").write_text('{"prompt": "no", "task": {"text": "1+1"}, "answer": "no", "gold": 2}\n')
    given = {"data_dir": str(tmp_path), "prompt_column": "task.text", "answer_column": "gold"}
    (row,) = problems.benchmark_rows("mine", EvaluationConfig(**given))
    assert (row.question, row.answer) == ("1+1", "2")
    with pytest.raises(InputError, match=r"has no column 'golden'.*config\.evaluation\.answer_column names another"):
        problems.benchmark_rows("mine", EvaluationConfig(**given | {"answer_column": "golden"}))


def test_benchmarks_are_found_by_name_and_cut_to_the_limit(tmp_path):
    write(tmp_path / "aime24.jsonl", sums(5))
    write(tmp_path / "gsm8k_test.jsonl", sums(4))
    write(tmp_path / "my_own.jsonl", [{"question": "1 + 1?", "solution": "\\boxed{2}"}])
    settings = EvaluationConfig(data_dir=str(tmp_path))
    assert len(problems.benchmark_rows("aime24", settings)) == 5
    assert len(problems.benchmark_rows("gsm8k", settings)) == len(problems.benchmark_rows("gsm8k_test", settings)) == 4
    assert [row.answer for row in problems.benchmark_rows("my_own", settings)] == ["2"]
    both = EvaluationConfig(data_dir=str(tmp_path), benchmarks=("aime24", "arithmetic"))
    rows = problems.asked(problems.evaluation_rows(Config(evaluation=both)), 2)
    assert {name: [row.index for row in some] for name, some in rows.items()} == {
        "aime24": [0, 1],
        "arithmetic": [0, 1],
    }
    message = error_of(problems.benchmark_rows, "aime_24", settings)
    assert message.startswith("config.evaluation.benchmarks = 'aime_24'")
    assert "nearest is 'aime24'" in message and "my_own" in message
    assert "config.evaluation.data_dir names a folder" in error_of(problems.benchmark_rows, "mine", EvaluationConfig())
    missing = EvaluationConfig(data_dir=str(tmp_path / "none"))
    assert "config.evaluation.data_dir" in error_of(problems.benchmark_rows, "aime24", missing)
    write(tmp_path / "empty.jsonl", [])
    message = error_of(problems.benchmark_rows, "empty", settings)
    assert "config.evaluation.benchmarks = 'empty'" in message and "is empty" in message


def test_what_is_left_out_of_the_training_set(tmp_path):
    words = [f"word{i}" for i in range(20)]
    asked = " ".join(words)
    rows = [
        {"prompt": "How many?", "answer": "1"},
        {"prompt": "how  MANY", "answer": "1"},  # the same words
        {"prompt": "(Again) " + asked.upper() + ", please.", "answer": "2"},  # all 8 runs of the evaluation problem
        {"prompt": " ".join(words[3:]), "answer": "2"},  # 5 of its 8 runs
        {"prompt": " ".join(words[5:]), "answer": "2"},  # 3 of its 8 runs: not half
        {"prompt": "Without", "answer": " "},
        {"prompt": "7 + 5 - 3", "answer": "9"},
        {"prompt": "7 - 5 + 3", "answer": "5"},  # the same words, and another problem
    ]
    file = write(tmp_path / "x.jsonl", rows)
    held_out = {"mine": [problems.Row("1", 0, "Other", "0", {}), problems.Row("2", 1, asked, "2", {})]}
    held_out["mine"].append(problems.Row("3", 2, "7 - 5 - 3", "-1", {}))
    cleaned = problems.training_set(Config(data=DataConfig(train=file, clean=True)), held_out)
    assert [row.index for row in cleaned.rows] == [0, 4, 5, 6]
    assert cleaned.notes[1:] == [
        ("problems without an answer", "1, left out"),
        ("repeated problems", "1 of 7, left out"),
        ("training problems like mine's", "2 of 7, left out"),
    ]
    file = write(tmp_path / "x.jsonl", rows[:5])
    kept = problems.training_set(Config(data=DataConfig(train=file)), held_out)
    assert len(kept.rows) == 5 and kept.notes[1] == ("repeated problems", "1 of 5, kept")
    message = error_of(load, write(tmp_path / "x.jsonl", rows))
    assert "1 of 8 rows has a blank 'answer': row 6; " in message and "config.data.clean=True" in message
    everything = Config(
        data=DataConfig(train=write(tmp_path / "y.jsonl", [{"prompt": asked, "answer": "2"}]), clean=True)
    )
    assert "leaves none of the 1 problems" in error_of(problems.training_set, everything, held_out)


def test_a_question_with_another_answer_is_another_problem(tmp_path, caplog):
    rows = [("What is 5?", "5"), ("What is 5!?", "120"), ("what is 5", "5.0"), ("What is 5?", "10/2"), ("6?", "6")]
    rows += [("6?", "7"), ("6?", "7"), ("6?", "7.0"), ("6?", "6")]  # repeat the second answer, and the first
    file = write(tmp_path / "mine.jsonl", [{"prompt": question, "answer": answer} for question, answer in rows])
    for clean, kept, treatment in ((False, [*range(9)], "kept"), (True, [0, 1, 4, 5], "left out")):
        found = problems.training_set(Config(data=DataConfig(train=file, clean=clean)), {})
        assert [row.index for row in found.rows] == kept
        assert found.notes[1:] == [
            ("repeated problems", f"5 of 9, {treatment}"),
            ("repeated questions with other answers", "2 of 9: rows 2, 6, kept"),
        ]
    assert len(problems.benchmark_rows("mine", EvaluationConfig(data_dir=str(tmp_path)))) == 9
    (warning,) = caplog.records
    assert "a different answer: 2 of 9: rows 2, 6; each counts" in warning.getMessage()


@pytest.mark.skipif("IGRPO_DATA" not in os.environ, reason="IGRPO_DATA names no folder of the real problems")
def test_the_real_problems():
    """Every gold is found and accepted by the grader, and overlaps are those that an independent count found."""
    folder = os.environ["IGRPO_DATA"]
    settings = EvaluationConfig(data_dir=folder)
    names = ("aime24", "aime25", "amc23", "minerva", "gsm8k", "math500")
    held_out = {name: problems.benchmark_rows(name, settings) for name in names}
    for name, rows in held_out.items():
        assert len(rows) == BENCHMARKS[name].problems
        assert len({row.id for row in rows}) == len(rows)
        for row in rows:
            assert grader.grade(f"So \\boxed{{{row.answer}}}.", row.answer)[0] == 1.0, (name, row.id)
    questions, answers = [], []
    for file, count in (("gsm8k_train", 7473), ("math_train", 7500)):
        rows = load(f"{folder}/{file}.jsonl", "", "")
        assert len(rows) == count
        questions += [row.question for row in rows]
        answers += [row.answer for row in rows]
    asked = {name: [row.question for row in rows] for name, rows in held_out.items()}
    hit = {name: len(set(overlap.overlapping(questions, texts).values())) for name, texts in asked.items()}
    assert hit == {"aime24": 0, "aime25": 0, "amc23": 0, "minerva": 0, "gsm8k": 1, "math500": 17}
    assert [len(part) for part in overlap.repeated(questions, answers)] == [
        2,
        0,
    ]  # 5 more have the same words and other signs


def test_training_rows_are_the_file_or_the_built_in_task(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"q": "1 + 1?", "a": "2"}])
    settings = DataConfig(train=file, prompt_column="q", answer_column="a")
    found = problems.training_set(Config(data=settings), {})
    assert [row.question for row in found.rows] == ["1 + 1?"]
    assert found.notes == [("columns", "question from 'q', answer from 'a'")]
    built_in = Config(data=DataConfig(arithmetic=ArithmeticConfig(train_problems=30, test_problems=10)))
    rows = problems.training_set(built_in, {}).rows
    assert [row.index for row in rows] == list(range(30))
    assert all(int(row.answer) >= 0 for row in rows)


def test_long_prompts_are_skipped_and_counted(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"prompt": "a" * n, "answer": "1"} for n in (3, 5, 4, 9)])
    rows = load(file, "prompt", "answer")
    kept, skipped = problems.fit(rows, lambda text: [ord(x) for x in text], max_length=4)
    assert skipped == 2
    assert [(row.index, tokens.tolist(), tokens.dtype) for row, tokens in kept] == [
        (0, [97] * 3, np.int32),
        (2, [97] * 4, np.int32),
    ]
    message = error_of(problems.fit, rows, lambda text: [0] * len(text), 2)
    assert message.startswith("config.data.max_prompt_length = 2: all 4 prompts are longer; the shortest has 3 tokens")


def test_a_question_that_cannot_be_encoded_is_named(tmp_path):
    """Such as one that the model's chat template changes."""
    file = write(tmp_path / "x.jsonl", [{"id": f"p{n}", "prompt": "a" * n, "answer": "1"} for n in (3, 5)])

    def encode(text):
        if len(text) > 3:
            raise InputError("config.model.path: its chat template changes it")
        return [0]

    message = error_of(problems.fit, load(file, "prompt", "answer"), encode, 9)
    assert message == "problem p5: config.model.path: its chat template changes it"
