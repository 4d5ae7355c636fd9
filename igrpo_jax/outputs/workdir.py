"""A run's folder: `prepare_workdir` claims it, `locked` keeps a second run out, `read_config` reads its settings."""

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
from absl import logging

from igrpo_jax.config import Config, differences, freeze, to_dict, with_defaults
from igrpo_jax.errors import InputError
from igrpo_jax.outputs.files import replace_text

LOCK = ".lock"  # file in a workdir that is locked while a run is under way
DAMAGED = "damaged_checkpoints"  # folder in a workdir for checkpoints that a resume could not use
UNFINISHED = "orbax-checkpoint-tmp"  # part of the name of a checkpoint that was not written to its end
# What a run may leave before its first checkpoint, and a run in its place does not write anew in any case.
REMAINS = ("checkpoints", "reference", "evaluations")


class Claim(NamedTuple):
    """What `prepare_workdir` met in a folder."""

    resumes: bool  # whether the folder holds a run of this configuration, which is to be resumed
    replaced: list[str]  # what changed where a run without a checkpoint is replaced, as "name: old -> new"


def prepare_workdir(workdir: Path, config: Config) -> Claim:
    """Makes `workdir`, or recognises the run in it, and writes the resolved configuration to `workdir/config.json`.

    A run of another configuration that has neither a checkpoint nor samples has nothing to lose: it is replaced.

    Raises:
        InputError: `workdir` holds a run of another configuration, a run that is under way, or files that belong to no
            run; or it cannot be written. Nothing is left behind.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    temporary = workdir / "config.json.tmp"  # of replace_text
    settings = to_dict(config)
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        resumes, changed = path.exists(), []
        if resumes:
            changed = _changed_settings(path, settings)
            if changed and _has_results(workdir):
                raise _other_settings(workdir, changed)
            _check_free(workdir)
            if changed:
                for name in REMAINS:
                    shutil.rmtree(workdir / name, ignore_errors=True)
        elif foreign := sorted({entry.name for entry in workdir.iterdir()} - {temporary.name}):
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise InputError(
                f"--workdir {workdir}: holds {foreign[0]}{more} but no config.json of a run; "
                "give an empty or new folder"
            )
        replace_text(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        for undo in (temporary.unlink, *(folder.rmdir for folder in made)):
            with contextlib.suppress(OSError):
                undo()
        raise InputError(
            f"--workdir {workdir}: cannot be written ({error.strerror or error}); give a folder that can"
        ) from error
    return Claim(resumes and not changed, changed)


def check_settings(workdir: Path, config: Config) -> None:
    """Raises InputError where the run in `workdir` has settings that `config` does not have."""
    if changed := _changed_settings(workdir / "config.json", to_dict(config)):
        raise _other_settings(workdir, changed)


def _other_settings(workdir: Path, changed: list[str]) -> InputError:
    return InputError(
        f"--workdir {workdir}: holds a run with other settings ({', '.join(changed)}); give another --workdir, or the "
        "old values"
    )


def _has_results(workdir: Path) -> bool:
    """Returns whether the run in `workdir` has a checkpoint, even a damaged one, or samples of a step."""
    checkpoints = [entry for entry in (workdir / "checkpoints").glob("*") if UNFINISHED not in entry.name]
    return bool(checkpoints) or (workdir / DAMAGED).exists() or any((workdir / "samples").glob("step_*.jsonl"))


def _changed_settings(path: Path, settings: dict[str, Any]) -> list[str]:
    """Returns the settings that differ between config.json at `path` and `settings`, and must not on a resume."""
    try:
        old = with_defaults(json.loads(path.read_text(encoding="utf-8")))
        # A run without a day may get its day now. Whether it is the right one is seen from the prompts.
        old["data"]["template_date"] = old["data"]["template_date"] or settings["data"]["template_date"]
        return differences(old, settings)
    except (ValueError, AttributeError, TypeError):
        raise InputError(
            f"--workdir {path.parent}: config.json is not readable as a run's; give another folder"
        ) from None


def _check_free(workdir: Path) -> None:
    """Raises InputError where a run is under way in `workdir`: its config.json must stay as it is."""
    with contextlib.suppress(FileNotFoundError), open(workdir / LOCK, "r+", encoding="utf-8") as file:
        _lock(file, workdir)


def _lock(file: TextIO, workdir: Path) -> None:
    """Locks the lock file of `workdir`, or warns where the file system has no locks.

    Raises:
        InputError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise InputError(
            f"--workdir {workdir}: a run is under way there ({file.read().strip() or 'of another process'}); wait "
            "for its end, or give another folder"
        ) from None
    except OSError as error:  # a file system without locks
        logging.warning("%s: cannot be locked (%s); don't start a second run there", workdir, error.strerror)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir` inside the `with` block. The system frees the lock when the process ends.

    Raises:
        InputError: a run is under way there.
    """
    if jax.process_index() != 0:
        yield
        return
    with open(Path(workdir) / LOCK, "a+", encoding="utf-8") as file:
        _lock(file, workdir)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def recorded_date(workdir: Path) -> str | None:
    """Returns the day that the chat template of the run in `workdir` takes for today, None where the run begins now.

    A run that has neither a checkpoint nor samples begins anew, as one in an empty folder does. It is "" for a run
    whose template does not ask for the day, and for one of a version that did not record it.
    """
    workdir = Path(workdir)
    if not _has_results(workdir):
        return None
    try:
        return json.loads((workdir / "config.json").read_text(encoding="utf-8"))["data"].get("template_date", "")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # `prepare_workdir` says what is wrong with a file that can't be read


def read_config(workdir: Path) -> Config:
    """Returns the configuration of the run in `workdir`.

    Raises:
        InputError: `workdir` holds no readable config.json.
    """
    path = Path(workdir) / "config.json"
    try:
        return freeze(with_defaults(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--workdir {workdir}: holds no run (no readable config.json); give a run's folder") from error
