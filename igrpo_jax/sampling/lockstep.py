"""What the leader of a team tells the other processes: each program that it runs, with what the host gives it.

Only the leader has the queue, the verifier's answers and every decision. The others run what they are told in the same
order and look at no result, so nothing that differs between hosts, such as when a score arrives, makes them diverge.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import serialization

from igrpo_jax.distributed.teams import Team
from igrpo_jax.sampling.state import Chunk, Fork, Rows, Sampling

SPLIT: dict[str, type] = {"prefill": Chunk, "fork": Fork, "decode": Rows}  # arguments that shards have parts of


class Call(NamedTuple):
    """One call of a program."""

    program: str  # its name
    shape: tuple[int, ...]
    split: Chunk | Fork | Rows | None  # numpy arrays whose first dimension is split over the shards
    whole: Sampling | np.ndarray | None  # what every device gets completely


def send(team: Team, call: Call | None) -> None:
    """Sends `call` to the other processes of `team`, which run it; None ends the rollout or evaluation."""
    if len(team.processes) > 1:
        team.send(to_bytes(call))


def received(team: Team) -> Iterator[Call]:
    """Yields the calls that the leader sends, until the rollout or evaluation has ended."""
    for message in team.messages():
        call = from_bytes(message)
        if call is None:
            return
        yield call


def to_bytes(call: Call | None) -> bytes:
    """Returns `call` as MessagePack, for `from_bytes`."""
    if call is None:
        return b""
    parts: list[Any] = [list(part) if isinstance(part, tuple) else part for part in call]
    return serialization.msgpack_serialize(parts)


def from_bytes(message: bytes) -> Call | None:
    """Returns what `to_bytes` made `message` of."""
    if not message:
        return None
    program, shape, split, whole = serialization.msgpack_restore(message)
    return Call(
        program,
        tuple(shape),
        split if split is None else SPLIT[program](*split),
        Sampling(*whole) if isinstance(whole, list) else whole,
    )
