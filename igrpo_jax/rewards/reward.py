"""Rewards of completions: what the trainer uses of this package.

    with Verifier(config.rewards) as verifier:
        futures = [verifier.submit(text, answer, prefix) for ...]   # returns at once
        scores = [future.result() for future in futures]            # never raises
    check_errors(scores, config.rewards.max_error_fraction)         # but this does: never a silent zero

The reward is the weighted sum of `accuracy` (the stated answer equals the reference) and `format` (one think block,
then one answer block). Both read prefix + completion, because a chat template may open `<think>` in the prompt. A
reward of weight 0 is neither computed nor reported. A grading that ran over its deadline or failed scores 0 on
everything and says so.

Not here: what an answer is and when two are equal (`math_grader`), processes and deadlines (`pool`). No jax.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from absl import logging

from igrpo_jax import config
from igrpo_jax.batch import Score
from igrpo_jax.rewards import format as format_room
from igrpo_jax.rewards import math_grader
from igrpo_jax.rewards.pool import Outcome, Pool


class VerifierError(Exception):
    """So many gradings failed that training on the rest would teach the wrong thing."""


def _accuracy(text: str, answer: str) -> tuple[float, str | None, str]:
    return math_grader.grade(text, answer)


def _format(text: str, answer: str) -> tuple[float, str | None, str]:
    return format_room.format_reward(text), None, "ok"


# name -> (text, answer) -> (unweighted reward, extracted answer, status)
_REWARDS: dict[str, Callable] = {"accuracy": _accuracy, "format": _format}


def weights_of(settings: config.Rewards) -> dict[str, float]:
    """{"accuracy": 1.0, …} of the rewards in use."""
    return {name: getattr(settings, name) for name in _REWARDS if getattr(settings, name) != 0}


def score(completion: str, answer: str, prefix: str, weights: Mapping[str, float]) -> Score:
    """Grades one completion in this process: no deadline, exceptions escape. `seconds` is left at 0."""
    text = prefix + completion
    rewards, extracted, status = {}, None, "ok"
    for name in weights:
        rewards[name], found, verdict = _REWARDS[name](text, answer)
        extracted = found if found is not None else extracted
        status = verdict if verdict != "ok" else status
    return Score(_total(rewards, weights), rewards, extracted, status)


def _total(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return float(sum(weights[name] * value for name, value in rewards.items()))


class Verifier:
    """Grades completions in killable processes; a context manager, usable from any thread."""

    def __init__(self, settings: config.Rewards):
        self._weights = weights_of(settings)
        preload = ("igrpo_jax.rewards.reward", "igrpo_jax.rewards.math_grader")
        self._pool = Pool(score, settings.workers, settings.timeout, preload=preload)

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, completion: str, answer: str, prefix: str = "") -> Future[Score]:
        """A future of the Score. Does not block; the future never raises: see Score.status."""
        result: Future[Score] = Future()
        graded = self._pool.submit(completion, answer, prefix, self._weights)
        graded.add_done_callback(lambda done: result.set_result(self._to_score(done.result())))
        return result

    def close(self) -> None:
        """Ends the workers; gradings without a result end with the status "error"."""
        self._pool.close()

    def _to_score(self, outcome: Outcome) -> Score:
        if outcome.status == "ok":
            graded = outcome.value
            return Score(graded.reward, graded.rewards, graded.extracted, graded.status, outcome.seconds)
        logging.log_every_n(logging.WARNING, "verifier: %s: %s", 100, outcome.status, outcome.detail)
        return Score(0.0, dict.fromkeys(self._weights, 0.0), None, outcome.status, outcome.seconds)


def statistics(scores: Sequence[Score]) -> dict[str, float]:
    """The `verifier/…` metrics of a step; latencies are seconds in the worker. All 0 without scores."""

    def share(status: str) -> float:
        return sum(score.status == status for score in scores) / max(len(scores), 1)

    seconds = sorted(score.seconds for score in scores) or [0.0]

    def percentile(fraction: float) -> float:  # nearest rank
        return seconds[max(math.ceil(fraction * len(seconds)) - 1, 0)]

    return {
        "verifier/timeout_frac": share("timeout"),
        "verifier/error_frac": share("error"),
        "verifier/unparseable_frac": share("unparseable"),
        "verifier/latency_p50": percentile(0.5),
        "verifier/latency_p99": percentile(0.99),
    }


def check_errors(scores: Sequence[Score], max_error_fraction: float) -> None:
    """Stops a run whose rewards mean nothing.

    Raises:
        VerifierError: more than `max_error_fraction` of `scores` timed out or failed.
    """
    timeouts = sum(score.status == "timeout" for score in scores)
    errors = sum(score.status == "error" for score in scores)
    if scores and (timeouts + errors) / len(scores) > max_error_fraction:
        raise VerifierError(
            f"{timeouts} of {len(scores)} gradings timed out and {errors} failed, more than the share of "
            f"{max_error_fraction} in config.rewards.max_error_fraction; their reward of 0 is no verdict. Look at the "
            "verifier's warnings above; a larger config.rewards.timeout helps where the machine is overloaded"
        )
