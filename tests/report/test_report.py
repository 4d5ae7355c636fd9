"""What a report says of a run, without a browser: reading torn files, flags of samples, the conclusion, plots, pages.

What these tests catch: a crashed run that yields no report or one that hides what it lacks, a prompt's samples dealt to
the wrong prompt, a conclusion of "learning" without evidence, numbers drawn at another scale or step than they have,
text of a run that a page takes for markup, and an --out that deletes somebody's files.
"""

import ast
import dataclasses
import fnmatch
import importlib
import io
import json
import re
import sys
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest

from igrpo_jax import config as config_lib
from igrpo_jax.cli import exits
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import comparison
from igrpo_jax.report import __main__ as report
from igrpo_jax.report import charts, figures, pages, panels, runs, samples, settings, summary, table

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
report_scale = importlib.import_module("report_scale")


def write(folder, rows=(), config=None, steps=None):
    """A run's folder from rows of metrics, settings, and rows of samples by step."""
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for step, some in (steps or {}).items():
        (folder / "samples" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def read(folder):
    (run,) = runs.read([folder])
    return run


def sample(stage, number, text="x", right=None, prompt="p0", parent=None, **fields):
    rewards = {} if right is None else {"accuracy": float(right), "format": 1.0}
    row = {"prompt_id": prompt, "stage": stage, "sample_id": number, "parent_draft_id": parent, "prompt": "1 + 1"}
    row |= {"text": text, "token_count": 3, "finished": True, "rewards": rewards, "reward": 1.0, "status": "ok"}
    return row | {"extracted": "2", "answer": "2", "advantage": None if stage == "draft" else 0.5} | fields


# Reading


def test_curves_are_sums_and_differences_over_the_steps_that_have_all_parts(tmp_path):
    rows = [{"step": 0, "eval/a/pass@1": 0.5}, {"step": 1, "loss": 1, "a": 1.0, "b": 2.0, "c": 4}]
    rows.append({"step": 2, "loss": 1, "a": 3})
    run = read(write(tmp_path / "run", rows, {}))
    assert run.steps == [1, 2] and run.benchmarks == ["a"]
    assert run.curve("a").values.tolist() == [1, 3] and run.curve("a").steps.tolist() == [1, 2]
    both = run.curve("a", "b", less=("c",))
    assert (both.steps.tolist(), both.values.tolist()) == ([1], [-1])
    assert not run.curve("none") and not run.curve("a", less=("none",))


def test_a_crashed_run_says_what_is_missing(tmp_path):
    folder = write(tmp_path / "run", [{"step": 1, "loss": 0.5, "reward": None}, {"step": 5, "loss": 0.5}])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "loss": 1, "x\xff": 2}\n')  # no UTF-8, but a row
        file.write(b'\xff\xfe\n[1]\n{"loss": 1}\n{"step": 6, "lo')
    run = read(folder)
    assert run.steps == [1, 5] and run.nulls == {"reward": [1]} and run.metrics["x\ufffd"] == {5: 2}
    said = "\n".join(run.notes)
    assert "config.json is missing" in said
    assert "4 lines left out" in said  # bytes, a list, a row without a step, and the torn one
    assert "samples are missing of 2 steps: 1, 5" in said and "no row of 3 steps: 2 to 4" in said
    assert "reward: not finite at 1 step, first at step 1" in summary.worries(run)
    (folder / "config.json").write_text('{"ste')
    (folder / "metrics.jsonl").unlink()
    said = "\n".join(read(folder).notes)
    assert "config.json cannot be read" in said and "metrics.jsonl is missing" in said and "no training step" in said


def test_folders_that_are_no_runs_are_refused(tmp_path):
    run = write(tmp_path / "a" / "run", [], {})
    other = write(tmp_path / "b" / "run", [], {})
    with pytest.raises(InputError, match="no such folder"):
        runs.read([tmp_path / "none"])
    with pytest.raises(InputError, match=r"holds no config\.json"):
        runs.read([tmp_path])
    with pytest.raises(InputError, match="given twice"):
        runs.read([run, other, run / ".." / "run"])
    assert [one.name for one in runs.read([run, other])] == ["a/run", "b/run"]


# Samples


def test_samples_are_dealt_to_prompts_by_their_order():
    """The same problem may come twice in a step, and a step may lack drafts, completions or its end."""
    twice = [sample("draft", 0), sample("draft", 1), sample("refine", 0), sample("refine", 1)] * 2
    assert [len(group) for group in samples.groups(twice)] == [4, 4]
    plain = [sample("refine", i) for i in (0, 1)] * 2
    assert [len(group) for group in samples.groups(plain)] == [2, 2]
    other = [sample("draft", 0), sample("draft", 1, prompt="p1"), sample("refine", 0, prompt="p1")]
    assert [len(group) for group in samples.groups(other)] == [1, 2]


def data(path):
    """The argument of a data file's call."""
    text = path.read_text(encoding="ascii")
    assert text.endswith(")\n")
    return json.loads(text[text.index(",") + 1 if text.startswith("samplesLoaded") else text.index("(") + 1 : -2])


def written(tmp_path, rows, **config):
    run = read(write(tmp_path / "run", [{"step": 3, "loss": 0.0}], config, {3: rows}))
    return samples.write(run, tmp_path / "0"), tmp_path / "0" / "000003_0.js"


def test_flags_compare_a_refinement_with_the_draft_it_was_shown(tmp_path):
    words = "one two three four five six seven eight nine ten"
    rows = [
        sample("draft", 0, words, right=True, finished=False),
        sample("draft", 1, words, right=False, extracted=None, status="unparseable"),
        sample("refine", 0, words, right=True, parent=1),  # a copy by its words, though its score differs
        sample("refine", 1, "something else", right=False, parent=1, status="timeout"),
        sample("draft", 0, words, right=True, prompt="p1"),
        sample("refine", 0, "something else", right=False, prompt="p1", parent=0),
        sample("refine", 1, words.replace("five", "5"), right=True, prompt="p1", parent=0),
        sample("refine", 0, words, right=True, prompt="p2", parent=7),  # its draft is not there
    ]
    found, path = written(tmp_path, rows)
    first, second, third = data(path)
    names = lambda one: [name for place, name in enumerate(samples.FLAGS) if one["flags"] >> place & 1]
    assert [names(one) for one in first["drafts"]] == [["truncated"], ["unparseable"]]
    assert [names(one) for one in first["completions"]] == [["fixed", "copied"], []]
    assert [names(one) for one in second["completions"]] == [["broken"], ["copied"]]  # 44 of 48 characters
    assert names(third["completions"][0]) == [] and third["kept"] is None
    assert [one["right"] for one in first["completions"]] == [True, None]  # its accuracy is there, and no verdict
    assert (first["kept"], first["completions"][1]["status"], first["answer"]) == (1, "timeout", "2")
    assert found.index == [{"step": 3, "parts": [3], "flags": [1 + 4 + 8 + 16, 2 + 4, 0]}]
    assert dict(found.counts[3].flagged) == {"fixed": 1, "copied": 2, "truncated": 1, "unparseable": 1, "broken": 1}


def test_verifications_are_no_versions_of_the_solution_that_they_see(tmp_path):
    """They have no flags of refinements. Groups without a gradient are those of the solutions, by their rewards."""
    texts = {"text": "<answer>1</answer>", "reward": 1.0}
    rows = [
        sample("draft", 0, right=False, **texts | {"reward": 0.0}),
        sample("draft", 1, right=True),
        sample("verify", 0, right=True, parent=0, advantage=0.0, **texts),
        sample("verify", 1, right=True, parent=0, advantage=0.0, **texts),
        sample("draft", 0, right=False, prompt="p1", reward=0.0),
        sample("draft", 1, right=False, prompt="p1", reward=0.0),
    ]
    found, path = written(tmp_path, rows, algorithm={"second_stage": "verify"})
    first, second = data(path)
    assert (first["verified"], second["verified"], first["kept"]) == (True, False, 0)
    assert [one["flags"] for one in first["completions"]] == [0, 0]
    assert dict(found.counts[3].equal) == {"wrong": 1}


def test_samples_of_before_the_status_was_written(tmp_path):
    row = sample("refine", 0, extracted=None)
    del row["status"], row["reward"]
    _, path = written(tmp_path, [row])
    (one,) = data(path)[0]["completions"]
    assert one["flags"] == 1 << samples.FLAGS.index("unparseable")
    assert (one["status"], one["reward"], one["right"]) == (None, None, None)


def test_groups_without_a_gradient_are_split_by_what_they_are(tmp_path):
    kinds = {"p0": (1, 1), "p1": (0, 0), "p2": (0, 1), "p3": (1, 1)}
    advantages = {"p0": 0.0, "p1": 0.0, "p2": 0.0, "p3": 0.3}
    rows = [
        sample("refine", i, right=right, prompt=name, advantage=advantages[name])
        for name, both in kinds.items()
        for i, right in enumerate(both)
    ]
    rows += [sample("refine", 0, right=True, prompt="p4", advantage=None)]  # torn, or without a verdict
    rows += [sample("refine", 0, right=False, prompt="p5", advantage=0.0)]
    rows += [sample("refine", 1, prompt="p5", advantage=0.0, status="timeout", rewards={"accuracy": None}, reward=None)]
    found, _ = written(tmp_path, rows)
    assert dict(found.counts[3].equal) == {"right": 1, "wrong": 2, "mixed": 1} and found.counts[3].prompts == 6


@pytest.mark.parametrize(("trained", "equal"), [(True, {"right": 1, "mixed": 1}), (False, {"mixed": 1})])
def test_prompts_that_are_not_refined_have_the_group_of_their_drafts(tmp_path, trained, equal):
    """With draft_when = unsolved: of three solved prompts one has right drafts only."""
    drafts = {"p0": (1, 1), "p1": (0, 1), "p2": (0, 0)}
    rows = [
        sample("draft", i, right=right, prompt=name, reward=float(right))
        for name, both in drafts.items()
        for i, right in enumerate(both)
    ]
    rows += [sample("refine", i, right=i, prompt="p2", parent=0, advantage=0.0) for i in (0, 1)]
    found, _ = written(tmp_path, rows, algorithm={"train_drafts": trained})
    assert dict(found.counts[3].equal) == equal


def test_large_steps_come_in_parts_and_torn_ones_are_said(tmp_path, monkeypatch):
    rows = [sample("refine", 0, "y" * 400, prompt=f"p{i}") for i in range(5)]
    monkeypatch.setattr(samples, "PART_BYTES", 1500)  # three prompts of some 700
    found, _ = written(tmp_path, [*rows, {"prompt_id": "p9"}])
    assert found.index[0]["parts"] == [3, 2]
    parts = [data(tmp_path / "0" / f"000003_{place}.js") for place in (0, 1)]
    assert [one["id"] for part in parts for one in part] == ["p0", "p1", "p2", "p3", "p4"]
    assert found.notes == ["samples of step 3: 1 line left out that are not whole rows; the step may lack samples"]
    found, _ = written(tmp_path / "empty", [])
    assert found.notes == ["samples of step 3: the file is empty"]


HOSTILE = "</script><script>alert(1)</script>\u2028\ud800 \x1b[31m\u202e ]]> `${x}` \\ \" ' \x00 __proto__"


def test_data_files_are_ascii_and_give_the_text_back(tmp_path):
    rows = [sample("refine", 0, HOSTILE, prompt=HOSTILE, rewards={"__proto__": 1.0, HOSTILE: None}, answer=HOSTILE)]
    _, path = written(tmp_path, rows)
    (group,) = data(path)
    one = group["completions"][0]
    assert (one["text"], group["id"], group["answer"]) == (HOSTILE, HOSTILE, HOSTILE)
    assert sorted(map(tuple, one["rewards"])) == [(HOSTILE, None), ("__proto__", 1.0)]


# Summary


def evaluated(*shares, width=0.02, name="b"):
    keys = lambda share: {"pass@1": share, "pass@1_low": share - width, "pass@1_high": share + width}
    return [
        {"step": 10 * at} | {f"eval/{name}/{key}": value for key, value in keys(share).items()}
        for at, share in enumerate(shares)
    ]


def concluded(folder):
    return summary.summary(read(folder), "completions").conclusion


@pytest.mark.parametrize(
    "rows, answer",
    [
        ([], "Not known"),
        (evaluated(0.5), "Not known"),
        (evaluated(0.5, 0.9), "Learning"),
        (evaluated(0.5, 0.9, 0.51), "Not shown"),  # the last counts, not the best
        (evaluated(0.5, 0.3), "Getting worse"),
        (evaluated(0.5, 0.47), "Not shown"),  # below the interval of the first, which overlaps its own
        (evaluated(0.5, 0.3) + evaluated(0.5, 0.9, name="c"), "Mixed"),
        (evaluated(0.5, 0.51) + evaluated(0.5, 0.9, name="c"), "Learning"),
        ([{"step": 0, "eval/b/pass@1": 0.1}, {"step": 1, "eval/b/pass@1": 0.9}], "Not shown"),  # no intervals
        (
            [{"step": i, "loss": 0, "rewards/accuracy/mean": i / 9} for i in range(10)],
            "Not known",
        ),
    ],
)
def test_the_conclusion_rests_on_single_shot_evaluations(tmp_path, rows, answer):
    conclusion = concluded(write(tmp_path / "run", rows, {"evaluation": {"every": 0}}))
    assert conclusion.answer == answer
    if not rows:
        assert "evaluation.every is 0" in conclusion.reasons[0]


def write_evaluation(folder, step, right, name="b", first=0, settings=None):
    """The rows of a single shot at 40 problems, of which those in `right` are right."""
    out = folder / "evaluations" / f"step_{step:06d}"
    out.mkdir(parents=True, exist_ok=True)
    row = {"drafts": [], "sample_id": 0, "prompt": "q"}
    lines = [row | {"prompt_id": str(i), "index": i, "accuracy": float(i in right)} for i in range(first, first + 40)]
    (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings is not None:
        (out / "evaluation.json").write_text(json.dumps({"model": "m", "step": step} | settings))


def test_problems_are_compared_in_pairs_where_their_rows_are_there(tmp_path):
    folder = write(tmp_path / "run", evaluated(0.4, 0.6, width=0.15), {})
    # 8 become right and none wrong: the intervals of the two overlap, in pairs it is beyond doubt.
    write_evaluation(folder, 0, range(16))
    write_evaluation(folder, 10, range(24))
    conclusion = concluded(folder)
    assert (
        conclusion.answer == "Learning"
        and "+20.0 points" in conclusion.reasons[0]
        and "40 problems in pairs, " in conclusion.reasons[0]
    )
    one = comparison.Paired(1, 0, 0.0, 1.0, 1.0, 1.0, 1.0, 1, 0, 1.0)
    assert ", 1 problem in pairs, " in summary.paired_text(one)
    write_evaluation(folder, 10, range(6, 24))  # 8 become right and 6 wrong
    conclusion = concluded(folder)
    assert conclusion.answer == "Not shown" and "+5.0 points" in conclusion.reasons[0]
    write_evaluation(folder, 10, range(20))  # 4 become right and none wrong: p = 2 / 2^4
    conclusion = concluded(folder)
    assert conclusion.answer == "Not shown" and "p = 0.12 by an exact sign test" in conclusion.reasons[0]
    write_evaluation(folder, 10, range(12))  # or wrong
    conclusion = concluded(folder)
    assert conclusion.answer == "Not shown" and "-10.0 points" in conclusion.reasons[0]
    assert "p = 0.12 by an exact sign test" in conclusion.reasons[0]
    (folder / "evaluations" / "step_000010" / "b.jsonl").write_text('{"index": 0}\n{"ind')
    conclusion = concluded(folder)
    assert conclusion.answer == "Not shown" and "intervals overlap" in conclusion.reasons[0]


def test_evaluations_of_other_settings_or_problems_are_not_compared(tmp_path):
    """The limit of the answers was raised in a resume, the problems of c were replaced, and a third of d's."""
    shares = [{"b": (0.0, 1.0)}, {"c": (0.0, 1.0)}, {"d": (0.9, 0.1)}]
    rows = [row for part in shares for name, pair in part.items() for row in evaluated(*pair, name=name)]
    folder = write(tmp_path / "run", rows, {})
    for step, right in ((0, range(10)), (10, range(30))):
        short = {"max_completion_length": 48 + step, "max_draft_length": step}
        write_evaluation(folder, step, right, "b", settings=short)
        write_evaluation(folder, step, right, "c", first=40 * (step > 0))
        write_evaluation(folder, step, right, "d", first=step)
    found = summary.summary(read(folder), "completions")
    assert found.conclusion.answer == "Not shown" and {change.tone for change in found.changes} == {""}
    for reason in found.conclusion.reasons:
        assert reason.endswith("these two evaluations are not comparable: max_completion_length was 48 and then 58")
    for step in (0, 10):
        write_evaluation(folder, step, range(10 + 2 * step), "b", settings={"max_draft_length": step})
    found = summary.summary(read(folder), "completions")
    b, c, d = found.conclusion.reasons
    assert found.conclusion.answer == "Learning" and "from 25.0% (step 0) to 75.0% (step 10): +50.0 points" in b
    assert c.endswith("are not comparable: no problem is in both")
    assert "from 0.0% (step 0) to 66.7%" in d and "10 in one evaluation only" not in d and "20 in one" in d
    assert [change.tone for change in found.changes] == ["good", "", "good"]


def test_runs_are_compared_by_their_last_single_shots_and_by_what_they_took(tmp_path):
    """Of the first two the rows are there, of other settings in the third; the fourth lacks them, and has no b."""
    took = {"perf/step_time": 2.0, "perf/completion_tokens": 1000}
    for name, right, more in (
        ("grpo", range(16), {}),
        ("igrpo", range(8, 30), {"perf/draft_tokens": 500, "refine/copy_ratio": 0.5}),
        ("other", range(40), {}),
        ("lost", (), {}),
    ):
        rows = [row | took | more for row in evaluated(0.1, 0.4)]
        folder = write(tmp_path / name, rows + evaluated(0.5, 0.5, name="c") * (name == "lost"), {})
        if right:
            write_evaluation(folder, 10, right, settings={"samples": 1} if name == "other" else {"samples": 2})
    folders = [tmp_path / name for name in ("grpo", "igrpo", "other", "lost")]
    first, *others = pages.build(folders, tmp_path / "out")
    (igrpo,), (other,), (lost,) = (shown.versus for shown in others)
    assert first.versus == []
    assert igrpo.startswith("Single-shot pass@1 on b, grpo at step 10 and igrpo at step 10: 40.0% and 55.0%, ")
    assert (
        "igrpo - grpo = +15.0 points, 95 % interval " in igrpo
        and "p = 0.29 by an exact sign test" in igrpo
        and igrpo.endswith("14 better and 8 worse")
    )
    assert (
        other.endswith("in more than the model: samples is 2 in the first and 1 in the second")
        and "not compared" in lost
    )
    page = (tmp_path / "out" / "index.html").read_text()
    assert igrpo in page and "refinements see a draft, other completions do not" in page
    cells = re.search(r"<th>tokens sampled</th>(.*)</tr>", page)[1]
    assert re.findall(r"<b>(.*?)</b>", cells) == ["2,000", "3,000", "2,000", "2,000"]
    assert "<th>time of all steps</th>" in page and "4 s" in page


def test_changes_compare_means_of_both_ends(tmp_path):
    numbers = range(1, 21)
    rows = [{"step": i, "loss": 0, "reward": i, "entropy": i**-2, "rewards/accuracy/mean": 0.25} for i in numbers]
    found = summary.summary(read(write(tmp_path / "run", rows, {"steps": 30})), "completions")
    changes = {change.name: change for change in found.changes}
    reward = changes["reward, completions"]
    assert (reward.first, reward.last, reward.difference, reward.tone) == ("1.50", "19.50", "+18.00", "good")
    assert changes["entropy, nats/token"].tone == ""
    assert changes["solve rate, completions"].difference == "+0.0" and changes["solve rate, completions"].tone == ""
    assert "2 steps" in found.over and "step 20 of 30" in found.facts
    assert any(alert.startswith("entropy collapse") for alert in found.alerts)


def test_alerts_of_custom_rewards_are_the_consoles(tmp_path):
    """Of one that was null in every row of the file, and of one that is constant."""
    known = {"rewards/same/mean": 0.5, "rewards/same/std": 0.0}
    silent = {"rewards/short/mean": None, "rewards/short/std": None}
    rows = [{"step": step, "loss": 0.0, **known, **silent} for step in range(1, 21)]
    found = summary.summary(read(write(tmp_path / "run", rows, {"steps": 30})), "completions")
    assert {alert.partition(":")[0] for alert in found.alerts} == {"no value", "constant reward"}


def test_a_reward_of_steps_without_refinements_raises_no_alert(tmp_path):
    """The last steps refined no prompt, so they lack the metrics of refinements."""
    known = {"rewards/own/mean": 0.5, "rewards/own/std": 0.1}
    rows = [{"step": step, "loss": 0.0} | (known if step < 15 else {}) for step in range(1, 21)]
    assert summary.summary(read(write(tmp_path / "run", rows, {"steps": 30})), "completions").alerts == []


# Plots


def test_running_means():
    values = np.array([1.0, 2.0, 6.0, 4.0])
    assert figures.smooth(values, 1).tolist() == values.tolist()
    assert figures.smooth(values, 3).tolist() == [1.5, 3, 4, 5]
    assert figures.smooth(values, 9).tolist() == [1.5, 3, 4, 5]  # no more points than there are
    assert figures.smooth(values[:1], 5).tolist() == [1]


def made_up(folder, **sizes):
    report_scale.write_run(folder, **{"steps": 6, "prompts": 3, "words": 20, "evaluate": 3} | sizes)
    return folder


@pytest.fixture(scope="module")
def made_runs(tmp_path_factory):
    """A run with drafts and one without."""
    folder = tmp_path_factory.mktemp("made")
    return made_up(folder / "two_stage"), made_up(folder / "base", drafts=0, steps=4)


def drawn(panel, some):
    figure = figures.draw(panel, some)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return axes, lines, texts


def by_file(some):
    return {panel.file: panel for section in panels.panels(some).values() for panel in section}


def test_panels_of_one_run(made_runs):
    run = read(made_runs[0])
    found = by_file([run])
    assert list(found)[:4] == ["solve_rate", "evaluation_made_up", "reward_format", "reward"]
    others = "moves copying zero_variance loss learning_rate entropy lengths truncated clip_fraction gradient_norm"
    others = f"reward_std {others} verifier time slots".split()
    assert [name for name in list(found)[4:] if not name.startswith("other_")] == others
    axes, lines, texts = drawn(found["solve_rate"], [run])
    assert texts == ["refinements", "best draft", "drafts"]
    accuracy = run.curve("rewards/accuracy/mean")
    assert lines["refinements"].get_ydata().tolist() == (100 * accuracy.values).tolist()
    assert lines["refinements"].get_xdata().tolist() == accuracy.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert lines["refinements"].get_color() == figures.COLOURS["light"]["trained"] and axes.get_ylim()[0] == 0
    axes, lines, _ = drawn(found["evaluation_made_up"], [run])
    assert lines["single shot"].get_xdata().tolist() == [0, 3, 6]
    low = 100 * np.array([run.metrics["eval/made_up/pass@1_low"][step] for step in (0, 3, 6)])
    assert low.min() == pytest.approx(axes.collections[0].get_paths()[0].vertices[:, 1].min())
    assert found["moves"].stacked and not found["zero_variance"].stacked  # no samples were counted here
    assert drawn(found["moves"], [run])[0].get_ylim()[1] <= 102


def test_panels_of_several_runs(made_runs):
    both = [read(folder) for folder in made_runs]
    found = by_file(both)
    _, _, texts = drawn(found["solve_rate"], both)
    assert texts == ["trained", "best draft", "drafts", "two_stage: steps 1 to 6", "base: steps 1 to 4"]  # from below
    axes, _, _ = drawn(found["time"], both)  # one line a run, no parts on each other
    assert len([line for line in axes.lines if len(line.get_xdata())]) == 2
    base = by_file(both[1:])
    assert "moves" not in base and "copying" not in base
    assert [line.label for line in base["solve_rate"].lines] == ["completions"]


def test_what_people_look_for_has_a_plot(tmp_path):
    """Each of these names is on a plot of its own section, a custom reward and a metric of a user's own included."""
    wanted = {
        "loss": "loss",
        "kl": "kl",
        "learning_rate": "learning_rate",
        "reward_std": "reward_std",
        "rewards/format/mean": "reward_format",
        "rewards/my reward/mean": "reward_my_reward-c894128a",
        "rewards/my_reward/mean": "reward_my_reward",
        "sampling/sampling_logp_difference/mean": "logp_difference",
        "sampling/draft_logp_difference/mean": "logp_difference",
        "sampling/sampling_logp_difference/max": "logp_difference_max",
        "entropy": "entropy",
        "draft/entropy": "entropy",
        "verifier/error_frac": "verifier",
        "verifier/timeout_frac": "verifier",
        "perf/tokens_per_second": "tokens_per_second",
        "perf/padding_frac": "padding",
        "perf/peak_host_memory": "memory",
        "perf/peak_device_memory": "memory",
        "a user's own": "other_a_user_s_own-f91a9812",
    }
    run = read(write(tmp_path / "run", [{"step": 1} | dict.fromkeys(wanted, 0.5) | {"perf/wall_time": 1e9}]))
    sections = panels.panels([run])
    places = {
        name: panel.file
        for table in sections.values()
        for panel in table
        for line in panel.lines
        for name in line.names
    }
    assert places == wanted
    assert [panel.title for panel in sections[table.OTHER]] == ["a user's own"]
    assert not sections[table.OTHER][0].drawn


@pytest.mark.parametrize(("beta", "drawn"), [(0.0, False), (0.01, True), (None, True)])
def test_a_kl_that_is_not_measured_is_not_drawn(tmp_path, beta, drawn):
    """Rows of a run with algorithm.beta = 0 have a KL of 0; of a run without a config.json nobody knows."""
    rows = [{"step": 1, "loss": 0.0, "kl": 0.0, "draft/kl": 0.0}]
    config = None if beta is None else {"algorithm": {"beta": beta}}
    assert ("kl" in by_file([read(write(tmp_path / "run", rows, config))])) == drawn


def test_the_parts_of_a_step_add_up_to_its_time(tmp_path):
    times = {"step_time": 10.0, "rollout_time": 6.0, "verify_wait_time": 1.5, "update_time": 3.0}
    rows = [{"step": 1, "loss": 0} | {f"perf/{name}": value for name, value in times.items()}]
    (panel,) = (panel for panel in table.PANELS[table.TIME] if panel.file == "time")
    run = read(write(tmp_path / "run", rows))
    assert [line.of(run).values.tolist() for line in panel.lines] == [[4.5], [1.5], [3.0], [1.0]]


def test_panels_of_what_few_steps_measure_say_so():
    """docs/metrics.md says so of these metrics; the entropy of drafts is the sampler's, of every step."""
    every = [panel for some in table.PANELS.values() for panel in some]
    sparse = {panel.file for panel in every for line in panel.lines if "draft_logp_difference" in str(line.metrics)}
    assert sparse == {panel.file for panel in every if "steps whose samples are printed" in panel.caption} - {
        "reliance"
    }


def test_an_sft_run_is_shown_as_what_it_is(tmp_path):
    settings = {"algorithm": {"num_drafts": 4, "loss_type": "grpo"}, "steps": 3, "prompts_per_step": 2}
    rows = [{"step": i, "sft/loss": 3.5 - i, "entropy": 4.0**-i, "perf/step_time": 0.5} for i in range(1, 4)]
    run = read(write(tmp_path / "run", rows, settings))
    assert run.is_sft and run.steps == [1, 2, 3] and run.notes == []
    shown = summary.summary(run, "refinements")
    assert {"step 3 of 3", "supervised fine-tuning", "2 examples a step"} <= set(shown.facts) and "grpo" not in str(
        shown.facts
    )
    assert "SFT has no evaluations" in shown.conclusion.reasons[0]
    loss = shown.changes[0]
    assert (loss.name, loss.first, loss.last) == ("loss, nats/token", "2.500", "0.500")
    section, (first, *_) = next(iter(panels.panels([run]).items()))
    assert section == "Supervised fine-tuning" and first.lines[0].of(run).values.tolist() == [2.5, 1.5, 0.5]


def test_the_folder_of_a_model_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"holds no config\.json of a run"):
        runs.read([tmp_path])


def test_the_warm_start_has_its_own_steps(tmp_path):
    rows = [{"step": 0, "warm_start/step": 20.0 * i, "warm_start/loss": 5.0 - i} for i in (1, 2, 3)]
    run = read(write(tmp_path / "run", [*rows, {"step": 1, "loss": 0.0}]))
    curve = run.curve("warm_start/loss")
    assert curve.steps.tolist() == [20, 40, 60] and curve.values.tolist() == [4, 3, 2] and run.steps == [1]
    assert "warm_start" in by_file([run]) and "other_warm_start_step" not in str(by_file([run]))


def test_a_short_run_beside_a_long_one_keeps_its_own_means_and_range(tmp_path):
    for name, steps in (("long", 240), ("short", 20)):
        rows = [{"step": i, "loss": 0, "reward": float(i**2)} for i in range(1, steps + 1)]
        write(tmp_path / name, rows, {"steps": steps})
    both = runs.read([tmp_path / "long", tmp_path / "short"])
    axes, _, texts = drawn(by_file(both)["reward"], both)
    assert axes.get_xlabel() == "step (means of 9 values)"
    assert texts == ["long: steps 1 to 240", "short: steps 1 to 20"]
    short = axes.lines[-1]
    assert short.get_ydata().tolist() == [i**2 for i in range(1, 21)]  # no mean over nine
    shown = pages.build([run.folder for run in both], tmp_path / "out")
    text = Page(tmp_path / "out" / "index.html").text
    assert "long: last values and what they changed by are means of the first and of the last 24 steps" in text
    assert "short: last values and what they changed by are means of the first and of the last 2 steps" in text
    for run, fact in zip(shown, ("step 240 of 240", "step 20 of 20"), strict=True):
        assert fact in run.summary.facts


def test_the_time_of_the_last_row_is_its_own(tmp_path):
    rows = [{"step": i, "loss": 0, "perf/wall_time": 1e9 + 3600 * i} for i in (1, 2)]
    folder = write(tmp_path / "run", rows, {})
    (facts,) = {tuple(summary.summary(read(folder), "completions").facts)}
    assert f"last row {datetime.fromtimestamp(1e9 + 7200):%Y-%m-%d %H:%M}" in facts  # not that of the file
    older = summary.summary(read(write(tmp_path / "older", [{"step": 1, "loss": 0}], {})), "completions")
    assert "last row" not in "".join(older.facts)


def test_settings_are_shown_with_their_defaults_and_compared(tmp_path):
    tree = config_lib.default()
    first = config_lib.to_dict(config_lib.freeze(tree))
    tree.algorithm.num_drafts, tree.data.instruction = 7, "<b>Think</b>"
    second = config_lib.to_dict(config_lib.freeze(tree)) | {"gone": {"by": 1}}
    both = [read(write(tmp_path / name, [], config)) for name, config in (("a", first), ("b", second))]
    assert not any(setting.changed for setting in settings.of(both[0])) and len(settings.of(both[0])) > 100
    changed = {setting.name: (setting.value, setting.default) for setting in settings.of(both[1]) if setting.changed}
    assert changed == {
        "algorithm.num_drafts": ("7", str(first["algorithm"]["num_drafts"])),
        "data.instruction": ('"<b>Think</b>"', json.dumps(first["data"]["instruction"])),
        "gone.by": ("1", settings.MISSING),
    }
    assert all(setting.changed for setting in settings.of(both[1])[:3])
    differing = settings.differing(both)
    assert set(differing) == set(changed) and differing["gone.by"] == [settings.MISSING, "1"]
    pages.build([run.folder for run in both], tmp_path / "out")
    page = Page(tmp_path / "out" / "index.html")
    assert "3 settings differ" in page.text and '"<b>Think</b>"' in page.text and "b" not in page.tags
    pages.build([both[0].folder, write(tmp_path / "c", [], first | {"gone": {"by": 1}})], tmp_path / "one")
    assert "1 setting differs" in Page(tmp_path / "one" / "index.html").text


def test_thinned_lines_keep_their_spikes():
    values = np.zeros(100_000)
    values[[777, 50_001, 99_999]] = (5, -3, 2)
    places = charts.thinned(values, 1000)
    assert len(places) == 1000 and {777, 50_001, 99_999} <= set(places.tolist()) and np.all(np.diff(places) > 0)
    assert charts.thinned(values[:7], 7).tolist() == list(range(7))


def test_data_of_the_plots_is_that_of_the_curves(made_runs, tmp_path):
    both = [read(folder) for folder in made_runs]
    sections = panels.panels(both)
    charts.write(tmp_path / "data" / "plots.js", sections, both)
    text = (tmp_path / "data" / "plots.js").read_text(encoding="ascii")
    told = json.loads(text.removeprefix("plotsLoaded(").removesuffix(")\n"))
    flat = [panel for table in sections.values() for panel in table]
    assert [panel["title"] for panel in told["panels"]] == [panel.title for panel in flat]
    solved = told["panels"][0]["lines"]
    for place, run in enumerate(both):
        assert solved[0]["runs"][place]["x"] == run.steps
        assert solved[0]["runs"][place]["y"] == pytest.approx(100 * run.curve("rewards/accuracy/mean").values, rel=1e-5)
    assert solved[2]["label"] == "drafts" and solved[2]["runs"][1] == {"x": [], "y": []}  # the base has none
    single = next(panel for panel in told["panels"] if panel["title"] == "Single shot: made_up")["lines"][0]["runs"][0]
    assert single["x"] == [0, 3, 6] and all(
        a < b < c for a, b, c in zip(single["low"], single["y"], single["high"], strict=True)
    )


def test_names_are_no_mathematics_to_matplotlib(tmp_path):
    names = ("$\\frac{a$", "_hidden", "x" * 200)
    some = [
        write(tmp_path / name, [{"step": i, "loss": 0, f"eval/{name}/pass@1": 0.5} for i in (0, 1)]) for name in names
    ]
    for panel in (panel for panel in by_file(runs.read(some)).values() if panel.drawn):
        figure = figures.draw(panel, runs.read(some))
        figure.savefig(io.BytesIO())
        texts = [text.get_text().strip() for legend in figure.legends for text in legend.get_texts()]
        assert texts == ["$\\frac{a$", "_hidden", "x" * figures.LABEL]


def test_what_leaves_the_plot_is_said(tmp_path):
    rows = [{"step": i, "loss": 0, "grad_norm": 90.0 if i == 7 else 1.0} for i in range(1, 41)]
    run = read(write(tmp_path / "run", rows, {"optimizer": {"max_grad_norm": 1.5}}))
    axes, lines, texts = drawn(by_file([run])["gradient_norm"], [run])
    assert axes.get_ylim() == (0, 1.6) and "peak 90" in axes.get_title(loc="right")
    assert texts == ["gradient", "limit 1.5"] and lines["limit 1.5"].get_ydata() == [1.5, 1.5]


def test_long_runs_are_smoothed_and_say_so(tmp_path):
    rows = [{"step": i, "loss": 0, "entropy": i % 2} for i in range(1, 301)]
    run = read(write(tmp_path / "run", rows))
    axes, lines, _ = drawn(by_file([run])["entropy"], [run])
    assert axes.get_xlabel() == "step (means of 11 values)"
    assert np.ptp(lines["completions"].get_ydata()[20:-20]) < 0.1 < np.ptp(axes.lines[0].get_ydata())


def test_a_line_is_smoothed_by_how_dense_it_is(tmp_path):
    """Drafts at every second of 300 steps, and an evaluation at every 30th, of which a mean would span the run."""
    rows = [{"step": i, "loss": 0, "entropy": i} | ({"draft/entropy": i} if i % 2 else {}) for i in range(1, 301)]
    rows += [{"step": i, "eval/b/pass@1": i / 300, "eval/b/maj@4": i / 300} for i in range(0, 301, 5)]
    run = read(write(tmp_path / "run", rows))
    axes, lines, _ = drawn(by_file([run])["entropy"], [run])
    assert axes.get_xlabel() == "step (means of 11 and 5 values)"
    some = panels.panels([run])
    charts.write(tmp_path / "data" / "plots.js", some, [run])
    told = json.loads((tmp_path / "data" / "plots.js").read_text().removeprefix("plotsLoaded(").removesuffix(")\n"))
    points = {panel["title"]: [line["runs"][0] for line in panel["lines"]] for panel in told["panels"]}
    assert [line.get("over") for line in points["Entropy"]] == [11, 5]
    assert points["Entropy"][1]["mean"] == pytest.approx(lines["drafts"].get_ydata().tolist(), rel=1e-5)
    assert "over" not in points["eval/b/maj@4"][0]


def test_means_of_a_long_line_are_of_all_its_values(tmp_path, monkeypatch):
    """The thinned line shows the spikes alone."""
    monkeypatch.setattr(charts, "POINTS", 30)
    rows = [{"step": i, "loss": float(i % 2) if i % 9 else 5.0} for i in range(1, 301)]
    run = read(write(tmp_path / "run", rows))
    charts.write(tmp_path / "data" / "plots.js", panels.panels([run]), [run])
    told = json.loads((tmp_path / "data" / "plots.js").read_text().removeprefix("plotsLoaded(").removesuffix(")\n"))
    points = next(panel["lines"][0]["runs"][0] for panel in told["panels"] if panel["title"] == "Loss")
    means = dict(zip(range(1, 301), figures.smooth(run.curve("loss").values, 11), strict=True))
    assert len(points["x"]) == 30
    assert points["mean"] == pytest.approx([means[step] for step in points["x"]], rel=1e-5)


def test_ends_of_a_sparse_metric_are_those_of_the_run(tmp_path):
    """Drafts at every second step, and a metric that only the middle of the run has."""
    rows = [{"step": i, "loss": 0, "reward": i} | ({"draft/accuracy": i / 100} if i % 2 else {}) for i in range(1, 41)]
    rows[20]["entropy"] = 1.0
    found = summary.summary(read(write(tmp_path / "run", rows)), "completions")
    changes = {change.name: change for change in found.changes}
    assert "4 steps" in found.over and "entropy, nats/token" not in changes
    assert (changes["solve rate, drafts"].first, changes["solve rate, drafts"].last) == ("2.0%", "38.0%")


def test_colours_of_the_page_are_those_of_the_plots():
    style = (ROOT / "igrpo_jax" / "report" / "templates" / "style.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in style.split("@media", 2)[:2])
    for theme, declared in (("light", light), ("dark", dark)):
        colours = figures.COLOURS[theme]
        for role in ("paper", "ink", "muted", "draft", "best", "trained", "single"):
            assert declared[role] == colours[role], (theme, role)
        for role in ("good", "calm", "bad", "idle"):
            assert declared[f"plot-{role}"] == colours[role], (theme, role)
        for role in colours.keys() - {"paper", "ink", "grid"}:
            assert f".of-{role} {{" in style, role
        for place, role in enumerate(figures.RUNS):
            assert declared[f"run-{place}"] == colours[role], (theme, place)


# Pages


class Page(HTMLParser):
    """What a page refers to, its tags, and its text."""

    def __init__(self, path):
        super().__init__()
        self.links, self.tags, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "srcset", "href")]
        assert not [name for name, _ in attributes if name.startswith("on") or name == "style"]

    def handle_data(self, text):
        self.text += text


@pytest.mark.slow
def test_a_report_is_whole_and_names_nothing_outside(made_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("a report must leave the accelerator to the run"))
    monkeypatch.setattr(jax, "process_index", jax.devices)
    out = tmp_path / "report"
    report.main(["report", "--workdir", str(made_runs[0]), f"--out={out}"])
    assert "two_stage: " in capsys.readouterr().out
    for name in ("index.html", "samples.html"):
        for link in Page(out / name).links:
            assert link == "data:," or (out / link.partition("#")[0]).is_file(), link
    index = Page(out / "index.html")
    assert "step 6 of 6" in index.text and "Single-shot pass@1 on made_up" in index.text
    assert index.tags.count("img") == len(list((out / "plots").glob("*.dark.png"))) == 18
    steps = data(out / "data" / "index.js")["runs"][0]["steps"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6] and all(sum(step["parts"]) == 3 for step in steps)

    # Written again, of a shorter run: nothing of the earlier one stays.
    monkeypatch.setattr(figures, "COLOURS", {"light": figures.COLOURS["light"]})
    short = write(tmp_path / "short", [{"step": 1, "loss": 0, "reward": 1}], {"steps": 9}, {1: [sample("refine", 0)]})
    (short / "samples" / "step_000002.jsonl").write_text('{"prompt_id": "p0", "sta')
    pages.build([short], out)
    assert {path.name for path in (out / "data" / "0").iterdir()} == {"000001_0.js"}
    assert {path.name for path in (out / "plots").iterdir()} == {"loss.png", "reward.png", "zero_variance.png"}
    assert "samples of step 2: 1 line left out" in Page(out / "index.html").text


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"steps": 3}')
    (shown,) = pages.build([tmp_path / "run"], tmp_path / "out")
    assert shown.summary.conclusion.answer == "Not known" and "step 0 of 3" in shown.summary.facts
    text = Page(tmp_path / "out" / "index.html").text
    assert "nothing to plot yet" in text and "no training step is finished yet" in text


def test_names_of_a_run_are_text(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "write", lambda *_: {})
    name = "<img src=x onerror=alert(1)>"
    folder = write(tmp_path / name, [{"step": 1, "loss": 0, f"eval/{name}/pass@1": 1.0}], {"model": {"path": name}})
    pages.build([folder], tmp_path / "out")
    index = Page(tmp_path / "out" / "index.html")
    assert "img" not in index.tags and index.text.count(name) >= 4


def test_out_must_be_ones_own(tmp_path, monkeypatch):
    run = write(tmp_path / "run", [], {})
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "index.html").write_text("precious")
    refused = {theirs: "holds index.html but no report", run: "but no report", run / "config.json": "cannot be written"}
    for out, message in refused.items():
        with pytest.raises(InputError, match=message):
            pages.build([run], out)
    assert (theirs / "index.html").read_text() == "precious" and (run / "metrics.jsonl").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'igrpo-jax\[report\]'"):
        pages.build([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--workdir: missing"),
        (["--workdir", "none"], "no such folder"),
        (["--worksdir=x"], "worksdir"),
        (["x"], "x: not understood; the folder of a run is given as --workdir=x\n"),
        (["--workdir=x", "y"], "y: not understood; the folder of a run is given as --workdir=y\n"),
        (["out=x"], "out=x: not understood; settings are given as --workdir=DIR\n"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", *flags])
    with pytest.raises(SystemExit) as ended:
        exits.run(report.main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


def test_an_installed_package_has_the_templates():
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    (shipped,) = [ast.literal_eval(node.value) for node in calls if node.arg == "package_data"]
    folder = ROOT / "igrpo_jax" / "report"
    for path in (folder / "templates").iterdir():
        name = path.relative_to(folder).as_posix()
        assert any(fnmatch.fnmatch(name, pattern) for pattern in shipped["igrpo_jax.report"]), name


def test_a_run_is_not_changed_by_what_is_counted_in_it(made_runs):
    run = read(made_runs[0])
    before = dict(run.metrics)
    counted = pages._with_counts(run, samples.Written([], {1: samples.Counts(4, samples.Counter(right=1))}, ["x"]))
    assert counted.metrics["samples/equal_right"] == {1: 0.25} and run.metrics == before
    assert dataclasses.replace(counted, metrics=before, notes=run.notes) == run
