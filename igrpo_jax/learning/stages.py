"""What each prompt of a step does next, once a score has come: more drafts, refinements, or a fresh prompt.

Where the drafts that are scored decide what follows, a prompt moves on while its other drafts are still drawn: no later
draft can take the place of one with the largest possible reward.

Departures from the paper, off by default: a draft other than the best is kept (`algorithm.draft_selection`), the best
by a single reward (`algorithm.draft_metric`), or none (`algorithm.draft_dropout`); drafting stops at the first draft,
in the order of their numbers, with the largest possible reward (`algorithm.draft_early_stop`); and DAPO's dynamic
sampling (2503.14476): where all completions of a prompt are right, or all are wrong (`filtering` has the metric), a
fresh prompt takes its position, at most `algorithm.max_redraws` times. DAPO draws whole batches and keeps the groups
that it needs. Here each position of the step has its own redraws. The group of the last redraw stays; if it is filtered
out too, its advantages are 0.

With algorithm.draft_selection = "refined" every draft that has a verdict is refined, as in Critique-GRPO (2506.03106),
with G refinements each. The draft whose refinements earn most on average, in `algorithm.draft_metric`, is kept with
them, the first of equals; the other refinements are left out of the group. So a prompt samples N + N G completions.

Two more, off by default, change which prompts are refined. With algorithm.alternate every other step, from step 1 on,
has no drafts, and the step after it drafts the same prompts (ThinkTwice, 2604.01591). With algorithm.draft_when =
"unsolved" a prompt moves on to Stage 2 only if none of its drafts is right, or a smaller fraction than
algorithm.solved_fraction. Each position of the step has a budget of N + G completions, as in the paper. Its first
prompt has N drafts. If it is unsolved, G refinements follow. If it is solved, the other G completions are drafts of
fresh prompts, which take the position. Fresh prompts are not refined, because after their N drafts
fewer than G completions are left. The budget is used up exactly, because N divides G. So a step samples P (N + G)
completions whatever is solved, and no position waits for another.

With algorithm.second_stage = "verify" the drafts are solutions, and Stage 2 asks the policy whether one of them is
right, as in Self-Verification (2506.01369). G verifications are graded against the solution's own verdict: the
reference answer is 1 or 0. A prompt whose solutions are all right or all wrong has no Stage 2.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.learning import exchange, filtering
from igrpo_jax.learning.exchange import StepPosition
from igrpo_jax.learning.selection import best_is_known, is_solved, largest_value, needs_verification, select_draft
from igrpo_jax.records import VERDICTS, Completion, Group, Prompt
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.scoring import stage_key

if TYPE_CHECKING:
    from igrpo_jax.data.prompts import Renderer  # with transformers, which sampling does not need

STAGES = {"draft": 1, "refine": 2, "verify": 2}
DROPOUT, SELECTION = 0xD20B, 0x5E1E  # tags of the random streams that drop and select drafts


@dataclass
class PromptProgress:
    """One prompt on its way through the two stages."""

    prompt: Prompt
    position: StepPosition
    context: np.ndarray | None = None  # [L'] int32 of Stage 2, once it is known
    kept: int | None = None  # index of the draft in `context`
    left: int = 0  # completions that its position may still sample after its drafts (algorithm.draft_when)
    drafts: dict[int, Completion] = field(default_factory=dict)  # scored ones, by their number
    # Prompts of Stage 2, [L'] int32, by the number of the draft that each shows; None is the plain prompt.
    contexts: dict[int | None, np.ndarray] = field(default_factory=dict)
    completions: dict[int, Completion] = field(default_factory=dict)  # scored refinements, by their number

    def group(self) -> Group:
        """Returns the prompt with all its scored samples, in the order of their numbers."""
        return Group(self.prompt, _ordered(self.drafts), self.kept, self.context, _ordered(self.completions))


def _ordered(samples: dict[int, Completion]) -> tuple[Completion, ...]:
    return tuple(samples[number] for number in sorted(samples))


def keep_best_refined(progress: PromptProgress, metric: str = "reward") -> list[Completion]:
    """Keeps the draft whose refinements earn most on average, and returns the refinements of the others.

    Refinements without a verdict are not counted; of drafts that are equally good the first one is kept.

    Args:
        metric: what is compared, as in `select_draft`.
    """
    samples = len(progress.completions) // len(progress.contexts)
    rewards = np.array([filtering.value(completion, metric) for completion in _ordered(progress.completions)])
    means = np.ma.masked_invalid(rewards.reshape(-1, samples)).mean(axis=1).filled(-np.inf)
    best = int(np.argmax(means))
    progress.kept, progress.context = list(progress.contexts.items())[best]
    kept = range(best * samples, (best + 1) * samples)
    left_out = [completion for number, completion in sorted(progress.completions.items()) if number not in kept]
    progress.completions = {number: progress.completions[number] for number in kept}
    return left_out


class SampledStep(NamedTuple):
    """What this process has sampled and scored of a step, by what becomes of it."""

    groups: dict[StepPosition, Group]  # the groups that enter the update
    redrawn: list[Group]  # groups that were filtered out, whose position a fresh prompt took
    left_out: list[Completion]  # refinements of drafts that are not kept


class StageRunner:
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
        self._largest = largest_value(config.rewards, config.algorithm.draft_metric)
        self._renderer = renderer
        self._scheduler = scheduler
        self._step = step
        self._prompts = prompts
        self._count = len(prompts(0))
        self._keys = {stage: stage_key(config.seed, step, number) for stage, number in STAGES.items()}
        self._drafting: set[StepPosition] = set()  # of prompts whose drafts are not all scored
        # The latest prompt of each position of this process.
        self._latest = {
            index: PromptProgress(prompts(0)[index], StepPosition(index), left=config.algorithm.num_generations)
            for index in scheduler.positions(self._count)
        }
        self._left_out: list[Completion] = []  # refinements of drafts that are not kept
        self._unrefined: list[PromptProgress] = []  # prompts without Stage 2, whose position a fresh prompt took
        self._redrawn: list[Group] = []  # groups that were filtered out, whose position a fresh prompt took

    def start(self) -> None:
        """Queues the first samples of every prompt; what follows them is queued as scores come."""
        for progress in self._latest.values():
            self._begin(progress)

    def result(self) -> SampledStep:
        """Returns what was sampled, once every score is there."""
        stayed = (*self._unrefined, *self._latest.values())
        groups = {progress.position: progress.group() for progress in stayed}
        return SampledStep(groups, self._redrawn, self._left_out)

    def _rng(self, progress: PromptProgress, tag: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self._step, progress.position.random_index(self._count), tag])

    def _begin(self, progress: PromptProgress) -> None:
        """Starts Stage 1 of a prompt, or Stage 2 where it has no drafts."""
        algorithm = self._algorithm
        dropped = algorithm.draft_dropout > 0 and self._rng(progress, DROPOUT).random() < algorithm.draft_dropout
        if dropped or not self._num_drafts:
            self._start_second(progress)
            return
        self._drafting.add(progress.position)
        self._draft(progress, 1 if algorithm.draft_early_stop else self._num_drafts)
        if self._is_decided(progress):
            self._drafted(progress)

    def _draft(self, progress: PromptProgress, samples: int) -> None:
        """Queues more drafts of a prompt."""
        scored = functools.partial(self._draft_scored, progress)
        self._submit(progress, "draft", None, samples, len(progress.drafts), scored)

    def _draft_scored(self, progress: PromptProgress, draft: Completion) -> None:
        """Records a scored draft. Then asks for the next one, where they come one by one, or moves the prompt on."""
        drafts, early_stop = progress.drafts, self._algorithm.draft_early_stop
        drafts[draft.sample_id] = draft
        if len(drafts) == self._num_drafts or (early_stop and self._best_is_known(progress)):
            self._drafting.remove(progress.position)
        elif early_stop:
            self._draft(progress, 1)
        if not self._rollout.streamed:
            self._pass_barrier()
        elif progress.context is not None:  # it has moved on already
            self._complete(progress)
        elif self._is_decided(progress):
            self._drafted(progress)

    def _pass_barrier(self) -> None:
        """Moves all prompts on that have drafted, once no prompt drafts any more."""
        if not self._drafting:
            for waiting in [progress for progress in self._latest.values() if progress.context is None]:
                self._drafted(waiting)

    def _is_decided(self, progress: PromptProgress) -> bool:
        """Returns whether it is certain what follows the drafts of a prompt: all are scored, or enough of them."""
        if progress.position not in self._drafting:
            return True
        if self._algorithm.draft_when == "unsolved":
            return not self._refines(progress)  # more drafts don't make a solved prompt unsolved
        return self._algorithm.draft_selection == "best" and self._best_is_known(progress)

    def _best_is_known(self, progress: PromptProgress) -> bool:
        return best_is_known(progress.drafts, self._algorithm.draft_metric, self._largest)

    def _refines(self, progress: PromptProgress) -> bool:
        """Returns whether a prompt with these drafts is refined, by algorithm.draft_when.

        With "unsolved" it has no or too few right drafts, and its position has G completions left.
        """
        if self._algorithm.draft_when == "always":
            return True
        has_left = progress.left >= self._algorithm.num_generations
        return has_left and not is_solved(progress.drafts.values(), self._algorithm)

    def _drafted(self, progress: PromptProgress) -> None:
        """Moves a prompt on for which that is decided: to its Stage 2, or to a fresh prompt at its position."""
        algorithm = self._algorithm
        if algorithm.second_stage == "verify":
            goes_on = needs_verification(progress.drafts.values())
        else:
            goes_on = self._refines(progress)
        if goes_on:
            self._start_second(progress)
            return
        progress.context = progress.prompt.tokens
        if algorithm.draft_when == "unsolved" and progress.left >= self._num_drafts:
            self._unrefined.append(progress)
            self._begin(self._fresh(progress, progress.left - self._num_drafts))

    def _fresh(self, progress: PromptProgress, left: int = 0) -> PromptProgress:
        """Returns the fresh prompt that takes the position of `progress`."""
        index, redraw = progress.position
        fresh = PromptProgress(self._prompts(redraw + 1)[index], StepPosition(index, redraw + 1), left=left)
        self._latest[index] = fresh
        return fresh

    def _start_second(self, progress: PromptProgress) -> None:
        """Starts Stage 2 of a prompt: on q' where a draft has a verdict, on the plain prompt where none has."""
        samples = self._algorithm.num_generations
        progress.contexts = {shown: self._context(progress, shown) for shown in self._shown(progress)}
        progress.kept, progress.context = next(iter(progress.contexts.items()))
        scored = functools.partial(self._refinement_scored, progress)
        # The refinements of context number c have the sample ids c G to (c + 1) G - 1; keep_best_refined relies on it.
        for place, shown in enumerate(progress.contexts):
            self._submit(progress, self._algorithm.second_stage, shown, samples, place * samples, scored)

    def _shown(self, progress: PromptProgress) -> list[int | None]:
        """Returns the numbers of the drafts to refine; None stands for the plain prompt."""
        drafts, algorithm = _ordered(progress.drafts), self._algorithm
        if not drafts:
            return [None]
        known = [i for i, draft in enumerate(drafts) if not np.isnan(filtering.value(draft, algorithm.draft_metric))]
        if algorithm.draft_selection == "refined" and known:
            return [*known]
        return [select_draft(drafts, algorithm.draft_selection, self._rng(progress, SELECTION), algorithm.draft_metric)]

    def _context(self, progress: PromptProgress, shown: int | None) -> np.ndarray:
        """Returns q' with a draft, or the plain prompt."""
        if shown is None:
            return progress.prompt.tokens
        draft = progress.drafts[shown]
        return self._renderer.with_draft(progress.prompt.question, draft.tokens, draft.score.is_right)

    def _refinement_scored(self, progress: PromptProgress, completion: Completion) -> None:
        """Records a scored refinement."""
        progress.completions[completion.sample_id] = completion
        self._complete(progress)

    def _complete(self, progress: PromptProgress) -> None:
        """Once all samples of a prompt are scored, begins a fresh prompt in its place if its group is filtered out."""
        wanted = self._algorithm.num_generations * len(progress.contexts)
        if len(progress.completions) < wanted or progress.position in self._drafting:
            return
        if len(progress.contexts) > 1:
            self._left_out += keep_best_refined(progress, self._algorithm.draft_metric)
        redraws = self._algorithm.max_redraws
        if progress.position.redraw < redraws and not filtering.passes([progress.group()], self._filter_metric)[0]:
            self._redrawn.append(progress.group())
            self._begin(self._fresh(progress))

    def _submit(
        self,
        progress: PromptProgress,
        stage: str,
        shown: int | None,
        samples: int,
        first: int,
        scored: Callable[[Completion], None],
    ) -> None:
        """Queues samples of one stage; verifications are graded against the verdict on the solution that they see.

        Args:
            shown: number of the draft that their prompt shows; None is the plain prompt.
            first: number of the first sample.
        """
        prompt, draft = progress.prompt, None if shown is None else progress.drafts[shown]
        if stage == "verify":
            assert draft is not None, "only a prompt with a right and a wrong solution is verified"
            prompt = replace(prompt, answer=VERDICTS[draft.score.is_right])
        self._scheduler.submit(
            Request(
                tokens=prompt.tokens if shown is None else progress.contexts[shown],
                index=progress.position.random_index(self._count),
                samples=samples,
                key=self._keys[stage],
                limit=self._rollout.max_completion_length,
                stage=stage,
                first=first,
                may_follow_up=lambda: progress.context is None or self._algorithm.max_redraws > 0,
                prompt=prompt,
                draft=None if draft is None else draft.text,
                scored=scored,
            )
        )
