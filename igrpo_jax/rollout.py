"""The two stages of iGRPO (Algorithm 1 of arXiv 2602.09000), from prompts to groups with rewards. No gradient here.

1. Stage 1: sample N drafts of each prompt from the frozen policy and score them.
2. Keep the best draft, the first one where several are equally good, and splice it into the prompt: q'.
3. Stage 2: sample G completions of q' from the same policy and score them with the same reward.

Stages are not separated by a barrier: a prompt goes on to Stage 2 as soon as its own drafts are scored, while others
still draft (`rollout.streamed = False` has one, for comparisons). `num_drafts = 0` is the base algorithm through the
same code: Stage 2 on the plain prompt.
Results are ordered by (prompt, sample), never by arrival.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from igrpo_jax.batch import Candidate, Completion, Group, Prompt, Score
from igrpo_jax.config import Config
from igrpo_jax.models import decoder
from igrpo_jax.prompts import Renderer
from igrpo_jax.rewards.reward import Verifier, check_errors
from igrpo_jax.sampling.scheduler import Request, Sample, Scheduler
from igrpo_jax.sampling.steps import Sampling

STAGES = {"draft": 1, "refine": 2}
Grade = Callable[[Candidate], Future[Score]]


def stage_key(seed: int, step: int, stage: int) -> np.ndarray:
    """Key data [2] uint32 of one stage of one step; prompts, samples and positions fold in after it."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), stage)
    return np.asarray(jax.random.key_data(key))


def best_draft(drafts: Sequence[Completion]) -> int | None:
    """Index of the draft with the highest reward, the lowest index among equals; None where none has a verdict."""
    rewards = np.array([draft.score.reward for draft in drafts])
    return None if np.isnan(rewards).all() else int(np.nanargmax(rewards))


@dataclass
class _Work:
    """One prompt on its way through the stages."""

    prompt: Prompt
    place: int  # in the step; randomness is derived from it, since a short epoch may bring one row twice
    context: np.ndarray | None = None  # of Stage 2, once it is known
    best: int | None = None
    done: dict[str, dict[int, Completion]] = field(default_factory=lambda: {"draft": {}, "refine": {}})

    def ordered(self, stage: str) -> tuple[Completion, ...]:
        return tuple(self.done[stage][i] for i in sorted(self.done[stage]))


class Rollout:
    """Samples and scores whole steps."""

    def __init__(self, config: Config, renderer: Renderer, scheduler: Scheduler, verifier: Verifier):
        self._config, self._renderer, self._scheduler, self._verifier = config, renderer, scheduler, verifier

    def collect(self, params: decoder.Params, prompts: Sequence[Prompt], step: int) -> tuple[list[Group], dict]:
        """One group per prompt, in the order of `prompts`, and the `perf/` and `verifier/` metrics.

        Raises:
            VerifierError: more gradings failed than config.rewards.max_error_fraction allows.
        """
        c = self._config
        began, settings = time.perf_counter(), c.rollout
        self._verifier.start_step()
        self._scheduler.start(params, Sampling(settings.temperature, settings.top_p, settings.top_k))
        keys = {stage: stage_key(c.seed, step, number) for stage, number in STAGES.items()}
        work = [_Work(prompt, place) for place, prompt in enumerate(prompts)]
        for item in work:
            drafts = 0 if self._drops_draft(item.place, step) else c.algorithm.num_drafts
            if drafts:
                self._submit(item, "draft", item.prompt.tokens, drafts, keys)
            else:
                self._refine(item, keys)

        drafting = {item.place for item in work if item.context is None}

        def scored(item: _Work) -> None:
            if item.place not in drafting or len(item.done["draft"]) < c.algorithm.num_drafts:
                return
            drafting.remove(item.place)
            ready = [item] if settings.streamed else [] if drafting else [one for one in work if one.context is None]
            for one in ready:
                self._refine(one, keys)

        waited = sample_and_score(self._scheduler, self._verifier.submit, self._renderer, scored)
        groups = [
            Group(item.prompt, item.ordered("draft"), item.best, item.context, item.ordered("refine")) for item in work
        ]
        usage = self._scheduler.usage
        self._scheduler.finish()
        scores = [completion.score for group in groups for completion in (*group.drafts, *group.completions)]
        check_errors(scores, c.rewards.max_error_fraction)
        return groups, {
            **self._verifier.statistics(scores),
            "perf/rollout_time": time.perf_counter() - began,
            "perf/verify_wait_time": waited,
            "perf/draft_tokens": sum(len(draft.tokens) for group in groups for draft in group.drafts),
            "perf/completion_tokens": sum(len(one.tokens) for group in groups for one in group.completions),
            "perf/slot_utilization": usage.slot_utilization,
            "perf/stage_overlap_frac": usage.overlap,
        }

    def _drops_draft(self, place: int, step: int) -> bool:
        rate = self._config.algorithm.draft_dropout
        return rate > 0 and np.random.default_rng([self._config.seed, step, place, 0xD20B]).random() < rate

    def _refine(self, item: _Work, keys: dict[str, np.ndarray]) -> None:
        """Starts Stage 2 of a prompt: on q' where a draft has a verdict, on the plain prompt where none has."""
        drafts = item.ordered("draft")
        item.context = item.prompt.tokens
        if drafts:
            item.best = best_draft(drafts)
        if item.best is not None:
            item.context = self._renderer.with_draft(item.prompt.question, drafts[item.best].tokens)
        self._submit(item, "refine", item.context, self._config.algorithm.num_generations, keys)

    def _submit(self, item: _Work, stage: str, tokens: np.ndarray, samples: int, keys: dict[str, np.ndarray]) -> None:
        limit = self._config.rollout.max_completion_length
        tag = Target(item.prompt, stage, item.done[stage], item)
        self._scheduler.submit(Request(tokens, item.place, samples, keys[stage], limit, tag, stage))


@dataclass(frozen=True)
class Target:
    """Where the scored samples of a request go."""

    prompt: Prompt
    stage: str
    into: dict[int, Completion]
    owner: object = None


def sample_and_score(
    scheduler: Scheduler, grade: Grade, renderer: Renderer, scored: Callable[[object], None] = lambda _: None
) -> float:
    """Runs until every queued request (tag: Target) is sampled and scored; returns the seconds spent only waiting.

    `grade` returns at once and its future never raises. `scored(owner)` is called after each score and may queue more.
    The verifier works while the device samples.
    """
    waited, grading = 0.0, {}
    while scheduler.pending or grading:
        if scheduler.pending:
            for sample in scheduler.advance():
                target, completion, candidate = _completed(sample, renderer)
                grading[grade(candidate)] = (target, completion)
        else:
            began = time.perf_counter()
            wait(grading, return_when=FIRST_COMPLETED)
            waited += time.perf_counter() - began
        for future in [future for future in grading if future.done()]:
            target, completion = grading.pop(future)
            target.into[completion.sample_id] = replace(completion, score=future.result())
            scored(target.owner)
    return waited


def _completed(sample: Sample, renderer: Renderer) -> tuple[Target, Completion, Candidate]:
    target = sample.request.tag
    prompt, text = target.prompt, renderer.text(sample.tokens)
    completion = Completion(target.stage, sample.sample_id, sample.tokens, sample.logprobs, sample.finished, text)
    candidate = Candidate(text, prompt.answer, renderer.opened, prompt.question, prompt.columns, sample.tokens)
    return target, completion, candidate
