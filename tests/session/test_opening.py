"""The order in which a run is opened: inputs are tested, the table is printed, and only then are programs compiled."""

import dataclasses
import io
import sys
from types import SimpleNamespace

import pytest
from whole_runs import settings

from igrpo_jax import config, train
from igrpo_jax.distributed.programs import compilations
from igrpo_jax.distributed.teams import Team
from igrpo_jax.outputs import workdir as workdirs
from igrpo_jax.outputs.console import Console
from igrpo_jax.session import opening, rehearsal
from igrpo_jax.session.progress import Progress
from igrpo_jax.session.run import Run

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
    printed = io.StringIO()
    with Console(printed) as console:
        nothing = dict.fromkeys(field.name for field in dataclasses.fields(Run))
        given = {"config": asked, "workdir": tmp_path, "console": console, "resumed_after": 5}
        given |= {"inputs": SimpleNamespace(total_steps=steps), "progress": Progress(scores)}
        run = opening._recorded(Run(**nothing | given))
    kept = dataclasses.replace(asked, evaluation=MADE)
    assert run.config == workdirs.read_config(tmp_path) == (kept if is_kept else asked)
    told = printed.getvalue()
    assert ("nothing was evaluated with the changed settings (config.evaluation.samples: 2 -> 4)" in told) == is_kept
    assert (f"python -m igrpo_jax.evaluate --model {tmp_path}" in told) == is_kept
