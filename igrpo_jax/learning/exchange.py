"""What each process sampled of a step, made known to all.

Process i of n samples and scores the prompts at the places i, i + n, ... of a step. Advantages, metrics and the update,
which is one program over all devices, need every group on every process, in the same order. So each sends its
ProcessRollout: JSON for what is small, and two arrays. Prompts don't travel: place and redraw say which
they are. Scores are sent as they are, so that all processes count, and fail, alike.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from igrpo_jax.distributed import cluster
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.records import Completion, Group, Prompt, Score
from igrpo_jax.rewards.judge import Judgement
from igrpo_jax.sampling.scheduler import Usage

Prompts = Callable[[int], Sequence[Prompt]]  # of a step, by the number of the redraw; 0 are the first ones


@dataclass(frozen=True)
class ProcessRollout:
    """One process's part of a step."""

    groups: dict[int, Group]  # that stayed, by place; of the n-th redraw of place p, of P places, it is n * P + p
    redrawn: int  # groups that did not stay
    scores: list[Score]  # of those
    draft_tokens: int  # drawn, also for those
    completion_tokens: int
    judgements: list[Judgement]
    usage: Usage
    seconds: float  # sampling and scoring
    waited: float  # of these, only for the verifier


def places(count: int) -> range:
    """Places of a step with `count` prompts that this process works on."""
    return range(jax.process_index(), count, jax.process_count())


def everywhere(mine: ProcessRollout | None, prompts: Prompts) -> list[ProcessRollout]:
    """The shares of all processes, on each of them, in the order of the processes.

    Raises:
        Preempted: a process gives None, since it was told to leave; then all leave.
    """
    if jax.process_count() > 1:
        parts = cluster.gather(encode(mine) if mine else b"")
        if all(parts):
            return [decode(part, prompts) for part in parts]
    elif mine:
        return [mine]
    raise Preempted


def encode(share: ProcessRollout) -> bytes:
    """`share` as bytes: the length of a JSON text, the text, all token ids as int32, all log-probs as float32."""
    groups, ids, logprobs = [], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for place, group in share.groups.items():
        members = (*group.drafts, *group.completions)
        ids += [group.context, *(one.tokens for one in members)]
        logprobs += [one.logprobs for one in members]
        rows = [_row(one) for one in members]
        groups.append({"place": place, "best": group.best, "context": len(group.context), "members": rows})
    small = {name: value for name, value in vars(share).items() if name not in ("groups", "scores", "judgements")}
    small |= {"groups": groups, "usage": asdict(share.usage)}
    small |= {name: [asdict(one) for one in getattr(share, name)] for name in ("scores", "judgements")}
    text = json.dumps(small).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned
    arrays = np.concatenate(ids).astype(np.int32), np.concatenate(logprobs).astype(np.float32)
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays)


def _row(one: Completion) -> dict[str, Any]:
    named = ("stage", "sample_id", "finished", "text")
    return {name: getattr(one, name) for name in named} | {"length": len(one.tokens), "score": asdict(one.score)}


def decode(data: bytes, prompts: Prompts) -> ProcessRollout:
    """The ProcessRollout that `encode` made `data` of."""
    start = 8 + int.from_bytes(data[:8], "little")
    small = json.loads(data[8:start])
    drawn = sum(row["length"] for group in small["groups"] for row in group["members"])
    ids = np.frombuffer(data, np.int32, drawn + sum(group["context"] for group in small["groups"]), start)
    logprobs = np.frombuffer(data, np.float32, drawn, start + ids.nbytes)
    cut_ids, cut_logprobs = _cutter(ids), _cutter(logprobs)
    groups = {}
    for group in small["groups"]:
        number, place = divmod(group["place"], len(prompts(0)))
        context = cut_ids(group["context"])
        stages = {"draft": [], "refine": []}
        for row in group["members"]:
            length, score = row.pop("length"), Score(**row.pop("score"))
            one = Completion(tokens=cut_ids(length), logprobs=cut_logprobs(length), score=score, **row)
            stages[one.stage].append(one)
        drafts, completions = (tuple(some) for some in stages.values())
        groups[group["place"]] = Group(prompts(number)[place], drafts, group["best"], context, completions)
    small |= {"groups": groups, "usage": Usage(**small["usage"])}
    small |= {"scores": [Score(**one) for one in small["scores"]]}
    small |= {"judgements": [Judgement(**one) for one in small["judgements"]]}
    return ProcessRollout(**small)


def _cutter(array: np.ndarray) -> Callable[[int], np.ndarray]:
    """Gives the next `count` elements of `array`."""
    at = 0

    def cut(count: int) -> np.ndarray:
        nonlocal at
        at += count
        return array[at - count : at]

    return cut
