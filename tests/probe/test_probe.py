"""The command: a whole probe of a tiny model that goes on where it was killed, its page, and bad input."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from builders import completion, run_config

from igrpo_jax.cli import exits
from igrpo_jax.data import order
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import results
from igrpo_jax.outputs import workdir
from igrpo_jax.probe import __main__ as command
from igrpo_jax.probe import answers, estimates, gradients, measure, page
from igrpo_jax.probe.answers import Answered, Refined
from igrpo_jax.probe.conclusion import Conclusion, Setting
from igrpo_jax.probe.estimates import Estimate
from igrpo_jax.probe.gradients import Measured
from igrpo_jax.records import Prompt


@pytest.mark.slow(seconds=10)
def test_a_probe_goes_on_where_it_was_killed(whole, tmp_path, capsys, monkeypatch, bucket):
    out = tmp_path / "out"

    def call(*more, code=None):
        argv = ["probe", "--model", str(whole[0]), "--problems=3", "--workdir", str(out)]
        argv += ["--config.rollout.slots=8", "--gradients=2", *more]  # slots: one for each device
        monkeypatch.setattr(sys, "argv", argv)
        if code is None:
            exits.run(command.main)
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            exits.run(command.main)
        assert stop.value.code == code
        return capsys.readouterr().err

    assert "config.rollout.slots = 4: must be a multiple of 8" in call("--config.rollout.slots=4", code=2)
    assert not out.exists()
    with workdir.locked(out):
        assert "a run is under way there (process " in call(code=2)
        assert [path.name for path in out.iterdir()] == [".lock"]
    printed = call()
    assert re.search(r"gradients +of 2 problems; of all 3 how much they rely on drafts\n", printed)
    assert "gradients and reliance ..." in printed
    assert "conclusion: " in printed and "plain answers" in printed and "success of a plain answer, p" in printed
    names = ("answers.jsonl", "probe.json")
    written = {name: (out / name).read_text() for name in names}
    rows, summary = written["answers.jsonl"].splitlines(keepends=True), json.loads(written["probe.json"])
    plain = [json.loads(row) for row in rows if not json.loads(row)["drafts"]]
    assert len(plain) == 3 * 4 and len(rows) >= len(plain) + 3 * 2  # K = N + G = 4, and G = 2 of each draft
    assert summary["problems"] == 3 and summary["conclusion"]["more_signal"] is None and summary["step"] == 5
    assert summary["figures"]["p"]["high"] > 0 and (summary["samples"], summary["gradients"]) == (4, 2)
    again = f"python -m igrpo_jax.probe --model {whole[0]} --problems=3 --config.rollout.slots=8 --gradients=2"
    assert summary["command"] == again
    html = (out / "probe.html").read_text()
    assert "<strong>Cannot tell" in html and again in html
    assert "K = 4 plain answers to each of 3 problems; the gradients of the first 2 were compared" in html
    assert len(list((out / "gradients").iterdir())) == 3

    (out / "answers.jsonl").write_text("".join(rows[: len(rows) // 2]) + rows[-1][:20])
    removed = f"gradients/{min(path.name for path in (out / 'gradients').iterdir())}"
    (out / removed).unlink()
    printed = call()
    assert "answers ..." in printed
    assert {name: (out / name).read_text() for name in names} == written
    printed = call()
    assert "answers ..." not in printed  # all is there
    assert "holds an evaluation with other settings (seed: 0 -> 1" in call("--config.seed=1", code=2)
    # In a bucket it goes on too.
    bucket.put(out)
    for name in (removed, "probe.json"):
        bucket.remove(name)
    assert f"written to {bucket / 'probe.html'}" in call("--workdir", bucket.address)
    assert bucket.read("probe.json") == written["probe.json"] and removed in bucket.names()
    # What failed too often in an earlier launch is no wrong answer in a later one, but drawn and graded again.
    failed = [json.dumps(json.loads(row) | {"status": "error"}) + "\n" for row in rows]
    (out / "answers.jsonl").write_text("".join(failed))
    assert "answers ..." in call()
    assert {name: (out / name).read_text() for name in names} == written


def test_model_text_is_escaped(tmp_path):
    attack = "<script>alert(1)</script>"
    prompt = Prompt(attack, 0, attack, attack, np.array([1], np.int32))
    draft = completion("draft", 0, [5], 0.0, text=attack)
    fixed = completion("refine", 0, [6], 1.0, text=attack)
    problem = Answered(prompt, (draft,), np.array([False]), (Refined(draft, prompt.tokens, (fixed,)),))
    conclusion = Conclusion(f"cannot tell {attack}", None, "unclear", False, [attack])
    figures = {"p": Estimate(0.5, 0.25, 1.0), "ratio": Estimate(float("nan"), 0.0, float("inf"))}
    head, setting = {"model": attack, "gradients": 0}, Setting(1, 8, 4, 4, "group")
    summary = page.write(tmp_path, head, setting, figures, conclusion, [problem])
    text = (tmp_path / "probe.html").read_text()
    assert "<script" not in text and text.count("&lt;script&gt;") >= 9
    assert "0.50 (0.25 to 1.00)" in text and "not known (0 to any)" in text
    assert "fixed: a right answer after a wrong draft" in text and (tmp_path / "style.css").exists()
    assert json.loads((tmp_path / "probe.json").read_text()) == summary
    assert summary["figures"]["ratio"] == {"value": None, "low": 0.0, "high": None}


def test_figures_of_the_transfer_say_why_they_are_not_known():
    figures = dict.fromkeys(page.FIGURES["Transfer"], estimates.UNKNOWN) | {"reliance": Estimate(0.5, 0.25, 1.0)}
    lines = dict(page.table(figures)["Transfer"])
    named = {name: lines[meaning] for name, meaning in page.FIGURES["Transfer"].items()}
    mixed = "not known: fewer than 5 problems have right and wrong answers on one of the prompts, or a mean gradient"
    assert named["cosine"] == named["cosine_credited"] == f"{mixed} is lost in noise"
    why = "fewer than 5 problems have a right refinement of a wrong draft that is kept"
    assert named["reliance_wrong"] == f"not known: {why}"
    assert named["reliance"] == "0.50 (0.25 to 1.00)" and named["along"] == "not known"


def test_every_figure_has_a_meaning():
    """Those of counts, of texts and of gradients, and the three that are made of them."""
    draft, refined = completion("draft", 0, [5], 0.0), completion("refine", 0, [6], 1.0)
    problem = Answered(None, (draft,) * 2, np.array([False, False]), (Refined(draft, None, (refined,)),))
    made = {*estimates.estimate(answers.counts([problem] * 2, 1)), *answers.texts([problem], 4)}
    made |= {*gradients.reliance([problem], [Measured({}, {"right": np.zeros(0), "wrong": np.zeros(0)})])}
    made |= {"cosine", "cosine_credited", "along", "successes"}
    named = [name for names in page.FIGURES.values() for name in names]
    assert len(named) == len(set(named)) and made - set(named) == {"trust"}  # the conclusion alone reads it
    assert set(named) <= made


def test_the_problems_of_a_probe_are_those_that_a_run_reads_first():
    inputs = SimpleNamespace(prompts=[*"abcdefghij"], config=SimpleNamespace(seed=3))
    asked = lambda problems: measure.ProbeInputs(inputs, None, None, problems, 8, 2).prompts
    first = ["abcdefghij"[i] for i in order.step_indices(0, 4, 10, seed=3)]
    assert asked(4) == first != [*"abcd"] and sorted(asked(99)) == [*"abcdefghij"]


def test_figures_of_a_run_and_of_gradients():
    """GRPO would draw 7 steps of 3 prompts with 1 + 2 answers, of which a quarter is right."""
    draft, refined = completion("draft", 0, [5], 0.0), completion("refine", 0, [6], 1.0)
    plain = (completion("draft", 1, [5], 1.0), draft, draft, draft)
    problem = Answered(None, plain, np.array([True, False, False, False]), (Refined(draft, None, (refined,) * 2),))
    sizes = {"prompts_per_step": 3, "algorithm.num_drafts": 1, "algorithm.num_generations": 2}
    inputs = SimpleNamespace(config=run_config(**sizes), total_steps=7)
    sketches = {"plain": np.array([1.0, 0]), "refine": np.array([-1.0, 0]), "credited": np.array([1.0, 0])}
    measured = [Measured(sketches, {"right": np.zeros(0), "wrong": np.zeros(2)})] * gradients.FEW
    figures = measure.all_figures(inputs, [problem] * gradients.FEW, measured, "group")
    assert figures["successes"].value == figures["p"].value * 7 * 3 * 3 == 0.25 * 63
    assert (figures["cosine"].value, figures["cosine_credited"].value, figures["along"].value) == (-1, 1, 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model: missing; give the folder of a run"),
        (["--model=m"], "--data: missing; give the problems to train on"),
        (["--model=m", "--workdir=w", "--data=d", "--answers=7"], "--answers 7: must be at least N \\+ G = 8"),
        (["--model=m", "--workdir=w", "--data=d", "--problems=0"], "--problems 0: must be at least 1"),
        (["--model=m", "--workdir=w", "--data=d", "--problems=many"], "--problems many: must be a whole number"),
        (
            ["--model=m", "--workdir=w", "--data=d", "--coordinator=a:1", "--processes=2", "--process=0"],
            "--processes: a probe is one process",
        ),
        (
            ["--model=m", "--workdir=w", "--data=d", "--config.algorithm.num_drafts=0"],
            "config.algorithm.num_drafts = 0: must be at least 1",
        ),
        (
            [
                *("--model=m", "--workdir=w", "--data=d", "--config.algorithm.num_generations=1"),
                *("--config.algorithm.group=prompt", "--config.algorithm.train_drafts=True"),
            ],
            "config.algorithm.num_generations = 1: must be at least 2 in a probe",
        ),
        (
            [
                *("--model=m", "--workdir=w", "--data=d", "--config.algorithm.second_stage=verify"),
                *("--config.algorithm.train_drafts=True", "--config.algorithm.draft_selection=random"),
                "--config.refine.instruction={draft} is right:",
            ],
            'config.algorithm.second_stage = "verify": a probe asks about refinements',
        ),
        (
            ["--model=m", "--workdir=w", "--data=d", "--config.rewards.accuracy=0"],
            "config.rewards.accuracy = 0: must be above 0.*; give --config.rewards.accuracy=1$",
        ),
    ],
)
def test_bad_input(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        command.main(["probe", *flags])
    assert list(tmp_path.iterdir()) == []


def holds(folder, **changes):
    """Makes `folder` that of a probe with these settings; raises InputError where it is one with others."""
    config = run_config(**{name.replace("__", "."): value for name, value in changes.items()})
    results.claim(folder, command.deciding(SimpleNamespace(config=config, fingerprint="the same problems")))


JUDGED = {"rewards__judge__weight": 0.5, "rewards__judge__model": "one"}
OWN = {"rewards__custom": "mine:reward"}
OVERLONG = {"rewards__overlong": 1.0, "rewards__overlong_cache": 4}
SEVERAL = {"rewards__functions": ("mine:one", "mine:other")}


@pytest.mark.parametrize(
    ("settings", "changed", "named"),
    [
        ({}, {"rewards__format": 0.5}, "rewards.format: 1.0 -> 0.5"),
        (JUDGED, {"rewards__judge__weight": 0.0}, "rewards.judge.weight: 0.5 -> 0.0"),
        (JUDGED, {"rewards__judge__model": "other"}, "rewards.judge.model: 'one' -> 'other'"),
        (JUDGED, {"rewards__judge__show_reference": False}, "rewards.judge.show_reference: True -> False"),
        ({}, OWN, "rewards.custom: '' -> 'mine:reward'"),
        (OWN, {"rewards__custom_weight": 2.0}, "rewards.custom_weight: 1.0 -> 2.0"),
        (SEVERAL, {"rewards__function_weights": (1.0, 2.0)}, "rewards.function_weights: [] -> [1.0, 2.0]"),
        (OVERLONG, {"rewards__overlong_cache": 8}, "rewards.overlong_cache: 4 -> 8"),
    ],
)
def test_answers_with_other_rewards_are_another_probe(settings, changed, named, tmp_path):
    """Red if a resume mixes old rewards with new ones; how the judge is asked is another matter."""
    holds(tmp_path, **settings)
    holds(tmp_path, **settings, rewards__workers=1, rewards__judge__timeout=1.0, rewards__judge__concurrency=1)
    with pytest.raises(InputError, match=rf"holds an evaluation with other settings \({re.escape(named)}\)"):
        holds(tmp_path, **settings | changed)


def test_the_built_in_model_has_no_other_problems():
    with pytest.raises(InputError, match="--data: the built-in model only knows its own task"):
        import dataclasses

        config = run_config()
        command.planned(dataclasses.replace(config, data=dataclasses.replace(config.data, train="gsm8k")))
