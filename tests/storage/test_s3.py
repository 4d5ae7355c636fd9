"""`s3://`: texts, files that grow, locks and copies, against moto's stand-in of the service on localhost."""

import pytest
from model_files import error_of

from igrpo_jax.storage import lease as leases
from igrpo_jax.storage import reading
from igrpo_jax.storage import writing as writes
from igrpo_jax.storage.addresses import filesystem, names, path_of
from igrpo_jax.storage.lease import Held, Lease
from igrpo_jax.storage.writing import Lines, move_tree, remove_tree, write_text


@pytest.fixture
def folder(s3_bucket, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED", 0.1)
    monkeypatch.setattr(leases, "SETTLED", 0.01)
    return path_of("--workdir X", s3_bucket / "run")


def test_what_lies_in_a_bucket_of_s3(folder, monkeypatch):
    write_text(folder / "config.json", "{}")
    monkeypatch.setattr(writes, "EVERY", 1e9)
    lines = Lines(folder / "metrics.jsonl", "0\n")
    lines.add("1")
    assert reading.read_bytes(folder / "metrics.jsonl") == b"0\n"
    lines.close()
    assert reading.read_bytes(folder / "metrics.jsonl") == b"0\n1\n"
    assert names(folder) == {"config.json", "metrics.jsonl"} and names(folder / "nothing") == set()

    lock = Lease(folder / ".lock")
    lock.acquire()
    with pytest.raises(Held, match=r"process \d+ on "):
        Lease(folder / ".lock").acquire()
    with pytest.raises(FileExistsError):  # of several that ask at once and have seen that there is none
        filesystem(folder).pipe_file(str(folder / ".lock"), b"another", mode="create")
    lock.check()
    lock.release()
    assert ".lock" not in names(folder)

    copy = reading.local("--model X", str(folder))
    assert {file.name: file.read_text() for file in copy.iterdir()} == {"config.json": "{}", "metrics.jsonl": "0\n1\n"}
    write_text(folder / "config.json", "[]")
    (folder / "metrics.jsonl").unlink()
    assert {file.name: file.read_text() for file in reading.local("--model X", str(folder)).iterdir()} == {
        "config.json": "[]"
    }
    move_tree(folder, folder.parent / "moved")
    assert names(folder) == set() and names(folder.parent / "moved") == {"config.json"}
    remove_tree(folder.parent / "moved")
    assert "there is nothing at this address" in error_of(reading.local, "--model X", str(folder.parent / "moved"))
