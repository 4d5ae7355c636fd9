"""What is written into a bucket, against a storage service on localhost, and with faults."""

import os
import signal
import subprocess
import sys

import pytest

from igrpo_jax.errors import InputError, RunError
from igrpo_jax.outputs.files import write_rows, writing
from igrpo_jax.rewards.verdicts import Verdicts
from igrpo_jax.storage import addresses
from igrpo_jax.storage import writing as writes
from igrpo_jax.storage.addresses import path_of
from igrpo_jax.storage.writing import Lines, Spool, move_tree, remove_tree, write_text


@pytest.fixture
def folder(bucket):
    return path_of("--workdir X", bucket.address)


def test_a_text_is_one_object(folder, bucket):
    write_text(folder / "a" / "b.json", "é \udc80\n")
    assert bucket.names() == ["a/b.json"] and bucket.read("a/b.json") == "é \\udc80\n"
    write_text(folder / "a" / "b.json", "new")
    assert bucket.read("a/b.json") == "new"


def test_lines_are_uploaded_as_whole_files(folder, bucket, monkeypatch):
    monkeypatch.setattr(writes, "EVERY", 3600.0)
    lines = Lines(folder / "metrics.jsonl", "0\n")
    lines.add("1")
    lines.add("2")
    assert bucket.read("metrics.jsonl") == "0\n"
    lines.sync()
    assert bucket.read("metrics.jsonl") == "0\n1\n2\n"
    lines.add("3")
    lines.close()
    assert bucket.read("metrics.jsonl") == "0\n1\n2\n3\n"
    monkeypatch.setattr(writes, "EVERY", 0.0)
    lines = Lines(folder / "metrics.jsonl", "")
    assert bucket.read("metrics.jsonl") == ""  # a resume drops what it writes again
    lines.add("1")
    assert bucket.read("metrics.jsonl") == "1\n"
    lines.close()


def test_a_file_that_is_removed_while_it_grows_is_noticed(tmp_path):
    """Lines can still be added to it, and would be gone when it is closed."""
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.add("1")
    lines.sync()
    (tmp_path / "metrics.jsonl").unlink()
    lines.add("2")
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        lines.sync()
    lines.close()


def test_a_spool_brings_what_changed_and_begins_with_what_is_kept(folder, bucket, monkeypatch):
    bucket.write("wandb/run_id", "abc")
    bucket.write("samples/step_000001.jsonl", "{}")
    spool = Spool(folder, ["*/run_id"])
    assert (spool.folder / "wandb/run_id").read_text() == "abc" and not (spool.folder / "samples").exists()
    (spool.folder / "tensorboard").mkdir()
    (spool.folder / "tensorboard/events").write_text("1")
    spool.push()
    assert bucket.read("tensorboard/events") == "1"
    (spool.folder / "tensorboard/events").write_text("12")
    uploaded, upload = [], writes.upload
    monkeypatch.setattr(writes, "upload", lambda file, path: uploaded.append(file.name) or upload(file, path))
    spool.push()
    assert bucket.read("tensorboard/events") == "12" and uploaded == ["events"]  # nothing that has not changed
    assert sorted(path.name for path in Spool(folder).folder.iterdir()) == []


def test_folders_are_moved_and_removed(folder, bucket):
    for name in ("checkpoints/3/meta", "checkpoints/3/d/x", "checkpoints/30/meta"):
        bucket.write(name, name)
    move_tree(folder / "checkpoints/3", folder / "damaged_checkpoints/3.1")
    assert bucket.names() == ["checkpoints/30/meta", "damaged_checkpoints/3.1/d/x", "damaged_checkpoints/3.1/meta"]
    assert bucket.read("damaged_checkpoints/3.1/d/x") == "checkpoints/3/d/x"
    remove_tree(folder / "damaged_checkpoints")
    remove_tree(folder / "nothing")
    assert bucket.names() == ["checkpoints/30/meta"]


def test_the_file_that_says_that_all_are_there_is_uploaded_last(folder, bucket, tmp_path, monkeypatch):
    (tmp_path / "export" / "parts").mkdir(parents=True)
    for name in ("config.json", "parts/1.bin", "parts/2.bin", "weights.bin"):
        (tmp_path / "export" / name).write_text(name)
    uploaded, upload = [], writes.upload
    monkeypatch.setattr(writes, "upload", lambda file, path: upload(file, path) or uploaded.append(file.name))
    writes.upload_folder(tmp_path / "export", folder, last=("config.json",))
    assert sorted(uploaded[:3]) == ["1.bin", "2.bin", "weights.bin"] and uploaded[3:] == ["config.json"]
    assert bucket.names() == ["config.json", "parts/1.bin", "parts/2.bin", "weights.bin"]


def test_what_another_has_removed_meanwhile_is_removed(folder, bucket, monkeypatch):
    bucket.write("checkpoints/3/meta", "x")
    service = addresses.filesystem(folder)
    find = service.find

    def late(path):
        found = find(path)
        bucket.remove("checkpoints/3/meta")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(service, "find", late)
        remove_tree(folder / "checkpoints/3")
    assert bucket.names() == []


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"drop": True}, {"seconds": 0.5}], ids=str)
def test_what_fails_for_now_is_written_in_the_end(folder, bucket, fault):
    bucket.fault(times=1, method="POST", **fault)
    write_text(folder / "x.json", "text")
    assert bucket.read("x.json") == "text"


def test_an_outage_that_the_library_gives_up_on_is_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(addresses.time, "sleep", lambda seconds: None)
    errors = [ConnectionResetError("gone"), TimeoutError("late")]

    def upload():
        if errors:
            raise errors.pop()
        return "there"

    assert addresses.patiently(tmp_path, upload) == "there"
    monkeypatch.setattr(addresses, "PATIENCE", 0.0)
    errors.append(ConnectionResetError("gone"))
    with pytest.raises(ConnectionResetError):
        addresses.patiently(tmp_path, upload)


def test_an_outage_of_credentials_is_waited_for(monkeypatch, tmp_path):
    """They are renewed every hour, by a service of their own or by the metadata server of a machine in the cloud."""
    exceptions = pytest.importorskip("google.auth.exceptions", reason="google-auth is missing; gcsfs brings it")
    waited = []
    monkeypatch.setattr(addresses.time, "sleep", waited.append)
    errors = [exceptions.TransportError("no route"), exceptions.RefreshError("503")]

    def upload():
        if errors:
            raise errors.pop()
        return "there"

    assert addresses.patiently(tmp_path, upload) == "there" and len(waited) == 2
    errors.append(exceptions.DefaultCredentialsError("log in"))
    with pytest.raises(exceptions.DefaultCredentialsError):
        addresses.patiently(tmp_path, upload)


def test_a_guard_is_asked_before_each_attempt(folder, bucket, monkeypatch):
    """A folder is lost while an upload is tried again and again."""
    monkeypatch.setattr(addresses.time, "sleep", lambda seconds: None)
    asked, errors = [], [ConnectionResetError("gone"), ConnectionResetError("gone")]
    service = addresses.filesystem(folder)
    pipe = service.pipe_file

    def check():
        asked.append(len(errors))
        if not errors:
            raise RunError("another run took this folder")

    def cut(*args):
        if errors:
            raise errors.pop()
        pipe(*args)

    with monkeypatch.context() as patch, writes.guarded(folder, check):
        patch.setattr(service, "pipe_file", cut)
        with pytest.raises(RunError, match="took this folder"):
            write_text(folder / "x.json", "mine")
        write_text(folder.parent / f"{folder.name}_beside.json", "not in it")
    assert asked == [2, 1, 0] and bucket.names() == []


def test_a_quota_that_is_full_names_the_file_and_loses_nothing(folder, bucket, monkeypatch):
    monkeypatch.setattr(writes, "EVERY", 0.0)
    lines = Lines(folder / "metrics.jsonl", "0\n")
    bucket.fault(status=403, method="POST")
    with (
        pytest.raises(RunError, match=r"^gs://bucket/.*metrics\.jsonl: cannot be written \(Forbidden: .* fix this"),
        writing(lines.path),
    ):
        lines.add("1")
    with pytest.raises(RunError, match=r"x\.jsonl: cannot be written \(Forbidden"):
        write_rows(folder / "x.jsonl", [{"a": 1}])
    assert bucket.names() == ["metrics.jsonl"] and bucket.read("metrics.jsonl") == "0\n"  # the old file, whole
    bucket.fault()
    lines.sync()
    assert bucket.read("metrics.jsonl") == "0\n1\n"
    lines.close()


@pytest.mark.slow(seconds=9)
@pytest.mark.parametrize(
    ("way", "request_path"),
    [
        ("upload(file, path)", "upload_id"),
        pytest.param("write_text(path, text)", "/upload/", marks=pytest.mark.proof),
    ],
)
def test_a_kill_in_the_middle_of_an_upload_leaves_the_old_file(folder, bucket, tmp_path, way, request_path):
    """The service has read half of the body, and the rest is more than the system keeps for a process that is gone."""
    write_text(folder / "metrics.jsonl", "old\n")
    bucket.fault(seconds=6.0, path=request_path, times=1)  # in which a busy machine must get to the kill
    code = f"""
from pathlib import Path
from igrpo_jax.storage.addresses import path_of
from igrpo_jax.storage.writing import upload, write_text
file, text, path = Path({str(tmp_path / "new")!r}), "new" * 10 * 2**20, path_of("", {bucket / "metrics.jsonl"!r})
file.write_text(text)
{way}
"""
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ) as process:
        bucket.wait_for("begun")
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    bucket.wait_for("ended")
    assert bucket.read("metrics.jsonl") == "old\n"


def test_two_runs_that_share_a_file_of_verdicts_keep_both_their_own(folder, bucket):
    """They are on one machine here. An empty file is none."""
    bucket.write("judge.sqlite", "")
    both = [Verdicts(folder / "judge.sqlite") for _ in range(2)]
    for number, verdicts in enumerate(both):
        verdicts.put(str(number), number / 4)
        verdicts.save(every=0.0)
    both[0].put("2", 0.5)
    for verdicts in both:
        verdicts.close()
    again = Verdicts(folder / "judge.sqlite")
    assert [again.get(str(number)) for number in range(4)] == [0.0, 0.25, 0.5, None]
    again.close()


def test_verdicts_of_a_judge_are_kept_in_a_bucket(folder, bucket):
    verdicts = Verdicts(folder / "judge.sqlite")
    verdicts.put("a", 0.5)
    verdicts.save()  # too early
    assert bucket.names() == []
    verdicts.save(every=0.0)
    verdicts.put("b", 1.0)
    verdicts.close()
    again = Verdicts(folder / "judge.sqlite")
    assert (again.get("a"), again.get("b"), again.get("c")) == (0.5, 1.0, None)
    bucket.fault(status=403, method="POST")
    again.put("c", 0.0)
    again.close()  # a warning
    bucket.fault()
    assert Verdicts(folder / "judge.sqlite").get("c") is None
    bucket.write("judge.sqlite", "no database")
    with pytest.raises(
        InputError, match=r"config.rewards.judge.cache = 'gs://.*cannot be used as the file of verdicts"
    ):
        Verdicts(folder / "judge.sqlite")
