"""The two stages of iGRPO (Algorithm 1 of arXiv 2602.09000), from prompts to groups with rewards. No gradient here.

1. Stage 1: sample N drafts of each prompt from the frozen policy and score them.
2. Keep the best draft, the first one where several are equally good, and splice it into the prompt: q'.
3. Stage 2: sample G completions of q' from the same policy and score them with the same reward.

No barrier separates the stages: a prompt moves on to Stage 2 as soon as its best draft is known, while other drafts,
its own too, are still drawn (`rollout.streamed = False` has a barrier, for comparisons). `num_drafts = 0` is the base
algorithm through the same code: Stage 2 on the plain prompt.

What departs from the paper, off by default, is in `stages`.

Results are ordered by (prompt, sample), never by arrival, and nothing in them depends on it: drafts are drawn all at
once, or one by one, each after the one before is scored; a redraw's prompt and randomness follow from its StepPosition.
The results do not depend on the number of processes either: each team of them works on some positions of the step, and
`exchange` puts the groups together.
"""

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from absl import logging

from igrpo_jax.config import AlgorithmConfig, Config
from igrpo_jax.distributed import watchdog
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.learning import exchange, filtering, objectives
from igrpo_jax.learning.exchange import RolloutPart
from igrpo_jax.learning.stages import StageRunner
from igrpo_jax.models import decoder
from igrpo_jax.records import Group, Score
from igrpo_jax.rewards.failures import check_errors
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.sampling.requests import Usage
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.scoring import sample_and_score
from igrpo_jax.sampling.state import Sampling

if TYPE_CHECKING:
    from igrpo_jax.data.prompts import Renderer  # with transformers, which sampling does not need


class RolloutResult(NamedTuple):
    """What a rollout hands to the update; the same on every process."""

    groups: list[Group]  # one per prompt, in the order of the positions of the step, and of their redraws
    metrics: dict[str, float]  # `perf/`, `verifier/` and `redraw/`


class Rollout:
    """Samples and scores whole steps."""

    def __init__(self, config: Config, renderer: "Renderer", scheduler: Scheduler, verifier: Verifier):
        self._config = config
        self._renderer = renderer
        self._scheduler = scheduler
        self._verifier = verifier
        self._warned = False

    def collect(self, params: decoder.Params, step: int, prompts: exchange.Prompts) -> RolloutResult:
        """Returns one group per prompt, in the order of `prompts(0)`, and the metrics of the rollout.

        With algorithm.draft_when = "unsolved" a position may have several prompts.

        `redraw/groups` counts the groups whose position a fresh prompt took, `redraw/exhausted` those that stayed
        although they are filtered out, because `algorithm.max_redraws` fresh prompts were used. Of all groups that
        were sampled, `redraw/filtered_frac` is the fraction filtered out, and `redraw/equal_reward_frac` the fraction
        whose rewards are all equal. Tokens of redrawn groups are counted in `perf/draft_tokens` and
        `perf/completion_tokens`; all other metrics describe the groups that stayed.

        Every process returns the same groups, and the same metrics but for `perf/rollout_time`: tokens are summed,
        slots are counted over all; `perf/verify_wait_time` and `perf/weight_sync_time` are the longest.
        `perf/process_idle_frac` is the fraction of the rollout that the processes, on average, waited for the slowest.

        Args:
            prompts: maps the number of a redraw to the prompts of this step, one for each position: 0 gives the
                original prompts; 1, 2, … give the fresh prompts that replace them.

        Raises:
            VerifierError: more gradings failed than config.rewards.max_error_fraction allows.
            Preempted: a process received SIGTERM.
        """
        began = time.perf_counter()
        prompts = functools.cache(prompts)
        self._verifier.start_step(step)
        try:
            own = self._collect_own(params, step, prompts)
        except Preempted:
            own = None
        with watchdog.phase("exchange"):
            parts = exchange.all_gather_parts(own, prompts)
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

    def _collect_own(self, params: decoder.Params, step: int, prompts: exchange.Prompts) -> RolloutPart:
        """Samples and scores this process's positions of a step."""
        began, settings = time.perf_counter(), self._config.rollout
        self._scheduler.start(params, Sampling(settings.temperature, settings.top_p, settings.top_k))
        try:
            runner = StageRunner(self._config, self._renderer, self._scheduler, step, prompts)
            runner.start()
            waited = sample_and_score(self._scheduler, self._verifier.submit, self._renderer)
        finally:
            self._scheduler.finish()
        groups, redrawn, left_out = runner.result()
        sampled = [*groups.values(), *redrawn]
        refinements = [completion for group in sampled for completion in group.completions]
        return RolloutPart(
            groups=groups,
            redrawn=len(redrawn),
            redrawn_equal=_equal(redrawn),
            scores=_scores(redrawn) + [completion.score for completion in left_out],
            draft_tokens=sum(len(draft.tokens) for group in sampled for draft in group.drafts),
            completion_tokens=sum(len(completion.tokens) for completion in (*refinements, *left_out)),
            judgements=self._verifier.judgements,
            usage=self._scheduler.usage,
            seconds=time.perf_counter() - began,
            weight_seconds=self._scheduler.weight_seconds,
            waited=waited,
        )

    def _redraws(self, groups: Sequence[Group], parts: Sequence[RolloutPart]) -> dict[str, float]:
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


def _usage_metrics(parts: Sequence[RolloutPart]) -> dict[str, float]:
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
