"""Where a run begins: how it claims its folder, and the state and files that it goes on with."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from igrpo_jax.config import Config
from igrpo_jax.distributed import cluster
from igrpo_jax.learning.learner import Learner
from igrpo_jax.learning.train_state import TrainState
from igrpo_jax.outputs.workdir import Claim, check_shared, locked
from igrpo_jax.outputs.writer import Writer
from igrpo_jax.session.progress import Progress
from igrpo_jax.session.run_context import RunContext


class Beginning(NamedTuple):
    """Where a run begins, and the files that it goes on to write."""

    resumed_after: int  # the step whose state it is; 0 is before the first update
    learner: Learner
    state: TrainState
    progress: Progress
    writer: Writer


def claim_folder(
    context: RunContext, config: Config, check: Callable[[Path, Config], None], claim: Callable[[Path, Config], Claim]
) -> tuple[bool, Callable[[], None]]:
    """Claims the folder of `context` for the run of `config` only, until the run ends.

    Prints a message if it replaces a run with other settings that ended before its first checkpoint.

    Args:
        check: refuses a folder that this run cannot have, and writes nothing; called before the lock is taken.
        claim: recognises the run in the folder or begins one; called inside of the lock.

    Returns:
        Whether the folder already holds a run of this configuration, and a function that raises RunError if the claim
        has been lost.

    Raises:
        InputError: it holds another run, or files that belong to no run; it cannot be written; it is not the same
            folder on all processes.
    """
    workdir = context.workdir
    cluster.from_first(functools.partial(check, workdir, config))
    still_ours = context.stack.enter_context(locked(workdir))
    made = Claim(*cluster.from_first(functools.partial(claim, workdir, config)))
    if notice := made.notice(workdir):
        context.console.message(notice)
    check_shared(workdir)
    return made.resumes, still_ours
