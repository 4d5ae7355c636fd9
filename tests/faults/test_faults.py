"""What may happen to a run for days, made to happen: what the user sees, and that at most the step in flight is lost.

All but two of the runs here go on from a copy of a finished run of five steps, to the seventh. docs/reliability.md has
the table of these and of the faults that other tests make.
"""

import json
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import whole_runs
from whole_runs import check_same_rows, faulty, final_state, rows, samples

from igrpo_jax import train
from igrpo_jax.distributed import preemption
from igrpo_jax.session import ending, opening


def copy_of(whole, target: Path) -> Path:
    return shutil.copytree(whole[0], target, ignore=shutil.ignore_patterns("profile", "tensorboard"))


@pytest.fixture(scope="module")
def longer(whole, tmp_path_factory):
    """The run when nothing happens."""
    path = tmp_path_factory.mktemp("longer")
    whole_runs.run(path, copy_of(whole, path / "run"), "steps=7")
    return path / "run"


def check_equal(workdir: Path, other: Path) -> None:
    check_same_rows(rows(workdir), rows(other))
    assert samples(workdir) == samples(other)
    seven = whole_runs.settings(steps=7)
    a, b = final_state(workdir, seven), final_state(other, seven)
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


CLOCK = """
import time
now, hours, report = time.time, [], Run.report
time.time = lambda: now() - 3600 * len(hours)
def back(self, *args):
    hours.append(0)
    print("the clock went back", len(hours), "times")
    report(self, *args)
Run.report = back
"""
WORKERS = """
import multiprocessing
submit, killed = Verifier.submit, []
def kill(self, candidate, batch):
    future = submit(self, candidate, batch)
    if not killed:
        killed.extend(multiprocessing.active_children())
        for child in killed:
            child.kill()
        print("killed", len(killed))
    return future
Verifier.submit = kill
"""


SLOW = """
import time
update = Learner.update
def slow(self, *args):
    time.sleep(3)
    return update(self, *args)
Learner.update = slow
"""


@pytest.mark.slow(seconds=12)
def test_nothing_is_lost_when_workers_die_an_update_hangs_and_the_clock_goes_back(whole, longer, tmp_path):
    """All in one run: each is undone by other code, and shows itself by its own words."""
    more = ("steps=7", "watchdog.dispatch=1", "rewards.workers=2")
    done = faulty(CLOCK + WORKERS + SLOW, tmp_path, copy_of(whole, tmp_path / "run"), *more)
    assert done.returncode == 0, done.stderr
    for shown in ("killed 2", "the clock went back 2 times", "watchdog: update (step 6), dispatch"):
        assert shown in done.stdout + done.stderr
    check_equal(tmp_path / "run", longer)


def test_sigterm_while_data_is_read_is_a_notice_too(monkeypatch, tmp_path):
    def reads(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        preemption.check()

    def nobody(*_):
        raise AssertionError("SIGTERM ends the process")

    monkeypatch.setattr(opening, "open_inputs", reads)
    before = signal.signal(signal.SIGTERM, nobody)
    try:
        with pytest.raises(preemption.Preempted):
            train.train(whole_runs.settings(compilation_cache=""), tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "run").exists()


def ended_in_step_7(action, tmp_path, workdir):
    """Runs `action` when the first completion of step 7 is to be graded; step 6 is done and not yet saved."""
    inject = f"""
submit, calls = Verifier.submit, []
def graded(self, candidate, batch):
    calls.append(0)
    if len(calls) == 4 * (2 + 2) + 1:
        {action}
    return submit(self, candidate, batch)
Verifier.submit = graded
"""
    return faulty(inject, tmp_path, workdir, "steps=7", "checkpoint.every=0", "evaluation.every=20")


def check_that_step_7_alone_is_lost(tmp_path, workdir, longer):
    assert [row["step"] for row in rows(workdir) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert "resumed after 6" in whole_runs.run(tmp_path, workdir, "steps=7")
    check_equal(workdir, longer)


@pytest.mark.slow(seconds=8)
def test_sigterm_in_a_rollout_drops_its_step_alone(whole, longer, tmp_path):
    workdir = copy_of(whole, tmp_path / "run")
    done = ended_in_step_7("os.kill(os.getpid(), signal.SIGTERM)", tmp_path, workdir)
    assert done.returncode == 75, done.stderr
    assert "SIGTERM: saving, then ending" in done.stderr
    assert f"preempted: step 6 of 7 is saved in {workdir}; the same command resumes from there" in done.stderr
    check_that_step_7_alone_is_lost(tmp_path, workdir, longer)


@pytest.mark.slow(seconds=8)
def test_an_error_in_a_rollout_loses_its_step_alone(whole, longer, tmp_path):
    """As where the host is out of memory."""
    workdir = copy_of(whole, tmp_path / "run")
    done = ended_in_step_7('raise MemoryError("no memory is left")', tmp_path, workdir)
    assert done.returncode == 1, done.stderr
    told = f"step 6 is saved in {workdir}; the same command resumes from there"
    assert f"MemoryError: no memory is left\n{told}\n" in done.stderr
    check_that_step_7_alone_is_lost(tmp_path, workdir, longer)


@pytest.mark.slow
def test_steps_that_are_not_finite_change_nothing_and_end_the_run(whole, tmp_path):
    inject = """
advantages = objectives.group_advantages
objectives.group_advantages = lambda *args: advantages(*args) + float("nan")
"""
    workdir = copy_of(whole, tmp_path / "run")
    done = faulty(inject, tmp_path, workdir, "steps=20", "checkpoint.every=1")
    assert done.returncode == 1, done.stderr
    assert (
        "steps 6 to 10: loss or gradient was not finite, config.learner.max_nonfinite_steps = 5 times in a row"
        in done.stderr
    )
    kept = sorted(path.name for path in (workdir / "nonfinite").iterdir())
    assert kept == [f"step_{step:06d}.jsonl" for step in range(6, 11)]
    batch = [json.loads(line) for line in (workdir / "nonfinite" / "step_000006.jsonl").read_text().splitlines()]
    sampled = [json.loads(line) for line in samples(workdir)["step_000006.jsonl"].splitlines()]
    assert [{name: row[name] for name in sampled[0]} for row in batch] == sampled
    assert all(len(row["tokens"]) == len(row["logprobs"]) == row["token_count"] and row["context"] for row in batch)
    last = [row for row in rows(workdir) if "loss" in row][-1]
    assert last["nonfinite_steps"] == 5 * 2 and last["grad_norm"] is None  # two minibatches
    before, after = final_state(whole[0], whole_runs.settings()), final_state(workdir, whole_runs.settings(steps=9))
    for name in before:
        assert (before[name] == after[name]).all() or name in (".step", ".skipped"), name


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(whole, tmp_path):
    """One bit of the newest is flipped. The step after the older one is run again, and gives what it gave."""
    workdir = copy_of(whole, tmp_path / "run")
    (workdir / ending.FILE).unlink()  # a run that has said that it is finished reads no checkpoint
    largest = max((workdir / "checkpoints" / "5" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    done = faulty("", tmp_path, workdir)
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 5 skipped, moved to damaged_checkpoints: " in done.stderr
    assert "resumed after 4" in done.stdout
    assert [path.name for path in (workdir / "damaged_checkpoints").iterdir()] == ["5.1"]
    check_same_rows(rows(workdir), rows(whole[0]))
    assert samples(workdir) == samples(whole[0])
    a, b = final_state(workdir, whole_runs.settings()), final_state(whole[0], whole_runs.settings())
    assert all((a[name] == b[name]).all() for name in b)


@contextmanager
def disk(path: Path, kibibytes: int):
    """A small file system of its own."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", path], capture_output=True)
    if made.returncode:
        pytest.skip(f"mounting a small disk takes a superuser: {made.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def used(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*"))


@pytest.mark.slow(seconds=14)
def test_a_full_or_unwritable_disk_ends_the_run_and_keeps_the_last_checkpoint(whole, longer, tmp_path):
    with disk(tmp_path / "disk", 4096) as path:
        workdir = copy_of(whole, path / "run")
        room = shutil.disk_usage(path).free
        (path / "others").write_bytes(bytes(room - used(workdir / "checkpoints" / "5") // 2))
        done = faulty("", tmp_path, workdir, "steps=7")
        assert done.returncode == 1, done.stderr
        assert "a checkpoint takes " in done.stderr and "MiB are free; fix this and run" in done.stderr
        assert "resumes from step 5" in done.stderr
        fill = f"""
report = Run.report
def full(self, *args):
    with open({str(path / "others")!r}, "ab", buffering=0) as file:
        while True:
            try:
                file.write(bytes(512))
            except OSError:
                break
    report(self, *args)
Run.report = full
"""
        (path / "others").unlink()
        tensorboard = "log.trackers=('tensorboard',)"  # its own writer would wait for ever
        done = faulty(fill, tmp_path, workdir, "steps=7", tensorboard)
        assert done.returncode == 1, done.stderr
        assert "cannot be written (No space left on device); fix this" in done.stderr
        assert "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,ro", path], check=True)
        done = faulty("", tmp_path, workdir, "steps=7")
        assert done.returncode == 2, done.stderr
        assert f"--workdir {workdir}: cannot be written (Read-only file system); give a folder that can" in done.stderr
        subprocess.run(["mount", "-o", "remount,rw", path], check=True)
        (path / "others").unlink()
        whole_runs.run(tmp_path, workdir, "steps=7")
        check_equal(workdir, longer)


# The call before the run, with the answers that it makes up, is well.
HANGING = """
import time

def hangs(completions, **columns):
    if "Done." not in completions[0]:
        time.sleep(60)
    return [0.0] * len(completions)
"""
FRESH = ("warm_start.steps=0", "evaluation.every=0", "checkpoint.best_metric=", "prompts_per_step=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, words",
    [
        pytest.param(
            ("rewards.custom=hanging:hangs", "rewards.timeout=0.5"),
            "of 4 gradings 4 timed out, 0 failed and 0 have no verdict",
            marks=pytest.mark.proof,
        ),
        (
            tuple(
                f"rewards.judge.{x}" for x in ("weight=1", "model=m", "base_url=http://127.0.0.1:9/v1", "max_retries=0")
            ),
            "config.rewards.judge.base_url = 'http://127.0.0.1:9/v1': the judge 'm' gives no verdict",
        ),
    ],
    ids=["the verifier hangs", "the judge is down"],
)
def test_a_run_without_rewards_ends_when(tmp_path, monkeypatch, overrides, words):
    (tmp_path / "hanging.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    done = faulty("", tmp_path, tmp_path / "run", *FRESH, *overrides)
    assert done.returncode == 1, done.stderr
    assert words in done.stderr
    assert "a-secret" not in done.stdout + done.stderr
    assert not any(b"a-secret" in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


@pytest.mark.slow
def test_final_states_differ_when_they_should(whole, longer):
    """What these tests compare can differ."""
    a, b = final_state(whole[0], whole_runs.settings()), final_state(longer, whole_runs.settings(steps=7))
    assert any(np.any(a[name] != b[name]) for name in a)
