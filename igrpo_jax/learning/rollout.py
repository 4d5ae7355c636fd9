"""The two stages of iGRPO (Algorithm 1 of arXiv 2602.09000), from prompts to groups with rewards. No gradient here.

1. Stage 1: sample N drafts of each prompt from the frozen policy and score them.
2. Keep the best draft, the first one where several are equally good, and splice it into the prompt: q'.
3. Stage 2: sample G completions of q' from the same policy and score them with the same reward.

No barrier separates the stages: a prompt goes on to Stage 2 as soon as its own drafts are scored, while others still
draft (`rollout.streamed = False` has a barrier, for comparisons). `num_drafts = 0` is the base algorithm through the
same code: Stage 2 on the plain prompt.

Departures from the paper, off by default: another draft than the best is kept (`algorithm.draft_selection`), or none
(`algorithm.draft_dropout`); drafting ends at the first draft, in the order of their numbers, with the largest possible
reward (`algorithm.draft_early_stop`); and DAPO's dynamic sampling (2503.14476): where all completions of a prompt are
right, or all are wrong (`filtering` has the metric), a fresh prompt takes its position, at most `algorithm.max_redraws`
times. DAPO draws whole batches and keeps what it needs of them; here each position of the step has redraws of its own,
and the last one stays, without an advantage where it is filtered out too.

Two more, off by default, change which prompts are refined. With algorithm.alternate every other step, from step 1 on,
has no drafts, and the step after it drafts the same prompts (ThinkTwice, 2604.01591). With algorithm.draft_when =
"unsolved" only a prompt without a right draft goes on to Stage 2. Each position of the step may sample N + G
completions, as in the paper. Its first prompt has N drafts. If none is right, G refinements follow. If one is, the G
completions are left to fresh prompts, which take the position one after another: each has N drafts, and goes on to
Stage 2 only where none is right and G completions are still left. This ends when fewer than N are left, which is at
none, since N divides G. So a step samples P (N + G) completions whatever is solved, and no position waits for another.

Results are ordered by (prompt, sample), never by arrival, and nothing in them depends on it: drafts are drawn all at
once, or each after those of lower numbers are scored; a redraw's prompt and randomness follow from its StepPosition.
The results do not depend on the number of processes either: each team of them works on some positions of the step, and
`exchange` puts the groups together.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from absl import logging

from igrpo_jax.config import AlgorithmConfig, Config
from igrpo_jax.distributed import watchdog
from igrpo_jax.distributed.compiling import Wanted
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.learning import exchange, filtering, objectives
from igrpo_jax.learning.exchange import ProcessRollout, StepPosition
from igrpo_jax.models import decoder
from igrpo_jax.records import Completion, Group, Prompt, Score
from igrpo_jax.rewards.verifier import Verifier, check_errors
from igrpo_jax.sampling.requests import Request, Usage
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.scoring import sample_and_score, stage_key
from igrpo_jax.sampling.state import Sampling

if TYPE_CHECKING:
    from igrpo_jax.data.prompts import Renderer  # with transformers, which sampling does not need

STAGES = {"draft": 1, "refine": 2}
DROPOUT, SELECTION = 0xD20B, 0x5E1E  # tags of the random streams that drop and select drafts


# Index of the draft to keep among the rewards [K] of those with a verdict; the first one where several are equal.
_SELECT: dict[str, Callable[[np.ndarray, np.random.Generator], int]] = {
    "best": lambda rewards, rng: int(np.argmax(rewards)),
    "worst": lambda rewards, rng: int(np.argmin(rewards)),
    "first": lambda rewards, rng: 0,
    "random": lambda rewards, rng: int(rng.integers(len(rewards))),
}


def select_draft(drafts: Sequence[Completion], selection: str, rng: np.random.Generator) -> int | None:
    """Returns the index of the draft that q' shows, by algorithm.draft_selection; None where no draft has a verdict."""
    rewards = np.array([draft.score.reward for draft in drafts])
    (known,) = np.nonzero(~np.isnan(rewards))
    return int(known[_SELECT[selection](rewards[known], rng)]) if len(known) else None


def needs_refinement(drafts: Iterable[Completion], left: int, algorithm: AlgorithmConfig) -> bool:
    """Returns whether a prompt is refined where algorithm.draft_when = "unsolved".

    Args:
        drafts: all N of it; one without a verdict is not right.
        left: completions that its position may still sample.
    """
    return left >= algorithm.num_generations and not any(draft.score.is_right for draft in drafts)


class RolloutResult(NamedTuple):
    """What a rollout hands to the update; the same on every process."""

    groups: list[Group]  # one per prompt, in the order of the positions of the step, and of their redraws
    metrics: dict[str, float]  # `perf/`, `verifier/` and `redraw/`


@dataclass
class _PromptRollout:
    """One prompt on its way through the two stages."""

    prompt: Prompt
    position: StepPosition
    context: np.ndarray | None = None  # [L'] int32 of Stage 2, once it is known
    kept: int | None = None  # index of the draft in `context`
    left: int = 0  # completions that its position may still sample after its drafts (algorithm.draft_when)
    drafts: dict[int, Completion] = field(default_factory=dict)  # scored ones, by their number
    completions: dict[int, Completion] = field(default_factory=dict)  # scored refinements, by their number

    def group(self) -> Group:
        """Returns the prompt with all its scored samples, in the order of their numbers."""
        return Group(self.prompt, _ordered(self.drafts), self.kept, self.context, _ordered(self.completions))


def _ordered(samples: dict[int, Completion]) -> tuple[Completion, ...]:
    return tuple(samples[number] for number in sorted(samples))


class _StepRollout:
    """This process's prompts of one step: it decides what each prompt does next, once a score has come."""

    def __init__(
        self,
        config: Config,
        renderer: "Renderer",
        scheduler: Scheduler,
        step: int,
        prompts: exchange.Prompts,
    ):
        self._algorithm = config.algorithm
        self._num_drafts = config.algorithm.drafts_in(step)
        self._filter_metric = config.filter_groups_metric
        self._rollout = config.rollout
        self._seed = config.seed
        self._largest = config.rewards.largest - 1e-6  # the margin covers how the sum of the weights is rounded
        self._renderer = renderer
        self._scheduler = scheduler
        self._step = step
        self._prompts = prompts
        self._count = len(prompts(0))
        self._keys = {stage: stage_key(config.seed, step, number) for stage, number in STAGES.items()}
        self._drafting: set[int] = set()  # positions whose drafts are not all scored
        # The latest prompt of each position of this process.
        self.latest = {
            index: _PromptRollout(prompts(0)[index], StepPosition(index), left=config.algorithm.num_generations)
            for index in scheduler.engine.team.positions(self._count)
        }
        self.unrefined: list[_PromptRollout] = []  # prompts without Stage 2, whose position a fresh prompt took
        self.redrawn: list[Group] = []  # groups that were filtered out, whose position a fresh prompt took
        for work in self.latest.values():
            self._begin(work)

    def _rng(self, work: _PromptRollout, tag: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self._step, work.position.random_index(self._count), tag])

    def _begin(self, work: _PromptRollout) -> None:
        """Starts Stage 1 of a prompt, or Stage 2 where it has no drafts."""
        algorithm = self._algorithm
        dropped = algorithm.draft_dropout > 0 and self._rng(work, DROPOUT).random() < algorithm.draft_dropout
        if dropped or not self._num_drafts:
            self._refine(work)
        else:
            self._drafting.add(work.position.index)
            self._draft(work, 1 if algorithm.draft_early_stop else self._num_drafts)

    def _draft(self, work: _PromptRollout, samples: int) -> None:
        """Queues further drafts of a prompt."""
        scored = functools.partial(self._draft_scored, work)
        self._submit(work, "draft", work.prompt.tokens, samples, len(work.drafts), scored)

    def _draft_scored(self, work: _PromptRollout, draft: Completion) -> None:
        """Keeps a draft; a further draft or what comes after Stage 1 may follow."""
        drafts = work.drafts
        drafts[draft.sample_id] = draft
        if len(drafts) < self._num_drafts:
            if not self._algorithm.draft_early_stop:
                return
            if not draft.score.reward >= self._largest:  # NaN is no success
                self._draft(work, 1)
                return
        self._drafting.remove(work.position.index)
        if self._rollout.streamed:
            self._drafted(work)
        elif not self._drafting:
            for waiting in [other for other in self.latest.values() if other.context is None]:
                self._drafted(waiting)

    def _drafted(self, work: _PromptRollout) -> None:
        """Goes on from a prompt whose drafts are scored: to its refinements, or to a fresh prompt at its position."""
        algorithm = self._algorithm
        if algorithm.draft_when == "always" or needs_refinement(work.drafts.values(), work.left, algorithm):
            self._refine(work)
            return
        work.context = work.prompt.tokens
        if work.left >= self._num_drafts:
            self.unrefined.append(work)
            self._begin(self._fresh(work, work.left - self._num_drafts))

    def _fresh(self, work: _PromptRollout, left: int = 0) -> _PromptRollout:
        """Returns the fresh prompt that takes the position of `work`."""
        index, redraw = work.position
        fresh = _PromptRollout(self._prompts(redraw + 1)[index], StepPosition(index, redraw + 1), left=left)
        self.latest[index] = fresh
        return fresh

    def _refine(self, work: _PromptRollout) -> None:
        """Starts Stage 2 of a prompt: on q' where a draft has a verdict, on the plain prompt where none has."""
        drafts = _ordered(work.drafts)
        work.context = work.prompt.tokens
        if drafts:
            work.kept = select_draft(drafts, self._algorithm.draft_selection, self._rng(work, SELECTION))
        if work.kept is not None:
            work.context = self._renderer.with_draft(work.prompt.question, drafts[work.kept].tokens)
        scored = functools.partial(self._refinement_scored, work)
        self._submit(work, "refine", work.context, self._algorithm.num_generations, 0, scored)

    def _refinement_scored(self, work: _PromptRollout, completion: Completion) -> None:
        """Keeps a refinement; after the last one of a group that is filtered out, a redraw follows."""
        work.completions[completion.sample_id] = completion
        if len(work.completions) < self._algorithm.num_generations:
            return
        redraws = self._algorithm.max_redraws
        if work.position.redraw < redraws and not filtering.passes([work.group()], self._filter_metric)[0]:
            self.redrawn.append(work.group())
            self._begin(self._fresh(work))

    def _submit(
        self,
        work: _PromptRollout,
        stage: str,
        tokens: np.ndarray,
        samples: int,
        first: int,
        scored: Callable[[Completion], None],
    ) -> None:
        self._scheduler.submit(
            Request(
                tokens=tokens,
                index=work.position.random_index(self._count),
                samples=samples,
                key=self._keys[stage],
                limit=self._rollout.max_completion_length,
                stage=stage,
                first=first,
                prompt=work.prompt,
                scored=scored,
            )
        )


class Rollout:
    """Samples and scores whole steps."""

    def __init__(self, config: Config, renderer: "Renderer", scheduler: Scheduler, verifier: Verifier):
        self._config = config
        self._renderer = renderer
        self._scheduler = scheduler
        self._verifier = verifier
        self._warned = False

    @property
    def wanted(self) -> Wanted:
        """The programs that sampling may need, with their shapes."""
        return self._scheduler.engine.wanted

    def collect(self, params: decoder.Params, step: int, prompts: exchange.Prompts) -> RolloutResult:
        """Returns one group per prompt, in the order of `prompts(0)`, and the metrics of the rollout.

        With algorithm.draft_when = "unsolved" a position has several prompts, which follow one another.

        `redraw/groups` counts the groups whose position a fresh prompt took, `redraw/exhausted` those that stayed
        although they are filtered out, because `algorithm.max_redraws` fresh prompts were used. Of all groups that
        were sampled, `redraw/filtered_frac` is the fraction filtered out, and `redraw/equal_reward_frac` the fraction
        whose rewards are all equal. Tokens of redrawn groups are counted in `perf/draft_tokens` and
        `perf/completion_tokens`; all other metrics describe the groups that stayed.

        Every process returns the same groups, and the same metrics but for `perf/rollout_time`: tokens are summed,
        slots are counted over all; `perf/verify_wait_time` and `perf/weight_sync_time` are the longest.
        `perf/process_idle_frac` is the fraction of the rollout that the processes, on average, waited for the slowest.

        Args:
            prompts: returns the prompts of this step by the number of the redraw, one for each position: 0 are the
                first ones, and 1, 2, … are asked for where fresh prompts take their positions.

        Raises:
            VerifierError: more gradings failed than config.rewards.max_error_fraction allows.
            Preempted: a process was told to leave.
        """
        began = time.perf_counter()
        prompts = functools.cache(prompts)
        self._verifier.start_step(step)
        try:
            own = self._collect_own(params, step, prompts)
        except Preempted:
            own = None
        with watchdog.phase("exchange"):
            parts = exchange.everywhere(own, prompts)
        by_position = {position: group for part in parts for position, group in part.groups.items()}
        groups = [by_position[position] for position in sorted(by_position)]
        scores = [score for part in parts for score in part.scores] + _scores(groups)
        check_errors(scores, self._config.rewards.max_error_fraction)
        metrics = {
            **self._verifier.statistics(scores, [judgement for part in parts for judgement in part.judgements]),
            **self._redraws(groups, parts),
            **_unsolved(groups, self._config.algorithm),
            "perf/rollout_time": time.perf_counter() - began,
            **_usage_metrics(parts),
        }
        return RolloutResult(groups, metrics)

    def _collect_own(self, params: decoder.Params, step: int, prompts: exchange.Prompts) -> ProcessRollout:
        """Samples and scores this process's positions of a step."""
        began, settings = time.perf_counter(), self._config.rollout
        self._scheduler.start(params, Sampling(settings.temperature, settings.top_p, settings.top_k))
        try:
            running = _StepRollout(self._config, self._renderer, self._scheduler, step, prompts)
            waited = sample_and_score(self._scheduler, self._verifier.submit, self._renderer)
        finally:
            self._scheduler.finish()
        groups = {work.position: work.group() for work in (*running.unrefined, *running.latest.values())}
        sampled = [*groups.values(), *running.redrawn]
        return ProcessRollout(
            groups=groups,
            redrawn=len(running.redrawn),
            redrawn_equal=_equal(running.redrawn),
            scores=_scores(running.redrawn),
            draft_tokens=sum(len(draft.tokens) for group in sampled for draft in group.drafts),
            completion_tokens=sum(len(completion.tokens) for group in sampled for completion in group.completions),
            judgements=self._verifier.judgements,
            usage=self._scheduler.usage,
            seconds=time.perf_counter() - began,
            weight_seconds=self._scheduler.weight_seconds,
            waited=waited,
        )

    def _redraws(self, groups: Sequence[Group], parts: Sequence[ProcessRollout]) -> dict[str, float]:
        most, metric = self._config.algorithm.max_redraws, self._config.filter_groups_metric
        if not most:
            return {}
        redrawn = sum(part.redrawn for part in parts)
        exhausted = int(np.sum(~filtering.passes(groups, metric)))
        equal = sum(part.redrawn_equal for part in parts) + _equal(groups)
        if exhausted and not self._warned:
            self._warned = True
            logging.warning(
                "after %d redraws each, the completions of %d of %d groups are still equal in %s and get no advantage; "
                "later ones are only counted, in redraw/exhausted",
                *(most, exhausted, len(groups), metric),
            )
        sampled = redrawn + len(groups)
        return {
            "redraw/groups": redrawn,
            "redraw/exhausted": exhausted,
            "redraw/filtered_frac": (redrawn + exhausted) / sampled,
            "redraw/equal_reward_frac": equal / sampled,
        }


def _unsolved(groups: Sequence[Group], algorithm: AlgorithmConfig) -> dict[str, float]:
    """Returns how many prompts a step has with algorithm.draft_when = "unsolved", and what was sampled of them."""
    if algorithm.draft_when == "always" or not algorithm.num_drafts:
        return {}
    return {
        "unsolved/prompts": len(groups),
        "unsolved/refined": sum(bool(group.completions) for group in groups),
        "unsolved/completions": sum(len(group.drafts) + len(group.completions) for group in groups),
    }


def _equal(groups: Sequence[Group]) -> int:
    """Returns the number of groups whose rewards are all equal."""
    return sum(not objectives.has_signal(group.rewards[None])[0] for group in groups)


def _usage_metrics(parts: Sequence[ProcessRollout]) -> dict[str, float]:
    """Returns what the rollout cost over all processes."""
    usage = sum((part.usage for part in parts), Usage())
    seconds = [part.seconds for part in parts]
    return {
        "perf/weight_sync_time": max(part.weight_seconds for part in parts),
        "perf/verify_wait_time": max(part.waited for part in parts),
        "perf/process_idle_frac": 1 - float(np.mean(seconds)) / max(seconds),
        "perf/draft_tokens": sum(part.draft_tokens for part in parts),
        "perf/completion_tokens": sum(part.completion_tokens for part in parts),
        "perf/slot_utilization": usage.slot_utilization,
        "perf/stage_overlap_frac": usage.overlap,
        "perf/pages_in_use_frac": usage.pages_in_use,
        "perf/preempted_samples": usage.preempted,
    }


def _scores(groups: Sequence[Group]) -> list[Score]:
    return [completion.score for group in groups for completion in (*group.drafts, *group.completions)]
