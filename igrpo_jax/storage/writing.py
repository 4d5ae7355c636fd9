"""Files that are written into a bucket: texts, files that grow, and folders that libraries fill by themselves.

- A text is one object, written at once (`write_text`, `write_bytes`).
- A file that grows, such as metrics.jsonl, is kept on the local disk and uploaded as a whole, so a reader never sees
  half a row, and the bucket has the same files as a folder (`Lines`). It is uploaded when `sync` asks for it, and with
  a new line if the last upload was at least EVERY seconds ago. An object for each step would be cheaper to upload, but
  every reader, `jq` and `gcloud storage cat` too, would have to join them.
- What libraries write by themselves (events of TensorBoard, profiles, exports) goes to a local folder, the spool, from
  which it is uploaded to the bucket (`Spool`).

Each function takes a local path too, and then simply writes there.

A run that has lost its folder in a bucket to another run must not touch what the other writes: see `guarded`.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from igrpo_jax.storage.addresses import filesystem, is_remote, patiently, resolved
from igrpo_jax.storage.reading import AT_ONCE, kept_in, read_bytes

EVERY = 10.0  # least seconds between two uploads of a file that grows, if nobody asks for one
_MOST_OF_TIME = 0.1  # share of the time that uploads of a file that grows may take

_guards: dict[str, Callable[[], None]] = {}  # by folder of a bucket: raises if another run has taken it


@contextlib.contextmanager
def guarded(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Calls `check` before every attempt to write into or below a folder of a bucket, inside the block.

    Every attempt is checked, because a run loses its folder while it is cut off, which is just when it keeps retrying.

    Args:
        check: raises if another run has taken the folder.
    """
    _guards[str(folder)] = check
    try:
        yield
    finally:
        del _guards[str(folder)]


def _check(path: Path) -> None:
    """Raises what the guard of a folder raises, if `path` is in one."""
    for folder, check in list(_guards.items()):
        if f"{path}/".startswith(f"{folder}/"):
            check()


def _write(path: Path, function: Callable[..., Any], *args: Any) -> None:
    """Calls `function`, which writes at `path` in a bucket, until it succeeds or fails for good (`patiently`)."""

    def attempt() -> None:
        _check(path)
        function(*args)

    patiently(path, attempt)


def write_text(path: Path, text: str) -> None:
    """Writes a text as `write_bytes` does. A lone surrogate, which model text may hold, is written as \\udXXX, which is
    also how JSON spells it."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically: a kill leaves either the old file or the whole new one.

    On a disk the data goes to `path` + ".tmp" first, which may be left behind by a kill.

    Raises:
        OSError, or another one of `failures`: the file cannot be written.
    """
    if is_remote(path):
        _write(path, filesystem(path).pipe_file, str(path), data)
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def upload(file: Path, path: Path) -> None:
    """Copies a local file into a bucket."""
    _write(path, filesystem(path).put_file, str(file), str(path))


def remove_tree(folder: Path) -> None:
    """Removes a folder with all that is in it, if there is one."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    service = filesystem(folder)
    if found := patiently(folder, service.find, str(folder)):
        with contextlib.suppress(FileNotFoundError):  # another removes them too, as orbax does with what is unfinished
            _write(folder, service.rm, found)


def move_tree(folder: Path, target: Path) -> None:
    """Gives a folder another name. In a bucket its objects are copied and then removed."""
    if not is_remote(folder):
        shutil.move(folder, target)
        return
    service = filesystem(folder)
    root, names = service._strip_protocol(str(folder)), patiently(folder, service.find, str(folder))
    for name in names:
        _write(folder, service.cp_file, name, service._strip_protocol(str(target)) + name.removeprefix(root))
    remove_tree(folder)


def upload_folder(folder: Path, target: Path, last: tuple[str, ...] = ()) -> None:
    """Copies the files of a local folder into a bucket, some side by side.

    Args:
        last: names of files that are uploaded after all others, because their presence says that these are there.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for part in ([file for file in files if (file.name in last) == is_last] for is_last in (False, True)):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda file: upload(file, target / file.relative_to(folder).as_posix()), part))


def try_out(path: Path) -> None:
    """Raises OSError if nothing can be made at `path` on a disk. Leaves nothing behind."""
    if is_remote(path):
        return
    tried = resolved(path).with_name(f".{path.name}.tried")
    made = [tried, *(folder for folder in tried.parents if not folder.exists())]
    try:
        tried.mkdir(parents=True, exist_ok=True)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def spool_folder(path: Path) -> Path:
    """Returns the local folder for what libraries write into the folder `path`: `path` itself where it is local."""
    return kept_in("spool", path) if is_remote(path) else path


class Spool:
    """The folder for what libraries write into `path` by themselves. For one in a bucket it first has only `kept`.

    Args:
        kept: patterns of files that are copied from the bucket at first.

    Attributes:
        folder: a local folder, `path` itself where that is local.
    """

    def __init__(self, path: Path, kept: Sequence[str] = ()):
        self.folder, self._path = spool_folder(path), path
        self._uploaded: dict[str, tuple[float, int]] = {}  # time and size of each file at its last upload
        if is_remote(path):
            remove_tree(self.folder)
            self.folder.mkdir(parents=True)
            for file in (file for pattern in kept for file in path.glob(pattern)):
                copy = self.folder / file.relative_to(path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(read_bytes(file))

    def push(self) -> None:
        """Uploads the files that have changed, if the folder stands for one in a bucket."""
        if self.folder == self._path:
            return
        for file in [file for file in sorted(self.folder.rglob("*")) if file.is_file()]:
            name, seen = file.relative_to(self.folder).as_posix(), file.stat()
            if self._uploaded.get(name) != (seen.st_mtime, seen.st_size):
                upload(file, self._path / name)
                self._uploaded[name] = seen.st_mtime, seen.st_size


class Lines:
    """A text file to which lines are added. In a bucket it grows by uploads of the whole file.

    Args:
        text: what the file begins with; what it held before is replaced.

    Raises:
        OSError, or another one of `failures`: the file cannot be written. Each method may raise it too.
    """

    def __init__(self, path: Path, text: str = ""):
        write_text(path, text)
        self.path, self._is_remote = path, is_remote(path)
        local = kept_in("lines", path) if self._is_remote else path
        if self._is_remote:
            local.parent.mkdir(parents=True, exist_ok=True)
            write_text(local, text)
        self._file: IO[str] = open(local, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self._is_new = False  # whether there are lines that the bucket lacks
        self._next = time.monotonic() + EVERY  # when a new line is uploaded with those before it

    def add(self, line: str) -> None:
        """Adds a line. It is handed to the operating system at once; a bucket may get it with a later upload."""
        self._file.write(line + "\n")
        self._file.flush()
        self._is_new = True
        if self._is_remote and time.monotonic() >= self._next:
            self._upload()

    def sync(self) -> None:
        """Returns when all lines are on the disk, or in the bucket.

        Raises:
            FileNotFoundError: somebody has removed the file, to which lines can still be added without an error.
        """
        if self._is_remote:
            self._upload()
        else:
            os.fsync(self._file.fileno())
            os.stat(self.path)

    def close(self) -> None:
        """Uploads what is missing. The local copy is closed in any case, and kept if the upload fails."""
        try:
            if self._is_remote:
                self._upload()
                Path(self._file.name).unlink()
        finally:
            self._file.close()

    def _upload(self) -> None:
        _check(self.path)  # even if nothing is new: another run on this machine has the same local copy
        if self._is_new:
            began = time.monotonic()
            upload(Path(self._file.name), self.path)
            ended = time.monotonic()
            self._next = ended + max(EVERY, (ended - began) / _MOST_OF_TIME)
            self._is_new = False
