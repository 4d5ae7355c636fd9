"""Supervised steps by the learner's own update: cross-entropy is the objective whose every advantage is 1.

With one optimizer step to an update the ratio of the policy to pi_old is 1 in value, and its gradient is that of the
log-prob. So the gradient of DAPO's token mean with advantages of 1 is that of the mean cross-entropy over the tokens of
the batch. Packing, sharding, remat, LoRA and the skipping of steps that are not finite are therefore the same as in
reinforcement learning. The cross-entropy itself is the learner's metric of the mean log-prob difference from the
sampler, with sampler log-probs of 0.

If its problem has drafts, an example shows one with the probability config.sft.draft_fraction. Whether it does, and
which draft it shows, follows only from (seed, step).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from igrpo_jax.config import AlgorithmConfig, Config
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.records import Completion, Group, Prompt

_CROSS_ENTROPY = "sampling/sampling_logp_difference/mean"


class ExampleDraft(NamedTuple):
    """A draft that a prompt may show."""

    tokens: np.ndarray  # [T] int32
    is_right: bool | None  # None if this is not known


@dataclass(frozen=True)
class Example:
    """A prompt with the completion that is imitated, and drafts that the prompt may show."""

    prompt: Prompt
    target: np.ndarray  # [T] int32, EOS included
    drafts: tuple[ExampleDraft, ...]  # may be empty


def learner_config(config: Config) -> Config:
    """Returns the configuration with which a Learner makes supervised steps of config.prompts_per_step examples."""
    return replace(
        config,
        prompts_per_step=-(-config.prompts_per_step // 2),  # of two completions each, by which shapes are sized
        algorithm=AlgorithmConfig(loss_type="dapo", num_drafts=0, num_generations=2),
        rollout=replace(config.rollout, temperature=1.0),
        learner=replace(config.learner, minibatches=1, shared_prefix=False),
    )


def groups(config: Config, examples: Sequence[Example], renderer: Renderer, step: int) -> list[Group]:
    """Returns the examples of a step as groups of one completion each."""
    rng = np.random.default_rng([config.seed, step, 0x5F7])
    shown, chosen = rng.random(len(examples)), rng.random(len(examples))
    made = []
    for example, u, v in zip(examples, shown, chosen, strict=True):
        context = example.prompt.tokens
        if example.drafts and u < config.sft.draft_fraction:
            draft = example.drafts[int(v * len(example.drafts))]
            context = renderer.with_draft(example.prompt.question, draft.tokens, draft.is_right)
        made.append(Group(example.prompt, (), None, context, (imitated(example.target),)))
    return made


def imitated(target: np.ndarray) -> Completion:
    """Returns the completion that is imitated, with sampler log-probs of 0.

    Args:
        target: [T] int32, EOS included.
    """
    return Completion("refine", 0, target, np.zeros(len(target), np.float32), True)


def metrics(learned: Mapping[str, float], made: Sequence[Group]) -> dict[str, float]:
    """Returns the metrics of a supervised step from those of its update; sft/loss is in nats per token."""
    kept = ("grad_norm", "learning_rate", "nonfinite_steps", "entropy", "perf/padding_frac")
    return {
        "sft/loss": learned[_CROSS_ENTROPY],
        "sft/tokens": sum(len(group.completions[0].tokens) for group in made),
        "sft/draft_frac": float(np.mean([group.context is not group.prompt.tokens for group in made])),
    } | {name: learned[name] for name in kept}
