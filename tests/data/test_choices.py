"""Benchmarks in the schemas of their data sets, with rows of our own: multiple choice, contests, lists of answers."""

import json
import re
from collections import Counter

import pytest
from model_files import error_of

from igrpo_jax.config import DataConfig, EvaluationConfig
from igrpo_jax.data import choices, problems
from igrpo_jax.data.catalog import BENCHMARKS
from igrpo_jax.rewards.mathematics import grader

GPQA = {
    "Record ID": "rec1",
    "Question": "Which particle has no charge?\n",
    "Correct Answer": "the neutron\n",
    "Incorrect Answer 1": "the proton",
    "Incorrect Answer 2": "the electron",
    "Incorrect Answer 3": "the muon",
    "High-level domain": "Physics",
    "Subdomain": "Particle physics",
}
MMLU_PRO = {
    "question_id": 70,
    "question": "What is 2 + 2?",
    "options": ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
    "answer": "D",
    "answer_index": 3,
    "cot_content": "",
    "category": "math",
    "src": "own",
}
CONTEST = {"problem_idx": 1, "problem": "Find $1+1$.", "answer": "\\frac{4}{2}", "problem_type": ["Algebra"]}
OLYMPIAD = {
    "id": 1606,
    "question": "Solve $x^2 = 4$.",
    "solution": ["So $x = 2$ or $x = -2$. The answer is 7."],
    "final_answer": ["$2,-2$"],
    "context": "Let $x$ be real.",
    "modality": "Text-only",
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "question_type": "Open-ended",
    "language": "English",
}
SCHEMAS = {
    **dict.fromkeys(("hmmt_feb25", "hmmt_nov25", "brumo25"), CONTEST),
    "aime26": {"problem_idx": 1, "answer": 277, "problem": "Find it."},
    "olympiadbench": OLYMPIAD,
    "gpqa_diamond": GPQA,
    "mmlu_pro": MMLU_PRO,
}
# The letter of gpqa_diamond is that of the hashes: another one would make evaluations of two versions differ.
ANSWERS = {"aime26": "277", "olympiadbench": "$2,-2$", "mmlu_pro": "D", "gpqa_diamond": "A"}


def of_hub(monkeypatch, rows):
    """Returns a function that reads a benchmark from a stand-in of the hub, and the list of what it was asked for."""
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: asked.append((*args, split)) or rows)
    return lambda name: problems.benchmark_rows(name, EvaluationConfig()), asked


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_row_in_the_schema_of_the_data_set_from_the_hub_and_from_a_file(name, monkeypatch, tmp_path):
    load, asked = of_hub(monkeypatch, [SCHEMAS[name]])
    (row,) = load(name)
    hub = BENCHMARKS[name].hub
    assert asked == [(hub.id, hub.subset or None, hub.split)]
    assert row.answer == ANSWERS.get(name, "\\frac{4}{2}")
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(SCHEMAS[name]), "utf-8")
    (local,) = problems.benchmark_rows(name, EvaluationConfig(data_dir=str(tmp_path)))
    assert (local.question, local.answer) == (row.question, row.answer)
    # A file of plain problems is taken as it is.
    (tmp_path / f"{name}.jsonl").write_text('{"prompt": "Q: A) 1 B) 2", "answer": "B"}', "utf-8")
    (plain,) = problems.benchmark_rows(name, EvaluationConfig(data_dir=str(tmp_path)))
    assert (plain.question, plain.answer) == ("Q: A) 1 B) 2", "B")


def test_each_benchmark_says_when_it_was_looked_up():
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", benchmark.checked) for benchmark in BENCHMARKS.values())


def test_the_question_of_olympiadbench_has_its_context_and_its_answers_are_a_list(monkeypatch):
    load, _ = of_hub(monkeypatch, [OLYMPIAD, OLYMPIAD | {"context": None, "final_answer": ["5"]}])
    first, second = load("olympiadbench")
    assert first.question == "Let $x$ be real.\n\nSolve $x^2 = 4$." and second.question == "Solve $x^2 = 4$."
    assert grader.grade("\\boxed{-2, 2}", first.answer)[0] == 1 and grader.grade("\\boxed{2}", first.answer)[0] == 0


def test_choices_stand_below_the_question_and_the_letter_is_graded(monkeypatch):
    load, _ = of_hub(monkeypatch, [MMLU_PRO])
    (row,) = load("mmlu_pro")
    assert row.question.startswith("What is 2 + 2?\n\nA) 1\nB) 2\nC) 3\nD) 4\n") and "J) 10" in row.question
    assert row.columns["category"] == "math"
    for right in (
        "\\boxed{D}",
        "<answer>(D)</answer>",
        "The answer is D.",
        "\\boxed{\\text{D}}",
        "<answer>D) 4</answer>",
    ):
        assert grader.grade(right, row.answer)[0] == 1, right
    for wrong in ("\\boxed{4}", "\\boxed{C}", "\\boxed{C or D}", "<answer>d</answer>"):
        assert grader.grade(wrong, row.answer)[0] == 0, wrong


def test_every_letter_is_right_for_itself_alone():
    letters = choices.LETTERS[:10]
    assert [[grader.equivalent(a, b) for b in letters] for a in letters] == [[a == b for b in letters] for a in letters]


def test_the_order_of_the_choices_depends_on_the_question_alone_and_is_uniform(monkeypatch):
    rows = [GPQA | {"Question": f"Question {number}?"} for number in range(400)]
    load, _ = of_hub(monkeypatch, rows)
    asked = load("gpqa_diamond")
    for row in asked:
        assert f"{row.answer}) the neutron\n" in row.question
    again, _ = of_hub(monkeypatch, rows[::-1])
    assert {(row.question, row.answer) for row in again("gpqa_diamond")} == {
        (row.question, row.answer) for row in asked
    }
    # 100 of 400 are expected for each letter, with a standard deviation of 8.7.
    assert all(65 < count < 135 for count in Counter(row.answer for row in asked).values())


def test_a_choice_that_repeats_the_right_one_is_right_too(monkeypatch):
    load, _ = of_hub(monkeypatch, [GPQA | {"Incorrect Answer 3": "the neutron"}])
    (row,) = load("gpqa_diamond")
    letters = [line[0] for line in row.question.splitlines() if line.endswith(") the neutron")]
    assert len(letters) == 2 and all(grader.equivalent(letter, row.answer) for letter in letters)


def test_lists_that_are_filled_up_are_read_without_the_filling(monkeypatch):
    load, _ = of_hub(monkeypatch, [MMLU_PRO | {"options": ["1", "2", "3", "4", "N/A", "N/A"]}])
    assert "E)" not in load("mmlu_pro")[0].question


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpqa_diamond", {"Incorrect Answer 2": None}),
        ("gpqa_diamond", {"Question": " "}),
        ("mmlu_pro", {"options": []}),
        ("mmlu_pro", {"options": "['1', '2']"}),
        ("mmlu_pro", {"answer": "K"}),
        ("mmlu_pro", {"options": [*map(str, range(27))]}),  # more than letters
    ],
)
def test_a_row_that_lacks_something_is_named(name, change, monkeypatch):
    load, _ = of_hub(monkeypatch, [SCHEMAS[name], SCHEMAS[name] | change])
    message = error_of(load, name)
    assert f"config.evaluation.benchmarks = {name!r}: 1 of 2 rows lack" in message and "row 2" in message


def test_a_gated_data_set_says_how_to_get_access(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = error_of(problems.benchmark_rows, "gpqa_diamond", EvaluationConfig())
    assert "is a gated dataset" in message and "https://huggingface.co/datasets/Idavidrein/gpqa" in message
    assert "HF_TOKEN" in message and "config.evaluation.data_dir=FOLDER with gpqa_diamond.jsonl" in message
    assert "gated:" not in error_of(problems.benchmark_rows, "mmlu_pro", EvaluationConfig())


# --------------------------------------------------------------------------------------------- files of a user's own

MMLU = {"question": "Which is prime?", "choices": ["4", "7", "8", "9"]}
ROW = MMLU | {"answer": 1}


def of_own(path, *rows, **more):
    """The rows of a file as training problems, which equal those that a benchmark has, and the columns read."""
    (path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    trained, mapping, _ = problems.load_rows(DataConfig(train=str(path / "own.jsonl"), **more))
    assert trained == problems.benchmark_rows("own", EvaluationConfig(data_dir=str(path), **more))
    return trained, mapping


def refused(path, *rows):
    """What training and evaluation say of a file."""
    (path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    evaluated = error_of(problems.benchmark_rows, "own", EvaluationConfig(data_dir=str(path)))
    assert "config.evaluation.prompt_column=question" in evaluated
    return error_of(problems.load_rows, DataConfig(train=str(path / "own.jsonl")))


@pytest.mark.parametrize("name", ["choices", "Options"])
def test_choices_in_a_file_of_ones_own_are_shown_and_the_letter_is_graded(tmp_path, name):
    base = {"question": "Which is prime?", name: ["4", "7", "8", "9"]}
    zero = {"question": "Which is odd?", name: ["one", "two"], "answer": 0}
    for answer in ("B", "7", 1):
        rows, mapping = of_own(tmp_path, base | {"answer": answer}, zero)
        assert rows[0].question == f"Which is prime?\n\nA) 4\nB) 7\nC) 8\nD) 9\n\n{choices.REQUEST}"
        assert [row.answer for row in rows] == ["B", "A"] and rows[0].columns[name] == base[name]
        assert str(mapping) == "question from 'question with choices', answer from 'letter'"


def test_choices_that_have_letters_keep_them(tmp_path):
    row = {"question": "Find it.", "options": ["A)21", "B)21.5", "C)22"], "answer": "B", "rationale": "So B."}
    ((row,), _) = of_own(tmp_path, row)
    assert row.question.startswith("Find it.\n\nA)21\nB)21.5\nC)22\n\n") and row.answer == "B"
    ((row,), _) = of_own(tmp_path, {"question": "Who?", "options": ["A. Smith", "Jones"], "answer": "B"})
    assert row.question.startswith("Who?\n\nA) A. Smith\nB) Jones\n\n")  # it is the beginning of a name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 5}, "in 1 of 2 rows: row 2"),  # no choice has this number
        ({"answer": -1}, "in 1 of 2 rows: row 2"),
        ({"answer": True}, "in 1 of 2 rows: row 2"),
        ({"answer": "E"}, "in 1 of 2 rows: row 2"),
        ({"answer": "1"}, "in 1 of 2 rows: row 2"),
        ({"choices": [0, 1, 2, 3], "answer": 1}, ""),  # its text and its number agree
        ({"choices": [1, 2, 3, 4], "answer": 1}, "in 1 of 2 rows: row 2"),
        ({"choices": ["7", "7"], "answer": "7"}, "in 1 of 2 rows: row 2"),
        ({"choices": {"text": ["4", "7"], "label": ["A", "B"]}, "answer": "B"}, "in 1 of 2 rows: row 2"),
        ({"choices": "['4', '7']", "answer": "B"}, "in 1 of 2 rows: row 2"),  # as CSV has it
        ({"choices": None, "answer": "7"}, "in 1 of 2 rows: row 2"),
        ({"choices": [*map(str, range(27))], "answer": "B"}, "in 1 of 2 rows: row 2"),  # more than letters
    ],
)
def test_a_right_choice_that_is_not_certain_is_refused(tmp_path, change, words):
    first = MMLU | {"answer": 0}
    if not words:
        assert [row.answer for row in of_own(tmp_path, first, ROW | change)[0]] == ["A", "B"]
        return
    message = refused(tmp_path, first, ROW | change)
    assert "do not show the choices in 'choices'" in message and words in message
    assert "write its letter into 'answer'" in message and "config.data.prompt_column=question" in message


def test_numbers_of_which_none_is_0_are_refused(tmp_path):
    assert "none is 0: they may count from 0 or from 1" in refused(tmp_path, ROW, ROW | {"answer": 3})


def test_a_question_that_holds_its_choices_and_a_named_column_are_taken_as_they_are(tmp_path):
    holds = {"question": "Which is larger, 3 or 5?", "choices": ["3", "5"], "answer": "5"}
    ((row,), _) = of_own(tmp_path, holds)
    assert (row.question, row.answer) == ("Which is larger, 3 or 5?", "5")
    ((row,), _) = of_own(tmp_path, ROW, prompt_column="question")
    assert (row.question, row.answer) == ("Which is prime?", "1")
    ((row,), _) = of_own(tmp_path, {"question": "1+1?", "answer": "2", "choices": None})
    assert (row.question, row.answer) == ("1+1?", "2")
