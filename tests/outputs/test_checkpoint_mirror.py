"""Checkpoints in S3, which orbax writes to a local folder: what the bucket holds whenever a process is killed."""

import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from igrpo_jax import config as config_lib
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.outputs import checkpoint, checkpoint_mirror, checkpoint_reading
from igrpo_jax.storage import reading
from igrpo_jax.storage.addresses import path_of
from igrpo_jax.storage.reading import kept_in

EVERY_STEP = config_lib.CheckpointConfig(every=1, keep=2)
MARKER = "commit_success.txt"


@pytest.fixture
def folder(s3_bucket):
    return path_of("--workdir X", s3_bucket.address)


@pytest.fixture
def fetched(monkeypatch):
    """The names of the objects that are fetched, below the folder of checkpoints."""
    names, fetch = [], reading._fetch_file
    below = lambda path: str(path).partition("/checkpoints/")[2]
    monkeypatch.setattr(reading, "_fetch_file", lambda path, *rest: names.append(below(path)) or fetch(path, *rest))
    return names


def state(value):
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4) + value
    return {"params": {"x": jax.device_put(x, NamedSharding(mesh, PartitionSpec()))}}


ABSTRACT = jax.eval_shape(lambda: {"params": {"x": jnp.zeros((3, 4))}})


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def saved(folder, *steps, settings=EVERY_STEP):
    with checkpoint.Checkpointer(folder, settings) as store:
        for step in steps:
            store.save(step, state(step), {"step": step})


def restored(folder):
    with checkpoint.Checkpointer(folder, EVERY_STEP) as store:
        step, read, meta = store.restore(abstract())
    assert meta == {"step": step} and np.array_equal(read["params"]["x"], state(step)["params"]["x"])
    return step


def steps_of(bucket):
    return sorted({name.split("/")[1] for name in bucket.names() if name.startswith("checkpoints/")})


@pytest.mark.slow
def test_the_bucket_has_what_the_folder_has_and_each_is_fetched_where_it_is_not(
    folder, s3_bucket, fetched, monkeypatch, tmp_path
):
    saved(folder, 1, 2, 3)
    assert steps_of(s3_bucket) == ["2", "3"] and f"checkpoints/3/{MARKER}" in s3_bucket.names()
    assert restored(folder) == 3 and fetched == []  # this machine wrote it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another_machine"))
    assert restored(folder) == 3 and {name.split("/")[0] for name in fetched} == {"2", "3"}
    saved(folder, 4)
    assert steps_of(s3_bucket) == ["3", "4"]
    # The first machine has copies of its own, and takes those that the bucket has.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fetched.clear()
    assert restored(folder) == 4 and {name.split("/")[0] for name in fetched} == {"4"}
    assert {path.name for path in kept_in(checkpoint_mirror.WRITTEN, folder / "checkpoints").iterdir()} == {"3", "4"}


def test_a_reader_fetches_the_step_that_it_reads(folder, s3_bucket, fetched):
    saved(folder, 1, 2)
    with pytest.raises(InputError, match="holds no checkpoint of it; it has steps 1, 2"):
        checkpoint_reading.saved_step(folder, 3)
    assert checkpoint_reading.saved_step(folder) == 2 and fetched == []
    params = checkpoint_reading.read_params(folder, 1, abstract()["params"])
    assert np.array_equal(params["x"], state(1)["params"]["x"])
    assert {name.split("/")[0] for name in fetched} == {"1"}
    # What has left the bucket leaves the disk with the next step that is read.
    saved(folder, 3)
    checkpoint_reading.read_params(folder, 3, abstract()["params"])
    assert [path.name for path in kept_in(checkpoint_mirror.READ, folder / "checkpoints").iterdir()] == ["3"]
    with pytest.raises(InputError, match="is not the folder of a run"):
        checkpoint_reading.saved_step(folder / "none")


class Killed(BaseException):
    """What ends a thread at once, as SIGKILL does: nothing of ours catches it."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_kill_before_the_last_file_leaves_the_step_before(folder, s3_bucket, monkeypatch):
    def kill(*_):
        raise Killed

    saved(folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_mirror, "write_text", kill)
        saved(folder, 2)
    leftover = [name for name in s3_bucket.names() if name.startswith("checkpoints/2/state/d/")]
    assert leftover and steps_of(s3_bucket) == ["1", "2"] and f"checkpoints/2/{MARKER}" not in s3_bucket.names()
    assert checkpoint_reading.saved_step(folder) == 1 and restored(folder) == 1
    saved(folder, 3)
    assert steps_of(s3_bucket) == ["1", "3"]
    # The same step again: none of the files of the killed upload stay among the new ones.
    s3_bucket.write("checkpoints/4/state/d/of_a_killed_upload", "x")
    saved(folder, 4)
    assert steps_of(s3_bucket) == ["3", "4"] and restored(folder) == 4
    assert "checkpoints/4/state/d/of_a_killed_upload" not in s3_bucket.names()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_kill_while_an_old_step_is_removed_leaves_no_checkpoint_without_files(folder, s3_bucket, monkeypatch):
    saved(folder, 1, 2)
    remove = checkpoint_mirror.remove_tree

    def half(path):
        if str(path).startswith("s3://") and path.name == "1":
            raise Killed
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_mirror, "remove_tree", half)
        saved(folder, 3)
    assert steps_of(s3_bucket) == ["1", "2", "3"] and f"checkpoints/1/{MARKER}" not in s3_bucket.names()
    assert checkpoint_reading.saved_step(folder) == 3


def test_the_steps_of_a_run_that_took_the_place_of_this_one_stay(folder, s3_bucket):
    """This one was cut off from the bucket for longer than its lock lasts, and notices that before its next save."""
    with checkpoint.Checkpointer(folder, EVERY_STEP) as store:
        store.save(1, state(1), {})
        store.wait()
        s3_bucket.write("checkpoints/8/state/d/x", "of the other run")
        s3_bucket.write("checkpoints/9/state/d/x", "of the other run")
        s3_bucket.write(f"checkpoints/9/{MARKER}", "of the other run")
        for step in (2, 3):
            store.save(step, state(step), {})
    assert steps_of(s3_bucket) == ["2", "3", "8", "9"]


def test_an_upload_does_not_hold_up_training_and_comes_after_the_rows(folder, s3_bucket, monkeypatch):
    may_go_on, upload = threading.Event(), checkpoint_mirror.upload_folder

    def slow(*args):
        may_go_on.wait(5)
        upload(*args)

    monkeypatch.setattr(checkpoint_mirror, "upload_folder", slow)
    with checkpoint.Checkpointer(folder, EVERY_STEP) as store:
        assert store.save(1, state(1), {"step": 1}, before=lambda: s3_bucket.write("metrics.jsonl", "{}"))
        assert store.latest_step() == 1 and s3_bucket.names() == ["metrics.jsonl"]
        may_go_on.set()
        store.wait()
        assert f"checkpoints/1/{MARKER}" in s3_bucket.names()


def test_an_upload_that_fails_ends_the_run(folder, s3_bucket, monkeypatch):
    """Also where the disk has only the step that was not uploaded, and the bucket the one before."""
    settings = config_lib.CheckpointConfig(every=1, keep=1)
    saved(folder, 1, settings=settings)

    def refuse(*_):
        raise PermissionError(13, "Access Denied")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_mirror, "upload_folder", refuse)
        store = checkpoint.Checkpointer(folder, settings)
        store.save(2, state(2), {})
        with pytest.raises(
            RunError, match=r"checkpoints: step 2 could not be written \(.*Denied\).* resumes from step 1"
        ):
            store.close()
    assert restored(folder) == 1


def test_files_that_did_not_arrive_whole_are_no_checkpoint(folder, s3_bucket, monkeypatch):
    upload = checkpoint_mirror.upload_folder

    def cut(source, target):
        upload(source, target)
        s3_bucket.write(f"checkpoints/{target.name}/meta/metadata", "{")

    monkeypatch.setattr(checkpoint_mirror, "upload_folder", cut)
    with pytest.raises(RunError, match=r"step 1 could not be written \(.*meta/metadata is not in the bucket as it was"):
        saved(folder, 1)
    assert f"checkpoints/1/{MARKER}" not in s3_bucket.names()


def flipped(data):
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_in_the_bucket(folder, s3_bucket):
    saved(folder, 1, 2)
    s3_bucket.write("checkpoints/2/meta/metadata", "{")
    with pytest.raises(InputError, match=r"its checkpoint of step 2 can't be used"):
        checkpoint_reading.read_params(folder, 2, abstract()["params"])
    with checkpoint.Checkpointer(folder, EVERY_STEP) as store:
        assert store.restore(abstract())[0] == 1
        assert steps_of(s3_bucket) == ["1"]
        assert s3_bucket.read("damaged_checkpoints/2.1/meta/metadata") == "{"
        assert store.save(2, state(2), {"step": 2})
    assert restored(folder) == 2


def test_a_copy_that_the_disk_has_spoilt_is_fetched_again(folder, s3_bucket):
    saved(folder, 1, 2)
    checkpoint_reading.read_params(folder, 2, abstract()["params"])
    for kind in (checkpoint_mirror.WRITTEN, checkpoint_mirror.READ):
        copy = kept_in(kind, folder / "checkpoints") / "2"
        for file in [*(copy / "state").rglob("*"), copy / "meta" / "metadata"]:
            if file.is_file():
                file.write_bytes(flipped(file.read_bytes()))
    assert np.array_equal(checkpoint_reading.read_params(folder, 2, abstract()["params"])["x"], state(2)["params"]["x"])
    assert restored(folder) == 2 and steps_of(s3_bucket) == ["1", "2"]


def test_a_bucket_that_cannot_be_read_damages_nothing(folder, s3_bucket, monkeypatch):
    saved(folder, 1, 2)
    shutil.rmtree(kept_in(checkpoint_mirror.WRITTEN, folder / "checkpoints"))
    store = checkpoint.Checkpointer(folder, EVERY_STEP)

    def refuse(*_):
        raise PermissionError(13, "Access Denied")

    with store, monkeypatch.context() as patch:
        patch.setattr(reading, "_objects", refuse)
        with pytest.raises(InputError, match=r"checkpoints/2: cannot be read \(Access Denied\)"):
            store.restore(abstract())
        patch.setattr(checkpoint_mirror, "finished", refuse)
        with pytest.raises(InputError, match=r"checkpoints: cannot be read \(Access Denied\)"):
            checkpoint_reading.saved_step(folder)
    assert restored(folder) == 2


def test_the_local_disk_needs_room(folder, monkeypatch):
    with checkpoint.Checkpointer(folder, EVERY_STEP) as store:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(RunError, match=r"cache/.*/checkpoints: a checkpoint takes 0.0 MiB, and 0.0 MiB are free"):
            store.save(1, state(1), {})
