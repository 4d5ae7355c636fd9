"""A lock in a bucket, where no system frees it when a process ends: an object that its holder renews.

It is created on the condition that there is none (GCS: ifGenerationMatch=0, S3: If-None-Match), and written again every
RENEWED seconds with another number, on the condition that it is what its holder wrote last (GCS: ifGenerationMatch, S3:
If-Match). A process that finds the lock taken watches it: if it does not change for EXPIRES seconds, its holder is
gone. No two clocks are compared. The end of a holder on the same machine is seen at once, from its process number. A
holder that was cut off for so long that another took its place finds the other's token in the object, or no object if
the other has finished, and ends.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from absl import logging

from igrpo_jax.errors import RunError
from igrpo_jax.storage.addresses import failures, filesystem, patiently, reason
from igrpo_jax.storage.reading import read_bytes

RENEWED = 15.0  # seconds between two renewals
EXPIRES = 60.0  # seconds without a change after which the holder is gone
SETTLED = 1.0  # seconds after which one of several that replace an old lock sees who did so last


_held: set[str] = set()  # tokens of the locks that this process holds


class Held(Exception):
    """Another holder has the lock. The message says who."""


class Lease:
    """The lock at `path`, held from `acquire` to `release`."""

    def __init__(self, path: Path):
        self._path, self._token = path, secrets.token_hex(8)
        self._ended = threading.Event()
        self._number = 0
        self._is_lost = False
        self._renewed = 0.0  # when it was last known to be ours
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self) -> None:
        """Takes the lock, after at most EXPIRES seconds where the last holder was killed on another machine.

        Raises:
            Held: another holder has it.
        """
        make_free(self._path)
        _remove(self._path, None)
        # If it exists, another was faster, or our own request succeeded but its answer was lost and it was sent again.
        with contextlib.suppress(FileExistsError):
            patiently(self._path, filesystem(self._path).pipe_file, str(self._path), self._content(), mode="create")
        time.sleep(SETTLED)
        holder = _read(self._path)
        if holder is None or holder["token"] != self._token:
            raise Held(_who(holder))
        _held.add(self._token)
        self._renewed = time.monotonic()
        self._thread.start()

    def check(self) -> None:
        """Raises RunError if another holder has taken the lock in the meantime, or if this cannot be determined.

        The bucket is read only if the last renewal is so long ago that another may soon take the lock, or has done so.
        """
        if time.monotonic() - self._renewed > EXPIRES / 2:
            try:
                self._look()
            except failures() as error:
                raise RunError(
                    f"{self._path}: cannot be read ({reason(error)}); fix this and run the same command again"
                ) from error
        if self._is_lost:
            raise RunError(
                f"{self._path}: another run took this folder while this one was cut off from it; the folder now "
                "belongs to that run"
            )

    def release(self) -> None:
        """Frees the lock, if it is still ours."""
        self._ended.set()
        self._thread.join()
        _held.discard(self._token)
        with contextlib.suppress(*failures()):
            if (version := self._look()) is not None:
                _delete(self._path, version)

    def _content(self) -> bytes:
        self._number += 1
        holder = {"token": self._token, "number": self._number, "process": os.getpid(), "host": platform.node()}
        return json.dumps(holder | {"machine": _machine()}).encode()

    def _look(self) -> str | None:
        """Returns the version of the object if it is ours, else None.

        Notes that the lock is lost if it is another's now, or gone, as when another took it and has finished.
        """
        version = _version(self._path)  # before the content: a version read after it might be another's
        holder = _read(self._path)
        if version is None or holder is None or holder["token"] != self._token:
            self._is_lost = True
            return None
        return version

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            try:
                began = time.monotonic()
                if (version := self._look()) is None:
                    return
                try:
                    _replace(self._path, self._content(), version)
                    self._renewed = began
                except (FileExistsError, FileNotFoundError):  # another took it just now
                    if self._look() is None:  # else the answer was lost, and the request sent again
                        return
            except failures() as error:
                logging.warning("%s: not renewed (%s)", self._path, reason(error))


def make_free(path: Path) -> None:
    """Returns when there is no lock at `path`; removes that of a holder that is gone.

    Raises:
        Held: a holder has it.
    """
    before = _read(path)
    if before is None:
        return
    if not _is_dead(before):
        logging.warning(
            "%s: %s has this lock; waiting up to %.0f s to see whether it is still being renewed",
            *(path, _who(before), EXPIRES),
        )
        deadline = time.monotonic() + EXPIRES
        while time.monotonic() < deadline:
            time.sleep(min(1.0, EXPIRES / 10))
            now = _read(path)
            if now != before:
                if now is None:
                    return
                raise Held(_who(now))
    _remove(path, before)


def _remove(path: Path, holder: dict[str, Any] | None) -> None:
    """Removes the lock if it is what `holder` wrote; with None, a lock file that no holder wrote.

    In gs:// it is removed only if it has not been replaced in the meantime. In s3:// a lock that another has just taken
    may be removed; of the two, the one that writes last then has the lock, and the other sees this after SETTLED.
    """
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        version = _version(path)
        if version is not None and _read(path) == holder:
            _delete(path, version)


def _version(path: Path) -> str | None:
    """Returns the generation (GCS) or the entity tag (S3) of the object at `path`, None if there is none."""
    try:
        info = patiently(path, filesystem(path).info, str(path))
    except FileNotFoundError:
        return None
    return info.get("generation") or info.get("ETag")


def _replace(path: Path, content: bytes, version: str) -> None:
    """Writes the object at `path` on the condition that it has this version.

    Raises:
        FileExistsError: it has another one.
        FileNotFoundError: it is gone.
    """
    service = filesystem(path)
    if str(path).startswith("s3://"):
        service.pipe_file(str(path), content, IfMatch=version)
        return
    bucket, key = _bucket_and_key(path)
    service.call(
        "POST",
        service.base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o",
        bucket,
        uploadType="media",
        name=key,
        ifGenerationMatch=version,
        data=content,
        headers={"Content-Type": "application/octet-stream"},
    )


def _delete(path: Path, version: str) -> None:
    """Removes the object at `path`, in gs:// on the condition that it has this version.

    Raises:
        FileExistsError: it has another one.
    """
    service = filesystem(path)
    if str(path).startswith("s3://"):
        patiently(path, service.rm_file, str(path))
        return
    bucket, key = _bucket_and_key(path)
    patiently(path, service.call, "DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=version)


def _bucket_and_key(path: Path) -> tuple[str, str]:
    bucket, _, key = str(path).partition("://")[2].partition("/")
    return bucket, key


def _read(path: Path) -> dict[str, Any] | None:
    """Returns what the holder wrote; None if there is no lock, or only that of a local folder, copied there."""
    try:
        return json.loads(read_bytes(path))
    except (FileNotFoundError, ValueError):
        return None


def _who(holder: dict[str, Any] | None) -> str:
    return f"process {holder['process']} on {holder['host']}" if holder else "of another process"


def _machine() -> str:
    """Returns a name for the scope of process numbers, which is boot and container; "" if it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_dead(holder: dict[str, Any]) -> bool:
    """Returns whether a holder is a process of this machine that has ended."""
    if not holder["machine"] or holder["machine"] != _machine():
        return False
    if holder["process"] == os.getpid():
        return holder["token"] not in _held
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:  # a zombie: it has ended, but its parent has not waited for it yet
        return Path(f"/proc/{holder['process']}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
