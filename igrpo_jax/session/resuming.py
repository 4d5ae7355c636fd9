"""What a resume refuses and tells: a run that is past its end, lost rows, and a learning rate that changes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igrpo_jax.config import Config
from igrpo_jax.errors import InputError
from igrpo_jax.learning.optimizer import make_schedule
from igrpo_jax.outputs.console import Console


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
        f"{asked}: ends after step {total_steps}, and the run in {workdir} has come to step {resumed_after}; ask for "
        "at least as many steps, or start a new run with another --workdir"
    )


def tell_lost_rows(rows: int, expected: int, step: int, console: Console) -> None:
    """Prints a message if metrics.jsonl has fewer rows up to `step` than were written."""
    if rows < expected:
        console.message(
            f"metrics.jsonl has {rows} rows up to step {step}, {expected} were written: rows were lost, and stay so"
        )


def last_rate(rows: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """Returns the learning rate that `step` had, by `rows` of metrics.jsonl; None if its row was lost."""
    return next((row.get("learning_rate") for row in reversed(rows) if row["step"] == step), None)


def new_schedule(config: Config, steps: int, resumed_after: int, per_step: int, rate: float | None) -> str:
    """Returns the message on a learning rate that changes because the run gets another number of steps; "" for none.

    Args:
        steps: config.steps before the resume; 0 if it followed from config.epochs.
        resumed_after: the step that the run is resumed from.
        per_step: optimizer steps of a step.
        rate: `last_rate` of that step. Where it is None, the rate is that of a run of `steps`, which may be those of a
            resume that was killed before it saved anything.
    """
    if not (steps and config.steps and resumed_after) or steps == config.steps:
        return ""
    before, now = (make_schedule(config.optimizer, total * per_step) for total in (steps, config.steps))
    was = float(before(resumed_after * per_step - 1)) if rate is None else rate
    becomes = float(now(resumed_after * per_step))
    return (
        f"config.steps: {steps} -> {config.steps}: the learning rate rises and falls as in a run of {config.steps} "
        f"steps from now on; it was {was:.3g} at the end of step {resumed_after}, "
        f"and is {becomes:.3g} in step {resumed_after + 1}"
    )
