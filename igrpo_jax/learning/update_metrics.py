"""The metrics of an update, under TRL's names, from the sums of its programs and the rescored idle units."""

from collections.abc import Sequence

import numpy as np

from igrpo_jax.learning.loss import MicroBatchSums
from igrpo_jax.learning.packing import Unit
from igrpo_jax.learning.rescoring import TokenLogprobs

_LAST = ("learning_rate", "nonfinite_steps")  # a rate or a count: that of the last optimizer step
_LARGEST = ("sampling/sampling_logp_difference/max",)


def optimizer_step_metrics(
    sums: dict[str, MicroBatchSums], idle: Sequence[Unit], rescored: Sequence[TokenLogprobs]
) -> dict[str, float]:
    """Returns the metrics of one optimizer step: the loss of all rows, and the metrics of the refinements.

    Drafts that are trained on are measured as `draft/entropy`, `draft/kl` and `draft/clip_ratio`.

    Args:
        sums: by stage, of the rows that were trained on.
        idle: units without a gradient, which were only rescored.
        rescored: log-probs and entropies of each of the `idle` units.
    """
    by_stage = {}
    for stage, stage_sums in sums.items():
        chosen = [i for i, unit in enumerate(idle) if unit.stage == stage]
        if chosen or stage_sums.tokens or stage == "refine":
            by_stage[stage] = _stage_metrics(stage_sums, [idle[i] for i in chosen], [rescored[i] for i in chosen])
    names = {"entropy": "entropy", "kl": "kl", "clip_ratio/region_mean": "clip_ratio"}
    drafts = {f"draft/{short}": by_stage["draft"][name] for name, short in names.items() if "draft" in by_stage}
    return by_stage["refine"] | drafts | {"loss": sum(stage_sums.loss_sums.loss for stage_sums in sums.values())}


def _stage_metrics(sums: MicroBatchSums, idle: Sequence[Unit], rescored: Sequence[TokenLogprobs]) -> dict[str, float]:
    """Returns the metrics of the rows of one stage: clipping as the program summed it, entropy and mismatch over idle
    rows too."""
    mismatches = sampler_mismatches(idle, rescored)
    entropies = [entropy for unit_rescored in rescored for entropy in unit_rescored.entropies]
    idle_tokens = sum(map(len, mismatches))
    tokens = max(sums.tokens + idle_tokens, 1)
    idle_with_weight = sum(
        len(completion.tokens)
        for unit in idle
        for completion, weight in zip(unit.completions, unit.weight, strict=True)
        if weight
    )
    counted = max(sums.loss_sums.tokens + idle_with_weight, 1)
    mismatch = sums.mismatch + sum(row.sum() for row in mismatches)
    return {
        "entropy": (sums.entropy + sum(row.sum() for row in entropies)) / tokens,
        "kl": sums.loss_sums.kl / counted,
        "clip_ratio/region_mean": sums.loss_sums.clipped / counted,
        "ratio/mean": sums.loss_sums.ratio / sums.loss_sums.tokens if sums.loss_sums.tokens else 1.0,
        "sampling/sampling_logp_difference/mean": mismatch / tokens,
        "sampling/sampling_logp_difference/max": max([sums.largest_mismatch, *(row.max() for row in mismatches)]),
        "perf/idle_frac": idle_tokens / tokens,
    }


def sampler_mismatches(units: Sequence[Unit], rescored: Sequence[TokenLogprobs]) -> list[np.ndarray]:
    """Returns |log pi_old - the sampler's log-prob| [T_i] of every completion of `units`.

    log pi_old is that of `rescored` where a unit does not know it.
    """
    return [
        np.abs(old - completion.logprobs)
        for unit, unit_rescored in zip(units, rescored, strict=True)
        for completion, old in zip(unit.completions, unit.old or unit_rescored.logprobs, strict=True)
    ]


def mean_over_steps(parts: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each metric over the optimizer steps of an update; of a max the largest, of a count or rate
    the last."""
    names = dict.fromkeys(name for part in parts for name in part)  # a minibatch may have no drafts
    merged = {name: float(np.mean([part[name] for part in parts if name in part])) for name in names}
    merged |= {name: float(parts[-1][name]) for name in _LAST}
    return merged | {name: float(max(part[name] for part in parts)) for name in _LARGEST}
