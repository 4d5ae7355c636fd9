"""What a run remembers from step to step besides its TrainState: scores, skipped steps, warnings given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from igrpo_jax.errors import RunError
from igrpo_jax.learning.credit import Advantages
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.writer import Writer
from igrpo_jax.records import Group


@dataclass
class Progress:
    """What a run has seen so far; `meta` and `from_meta` carry it through a checkpoint."""

    scores: dict[int, dict[str, float]] = field(default_factory=dict)  # metrics of evaluations, by step
    skipped_optimizer_steps: int = 0  # all so far; they changed nothing, because loss or gradient was not finite
    skipped_in_a_row: int = 0  # steps in a row, up to the last one, that skipped an optimizer step
    named_programs: set[str] = field(default_factory=set)  # kinds of compiled programs that a warning has named
    evaluating: dict[str, Any] | None = None  # what the evaluation that is under way asks, with its step
    interrupted: int | None = None  # the step whose evaluation was cut short, and for which no launch has made up

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], skipped_optimizer_steps: int) -> "Progress":
        """Returns the progress that a checkpoint holds; its TrainState counts the `skipped_optimizer_steps`."""
        scores = {int(step): scores for step, scores in meta.get("evaluations", {}).items()}
        in_a_row = meta.get("bad_steps", 0)  # SFT runs once saved neither
        evaluating = meta.get("evaluating")
        interrupted = evaluating and evaluating["step"]
        return cls(scores, skipped_optimizer_steps, in_a_row, evaluating=evaluating, interrupted=interrupted)

    def meta(self) -> dict[str, Any]:
        """Returns the part that a checkpoint has to hold, in a form that JSON can represent."""
        scores = {str(step): values for step, values in self.scores.items()}
        return {"bad_steps": self.skipped_in_a_row, "evaluations": scores, "evaluating": self.evaluating}

    def recall(self, scores: Mapping[Any, dict[str, float]]) -> None:
        """Adds metrics of evaluations that the checkpoint does not hold, by step; JSON has made texts of the steps."""
        self.scores = {int(step): values for step, values in scores.items()} | self.scores
        if self.interrupted in self.scores:
            self.interrupted = None

    def count_skipped(self, optimizer_steps: int) -> bool:
        """Takes the number of optimizer steps skipped so far; returns whether the last step skipped one."""
        grown = optimizer_steps > self.skipped_optimizer_steps
        self.skipped_optimizer_steps = optimizer_steps
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if grown else 0
        return grown

    def first_of_their_kind(self, programs: Sequence[str]) -> list[str]:
        """Returns those of the compiled `programs` ("kind shape") whose kinds it has not returned before."""
        by_kind = {name.partition(" ")[0]: name for name in reversed(programs)}
        new = [name for kind, name in by_kind.items() if kind not in self.named_programs]
        self.named_programs |= by_kind.keys()
        return new

    def values(self, metric: str) -> dict[int, float]:
        """Returns `metric` by step, of the evaluations that have it."""
        return {step: scores[metric] for step, scores in self.scores.items() if metric in scores}


def check_finite(
    step: int,
    skipped_optimizer_steps: int,
    groups: Sequence[Group],
    advantages: Advantages,
    progress: Progress,
    most_in_a_row: int,
    writer: Writer,
    console: Console,
) -> None:
    """Counts the optimizer steps that are skipped so far, and writes the groups of a step that skipped one.

    Args:
        most_in_a_row: config.learner.max_nonfinite_steps.

    Raises:
        RunError: so many steps in a row skipped one.
    """
    if not progress.count_skipped(skipped_optimizer_steps):
        return
    kept = writer.nonfinite(step, groups, *advantages)
    console.message(f"step {step}: loss or gradient is not finite: nothing changed; its batch is in {kept}")
    in_a_row = progress.skipped_in_a_row
    if in_a_row >= most_in_a_row:
        raise RunError(
            f"steps {step - in_a_row + 1} to {step}: loss or gradient was not finite, "
            f"config.learner.max_nonfinite_steps = {in_a_row} times in a row (batches in {kept.parent}); "
            "lower optimizer.learning_rate in a new run, or check the model's own weights"
        )
