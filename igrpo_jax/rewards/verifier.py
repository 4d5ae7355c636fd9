"""The verifier: computes the rewards of completions. The trainer and the evaluation grade through this module.

    with Verifier(config.rewards, max_completion=config.rollout.max_completion_length) as verifier:
        futures = [verifier.submit(candidate) for candidate in …]   # returns at once
        scores = [future.result() for future in futures]            # never raises
    check_errors(scores, config.rewards.max_error_fraction)         # of `failures`; raises: no silent zeros

The reward is the weighted sum of the rewards in use. A reward of weight 0 is neither computed nor reported, except a
custom one, which is computed and reported but adds nothing.

    (rules)    accuracy, format and overlong, which a worker computes (`rules`)        see there
    (custom)   functions of the user, by name, called with all completions at once     any number, or None
    judge      a model behind an OpenAI-compatible endpoint                            0 to 1, or none

A grading that failed or exceeded its deadline says nothing about the answer: its rewards are NaN, and its status says
why. An evaluation counts it as wrong. Where the judge gives no verdict, or where all rewards are custom and all
returned None, the reward is NaN and the status "invalid".

Not here: what an answer is and when two are equal (`mathematics.grader`), processes and deadlines (`pool`), calls
of the user's functions (`custom`), requests to the judge and the file of its verdicts (`judge`). No jax.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import logging

from igrpo_jax.config import RewardsConfig
from igrpo_jax.errors import InputError
from igrpo_jax.records import STATUSES, Candidate, Score
from igrpo_jax.rewards import endpoint, functions, verdicts
from igrpo_jax.rewards import judge as judge_module
from igrpo_jax.rewards.custom import GIVEN_UP, Batch, CustomCalls
from igrpo_jax.rewards.functions import CustomReward
from igrpo_jax.rewards.judge import Judge, Judgement
from igrpo_jax.rewards.mathematics import grader
from igrpo_jax.rewards.pool import Outcome, Pool
from igrpo_jax.rewards.rules import REWARDS, Rules, rules_of, score, total

REMEMBERED = 1024  # gradings whose outcome an equal completion gets too


def custom_rewards(settings: RewardsConfig, answer_column: str = "answer") -> list[CustomReward]:
    """Returns the custom rewards.

    Raises:
        InputError: a path names nothing that can be called, or a function has the name of another reward.
    """
    setting = "functions" if settings.functions else "custom"
    rewards = []
    for path, weight in settings.custom_weights.items():
        functions.load(path, setting)
        reward = CustomReward(path, weight, setting, answer_column, settings.conversational)
        if reward.name in REWARDS or reward.name == "judge":
            raise InputError(
                f'config.rewards.{setting} = {path!r}: "{reward.name}" is a reward of the library; rename the function'
            )
        rewards.append(reward)
    return rewards


def check(settings: RewardsConfig, process: int = 0) -> None:
    """Raises InputError for rewards that cannot be computed: a wrong custom function, a judge that cannot be asked.

    Args:
        process: number of this process of a run.
    """
    custom_rewards(settings)
    if settings.judge.weight:
        endpoint.connect(settings.judge)
        if cache := verdicts.named(settings.judge):
            verdicts.check(verdicts.of_process(cache, process))


class Verifier:
    """Grades completions in killable processes and asks the judge; a context manager, usable from any thread.

    Args:
        max_completion: the most tokens that a completion may have, for the over-long penalty.
        answer_column: the column of the data set under whose name custom rewards receive the reference answer.
        cache: the file of the judge's verdicts, used where config.rewards.judge.cache is empty.
        max_steps: number of updates of the run, for custom rewards that ask.
        process: number of this process of a run, each of which has its own file of verdicts.

    Raises:
        InputError: a custom reward that cannot be imported; a judge that cannot be asked.
    """

    def __init__(
        self,
        settings: RewardsConfig,
        max_completion: int = 0,
        answer_column: str = "answer",
        cache: Path = Path("judge.sqlite"),
        max_steps: int = 0,
        process: int = 0,
    ):
        self._rules = rules_of(settings, max_completion)
        rewards = custom_rewards(settings, answer_column)
        self._weights = self._rules.weights | {reward.name: reward.weight for reward in rewards}
        self._judge_weight = settings.judge.weight
        self._lock = threading.Lock()
        self._recent: dict[tuple, Future[Outcome]] = {}  # gradings, the latest last
        self._is_closed = False  # failures of the gradings that `close` gives up are not logged
        self._judge: Judge | None = None
        self._judgements: list[Judgement] = []
        if settings.judge.weight:
            cache = verdicts.of_process(verdicts.named(settings.judge) or cache, process)
            self._judge = Judge(settings.judge, cache)
        modules = (__name__, f"{grader.__name__}:{grader.warm_up.__name__}", *(reward.module for reward in rewards))
        memory = settings.memory_gib
        self._pool = Pool(_call, settings.workers, settings.timeout, preload=modules, memory_gib=memory)
        call = functools.partial(self._pool.submit, functions.call)
        self._custom = CustomCalls(rewards, call, settings.timeout, max_steps) if rewards else None

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start_step(self, step: int) -> None:
        """Begins a step of training (from 1): refills the judge's budget and clears its statistics."""
        self._judgements = []
        if self._custom:
            self._custom.start_step(step)
        if self._judge:
            self._judge.start_step()
            self._judge.save()

    def submit(self, candidate: Candidate, batch: Batch | None = None) -> Future[Score]:
        """Returns a future of the Score. Does not block; the future never raises: see Score.status.

        Args:
            batch: batch of the candidate's request; None makes a batch of one. Only custom rewards read it: where there
                is one, no future of the batch is done before all its completions were submitted.
        """
        graded = self._grade(candidate, self._rules)
        if self._custom:
            outcomes = _listed(self._custom.submit(candidate, batch or Batch(1)))
            graded = _combined(graded, outcomes, self._with_custom)
        if not self._judge:
            return graded
        judged = self._judge.submit(candidate.question, candidate.answer, candidate.opening + candidate.text)
        return _combined(graded, judged, self._with_judge)

    def check_answer(self, candidate: Candidate, batch: Batch | None = None) -> Future[Score]:
        """Returns a future of the accuracy only, whatever the rewards of training are. Evaluation counts this.

        It is 0 where the grading failed, so that every answer counts.
        `batch` is not read; with it this method is a `Grade` (`sampling.scoring`).
        """
        return self._grade(candidate, Rules({"accuracy": 1.0}), failed=0.0)

    def classes(self, answers: Sequence[str | None]) -> Future[list[int]]:
        """Returns a future of `grader.classes` of the answers to one problem.

        Where that takes too long, answers are compared only by their text.
        """
        result: Future[list[int]] = Future()

        def settle(done: Future) -> None:
            outcome = done.result()
            if outcome.status != "ok" and not self._is_closed:
                logging.warning("answers are compared only by their text: %s: %s", outcome.status, outcome.detail)
            texts = list(dict.fromkeys(answers))
            by_text = [-1 if answer is None else texts.index(answer) for answer in answers]
            result.set_result(outcome.value if outcome.status == "ok" else by_text)

        self._pool.submit(grader.classes, list(answers)).add_done_callback(settle)
        return result

    @property
    def judgements(self) -> list[Judgement]:
        """The judgements of what was submitted since `start_step`; empty without a judge."""
        return self._judgements

    def statistics(self, scores: Sequence[Score], judgements: Sequence[Judgement]) -> dict[str, float]:
        """Returns the `verifier/…` metrics of `scores` and, with a judge, the `judge/…` metrics of `judgements`."""
        return statistics(scores) | (judge_module.statistics(judgements) if self._judge else {})

    def close(self) -> None:
        """Ends workers and requests. Gradings without a result get the status "error" or "invalid"."""
        self._is_closed = True
        if self._custom:
            self._custom.close()
        self._pool.close()
        if self._judge:
            self._judge.close()

    def _grade(self, candidate: Candidate, rules: Rules, failed: float = math.nan) -> Future[Score]:
        """Returns a future of the score by `rules`; all its rewards are `failed` where the grading failed."""
        result: Future[Score] = Future()
        if self._custom and not rules.weights:  # there are custom rewards only
            result.set_result(Score(0.0, {}, None, "ok"))
            return result
        graded = self._graded_once(candidate, rules)
        score_of = lambda outcome: _to_score(self._noticed(outcome, failed), rules, failed)
        graded.add_done_callback(lambda done: result.set_result(score_of(done.result())))
        return result

    def _graded_once(self, candidate: Candidate, rules: Rules) -> Future[Outcome]:
        """Returns a future of the outcome of a grading, one for all recent completions that must be graded alike.

        Once a problem is learned, most samples of its group are the same text. A failure is not remembered. A worker is
        given only what the outcome may depend on: no columns, and 0 as the number of the sample.
        """
        candidate = replace(candidate, columns={}, sample_id=0, stage="", draft=None)
        read = (candidate.question, candidate.opening, candidate.text, candidate.answer, candidate.tokens.tobytes())
        key = (read, rules is self._rules)
        with self._lock:
            graded = self._recent.pop(key, None)
            if graded is None or (graded.done() and graded.result().status != "ok"):
                graded = self._pool.submit(score, candidate, rules)
            self._recent[key] = graded
            if len(self._recent) > REMEMBERED:
                del self._recent[next(iter(self._recent))]
        return graded

    def _noticed(self, outcome: Outcome, failed: float = math.nan) -> Outcome:
        """Returns an outcome, and warns of a failure, whose rewards are `failed`."""
        if outcome.status != "ok" and outcome is not GIVEN_UP and not self._is_closed:
            counts = "is left out of means and advantages" if math.isnan(failed) else "counts as wrong"
            text = "verifier: a completion could not be graded and %s (%s): %s"
            logging.log_every_n(logging.WARNING, text, 100, counts, outcome.status, outcome.detail)
        return outcome

    def _with_custom(self, graded: Score, outcomes: Sequence[Outcome]) -> Score:
        """Returns the score combined with the custom rewards' outcomes. Where any failed, every reward is NaN."""
        assert self._custom is not None, "custom rewards have given the outcomes"
        seconds = graded.seconds + sum(outcome.seconds for outcome in outcomes)
        if graded.status in ("timeout", "error"):
            return replace(graded, rewards=dict.fromkeys(self._weights, math.nan), seconds=seconds)
        for outcome in outcomes:
            if outcome.status != "ok":
                return replace(_failure(self._noticed(outcome), self._weights), seconds=seconds)
        rewards, logged, extra = dict(graded.rewards), {}, {}
        for reward, outcome in zip(self._custom.rewards, outcomes, strict=True):
            rewards[reward.name] = outcome.value.value
            extra |= outcome.value.extra
            for name, values in outcome.value.logged.items():
                logged[name] = logged.get(name, []) + values
        combined = replace(graded, rewards=rewards, seconds=seconds, logged=logged, extra=extra)
        return total(combined, self._weights)

    def _with_judge(self, graded: Score, judgement: Judgement) -> Score:
        """Keeps the judgement, and returns the score of the other rewards combined with the judge's.

        Without a verdict there is no reward, because a partial sum cannot be compared with a complete one.
        """
        self._judgements.append(judgement)
        rewards = graded.rewards | {"judge": math.nan if judgement.score is None else judgement.score}
        if graded.status in ("timeout", "error"):
            return replace(graded, rewards=rewards)
        if judgement.score is None:
            return replace(graded, rewards=rewards, reward=math.nan, status="invalid", detail=judgement.detail)
        status = "ok" if graded.status == "invalid" else graded.status  # the judge gave a reward
        blended = replace(graded, rewards=rewards, status=status, detail="")
        return total(blended, self._weights | {"judge": self._judge_weight})


def _call(function: Callable, *args: object) -> object:
    """Calls a function, in a worker."""
    return function(*args)


def _combined(first: Future, second: Future, combine: Callable[[Any, Any], Any]) -> Future:
    """Returns a future of what `combine` makes of both results."""
    result: Future = Future()

    def settle(_: Future) -> None:  # called when the later of the two is done
        result.set_result(combine(first.result(), second.result()))

    first.add_done_callback(lambda _: second.add_done_callback(settle))
    return result


def _listed(futures: Sequence[Future]) -> Future[list]:
    """Returns a future of the results of all `futures`, in their order."""
    results: Future[list] = Future()
    results.set_result([])
    for future in futures:
        results = _combined(results, future, lambda before, result: [*before, result])
    return results


def _to_score(outcome: Outcome, rules: Rules, failed: float = math.nan) -> Score:
    """Returns the score of a worker's outcome; all rewards of a failure are `failed`."""
    if outcome.status == "ok":
        return replace(outcome.value, seconds=outcome.seconds)
    return _failure(outcome, rules.weights, failed)


def _failure(outcome: Outcome, weights: dict[str, float], failed: float = math.nan) -> Score:
    """Returns the score of a grading that failed: `failed` for all rewards."""
    return Score(failed, dict.fromkeys(weights, failed), None, outcome.status, outcome.seconds, outcome.detail)


def statistics(scores: Sequence[Score]) -> dict[str, float]:
    """Returns the `verifier/…` metrics of a step. Latencies are seconds in the worker. All are 0 without scores."""
    metrics = {}
    for status in STATUSES[1:]:
        metrics[f"verifier/{status}_frac"] = sum(score.status == status for score in scores) / max(len(scores), 1)
    seconds = sorted(score.seconds for score in scores) or [0.0]
    for name, fraction in (("p50", 0.5), ("p99", 0.99)):  # nearest rank
        metrics[f"verifier/latency_{name}"] = seconds[max(math.ceil(fraction * len(seconds)) - 1, 0)]
    return metrics
