"""DAPO's dynamic sampling (arXiv 2503.14476, eq. 11): which groups it filters out, by the metric that it looks at.

DAPO trains on a prompt where some completions are right and some wrong: 0 < |correct| < G. The weighted sum of rewards
is no substitute for that: completions that are all wrong may still differ in their format, and a policy that trains on
such groups learns the format at the cost of the answers. So the metric is the accuracy, unless
`algorithm.filter_groups_metric` names another reward, or "reward" for the weighted sum.
"""

from collections.abc import Sequence

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.learning import objectives
from igrpo_jax.records import Completion, Group


def passes(groups: Sequence[Group], metric: str) -> np.ndarray:
    """Returns whether the completions of each group differ in `metric`, [P] bool.

    Args:
        groups: groups of any size; drafts are ignored.
        metric: name of a reward, or "reward" for the weighted sum. Completions without a verdict are not compared.
    """
    values = [np.array([[value(completion, metric) for completion in group.completions]]) for group in groups]
    return np.array([bool(objectives.has_signal(row)[0]) for row in values], bool)


def rewards_after_filtering(group: Group, config: Config) -> np.ndarray:
    """Returns the verifier's rewards, [G] float32.

    They are NaN in a group that dynamic sampling filters out after its last redraw, so that it enters no baseline and
    its advantages are 0.
    """
    if config.algorithm.max_redraws and not passes([group], config.filter_groups_metric)[0]:
        return np.full(len(group.completions), np.nan, np.float32)
    return group.rewards


def value(completion: Completion, metric: str) -> float:
    """Returns one of a completion's rewards, or "reward", their weighted sum; NaN without a verdict."""
    score = completion.score
    return score.reward if metric == "reward" else score.of(metric)
