"""What is fetched from a bucket, against a storage service on localhost."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import buckets
import pytest
from model_files import error_of

from igrpo_jax.config import EvaluationConfig
from igrpo_jax.data import problems, readers
from igrpo_jax.errors import InputError
from igrpo_jax.models import hf_files, hf_paths
from igrpo_jax.storage import addresses, reading, writing

SOURCE = "--model X"


def test_local_paths_stay_as_they_are(tmp_path):
    assert reading.local(SOURCE, tmp_path / "x") == tmp_path / "x"
    assert addresses.path_of(SOURCE, "a/b").parts == ("a", "b")
    assert not addresses.is_remote("runs/gs:/x")


def test_the_home_folder_is_read_as_shells_do(tmp_path, monkeypatch):
    """Who gives --workdir=~/run means the home folder, which bash reads only where ~ begins a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert addresses.path_of(SOURCE, "~/runs/a") == addresses.path_of(SOURCE, Path("~/runs/a")) == tmp_path / "runs/a"
    assert addresses.path_of(SOURCE, "a~/b").parts == ("a~", "b") and addresses.path_of(SOURCE, "~no-user/b").parts == (
        "~no-user",
        "b",
    )
    (tmp_path / "x.jsonl").write_text('{"prompt": "p", "answer": "1"}\n')
    assert readers.read("~/x.jsonl", SOURCE) == [(1, {"prompt": "p", "answer": "1"})]
    assert hf_paths.resolve("~/") == tmp_path
    rows = problems.benchmark_rows("x", EvaluationConfig(benchmarks=("x",), data_dir="~"))
    assert [row.question for row in rows] == ["p"]


def test_a_path_of_pathlib_is_an_address_too(bucket):
    path = addresses.path_of(SOURCE, Path(bucket / "x/"))
    assert str(path) == bucket / "x" and addresses.is_remote(path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("az://b/x", f"az:// is not supported; give {addresses.ADDRESSES}"),
        ("s3://b/x", 's3:// needs s3fs; pip install "igrpo_jax[s3]", or give a local folder'),
    ],
)
def test_an_address_that_nothing_reaches(address, message, monkeypatch):
    monkeypatch.setattr(addresses.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        addresses.path_of("--workdir X", address)
    assert str(error.value) == f"--workdir X: {message}"


def test_a_folder_is_fetched_once_and_again_where_it_changes(bucket, monkeypatch):
    bucket.write("model/config.json", "{}")
    bucket.write("model/weights.bin", "1234")
    bucket.write("model/old/config.json", "not wanted")
    fetched = []
    fetch = reading._fetch_file
    monkeypatch.setattr(reading, "_fetch_file", lambda path, *rest: fetched.append(path.name) or fetch(path, *rest))
    wanted = lambda name: "/" not in name
    copy = reading.local(SOURCE, bucket / "model", wanted)
    assert sorted(fetched) == ["config.json", "weights.bin"]
    assert {file.name: file.read_text() for file in copy.iterdir()} == {"config.json": "{}", "weights.bin": "1234"}
    assert reading.local(SOURCE, bucket / "model", wanted) == copy and len(fetched) == 2
    bucket.write("model/weights.bin", "4321")  # as long as before
    bucket._files.rm_file(bucket / "model/config.json")
    reading.local(SOURCE, bucket / "model", wanted)
    assert {file.name: file.read_text() for file in copy.iterdir()} == {"weights.bin": "4321"}
    assert fetched[2:] == ["weights.bin"]
    written = addresses.modified(bucket / "model/weights.bin")  # by which other weights are told, not when fetched
    assert abs((copy / "weights.bin").stat().st_mtime - written) < 1e-4


def test_what_the_disk_has_no_room_for_is_not_fetched(bucket, monkeypatch):
    bucket.write("model/weights.bin", "1234")
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3))
    with pytest.raises(InputError, match=r"cannot be read \(0 MiB to fetch, and .* has 0 MiB free\)"):
        reading.local(SOURCE, bucket / "model")
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4))
    assert (reading.local(SOURCE, bucket / "model") / "weights.bin").read_text() == "1234"


def test_the_copy_of_a_folder_is_no_part_of_that_of_the_folder_above(bucket):
    """A report of a run fetches only some of its files, while an evaluation may be loading the run's export."""
    for name in ("run/export/config.json", "run/samples/1.jsonl", "run/samples/2.jsonl"):
        bucket.write(name, name)
    export = reading.local(SOURCE, bucket / "run/export")
    samples = reading.local(SOURCE, bucket / "run/samples", lambda name: name == "1.jsonl")
    run = reading.local(SOURCE, bucket / "run", lambda name: name.startswith("samples"))
    assert sorted(file.name for file in run.rglob("*") if file.is_file()) == ["1.jsonl", "2.jsonl"]
    assert [file.name for file in samples.iterdir()] == ["1.jsonl"]
    assert (export / "config.json").read_text() == "run/export/config.json"


def test_a_fetch_that_is_cut_leaves_nothing_behind(bucket, monkeypatch):
    bucket.write("train.jsonl", "x" * 1000)
    monkeypatch.setattr(addresses, "PATIENCE", 0.0)
    service = addresses.filesystem(addresses.path_of(SOURCE, bucket / "train.jsonl"))
    get = service.get_file

    def half(path, target, **kwargs):
        get(path, target, **kwargs)
        with open(target, "r+") as file:
            file.truncate(500)

    with monkeypatch.context() as patch:
        patch.setattr(service, "get_file", half)
        with pytest.raises(InputError, match="changes while it is read"):
            reading.local(SOURCE, bucket / "train.jsonl")
    path = addresses.path_of(SOURCE, bucket / "train.jsonl")
    copy = reading.kept_in(reading.apart(path), path)
    assert list(copy.parent.iterdir()) == []
    assert reading.local(SOURCE, bucket / "train.jsonl").read_text() == "x" * 1000


def test_an_object_that_is_replaced_while_it_is_fetched_is_fetched_again(bucket, monkeypatch):
    bucket.write("train.jsonl", "old")
    path = addresses.path_of(SOURCE, bucket / "train.jsonl")
    service, left = addresses.filesystem(path), ["new"]
    get = service.get_file

    def slow(*args, **kwargs):
        get(*args, **kwargs)
        if left:
            bucket.write("train.jsonl", left.pop())

    monkeypatch.setattr(service, "get_file", slow)
    assert reading.local(SOURCE, path).read_text() == "new"


@pytest.mark.parametrize("allowed", [True, False])
def test_a_bucket_is_reached_as_gcsfs_does_by_default_whether_or_not_it_may_ask_for_its_kind(
    bucket, monkeypatch, allowed
):
    """It asks Google's storage control service, of which an account that may read and write can be kept out."""
    path = addresses.path_of(SOURCE, bucket / "x")
    files, refusal = addresses.filesystem(path), pytest.importorskip("google.api_core.exceptions").PermissionDenied
    answer, asked = asyncio.run(buckets.Control().get_storage_layout()), []

    async def layout(self, name, **_):
        asked.append(name)
        if not allowed:
            raise refusal("no")
        return answer

    monkeypatch.setattr(buckets.Control, "get_storage_layout", layout)
    monkeypatch.setattr(files, "_storage_layout_cache", {})
    assert type(files).__name__ == "ExtendedGcsFileSystem"
    writing.write_text(path, "text")
    known = len(asked)
    assert files.cat_file(str(path)) == b"text" and addresses.names(path.parent) == {"x"}
    kind = "NON_HIERARCHICAL" if allowed else "UNKNOWN"
    assert files._sync_lookup_bucket_type("bucket").name == kind
    assert set(asked) == {"projects/_/buckets/bucket/storageLayout"} and (len(asked) == known) == allowed
    writing.remove_tree(path.parent)
    assert bucket.names() == []


def test_nothing_there_and_nothing_allowed(bucket):
    with pytest.raises(InputError, match=r"--model X: there is nothing at this address; give another"):
        reading.local(SOURCE, bucket / "nothing")
    bucket.fault(status=403)
    with pytest.raises(InputError, match=r"--model X: cannot be read \(Forbidden.*log in"):
        reading.local(SOURCE, bucket / "nothing")


def test_an_address_that_was_just_typed_is_asked_for_once(bucket, monkeypatch):
    monkeypatch.setattr(addresses, "patiently", None)
    assert str(addresses.path_of(SOURCE, bucket / "new")) == bucket / "new"
    assert addresses.reason(FileNotFoundError(bucket / "new")) == f"not found: {bucket / 'new'}"


def test_a_bucket_that_does_not_exist_is_said_to_be_missing(bucket):
    fix = (
        "there is no bucket gs://nobucket; correct the name, or create it: gcloud storage buckets create gs://nobucket"
    )
    for address in ("gs://nobucket/runs/x", "gs://nobucket"):
        assert error_of(addresses.path_of, SOURCE, address) == f"{SOURCE}: {fix}"
    assert str(addresses.path_of(SOURCE, "gs://bucket/")) == "gs://bucket"
    bucket.fault(status=403, times=1)
    with pytest.raises(InputError, match="Forbidden"):
        addresses.path_of(SOURCE, bucket / "new")


def test_who_may_see_a_part_of_a_bucket_alone_is_let_in(bucket, monkeypatch):
    service = addresses.filesystem(addresses.path_of(SOURCE, bucket / "new"))
    ls = service.ls

    def refused(path, **options):
        if path == "gs://bucket":
            raise OSError("Forbidden")
        return ls(path, **options)

    monkeypatch.setattr(service, "ls", refused)
    assert str(addresses.path_of(SOURCE, bucket / "new")) == bucket / "new"


@pytest.mark.parametrize("address", ["gs://", "gs:///", "s3://", Path("gs://")])
def test_an_address_without_a_bucket_is_refused(address):
    wanted = f"--workdir X: names no bucket; give {str(address)[:2]}://BUCKET/NAME"
    assert error_of(addresses.path_of, "--workdir X", address) == wanted


def test_the_error_is_all_that_is_said(bucket, caplog):
    """gcsfs logs a stack with each error that it raises."""
    caplog.set_level("NOTSET", "gcsfs")
    bucket.fault(status=401)
    assert "cannot be read (refused, 401)" in error_of(addresses.path_of, SOURCE, bucket / "x")
    assert [record.name for record in caplog.records if record.name.startswith("gcsfs")] == []
    caplog.set_level("WARNING", "gcsfs")
    with pytest.raises(InputError):  # who asks for it gets it
        addresses.path_of(SOURCE, bucket / "x")
    assert [record.name for record in caplog.records if record.name.startswith("gcsfs")] == ["gcsfs"]


def test_what_fails_for_now_is_tried_again(bucket):
    bucket.write("x.txt", "text")
    bucket.fault(status=503, times=1)
    assert reading.read_bytes(addresses.path_of(SOURCE, bucket / "x.txt")) == b"text"
    bucket.fault(drop=True, times=1)
    assert reading.read_bytes(addresses.path_of(SOURCE, bucket / "x.txt")) == b"text"


def test_problems_lie_in_a_bucket(bucket):
    rows = [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    for name in ("train.jsonl", "data/sums.jsonl"):
        bucket.write(name, "".join(json.dumps(row) + "\n" for row in rows))
    bucket.write("data/notes.md", "not a table")
    table = readers.read(bucket / "train.jsonl", "config.data.train = X")
    assert [columns for _, columns in table] == rows
    assert readers.read(bucket / "data", "config.data.train = X") == table
    settings = EvaluationConfig(data_dir=bucket / "data")
    assert [row.question for row in problems.benchmark_rows("sums", settings)] == ["0 + 1?", "1 + 1?", "2 + 1?"]
    with pytest.raises(InputError, match="there is nothing at this address"):
        readers.read(bucket / "missing.jsonl", "config.data.train = X")


def test_a_model_lies_in_a_bucket(bucket):
    raw = {"model_type": "llama", "hidden_size": 8}
    bucket.write("model/config.json", json.dumps(raw))
    bucket.write("model/pytorch_model.bin", "not fetched")
    assert hf_files.config_json(bucket / "model") == raw
    assert [file.name for file in hf_files.resolve(bucket / "model").iterdir()] == ["config.json"]
