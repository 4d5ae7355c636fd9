"""Attention of single queries to the keys that there really are, in float64, with its gradients.

Callers cut rows, prefixes and segments out of their arrays, so no padding is seen and none has to be masked.
"""

from typing import NamedTuple

import numpy as np


class Attended(NamedTuple):
    """The output of one head for one row, and the gradients of its sum weighted by `weight`."""

    mixed: np.ndarray  # [T, H]
    d_q: np.ndarray  # [T, H]
    d_k: np.ndarray  # [E, H]
    d_v: np.ndarray  # [E, H]


def attend(q, k, v, weight):
    """Causal attention of queries [T, H] to keys and values [E, H], of which the last T are the queries' own.

    `weight` [T, H] is that of each output.
    """
    q, k, v, weight = (x.astype(np.float64) for x in (q, k, v, weight))
    scale = q.shape[1] ** -0.5
    scores = np.where(np.tri(len(q), len(k), len(k) - len(q)), q @ k.T * scale, -np.inf)
    odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
    part = odds / odds.sum(axis=-1, keepdims=True)
    d_part = weight @ v.T
    d_scores = part * (d_part - np.sum(part * d_part, axis=-1, keepdims=True)) * scale
    return Attended(part @ v, d_scores @ k, d_scores.T @ q, part.T @ weight)
