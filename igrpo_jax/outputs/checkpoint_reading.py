"""How others read the checkpoints of a run, which may be under way: which steps there are, and their parameters."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from igrpo_jax.distributed import cluster
from igrpo_jax.errors import InputError, named
from igrpo_jax.outputs.checkpoint_mirror import READ, copy_for_readers, read_copy, steps_in
from igrpo_jax.outputs.checksums import check
from igrpo_jax.outputs.workdir import is_mirrored
from igrpo_jax.storage.addresses import resolved

_READ_AT_ONCE = 2 << 30  # bytes of parameters, over all devices, that `read_params` reads and checks at a time


class Removed(InputError):
    """A run has removed a checkpoint since it was chosen, because there are newer ones."""


def saved_step(workdir: Path, step: int | None = None) -> int:
    """Returns `step` where the run in `workdir` has a checkpoint of it, and its newest step where `step` is None.

    All processes call it, because orbax lets them wait for each other, and get the same step: a run that goes on may
    save another one meanwhile.

    Raises:
        InputError: there is no such checkpoint.
    """
    path = _folder(workdir)
    if is_mirrored(workdir):
        steps = steps_in(path)
    else:
        with _reader(path) as manager:
            steps = sorted(manager.all_steps())
    if not steps or step not in (None, *steps):
        fix = f"it has steps {', '.join(map(str, steps))}" if steps else "wait for the first one (of step 0)"
        lacks = (
            f"{workdir}: holds no checkpoint" if step is None else f"--step {step}: {workdir} holds no checkpoint of it"
        )
        raise InputError(f"{lacks}; {fix}")
    return cluster.from_first(lambda: steps[-1]) if step is None else step


def read_params(workdir: Path, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads the parameters of a run's checkpoint, and nothing else, in the shardings and dtypes of `abstract`.

    Raises:
        Removed: the run has removed the checkpoint meanwhile.
        InputError: the checkpoint is damaged, or cannot be read.
    """
    path = _folder(workdir)
    try:
        if is_mirrored(workdir):
            copy = copy_for_readers(path)
            return read_copy(path, step, READ, lambda: _read(copy, step, abstract))
        return _read(path, step, abstract)
    except Exception as error:  # what orbax raises depends on which byte of which file is wrong
        if not (path / str(step)).is_dir():
            raise Removed(
                f"{workdir}: its checkpoint of step {step} was removed in the meantime (checkpoint.keep); give a newer "
                "--step, or leave it out"
            ) from error
        if isinstance(error, InputError):  # the bucket cannot be read, which says nothing about the checkpoint
            raise
        raise InputError(
            f"{workdir}: its checkpoint of step {step} can't be used ({named(error)}); give another --step"
        ) from error


def _read(folder: Path, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads and checks the parameters in float32, in which they were saved, a part at a time."""
    params: dict[str, jax.Array] = {}
    with _reader(folder) as manager:
        sums = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]["checksums"]
        for part in _parts(abstract):
            saved = {path: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding) for path, x in part.items()}
            item = {"params": saved}
            how = ocp.checkpoint_utils.construct_restore_args(item)
            state = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
            read = manager.restore(step, args=ocp.args.Composite(state=state))["state"]["params"]
            check(read, sums, "params.")
            params |= {path: x.astype(abstract[path].dtype) for path, x in read.items()}
    return params


def _parts(abstract: dict[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Yields `abstract` in parts of at most _READ_AT_ONCE bytes, or of one array that is larger."""
    part, size = {}, 0
    for path, x in abstract.items():
        if part and size + 4 * x.size > _READ_AT_ONCE:
            yield part
            part, size = {}, 0
        part[path] = x
        size += 4 * x.size
    yield part


def _folder(workdir: Path) -> Path:
    """Returns the folder of the checkpoints of the run in `workdir`.

    Raises:
        InputError: there is none.
    """
    path = resolved(workdir) / "checkpoints"
    if not path.is_dir():
        raise InputError(
            f"{workdir}: has no checkpoints: it is not the folder of a run, or its first one is not written yet"
        )
    return path


def _reader(folder: Path) -> ocp.CheckpointManager:
    """Returns a manager that reads checkpoints, and writes nothing."""
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False))
