"""Custom rewards: functions of the user, called in workers with all completions of one request at once.

    calls = CustomCalls(rewards, Pool(functions.call, workers=2, timeout=5.0).submit, timeout=5.0)
    batch = Batch(size)                         # one for each request
    futures = calls.submit(candidate, batch)    # of an Outcome, one for each function; its value is a Graded

Each function is called separately, with its own deadline, so that a failing or slow one does not disturb the others;
but a completion on which any function fails has no verdict (`verifier`).
The completions are in the order of the sample ids, so what a function sees does not depend on which completion was
drawn first. A resumed run calls it with the same batches.

A call may take the time-out of one completion times the size of the batch. If the call of a batch fails, its
completions are called again one by one, each as a batch of one, so that a bad completion spoils no other. If some fail
then too, the others are called once more together, because a reward that compares completions says nothing about one
alone. Where that call fails, or no single call did (the batch as a whole took too long, or the function is written for
one completion), the values of the single calls stay. If a call returns and only some of its values are wrong, these
completions fail and the others keep their values.

`rehearse` calls every function with some completions before a run starts, and warns of columns that none receives.

Not here: what a function receives and returns (`functions`); weights, and the sum with the other rewards (`verifier`);
processes and deadlines (`pool`). No jax.
"""

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from absl import logging

from igrpo_jax.errors import InputError, one_line, quoted
from igrpo_jax.records import Candidate
from igrpo_jax.rewards import functions
from igrpo_jax.rewards.failures import memory_fix
from igrpo_jax.rewards.functions import CustomReward, TrainerState
from igrpo_jax.rewards.pool import Outcome, Pool

_REPEATED = "custom reward %s failed on a batch of %d completions, so it is called with one at a time: %s"


class Graded(NamedTuple):
    """What one function gave for one completion."""

    value: float  # NaN if it was None
    logged: dict[str, list[float]]  # of the call, the same for all its completions
    extra: dict[str, Any]  # of this completion


@dataclass(frozen=True)
class _Row:
    """A completion that waits for its values."""

    candidate: Candidate
    futures: tuple[Future[Outcome], ...]  # one for each function


class Batch:
    """The completions of one request, collected until all `size` of them have come. Usable from any thread."""

    def __init__(self, size: int):
        self.size = size
        self._lock = threading.Lock()
        self._closed = False  # no more completions are expected
        self._rows: list[_Row] = []

    def add(self, row: _Row) -> list[_Row]:
        """Adds a completion. Returns all, in the order of their sample ids, if it is the last one; else nothing."""
        with self._lock:
            if not self._closed:
                self._rows.append(row)
                if len(self._rows) < self.size:
                    return []
                self._closed = True
                rows, self._rows = self._rows, []
                return sorted(rows, key=lambda row: row.candidate.sample_id)
        _give_up(row)
        return []

    def close(self) -> None:
        """Gives up a batch whose other completions will not come: those that wait in it get the status "error"."""
        with self._lock:
            self._closed = True
            rows, self._rows = self._rows, []
        for row in rows:
            _give_up(row)


# Of a completion whose batch was closed: sampling has ended before the others of its request were drawn.
GIVEN_UP = Outcome("error", detail="the batch of this completion was closed before it was complete")


def _give_up(row: _Row) -> None:
    for future in row.futures:
        future.set_result(GIVEN_UP)


class CustomCalls:
    """Calls custom rewards in the workers of a pool, once for each batch. Usable from any thread.

    Args:
        submit: calls `functions.call` in a worker, with the arguments that it gets and a `timeout` in seconds.
        timeout: seconds that a function may take for each completion of a batch.
        max_steps: number of updates of the run, for functions that ask.
        rehearses: whether this is not a run yet. Then no call that fails is warned about, and a completion that fails
            again alone has the error of its batch, whose counts are those that the function will see.

    Attributes:
        repeated: failures of batches that were called again one by one in a rehearsal, by function.
    """

    def __init__(
        self,
        rewards: Sequence[CustomReward],
        submit: Callable[..., Future[Outcome]],
        timeout: float,
        max_steps: int = 0,
        rehearses: bool = False,
    ):
        self.rewards = tuple(rewards)
        self._submit = submit
        self._timeout = timeout
        self._state = TrainerState(max_steps=max_steps)
        self._lock = threading.Lock()
        self._incomplete: set[Batch] = set()
        self._closed = False
        self._rehearses = rehearses
        self.repeated: dict[str, Outcome] = {}

    def start_step(self, step: int) -> None:
        """Begins a step of training (from 1), which functions see as the number of updates that are done."""
        self._state = self._state._replace(global_step=step - 1)

    def submit(self, candidate: Candidate, batch: Batch) -> tuple[Future[Outcome], ...]:
        """Adds a completion to its batch, and calls the functions if it is the last one.

        Does not block. The futures, in the order of `rewards`, never raise; the details of a failure name the function.
        """
        row = _Row(candidate, tuple(Future() for _ in self.rewards))
        with self._lock:
            self._incomplete.add(batch)
        rows = batch.add(row)
        if self._closed:
            batch.close()
        if rows:
            with self._lock:
                self._incomplete.discard(batch)
            for number in range(len(self.rewards)):
                self._call(number, rows, functools.partial(self._settle, number, rows))
        return row.futures

    def close(self) -> None:
        """Gives up batches that are not complete. Calls in progress end with the pool, and are not repeated."""
        self._closed = True
        with self._lock:
            incomplete = list(self._incomplete)
        for batch in incomplete:
            batch.close()

    def _call(self, number: int, rows: Sequence[_Row], settle: Callable[[Outcome], None]) -> None:
        """Calls a function with some completions; `settle` gets the outcome of the call, whose value is a Reply."""
        arguments = self.rewards[number], [row.candidate for row in rows], self._state
        called = self._submit(*arguments, timeout=self._timeout * len(rows))
        called.add_done_callback(lambda done: settle(done.result()))

    def _settle(self, number: int, rows: Sequence[_Row], outcome: Outcome) -> None:
        """Answers the completions of a batch, or calls them one by one if the call of all of them failed."""
        if outcome.status == "ok" or len(rows) == 1 or self._closed:
            self._answer(number, rows, self._by_row(number, len(rows), outcome))
            return
        path = self.rewards[number].path
        if self._rehearses:
            self.repeated[path] = outcome
        else:
            logging.log_every_n(logging.WARNING, _REPEATED, 100, path, len(rows), outcome.detail)
        alone: dict[int, Outcome] = {}

        def settle(place: int, outcome: Outcome) -> None:
            (own,) = self._by_row(number, 1, outcome)
            with self._lock:
                alone[place] = own
                is_last = len(alone) == len(rows)
            if is_last:
                self._settle_alone(number, rows, [alone[i] for i in range(len(rows))])

        for place, row in enumerate(rows):
            self._call(number, [row], functools.partial(settle, place))

    def _settle_alone(self, number: int, rows: Sequence[_Row], outcomes: list[Outcome]) -> None:
        """Answers completions that were called one by one. If only some failed, the others are called together before.

        Args:
            outcomes: outcomes of the single calls.
        """
        sound = [place for place, outcome in enumerate(outcomes) if outcome.status == "ok"]
        if not 1 < len(sound) < len(rows) or self._closed:
            self._answer(number, rows, outcomes)
            return

        def settle(outcome: Outcome) -> None:
            if outcome.status == "ok":
                for place, own in zip(sound, self._by_row(number, len(sound), outcome), strict=True):
                    outcomes[place] = own
            self._answer(number, rows, outcomes)

        self._call(number, [rows[place] for place in sound], settle)

    def _by_row(self, number: int, count: int, outcome: Outcome) -> list[Outcome]:
        """Returns the outcome of each of the `count` completions of a call, whose value is a Graded."""
        path, seconds = self.rewards[number].path, outcome.seconds / count
        if outcome.status != "ok":
            first = self.repeated.get(path)
            outcome = first if first and first.status == outcome.status == "error" else outcome
            return [replace(outcome, detail=f"{path}: {outcome.detail}", seconds=seconds)] * count
        return [
            Outcome("error", detail=f"{path}: {value}", seconds=seconds)
            if isinstance(value, str)
            else Outcome("ok", Graded(value, outcome.value.logged, extra), seconds=seconds)
            for value, extra in zip(outcome.value.values, outcome.value.extra, strict=True)
        ]

    def _answer(self, number: int, rows: Sequence[_Row], outcomes: Sequence[Outcome]) -> None:
        for row, outcome in zip(rows, outcomes, strict=True):
            row.futures[number].set_result(outcome)


def rehearse(
    rewards: Sequence[CustomReward],
    batches: Sequence[Sequence[Candidate]],
    timeout: float,
    memory_gib: float | None = None,
    max_steps: int = 0,
) -> list[list[list[float]]]:
    """Calls every function with every batch in its own worker, as a run does.

    Args:
        timeout: seconds that a function may take for each completion of a batch.
        memory_gib: address space that the worker may use, in GiB; None = no limit.
        max_steps: number of updates of the run, for functions that ask.

    Returns:
        The values by function, batch and completion; NaN if a function gave None.

    Raises:
        InputError: a function failed, took too long, or returned something that is not a number.
    """
    _warn_of_hidden(rewards, batches)
    preload = tuple(reward.module for reward in rewards)
    with (
        Pool(functions.call, workers=1, timeout=timeout, preload=preload, memory_gib=memory_gib) as pool,
        # Closed first, so that calls in progress when a function fails are neither repeated nor warned about.
        contextlib.closing(CustomCalls(rewards, pool.submit, timeout, max_steps, rehearses=True)) as calls,
    ):
        submitted = []
        for candidates in batches:
            batch = Batch(len(candidates))
            submitted.append([(candidate, calls.submit(candidate, batch)) for candidate in candidates])
        values: list[list[list[float]]] = []
        for number, reward in enumerate(rewards):
            values.append([])
            for completions in submitted:
                outcomes = [(candidate, futures[number].result()) for candidate, futures in completions]
                values[-1].append([_rehearsed(reward, *outcome) for outcome in outcomes])
        for path, failure in calls.repeated.items():  # alone, each completion has its value
            logging.warning(_REPEATED, path, max(map(len, batches)), failure.detail)
    return values


def _warn_of_hidden(rewards: Sequence[CustomReward], batches: Sequence[Sequence[Candidate]]) -> None:
    """Warns of columns of the data that no function gets, because another of its arguments has their name."""
    columns = {name for candidates in batches for candidate in candidates for name in candidate.columns}
    columns |= {reward.answer_column for reward in rewards}
    for name in (*functions.ALWAYS, *functions.ON_REQUEST):
        if rewards and name in columns:
            text = "custom rewards do not get the data's column %s, because another of their arguments has this name; "
            logging.warning(text + "rename the column if they need it", name)


# What Python says where a function treats a text as chat messages, and chat messages as a text.
_TAKES_TEXTS = re.compile(r"TypeError: string indices must be integers|AttributeError: 'str' object has no attribute")
_TAKES_LISTS = re.compile(
    r"AttributeError: 'list' object has no attribute|TypeError: (?:expected string or bytes-like|list indices must be)"
)

_NO_COMPLETIONS = (
    "; it has no parameter completions: if it returns a reward function, give that one a name in a module of your own, "
    "as in short = make_short(...), and name my_rewards:short"
)
_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(\w+)'")


def _rehearsed(reward: CustomReward, candidate: Candidate, outcome: Outcome) -> float:
    if outcome.status == "ok":
        return outcome.value.value
    detail = " ".join(outcome.detail.removeprefix(f"{reward.path}: ").split())
    is_slow = outcome.status == "timeout"
    fix = "; raise config.rewards.timeout, or make it faster" if is_slow else memory_fix(detail)
    if _TAKES_LISTS.search(detail) if reward.conversational else _TAKES_TEXTS.search(detail):
        wanted = "texts" if reward.conversational else "chat messages"
        fix = f"; set config.rewards.conversational = {not reward.conversational} if it expects {wanted}"
    unknown = _UNEXPECTED.search(detail)
    if unknown and unknown[1] in functions.given(reward, candidate):
        fix = "; end its parameters with **columns" if functions.takes_completions(reward) else _NO_COMPLETIONS
    raise InputError(
        f"config.rewards.{reward.setting} = {reward.path!r}: fails on the training problem "
        f"{quoted(one_line(candidate.question))}: {detail}{fix}"
    )
