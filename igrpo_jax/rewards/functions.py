"""Calls a custom reward, which is a function of the user's, in a worker: what it receives, and what it may return.

The signature is TRL's (trl/trainer/grpo_trainer.py, `_calculate_rewards`). All arguments are passed by name:

    prompts, completions   texts, or lists of chat messages where `rewards.conversational` is set
    completion_ids         the token ids of each completion
    **columns              the other columns of the data set, and the reference answers, if there are any, under their
                           column's name
    stage, drafts          the stage of the completions, and the draft that the prompt of each shows, None for none
    trainer_state          `global_step` and `max_steps`, for rewards that change during training
    log_metric(name, value), log_extra(column, values)

The first four and `drafts` are lists with one entry per completion. What follows the columns is passed where the
function names or accepts it; TRL has no `stage` and `drafts`. The function returns one number or None per completion,
or is async and returns that when it is awaited.

Not here: batches, deadlines, and the repetition of calls that failed (`custom`). No jax.
"""

import asyncio
import contextlib
import functools
import hashlib
import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from igrpo_jax.config import IN_A_FILE
from igrpo_jax.errors import InputError
from igrpo_jax.records import Candidate
from igrpo_jax.schema import objects

# What every function receives, and what it receives where it names or accepts it, whatever columns the data have.
ALWAYS = ("prompts", "completions", "completion_ids")
ON_REQUEST = ("stage", "drafts", "trainer_state", "log_metric", "log_extra")
LARGEST = 1e18  # of a value; advantages are computed in float32, which the square of 1e19 and more leaves


@dataclass(frozen=True)
class CustomReward:
    """Which function to call, and how it receives its arguments."""

    path: str  # "module:function"
    weight: float = 1.0  # in the sum of the rewards
    setting: str = "custom"  # the field of config.rewards that names it
    answer_column: str = "answer"  # the name under which the function receives the reference answers
    conversational: bool = False  # whether prompts and completions are lists of chat messages

    @property
    def module(self) -> str:
        """The name of the module that holds the function."""
        return self.path.partition(":")[0]

    @property
    def name(self) -> str:
        """The name of the function, under which its values are reported."""
        return self.path.partition(":")[2]


class TrainerState(NamedTuple):
    """What a function may know of the run, under TRL's names."""

    global_step: int = 0  # number of updates that are done
    max_steps: int = 0  # number of updates of the run


class Reply(NamedTuple):
    """The result of one call."""

    values: list[float | str]  # by completion: NaN if the function gave None, or a text that says what is wrong
    logged: dict[str, list[float]]  # what was given to `log_metric`, by name
    extra: list[dict[str, Any]]  # what was given to `log_extra`, by completion and then by column


@functools.lru_cache
def load(path: str, setting: str = "custom") -> Callable:
    """Returns the function that "module:function" names. Python searches for the module in its usual places.

    Raises:
        InputError: there is no such module or function, or it was written in a notebook or a shell.
    """
    if path.startswith("__main__:") and not getattr(sys.modules["__main__"], "__file__", None):
        where = f"config.rewards.{setting} = {path!r}"
        raise InputError(f"{where}: the verifier's processes can't import what is in no file; {IN_A_FILE}")
    return objects.load(path, f"config.rewards.{setting} = {path!r}")


def sources(rewards: Sequence[CustomReward]) -> dict[str, str]:
    """Returns the SHA-256 of the file of each module that holds a function, by the module's name.

    A module without a file that can be read is left out, and so is what the modules import.
    """
    hashes = {}
    for reward in rewards:
        with contextlib.suppress(OSError, TypeError, AttributeError):  # the last two: it has no file
            file = Path(importlib.import_module(reward.module).__file__)
            hashes[reward.module] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashes


def call(reward: CustomReward, candidates: Sequence[Candidate], state: TrainerState) -> Reply:
    """Calls the user's function with completions of one prompt and stage. Workers run this.

    Raises:
        TypeError, ValueError: the function returned no list, or a list of another length.
        Exception: whatever the user's function raises. A note says where, and which columns the function received.
    """
    function = load(reward.path, reward.setting)
    log = _Log(len(candidates))
    arguments = _arguments(reward, candidates)
    try:
        drafts = [None if each.draft is None else _message("assistant", each.draft, reward) for each in candidates]
        extras = candidates[0].stage, drafts, state, log.metric, log.column
        returned = function(**arguments | _accepted(function, dict(zip(ON_REQUEST, extras, strict=True))))
        if inspect.isawaitable(returned):
            returned = _event_loop().run_until_complete(returned)
        values = _listed(returned, len(candidates))
    except BaseException as error:
        error.add_note(f"(in {_place(function, error)}; it was given {_described(arguments)})")
        raise
    return Reply(values, log.metrics, log.extra)


def _arguments(reward: CustomReward, candidates: Sequence[Candidate]) -> dict[str, list]:
    arguments = {name: [candidate.columns[name] for candidate in candidates] for name in candidates[0].columns}
    if all(candidate.answer for candidate in candidates):
        arguments[reward.answer_column] = [candidate.answer for candidate in candidates]
    arguments["prompts"] = [_message("user", candidate.question, reward) for candidate in candidates]
    arguments["completions"] = [_message("assistant", candidate.text, reward) for candidate in candidates]
    arguments["completion_ids"] = [[int(token) for token in candidate.tokens] for candidate in candidates]
    return arguments


def given(reward: CustomReward, candidate: Candidate) -> set[str]:
    """Returns the names of the arguments that every function receives, whether it names them or not."""
    return set(_arguments(reward, [candidate]))


def takes_completions(reward: CustomReward) -> bool:
    """Returns whether the function has a parameter for the completions; what makes reward functions has none."""
    return "completions" in _accepted(load(reward.path, reward.setting), {"completions": None})


def _message(role: str, text: str, reward: CustomReward) -> Any:
    """Returns a text as the function receives it."""
    return [{"role": role, "content": text}] if reward.conversational else text


def _accepted(function: Callable, extras: dict[str, Any]) -> dict[str, Any]:
    """Returns those of `extras` that the function has a parameter for."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have no signature
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return extras
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in extras.items() if name in names}


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Returns the worker's event loop; it outlives a call, so that the user's clients keep their connections."""
    return asyncio.new_event_loop()


def _listed(returned: Any, count: int) -> list[float | str]:
    expected = "must return a list with one number or None per completion"
    if not isinstance(returned, Collection) or isinstance(returned, str | bytes | dict | set):
        raise TypeError(f"{expected}, not {returned!r}")
    if len(returned) != count:
        raise ValueError(f"{expected}: {_counted(len(returned), 'value')} for {_counted(count, 'completion')}")
    return [_checked(value) for value in returned]


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _checked(value: Any) -> float | str:
    if value is None:
        return math.nan
    try:
        number = float(value)
    except Exception as error:  # whatever an object of the user's raises
        return f"returned {value!r}, which is not a number ({type(error).__name__}: {error})"[:500]
    if not math.isfinite(number):
        return f"returned {value!r}; return None to skip a completion"
    if abs(number) > LARGEST:
        return f"returned {value!r}, which is beyond what training can square; return at most {LARGEST:g}"
    return number


class _Log:
    """Collects what a function logs during one call."""

    def __init__(self, count: int):
        self.metrics: dict[str, list[float]] = {}
        self.extra: list[dict[str, Any]] = [{} for _ in range(count)]

    def metric(self, name: str, value: float) -> None:
        """Keeps a number under `name`; TRL's `log_metric`."""
        self.metrics.setdefault(_plain(name), []).append(float(value))

    def column(self, column: str, values: Sequence) -> None:
        """Keeps a value for each completion; TRL's `log_extra`."""
        if len(values) != len(self.extra):
            given, wanted = _counted(len(values), "value"), _counted(len(self.extra), "completion")
            raise ValueError(f"log_extra({column!r}): {given} for {wanted}")
        for row, value in zip(self.extra, values, strict=True):
            row[_plain(column)] = _jsonable(value)


def _plain(name: Any) -> str:
    """Returns a name without lone surrogates, which neither JSON in utf-8 nor MessagePack can hold."""
    return str(name).encode("utf-8", "replace").decode()


def _jsonable(value: Any) -> Any:
    """Returns None, bool, text, and numbers that JSON has, as they are, and all else as the text that Python prints."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    for kind in (bool, int, float):
        if isinstance(value, kind) and abs(value) < 2**63:
            return kind(value)
    return str(value)


def _place(function: Callable, error: BaseException) -> str:
    """Returns the name, file and line where the user's function failed, as far as they are known."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is `call`
    if code is not None:
        inside = [frame for frame in frames if frame.filename == code.co_filename]
        if not inside:  # the arguments do not fit, or what was returned is wrong
            return f"{code.co_name}, {code.co_filename}, line {code.co_firstlineno}"
        frames = inside
    return f"{frames[-1].name}, {frames[-1].filename}, line {frames[-1].lineno}" if frames else str(function)


def _described(arguments: dict[str, list]) -> str:
    columns = [name for name in arguments if name not in ALWAYS]
    return f"{', '.join(ALWAYS)} and {'the columns ' + ', '.join(columns) if columns else 'no column'}"
