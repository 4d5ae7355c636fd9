"""Metrics of samples whose log-probs are computed again; they change nothing in the update.

One micro-batch of samples is enough for each of them, so that they cost little.
"""

from collections.abc import Sequence

import numpy as np

from igrpo_jax.learning.learner import Learner
from igrpo_jax.learning.packing import Unit
from igrpo_jax.learning.update_metrics import sampler_mismatches
from igrpo_jax.models import decoder
from igrpo_jax.records import Completion, Group


def rescored_metrics(learner: Learner, params: decoder.Params, groups: Sequence[Group]) -> dict[str, float]:
    """Returns what `draft_mismatch` and `reliance` measure. `params` are those that sampled."""
    return draft_mismatch(learner, params, groups) | reliance(learner, params, groups)


def draft_mismatch(learner: Learner, params: decoder.Params, groups: Sequence[Group]) -> dict[str, float]:
    """Returns how far rescored log-probs of the first drafts, one micro-batch of them, are from the sampler's.

    This checks the sampler in Stage 1, whose tokens usually carry no loss. `params` are those that sampled.
    """
    batch = learner.packer.leading([_alone(group.prompt.tokens, draft) for group in groups for draft in group.drafts])
    units = [piece.unit for piece in batch.shards[0]]
    if not units:
        return {}
    mismatches_by_unit = sampler_mismatches(units, learner.rescored(params, units, [batch]))
    mismatches = np.concatenate(mismatches_by_unit)
    return {
        "sampling/draft_logp_difference/mean": float(np.mean(mismatches)),
        "sampling/draft_logp_difference/max": float(np.max(mismatches)),
    }


def reliance(learner: Learner, params: decoder.Params, groups: Sequence[Group]) -> dict[str, float]:
    """Returns how much right refinements rely on their draft: the mean of log pi(o | q') - log pi(o | q), in nats.

    It is the mean over the first right refinements, one micro-batch of them; absent where there are none. `params`
    are those that sampled.
    """
    right = [
        (group, x)
        for group in groups
        for x in group.completions
        if group.kept is not None and x.stage == "refine" and x.score.is_right
    ]
    batch = learner.packer.leading([_alone(group.context, completion) for group, completion in right])
    drafted = [piece.unit for piece in batch.shards[0]]
    if not drafted:
        return {}
    plain = [_alone(group.prompt.tokens, completion) for group, completion in right[: len(drafted)]]  # shorter ones
    after, before = (
        [logprobs.sum() for (logprobs,) in learner.rescored(params, units, [learner.packer.leading(units)])]
        for units in (drafted, plain)
    )
    return {"refine/reliance": float(np.mean(np.subtract(after, before)))}


def _alone(context: np.ndarray, completion: Completion) -> Unit:
    """Returns one completion as a separate unit, without an advantage."""
    return Unit(context, (completion,), np.zeros(1, np.float32))
