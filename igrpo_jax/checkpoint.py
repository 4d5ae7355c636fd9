"""Checkpoints of a run (orbax, asynchronous, atomic), the claim of one run on its folder, and what others read of it.

A checkpoint is one step folder with two items: `state`, the pytree of arrays, and `meta`, JSON (data position, seed,
metrics cursor). Orbax writes a step under a temporary name and renames it once every part is there, so a killed save
leaves nothing that a restore could take for a checkpoint. Device to host is copied before `save` returns: the arrays
may be donated to the next update at once. Which folder a run may use is `prepare_workdir`'s question.
"""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from igrpo_jax import config as config_lib
from igrpo_jax.config import InputError


class Checkpointer:
    """Saves and restores under `workdir/checkpoints`, one folder per step; keeps the newest `settings.keep`, and the
    best by `settings.best_metric` where that is set.

    Every leaf of a state is a jax.Array on the mesh, scalars too (orbax refuses arrays that live on one host only).
    All processes call every method, with the same arguments.
    """

    def __init__(self, workdir: Path, settings: config_lib.Checkpoint):
        self._every, self._best = settings.every, settings.best_metric
        self._path = Path(workdir).absolute() / "checkpoints"
        keep, score = [policies.LatestN(settings.keep)], lambda metrics: metrics["best"]
        if self._best:
            highest = policies.BestN(get_metric_fn=score, n=1)
            keep.append(highest)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=score if self._best else None,  # without it metrics are not written
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self._path, options=options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self, step: int, state: Any, meta: dict[str, Any], force: bool = False, score: float | None = None
    ) -> bool:
        """Starts saving where `step` is a multiple of `settings.every`, or at any step with `force`.

        Returns before the files are there (see `wait`); waits for the save before it. A step that is already saved is
        left as it is. An error of the save before it (a full disk) is raised here. `score` is what the best is chosen
        by; a step without one never is the best.

        Returns:
            Whether a save was started.
        """
        due = force or (self._every > 0 and step % self._every == 0)
        if not due or step == self.latest_step():
            return False
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        metrics = {"best": -math.inf if score is None else score} if self._best else None
        return self._manager.save(step, args=items, metrics=metrics, force=True)

    def latest_step(self) -> int | None:
        """The newest step, one still being written included; None where there is none."""
        return self._manager.latest_step()

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint's state and meta.

        `abstract_state` is a state with jax.ShapeDtypeStruct leaves; each array is read straight into the sharding of
        its leaf, which may be of another mesh than the one it was saved from.

        Raises:
            InputError: there is no checkpoint.
            ValueError: the saved tree has other names, or an array another shape.
        """
        self.wait()
        step = self.latest_step()
        if step is None:
            raise InputError(f"{self._path}: holds no checkpoint; start the run again or give the --workdir of a run")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["meta"]

    def wait(self) -> None:
        """Returns when every started save is on disk; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being saved, then ends the manager's threads."""
        self._manager.close()


def read_config(workdir: Path) -> config_lib.Config:
    """The configuration of the run in `workdir`.

    Raises:
        InputError: there is none.
    """
    path = Path(workdir) / "config.json"
    try:
        return config_lib.freeze(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--workdir {workdir}: holds no run (no readable config.json); give a run's folder") from error


def saved_step(workdir: Path, step: int | None = None) -> int:
    """`step` where the run in `workdir` has a checkpoint of it, its newest where `step` is None.

    Raises:
        InputError: there is none.
    """
    with _reader(workdir) as manager:
        steps = sorted(manager.all_steps())
    if not steps or step not in (None, *steps):
        there = f"those there are: {', '.join(map(str, steps))}" if steps else "start the run again"
        raise InputError(f"{workdir}: holds no checkpoint{'' if step is None else f' of step {step}'}; {there}")
    return steps[-1] if step is None else step


def read_params(workdir: Path, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters of a run's checkpoint in the shardings and dtypes of `abstract`; nothing else is read."""
    item = {"params": abstract}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    wanted = ocp.args.Composite(state=ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True))
    with _reader(workdir) as manager:
        return manager.restore(step, args=wanted)["state"]["params"]


def _reader(workdir: Path) -> ocp.CheckpointManager:
    path = Path(workdir).absolute() / "checkpoints"
    if not path.is_dir():
        raise InputError(f"{workdir}: is not the folder of a run; it has no checkpoints")
    return ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(create=False))


def prepare_workdir(workdir: Path, config: config_lib.Config) -> bool:
    """Makes `workdir`, or recognises the run in it, and writes the resolved configuration to `workdir/config.json`.

    Returns:
        True where `workdir` holds a run of this configuration, which is to be resumed.

    Raises:
        InputError: `workdir` holds a run of another configuration or files that are no run's, or cannot be written.
            Nothing is left behind.
    """
    workdir = Path(workdir)
    path, temporary = workdir / "config.json", workdir / "config.json.tmp"
    settings = config_lib.to_dict(config)
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        resumes = path.exists()
        if resumes:
            _check_same_run(path, settings)
        elif foreign := sorted({entry.name for entry in workdir.iterdir()} - {temporary.name}):
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise InputError(
                f"--workdir {workdir}: holds {foreign[0]}{more} but no config.json of a run; "
                "give an empty or new folder"
            )
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        for undo in (temporary.unlink, *(folder.rmdir for folder in made)):
            with contextlib.suppress(OSError):
                undo()
        raise InputError(
            f"--workdir {workdir}: cannot be written ({error.strerror or error}); give a folder that can"
        ) from error
    return resumes


def _check_same_run(path: Path, settings: dict[str, Any]) -> None:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = config_lib.differences(old, settings)
    except (ValueError, AttributeError):
        raise InputError(
            f"--workdir {path.parent}: config.json is not readable as a run's; give another folder"
        ) from None
    if changed:
        raise InputError(
            f"--workdir {path.parent}: holds a run with other settings ({', '.join(changed)}); give another --workdir, "
            "or the old values"
        )
