"""What the table of a run says before its first step."""

import json
from types import SimpleNamespace

from igrpo_jax import config
from igrpo_jax.session import overview


def test_the_padding_of_the_next_updates_is_that_of_the_last_ones(tmp_path):
    """Of the last 20 that have an update; a step without one, and an evaluation, say nothing of padding."""
    assert overview._padding(tmp_path) == "not known before there are completions"
    rows = [{"step": 0, "eval/arithmetic/pass@1": 0.5}]
    rows += [{"step": step, "perf/padding_frac": 0.9 if step <= 4 else 0.1} for step in range(1, 25)]
    rows.insert(9, {"step": 8, "eval/arithmetic/pass@1": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    assert overview._padding(tmp_path) == "about 90%, as in the last 3 steps"
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert overview._padding(tmp_path) == "about 10%, as in the last 20 steps"


def test_evaluations_that_are_off_although_there_are_benchmarks_are_named():
    plan = SimpleNamespace(notes=["a note"], prompts={})
    for given, said in (
        ({"benchmarks": ("mine",), "data_dir": "d"}, "off: evaluation.benchmarks and evaluation.data_dir given, but "),
        ({"data_dir": "d"}, "off: evaluation.data_dir given, but evaluation.every = 0; set it to the steps between"),
        ({"benchmarks": ("mine",), "every": 2}, "a note"),
    ):
        (line,) = overview._evaluation(config.Config(evaluation=config.EvaluationConfig(**given)), plan)
        assert line.startswith(said)
    assert overview._evaluation(config.Config(), SimpleNamespace(notes=[], prompts={})) == []


def test_a_step_without_drafts_has_completions_and_no_refinements():
    settings = config.Config(prompts_per_step=2, algorithm=config.AlgorithmConfig(num_drafts=0, num_generations=8))
    assert overview._stages(settings) == [("completions per step", "16 (G = 8)")]
