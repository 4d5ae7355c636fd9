"""What a resume refuses, and what it tells.

It refuses an end that is passed. It tells of lost rows, settings without use, and rewards or a learning rate that
change.
"""

from collections.abc import Mapping
from pathlib import Path

from igrpo_jax.config import Config, differences, to_dict
from igrpo_jax.errors import InputError
from igrpo_jax.learning.optimizer import make_schedule
from igrpo_jax.outputs.console import Console
from igrpo_jax.session.run_inputs import COLUMNS


def check_not_past_end(config: Config, total_steps: int, workdir: Path, resumed_after: int) -> None:
    """Raises InputError if `config` would end a run before the step that it has already reached.

    Args:
        total_steps: the step at which `config` ends the run.
        resumed_after: the step of the checkpoint that the run is resumed from.
    """
    if resumed_after <= total_steps:
        return
    asked = f"config.steps = {config.steps}" if config.steps else f"config.epochs = {config.epochs:g}"
    raise InputError(
        f"{asked}: ends after step {total_steps}, but the run in {workdir} has already reached step {resumed_after}; "
        f"set config.steps to at least {resumed_after}, or start a new run with another --workdir"
    )


def tell_lost_rows(rows: int, expected: int, step: int, console: Console) -> None:
    """Prints a message if metrics.jsonl has fewer rows up to `step` than were written."""
    if rows < expected:
        console.message(
            f"metrics.jsonl has {rows} rows up to step {step}, {expected} were written: the missing rows cannot be "
            "recovered"
        )


def unused_settings(made: Config, asked: Config, workdir: Path) -> str:
    """Returns the message on settings of evaluations that a finished run does not follow any more; "" for none.

    Args:
        made: the settings that the run has been made with.
        asked: those that it is started again with.
    """
    old, new = (to_dict(config)["evaluation"] for config in (made, asked))
    changed = differences(old, new, "config.evaluation.")
    if not changed:
        return ""
    return (
        f"the run is finished, so nothing was evaluated with the changed settings ({', '.join(changed)}), and "
        f"config.json keeps the old ones; to evaluate with others, run python -m igrpo_jax.evaluate --model {workdir}"
    )


def changed_rewards(before: Mapping[str, str], now: Mapping[str, str], resumed_after: int) -> str:
    """Returns the message on files of custom rewards, and columns that these get, that are not as they were; "" for
    none.

    Args:
        before: `RunInputs.reward_sources` when the checkpoint was saved; an older version saved none of the columns.
        now: those of this launch.
        resumed_after: the step that the run is resumed from.
    """
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    what, new = [], []
    if files := [name for name in changed if name != COLUMNS]:
        what.append(f"the file of {' and of '.join(files)}, which config.rewards names, has changed")
        new.append("functions")
    if COLUMNS in changed:
        what.append("columns of config.data.train, which rewards of your own get, have changed")
        new.append("columns")
    if not changed:
        return ""
    return (
        f"{', and '.join(what)}: from step {resumed_after + 1} on the rewards are those of the new "
        f"{' and '.join(new)}, and may not compare with earlier ones"
    )


def new_schedule(config: Config, before: int, now: int, resumed_after: int) -> str:
    """Returns the message on a learning rate that changes because the run gets another number of steps; "" for none.

    Args:
        config: the settings that the learner gets.
        before: steps of the run, from config.steps or config.epochs, when the checkpoint was saved.
        now: steps of the run from now on.
        resumed_after: the step that the run is resumed from.
    """
    if before == now or not resumed_after:
        return ""
    per_step = config.optimizer_steps_per_update
    old, new = (make_schedule(config.optimizer, steps * per_step) for steps in (before, now))
    was, becomes = float(old(resumed_after * per_step - 1)), float(new(resumed_after * per_step))
    return (
        f"{now} steps instead of {before}: the learning rate rises and falls as in a run of {now} steps from now on; "
        f"it was {was:.3g} at the end of step {resumed_after}, and is {becomes:.3g} in step {resumed_after + 1}"
    )
