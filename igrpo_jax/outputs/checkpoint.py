"""Checkpoints of a run (orbax, asynchronous, atomic). How others read them is in `checkpoint_reading`.

A checkpoint is one folder per step with two items: `state`, the pytree of arrays, and `meta`, JSON (scores, the
number of rows of metrics.jsonl, a checksum of every array). Orbax writes a step under a temporary name and renames it
once every part is there; in a bucket it adds a last file, commit_success.txt, instead. So a killed save leaves nothing
that a restore could take for a checkpoint. `save` returns after the arrays are copied from the devices to the host, so
they may be donated to the next update at once.

A state is saved only if it is finite. Names, shapes and dtypes of the written arrays are compared with it. Arrays that
are read must have the checksums with which they were saved, so a flipped bit is noticed wherever it flipped.
"""

import contextlib
import functools
import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from igrpo_jax.config import CheckpointConfig
from igrpo_jax.distributed import cluster, watchdog
from igrpo_jax.errors import InputError, RunError, both_ends, one_line
from igrpo_jax.outputs.checkpoint_mirror import WRITTEN, Mirror, read_copy
from igrpo_jax.outputs.checksums import Damaged, check, fingerprint, is_of_storage, named_leaves
from igrpo_jax.outputs.workdir import DAMAGED, is_mirrored
from igrpo_jax.storage.addresses import is_remote, make_folder, names, resolved
from igrpo_jax.storage.writing import move_tree

# Seconds that the writing of a checkpoint may take, and one process wait for another in it. Orbax allows 20 minutes,
# less than the state of a large model needs on a slow file system; `watchdog` reports a save that takes long.
_LONGEST_SAVE = 6 * 3600
PAUSE = 2.0  # seconds before a checkpoint that can't be read is read again


def best_of(scores: Mapping[int, float], steps: Iterable[int]) -> int | None:
    """Returns which of `steps` has the highest score, the latest of equals; None if none has a score."""
    return max((step for step in steps if step in scores), key=lambda step: (scores[step], step), default=None)


def _described(error: BaseException) -> str:
    """Returns the kind of an error and both ends of its message; of tensorstore's, which names files, for orbax's."""
    while type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    return both_ends(one_line(f"{type(error).__name__}: {error}"))


class _Best(policies.PreservationPolicy):
    """Preserves the checkpoint with the highest score.

    Orbax's own policy reads the scores that were saved with the checkpoints. But a run that is preempted during an
    evaluation saves the step first, and has its score only after the resume.
    """

    def __init__(self) -> None:
        self.scores: Mapping[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: Any) -> list[bool]:
        best = best_of(self.scores, [info.step for info in checkpoints])
        return [info.step == best for info in checkpoints]


class Checkpointer:
    """Saves and restores checkpoints under `workdir/checkpoints`, in one folder per step.

    It keeps the newest `settings.keep` checkpoints, and of those that have a score the best one. Every
    leaf of a state is a jax.Array on the mesh, scalars too, because orbax refuses arrays that live on one host only.
    All processes call every method with the same arguments.
    """

    def __init__(self, workdir: Path, settings: CheckpointConfig):
        self._every = settings.every
        self._path = resolved(workdir) / "checkpoints"
        self._mirror = Mirror(self._path) if is_mirrored(workdir) else None
        self._folder = self._mirror.folder if self._mirror else self._path  # the folder that orbax writes to
        self._best = _Best()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(settings.keep), self._best]),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(timeout_secs=_LONGEST_SAVE),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._writing: tuple[int, dict] | None = None  # the step, and shapes and dtypes that its files must hold
        self._failed: int | None = None  # the step whose save failed, which orbax reports again at the end

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        force: bool = False,
        scores: Mapping[int, float] | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        """Starts to save `state` where `step` is a multiple of `settings.every` or better than what is saved, or at any
        step with `force`.

        Waits for the previous save, and returns before its own files are written (see `wait`). Does nothing where
        `step` is the newest step that is saved.

        Args:
            scores: scores of steps so far, saved or not, by which the best checkpoint is chosen. An earlier step may
                have got its score after it was saved.
            before: called before a save is started; writes the rows that the checkpoint relies on to the disk or the
                bucket.

        Returns:
            Whether a save was started.

        Raises:
            RunError: the state is not finite, the disk lacks the space, or the save before this one failed. Earlier
                checkpoints stay as they are.
        """
        scores = scores or {}
        due = (
            force
            or (self._every > 0 and step % self._every == 0)
            or best_of(scores, [*self._manager.all_steps(), step]) == step
        )
        if not due or step == self.latest_step():
            return False
        self.wait()
        sums, bad = fingerprint(state)
        if bad:
            raise RunError(f"step {step}: not saved, {bad[0]} of the training state is not finite{self._last_good()}")
        self._check_space(sum(x.nbytes for x in jax.tree.leaves(state)))
        before()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta | {"checksums": sums})
        )
        self._best.scores = scores
        expected = {name: (x.shape, x.dtype) for name, x in named_leaves(state).items()}
        with self._errors(step), watchdog.phase("checkpoint", f"writing step {step}"):
            is_started = self._manager.save(step, args=items, force=True)
            if self._mirror:
                self._mirror.start(functools.partial(self._complete, step, expected))
        self._writing = step, expected  # not before: a save that Ctrl-C stops here leaves nothing to wait for
        return is_started

    def _check_space(self, need: int) -> None:
        """Raises RunError if the disk has less than `need` bytes. A bucket does not say what it has."""
        if is_remote(self._folder):
            return
        free = shutil.disk_usage(self._folder).free
        if need > free:
            raise RunError(
                f"{self._folder}: a checkpoint takes {need / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free"
                f"{self._last_good()}"
            )

    def latest_step(self) -> int | None:
        """Returns the newest step, which may still be being written; None if there is none."""
        return self._manager.latest_step()

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]]:
        """Returns step, state and meta of the newest checkpoint that is as it was saved.

        Newer checkpoints that are damaged, also where they are read again, are moved to `workdir/damaged_checkpoints`,
        with a warning. Where none can be used, all stay where they are.

        Args:
            abstract_state: a state with jax.ShapeDtypeStruct leaves. Each array is read straight into the sharding of
                its leaf, whose mesh may differ from the mesh on which the array was saved.

        Raises:
            InputError: there is no checkpoint, or the bucket cannot be read.
            RunError: no checkpoint can be used; or the disk or the bucket fails, which says nothing about the
                checkpoint.
        """
        self.wait()
        cluster.from_first(lambda: None)  # process 0 is the last to complete a checkpoint
        self._manager.reload()
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise InputError(f"{self._path}: holds no checkpoint; start the run again or give the --workdir of a run")
        failed: dict[int, str] = {}
        for step in steps:
            try:
                with watchdog.phase("checkpoint", f"reading step {step}"):
                    state, meta = self._read_twice(step, abstract_state)
                break
            except (InputError, RunError):  # which say nothing about the checkpoint
                raise
            except Exception as error:
                failed[step] = _described(error)
        else:
            raise RunError(f"{self._path}: no checkpoint can be read; step {steps[0]}: {failed[steps[0]]}")
        for bad, reason in failed.items():
            self._set_aside(bad)
            logging.warning("checkpoint of step %d skipped, moved to %s: %s", bad, DAMAGED, reason)
        return step, state, meta

    def _read_twice(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Returns state and meta of a checkpoint, which is read again where the first time fails.

        Raises the second error where both are those of a damaged checkpoint. All processes decide alike: they compare
        the same checksums, and what one of them cannot read fails in all (`_read_items`).

        Raises:
            RunError: the disk or the bucket failed.
        """
        try:
            return self._read(step, abstract_state)
        except InputError:  # the bucket cannot be read
            raise
        except Exception as error:  # what orbax raises depends on which byte of which file is wrong
            may_pass, told = is_of_storage(error), _described(error)
        # The first error is gone by now: its traceback holds a whole state, and there may be no room for two.
        logging.warning("%s: can't be read (%s); reading it again in %g s", self._path / str(step), told, PAUSE)
        time.sleep(PAUSE)
        try:
            return self._read(step, abstract_state)
        except InputError:
            raise
        except Exception as error:
            if not may_pass and not is_of_storage(error):
                raise
            raise RunError(
                f"{self._path / str(step)}: can't be read ({_described(error)}), which need not be damage; nothing was "
                "changed: run the same command again, or move the folder away, to resume from the previous checkpoint"
            ) from error

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        read = functools.partial(self._read_folder, step, abstract_state)
        return read_copy(self._path, step, WRITTEN, read) if self._mirror else read()

    def _read_folder(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
        restored = self._read_items(step, items)
        meta = dict(restored["meta"])
        check(restored["state"], meta.pop("checksums"))
        return restored["state"], meta

    def _read_items(self, step: int, items: ocp.args.Composite) -> Any:
        """Returns what orbax reads of a checkpoint, once every process has read its part.

        Raises:
            Damaged: one of several processes cannot read its part, and for none of them the disk or the bucket failed.
            OSError: it failed for one of several processes. A single one raises what orbax raises.
        """
        told = None
        try:  # not by the manager, with which each process would wait in vain for one that cannot read its part
            restored = ocp.CompositeCheckpointHandler().restore(self._folder / str(step), args=items)
        except Exception as error:
            if jax.process_count() == 1:
                raise
            told = is_of_storage(error), _described(error)
        failures = [(*told, process) for process, told in enumerate(cluster.share(told)) if told]
        if not failures:
            return restored
        may_pass, text, process = max(failures, key=lambda failure: failure[0])
        raise (OSError if may_pass else Damaged)(f"process {process}: {text}")

    def _set_aside(self, step: int) -> None:
        def move() -> None:
            folder = self._path.parent / DAMAGED
            make_folder(folder)
            taken = names(folder)
            free = next(name for number in itertools.count(1) if (name := f"{step}.{number}") not in taken)
            move_tree(self._path / str(step), folder / free)
            if self._mirror:
                self._mirror.drop(step)

        cluster.from_first(move)
        self._manager.reload()

    def wait(self) -> None:
        """Returns when every save that was started is complete on the disk or in the bucket.

        Raises:
            RunError: a save failed.
        """
        if self._writing is None:
            return
        step, expected = self._writing
        with self._errors(step), watchdog.phase("checkpoint", f"writing step {step}"):
            if self._mirror:
                self._mirror.wait()
            else:
                self._complete(step, expected)
        self._writing = None

    def _complete(self, step: int, expected: dict) -> None:
        """Returns when orbax has written a step, whose arrays must have the `expected` names, shapes and dtypes.

        Raises:
            Damaged: they do not. Errors of orbax are raised as they are.
        """
        # In a thread of its own, which no Ctrl-C reaches: orbax takes a wait that is interrupted for a failed save.
        with ThreadPoolExecutor(1, "checkpoint") as apart:
            apart.submit(self._manager.wait_until_finished).result()
        if jax.process_index() != 0:  # 0 completes it; in a bucket the others may get here first
            return
        state = self._manager.item_metadata(step)["state"]
        if state is None:
            raise Damaged(f"its files are not in {self._folder / str(step)}")
        written = named_leaves(state.tree)
        written = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in written.items()}
        if written != expected:
            wrong = next(name for name in written | expected if written.get(name) != expected.get(name))
            raise Damaged(f"{wrong} is {written.get(wrong)} in the files, not {expected.get(wrong)}")

    def close(self) -> None:
        """Waits for the save under way, then ends the manager's threads."""
        try:
            self.wait()
        finally:
            with self._errors(self.latest_step() if self._failed is None else self._failed):
                self._manager.close()

    @contextlib.contextmanager
    def _errors(self, step: int | None) -> Iterator[None]:
        """Turns any error of a save into a RunError that names the step and the newest checkpoint that is left."""
        try:
            yield
        except Exception as error:
            self._writing, self._failed = None, step
            cause = both_ends(one_line(error)) or type(error).__name__
            raise RunError(
                f"{self._path}: step {step} could not be written ({cause}){self._last_good(step)}"
            ) from error

    def _last_good(self, failed: int | None = None) -> str:
        """Returns the end of an error message: the newest step that is saved, other than the one that failed."""
        saved = self._mirror.steps if self._mirror else self._manager.all_steps()
        before = [step for step in saved if step != failed]
        if not before:
            return "; no step was saved before"
        # Orbax remembers steps that somebody has removed.
        steps = [step for step in before if is_remote(self._path) or (self._path / str(step)).is_dir()]
        if not steps:
            return f"; the steps that were saved before are not in {self._path} any more"
        return f"; fix this and run the same command again, which resumes from step {max(steps)}"
