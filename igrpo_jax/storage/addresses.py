"""Paths from addresses: a local folder, or one in a bucket, `gs://BUCKET/NAME` or `s3://BUCKET/NAME`.

A path in a bucket is an `etils.epath.Path`, which has the methods of `pathlib.Path` and asks fsspec, and through it
gcsfs or s3fs, for what is there. Orbax and JAX's compilation cache use epath too, and it comes with them, as fsspec
comes with datasets. So checkpoints, compiled programs and our own files go through one library with one set of
credentials, and a user installs only gcsfs or s3fs. universal-pathlib would be a second such library; `gsutil` and
mounts need commands outside of Python.

Objects have no rename and cannot be appended to, and an upload that ends replaces an object at once: a reader sees the
old object or the new one, never a part. How files grow all the same is in `writing`.
"""

import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import CRITICAL, NOTSET, getLogger
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from absl import logging

from igrpo_jax.errors import InputError, one_line

P = ParamSpec("P")
T = TypeVar("T")

ADDRESSES = (
    "a folder, gs://BUCKET/NAME or s3://BUCKET/NAME, or a hub id (owner/name) where a model or a data set is meant"
)
LIBRARY = {"gs": "gcsfs", "s3": "s3fs"}  # by scheme: what reaches it; an extra of the package has the scheme's name
PATIENCE = 300.0  # seconds for which an operation that fails for now is tried again
_TRANSIENT = (408, 425, 429)  # HTTP status codes worth another attempt, besides 500 and above
_CUT = {  # errors of connections, by name, because their modules may not be installed
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ConnectionError",
    "google.auth.exceptions.TransportError",  # the service that gives credentials, or the metadata server of a machine
    "google.auth.exceptions.RefreshError",
}
_MADE = {"gs": "gcloud storage buckets create gs://{}", "s3": "aws s3 mb s3://{}"}  # the command that creates a bucket
# Errors of the libraries that are not OSErrors, by module. The modules are looked up only where something loaded them.
_ERRORS = {
    "gcsfs.retry": ("HttpError", "ChecksumError"),
    "aiohttp": ("ClientError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
}


def is_remote(address: str | Path) -> bool:
    """Returns whether an address or a path is that of a bucket."""
    return str(address).startswith(tuple(f"{scheme}://" for scheme in LIBRARY))


def path_of(source: str, address: str | Path) -> Path:
    """Returns the path of an address: a pathlib.Path of a local one, an epath.Path of one in a bucket.

    `~` at its beginning is the home folder: bash does not expand it in `--workdir=~/run`, nor does Python.

    Args:
        source: the flag or the field that gives it, and its value, with which errors begin.

    Raises:
        InputError: an address that is neither a text nor a path, a scheme that is not known, a library that is missing,
            or a bucket that is not named, does not exist or refuses to be listed.
    """
    if not isinstance(address, (str, os.PathLike)):
        raise InputError(f"{source}: is not a path; give a text or a pathlib.Path, such as 'runs/mine'")
    parts = re.fullmatch(r"([A-Za-z][\w+.-]+):(/.*)?", str(address))  # pathlib has made gs:/x of gs://x
    if not parts:
        return Path(os.path.expanduser(address))
    scheme, name = parts[1], (parts[2] or "").strip("/")
    if scheme in LIBRARY and not name:
        raise InputError(f"{source}: names no bucket; give {scheme}://BUCKET/NAME")
    if scheme not in LIBRARY:
        raise InputError(f"{source}: {scheme}:// is not supported; give {ADDRESSES}")
    if importlib.util.find_spec(LIBRARY[scheme]) is None:
        raise InputError(
            f'{source}: {scheme}:// needs {LIBRARY[scheme]}; pip install "igrpo_jax[{scheme}]", or give a local folder'
        )
    path = _remote(f"{scheme}://{name}")
    with refusing(source):
        try:  # only once: a user who has just typed an address should not wait for minutes
            filesystem(path).ls(str(path), detail=False)
        except FileNotFoundError as error:
            if not _has_bucket(path, error):
                bucket = name.partition("/")[0]
                fix = f"correct the name, or create it: {_MADE[scheme].format(bucket)}"
                raise InputError(f"{source}: there is no bucket {scheme}://{bucket}; {fix}") from error
    return path


def _has_bucket(path: Path, error: FileNotFoundError) -> bool:
    """Returns whether the bucket of a path exists, where there is nothing at the path itself, as `error` says."""
    if str(path).startswith("s3://"):
        return _answer_of_s3(error).get("Error", {}).get("Code") != "NoSuchBucket"
    try:
        filesystem(path).ls("/".join(str(path).split("/")[:3]), detail=False, max_results=1)
    except FileNotFoundError:
        return False
    except failures():  # a user may have access to a part of the bucket only
        pass
    return True


def _remote(address: str) -> Path:
    import fsspec
    from etils import epath

    if (logger := getLogger("gcsfs")).level == NOTSET:  # it logs every error with its stack, and then raises it
        logger.setLevel(CRITICAL)
    for protocol in ("gs", "gcs", "s3"):  # other processes write there, so a cached listing may be stale
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    path: Any = epath.Path(address)
    return path


def filesystem(path: Path) -> Any:
    """Returns the fsspec file system of a path in a bucket; it takes str(path)."""
    import fsspec

    return fsspec.filesystem(str(path).partition("://")[0])


def resolved(path: Path) -> Path:
    """Returns a path that does not depend on the working directory."""
    return path if is_remote(path) else path.resolve()


def make_folder(path: Path) -> None:
    """Makes a folder where there is none. In a bucket a folder is there as soon as a file in it is."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def names(folder: Path) -> set[str]:
    """Returns the names of what is in a folder, and nothing where it does not exist.

    Raises:
        OSError, or another one of `failures`: it cannot be listed.
    """
    try:
        if not is_remote(folder):
            return {entry.name for entry in folder.iterdir()}
        listed = patiently(folder, filesystem(folder).ls, str(folder), detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {name.rstrip("/").rpartition("/")[2] for name in listed} - {""}


def modified(path: Path) -> float:
    """Returns when a file or folder on a disk, or the newest object at `path` in a bucket, was written (Unix time)."""
    if not is_remote(path):
        return path.stat().st_mtime
    found = patiently(path, filesystem(path).find, str(path), detail=True)
    return max(written_at(info) for info in found.values())


def written_at(info: dict[str, Any]) -> float:
    """Returns when an object was written, in Unix time, from what the service reports about it."""
    return (info.get("mtime") or info["LastModified"]).timestamp()


def failures(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Returns the errors of disks and buckets, and `more`, for an `except`."""
    modules = [(sys.modules[module], errors) for module, errors in _ERRORS.items() if module in sys.modules]
    return (OSError, *more, *(getattr(module, error) for module, errors in modules for error in errors))


def reason(error: BaseException) -> str:
    """Returns what is wrong, in at most 300 characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):
        return f"not found: {one_line(error)}"[:300]
    return (one_line(error) or type(error).__name__)[:300]


@contextmanager
def refusing(source: str) -> Iterator[None]:
    """Turns an error of a disk or a bucket into an InputError that begins with `source`."""
    try:
        yield
    except failures() as error:
        fix = "give an address that can be, or log in (gcloud auth application-default login; aws configure)"
        raise InputError(f"{source}: cannot be read ({reason(error)}); {fix}") from error


def patiently(path: Path, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Returns what `function` returns, which sends requests to the bucket of `path`.

    The libraries themselves try again for about half a minute. After a temporary failure, such as a 503 or a dropped
    connection, the call is repeated for up to PATIENCE seconds, with a warning each time.
    """
    deadline, wait = time.monotonic() + PATIENCE, 1.0
    while True:
        try:
            return function(*args, **kwargs)
        except failures() as error:
            if not _is_transient(error) or time.monotonic() + wait > deadline:
                raise
            logging.warning("%s: %s; trying again in %.0f s", path, reason(error), wait)
            time.sleep(wait)
            wait = min(2 * wait, 30.0)


def _is_transient(error: BaseException) -> bool:
    """Returns whether a failed call may succeed in a while: the service is busy or down, or the connection is."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    answered = _answer_of_s3(error).get("ResponseMetadata", {})
    status = str(getattr(error, "code", "") or answered.get("HTTPStatusCode", ""))
    if status.isdecimal():
        return int(status) in _TRANSIENT or int(status) >= 500
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if kinds & _CUT:
        return True
    return type(error).__module__.startswith(("requests", "aiohttp", "gcsfs"))


def _answer_of_s3(error: BaseException) -> dict[str, Any]:
    """Returns the service's answer that s3fs turned into an OSError; {} if there is none."""
    response = getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else {}
