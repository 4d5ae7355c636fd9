"""The metrics of an update, under TRL's names, from the sums of its programs and the groups that it left out."""

import math
from collections.abc import Sequence

import numpy as np

from igrpo_jax.learning.loss import MicroBatchSums
from igrpo_jax.learning.objectives import ResolvedObjective
from igrpo_jax.learning.packing import Unit

_LAST = ("learning_rate", "nonfinite_steps")  # a rate or a count: that of the last optimizer step
_LARGEST = ("sampling/sampling_logp_difference/max",)
_PLAIN = "refine/plain_logp_difference"  # how far the plain prompt's log-probs are from those with the draft
# NaN in a step in which no group has a gradient; metrics.jsonl has null for it.
NULLABLE = ("sampling/sampling_logp_difference/mean", *_LARGEST, _PLAIN)


def optimizer_step_metrics(
    sums: dict[str, MicroBatchSums],
    units: Sequence[Unit],
    idle: Sequence[Unit],
    objective: ResolvedObjective,
    main: str,
) -> dict[str, float]:
    """Returns the metrics of one optimizer step: the loss of all rows, and the metrics of the stage `main`.

    Another stage that is trained on is measured as `draft/kl` and `draft/clip_ratio`, or `verify/kl` and so on. With
    algorithm.refine_credit = "plain" the entropy is that of the rows that were trained on; without any there is none.

    Args:
        sums: sums over the rows that were trained on, by stage.
        units: all units of the optimizer step; stages without one have no metrics.
        idle: those without a gradient, for which nothing was computed.
    """
    by_stage = {}
    for stage in {unit.stage for unit in units}:
        by_stage[stage] = _stage_metrics(sums[stage], [unit for unit in idle if unit.stage == stage])
        if objective.functions.by_row:  # `clipped` is a fraction of the rows of all units, which have equally many
            share = sum(unit.stage == stage for unit in units) / len(units)
            by_stage[stage]["clip_ratio/region_mean"] = sums[stage].loss_sums.clipped / share
    named = by_stage.pop(main, {})
    if named and objective.plain_credit:
        # Refinements are scored after the plain prompt, not after the one that they were sampled from: how their
        # log-probs differ says nothing about the sampler.
        named[_PLAIN] = named.pop("sampling/sampling_logp_difference/mean")
        del named["sampling/sampling_logp_difference/max"]
        # For the same reason the entropy that an idle row was sampled with is another one.
        del named["entropy"]
        if tokens := sums[main].loss_sums.tokens:
            named["entropy"] = sums[main].entropy / tokens
    names = {"kl": "kl", "clip_ratio/region_mean": "clip_ratio"}
    others = {f"{stage}/{short}": of[name] for stage, of in by_stage.items() for name, short in names.items()}
    return named | others | {"loss": sum(stage_sums.loss_sums.loss for stage_sums in sums.values())}


def _stage_metrics(sums: MicroBatchSums, idle: Sequence[Unit]) -> dict[str, float]:
    """Returns the metrics of the rows of one stage.

    Idle rows count as well, with a KL and a clip ratio of 0. As in TRL, only tokens with weight count, but for
    `perf/idle_frac`: with algorithm.mask_truncated_completions none of a row that was cut. How far the sampler is from
    the policy is NaN if no row was trained on.
    """
    idle_tokens = sum(len(completion.tokens) for unit in idle for completion in unit.completions)
    with_weight = [
        completion for unit in idle for completion, weight in zip(unit.completions, unit.weight, strict=True) if weight
    ]
    tokens, trained = max(sums.tokens + idle_tokens, 1), sums.loss_sums.tokens
    counted = max(trained + sum(len(completion.tokens) for completion in with_weight), 1)
    return {
        "entropy": (sums.entropy + sum(completion.entropy for completion in with_weight)) / counted,
        "kl": sums.loss_sums.kl / counted,
        "clip_ratio/region_mean": sums.loss_sums.clipped / counted,
        "ratio/mean": sums.loss_sums.ratio / trained if trained else 1.0,
        "sampling/sampling_logp_difference/mean": sums.mismatch / trained if trained else math.nan,
        "sampling/sampling_logp_difference/max": sums.largest_mismatch if trained else math.nan,
        "perf/idle_frac": idle_tokens / tokens,
    }


def sampler_mismatches(units: Sequence[Unit], logprobs: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
    """Returns |log-prob - the sampler's log-prob| [T_i] of every completion of `units`.

    Args:
        logprobs: log-probs of the completions of each unit, as `rescore_units` returns them.
    """
    return [
        np.abs(logprob - completion.logprobs)
        for unit, of_unit in zip(units, logprobs, strict=True)
        for completion, logprob in zip(unit.completions, of_unit, strict=True)
    ]


def mean_over_steps(parts: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each metric over the optimizer steps of an update; for a maximum the largest value, and for a
    count or a learning rate the last one."""
    merged = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]  # a minibatch may have no drafts
        if name in NULLABLE:  # a minibatch may have no group with a gradient
            values = [value for value in values if not math.isnan(value)] or [math.nan]
        merged[name] = float(max(values) if name in _LARGEST else np.mean(values))
    return merged | {name: float(parts[-1][name]) for name in _LAST}
