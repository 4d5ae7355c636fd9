"""Runs whose workdir lies in a bucket: claimed, killed, resumed and read as those in a folder."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import whole_runs
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from igrpo_jax import config as config_lib
from igrpo_jax import evaluate, export, generate
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.models.policy import open_policy
from igrpo_jax.outputs import checkpoint, checkpoint_reading, weights
from igrpo_jax.outputs import workdir as workdirs
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.files import write_rows
from igrpo_jax.outputs.writer import Writer
from igrpo_jax.report import __main__ as draw
from igrpo_jax.report import runs
from igrpo_jax.session import beginning, ending
from igrpo_jax.session.run_context import RunContext
from igrpo_jax.storage import lease as leases
from igrpo_jax.storage.addresses import path_of
from igrpo_jax.storage.reading import kept_in
from igrpo_jax.storage.writing import move_tree, remove_tree, upload_folder


@pytest.fixture
def folder(bucket, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED", 0.1)
    monkeypatch.setattr(leases, "SETTLED", 0.01)
    return path_of("--workdir X", bucket.address)


def configured(**fields):
    tree = config_lib.default()
    tree.update_from_flattened_dict(fields)
    return config_lib.freeze(tree)


def test_a_folder_belongs_to_one_run(folder, bucket):
    config, other = configured(), configured(seed=1)
    assert workdirs.prepare_workdir(folder, config) == (False, [])
    assert workdirs.prepare_workdir(folder, config) == (True, [])
    assert json.loads(bucket.read("config.json")) == config_lib.to_dict(config)
    bucket.write("checkpoints/0/state/d/1", "not finished")
    assert workdirs.recorded_date(folder) is None
    assert workdirs.prepare_workdir(folder, other) == (False, ["seed: 0 -> 1"])
    assert bucket.names() == ["config.json"]
    bucket.write("checkpoints/0/commit_success.txt", "finished")
    with pytest.raises(InputError, match=r"holds a run with other settings \(seed: 1 -> 0\)"):
        workdirs.prepare_workdir(folder, config)
    assert workdirs.read_config(folder) == other
    assert workdirs.prepare_workdir(folder, other) == (True, [])
    bucket.write("samples/step_000001.jsonl", "{}")
    bucket._files.rm_file(bucket / "checkpoints/0/commit_success.txt")
    with pytest.raises(InputError, match=r"none of its checkpoints holds commit_success.txt, .* copied from a folder"):
        workdirs.prepare_workdir(folder, other)
    bucket.write("mine/notes.txt", "x")
    with pytest.raises(InputError, match=r"holds notes.txt but no config.json"):
        workdirs.prepare_workdir(folder / "mine", config)


def test_several_processes_need_a_bucket_that_orbax_writes_to(s3_bucket, monkeypatch):
    monkeypatch.setattr(workdirs.jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"--workdir s3://.*: checkpoints get there from the disk of one machine, "):
        workdirs.check_workdir(path_of("", s3_bucket.address), configured())
    assert s3_bucket.names() == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bucket", pytest.param("s3_bucket", marks=pytest.mark.proof)])
def test_compiled_programs_lie_in_a_bucket(kind, request):
    bucket = request.getfixturevalue(kind)
    code = f"""
import jax
from igrpo_jax.distributed.disk_cache import use_disk_cache
jax.config.update("jax_compilation_cache_dir", None)
use_disk_cache({bucket / "programs"!r})
assert jax.config.jax_persistent_cache_enable_xla_caches == "none"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
jax.jit(lambda x: x * 2 + 1)(3.0)
print(sum(hits))
"""
    environment = os.environ | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # nothing answers as `Control` there
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    for expected in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.strip() == expected, done.stderr
    assert all(name.startswith("programs/jit") for name in bucket.names()) and bucket.names()


def test_one_run_at_a_time(folder):
    workdirs.prepare_workdir(folder, configured())
    refusal = r"--workdir gs://bucket/.*: a run is under way there \(process \d+ on .*\); wait until it ends"
    with workdirs.locked(folder) as check:
        check()
        with pytest.raises(InputError, match=refusal), workdirs.locked(folder):
            pass
    with workdirs.locked(folder):
        pass


def test_of_two_runs_that_start_at_once_the_settings_are_those_of_the_one_that_has_the_lock(
    folder, bucket, monkeypatch, tmp_path
):
    take, (first, second) = beginning.locked, (contextlib.ExitStack(), contextlib.ExitStack())

    def claim(path, seed, stack):
        context = RunContext(path, Console(io.StringIO()), stack)
        beginning.claim_folder(context, configured(seed=seed), workdirs.check_workdir, workdirs.prepare_workdir)

    for place in (folder, tmp_path / "run"):

        def locked(path):
            """The other run starts now, and is about to take the lock when this one does."""

            def slow(path):
                first.enter_context(take(path))
                return take(path)

            monkeypatch.setattr(beginning, "locked", slow)
            with pytest.raises(InputError, match="a run is under way there"):
                claim(path, 1, second)
            return contextlib.nullcontext()

        monkeypatch.setattr(beginning, "locked", locked)
        with first, second:
            claim(place, 0, first)
            assert workdirs.read_config(place).seed == 0


def test_a_bucket_that_takes_nothing_is_refused(folder, bucket):
    bucket.fault(status=403, method="POST")
    refusal = r"--workdir gs://.*: cannot be written \(Forbidden: .*\); give a folder that"
    with pytest.raises(InputError, match=refusal), workdirs.locked(folder):
        pass
    bucket.fault()
    assert bucket.names() == []


def test_rows_and_samples_of_a_resume(folder, bucket):
    settings = configured(**{"log.trackers": ()})
    with Writer(folder, settings) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": step})
            bucket.write(f"samples/step_{step:06d}.jsonl", "{}")
        writer.sync()
        assert bucket.read("metrics.jsonl").count("\n") == 3
        writer.write(4, {"loss": 4.0})
    assert bucket.read("metrics.jsonl").count("\n") == 4
    with Writer(folder, settings, resume_step=2) as writer:
        assert writer.rows == 2 and [row["loss"] for row in writer.history] == [1.0, 2.0]
    assert [json.loads(line)["step"] for line in bucket.read("metrics.jsonl").splitlines()] == [1, 2]
    assert bucket.names() == ["metrics.jsonl", "samples/step_000001.jsonl", "samples/step_000002.jsonl"]


def test_what_the_last_upload_lacks_is_an_error_and_stays_on_the_disk(folder, bucket):
    writer = Writer(folder, configured(**{"log.trackers": ()}))
    writer.write(1, {"loss": 1.0})
    bucket.fault(status=403, method="POST")
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written \(Forbidden"):
        writer.close()
    assert bucket.read("metrics.jsonl") == ""
    kept = kept_in("lines", folder / "metrics.jsonl")
    assert json.loads(kept.read_text()) == {"step": 1, "loss": 1.0}


def test_who_lost_the_lock_writes_nothing_over_the_rows_of_who_has_it(folder, bucket):
    """Neither at the next upload, nor at the end."""
    lost, board = r"\.lock: another run took this folder", configured(**{"log.trackers": ("tensorboard",)})
    with pytest.raises(RunError, match=lost), workdirs.locked(folder) as check, Writer(folder, board) as writer:
        writer.write(1, {"loss": 1.0})
        theirs = {"token": "t", "number": 1, "process": 7, "host": "elsewhere", "machine": "another"}
        bucket.write(".lock", json.dumps(theirs))
        bucket.write("metrics.jsonl", '{"step": 1}\n' * 3)
        with pytest.raises(RunError, match=lost):
            until = time.monotonic() + 20
            while time.monotonic() < until:
                check()
                time.sleep(0.05)
        (kept_in("spool", folder) / "profile").write_text("large")
        for write in (
            writer.sync,
            lambda: write_rows(folder / "samples" / "step_000001.jsonl", [{}]),
            lambda: upload_folder(kept_in("spool", folder), folder / "export"),
            lambda: remove_tree(folder),
            lambda: move_tree(folder / "metrics.jsonl", folder / "damaged_checkpoints"),
        ):
            with pytest.raises(RunError, match=lost):
                write()
    assert bucket.names() == [".lock", "metrics.jsonl"] and bucket.read("metrics.jsonl").count("\n") == 3
    assert json.loads(bucket.read(".lock")) == theirs
    assert json.loads(kept_in("lines", folder / "metrics.jsonl").read_text())["loss"] == 1.0
    write_rows(folder / "samples" / "step_000001.jsonl", [{}])  # of a later run of this process


def state():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    return {"params": {"x": jax.device_put(x, NamedSharding(mesh, PartitionSpec()))}}


@pytest.mark.parametrize("kind", [None, "bucket", "s3_bucket"])
def test_first_weights_that_a_killed_launch_left_are_replaced(kind, request, tmp_path):
    """A warm start that is made again may end with other floats, and pi_ref is the policy that this one ends with."""
    place = path_of("--workdir X", request.getfixturevalue(kind).address) if kind else tmp_path
    c, mesh = whole_runs.settings(), sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    policy = open_policy(c.model)
    launches = [policy.load(mesh, seed, "float32") for seed in (0, 1)]
    for params in (*launches, None):  # the last one is a resume
        read = weights.first(c, policy, place, mesh, "float32", Console(), params)
    assert all(np.array_equal(read[path], value) for path, value in launches[1].items())


@pytest.mark.slow
def test_checkpoints_are_kept_and_damaged_ones_set_aside(folder, bucket):
    settings = config_lib.CheckpointConfig(every=1, keep=2)
    saved = state()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
    with checkpoint.Checkpointer(folder, settings) as store:
        for step in (1, 2, 3):
            store.save(step, saved, {"step": step})
    # A kill leaves a checkpoint without its last file; one that has it may lack another.
    bucket.write("checkpoints/4/state/d/1", "not finished")
    bucket._files.rm_file(bucket / "checkpoints/3/state/manifest.ocdbt")
    assert checkpoint_reading.saved_step(folder) == 3
    with checkpoint.Checkpointer(folder, settings) as store:
        step, restored, meta = store.restore(abstract)
    assert step == 2 and meta == {"step": 2}
    assert np.array_equal(restored["params"]["x"], saved["params"]["x"])
    # Orbax removes what is unfinished in a thread, which it waits for before the next save alone.
    rest = lambda: [name for name in bucket.names() if re.match("checkpoints/[^2]", name)]
    until = time.monotonic() + 60
    while rest() and time.monotonic() < until:
        time.sleep(0.1)
    assert rest() == []
    assert any(name.startswith("damaged_checkpoints/3.1/state/") for name in bucket.names())
    assert checkpoint_reading.saved_step(folder) == 2


ANY, ARRAYS = {"path": ""}, {"path": "/d/"}  # any requests, and those of tensorstore for the arrays


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503, **ARRAYS},
        *(
            pytest.param(fault, marks=pytest.mark.proof)
            for fault in ({"drop": True, **ARRAYS}, {"status": 503, **ANY}, {"drop": True, **ANY})
        ),
    ],
    ids=str,
)
def test_a_checkpoint_is_saved_and_read_where_the_bucket_fails_for_now(folder, bucket, fault):
    settings, saved = config_lib.CheckpointConfig(every=1), state()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
    with checkpoint.Checkpointer(folder, settings) as store:
        bucket.fault(method="POST", times=1, **fault)
        store.save(1, saved, {"step": 1})
        store.wait()
        assert bucket.met()["ended"] == 1
    with checkpoint.Checkpointer(folder, settings) as store:
        bucket.fault(method="GET", times=1, **fault)
        step, restored, meta = store.restore(abstract)
        assert bucket.met()["ended"] == 1
    assert step == 1 and meta == {"step": 1} and np.array_equal(restored["params"]["x"], saved["params"]["x"])


def test_a_checkpoint_that_the_bucket_refuses_ends_the_run(folder, bucket):
    settings = config_lib.CheckpointConfig(every=1)
    store = checkpoint.Checkpointer(folder, settings)
    store.save(1, state(), {})
    store.wait()
    bucket.fault(status=403, method="POST", path="checkpoints")
    message = r"checkpoints: step 2 could not be written \(.*resumes from step 1"
    with pytest.raises(RunError, match=message):
        store.save(2, state(), {})
        store.wait()
    with pytest.raises(RunError, match=message):
        store.close()
    bucket.fault()
    assert checkpoint_reading.saved_step(folder) == 1


def check_equal(bucket, reference):
    """The run in a bucket has the rows, samples and last state of the run in a folder."""
    copy, settings = runs.local_copy(bucket.address), whole_runs.settings()
    whole_runs.check_same_rows(whole_runs.rows(copy), whole_runs.rows(reference))
    assert whole_runs.samples(copy) == whole_runs.samples(reference)
    places = (path_of("", bucket.address), reference)
    mine, theirs = (whole_runs.final_state(path, settings) for path in places)
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow(seconds=15)
def test_a_run_in_a_bucket_goes_on_and_equals_one_in_a_folder(whole, folder, bucket, tmp_path):
    reference, _ = whole
    whole_runs.rewind(reference, tmp_path / "run", step=4)
    for part in (tmp_path / "run" / "checkpoints").iterdir():
        for path in (part, part / "state", part / "meta", part / "metrics"):
            if path.is_dir():
                (path / "commit_success.txt").write_text("")  # as orbax does in a bucket
    for name in ("tensorboard", "profile"):
        shutil.rmtree(tmp_path / "run" / name)
    bucket.put(tmp_path / "run")
    printed = whole_runs.run(tmp_path, bucket.address)
    assert "resumed after 4" in printed and f"checkpoints             {bucket.address}/checkpoints" in printed
    check_equal(bucket, reference)
    assert ".lock" not in bucket.names() and ending.FILE in bucket.names()
    (run,) = runs.read([runs.local_copy(bucket.address)])
    assert run.steps == [1, 2, 3, 4, 5] and run.notes == []


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_a_run_in_a_bucket_that_is_stopped_goes_on_elsewhere_and_equals_one_in_a_folder(
    whole, kind, request, monkeypatch, tmp_path
):
    """SIGTERM comes after step 3, at which no checkpoint is due. The second machine has no copies of anything."""
    inject = """
def stopped(self, step, *rest):
    report(self, step, *rest)
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
report, Run.report = Run.report, stopped
"""
    bucket, (reference, _) = request.getfixturevalue(kind), whole
    done = whole_runs.faulty(inject, tmp_path, bucket.address)
    assert done.returncode == 75, done.stderr
    assert f"preempted: step 3 of 5 is saved in {bucket.address}; the same command resumes from there" in done.stderr
    assert "checkpoints/3/commit_success.txt" in bucket.names() and ".lock" not in bucket.names()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another_machine"))
    assert "resumed after 3" in whole_runs.run(tmp_path, bucket.address)
    check_equal(bucket, reference)
    steps = {name.split("/")[1] for name in bucket.names() if name.startswith("checkpoints/")}
    assert {"4", "5"} <= steps and "3" not in steps


@pytest.mark.proof
def test_a_run_that_is_killed_before_the_last_file_of_an_upload_goes_on_from_the_step_before(
    whole, s3_bucket, tmp_path
):
    """Its own local folder has the step that the bucket lacks, which is dropped."""
    inject = """
from igrpo_jax.outputs import checkpoint_mirror
def killed(path, text):
    if path.parent.name == "4":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)
write, checkpoint_mirror.write_text = checkpoint_mirror.write_text, killed
"""
    done = whole_runs.faulty(inject, tmp_path, s3_bucket.address)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {name for name in s3_bucket.names() if name.startswith("checkpoints/4/")}
    assert left and "checkpoints/4/commit_success.txt" not in left
    assert "resumed after 2" in whole_runs.run(tmp_path, s3_bucket.address)
    check_equal(s3_bucket, whole[0])
    assert {"checkpoints/4/commit_success.txt", "checkpoints/5/commit_success.txt"} <= set(s3_bucket.names())


@pytest.mark.proof
@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_a_run_in_a_bucket_is_drawn_exported_evaluated_and_asked(whole, kind, request, tmp_path, capsys):
    """The same report, the same weights and the same answers as of the run in a folder."""
    bucket, (reference, _) = request.getfixturevalue(kind), whole
    bucket.put(reference)
    elsewhere = f"{bucket.address}_exported"

    def called(command, *flags):
        command.main([command.__name__.rpartition(".")[2], *flags])
        return capsys.readouterr().out

    reports = {
        str(run): called(draw, f"--workdir={run}", f"--out={out}").splitlines()[:-1]
        for run, out in ((bucket.address, bucket / "report"), (reference, tmp_path / "report"))
    }
    drawn, expected = ([line.partition(": ")[2] for line in lines] for lines in reports.values())
    assert drawn == expected and "report/index.html" in bucket.names()
    called(export, f"--workdir={bucket.address}", f"--out={elsewhere}")
    called(export, f"--workdir={reference}", f"--out={tmp_path / 'export'}")
    files = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    assert {name: path_of("", f"{elsewhere}/{name}").read_bytes() for name in files} == files
    sizes = ("--config.rollout.slots=8", "--config.evaluation.max_completion_length=12")
    for model, out in ((bucket.address, f"{bucket.address}_evaluated"), (reference, tmp_path / "evaluated")):
        given = (f"--model={model}", "--benchmarks=arithmetic", "--samples=2", f"--workdir={out}")
        called(evaluate, *given, "--config.rollout.slots=8")
    rows = (tmp_path / "evaluated" / "arithmetic.jsonl").read_bytes()
    assert rows.count(b"\n") == 8 and path_of("", f"{bucket.address}_evaluated/arithmetic.jsonl").read_bytes() == rows
    asked = [called(generate, f"--model={model}", "--prompt=1+2", *sizes) for model in (bucket.address, reference)]
    answers = [text.rpartition("1+2")[2] for text in asked]
    assert answers[0] == answers[1] and "answer 1: " in answers[0]
