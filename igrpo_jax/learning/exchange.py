"""Exchanges the rollouts of a step, so that every process has what each of them sampled.

The leader of team i of n (`teams`) samples and scores the prompts at the positions i, i + n, ... of a step. Advantages,
metrics and the update, which is one program over all devices, need every group on every process, in the same order. So
each process sends its RolloutPart as MessagePack (`flax.serialization`, which keeps the dtypes of arrays). Prompts
don't travel: a StepPosition says which they are. Scores are sent as they are, so that all processes count, and fail,
alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
from flax import serialization

from igrpo_jax.distributed import cluster
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.records import Completion, Group, Prompt, Score
from igrpo_jax.rewards.judge import Judgement
from igrpo_jax.sampling.requests import Usage

Prompts = Callable[[int], Sequence[Prompt]]  # the prompts of a step by the number of the redraw; 0 are the first ones


class StepPosition(NamedTuple):
    """Which prompt of a step a group belongs to."""

    index: int  # type: ignore[assignment]  # position in the step; hides tuple.index
    redraw: int = 0  # how often a fresh prompt took this position

    def random_index(self, prompts: int) -> int:
        """Returns the integer that randomness is derived from, in a step of `prompts` prompts.

        It is not the data set's row, because a short epoch may bring one row twice in a step.
        """
        return self.redraw * prompts + self.index


@dataclass(frozen=True)
class RolloutPart:
    """One process's part of a step."""

    groups: dict[StepPosition, Group]  # the groups that enter the update
    redrawn: int  # number of groups whose position a fresh prompt took
    redrawn_equal: int  # number of those whose rewards are all equal
    scores: list[Score]  # scores of all completions of the redrawn groups, and of other refinements that were left out
    draft_tokens: int  # tokens of all drafts, those of redrawn groups included
    completion_tokens: int  # tokens of all refinements, those of redrawn groups included
    judgements: list[Judgement]
    usage: Usage
    seconds: float  # time of sampling and scoring
    weight_seconds: float  # time until the weights were ready to sample with
    waited: float  # the part of `seconds` in which nothing was left to sample and only scores were awaited


def all_gather_parts(own: RolloutPart | None, prompts: Prompts) -> list[RolloutPart]:
    """Returns the parts of all processes, on each of them, in the order of the processes.

    Raises:
        Preempted: a process passed None because it received SIGTERM; then all of them stop.
    """
    if jax.process_count() > 1:
        parts = cluster.gather(to_bytes(own) if own else b"")
        if all(parts):
            return [from_bytes(part, prompts) for part in parts]
    elif own:
        return [own]
    raise Preempted


def to_bytes(part: RolloutPart) -> bytes:
    """Returns `part` as bytes, for `from_bytes`."""
    groups = [
        {
            "position": list(position),
            "kept": group.kept,
            "context": group.context,
            "drafts": [asdict(draft) for draft in group.drafts],
            "completions": [asdict(completion) for completion in group.completions],
        }
        for position, group in part.groups.items()
    ]
    tree = {
        **vars(part),
        "groups": groups,
        "usage": asdict(part.usage),
        "scores": [asdict(score) for score in part.scores],
        "judgements": [asdict(judgement) for judgement in part.judgements],
    }
    # In place, because a copy by `jax.tree.map` would sort the keys of the rewards.
    return serialization.msgpack_serialize(_encoded_texts(tree), in_place=True)


def from_bytes(data: bytes, prompts: Prompts) -> RolloutPart:
    """Returns the RolloutPart that `to_bytes` made `data` of; its arrays can't be written to."""
    tree = _decoded_texts(serialization.msgpack_restore(data))
    groups = {}
    for fields in tree["groups"]:
        position = StepPosition(*fields["position"])
        groups[position] = Group(
            prompt=prompts(position.redraw)[position.index],
            drafts=tuple(map(_completion, fields["drafts"])),
            kept=fields["kept"],
            context=fields["context"],
            completions=tuple(map(_completion, fields["completions"])),
        )
    tree |= {
        "groups": groups,
        "usage": Usage(**tree["usage"]),
        "scores": [Score(**score) for score in tree["scores"]],
        "judgements": [Judgement(**judgement) for judgement in tree["judgements"]],
    }
    return RolloutPart(**tree)


def _completion(fields: dict[str, Any]) -> Completion:
    return Completion(**fields | {"score": Score(**fields["score"])})


def _encoded_texts(tree: Any) -> Any:
    """Returns `tree` with its texts as bytes: a completion may hold lone surrogates, which MessagePack refuses."""
    return _map_leaves(lambda x: x.encode("utf-8", "surrogatepass") if isinstance(x, str) else x, tree)


def _decoded_texts(tree: Any) -> Any:
    """Returns `tree` with its bytes as texts; it holds no other bytes."""
    return _map_leaves(lambda x: x.decode("utf-8", "surrogatepass") if isinstance(x, bytes) else x, tree)


def _map_leaves(change: Callable[[Any], Any], tree: Any) -> Any:
    """Applies `change` to all that is neither dict nor list. `jax.tree.map` would sort the keys of the rewards."""
    if isinstance(tree, dict):
        return {name: _map_leaves(change, value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_map_leaves(change, value) for value in tree]
    return change(tree)
