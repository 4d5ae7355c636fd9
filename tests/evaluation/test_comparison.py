"""Two folders of evaluations compared: in what they differ, by how much, and how sure that is.

What these tests catch: two settings that differ and are not named, problems that are not the same, an interval of no
width where nothing was solved, and a change that a bootstrap calls certain and an exact test does not.
"""

import json

import pytest

from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import comparison
from igrpo_jax.evaluation.results import Rows


def folder(path, accuracies, name="b", settings=None, answer="2"):
    rows = Rows(path, name)
    for index, samples in accuracies.items():
        base = {"prompt_id": f"p{index}", "index": index, "prompt": "q", "answer": answer, "text": "t"}
        for i, accuracy in enumerate(samples):
            rows.add(base | {"drafts": [], "sample_id": i, "accuracy": accuracy})
            rows.add(base | {"drafts": [0], "sample_id": i, "accuracy": 0.0})  # a refinement does not count
    rows.close()
    if settings is not None:
        (path / "evaluation.json").write_text(json.dumps(settings))
    return path


def test_two_folders_compared(tmp_path):
    first = folder(tmp_path / "a", {0: [0, 0], 1: [1, 0], 2: [1, 1]})
    second = folder(tmp_path / "b", {0: [1, 0, 1, 0], 1: [1, 1, 1, 1], 3: [0]})
    text = comparison.compare(first, second)
    # Problems 0 and 1 are in both: 0 -> 0.5 and 0.5 -> 1. Up to 1 - sqrt(0.025) = 0.842 of all problems may be others.
    assert "| b | 2 (2 in one only) | 25.00 | 75.00 | +50.00 | -76.28 to +92.09 | 2, 0 | 0.5 |" in text
    assert "| b: answers to a problem | 2 | 1 to 4: incomplete |" in text
    with pytest.raises(InputError, match="no problem of b is in both"):
        comparison.compare(first, folder(tmp_path / "c", {7: [1]}))
    with pytest.raises(InputError, match="no benchmark is in both"):
        comparison.compare(first, folder(tmp_path / "d", {0: [1]}, "other"))
    for wrong in ("none", "d/other.jsonl"):
        with pytest.raises(InputError, match="is not a folder"):
            comparison.compare(first, tmp_path / wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no rows"):
        comparison.compare(tmp_path / "empty", first)


def test_of_a_run_the_last_evaluation_is_compared(tmp_path):
    first = folder(tmp_path / "a", {0: [0], 1: [0]})
    evaluations = tmp_path / "run" / "evaluations"
    folder(evaluations / "step_000009", {0: [0], 1: [0]})
    last = folder(evaluations / "step_000010", {0: [1], 1: [0]})
    for complete in evaluations.iterdir():
        (complete / "summary.json").write_text("{}")
    folder(evaluations / "step_000011", {0: [1]})  # was preempted
    assert comparison.compare(first, tmp_path / "run") == comparison.compare(first, last)


def test_an_evaluation_that_was_killed_is_called_incomplete(tmp_path):
    """Every problem has answers, and the first as many as in the complete one."""
    whole = folder(tmp_path / "a", {0: [0, 1, 1], 1: [1, 0, 1]}, settings={"model": "m"})
    killed = folder(tmp_path / "b", {0: [0, 1, 1], 1: [1]}, settings={"model": "n"})
    for first, second, cells in ((whole, killed, "3 | 1 to 3: incomplete"), (killed, whole, "1 to 3: incomplete | 3")):
        assert f"| b: answers to a problem | {cells} |" in comparison.compare(first, second)
    assert "Settings and problems are the same, and so is the model." in comparison.compare(whole, whole)


def test_benchmarks_with_dots_in_their_names_are_not_one(tmp_path):
    """The file of a process belongs to the benchmark of its name."""
    for name, right in (("a", 0), ("b", 1)):
        folder(tmp_path / name, {0: [0]}, "mine.v1")
        folder(tmp_path / name, {1: [right]}, "mine.v1.process-1")
        folder(tmp_path / name, {0: [1], 1: [right]}, "mine.v2")
    text = comparison.compare(tmp_path / "a", tmp_path / "b")
    assert "| mine.v1 | 2 | 0.00 | 50.00 |" in text and "| mine.v2 | 2 | 50.00 | 100.00 |" in text


def test_rows_of_equal_id_and_question_are_problems_of_their_own(tmp_path):
    def twice(path, accuracies):
        rows = Rows(path, "b")
        for index, accuracy in accuracies.items():
            base = {"prompt_id": "x", "index": index, "prompt": "q", "answer": "2", "text": "t"}
            rows.add(base | {"drafts": [], "sample_id": 0, "accuracy": accuracy})
        rows.close()
        return path

    both = twice(tmp_path / "a", {0: 1, 4: 1}), twice(tmp_path / "b", {4: 0, 0: 1})
    assert "| b | 2 | 100.00 | 50.00 | -50.00 |" in comparison.compare(*both)


def test_problems_of_one_question_are_paired_by_their_answers(tmp_path):
    def answered(path, answers):
        rows = Rows(path, "b")
        for index, (answer, accuracy) in enumerate(answers):
            base = {"prompt_id": "x", "index": index, "prompt": "q", "answer": answer, "text": "t"}
            rows.add(base | {"drafts": [], "sample_id": 0, "accuracy": accuracy})
        rows.close()
        return path

    first = answered(tmp_path / "a", [("2", 1), ("3", 0), ("3", 1)])
    assert "| b | 3 | 66.67 | 66.67 | +0.00 |" in comparison.compare(
        first, answered(tmp_path / "b", [("3", 0), ("3", 1), ("2", 1)])
    )
    text = comparison.compare(first, answered(tmp_path / "c", [("3", 0)]))  # one of them only: 3, not 2
    assert "| b | 1 (2 in one only) | 0.00 | 0.00 | +0.00 |" in text and "reference answer" not in text


def test_nothing_solved_twice_is_no_certainty(tmp_path):
    """0 of 6 against 0 of 6: 1 - 0.025^(1/6) = 0.459 of all problems may have changed, either way."""
    none = {index: [0] for index in range(6)}
    text = comparison.compare(folder(tmp_path / "a", none), folder(tmp_path / "b", none))
    assert "| b | 6 | 0.00 | 0.00 | +0.00 | -45.93 to +45.93 | 0, 0 | 1 |" in text


def test_differences_come_first(tmp_path):
    base = {"model": "m", "step": 3, "weights_written": "1", "dtype": "float32", "temperature": 0.6, "seed": 0}
    base |= {"max_completion_length": 48, "instruction": "", "template_kwargs": {}, "system_prompt": "a | b"}
    first = folder(tmp_path / "a", {0: [1], 1: [0]}, settings=base)
    changed = {"dtype": "bfloat16", "temperature": 1.0, "max_completion_length": 64, "instruction": "Think.\nWell"}
    changed |= {"template_kwargs": {"thinking": True}, "system_prompt": ""}
    other = base | changed | {"model": "n", "new": 1}
    second = folder(tmp_path / "b", {0: [1], 2: [0]}, settings=other, answer="3")
    text = comparison.compare(first, second)
    assert "a: m, step 3" in text and "b: n, step 3" in text
    table = text.index("They differ in more than the model")
    assert table < text.index("Single-shot pass@1")
    for line in (
        '| dtype | "float32" | "bfloat16" |',
        "| temperature | 0.6 | 1.0 |",
        "| max_completion_length | 48 | 64 |",
        '| instruction | "" | "Think.\\nWell" |',
        '| template_kwargs | {} | {"thinking": true} |',
        '| system_prompt | "a \\| b" | "" |',
        "| new | not recorded | 1 |",
        "| b: problems that the other lacks | 1, the first is p1 | 1, the first is p2 |",
        "| b: first reference answer that differs | p0: 2 | p0: 3 |",
    ):
        assert line in text.splitlines(), line
    assert "| seed |" not in text and "| model |" not in text


def test_equal_settings_are_said_and_missing_ones_too(tmp_path):
    settings = {"model": "m", "step": 1, "dtype": "float32"}
    first = folder(tmp_path / "a", {0: [1], 1: [0]}, settings=settings)
    second = folder(tmp_path / "b", {0: [1], 1: [1]}, settings=settings | {"step": 2})
    assert "Settings and problems are the same.\n" in comparison.compare(first, second)
    assert "and so is the model" in comparison.compare(first, first)
    bare = comparison.compare(first, folder(tmp_path / "c", {0: [1], 1: [1]}))
    assert "c, which records no settings" in bare and "are the same" not in bare
