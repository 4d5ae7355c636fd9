"""The verifier: computes the rewards of completions. Trainer and evaluation use this module of the folder.

    with Verifier(config.rewards, limit=config.rollout.max_completion_length) as verifier:
        futures = [verifier.submit(candidate) for candidate in …]   # returns at once
        scores = [future.result() for future in futures]            # never raises
    check_errors(scores, config.rewards.max_error_fraction)         # raises: no silent zeros

The reward is the weighted sum of the rewards in use. A reward of weight 0 is neither computed nor reported.

    accuracy   the stated answer equals the reference answer                            0 or 1
    format     one think block, then one answer block, nothing else                    0 or 1
    overlong   the soft over-long penalty of DAPO                                      -1 to 0
    (custom)   a function of the user, under its own name                              any number, or None
    judge      a model behind an OpenAI-compatible endpoint                            0 to 1, or none

Accuracy and format read opening + completion, because a chat template may open `<think>` in the prompt. A grading that
failed or exceeded its deadline scores 0 on everything, and its status says so. Where the judge gives no verdict, or
where every reward is a custom None, there is no reward at all: it is NaN with the status "invalid".

Not here: what an answer is and when two are equal (`mathematics.grader`), processes and deadlines (`pool`), requests to
the judge and the file of its verdicts (`judge`). No jax.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from absl import logging

from igrpo_jax.config import RewardsConfig
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.records import STATUSES, Candidate, Score
from igrpo_jax.rewards import judge as judge_module
from igrpo_jax.rewards.format import format_reward, overlong_penalty
from igrpo_jax.rewards.judge import Judge, Judgement
from igrpo_jax.rewards.mathematics import grader
from igrpo_jax.rewards.pool import Outcome, Pool


class VerifierError(RunError):
    """So many gradings failed that training on the rest would teach the wrong thing."""


@dataclass(frozen=True)
class Rules:
    """The rewards that a worker computes, and their weights in the sum."""

    weights: dict[str, float]  # of the rewards in use, by name; without the judge, which no worker asks
    limit: int = 0  # the most tokens that a completion may have, for the over-long penalty
    overlong_cache: int = 0  # the number of last tokens over which the penalty grows
    custom: str = ""  # "module:function"
    answer_column: str = "answer"  # the name under which a custom reward receives the reference answer


def rules_of(settings: RewardsConfig, limit: int = 0, answer_column: str = "answer") -> Rules:
    """Returns the rules that `settings` ask for.

    Raises:
        InputError: config.rewards.custom names nothing that can be called, or has the name of another reward.
    """
    weights = {name: getattr(settings, name) for name in _REWARDS}
    if settings.custom:
        load_custom(settings.custom)
        name = settings.custom.partition(":")[2]
        if name in weights or name == "judge":
            raise InputError(
                f'config.rewards.custom = {settings.custom!r}: "{name}" is a reward of the library; rename the function'
            )
        weights[name] = settings.custom_weight
    used = {name: weight for name, weight in weights.items() if weight != 0}
    return Rules(used, limit, settings.overlong_cache, settings.custom, answer_column)


def check(settings: RewardsConfig) -> None:
    """Raises InputError for rewards that cannot be computed: a wrong custom function, a judge that cannot be asked."""
    rules_of(settings)
    if settings.judge.weight:
        judge_module.connect(settings.judge)


@functools.lru_cache
def load_custom(path: str) -> Callable:
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


def _accuracy(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    return grader.grade(candidate.opening + candidate.text, candidate.answer)


def _format(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    return format_reward(candidate.opening + candidate.text), None, "ok"


def _overlong(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    length = len(candidate.tokens)
    return overlong_penalty(length, rules.limit, rules.overlong_cache), None, "ok"


def _custom(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    """Calls the user's function with TRL's signature, `function(prompts, completions, **columns)`, and lists of one.

    The columns are those of the data set, the reference answer under the name of its column, and `completion_ids`. The
    function returns None to skip a completion.
    """
    columns = {name: [value] for name, value in candidate.columns.items()} | {rules.answer_column: [candidate.answer]}
    columns |= {"prompts": [candidate.question], "completions": [candidate.text]}
    columns |= {"completion_ids": [[int(token) for token in candidate.tokens]]}
    values = load_custom(rules.custom)(**columns)
    if not isinstance(values, Sequence) or len(values) != 1:
        raise TypeError(f"{rules.custom} must return a list with one number or None per completion, not {values!r}")
    value = math.nan if values[0] is None else float(values[0])
    if values[0] is not None and not math.isfinite(value):
        raise ValueError(f"{rules.custom} returned {values[0]!r}; return None to skip a completion")
    return value, None, "ok"


# Name -> function of (candidate, rules) that returns (unweighted reward, extracted answer, status). Any other name is
# that of the custom reward.
_REWARDS: dict[str, Callable] = {"accuracy": _accuracy, "format": _format, "overlong": _overlong}


def score(candidate: Candidate, rules: Rules) -> Score:
    """Grades one completion in this process, without a deadline. Exceptions are raised, and `seconds` stays 0."""
    rewards, extracted, status = {}, None, "ok"
    for name in rules.weights:
        rewards[name], answer, reward_status = _REWARDS.get(name, _custom)(candidate, rules)
        extracted = answer if answer is not None else extracted
        status = reward_status if reward_status != "ok" else status
    return _total(Score(0.0, rewards, extracted, status), rules.weights)


def _total(partial: Score, weights: dict[str, float]) -> Score:
    """Returns `partial` with its reward: the weighted sum of what was not skipped, or NaN where all was skipped."""
    counted = [weights[name] * value for name, value in partial.rewards.items() if not math.isnan(value)]
    if counted or not weights:
        return replace(partial, reward=float(sum(counted)))
    return replace(partial, reward=math.nan, status="invalid", detail="every reward function returned None")


class Verifier:
    """Grades completions in killable processes and asks the judge; a context manager, usable from any thread.

    Args:
        limit: the most tokens that a completion may have, for the over-long penalty.
        answer_column: the column of the data set under whose name a custom reward receives the reference answer.
        cache: the file of the judge's verdicts, used where config.rewards.judge.cache is empty.

    Raises:
        InputError: a custom reward that cannot be imported; a judge that cannot be asked.
    """

    def __init__(
        self,
        settings: RewardsConfig,
        limit: int = 0,
        answer_column: str = "answer",
        cache: Path = Path("judge.sqlite"),
    ):
        self._rules = rules_of(settings, limit, answer_column)
        self._judge_weight = settings.judge.weight
        self._judge: Judge | None = None
        self._judgements: list[Judgement] = []
        if settings.judge.weight:
            self._judge = Judge(settings.judge, Path(settings.judge.cache or cache))
        preload = ("igrpo_jax.rewards.verifier", "igrpo_jax.rewards.mathematics.grader")
        self._pool = Pool(_call, settings.workers, settings.timeout, preload=preload)

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start_step(self) -> None:
        """Begins a new step of training: refills the judge's budget and clears its statistics."""
        self._judgements = []
        if self._judge:
            self._judge.start_step()

    def submit(self, candidate: Candidate) -> Future[Score]:
        """Returns a future of the Score. Does not block; the future never raises: see Score.status."""
        graded = self._grade(candidate, self._rules)
        if not self._judge:
            return graded
        judged = self._judge.submit(candidate.question, candidate.answer, candidate.opening + candidate.text)
        result: Future[Score] = Future()

        def combine(_: Future) -> None:  # called when the later of the two is done
            self._judgements.append(judged.result())
            result.set_result(self._judged(graded.result(), judged.result()))

        graded.add_done_callback(lambda _: judged.add_done_callback(combine))
        return result

    def check_answer(self, candidate: Candidate) -> Future[Score]:
        """Returns a future of the accuracy alone, whatever the rewards of training are. Evaluation counts this."""
        return self._grade(candidate, Rules({"accuracy": 1.0}))

    def classes(self, answers: Sequence[str | None]) -> Future[list[int]]:
        """Returns a future of `grader.classes` of the answers to one problem.

        Where that takes too long, answers are compared by their text alone.
        """
        result: Future[list[int]] = Future()

        def settle(done: Future) -> None:
            outcome = done.result()
            if outcome.status != "ok":
                logging.warning("answers are compared by their text alone: %s: %s", outcome.status, outcome.detail)
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
        self._pool.close()
        if self._judge:
            self._judge.close()

    def _grade(self, candidate: Candidate, rules: Rules) -> Future[Score]:
        result: Future[Score] = Future()
        graded = self._pool.submit(score, candidate, rules)
        graded.add_done_callback(lambda done: result.set_result(_to_score(done.result(), rules)))
        return result

    def _judged(self, graded: Score, judgement: Judgement) -> Score:
        """Returns the rule-based score combined with the judge's.

        Without a verdict there is no reward, because a partial sum cannot be compared with a complete one.
        """
        rewards = graded.rewards | {"judge": math.nan if judgement.score is None else judgement.score}
        if graded.status in ("timeout", "error"):
            return replace(graded, rewards=rewards)
        if judgement.score is None:
            return replace(graded, rewards=rewards, reward=math.nan, status="invalid", detail=judgement.detail)
        status = "ok" if graded.status == "invalid" else graded.status  # the judge gave a reward
        blended = replace(graded, rewards=rewards, status=status, detail="")
        return _total(blended, self._rules.weights | {"judge": self._judge_weight})


def _call(function: Callable, *args: object) -> object:
    """Calls a function, in a worker."""
    return function(*args)


def _to_score(outcome: Outcome, rules: Rules) -> Score:
    """Returns the score of a worker's outcome; a failure scores 0."""
    if outcome.status == "ok":
        return replace(outcome.value, seconds=outcome.seconds)
    logging.log_every_n(logging.WARNING, "verifier: %s: %s", 100, outcome.status, outcome.detail)
    return Score(0.0, dict.fromkeys(rules.weights, 0.0), None, outcome.status, outcome.seconds, outcome.detail)


def statistics(scores: Sequence[Score]) -> dict[str, float]:
    """Returns the `verifier/…` metrics of a step. Latencies are seconds in the worker. All are 0 without scores."""
    metrics = {}
    for status in STATUSES[1:]:
        metrics[f"verifier/{status}_frac"] = sum(score.status == status for score in scores) / max(len(scores), 1)
    seconds = sorted(score.seconds for score in scores) or [0.0]
    for name, fraction in (("p50", 0.5), ("p99", 0.99)):  # nearest rank
        metrics[f"verifier/latency_{name}"] = seconds[max(math.ceil(fraction * len(seconds)) - 1, 0)]
    return metrics


def check_errors(scores: Sequence[Score], max_error_fraction: float) -> None:
    """Stops a run in which too many gradings failed.

    Raises:
        VerifierError: more than `max_error_fraction` of `scores` timed out, failed or have no verdict.
    """
    failed = [score for score in scores if score.status in ("timeout", "error", "invalid")]
    if not scores or len(failed) / len(scores) <= max_error_fraction:
        return
    count = {status: sum(score.status == status for score in failed) for status in STATUSES}
    detail = next((score.detail for score in failed if score.detail), "")
    hint = ". A larger config.rewards.timeout helps where the machine is overloaded" if count["timeout"] else ""
    raise VerifierError(
        f"of {len(scores)} gradings {count['timeout']} timed out, {count['error']} failed and {count['invalid']} have "
        f"no verdict: more than the share of {max_error_fraction} in config.rewards.max_error_fraction"
        + (f". The first: {detail}" if detail else "")
        + hint
    )
