"""How much a group of completions can teach, with drafts and without, where a reward is 0 or 1.

docs/when_drafts_pay.md explains these formulas, and its tables are computed with them. Nothing here imports jax.

The setting. A group has G completions of one context. Given the context they are independent, and each is right with
the same probability. K of them are right. All that is asked about a group follows from the distribution of K:

1. GRPO: K is binomial with the single-shot success p (`right_counts`).
2. iGRPO: the kept draft is right with probability a (`kept_right`), and K is binomial with r then and with w otherwise
   (`igrpo_counts`).
3. A data set: the distributions of its problems are averaged, because everything in a `Signal` but the SNR is linear in
   them.

The gradient of a group is (1/G) sum_i A_i S_i, where S_i = grad log pi(o_i | context) is the score of completion i.
Advantages sum to 0, so with D = E[S | right] - E[S | wrong] the gradient's mean is D E[(1/G) sum_i A_i R_i]. Given the
rewards, a score varies by sigma^2 = E|S - E[S | R]|^2 around its mean, and so the gradient's noise is
sigma^2 E[(1/G^2) sum_i A_i^2]. (The rewards' own part of the noise is left out: it is of the order of |D|^2, which is
small compared with sigma^2.) Advantages are those of `objectives.group_advantages`, but for its delta of 1e-4,
neglected here.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Signal(NamedTuple):
    """What one group can teach. The fields are arrays of one shape, or numbers; `trained` is a number."""

    trained: int  # completions that are trained on
    active: np.ndarray  # probability that the group has a gradient: that its rewards differ
    gradient: np.ndarray  # mean of (1/G) sum_i A_i R_i: the length of the mean gradient in units of |D|
    squared_advantage: np.ndarray  # mean of (1/G) sum_i A_i^2

    @property
    def snr_squared(self) -> np.ndarray:
        """Squared length of the mean gradient over the gradient's noise, in units of |D|^2 / sigma^2; 0 without any.

        G c^2 / q of the fields c = `gradient` and q = `squared_advantage`. That of P independent groups is P times as
        large.
        """
        noise = np.asarray(self.squared_advantage, float)
        squared = self.trained * np.square(self.gradient)
        return np.divide(squared, noise, out=np.zeros_like(noise), where=noise > 0)


def right_counts(success: ArrayLike, size: int) -> np.ndarray:
    """Returns the probability of k right ones among `size` completions, [..., size + 1]; success has shape [...]."""
    probability, k = np.asarray(success, float)[..., None], np.arange(size + 1)
    ways = np.array([math.comb(size, right) for right in k], float)
    return ways * probability**k * (1 - probability) ** (size - k)


def drawn_counts(right: ArrayLike, sampled: int, size: int) -> np.ndarray:
    """Returns an unbiased estimate of `right_counts` from a problem's answers, [..., size + 1].

    It is the distribution of the right ones among `size` answers drawn from the sampled ones without replacement
    (hypergeometric), as in the estimate of pass@k (2107.03374). The binomial with the measured share of right answers
    is biased: with few answers it takes too many groups for equal ones.

    Args:
        right: [...] int, right answers among the `sampled` ones of each problem.

    Raises:
        ValueError: a problem has fewer answers than a group.
    """
    if sampled < size:
        raise ValueError(f"{sampled} answers to a problem: must be at least the {size} of a group")
    row = lambda good: [
        math.comb(good, k) * math.comb(sampled - good, size - k) / math.comb(sampled, size) for k in range(size + 1)
    ]
    table = np.array([row(good) for good in range(sampled + 1)])
    return table[np.asarray(right)]


def kept_right(success: ArrayLike, drafts: int, selection: str = "best") -> np.ndarray:
    """Returns a, the probability that the draft in q' is right, by `algorithm.draft_selection`.

    For the best one 1 - (1 - p)^N, Proposition 3.1 of 2602.09000.
    """
    p = np.asarray(success, float)
    return {"best": 1 - (1 - p) ** drafts, "worst": p**drafts, "first": p, "random": p}[selection]


def igrpo_counts(
    success: ArrayLike,
    after_right: ArrayLike,
    after_wrong: ArrayLike,
    drafts: int,
    refinements: int,
    selection: str = "best",
) -> np.ndarray:
    """Returns the probability of k right ones among the refinements of a prompt, [..., G + 1].

    Args:
        success: p, the success of a draft, [...].
        after_right: r, the success of a refinement that was shown a right draft, [...].
        after_wrong: w, the success of a refinement that was shown a wrong one, [...].
    """
    weight = kept_right(success, drafts, selection)[..., None]
    return weight * right_counts(after_right, refinements) + (1 - weight) * right_counts(after_wrong, refinements)


def signal(counts: ArrayLike, scale: str = "group", baseline: str = "mean") -> Signal:
    """Returns what a group can teach whose number of right completions has this distribution.

    With k right ones of G, the mean of A_i R_i over the group is k/G (1 - k/G) / d and the mean of A_i^2 is
    k/G (1 - k/G) / d^2, where d is what advantages are divided by: the group's own std for "group", which is
    sqrt(k (G - k) / (G (G - 1))); that of all rewards for "batch", which is sqrt(m (1 - m)) for a batch of many groups
    with mean reward m; 1 for "none".

    Args:
        counts: [..., G + 1] probabilities of k right ones, averaged over the problems of a batch for "batch".
        scale: as `algorithm.scale_rewards`.
        baseline: as `algorithm.baseline`; "leave_one_out" makes advantages G / (G - 1) times as large.
    """
    counts = np.asarray(counts, float)
    size = counts.shape[-1] - 1
    right = np.arange(size + 1) / size
    spread = right * (1 - right)
    mean = np.minimum(counts @ right, 1.0)[..., None]  # the sum of the probabilities may be rounded to above 1
    divisors = {"group": spread * size / max(size - 1, 1), "batch": mean * (1 - mean), "none": np.ones(1)}
    divisor = np.broadcast_to(np.sqrt(divisors[scale]), counts.shape)
    factor = size / max(size - 1, 1) if baseline == "leave_one_out" else 1.0
    inverse = np.divide(factor, divisor, out=np.zeros(counts.shape), where=(spread > 0) & (divisor > 0))
    return Signal(
        trained=size,
        active=1 - counts[..., 0] - counts[..., -1],
        gradient=np.sum(counts * spread * inverse, axis=-1),
        squared_advantage=np.sum(counts * spread * inverse**2, axis=-1),
    )


def trained_together(*signals: Signal) -> Signal:
    """Returns the joint signal of several groups of one prompt over which an update takes one mean, as with
    algorithm.train_drafts.

    Fields are averaged by the number of completions, which assumes that D is the same in each group.
    """
    total = sum(part.trained for part in signals)
    mean = lambda name: sum(part.trained * getattr(part, name) for part in signals) / total
    return Signal(total, mean("active"), mean("gradient"), mean("squared_advantage"))


def snr_ratio(
    success: ArrayLike,
    after_right: ArrayLike,
    after_wrong: ArrayLike,
    drafts: int,
    refinements: int,
    scale: str = "group",
    transfer: float = 1.0,
    selection: str = "best",
) -> np.ndarray:
    """Returns SNR^2 of iGRPO (N + G) over that of GRPO with as many samples; the arguments are those of `igrpo_counts`.

    p must lie between 0 and 1, both excluded: elsewhere GRPO has no signal to compare with.

    Args:
        transfer: cosine between the mean gradient on q' and that on the plain prompt. Only the component along the
            latter counts, so the ratio is multiplied by its square.
    """
    refined = signal(igrpo_counts(success, after_right, after_wrong, drafts, refinements, selection), scale)
    return transfer**2 * refined.snr_squared / signal(right_counts(success, drafts + refinements), scale).snr_squared


def largest_signal(size: int, scale: str = "group") -> float:
    """Returns the largest SNR^2 of a group of `size`, whatever the context: that of a success of one half."""
    return float(signal(right_counts(0.5, size), scale).snr_squared)


def rare_bound(times: ArrayLike, drafts: int, refinements: int, scale: str) -> np.ndarray:
    """Returns what `snr_ratio` cannot exceed, whatever r is, where p goes to 0 and w = times * p.

    It is (N S + (G - 1) times) / (N + G - 1) with S = `largest_signal`. To first order in p a right draft is kept with
    probability N p, a group after a wrong draft holds one right completion with probability G w, and GRPO's SNR^2 is
    (N + G - 1) p. SNR^2 is c^2 / q of averages c and q, and so convex: that of a mixture is at most the mixture of the
    SNR^2. That of a group with success w is at most (G - 1) w (1 - w), by the inequality of Cauchy and Schwarz.
    """
    best = drafts * largest_signal(refinements, scale)
    return (best + (refinements - 1) * np.asarray(times, float)) / (drafts + refinements - 1)


def hopeless_from(drafts: int, refinements: int, scale: str = "group") -> float:
    """Returns the p above which, and up to 1 - p, iGRPO has less signal than GRPO, whatever r, w and the transfer.

    There GRPO's SNR^2 exceeds `largest_signal` of G. It rises with p up to one half; p is found by bisection. For
    "batch" and "none" it is (1 - sqrt(N / (N + G - 1))) / 2.
    """
    low, high, most = 0.0, 0.5, largest_signal(refinements, scale)
    for _ in range(60):
        middle = (low + high) / 2
        below = signal(right_counts(middle, drafts + refinements), scale).snr_squared < most
        low, high = (middle, high) if below else (low, middle)
    return low


def repair_range(
    success: ArrayLike,
    after_right: ArrayLike,
    drafts: int,
    refinements: int,
    scale: str = "group",
    transfer: float = 1.0,
    selection: str = "best",
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the least and the largest w, [...] each, with which `snr_ratio` is at least 1; NaN if there is none.

    It tests 4,001 values of w: the squares of evenly spaced numbers, so that they are denser near 0. success and
    after_right have the shape [...].
    """
    w = np.square(np.linspace(0, 1, 4001))
    p, r = (np.asarray(value, float)[..., None] for value in np.broadcast_arrays(success, after_right))
    enough = snr_ratio(p, r, w, drafts, refinements, scale, transfer, selection) >= 1
    first, last = np.argmax(enough, axis=-1), w.size - 1 - np.argmax(enough[..., ::-1], axis=-1)
    least, largest = (np.where(enough.any(axis=-1), w[index], np.nan) for index in (first, last))
    return least, largest


def expected_drafts(success: ArrayLike, drafts: int) -> np.ndarray:
    """Returns the mean number of drafts that algorithm.draft_early_stop draws: (1 - (1 - p)^N) / p, N where p = 0.

    It is the sum over n < N of (1 - p)^n, the probability that n drafts are all wrong. The kept draft is the same one:
    the first right one, or the first of N wrong ones.
    """
    p = np.asarray(success, float)
    return np.sum((1 - p[..., None]) ** np.arange(drafts), axis=-1)


def copying(success: ArrayLike, share: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns (r, w) of a model that repeats the draft's answer with probability `share` and ignores it otherwise."""
    p, share = np.asarray(success, float), np.asarray(share, float)
    return share + (1 - share) * p, (1 - share) * p


def plain_success_bound(success: ArrayLike, reliance: ArrayLike) -> np.ndarray:
    """Returns what the single-shot success p is at least: p' exp(-rho).

    p' is the success with q', and rho ("reliance", 2604.00698) the mean of log pi(o | q') - log pi(o | q) over right
    refinements o, in nats per completion. p = sum over right o of pi(o | q) = p' E[exp(log pi(o|q) - log pi(o|q'))],
    the mean being over right refinements, and the exponential is convex (Jensen).
    """
    return np.asarray(success, float) * np.exp(-np.asarray(reliance, float))
