"""The matched-budget study: its numbers by hand, its arms, that it goes on where it was killed, and its page.

What these tests catch: a zero-variance split that mixes up groups of right and wrong drafts, intervals that are not
Student's t, arms that sample more than the ones they are compared with, a study that runs finished runs again or does
not stop in time, own drafts that are not the answers of the same problem, problems that are both trained on and
evaluated.
"""

import argparse
import importlib
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from igrpo_jax import config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
matched_budget, study_arms, study_commands, study_report, study_rewards, study_runs, study_settings = (
    importlib.import_module(name)
    for name in (
        *("matched_budget", "study_arms", "study_commands", "study_report", "study_rewards"),
        *("study_runs", "study_settings"),
    )
)


def sample(stage, number, advantage=None, parent=None, accuracy=0.0):
    row = {"prompt_id": "0", "stage": stage, "sample_id": number, "parent_draft_id": parent, "advantage": advantage}
    return row | {
        "token_count": 25 if stage == "draft" else 2 + (number > 0),
        "rewards": {"accuracy": accuracy, "format": 1.0},
        "extracted": "7" if stage == "draft" else str(number),
    }


def write_run(folder, drafts=True, trains_drafts=False, gain=0.1, **algorithm):
    """Two steps of two groups with an evaluation before, between and after."""
    (folder / "samples").mkdir(parents=True)
    settings = {"train_drafts": trains_drafts, "draft_selection": "best", **algorithm}
    (folder / "config.json").write_text(json.dumps({"algorithm": settings}))
    rows = [{"step": 0, "eval/x/pass@1": 0.2, "eval/x/mean_length": 9.0}]
    for step in (1, 2):
        row = dict.fromkeys(study_runs.SERIES.values(), 0.1 * step)
        row |= {"step": step, "loss": 0.0, "perf/step_time": 2.0, "perf/rollout_time": 0.5, "perf/update_time": 1.5}
        row |= {"perf/draft_tokens": 100 * drafts, "perf/completion_tokens": 10, "completions/clipped_ratio": 0.0}
        row |= {f"refine/{move}": 0.25 for move in study_runs.MOVES} if drafts else {}
        rows += [row, {"step": step, "eval/x/pass@1": 0.2 + gain * step, "eval/x/mean_length": 9.0 + step}]
        right = [sample("draft", 0), sample("draft", 1, accuracy=1.0)]
        wrong = [sample("draft", 0), sample("draft", 1)]
        equal = [sample("refine", 0, 0.0, 1 if drafts else None), sample("refine", 7, 0.0, 1 if drafts else None)]
        differ = [sample("refine", 0, -0.7, 0 if drafts else None), sample("refine", 1, 0.7, 0 if drafts else None)]
        samples = [*right * drafts, *equal, *wrong * drafts, *differ]
        lines = "".join(json.dumps(one) + "\n" for one in samples)
        (folder / "samples" / f"step_{step:06d}.jsonl").write_text(lines)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')


def test_the_numbers_of_a_run(tmp_path):
    write_run(tmp_path)
    run = study_runs.figures(tmp_path, 2, "x")
    assert (run["before"], run["after"]) == (0.2, 0.4)
    assert run["area"] == pytest.approx(0.3)  # (0.2 + 0.3) / 2 and (0.3 + 0.4) / 2, one step each
    # All right drafts of this run are followed by equal rewards, no wrong one; mixed up it would be 0.5 and 0.5.
    assert run["zero_variance"] == 0.5
    assert (run["zero_variance_right_draft"], run["zero_variance_wrong_draft"]) == (1.0, 0.0)
    assert (run["sampled_tokens"], run["trained_tokens"], run["completions"]) == (220, 20, 16)
    assert run["curve"]["sampled"] == [0, 110, 220] and run["curve"]["completions"] == [0, 8, 16]
    assert run["seconds"] == 4.0 and run["fixed"] == 0.25
    assert run["same_answer"] == 0.25  # of the two refinements of one of two groups


def test_drafts_that_are_trained_on_count_as_trained(tmp_path):
    write_run(tmp_path, trains_drafts=True)
    assert study_runs.figures(tmp_path, 2, "x")["trained_tokens"] == 220


def test_groups_without_drafts(tmp_path):
    write_run(tmp_path, drafts=False)
    run = study_runs.figures(tmp_path, 2, "x")
    assert run["zero_variance"] == 0.5 and "zero_variance_right_draft" not in run and "fixed" not in run
    assert run["completions"] == 8


def test_verifications_copy_nothing(tmp_path):
    """Steps of second_stage = verify have no refine/copy_ratio."""
    write_run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]]
    kept = [{key: value for key, value in row.items() if not key.startswith("refine/")} for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    run = study_runs.figures(tmp_path, 2, "x")
    assert "copy_ratio" not in run and "same_answer" not in run and "fixed" not in run


def test_completions_that_are_left_out_of_the_files_are_counted(tmp_path):
    """Of 2 drafts with 2 refinements each, the file has the 2 of the kept draft: 4 of 6 completions.

    The others are sampled, and not trained on: of the 20 tokens of refinements in each step 10 are.
    """
    write_run(tmp_path, trains_drafts=True, draft_selection="refined", num_drafts=2, num_generations=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]]
    rows = [row | {"perf/completion_tokens": 20} if "loss" in row else row for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = study_runs.figures(tmp_path, 2, "x")
    assert run["completions"] == 2 * 2 * 6 and run["sampled_tokens"] == 2 * (100 + 20)
    assert run["trained_tokens"] == 2 * (100 + 10) and run["curve"]["trained"] == [0, 110, 220]


def test_prompts_and_steps_without_refinements(tmp_path):
    """The drafts of a prompt without refinements are its group; steps without a value are left out of a mean."""
    write_run(tmp_path, trains_drafts=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]]
    rows[1] |= {
        "refine/copy_ratio": None,
        "reward": None,
        "entropy": None,
        **{f"refine/{move}": None for move in study_runs.MOVES},
    }
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drafts = [sample("draft", 0) | {"reward": 0.0}, sample("draft", 1, accuracy=1.0) | {"reward": 1.0}]
    lines = "".join(json.dumps(one) + "\n" for one in drafts)
    (tmp_path / "samples" / "step_000001.jsonl").write_text(lines)
    run = study_runs.figures(tmp_path, 2, "x")
    assert run["completions"] == 2 + 8
    assert run["zero_variance"] == pytest.approx(
        1 / 3, abs=1e-4
    )  # of one group in the first step and two in the second
    assert run["fixed"] == 0.25 and run["copy_ratio"] == pytest.approx(0.2)
    assert {"reward", "copy_ratio", "entropy"} & {*run["series"]} == set() and "entropy_100" not in run
    arm = {"settings": {}, "against": "", "start": "", "seeds": {"0": run}}
    results = {"setting": "x", "steps": 2, "groups": {"g": ["a", "b"]}, "arms": {"a": arm, "b": arm | {"against": "a"}}}
    study_report.write(tmp_path, results)
    assert "| b | a | 1 | +0.0 | +0.0 | +0.0 | +0.0 |  |  |" in (tmp_path / "tables.md").read_text()


def test_digits_that_are_right_are_counted_in_their_places():
    texts = ["<answer>123</answer>", "<answer>923</answer>", "12", "<answer>1234</answer>", "<answer>31"]
    assert study_rewards.right_digits(texts, ["123"] * 5, keys="x") == pytest.approx([1, 2 / 3, 0, 1, 0])


def test_a_run_is_finished_with_its_last_evaluation(tmp_path):
    assert not study_runs.finished(tmp_path, 2, "x")
    write_run(tmp_path)
    assert study_runs.finished(tmp_path, 2, "x")
    assert not study_runs.finished(tmp_path, 3, "x") and not study_runs.finished(tmp_path, 2, "y")


def test_intervals_are_students_t():
    mean, width = study_runs.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # with 1.96 it would be 1.13, not 2.48
    assert math.isnan(study_runs.interval([1.0])[1])


def test_runs_are_compared_where_they_have_spent_as_much():
    short = {"curve": {"trained": [0, 50, 100], "pass@1": [0.2, 0.3, 0.5]}}
    long = {"curve": {"trained": [0, 200, 400], "pass@1": [0.2, 0.6, 0.9]}}
    assert study_runs.at_equal("trained", short, long) == (0.5, pytest.approx(0.4))
    assert study_runs.at_equal("trained", long, short) == (pytest.approx(0.4), 0.5)


def test_entropies_are_compared_where_runs_have_trained_as_much():
    """The short run's last 5 steps against the long one's 5 to 9: it had trained on as much after step 9 of 10."""
    short = {"curve": {"trained": [0, 90], "step": [0, 10]}, "series": {"entropy": [*range(10)]}}
    long = {"curve": {"trained": [0, 100], "step": [0, 10]}, "series": {"entropy": [*range(10, 20)]}}
    assert study_runs.entropies_at_equal(short, long) == (7, 16)
    assert study_runs.entropies_at_equal(long, short) == (16, 7)


def sampled(arm):
    """Returns how many completions an arm samples for a prompt, on average over its steps."""
    drafts, refined = (arm.settings[f"algorithm.num_{name}"] for name in ("drafts", "generations"))
    if arm.settings.get("algorithm.alternate"):
        return drafts / 2 + refined
    return drafts + refined * (drafts if arm.settings.get("algorithm.draft_selection") == "refined" else 1)


def test_arms_sample_as_much_as_what_they_are_compared_with():
    groups = [*study_arms.ARMS.values(), *study_arms.LOOKUPS.values()]
    arms = {arm.name: arm for group in groups for arm in group}
    assert len(arms) == sum(map(len, groups))  # names are folders
    for arm in arms.values():
        for name in arm.settings:
            config.check_field(name)
        if arm.against and not arm.name.endswith("_grpo_4"):  # as many trained completions, but half of the samples
            other = arms[arm.against]
            assert sampled(arm) == sampled(other) and arm.start == other.start, arm.name
    for setting in study_settings.SETTINGS.values():
        config.freeze(study_settings.read_config(setting.config))


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path, monkeypatch, capsys):
    study = study_settings.Study(tmp_path, Path("x.py"), "x", {}, 2, [])
    args = argparse.Namespace(groups={"main": study_arms.ARMS["main"]}, seeds=2, jobs=1, setting="arithmetic")
    calls = []

    def call(command, log, cores, stop_at):
        workdir = Path(command[command.index("--workdir") + 1])
        calls.append(workdir.relative_to(tmp_path).as_posix())
        if len(calls) == 3:
            raise SystemExit("killed")
        drafts = workdir.parent.name == "igrpo"
        write_run(workdir, drafts, gain=0.1 + 0.05 * drafts)

    monkeypatch.setattr(matched_budget, "call", call)
    with pytest.raises(SystemExit, match="killed"):
        matched_budget.run_all(args, study)
    first = ["runs/grpo/seed_0", "runs/igrpo/seed_0", "runs/grpo/seed_1"]
    assert calls == first
    matched_budget.run_all(args, study)
    assert calls == [*first, "runs/grpo/seed_1", "runs/igrpo/seed_1"]
    assert "4 runs of 2 steps, 2 of them there" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert sorted(results["arms"]["igrpo"]["seeds"]) == ["0", "1"]
    row = json.loads(study_report.last_line(results))["arms"]["igrpo"]
    assert row["difference"] == pytest.approx(0.1) and row["against"] == "grpo" and row["half_width"] == 0
    tables = (tmp_path / "tables.md").read_text()
    assert "| igrpo | grpo | 2 | +10.0 ± 0.0 | +5.0 ± 0.0 |" in tables
    assert (tmp_path / "main.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_runs_of_a_killed_study_are_waited_for(tmp_path, capsys):
    """A child outlives the study that began it; another process in the same folder would tear its files."""
    log = tmp_path / "log.txt"
    with open(log, "a") as other:
        study_commands._lock(other)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1); print('first')"], stdout=other)
    study_commands.call([sys.executable, "-c", "print('second')"], log)
    assert log.read_text() == "first\nsecond\n" and child.wait() == 0
    assert "waiting for other processes that still write" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"exit code 3(.|\n)*second"):
        study_commands.call([sys.executable, "-c", "raise SystemExit(3)"], log)


STOPPABLE = """
import signal, sys, time
def stop(*_):
    print("saved", flush=True)
    raise SystemExit(75)
signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
time.sleep(60)
"""


def test_a_run_is_stopped_when_the_time_is_over(tmp_path):
    log = tmp_path / "log.txt"
    began = time.monotonic()
    with pytest.raises(study_commands.OutOfTime):
        study_commands.call([sys.executable, "-c", STOPPABLE], log, stop_at=began + 0.7)
    assert time.monotonic() - began < 20
    assert log.read_text() == "begun\nsaved\n"
    with pytest.raises(study_commands.OutOfTime):  # after the time, nothing begins
        study_commands.call([sys.executable, "-c", "print('late')"], tmp_path / "late.txt", stop_at=began)
    assert not (tmp_path / "late.txt").exists()


def test_a_run_that_fails_while_it_is_stopped_has_failed(tmp_path):
    command = [sys.executable, "-c", STOPPABLE.replace("75", "1")]
    with pytest.raises(SystemExit, match="exit code 1"):
        study_commands.call(command, tmp_path / "log.txt", stop_at=time.monotonic() + 0.7)


def test_a_failure_counts_more_than_the_time():
    together = threading.Barrier(2)

    def work(item, _):
        together.wait(timeout=20)
        raise SystemExit("failed") if item else study_commands.OutOfTime

    with pytest.raises(SystemExit, match="failed"):
        study_commands.in_parallel(2, work, [0, 1])
    with pytest.raises(study_commands.OutOfTime):
        study_commands.in_parallel(2, work, [0, 0])


def parse(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["matched_budget.py", *flags])
    return matched_budget.parse()


def test_a_study_of_a_pretrained_model_goes_on_from_its_numbers_alone(tmp_path, monkeypatch):
    """On another machine, without checkpoints and samples; a run that had not ended begins again."""
    qwen05 = ["--setting", "qwen05", "--model", "m", "--data", str(tmp_path), "--seeds", "2", "--jobs", "1"]
    args = parse(monkeypatch, "--out", str(tmp_path), *qwen05)
    study = study_settings.Study(tmp_path, Path("x.py"), "x", {}, 2, [], pretrained="m")
    calls = []

    def call(command, log, cores, stop_at):
        workdir = Path(command[command.index("--workdir") + 1])
        calls.append(workdir.parent.name)
        if len(calls) == 3:
            raise study_commands.OutOfTime
        (workdir / "checkpoints" / "2").mkdir(parents=True)
        write_run(workdir, workdir.parent.name != "grpo")

    monkeypatch.setattr(matched_budget, "call", call)
    monkeypatch.setattr(study_report, "plot", lambda *_: None)  # it takes seconds
    with pytest.raises(study_commands.OutOfTime):
        matched_budget.run_all(args, study)
    assert calls == ["grpo", "igrpo", "igrpo_train_drafts"]  # all arms of a seed before the next seed
    assert list(tmp_path.glob("runs/*/*/checkpoints")) == []
    results = matched_budget.report(args, study)
    for folder in tmp_path.glob("runs/*/*"):
        shutil.rmtree(folder / "samples")
        (folder / "metrics.jsonl").unlink()
    study_runs.computed_figures.cache_clear()
    assert matched_budget.report(args, study) == results and len(results["arms"]) == 2
    matched_budget.run_all(args, study)
    assert calls[3:] == ["igrpo_train_drafts", "grpo", "igrpo", "igrpo_train_drafts"]
    more_steps = study_settings.Study(tmp_path, Path("x.py"), "x", {}, 4, [], pretrained="m")
    assert not more_steps.finished("grpo", 0)


def test_each_setting_has_its_own_defaults(tmp_path, monkeypatch):
    args = parse(monkeypatch, "--out", str(tmp_path))
    assert (list(args.groups), args.jobs, args.screen, args.held_out) == (["main"], 2, 0, 0)
    qwen05 = ["--out", str(tmp_path), "--setting", "qwen05", "--model", "m", "--data", "d"]
    args = parse(monkeypatch, *qwen05)
    assert (list(args.groups), args.jobs) == (["main", "igrpo_train_drafts"], 1)
    assert (args.screen, args.held_out) == (1024, 128)
    assert len(matched_budget.wanted_runs(args)) == 30
    args = parse(monkeypatch, *qwen05, "--held-out", "0", "--groups", "main,igrpo,controls")
    assert args.held_out == 0
    assert len(matched_budget.wanted_runs(args)) == 2 * 10 + 3 * len(study_arms.ARMS["controls"])  # igrpo counts once
    args = parse(monkeypatch, "--out", str(tmp_path), "--setting", "lookups", "--groups", "sparse,sparse_worst")
    assert len(matched_budget.wanted_runs(args)) == 10 * (5 + 1)
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--out", str(tmp_path), "--setting", "lookups", "--groups", "main")


def test_a_model_that_would_not_be_trained_is_refused(tmp_path, monkeypatch, capsys):
    """Without --setting smollm2 the study would be that of the arithmetic model, an hour of runs with another model."""
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--out", str(tmp_path), "--model", "m", "--data", "d", "--held-out", "8")
    message = capsys.readouterr().err
    assert "--model, --data, --held-out: --setting arithmetic has a built-in model" in message
    assert "give --setting smollm2 or qwen05" in message


def test_minutes_that_leave_no_time_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--out", str(tmp_path), "--minutes", "0.2")
    assert "--minutes 0.2: runs may take 25 s to stop" in capsys.readouterr().err


def test_the_exit_code_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    def out_of_time(*_):
        raise study_commands.OutOfTime

    monkeypatch.setattr(matched_budget, "parse", lambda: argparse.Namespace(setting="qwen05", minutes=9))
    monkeypatch.setattr(matched_budget, "open_study", out_of_time)
    assert matched_budget.main() == 75
    assert "goes on" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["arithmetic", "qwen05"])
def test_a_report_alone_makes_nothing(tmp_path, monkeypatch, capsys, setting):
    """No start, no screening and no note: only the report of the runs that are there."""

    def made(*_, **__):
        raise AssertionError("something was made")

    monkeypatch.setattr(study_settings, "call", made)
    monkeypatch.setattr(study_settings, "in_parallel", made)
    monkeypatch.setattr(study_report, "plot", lambda *_: None)  # it takes seconds
    monkeypatch.setattr(study_settings.Study, "finished", lambda *_: True)
    monkeypatch.setattr(study_runs, "figures", lambda folder, *_: study_runs.computed_figures(folder, "x"))
    write_run(tmp_path / "runs" / "igrpo" / "seed_0")
    flags = ["--out", str(tmp_path), "--setting", setting, "--report-only"]
    flags += ["--model", "m", "--data", str(tmp_path)] if setting == "qwen05" else []
    monkeypatch.setattr(sys, "argv", ["matched_budget.py", *flags])
    assert matched_budget.main() == 0
    assert json.loads(capsys.readouterr().out)["arms"]["igrpo"]["seeds"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "runs", "tables.md"]


def problem(number, name="p{}".format):
    return {"id": name(number), "prompt": f"What is {number}?", "answer": str(number), "solution": "x" * (9 - number)}


def write_problems(folder, rows):
    (folder / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["p{}".format, int], ids=["texts", "numbers"])
def test_problems_that_the_model_solves_sometimes(tmp_path, monkeypatch, name):
    """p2 to p7 are solved sometimes; two of them are held out and not trained on. Answers name problems by texts."""
    write_problems(tmp_path, [problem(number, name) for number in range(9)])
    right = {"0": 4, "1": 0, "8": 0} | {str(number): 1 + number % 3 for number in range(2, 8)}
    right = {str(name(int(number))): count for number, count in right.items()}

    def call(command, log, stop_at):
        answers = [{"prompt_id": name, "accuracy": float(i < count)} for name, count in right.items() for i in range(4)]
        (tmp_path / "out" / "screen").mkdir()
        path = tmp_path / "out" / "screen" / "screened.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in answers))

    monkeypatch.setattr(study_settings, "call", call)
    qwen05 = ["--setting", "qwen05", "--model", "m", "--data", str(tmp_path)]
    args = parse(monkeypatch, "--out", str(tmp_path / "out"), *qwen05, "--held-out", "2")
    study = study_settings.open_study(args, math.inf)
    ids = lambda name: [row["id"] for row in study_runs.read_rows(tmp_path / "out" / "data" / f"{name}.jsonl")]
    assert ids("screened")[0] == name(8)  # the shortest solution first
    assert ids("solved") == [*map(name, (6, 5, 3, 2))] and ids("held_out") == [name(7), name(4)]
    assert study.benchmark == "held_out" and study.settings["evaluation.benchmarks"] == "('held_out',)"
    shutil.rmtree(tmp_path / "out")
    args = parse(monkeypatch, "--out", str(tmp_path / "out"), *qwen05, "--held-out", "6")
    with pytest.raises(SystemExit, match="--screen 1024: the model solves 6 of these"):
        study_settings.open_study(args, math.inf)
    shutil.rmtree(tmp_path / "out" / "screen")
    args = parse(monkeypatch, "--out", str(tmp_path / "out"), *qwen05, "--held-out", "5")  # as it was told
    assert study_settings.open_study(args, math.inf).benchmark == "held_out"


@pytest.mark.parametrize("column", ["id", "solution"])
def test_problems_without_a_column_are_refused_before_the_model_is_asked(tmp_path, monkeypatch, column):
    monkeypatch.setattr(study_settings, "call", None)
    without = {name: value for name, value in problem(2).items() if name != column}
    write_problems(tmp_path, [problem(0), problem(1) | {column: None}, without])
    args = parse(monkeypatch, "--out", str(tmp_path), "--setting", "qwen05", "--model", "m", "--data", str(tmp_path))
    with pytest.raises(SystemExit, match=f"gsm8k_train.jsonl has 2 rows without {column}; give each one"):
        study_settings.open_study(args, math.inf)


def test_a_folder_holds_one_study(tmp_path, monkeypatch):
    """Another start, model or length would be averaged with the runs that are there, or trained on their problems."""
    monkeypatch.setattr(study_settings, "call", None)  # nothing is screened or made
    monkeypatch.setattr(study_settings, "in_parallel", lambda *_: None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "solved.jsonl").touch()
    given = {"--out": tmp_path, "--setting": "qwen05", "--model": "m", "--data": tmp_path / "d"}

    def opened(*run_flags, **more):
        flags = {**given, **{f"--{name.replace('_', '-')}": value for name, value in more.items()}}
        named = (str(x) for flag in flags.items() for x in flag)
        return study_settings.open_study(parse(monkeypatch, *named, *run_flags), 0.0)

    opened()  # a folder of an earlier version, which does not say whose it is
    opened(steps=study_settings.read_config(study_settings.SETTINGS["qwen05"].config).steps, screen=1024, held_out=128)
    others = {"setting": "smollm2", "steps": 7, "model": "m2", "data": tmp_path / "d2", "screen": 9, "held_out": 0}
    for name, value in others.items():
        flag = f"--{name.replace('_', '-')}"
        known = {"--steps": "40", "--screen": "1024", "--held-out": "128"}.get(flag, given.get(flag))
        with pytest.raises(SystemExit) as refused:
            opened(**{name: value})
        text = str(refused.value)
        assert text.startswith(f"{flag} {value}: the study in {tmp_path} has {known}; give {flag} {known} to resume it")
        assert ("if it has only moved" in text) == (name in ("model", "data"))
    opened(seeds=3, groups="main", jobs=1)
    opened()
    with pytest.raises(SystemExit, match=r"flags of the runs: --config.beta=3; the study in .* has none; give these"):
        opened("--config.beta=3")
