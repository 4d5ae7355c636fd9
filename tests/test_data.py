"""Rows, their order, and what is said of files that can't be used."""

import json

import numpy as np
import pytest

from igrpo_jax import data
from igrpo_jax.config import Arithmetic, Config, Data, Evaluation, InputError


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


def problems(count):
    return [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(count)]


def error_of(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_json_lines_keep_ids_columns_and_text(tmp_path):
    rows = [{"id": "a/7", "q": "1+1 = ½·4?", "a": "2", "level": 3}, {"q": "0?", "a": 0, "level": None}]
    first, second = data.load_rows(write(tmp_path / "x.jsonl", rows), "q", "a")
    assert first == data.Row("a/7", 0, "1+1 = ½·4?", "2", {"id": "a/7", "level": 3})
    assert second == data.Row("2", 1, "0?", "0", {"level": None})  # answer 0 is not blank; the id is the row's number


def test_json_lines_accept_a_byte_order_mark_and_blank_lines(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes('\ufeff{"prompt": "é", "answer": "1"}\n\n{"prompt": "b", "answer": "2"}\n\n'.encode())
    rows = data.load_rows(str(file), "prompt", "answer")
    assert [(row.id, row.index, row.question) for row in rows] == [("1", 0, "é"), ("3", 1, "b")]


def test_csv_cells_stay_text(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text('prompt,answer\n"Sum, of 20 and 5?",025\nSymbol?,NA\n', "utf-8")
    rows = data.load_rows(str(file), "prompt", "answer")
    assert [(row.question, row.answer) for row in rows] == [("Sum, of 20 and 5?", "025"), ("Symbol?", "NA")]


def test_json_and_parquet_go_through_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.json").write_text(json.dumps(problems(3)), "utf-8")
    datasets.Dataset.from_list(problems(3)).to_parquet(str(tmp_path / "x.parquet"))
    for name in ("x.json", "x.parquet"):
        rows = data.load_rows(str(tmp_path / name), "prompt", "answer")
        assert [(row.index, row.answer) for row in rows] == [(0, "1"), (1, "2"), (2, "3")]
    (tmp_path / "bad.parquet").write_bytes(b"nothing of the sort")
    assert "can't be loaded" in error_of(data.load_rows, str(tmp_path / "bad.parquet"), "prompt", "answer")


def test_a_missing_file_is_named(tmp_path):
    message = error_of(data.load_rows, str(tmp_path / "none.jsonl"), "prompt", "answer")
    assert message.startswith(f"config.data.train = {str(tmp_path / 'none.jsonl')!r}: no such file")
    assert "no such file" in error_of(data.load_rows, "a/b/c", "prompt", "answer")
    (tmp_path / "x.txt").write_text("x")
    assert ".jsonl" in error_of(data.load_rows, str(tmp_path / "x.txt"), "prompt", "answer")


def test_a_hub_id_that_can_not_be_had(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = error_of(data.load_rows, "nobody/none-such", "prompt", "answer")
    assert message.startswith("config.data.train = 'nobody/none-such': can't be loaded")
    assert "local file" in message


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    assert "is empty" in error_of(data.load_rows, str(tmp_path / "x.jsonl"), "prompt", "answer")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "x", "answer"', "line 3 is not JSON"),
        (b'{"prompt": "\xff", "answer": "1"}', "line 3 is not JSON"),
        (b'["x", "1"]', "line 3 holds no JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "x", "answer": "1"}\n' * 2 + line + b"\n")
    assert said in error_of(data.load_rows, str(tmp_path / "x.jsonl"), "prompt", "answer")


def test_csv_with_an_unquoted_comma(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,answer\na,1\nb, or c,2\n")
    assert "row 2 has more cells" in error_of(data.load_rows, str(tmp_path / "x.csv"), "prompt", "answer")


def test_a_column_that_is_not_there(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"problem": "x", "answers": "1"}] * 2)
    message = error_of(data.load_rows, file, "prompt", "answers")
    assert "no column 'prompt'" in message
    assert "problem, answers" in message
    assert "nearest is 'problem'" in message
    assert "config.data.prompt_column" in message
    message = error_of(data.load_rows, file, "problem", "answer")
    assert "nearest is 'answers'" in message
    assert "config.data.answer_column" in message


def test_blank_cells_are_counted_and_their_rows_named(tmp_path):
    rows = problems(100)
    rows[3]["answer"], rows[16]["answer"] = "", "  \n"
    del rows[59]["answer"]
    file = write(tmp_path / "x.jsonl", rows)
    message = error_of(data.load_rows, file, "prompt", "answer")
    assert f"config.data.train = {file!r}: 3 of 100 rows have a blank 'answer': rows 4, 17, 60;" in message
    for i in range(8):
        rows[i]["prompt"] = None
    message = error_of(data.load_rows, write(tmp_path / "x.jsonl", rows), "prompt", "answer")
    assert "8 of 100 rows have a blank 'prompt': rows 1, 2, 3, 4, 5, ...;" in message


def test_cells_that_are_no_text(tmp_path):
    rows = problems(3)
    rows[1]["prompt"] = [{"role": "user", "content": "x"}]
    message = error_of(data.load_rows, write(tmp_path / "x.jsonl", rows), "prompt", "answer")
    assert "1 of 3 rows has a 'prompt' that is not text: row 2;" in message


def test_benchmarks_are_found_by_name_and_cut_to_the_limit(tmp_path):
    write(tmp_path / "aime24.jsonl", problems(5))
    write(tmp_path / "gsm8k_test.jsonl", problems(4))
    settings = Evaluation(data_dir=str(tmp_path))
    assert len(data.benchmark_rows("aime24", settings)) == 5
    cut = Evaluation(data_dir=str(tmp_path), benchmarks=("aime24", "arithmetic"), limit=2)
    rows = data.evaluation_rows(Config(evaluation=cut))
    assert {name: [row.index for row in some] for name, some in rows.items()} == {
        "aime24": [0, 1],
        "arithmetic": [0, 1],
    }
    message = error_of(data.benchmark_rows, "aime_2024", settings)
    assert message.startswith("config.evaluation.benchmarks = 'aime_2024'")
    assert "nearest is 'aime24'" in message
    missing = Evaluation(data_dir=str(tmp_path / "none"))
    assert "config.evaluation.data_dir" in error_of(data.benchmark_rows, "aime24", missing)
    write(tmp_path / "empty.jsonl", [])
    assert "config.evaluation.benchmarks = 'empty'" in error_of(data.benchmark_rows, "empty", settings)


def test_training_rows_are_the_file_or_the_built_in_task(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"q": "1 + 1?", "a": "2"}])
    settings = Data(train=file, prompt_column="q", answer_column="a")
    assert [row.question for row in data.training_rows(Config(data=settings))] == ["1 + 1?"]
    built_in = Config(data=Data(arithmetic=Arithmetic(train_problems=30, test_problems=10)))
    rows = data.training_rows(built_in)
    assert [row.index for row in rows] == list(range(30))
    assert all(int(row.answer) >= 0 for row in rows)


def test_an_epoch_is_a_permutation_of_its_seed_and_number():
    orders = {(seed, epoch): data.epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[0, 1] == data.epoch_order(50, 0, 1).tolist()
    # The very numbers: a run that is resumed under another numpy must go on in the same order.
    assert data.epoch_order(8, 7, 2).tolist() == [0, 3, 5, 1, 4, 2, 6, 7]


def test_steps_are_slices_of_the_epochs_laid_end_to_end():
    epochs = np.concatenate([data.epoch_order(7, 3, epoch) for epoch in range(4)]).tolist()
    for step in range(9):  # 27 of 28 places, three per step: steps 2, 4 and 6 straddle two epochs
        assert data.step_indices(step, 3, 7, seed=3) == epochs[3 * step : 3 * step + 3]
    assert data.step_indices(0, 28, 7, seed=3) == epochs  # a step may even be longer than an epoch


def test_every_row_is_read_once_before_any_is_read_twice():
    read = [index for step in range(5) for index in data.step_indices(step, 4, 10, seed=0)]
    assert sorted(read) == sorted(list(range(10)) * 2)
    assert sorted(read[:10]) == list(range(10))


def test_redraws_take_rows_that_the_step_has_not():
    """3 of 20 rows a step: five redraws read 15 different ones of the other 17, in an order of the step's own."""
    own = data.step_indices(4, 3, 20, seed=1)
    draws = [data.redraw_indices(4, redraw, 3, 20, seed=1) for redraw in range(1, 6)]
    read = [row for rows in draws for row in rows]
    assert len(set(read)) == 15 and not set(read) & set(own)
    assert data.redraw_indices(4, 3, 3, 20, seed=1) == draws[2]  # of what it is asked alone
    assert data.redraw_indices(5, 1, 3, 20, seed=1) != draws[0] != data.redraw_indices(4, 1, 3, 20, seed=2)


def test_redraws_of_a_small_data_set_begin_it_again():
    own = set(data.step_indices(0, 3, 5, seed=0))
    one, two = (data.redraw_indices(0, redraw, 3, 5, seed=0) for redraw in (1, 2))
    assert set(one) == set(two) == set(range(5)) - own and one != two
    assert set(data.redraw_indices(0, 1, 3, 3, seed=0)) == {0, 1, 2}  # there are no others


def test_long_prompts_are_skipped_and_counted(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"prompt": "a" * n, "answer": "1"} for n in (3, 5, 4, 9)])
    rows = data.load_rows(file, "prompt", "answer")
    kept, skipped = data.fit(rows, lambda text: [ord(x) for x in text], max_length=4)
    assert skipped == 2
    assert [(row.index, tokens.tolist(), tokens.dtype) for row, tokens in kept] == [
        (0, [97] * 3, np.int32),
        (2, [97] * 4, np.int32),
    ]
    message = error_of(data.fit, rows, lambda text: [0] * len(text), 2)
    assert message.startswith("config.data.max_prompt_length = 2: all 4 prompts are longer; the shortest has 3 tokens")
