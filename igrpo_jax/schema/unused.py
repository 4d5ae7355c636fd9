"""Which settings of a run that differ from their defaults have no effect, because another setting is missing."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from igrpo_jax.schema import fields

if TYPE_CHECKING:
    from igrpo_jax.config import Config


class Need(NamedTuple):
    """What fields need to have an effect."""

    paths: tuple[str, ...]  # dotted names of fields, or of sections for all their fields
    text: str  # as it follows "needs"
    is_met: Callable[["Config"], bool]


# Not here: what the draft stage needs drafts for, because algorithm.num_drafts = 0 is how it is switched off, and that
# benchmarks need evaluation.every, which the run says beside them.
NEEDS = (
    Need(("model.builtin",), "model.path to be empty", lambda c: not c.model.path),
    Need(("model.lora.alpha", "model.lora.targets"), "model.lora.rank above 0", lambda c: c.model.lora.rank > 0),
    Need(("data.task",), "data.train to be empty", lambda c: not c.data.train),
    Need(("data.arithmetic",), 'data.task = "arithmetic", or that benchmark', lambda c: _has_task(c, "arithmetic")),
    Need(("data.lookups",), 'data.task = "lookups", or that benchmark', lambda c: _has_task(c, "lookups")),
    Need(("data.subset", "data.split", "data.prompt_column"), "data.train", lambda c: bool(c.data.train)),
    Need(
        ("data.answer_column",),  # also the name by which rewards of one's own get the answers
        "data.train, or a reward of your own",
        lambda c: bool(c.data.train or c.rewards.custom_weights),
    ),
    Need(("warm_start",), "model.path to be empty and warm_start.steps above 0", lambda c: c.warm_start.steps > 0),
    Need(("sft.draft_column", "sft.drafts_from"), "sft.draft_fraction above 0", lambda c: c.sft.draft_fraction > 0),
    Need(
        ("algorithm.solved_fraction",),
        'algorithm.draft_when = "unsolved"',
        lambda c: c.algorithm.draft_when == "unsolved",
    ),
    Need(
        ("algorithm.credit_completions", "algorithm.credit_gamma"),
        'algorithm.refine_credit = "plain"',
        lambda c: c.algorithm.refine_credit == "plain",
    ),
    Need(("algorithm.filter_groups_metric",), "algorithm.max_redraws above 0", lambda c: c.algorithm.max_redraws > 0),
    Need(("rewards.overlong_cache",), "rewards.overlong above 0", lambda c: c.rewards.overlong > 0),
    Need(("rewards.custom_weight",), "rewards.custom", lambda c: bool(c.rewards.custom)),
    Need(("rewards.conversational",), "rewards.custom or rewards.functions", lambda c: bool(c.rewards.custom_weights)),
    Need(("rewards.judge",), "rewards.judge.weight above 0", lambda c: c.rewards.judge.weight > 0),
    Need(("learner.offload_reference",), "algorithm.beta above 0", lambda c: c.algorithm.beta > 0),
    Need(
        ("optimizer.b1", "optimizer.b2", "optimizer.mu_dtype"),
        "an optimizer.name other than adafactor",
        lambda c: c.optimizer.name != "adafactor",
    ),
    Need(("evaluation.drafts",), "evaluation.rounds above 0", lambda c: c.evaluation.rounds > 0),
)
# Sections that a run of reinforcement learning reads, and one of SFT; of others nothing has an effect there.
RUN = ("model", "data", "warm_start", "algorithm", "rewards", "learner", "optimizer", "evaluation")
SFT_RUN = ("model", "data", "sft", "optimizer")


def unused(config: "Config", sections: Sequence[str] = RUN) -> list[str]:
    """Returns a text for each need that is not met: the settings without effect that are not the default, and it.

    Args:
        sections: those that the run reads.
    """
    cls, default, texts = type(config), type(config)(), []
    read = [path for path in fields.leaf_paths(cls) if path.partition(".")[0] in sections]
    changed = [path for path in read if fields.value_at(config, path) != fields.value_at(default, path)]
    for need in NEEDS:
        idle = [path for path in changed if f"{path}.".startswith(tuple(f"{name}." for name in need.paths))]
        if idle and not need.is_met(config):
            texts.append(f"{', '.join(idle)}: {'needs' if len(idle) == 1 else 'need'} {need.text}")
    return texts


def _has_task(config: "Config", name: str) -> bool:
    """Returns whether a run trains on a built-in task or evaluates it."""
    return (not config.data.train and config.data.task == name) or name in config.evaluation.benchmarks
