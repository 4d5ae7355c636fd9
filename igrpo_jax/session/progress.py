"""What a run remembers from step to step beside its TrainState: scores, steps that were not finite, warnings given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """What a run has seen so far; `meta` and `from_meta` carry it through a checkpoint."""

    scores: dict[int, dict[str, float]] = field(default_factory=dict)  # of evaluations, by step
    nonfinite_updates: int = 0  # optimizer steps so far that changed nothing, since they were not finite
    nonfinite_steps: int = 0  # steps in a row, up to the last one, with such an update
    named_programs: set[str] = field(default_factory=set)  # kinds of compiled programs that were warned of

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], nonfinite_updates: int) -> "Progress":
        """Returns the progress that a checkpoint holds; `nonfinite_updates` are counted in its state."""
        scores = {int(step): scores for step, scores in meta["evaluations"].items()}
        return cls(scores, nonfinite_updates, meta["bad_steps"])

    def meta(self) -> dict[str, Any]:
        """Returns what a checkpoint has to hold of it, as JSON can hold it."""
        return {"bad_steps": self.nonfinite_steps, "evaluations": {str(step): x for step, x in self.scores.items()}}

    def count_nonfinite(self, updates: int) -> bool:
        """Takes the number of updates so far that were not finite; returns whether the last step had one."""
        grown = updates > self.nonfinite_updates
        self.nonfinite_updates = updates
        self.nonfinite_steps = self.nonfinite_steps + 1 if grown else 0
        return grown

    def first_of_their_kind(self, programs: Sequence[str]) -> list[str]:
        """Returns those of the compiled `programs` ("kind shape") whose kinds it has not returned before."""
        by_kind = {name.partition(" ")[0]: name for name in reversed(programs)}
        new = [name for kind, name in by_kind.items() if kind not in self.named_programs]
        self.named_programs |= by_kind.keys()
        return new

    def is_best(self, step: int, metric: str) -> bool:
        """Returns whether `step` was evaluated and `metric` is the highest there so far."""
        known = {at: scores[metric] for at, scores in self.scores.items() if metric in scores}
        return step in known and known[step] >= max(known.values())

    def best_step(self, metric: str) -> int | None:
        """Returns the step with the highest `metric`, the latest of equals; None where no step has it."""
        return max((step for step in self.scores if self.is_best(step, metric)), default=None)
