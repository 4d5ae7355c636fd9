"""Results by subject: of a benchmark whose data set names one for each problem."""

import numpy as np
import pytest

from igrpo_jax.config import Config
from igrpo_jax.evaluation import measures, planning, summaries, summary_tables
from igrpo_jax.evaluation.planning import Plan
from igrpo_jax.records import Prompt


def test_results_by_subject():
    """Three of four samples of the physics problems are right, and none of the one of law; the whole is the mean."""
    correct = np.array([[True, True], [False, False], [True, False]])
    found = summaries.by_subject(["physics", "law", "physics"], correct)
    assert list(found) == ["law", "physics"] and found["physics"]["pass@1"] == 0.75 and found["law"]["pass@1"] == 0
    assert found["physics"]["problems"] == 2 and found["law"]["pass@1_high"] == pytest.approx(0.975)
    summary = {"single_shot": {"pass@1": 0.5}, "rounds": [], "subjects": {"computer science": found["physics"]}}
    assert summaries.flat({"mmlu_pro": summary})["eval/mmlu_pro/subject/computer_science/pass@1"] == 0.75
    shape = correct.shape
    answers = measures.Answers(
        correct, np.ones(shape, int), *[np.ones(shape, bool)] * 2, ~np.ones(shape, bool), correct
    )
    shot = measures.summary(answers)
    text = summary_tables.markdown({"b": summary | {"problems": 3, "samples": 2, "single_shot": shot}})
    assert "| b | computer science | 2 | 75.00 |" in text


def test_a_benchmark_has_subjects_only_where_all_its_problems_have_one():
    of = lambda i, columns: Prompt(str(i), i, "q", "A", np.zeros(1, np.int32), columns)
    some = [of(0, {"category": "a"}), of(1, {"category": " b\n"})]
    assert planning.subjects_of("mmlu_pro", some) == ["a", "b"]
    for none in ({}, {"category": " "}):
        assert planning.subjects_of("mmlu_pro", [*some, of(2, none)]) == []
    assert planning.subjects_of("aime24", some) == []
    names = planning.metric_names(Config(), Plan({"mmlu_pro": some}, 8, 1, 1, 1))
    assert names[-2:] == ["eval/mmlu_pro/subject/a/pass@1", "eval/mmlu_pro/subject/b/pass@1"]
