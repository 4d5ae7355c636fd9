"""The custom reward: a function of the user, called in a worker with all completions of one request at once.

    calls = CustomCalls(CustomReward("my_rewards:short"), pool, timeout=config.rewards.timeout)
    batch = Batch(size)                        # one for each request
    future = calls.submit(candidate, batch)    # of an Outcome, whose value is a float; NaN where the function gave None

The function has TRL's signature, `function(prompts, completions, completion_ids, **columns)`, and returns one number or
None per completion. All arguments are lists in the order of the sample ids, so what the function sees does not depend
on which completion was drawn first. A resumed run calls it with the same batches.

A batch may run for the time-out of one completion times its size. If the call of a batch fails, its completions are
called again one by one, each as a batch of one, so that a bad completion spoils no other. If the call returns and only
some of its values are wrong, these completions fail and the others keep their values.

Not here: weights, and the sum with the other rewards (`verifier`); processes and deadlines (`pool`). No jax.
"""

import functools
import importlib
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from absl import logging

from igrpo_jax.errors import InputError
from igrpo_jax.records import Candidate
from igrpo_jax.rewards.pool import Outcome, Pool


@dataclass(frozen=True)
class CustomReward:
    """Which function to call, and how it receives the reference answer."""

    path: str  # "module:function"
    answer_column: str = "answer"  # the name under which the function receives the reference answers

    @property
    def name(self) -> str:
        """The name of the function, under which its values are reported."""
        return self.path.partition(":")[2]


@functools.lru_cache
def load(path: str) -> Callable:
    """Returns the function that "module:function" names. Python searches for the module in its usual places.

    Raises:
        InputError: there is no such module or function, or the function is a coroutine.
    """
    module, _, name = path.partition(":")
    where = f"config.rewards.custom = {path!r}"
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises during its import
        raise InputError(
            f"{where}: cannot be imported ({type(error).__name__}: {error}); write it as module:function, the module "
            "in the current folder or installed"
        ) from error
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise InputError(f"{where}: must be a plain function, not {type(function).__name__} or async")
    return function


def values(reward: CustomReward, candidates: Sequence[Candidate]) -> list[float | str]:
    """Calls the user's function with completions of one prompt. Workers run this.

    Returns:
        For each candidate its value, NaN where the function returned None, or a text that says why the value is wrong.

    Raises:
        TypeError, ValueError: the function returned no list, or a list of another length.
        Exception: whatever the user's function raises.
    """
    columns = {name: [candidate.columns[name] for candidate in candidates] for name in candidates[0].columns}
    columns[reward.answer_column] = [candidate.answer for candidate in candidates]
    columns["prompts"] = [candidate.question for candidate in candidates]
    columns["completions"] = [candidate.text for candidate in candidates]
    columns["completion_ids"] = [[int(token) for token in candidate.tokens] for candidate in candidates]
    returned = load(reward.path)(**columns)
    expected = "must return a list with one number or None per completion"
    if not isinstance(returned, Sequence):
        raise TypeError(f"{expected}, not {returned!r}")
    if len(returned) != len(candidates):
        raise ValueError(f"{expected}: {len(returned)} values for {len(candidates)} completions")
    return [_checked(value) for value in returned]


def _checked(value: Any) -> float | str:
    if value is None:
        return math.nan
    try:
        number = float(value)
    except Exception as error:  # whatever an object of the user's raises
        return f"returned {value!r}, which is no number ({type(error).__name__}: {error})"[:500]
    return number if math.isfinite(number) else f"returned {value!r}; return None to skip a completion"


@dataclass(frozen=True)
class _Row:
    """A completion that waits for its value."""

    candidate: Candidate
    future: Future[Outcome] = field(default_factory=Future)


class Batch:
    """The completions of one request, collected until all `size` of them have come. Usable from any thread."""

    def __init__(self, size: int):
        self.size = size
        self._lock = threading.Lock()
        self._closed = False  # no further completion is expected
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
        row.future.set_result(_INCOMPLETE)
        return []

    def close(self) -> None:
        """Gives up a batch whose other completions will not come: those that wait in it get the status "error"."""
        with self._lock:
            self._closed = True
            rows, self._rows = self._rows, []
        for row in rows:
            row.future.set_result(_INCOMPLETE)


_INCOMPLETE = Outcome("error", detail="the batch of this completion was closed before it was complete")


class CustomCalls:
    """Calls a custom reward in the workers of a pool, once for each batch. Usable from any thread.

    Args:
        timeout: seconds that the function may take for each completion of a batch.
    """

    def __init__(self, reward: CustomReward, pool: Pool, timeout: float):
        self.name = reward.name
        self._reward = reward
        self._pool = pool
        self._timeout = timeout
        self._lock = threading.Lock()
        self._incomplete: set[Batch] = set()
        self._closed = False

    def submit(self, candidate: Candidate, batch: Batch) -> Future[Outcome]:
        """Adds a completion to its batch, and calls the function if it is the last one.

        Does not block. The future never raises; the details of a failure name the function.
        """
        row = _Row(candidate)
        with self._lock:
            self._incomplete.add(batch)
        rows = batch.add(row)
        if self._closed:
            batch.close()
        if rows:
            with self._lock:
                self._incomplete.discard(batch)
            self._call(rows)
        return row.future

    def close(self) -> None:
        """Gives up batches that are not complete. Calls in progress end with the pool, and are not repeated."""
        self._closed = True
        with self._lock:
            incomplete = list(self._incomplete)
        for batch in incomplete:
            batch.close()

    def _call(self, rows: Sequence[_Row]) -> None:
        candidates = [row.candidate for row in rows]
        called = self._pool.submit(values, self._reward, candidates, timeout=self._timeout * len(rows))
        called.add_done_callback(lambda done: self._settle(rows, done.result()))

    def _settle(self, rows: Sequence[_Row], outcome: Outcome) -> None:
        """Answers the completions of a call, or calls them one by one if the call of all of them failed."""
        path, seconds = self._reward.path, outcome.seconds / len(rows)
        if outcome.status == "ok":
            for row, value in zip(rows, outcome.value, strict=True):
                if isinstance(value, str):
                    row.future.set_result(Outcome("error", detail=f"{path}: {value}", seconds=seconds))
                else:
                    row.future.set_result(Outcome("ok", value, seconds=seconds))
        elif len(rows) > 1 and not self._closed:
            logging.log_every_n(
                logging.WARNING,
                "rewards.custom: %s failed on a batch of %d completions, which are now called one by one: %s",
                *(100, path, len(rows), outcome.detail),
            )
            for row in rows:
                self._call([row])
        else:
            for row in rows:
                row.future.set_result(replace(outcome, detail=f"{path}: {outcome.detail}", seconds=seconds))
