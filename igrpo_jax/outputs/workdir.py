"""A run's folder: `check_workdir` looks at it, `locked` keeps a second run out, `prepare_workdir` claims it.

They are called in this order, so a folder that belongs to no run gets no lock, and if two runs start at once,
config.json has the settings of the one that holds the lock. Last comes `record_settings`, once nothing can be refused
any more, so that a refused resume leaves config.json as it was.
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from igrpo_jax.config import Config, differences, freeze, to_dict, with_defaults
from igrpo_jax.errors import InputError
from igrpo_jax.loading import is_of_a_run
from igrpo_jax.storage.addresses import failures, is_remote, make_folder, names, reason
from igrpo_jax.storage.lease import Held, Lease
from igrpo_jax.storage.reading import read_bytes
from igrpo_jax.storage.writing import guarded, remove_tree, write_text

LOCK = ".lock"  # file in a workdir that is locked while a run is under way
HALF_WRITTEN = "config.json.tmp"  # what a kill may leave of write_text
DAMAGED = "damaged_checkpoints"  # folder in a workdir for checkpoints that a resume could not use
SFT = "sft.json"  # file in a workdir that says that its run is one of supervised fine-tuning
SEEN_WITHIN = 60.0  # s; NFS remembers for half of it that a folder did not exist
UNFINISHED = "orbax-checkpoint-tmp"  # part of the name of a checkpoint that was not written to its end, on a disk
COMMITTED = "commit_success.txt"  # file in a checkpoint that was written to its end, in a bucket
# What a run may leave before its first checkpoint, and what a run in its place might not overwrite.
REMAINS = ("checkpoints", "reference", "evaluations")


class Claim(NamedTuple):
    """What `prepare_workdir` met in a folder."""

    resumes: bool  # whether the folder holds a run of this configuration, which is to be resumed
    replaced: list[str]  # what changed where a run without a checkpoint is replaced, as "name: old -> new"

    def notice(self, workdir: Path) -> str:
        """Returns the message for the user; "" if nothing is replaced."""
        if not self.replaced:
            return ""
        return (
            f"--workdir {workdir}: the run in it ended before its first checkpoint; this one takes its place, with "
            f"other settings ({', '.join(self.replaced)})"
        )


def check_workdir(workdir: Path, config: Config) -> None:
    """Raises InputError if `workdir` cannot hold the run of `config`, as `prepare_workdir` does; writes nothing."""
    if is_mirrored(workdir) and jax.process_count() > 1:
        raise InputError(
            f"--workdir {workdir}: checkpoints get there from the disk of one machine, but each of the "
            f"{jax.process_count()} processes would have its part of them on its own disk; give gs://BUCKET/NAME, or a "
            "folder that all machines see"
        )
    with _naming_refusals(workdir):
        _examine(workdir, to_dict(config))


def prepare_workdir(workdir: Path, config: Config) -> Claim:
    """Recognises the run in `workdir`, or begins one, whose resolved configuration goes to `workdir/config.json`.

    It is called inside of `locked`. A run of another configuration that has neither a checkpoint nor samples has
    nothing to lose: it is replaced.

    Raises:
        InputError: `workdir` holds a run of another configuration, or files that belong to no run; or it cannot be
            written, and is left as it was.
    """
    with _naming_refusals(workdir):
        resumes, changed = _examine(workdir, to_dict(config))
        for name in REMAINS if changed else ():
            remove_tree(workdir / name)
    claim = Claim(resumes and not changed, changed)
    if not claim.resumes:
        record_settings(workdir, config)
    return claim


def record_settings(workdir: Path, config: Config) -> None:
    """Writes the resolved configuration to `workdir/config.json`, with what a resume has changed in it.

    Raises:
        InputError: it cannot be written, and is left as it was.
    """
    with _naming_refusals(workdir):
        try:
            write_text(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
        except OSError:
            with contextlib.suppress(OSError):
                (workdir / HALF_WRITTEN).unlink()
            raise


def _examine(workdir: Path, settings: dict[str, Any]) -> tuple[bool, list[str]]:
    """Returns whether `workdir` holds a run, and what changes in its settings.

    Raises:
        InputError: it holds a run of other settings that has something to lose, or files that belong to no run.
        OSError, or another one of `failures`: it cannot be read.
    """
    path, present = workdir / "config.json", names(workdir)
    if path.name in present:
        changed = _changed_settings(path, settings)
        if changed and _has_results(workdir):
            raise _other_settings(workdir, changed)
        _check_finished(workdir)
        return True, changed
    if foreign := sorted(present - {HALF_WRITTEN, LOCK}):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"--workdir {workdir}: holds {foreign[0]}{more} but no config.json of a run; give an empty or new folder"
        )
    return False, []


def check_settings(workdir: Path, config: Config) -> None:
    """Raises InputError if the run in `workdir` has settings that `config` does not have."""
    if changed := _changed_settings(workdir / "config.json", to_dict(config)):
        raise _other_settings(workdir, changed)


def _other_settings(workdir: Path, changed: list[str]) -> InputError:
    return InputError(
        f"--workdir {workdir}: holds a run with other settings ({', '.join(changed)}); give another --workdir, or the "
        "old values"
    )


def is_mirrored(workdir: Path) -> bool:
    """Returns whether `workdir` is in a bucket that orbax can't write to, any but gs://: see `checkpoint_mirror`."""
    return is_remote(workdir) and not str(workdir).startswith("gs://")


def _has_results(workdir: Path) -> bool:
    """Returns whether the run in `workdir` has a checkpoint, even a damaged one, or samples of a step."""
    return bool(finished(workdir / "checkpoints") or names(workdir / DAMAGED)) or has_samples(workdir)


def finished(folder: Path) -> list[str]:
    """Returns the names of the checkpoints in a folder that were written to their end."""
    if is_remote(folder):
        return [name for name in names(folder) if COMMITTED in names(folder / name)]
    return [name for name in names(folder) if UNFINISHED not in name]


def has_samples(workdir: Path) -> bool:
    """Returns whether the run in `workdir` has samples of a step."""
    return any(re.fullmatch(r"step_.*\.jsonl", name) for name in names(workdir / "samples"))


def _check_finished(workdir: Path) -> None:
    """Raises InputError if orbax would take all checkpoints in a bucket for unfinished ones and remove them."""
    if is_remote(workdir) and has_samples(workdir) and not finished(workdir / "checkpoints"):
        raise InputError(
            f"--workdir {workdir}: none of its checkpoints holds {COMMITTED}, the last file of a save in a bucket; "
            "those of a run that was copied from a folder may lack it: resume it in a folder, or start a new run"
        )


def _changed_settings(path: Path, settings: dict[str, Any]) -> list[str]:
    """Returns the settings that differ between config.json at `path` and `settings` but may not change on a resume."""
    try:
        old = with_defaults(json.loads(read_bytes(path)))
        # A run without a day may get its day now. Whether it is the right one is seen from the prompts.
        old["data"]["template_date"] = old["data"]["template_date"] or settings["data"]["template_date"]
        return differences(old, settings)
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"--workdir {path.parent}: config.json is not that of a run; give another folder") from None


def _open_lock(workdir: Path) -> FileIO:
    """Opens the lock file of a local folder, which is created if it is missing, and removed again if this fails.

    The file is unbuffered, because closing it on a full disk would try to write the buffer once more.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        make_folder(workdir)
        return open(workdir / LOCK, "a+b", buffering=0)
    except OSError:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _lock(file: FileIO, workdir: Path) -> None:
    """Locks the lock file of `workdir`, or warns where the file system has no locks.

    Raises:
        InputError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise _under_way(workdir, file.read().decode().strip() or "of another process") from None
    except OSError as error:  # a file system without locks
        logging.warning("%s: cannot be locked (%s); don't start a second run there", workdir, error.strerror)


@contextlib.contextmanager
def _naming_refusals(workdir: Path) -> Iterator[None]:
    """Turns `Held`, and what a disk or a bucket refuses, into an InputError."""
    try:
        yield
    except Held as error:
        raise _under_way(workdir, str(error)) from None
    except failures() as error:
        raise InputError(f"--workdir {workdir}: cannot be written ({reason(error)}); give a folder that can") from error


def _under_way(workdir: Path, holder: str) -> InputError:
    return InputError(
        f"--workdir {workdir}: a run is under way there ({holder}); wait until it ends, or give another folder"
    )


def check_shared(workdir: Path) -> None:
    """Raises InputError if this process does not see what process 0 has written to `workdir`."""
    deadline = time.monotonic() + SEEN_WITHIN
    while not (workdir / "config.json").is_file():
        if time.monotonic() > deadline:
            raise InputError(
                f"--workdir {workdir}: process 0 created it, but this process cannot see it; give a folder that all "
                "hosts share"
            )
        time.sleep(1)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Callable[[], None]]:
    """Creates `workdir`, and keeps other runs out of it inside the `with` block.

    The system frees the lock when the process ends. In a bucket the lock expires instead, so a process that is cut off
    from the bucket for a minute may lose it. The yielded function then raises RunError, and so does every attempt of
    this process to write there (`guarded`).

    Raises:
        InputError: a run is under way there, or it cannot be written. No folders are left behind then.
    """
    if jax.process_index() != 0:
        yield lambda: None
        return
    if is_remote(workdir):
        lease = Lease(workdir / LOCK)
        with _naming_refusals(workdir):
            lease.acquire()
        try:
            with guarded(workdir, lease.check):
                yield lease.check
        finally:
            lease.release()
        return
    with contextlib.ExitStack() as stack:
        with _naming_refusals(workdir):
            file = stack.enter_context(_open_lock(workdir))
            _lock(file, workdir)
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        yield lambda: None


def recorded_date(workdir: Path) -> str | None:
    """Returns the day that the chat template of the run in `workdir` takes for today, None if the run begins now.

    A run that has neither a checkpoint nor samples starts again, as one in an empty folder does. The day is "" for a
    run whose template does not ask for it, and for one of a version that did not record it.
    """
    if not _has_results(workdir):
        return None
    try:
        return json.loads(read_bytes(workdir / "config.json"))["data"].get("template_date", "")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # `prepare_workdir` says what is wrong with a file that can't be read


def read_config(workdir: Path) -> Config:
    """Returns the configuration of the run in `workdir`.

    Raises:
        InputError: `workdir` holds no readable config.json.
    """
    try:
        settings = json.loads(read_bytes(workdir / "config.json"))
        if is_of_a_run(settings):
            return freeze(with_defaults(settings))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--workdir {workdir}: holds no run (no readable config.json); give a run's folder") from error
    raise InputError(f"--workdir {workdir}: holds no run (its config.json is not that of one); give a run's folder")
