"""Checkpoints in a bucket that orbax cannot write to (any but gs://): orbax writes to a local folder instead.

`Mirror` uploads what orbax writes there to the bucket. A step is complete in the bucket once it holds
commit_success.txt, which is uploaded after its files and removed before them. So a step that a kill leaves incomplete
is never taken for a checkpoint, and the bucket keeps the steps before it until the next one is complete.

The local copies of a run and those of its readers are separate: a reader fetches one step, and nothing that it does to
its own copy affects orbax.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from igrpo_jax.outputs.workdir import COMMITTED, finished
from igrpo_jax.storage.addresses import names, refusing
from igrpo_jax.storage.reading import kept_in, local, note_uploaded
from igrpo_jax.storage.writing import remove_tree, upload_folder, write_text

T = TypeVar("T")

WRITTEN, READ = "checkpoints", "steps"  # kinds of local copies: that of a run, and those of its readers


def steps_in(folder: Path) -> list[int]:
    """Returns the steps that are complete in a folder of checkpoints in a bucket, in ascending order.

    Raises:
        InputError: the bucket cannot be read.
    """
    with refusing(str(folder)):
        return sorted(int(name) for name in finished(folder) if name.isdecimal())


def read_copy(path: Path, step: int, kind: str, read: Callable[[], T]) -> T:
    """Returns what `read` returns, which reads the local copy of a step.

    If it fails in a run of one process, the step is fetched and read again: the disk may have damaged the copy.
    """
    _fetch(path, step, kind)
    try:
        return read()
    except Exception:  # what orbax raises depends on which byte of which file is wrong
        if jax.process_count() > 1:  # the others have read theirs, and orbax would wait for them
            raise
        remove_tree(kept_in(kind, path) / str(step))
        _fetch(path, step, kind)
        return read()


def _fetch(path: Path, step: int, kind: str) -> None:
    """Makes the local copy of a step equal to what the bucket has.

    Raises:
        InputError: the bucket cannot be read.
    """
    address = path / str(step)
    local(str(address), address, lambda name: name != COMMITTED, kind)


def copy_for_readers(path: Path) -> Path:
    """Returns the folder that `read_copy` fetches steps into for READ, after removing those that left the bucket."""
    copy = kept_in(READ, path)
    for name in names(copy) - {str(step) for step in steps_in(path)}:
        remove_tree(copy / name)
    copy.mkdir(parents=True, exist_ok=True)
    return copy


class Mirror:
    """Keeps the checkpoints at `path`, in a bucket, equal to those that one process writes into a local folder.

    Attributes:
        folder: the local folder. At first it has the complete steps of the bucket, and nothing else.
        steps: those that are complete in the bucket.

    Raises:
        InputError: the bucket cannot be read.
    """

    def __init__(self, path: Path):
        self.folder, self.steps = kept_in(WRITTEN, path), set(steps_in(path))
        self._path = path
        with refusing(str(path)):
            self._leftovers = {int(name) for name in names(path) if name.isdecimal()} - self.steps
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        for name in names(self.folder) - {str(step) for step in self.steps}:
            remove_tree(self.folder / name)
        for step in self.steps:
            _fetch(path, step, WRITTEN)
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, complete: Callable[[], None]) -> None:
        """Starts a thread that brings the steps of the local folder into the bucket once `complete` returns."""

        def run() -> None:
            try:
                complete()
                self._push()
            except Exception as error:  # `wait` raises it
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoints", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the thread is done; raises what it failed with."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def drop(self, step: int) -> None:
        """Removes the local copy of a step that was moved away in the bucket."""
        remove_tree(self.folder / str(step))
        self.steps.discard(step)

    def _push(self) -> None:
        """Uploads the steps that the bucket lacks, then removes those that orbax has removed and incomplete leftovers.

        Steps that are not our own and were not there when the mirror was opened belong to a run that took this one's
        place while it was cut off from the bucket: they are left alone.
        """
        here = {int(name) for name in names(self.folder) if name.isdecimal()}
        for step in sorted(here - self.steps):
            self._upload(step)
        for step in (self.steps | self._leftovers) - here:
            self._remove(step)

    def _upload(self, step: int) -> None:
        folder, target = self.folder / str(step), self._path / str(step)
        (folder / COMMITTED).unlink(missing_ok=True)  # orbax writes it on disks too, where it decides nothing
        remove_tree(target)  # of an upload that was killed: the files of this one have other names
        upload_folder(folder, target)
        note_uploaded(target, WRITTEN)
        write_text(target / COMMITTED, "All files of this checkpoint were uploaded.\n")
        self.steps.add(step)

    def _remove(self, step: int) -> None:
        target = self._path / str(step)
        self.steps.discard(step)
        self._leftovers.discard(step)
        remove_tree(target / COMMITTED)  # first
        remove_tree(target)
