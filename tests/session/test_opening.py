"""The order in which a run is opened: inputs are tested, the table is printed, and only then are programs compiled."""

import contextlib
import dataclasses
import io
import math
import sys
from types import SimpleNamespace

import pytest
from builders import run_config
from whole_runs import settings

from igrpo_jax import config, train
from igrpo_jax.distributed.programs import compilations
from igrpo_jax.distributed.teams import Team
from igrpo_jax.errors import InputError
from igrpo_jax.learning import update_metrics
from igrpo_jax.outputs import workdir as workdirs
from igrpo_jax.outputs.console import Console
from igrpo_jax.session import ending, opening, rehearsal
from igrpo_jax.session.progress import Progress
from igrpo_jax.session.run import Run
from igrpo_jax.session.run_context import RunContext
from igrpo_jax.session.run_inputs import open_inputs

REWARD = """
def brevity(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]
"""


@pytest.mark.parametrize(
    ("budget", "count", "teams", "shares"),
    [(24, 3, 2, [16, 8]), (25, 3, 2, [17, 9]), (7, 4, 1, [7]), (1, 4, 2, [1, 1]), (0, 3, 2, [0, 0]), (8, 1, 2, [8, 1])],
)
def test_each_team_has_the_judges_budget_of_its_prompts(monkeypatch, tmp_path, budget, count, teams, shares):
    """A share of 0 would have no limit."""
    monkeypatch.setattr(opening, "Verifier", lambda rewards, *_: rewards.judge.budget)
    run = settings(**{"rewards.judge.budget": budget, "prompts_per_step": count})
    assert [opening._verifier(run, tmp_path, 1, Team(number, teams)) for number in range(teams)] == shares


class TableEnds(Exception):
    """Ends the run after its table."""


def test_the_table_comes_after_the_users_reward_and_before_anything_is_compiled(monkeypatch, tmp_path):
    (tmp_path / "my_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    events = []
    rehearse = rehearsal.rehearsed_rewards
    monkeypatch.setattr(rehearsal, "rehearsed_rewards", lambda *args: events.append("reward") or rehearse(*args))

    def table(self, title, rows):
        events.append((title, dict(rows)))
        raise TableEnds

    monkeypatch.setattr(Console, "table", table)
    unseen = {"evaluation.every": 0, "checkpoint.best_metric": ""}
    own = settings(**{"rewards.functions": ("my_reward:brevity",), "rollout.slots": 8}, **unseen)
    with compilations() as compiled, pytest.raises(TableEnds):
        train.train(own, tmp_path / "run")
    (first, (title, rows)) = events
    assert first == "reward" and title == "iGRPO run"
    assert set(compiled) <= {"jit(convert_element_type)"}  # a scalar of optax, no program of the run
    assert "programs to compile" in rows and any("brevity" in f"{name} {value}" for name, value in rows.items())
    assert rows["evaluation"].startswith("off: evaluation.benchmarks given, but evaluation.every = 0; ")
    sys.modules.pop("my_reward", None)


def test_what_is_compared_between_processes_and_what_training_leaves_to_sampling(monkeypatch, tmp_path):
    """Problems, those of evaluations, and weights; of a device's memory what training does not keep there."""
    read, left = [], []

    def programs(config, cfg, mesh, eos_ids, longest_prompt, plan, memory):
        left.append(memory)
        raise TableEnds

    enter_mesh, make = opening.enter_mesh, opening.LearnerPrograms
    monkeypatch.setattr(opening, "enter_mesh", lambda *args: read.append(args[-1]) or enter_mesh(*args))
    monkeypatch.setattr(
        opening, "LearnerPrograms", lambda *args, **sizes: made.append(make(*args, **sizes)) or made[-1]
    )
    monkeypatch.setattr(opening, "open_run_programs", programs)
    for known in (1 << 30, None):
        made = []
        monkeypatch.setattr(opening.chips, "known_bytes", lambda device, known=known: known)
        with pytest.raises(TableEnds):
            train.train(settings(**{"compilation_cache": ""}), tmp_path)
        assert left.pop() == (known and known - made[0].resident_bytes)
    assert 0 < made[0].resident_bytes < 1 << 30
    inputs = open_inputs(settings())
    asked = {"training problems": inputs.fingerprint, "evaluation problems": inputs.evaluation_plan.fingerprint}
    assert read == [asked | {"weights of config.model.path": inputs.policy.fingerprint}] * 2


@pytest.mark.parametrize(
    ("rank", "beta", "frozen", "reference"),
    [
        (0, 0.0, {}, None),
        (0, 0.1, {}, ("float32", "given")),
        (2, 0.0, ("bfloat16", "given"), None),
        (2, 0.1, ("bfloat16", "given"), "adapters"),  # fresh ones change nothing, so they are the base
    ],
)
def test_the_weights_that_no_update_changes(monkeypatch, tmp_path, rank, beta, frozen, reference):
    """What LoRA adapts is as the model computes; the reference is as precise as the weights that are trained."""
    changes = {"model.lora.rank": rank, "model.dtype": "bfloat16", "algorithm.beta": beta}
    inputs = SimpleNamespace(config=run_config(**changes), policy=None, mesh=None)
    first = lambda config, policy, workdir, mesh, dtype, console, params: (dtype, params)
    monkeypatch.setattr(opening.weights, "first", first)
    monkeypatch.setattr(opening.weights, "adapters", lambda *_: "adapters")
    monkeypatch.setattr(opening, "Learner", lambda programs, **kept: kept)
    parts = opening._Parts(inputs, None, RunContext(tmp_path, None, None))
    assert opening._learner(parts, "given") == {"frozen": frozen, "reference": reference}


@pytest.mark.parametrize(
    ("is_new", "lacks", "done"),
    [
        (True, True, ["evaluated 4", "saved 4"]),
        (True, False, ["saved 4"]),
        (False, True, ["evaluated 4"]),
        (False, False, []),
    ],
)
def test_what_is_done_before_the_first_step(is_new, lacks, done):
    events = []
    run = SimpleNamespace(
        resumed_after=4,
        lacks_evaluation=lambda step: lacks,
        saving_at_end=lambda step, state: contextlib.nullcontext(),
        evaluate=lambda params, step: events.append(f"evaluated {step}"),
        save=lambda step, state: events.append(f"saved {step}"),
    )
    opening._evaluate_start(run, SimpleNamespace(params=None), is_new)
    assert events == done


def test_what_a_resume_takes_from_its_checkpoint(monkeypatch, tmp_path, caplog):
    """What the run knew, and not what an earlier launch has already told; what has changed since is told."""
    inputs = SimpleNamespace(config=run_config(steps=9), total_steps=9, fingerprint="", reward_sources={"mine": "b"})
    scores = {"2": {"eval/x": 0.5}}
    meta = {"data": "", "total_steps": 6, "rewards": {"mine": "a"}, "metrics_rows": 4}
    meta |= {"bad_steps": 1, "evaluations": scores, "evaluating": {"step": 4}}
    store = SimpleNamespace(restore=lambda state: (4, SimpleNamespace(skipped=3), meta))
    monkeypatch.setattr(opening, "_learner", lambda parts: None)
    workdirs.prepare_workdir(tmp_path, inputs.config)
    printed = io.StringIO()
    with Console(printed) as console, contextlib.ExitStack() as stack:
        context = RunContext(tmp_path, console, stack)
        parts = opening._Parts(inputs, SimpleNamespace(state=None), context)
        begun = opening._resumed(parts, store, 4)
        begun.writer.write(5, dict.fromkeys(update_metrics.NULLABLE, math.nan))
        assert not caplog.records  # of an update without any signal it is nothing new
        inputs.fingerprint = "of others"
        with pytest.raises(InputError, match="its prompts or answers differ from those that the run in"):
            opening._resumed(parts, store, 4)
    progress = begun.progress
    assert (begun.resumed_after, progress.skipped_optimizer_steps, progress.skipped_in_a_row) == (4, 3, 1)
    assert (progress.scores, progress.interrupted) == ({2: {"eval/x": 0.5}}, 4)
    told = " ".join(printed.getvalue().split())
    assert "9 steps instead of 6: the learning rate rises" in told and "the file of mine, which config.rewards" in told
    assert "metrics.jsonl has 0 rows up to step 4, 4 were written" in told


MADE = config.EvaluationConfig(every=1, samples=2, benchmarks=("arithmetic",))


@pytest.mark.parametrize(
    ("scores", "steps", "every", "is_kept"),
    [
        ({5: {"eval/arithmetic/pass@1": 0.5}}, 5, 1, True),
        ({}, 5, 1, False),
        ({}, 5, 0, False),
        ({5: {}}, 6, 1, False),
    ],
    ids=["finished", "its last evaluation is missing", "and is not asked for any more", "more steps"],
)
def test_a_finished_run_keeps_the_settings_of_its_evaluations(tmp_path, scores, steps, every, is_kept):
    """config.json, and the report with it, said that the scores came from settings that were never used."""
    made = config.Config(steps=5, evaluation=MADE)
    asked = dataclasses.replace(
        made,
        steps=steps,
        evaluation=dataclasses.replace(MADE, samples=4, every=every),
        checkpoint=config.CheckpointConfig(export=True, every=7),
    )
    workdirs.prepare_workdir(tmp_path, made)
    (tmp_path / ending.FILE).write_text("{}")
    printed = io.StringIO()
    with Console(printed) as console:
        nothing = dict.fromkeys(field.name for field in dataclasses.fields(Run))
        given = {"config": asked, "workdir": tmp_path, "console": console, "resumed_after": 5}
        given |= {"inputs": SimpleNamespace(total_steps=steps), "progress": Progress(scores)}
        run = opening._recorded(Run(**nothing | given))
    kept = dataclasses.replace(asked, evaluation=MADE)
    assert not (tmp_path / ending.FILE).exists()  # it goes on, and may be killed before its new end
    assert run.config == workdirs.read_config(tmp_path) == (kept if is_kept else asked)
    told = printed.getvalue()
    assert ("nothing was evaluated with the changed settings (config.evaluation.samples: 2 -> 4)" in told) == is_kept
    assert (f"python -m igrpo_jax.evaluate --model {tmp_path}" in told) == is_kept
