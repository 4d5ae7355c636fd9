"""The built-in tasks: an evaluation of a run asks none of the problems that it was trained on."""

import pytest
from builders import run_config

from igrpo_jax.data import builtin, problems
from igrpo_jax.errors import InputError

RUN = {"data.arithmetic.train_problems": 300, "data.arithmetic.test_problems": 20, "data.lookups.train_problems": 300}


def check(run, limit=0, **changes):
    """Checks an evaluation of a run with these settings, and with `changes` of them."""
    config = run_config(**run | {"evaluation.benchmarks": ("arithmetic", "lookups")} | changes)
    rows = problems.asked(problems.evaluation_rows(config), limit)
    questions = {name: [row.question for row in benchmark] for name, benchmark in rows.items()}
    builtin.check_held_out(config, run_config(**run), "runs/mine", questions)


def test_more_test_problems_than_a_run_has_are_those_that_it_was_trained_on():
    """320 of 1024 would be 300 that it was trained on; 15 and the first 20 of 1024 are its own test problems."""
    field = "data.arithmetic.test_problems"
    said = rf"^config\.{field} = 1024: .* runs/mine .* 300 of the 1,024 .* own {field} = 20"
    with pytest.raises(InputError, match=said):
        check(RUN, **{field: 1024})
    check(RUN, **{field: 15})
    check(RUN, limit=20, **{field: 1024})
    check(RUN, **{"data.arithmetic.train_problems": 400})


def test_another_stream_is_refused_where_it_holds_problems_of_the_training_set():
    """Sums of two or three small numbers repeat; twelve letters do not."""
    small = RUN | {"data.arithmetic.max_terms": 3, "data.arithmetic.max_operand": 5}
    with pytest.raises(InputError, match=r"^config\.seed = 1: .* own seed = 0"):
        check(small, seed=1)
    changes = {"seed": 1, "data.arithmetic.max_operand": 6}
    with pytest.raises(InputError, match=r"^config\.seed = 1, config\.data\.arithmetic\.max_operand = 6: .* = 5$"):
        check(small, **changes)
    check(small, **changes | {"evaluation.benchmarks": ("lookups",)})
    check(small | {"data.task": "lookups"}, seed=1)


def test_a_run_on_a_file_was_trained_on_no_problem_of_a_task():
    check(RUN | {"data.train": "problems.jsonl", "model.path": "m"}, **{"data.arithmetic.test_problems": 1024})
