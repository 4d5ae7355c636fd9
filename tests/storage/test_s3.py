"""`s3://`: texts, files that grow, locks and copies, against moto's stand-in of the service on localhost."""

import pytest
from model_files import error_of

from igrpo_jax.storage import addresses, reading
from igrpo_jax.storage import lease as leases
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


def test_a_bucket_of_s3_that_does_not_exist_is_said_to_be_missing(folder):
    fix = "there is no bucket s3://nobucket; correct the name, or create it: aws s3 mb s3://nobucket"
    for address in ("s3://nobucket/runs/x", "s3://nobucket"):
        assert error_of(path_of, "--model X", address) == f"--model X: {fix}"


def test_an_outage_that_s3fs_gives_up_on_is_waited_for(folder, monkeypatch):
    """As s3fs reports it: answers become errors of the system, what happens to connections stays."""
    from aiohttp import ClientOSError
    from botocore import exceptions
    from s3fs.errors import translate_boto_error

    def answer(status, code):
        response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return translate_boto_error(exceptions.ClientError(response, "PutObject"))

    busy = [answer(503, "SlowDown"), answer(500, "InternalError"), answer(400, "RequestTimeout"), answer(429, "Busy")]
    cut = [
        exceptions.EndpointConnectionError(endpoint_url="x"),
        exceptions.ReadTimeoutError(endpoint_url="x"),
        ClientOSError(104, "Connection reset by peer"),
    ]
    errors = busy + cut

    def write():
        if errors:
            raise errors.pop()
        return "there"

    waited = []
    monkeypatch.setattr(addresses.time, "sleep", waited.append)
    assert addresses.patiently(folder, write) == "there" and len(waited) == 7
    for refused in (answer(403, "AccessDenied"), answer(404, "NoSuchBucket"), exceptions.NoCredentialsError()):
        errors.append(refused)
        with pytest.raises(type(refused)):
            addresses.patiently(folder, write)
    assert len(waited) == 7
