"""The matched-budget study: its numbers by hand, its arms, that it goes on where it was killed, and its page.

What these tests catch: a zero-variance split that mixes up groups of right and wrong drafts, intervals that are not
Student's t, arms that sample more than the ones they are compared with, a study that runs finished runs again, and a
number in docs/study.md that no file of the study holds.
"""

import argparse
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from igrpo_jax import config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
matched_budget, study_arms, study_report, study_runs = map(
    importlib.import_module, ("matched_budget", "study_arms", "study_report", "study_runs")
)


def sample(stage, number, advantage=None, parent=None, accuracy=0.0):
    row = {"prompt_id": "0", "stage": stage, "sample_id": number, "parent_draft_id": parent, "advantage": advantage}
    return row | {
        "rewards": {"accuracy": accuracy, "format": 1.0},
        "extracted": "7" if stage == "draft" else str(number),
    }


def write_run(folder, drafts=True, trains_drafts=False, gain=0.1):
    """Two steps of two groups with an evaluation before, between and after."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"algorithm": {"train_drafts": trains_drafts}}))
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
    run = study_runs.figures(tmp_path, "x")
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
    assert study_runs.figures(tmp_path, "x")["trained_tokens"] == 220


def test_groups_without_drafts(tmp_path):
    write_run(tmp_path, drafts=False)
    run = study_runs.figures(tmp_path, "x")
    assert run["zero_variance"] == 0.5 and "zero_variance_right_draft" not in run and "fixed" not in run
    assert run["completions"] == 8


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


def test_arms_sample_as_much_as_what_they_are_compared_with():
    arms = {arm.name: arm for group in study_arms.ARMS.values() for arm in group}
    assert len(arms) == sum(map(len, study_arms.ARMS.values()))  # names are folders
    total = lambda arm: arm.settings["algorithm.num_drafts"] + arm.settings["algorithm.num_generations"]
    for arm in arms.values():
        for name in arm.settings:
            config.check_field(name)
        if arm.against:
            other = arms[arm.against]
            assert total(arm) == total(other) and arm.start == other.start, arm.name
    for file in ("study_arithmetic", "study_smollm2"):
        matched_budget.read_config(ROOT / "configs" / f"{file}.py")


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path, monkeypatch, capsys):
    study = matched_budget.Study(tmp_path, Path("x.py"), "x", {}, 2, [])
    args = argparse.Namespace(groups=["main"], seeds=2, jobs=1, setting="arithmetic")
    calls = []

    def call(command, log, cores=None):
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
        matched_budget._lock(other)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1); print('first')"], stdout=other)
    matched_budget.call([sys.executable, "-c", "print('second')"], log)
    assert log.read_text() == "first\nsecond\n" and child.wait() == 0
    assert "waiting for the run of another study" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"exit code 3(.|\n)*second"):
        matched_budget.call([sys.executable, "-c", "raise SystemExit(3)"], log)


def test_every_number_of_the_page_is_in_a_file_of_the_study():
    """Whole table rows, and every decimal number of the text."""
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "docs" / "study").glob("*/tables.md"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    rows = [line for line in page.splitlines() if line.startswith("|") and re.search(r"\d", line)]
    assert rows and [row for row in rows if row not in text.splitlines()] == []
    known = set(re.findall(r"\d+\.\d+", text))
    prose = re.sub(r"```.*?```|`[^`]*`|arXiv [\d.]+", "", page, flags=re.DOTALL)
    assert [number for number in re.findall(r"\d+\.\d+", prose) if number not in known] == []
    for picture in re.findall(r"\]\(([^)]+\.png)\)", page):
        assert (ROOT / "docs" / picture).is_file(), picture
