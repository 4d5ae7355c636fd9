"""What every run works within: its folder, the compilation cache, the handling of SIGTERM, console and mesh."""

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from igrpo_jax.config import Config, to_dict
from igrpo_jax.distributed import cluster, preemption, watchdog
from igrpo_jax.distributed.disk_cache import use_disk_cache
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.loading import check_config
from igrpo_jax.outputs.console import Console
from igrpo_jax.storage.addresses import is_remote, names, path_of


class RunContext(NamedTuple):
    """What is set up before any input of a run is read, and what the run is opened and carried out in."""

    workdir: Path
    console: Console
    stack: contextlib.ExitStack  # what is entered here is left at the end of the run, however it ends


@contextlib.contextmanager
def run_context(config: Config, workdir: str | Path) -> Iterator[RunContext]:
    """Yields the path of `workdir`, a console and a stack; within the block, SIGTERM is a notice of preemption.

    Raises:
        InputError: `config` is not a configuration; `workdir` or config.compilation_cache is an address that cannot be
            reached.
    """
    check_config(config)
    path = path_of(f"--workdir {workdir}", workdir)
    use_disk_cache(config.compilation_cache)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(preemption.noticed(config.checkpoint.preemption_grace))
            yield RunContext(path, stack.enter_context(Console()), stack)
    except KeyboardInterrupt as error:
        error.add_note(_saved(path))  # now that no checkpoint is being written any more
        # A notebook keeps the traceback of a cell, and the state would stay on the devices while the cell is run again.
        traceback.clear_frames(error.__traceback__)
        raise


def _saved(workdir: Path) -> str:
    """Returns what a run that is interrupted has saved. A bucket, which may make a user wait, is not asked."""
    with contextlib.suppress(OSError):
        if not is_remote(workdir):
            steps = [int(name) for name in names(workdir / "checkpoints") if name.isdecimal()]
            if not steps:
                return f"no step is saved in {workdir}; the same command starts from the beginning"
            return saved_at(max(steps), workdir)
    return f"the same command resumes from what is saved in {workdir}, if anything is"


def saved_at(step: int, workdir: Path, comes_again: bool = False) -> str:
    """Returns what a run that ends early says where `step` is its last saved one.

    Args:
        comes_again: whether the same command would end there again.
    """
    resumes = "with that mended, a resume goes on" if comes_again else "the same command resumes"
    return f"step {step} is saved in {workdir}; {resumes} from there"


def preempted_after(step: int, total_steps: int, workdir: Path) -> Preempted:
    """Returns what a run raises that is preempted after `step`, which it has saved."""
    return Preempted(f"preempted: step {step} of {total_steps} is saved in {workdir}")


def enter_mesh(context: RunContext, config: Config, mesh: jax.sharding.Mesh, read: Mapping[str, Any]) -> None:
    """Checks that all processes run the same thing, then sets the mesh and starts the watchdog.

    Args:
        read: fingerprints of the inputs that were read, by name.

    Raises:
        InputError: the processes have different settings, or have read different things.
    """
    cluster.check_same({"config": to_dict(config), **read})
    context.stack.enter_context(jax.set_mesh(mesh))
    context.stack.enter_context(watchdog.watching(config.watchdog))
