"""What every run works within: its folder, the compilation cache, the handling of SIGTERM, console and mesh."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from igrpo_jax.config import Config, to_dict
from igrpo_jax.distributed import cluster, preemption, watchdog
from igrpo_jax.distributed.programs import use_disk_cache
from igrpo_jax.outputs.console import Console
from igrpo_jax.storage.addresses import path_of


class Surroundings(NamedTuple):
    """What is set up before any input of a run is read."""

    workdir: Path
    console: Console
    stack: contextlib.ExitStack  # what is entered here is left at the end of the run, however it ends


@contextlib.contextmanager
def surroundings(config: Config, workdir: str | Path) -> Iterator[Surroundings]:
    """Yields the path of `workdir`, a console and a stack; within the block, SIGTERM is a notice of preemption.

    Raises:
        InputError: `workdir` or config.compilation_cache is an address that cannot be reached.
    """
    path = path_of(f"--workdir {workdir}", workdir)
    use_disk_cache(config.compilation_cache)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preemption.noticed(config.checkpoint.preemption_grace))
        yield Surroundings(path, stack.enter_context(Console()), stack)


def enter_mesh(stack: contextlib.ExitStack, config: Config, mesh: jax.sharding.Mesh, read: Mapping[str, Any]) -> None:
    """Checks that all processes run the same thing, then sets the mesh and starts the watchdog.

    Args:
        read: fingerprints of the inputs that were read, by name.

    Raises:
        InputError: the processes have different settings, or have read different things.
    """
    cluster.check_same({"config": to_dict(config), **read})
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(watchdog.watching(config.watchdog))
