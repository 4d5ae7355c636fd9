"""The two stages of iGRPO (Algorithm 1 of arXiv 2602.09000), from prompts to groups with rewards. No gradient here.

1. Stage 1: sample N drafts of each prompt from the frozen policy and score them.
2. Keep the best draft, the first one where several are equally good, and splice it into the prompt: q'.
3. Stage 2: sample G completions of q' from the same policy and score them with the same reward.

Stages are not separated by a barrier: a prompt goes on to Stage 2 as soon as its own drafts are scored, while others
still draft (`rollout.streamed = False` has one, for comparisons). `num_drafts = 0` is the base algorithm through the
same code: Stage 2 on the plain prompt.

Departures from the paper, off by default: another draft than the best is kept (`algorithm.draft_selection`), or none
(`algorithm.draft_dropout`); drafts end at the first one, in the order of their numbers, with the largest possible
reward (`algorithm.draft_early_stop`); and DAPO's dynamic sampling (2503.14476): where all completions of a prompt earn
the same, a fresh prompt takes its place, at most `algorithm.max_redraws` times. DAPO draws whole batches and keeps what
it needs of them; here each place of the step has redraws of its own, and the last one stays.

Results are ordered by (prompt, sample), never by arrival, and nothing in them depends on it: drafts are drawn all at
once, or each after those of lower numbers are scored; a redraw's prompt and randomness follow from place and number.
Nor do they depend on how many processes there are: each works on some places of the step, and `exchange` puts them
together.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from absl import logging

from igrpo_jax.config import Config
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import preemption, watchdog
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.learning import exchange, objectives
from igrpo_jax.learning.exchange import ProcessRollout
from igrpo_jax.models import decoder
from igrpo_jax.records import Candidate, Completion, Group, Prompt, Score
from igrpo_jax.rewards.verifier import Verifier, check_errors
from igrpo_jax.sampling.scheduler import Request, Sample, Scheduler, Usage
from igrpo_jax.sampling.steps import Sampling

STAGES = {"draft": 1, "refine": 2}
Grade = Callable[[Candidate], Future[Score]]


def stage_key(seed: int, step: int, stage: int) -> np.ndarray:
    """Key data [2] uint32 of one stage of one step; prompts, samples and positions fold in after it."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), stage)
    return np.asarray(jax.random.key_data(key))


# Place of the draft to keep among the rewards [K] of those with a verdict; of equals the first.
_SELECT: dict[str, Callable[[np.ndarray, np.random.Generator], int]] = {
    "best": lambda rewards, rng: np.argmax(rewards),
    "worst": lambda rewards, rng: np.argmin(rewards),
    "first": lambda rewards, rng: 0,
    "random": lambda rewards, rng: rng.integers(len(rewards)),
}


def select_draft(drafts: Sequence[Completion], selection: str, rng: np.random.Generator) -> int | None:
    """Index of the draft that q' shows, by algorithm.draft_selection; None where no draft has a verdict."""
    rewards = np.array([draft.score.reward for draft in drafts])
    (known,) = np.nonzero(~np.isnan(rewards))
    return int(known[_SELECT[selection](rewards[known], rng)]) if len(known) else None


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

    def group(self) -> Group:
        return Group(self.prompt, self.ordered("draft"), self.best, self.context, self.ordered("refine"))


@dataclass(frozen=True)
class Target:
    """Where the scored samples of a request go: into `into`, by their number."""

    prompt: Prompt
    stage: str
    into: dict[int, Completion]
    owner: Any = None  # the caller's own


class _Step:
    """This process's prompts of one step: what each does next, once a score has come.

    The n-th redraw of place p, of P places, works as place n * P + p: its randomness is its own.
    """

    def __init__(
        self,
        config: Config,
        renderer: Renderer,
        scheduler: Scheduler,
        step: int,
        prompts: exchange.Prompts,
    ):
        self._algorithm, self._rollout, self._seed = config.algorithm, config.rollout, config.seed
        self._largest = config.rewards.largest - 1e-6  # a sum of weights, rounded
        self._renderer, self._scheduler, self._step = renderer, scheduler, step
        self._prompts, self._count = prompts, len(prompts(0))
        self._keys = {stage: stage_key(config.seed, step, number) for stage, number in STAGES.items()}
        self._drafting: set[int] = set()
        # The latest of each place.
        self.work = {place: _Work(prompts(0)[place], place) for place in exchange.places(self._count)}
        self.redrawn: list[Group] = []  # what stood there before
        for item in self.work.values():
            self._begin(item)

    def scored(self, target: Target, _: Completion) -> None:
        """Takes notice of a score of a prompt: nothing, a further draft, Stage 2, or a redraw follows."""
        item = target.owner
        if item.context is None:
            self._draft_scored(item)
        elif len(item.done["refine"]) == self._algorithm.num_generations:
            self._finished(item)

    def _rng(self, item: _Work, tag: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self._step, item.place, tag])

    def _begin(self, item: _Work) -> None:
        a = self._algorithm
        dropped = a.draft_dropout > 0 and self._rng(item, 0xD20B).random() < a.draft_dropout
        if dropped or not a.num_drafts:
            self._refine(item)
        else:
            self._drafting.add(item.place)
            self._submit(item, "draft", item.prompt.tokens, 1 if a.draft_early_stop else a.num_drafts)

    def _draft_scored(self, item: _Work) -> None:
        a, drafts = self._algorithm, item.done["draft"]
        if len(drafts) < a.num_drafts:
            if not a.draft_early_stop:
                return
            latest = drafts[len(drafts) - 1].score.reward
            if not latest >= self._largest:  # NaN is no success
                self._submit(item, "draft", item.prompt.tokens, 1, first=len(drafts))
                return
        self._drafting.remove(item.place)
        ready = [item]
        if not self._rollout.streamed:
            ready = [] if self._drafting else [one for one in self.work.values() if one.context is None]
        for one in ready:
            self._refine(one)

    def _refine(self, item: _Work) -> None:
        """Starts Stage 2 of a prompt: on q' where a draft has a verdict, on the plain prompt where none has."""
        drafts = item.ordered("draft")
        item.context = item.prompt.tokens
        if drafts:
            item.best = select_draft(drafts, self._algorithm.draft_selection, self._rng(item, 0x5E1E))
        if item.best is not None:
            item.context = self._renderer.with_draft(item.prompt.question, drafts[item.best].tokens)
        self._submit(item, "refine", item.context, self._algorithm.num_generations)

    def _finished(self, item: _Work) -> None:
        number, place = divmod(item.place, self._count)
        if number < self._algorithm.max_redraws and not objectives.has_signal(item.group().rewards[None])[0]:
            self.redrawn.append(item.group())
            self.work[place] = _Work(self._prompts(number + 1)[place], item.place + self._count)
            self._begin(self.work[place])

    def _submit(self, item: _Work, stage: str, tokens: np.ndarray, samples: int, first: int = 0) -> None:
        limit = self._rollout.max_completion_length
        tag = Target(item.prompt, stage, item.done[stage], item)
        self._scheduler.submit(Request(tokens, item.place, samples, self._keys[stage], limit, tag, stage, first))


class Rollout:
    """Samples and scores whole steps."""

    def __init__(self, config: Config, renderer: Renderer, scheduler: Scheduler, verifier: Verifier):
        self._config, self._renderer, self._scheduler, self._verifier = config, renderer, scheduler, verifier
        self._warned = False

    def collect(
        self,
        params: decoder.Params,
        prompts: Sequence[Prompt],
        step: int,
        fresh: Callable[[int], Sequence[Prompt]] = lambda number: (),
    ) -> tuple[list[Group], dict]:
        """One group per prompt, in the order of `prompts`, and the `perf/`, `verifier/` and `redraw/` metrics.

        `redraw/groups` counts the groups that a fresh prompt took the place of, `redraw/exhausted` those that stayed
        though their rewards are all equal, since `algorithm.max_redraws` of their place were used. What redrawn groups
        cost is in `perf/draft_tokens` and `perf/completion_tokens`; all other metrics are of the groups that stayed.

        Every process returns the same groups, and the same metrics but for `perf/rollout_time`: sums of tokens, shares
        of the slots of all, the longest `perf/verify_wait_time`. `perf/process_idle_frac` is the share of the rollout
        that the processes, on average, waited for the slowest.

        Args:
            fresh: the prompts of redraw 1, 2, … of this step, one for each place; read where max_redraws > 0.

        Raises:
            VerifierError: more gradings failed than config.rewards.max_error_fraction allows.
            Preempted: a process was told to leave.
        Preempted: the machine is about to be taken away.
        """
        config = self._config
        began, settings = time.perf_counter(), config.rollout
        redraw = functools.cache(fresh)
        known = lambda number: redraw(number) if number else prompts
        self._verifier.start_step()
        self._scheduler.start(params, Sampling(settings.temperature, settings.top_p, settings.top_k))
        running = _Step(config, self._renderer, self._scheduler, step, known)
        try:
            waited = sample_and_score(self._scheduler, self._verifier.submit, self._renderer, running.scored)
            mine = self._share(running, time.perf_counter() - began, waited)
            self._scheduler.finish()
        except Preempted:
            mine = None
        with watchdog.phase("exchange"):
            shares = exchange.everywhere(mine, known)
        placed = {place % len(prompts): group for share in shares for place, group in share.groups.items()}
        groups = [placed[place] for place in range(len(prompts))]
        scores = [score for share in shares for score in share.scores] + _scores(groups)
        check_errors(scores, config.rewards.max_error_fraction)
        usage = sum((share.usage for share in shares), Usage())
        seconds = [share.seconds for share in shares]
        judgements = [judgement for share in shares for judgement in share.judgements]
        return groups, {
            **self._verifier.statistics(scores, judgements),
            **self._redraws(groups, sum(share.redrawn for share in shares)),
            "perf/rollout_time": time.perf_counter() - began,
            "perf/verify_wait_time": max(share.waited for share in shares),
            "perf/process_idle_frac": 1 - float(np.mean(seconds)) / max(seconds),
            "perf/draft_tokens": sum(share.draft_tokens for share in shares),
            "perf/completion_tokens": sum(share.completion_tokens for share in shares),
            "perf/slot_utilization": usage.slot_utilization,
            "perf/stage_overlap_frac": usage.overlap,
        }

    def _share(self, running: _Step, seconds: float, waited: float) -> ProcessRollout:
        groups = {item.place: item.group() for item in running.work.values()}
        sampled = [*groups.values(), *running.redrawn]
        return ProcessRollout(
            groups=groups,
            redrawn=len(running.redrawn),
            scores=_scores(running.redrawn),
            draft_tokens=sum(len(draft.tokens) for group in sampled for draft in group.drafts),
            completion_tokens=sum(len(one.tokens) for group in sampled for one in group.completions),
            judgements=self._verifier.judgements,
            usage=self._scheduler.usage,
            seconds=seconds,
            waited=waited,
        )

    def _redraws(self, groups: Sequence[Group], redrawn: int) -> dict[str, int]:
        most = self._config.algorithm.max_redraws
        if not most:
            return {}
        exhausted = int(np.sum(~objectives.has_signal(np.stack([group.rewards for group in groups]))))
        if exhausted and not self._warned:
            self._warned = True
            logging.warning(
                "after %d redraws each, %d of %d groups still have equal rewards and give no gradient; later ones are "
                "only counted, in redraw/exhausted",
                *(most, exhausted, len(groups)),
            )
        return {"redraw/groups": redrawn, "redraw/exhausted": exhausted}


def _scores(groups: Sequence[Group]) -> list[Score]:
    return [one.score for group in groups for one in (*group.drafts, *group.completions)]


def sample_and_score(
    scheduler: Scheduler, grade: Grade, renderer: Renderer, scored: Callable[[Target, Completion], None]
) -> float:
    """Runs until every queued request (tag: Target) is sampled and scored; returns the seconds spent only waiting.

    `grade` returns at once and its future never raises. `scored(target, completion)` is called after each score and may
    queue more.
    The verifier works while the device samples.
    """
    waited, grading = 0.0, {}
    while scheduler.pending or grading:
        preemption.check()
        if scheduler.pending:
            with watchdog.phase("dispatch"):
                samples = scheduler.advance()
            for sample in samples:
                target, completion, candidate = _completed(sample, renderer)
                grading[grade(candidate)] = (target, completion)
        else:
            began = time.perf_counter()
            with watchdog.phase("verifier", f"{len(grading)} verdicts to come"):
                while not wait(grading, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    preemption.check()
            waited += time.perf_counter() - began
        for future in [future for future in grading if future.done()]:
            target, completion = grading.pop(future)
            completion = replace(completion, score=future.result())
            target.into[completion.sample_id] = completion
            scored(target, completion)
    return waited


def _completed(sample: Sample, renderer: Renderer) -> tuple[Target, Completion, Candidate]:
    target = sample.request.tag
    prompt, text = target.prompt, renderer.text(sample.tokens)
    completion = Completion(target.stage, sample.sample_id, sample.tokens, sample.logprobs, sample.finished, text)
    candidate = Candidate(text, prompt.answer, renderer.opened, prompt.question, prompt.columns, sample.tokens)
    return target, completion, candidate
