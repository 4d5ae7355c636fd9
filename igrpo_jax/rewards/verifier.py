"""Rewards of completions: what the trainer uses of this package.

    with Verifier(config.rewards, limit=config.rollout.max_completion_length) as verifier:
        futures = [verifier.submit(candidate) for candidate in …]   # returns at once
        scores = [future.result() for future in futures]            # never raises
    check_errors(scores, config.rewards.max_error_fraction)         # but this does: never a silent zero

The reward is the weighted sum of those in use; a reward of weight 0 is neither computed nor reported.

    accuracy   the stated answer equals the reference                                  0 or 1
    format     one think block, then one answer block, nothing else                    0 or 1
    overlong   the soft over-long penalty of DAPO                                      -1 to 0
    (custom)   a function of the user's, by its own name                               any number, or None
    judge      a model behind an OpenAI-compatible endpoint                            0 to 1, or none

Accuracy and format read prefix + completion, because a chat template may open `<think>` in the prompt. A grading that
ran over its deadline or failed scores 0 on everything and says so. Where the judge gives no verdict, or where every
reward is a custom None, there is no reward at all: NaN and the status "invalid".

Not here: what an answer is and when two are equal (`grader`), processes and deadlines (`pool`), requests and
their cache (`judge`). No jax.
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
from igrpo_jax.rewards import format as format_room
from igrpo_jax.rewards import judge as judge_room
from igrpo_jax.rewards.judge import Judge, Judgement
from igrpo_jax.rewards.mathematics import grader
from igrpo_jax.rewards.pool import Outcome, Pool


class VerifierError(RunError):
    """So many gradings failed that training on the rest would teach the wrong thing."""


@dataclass(frozen=True)
class Rules:
    """What a worker computes of a completion, and how it adds up."""

    weights: dict[str, float]  # of the rewards in use, by name; the judge is not a worker's
    limit: int = 0  # tokens a completion may have, for the over-long penalty
    overlong_cache: int = 0  # last tokens of these over which the penalty grows
    custom: str = ""  # "module:function"
    answer_column: str = "answer"  # under which a custom reward gets the reference


def rules_of(settings: RewardsConfig, limit: int = 0, answer_column: str = "answer") -> Rules:
    """The rules that `settings` ask for.

    Raises:
        InputError: config.rewards.custom names nothing that can be called, or takes the name of another reward.
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
    """Raises InputError for rewards that cannot be had: a wrong custom function, a judge that cannot be asked."""
    rules_of(settings)
    if settings.judge.weight:
        judge_room.connect(settings.judge)


@functools.lru_cache
def load_custom(path: str) -> Callable:
    """The function that "module:function" names; the module is looked for where Python imports from.

    Raises:
        InputError: there is no such module or function, or it is a coroutine.
    """
    module, _, name = path.partition(":")
    where = f"config.rewards.custom = {path!r}"
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise InputError(
            f"{where}: cannot be imported ({type(error).__name__}: {error}); write it as module:function, the module "
            "in the current folder or installed"
        ) from error
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise InputError(f"{where}: must be a plain function, not {type(function).__name__} or async")
    return function


def _accuracy(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    return grader.grade(candidate.prefix + candidate.text, candidate.answer)


def _format(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    return format_room.format_reward(candidate.prefix + candidate.text), None, "ok"


def _overlong(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    length = len(candidate.tokens)
    return format_room.overlong_penalty(length, rules.limit, rules.overlong_cache), None, "ok"


def _custom(candidate: Candidate, rules: Rules) -> tuple[float, str | None, str]:
    """TRL's signature, `function(prompts, completions, **columns)`, called with lists of one.

    The columns are the data set's, the reference under the name of its column, and `completion_ids`. None skips.
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


# name -> (candidate, rules) -> (unweighted reward, extracted answer, status); a name that is not here is the custom one
_REWARDS: dict[str, Callable] = {"accuracy": _accuracy, "format": _format, "overlong": _overlong}


def score(candidate: Candidate, rules: Rules) -> Score:
    """Grades one completion in this process: no deadline, exceptions escape. `seconds` is left at 0."""
    rewards, extracted, status = {}, None, "ok"
    for name in rules.weights:
        rewards[name], found, verdict = _REWARDS.get(name, _custom)(candidate, rules)
        extracted = found if found is not None else extracted
        status = verdict if verdict != "ok" else status
    return _total(Score(0.0, rewards, extracted, status), rules.weights)


def _total(partial: Score, weights: dict[str, float]) -> Score:
    """`partial` with its reward: the weighted sum without what was skipped, NaN where nothing is left."""
    counted = [weights[name] * value for name, value in partial.rewards.items() if not math.isnan(value)]
    if counted or not weights:
        return replace(partial, reward=float(sum(counted)))
    return replace(partial, reward=math.nan, status="invalid", detail="every reward function returned None")


class Verifier:
    """Grades completions in killable processes and asks the judge; a context manager, usable from any thread.

    Args:
        limit: tokens a completion may have, for the over-long penalty.
        answer_column: of the data set, under which a custom reward gets the reference.
        cache: file of the judge's verdicts where config.rewards.judge.cache is empty.

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
        self._judge_weight, self._judge = settings.judge.weight, None
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
        """A new step of training: the judge's budget is whole again, and its statistics begin."""
        self._judgements = []
        if self._judge:
            self._judge.start_step()

    def submit(self, candidate: Candidate) -> Future[Score]:
        """A future of the Score. Does not block; the future never raises: see Score.status."""
        graded = self._grade(candidate, self._rules)
        if not self._judge:
            return graded
        judged = self._judge.submit(candidate.question, candidate.answer, candidate.prefix + candidate.text)
        result: Future[Score] = Future()

        def combine(_: Future) -> None:  # once the later of the two is there
            self._judgements.append(judged.result())
            result.set_result(self._judged(graded.result(), judged.result()))

        graded.add_done_callback(lambda _: judged.add_done_callback(combine))
        return result

    def check_answer(self, candidate: Candidate) -> Future[Score]:
        """As `submit`, but the accuracy alone, whatever the rewards of training are: what evaluation counts."""
        return self._grade(candidate, Rules({"accuracy": 1.0}))

    def classes(self, found: Sequence[str | None]) -> Future[list[int]]:
        """`grader.classes` of the answers of one problem; by their text alone where that takes too long."""
        result: Future[list[int]] = Future()

        def settle(done: Future) -> None:
            outcome = done.result()
            if outcome.status != "ok":
                logging.warning("answers are compared by their text alone: %s: %s", outcome.status, outcome.detail)
            texts = list(dict.fromkeys(found))
            by_text = [-1 if one is None else texts.index(one) for one in found]
            result.set_result(outcome.value if outcome.status == "ok" else by_text)

        self._pool.submit(grader.classes, list(found)).add_done_callback(settle)
        return result

    @property
    def judgements(self) -> list[Judgement]:
        """Of what was submitted since `start_step`; none without a judge."""
        return self._judgements

    def statistics(self, scores: Sequence[Score], judgements: Sequence[Judgement]) -> dict[str, float]:
        """The `verifier/…` metrics of `scores`, and the `judge/…` metrics of `judgements` where there is a judge."""
        return statistics(scores) | (judge_room.statistics(judgements) if self._judge else {})

    def close(self) -> None:
        """Ends workers and requests; gradings without a result end with the status "error" or "invalid"."""
        self._pool.close()
        if self._judge:
            self._judge.close()

    def _grade(self, candidate: Candidate, rules: Rules) -> Future[Score]:
        result: Future[Score] = Future()
        graded = self._pool.submit(score, candidate, rules)
        graded.add_done_callback(lambda done: result.set_result(_to_score(done.result(), rules)))
        return result

    def _judged(self, graded: Score, judgement: Judgement) -> Score:
        """The rule-based score with the judge's. Without a verdict there is no reward: parts of it do not compare."""
        rewards = graded.rewards | {"judge": math.nan if judgement.score is None else judgement.score}
        if graded.status in ("timeout", "error"):
            return replace(graded, rewards=rewards)
        if judgement.score is None:
            return replace(graded, rewards=rewards, reward=math.nan, status="invalid", detail=judgement.detail)
        status = "ok" if graded.status == "invalid" else graded.status  # the judge's verdict is one
        blended = replace(graded, rewards=rewards, status=status, detail="")
        return _total(blended, self._rules.weights | {"judge": self._judge_weight})


def _call(function: Callable, *args: object) -> object:
    """What a worker runs."""
    return function(*args)


def _to_score(outcome: Outcome, rules: Rules) -> Score:
    if outcome.status == "ok":
        return replace(outcome.value, seconds=outcome.seconds)
    logging.log_every_n(logging.WARNING, "verifier: %s: %s", 100, outcome.status, outcome.detail)
    return Score(0.0, dict.fromkeys(rules.weights, 0.0), None, outcome.status, outcome.seconds, outcome.detail)


def statistics(scores: Sequence[Score]) -> dict[str, float]:
    """The `verifier/…` metrics of a step; latencies are seconds in the worker. All 0 without scores."""
    metrics = {}
    for status in STATUSES[1:]:
        metrics[f"verifier/{status}_frac"] = sum(one.status == status for one in scores) / max(len(scores), 1)
    seconds = sorted(one.seconds for one in scores) or [0.0]
    for name, fraction in (("p50", 0.5), ("p99", 0.99)):  # nearest rank
        metrics[f"verifier/latency_{name}"] = seconds[max(math.ceil(fraction * len(seconds)) - 1, 0)]
    return metrics


def check_errors(scores: Sequence[Score], max_error_fraction: float) -> None:
    """Stops a run whose rewards mean nothing.

    Raises:
        VerifierError: more than `max_error_fraction` of `scores` timed out, failed or have no verdict.
    """
    failed = [one for one in scores if one.status in ("timeout", "error", "invalid")]
    if not scores or len(failed) / len(scores) <= max_error_fraction:
        return
    count = {status: sum(one.status == status for one in failed) for status in STATUSES}
    detail = next((one.detail for one in failed if one.detail), "")
    hint = ". A larger config.rewards.timeout helps where the machine is overloaded" if count["timeout"] else ""
    raise VerifierError(
        f"of {len(scores)} gradings {count['timeout']} timed out, {count['error']} failed and {count['invalid']} have "
        f"no verdict: more than the share of {max_error_fraction} in config.rewards.max_error_fraction"
        + (f". The first: {detail}" if detail else "")
        + hint
    )
