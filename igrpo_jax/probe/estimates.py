"""What the counts of right answers say of drafts: p, r, w and the signal of GRPO and iGRPO, with 95 % intervals.

docs/when_drafts_pay.md explains the symbols and the formulas, which `draft_signal` has. Every figure here is a
function of means over problems, and each of these means is unbiased:

1. The K plain answers of a problem (K >= N + G) give K sets of N consecutive drafts, in a circle. The fraction of sets
   whose kept draft is right estimates a, by whatever rule the draft is chosen.
2. One right and one wrong kept draft of a problem, where it has such, are each refined G times. Their counts are
   weighted by a and 1 - a.
3. Right drafts come from easy problems, so r and w are compared with plain answers to the same problems: for each set
   whose kept draft is right (or wrong), with the K - N answers outside the set.

4. Repair, what a wrong draft adds to plain success, compares the refinements of the draft kept of the first N answers,
   where it is wrong, with the K - N answers that follow. A problem counts once or not at all. With all K sets a
   problem whose answers are all wrong would weigh K times as much as one with a single wrong set; most probes hold none
   such where success is likely, and a bootstrap then says of models that ignore drafts that wrong ones mislead them.

Intervals are percentiles of a bootstrap over problems; that of repair is Student's. Where a count is the same for all
problems they are exact.

Legend: P problems, K plain answers, N drafts, G refinements, B resamples.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from igrpo_jax.evaluation import measures
from igrpo_jax.probe import draft_signal

RESAMPLES = 2000
FEW = 5  # fewer active problems than this are too few for a bootstrap
SEEN = 11.6046  # mean of a Poisson count that is at least FEW with probability 99 % (Garwood 1936, Biometrika 28)
HALF_WIDTH = 1.96  # of a 95 % interval, in standard deviations
SHOWN = HALF_WIDTH + 1.28  # distance from 0, in standard deviations, at which nine of ten 95 % intervals exclude 0
ROUNDED = 1e-12  # a figure nearer to 0 is what rounding leaves of 0; no share of counts is as small
NONE = -1  # a count of refinements of a draft that was not shown


class Estimate(NamedTuple):
    """A figure with its 95 % interval; all NaN if it could not be measured."""

    value: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether it could be measured."""
        return not math.isnan(self.low)

    def times(self, factor: float) -> "Estimate":
        """Returns the estimate times `factor`, which is not negative."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def without_noise(self) -> "Estimate":
        """Returns the estimate with 0 instead of what rounding left of it."""
        return Estimate(*(0.0 if abs(x) < ROUNDED else x for x in self))


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Counts:
    """Which answers to P problems were right."""

    plain: np.ndarray  # [P, K] bool, plain answers
    kept: np.ndarray  # [P, K] bool, whether the draft kept of the N answers from each one on is right
    after_right: np.ndarray  # [P] int, right ones among G refinements of a right draft; NONE where none was shown
    after_wrong: np.ndarray  # [P] int, the same of a wrong draft
    drafts: int  # N
    refinements: int  # G

    @property
    def problems(self) -> int:
        """P."""
        return len(self.plain)

    @property
    def weight(self) -> np.ndarray:
        """a of each problem: the fraction of its sets of drafts whose kept one is right, [P]."""
        return self.kept.mean(axis=1)

    @property
    def active_plain(self) -> int:
        """Number of problems whose plain answers are not all right or all wrong."""
        right = self.plain.sum(axis=1)
        return int(np.sum((right > 0) & (right < self.plain.shape[1])))

    @property
    def active_refined(self) -> int:
        """Number of problems of which a group of refinements is neither all right nor all wrong."""
        differ = lambda right: (right > 0) & (right < self.refinements)
        return int(np.sum(differ(self.after_right) | differ(self.after_wrong)))


def estimate(counts: Counts, scale: str = "group") -> dict[str, Estimate]:
    """Returns the figures of `counts` by name.

    p, best (of N), spread (the mean of p (1 - p)), kept (a), r, w, alone_right and alone_wrong (plain success on the
    problems whose kept draft is right or wrong), trust (r - alone_right), repair (as 4 above), times
    (w / alone_wrong), refined (success of a refinement), fixed, broken, drawn (drafts of algorithm.draft_early_stop),
    plain_active and refined_active (fractions of groups with a gradient), plain_snr and refined_snr, ratio (of the
    latter two), and the ratios per sample with early stopping and with algorithm.train_drafts: ratio_early,
    ratio_trained.

    Args:
        scale: as `algorithm.scale_rewards`.
    """
    means = _means(counts)
    weights = resamples(counts.problems)
    observed = _figures({name: x.mean(axis=0) for name, x in means.items()}, counts, scale)
    drawn = {name: weights @ x for name, x in means.items()}
    resampled = _figures(drawn, counts, scale)
    figures = {
        name: _interval(float(observed[name]), resampled[name], *BOUNDS.get(name, (0, 1)), _sources(name, counts))
        for name in observed
    }
    return figures | {"repair": repair(counts).without_noise()} | _ratios(counts, figures)


def resamples(problems: int) -> np.ndarray:
    """Returns the weights of P problems in each resample of them with replacement, [B, P] float64; rows sum to 1."""
    drawn = np.random.default_rng(0).integers(problems, size=(RESAMPLES, problems))
    counted = np.bincount((drawn + problems * np.arange(RESAMPLES)[:, None]).ravel(), minlength=RESAMPLES * problems)
    return counted.reshape(RESAMPLES, problems) / problems


# The smallest and the largest value that a figure can have, where these are not 0 and 1.
BOUNDS = {
    "spread": (0, 0.25),
    "trust": (-1, 1),
    **dict.fromkeys(
        ("times", "drawn", "plain_snr", "refined_snr", "ratio", "ratio_early", "ratio_trained"), (0, math.inf)
    ),
}


def _means(counts: Counts) -> dict[str, np.ndarray]:
    """Returns what is averaged over problems, each [P] or [P, number]."""
    plain, weight, drafts, size = counts.plain.astype(float), counts.weight, counts.drafts, counts.refinements
    samples, right = plain.shape[1], counts.plain.sum(axis=1)
    others = (np.arange(samples)[:, None] + np.arange(drafts, samples)) % samples  # the answers outside each set
    alone = plain[:, others].mean(axis=2)
    groups = np.zeros((counts.problems, size + 1))
    for part, after in ((weight, counts.after_right), (1 - weight, counts.after_wrong)):
        groups += part[:, None] * np.where(after[:, None] == NONE, 0.0, np.eye(size + 1)[np.maximum(after, 0)])
    pass_at = lambda k: measures.pass_at(counts.plain, k)
    return {
        "p": plain.mean(axis=1),
        "best": pass_at(drafts),
        "spread": right * (samples - right) / (samples * (samples - 1)),
        "kept": weight,
        "right": weight * np.maximum(counts.after_right, 0) / size,
        "fixed": (1 - weight) * np.maximum(counts.after_wrong, 0) / size,
        "alone_right": (counts.kept * alone).mean(axis=1),
        "alone_wrong": (~counts.kept * alone).mean(axis=1),
        "drawn": sum((1 - pass_at(k) for k in range(1, drafts)), np.ones(counts.problems)),
        "groups": groups,
        "of_all": draft_signal.drawn_counts(right, samples, drafts + size),
        "of_drafts": draft_signal.drawn_counts(right, samples, drafts),
    }


def _figures(mean: dict[str, np.ndarray], counts: Counts, scale: str) -> dict[str, np.ndarray]:
    """Returns the figures of means over problems; those of no problem are NaN. `mean` has [...] or [..., number]."""
    a, drafts, size = mean["kept"], counts.drafts, counts.refinements
    r, alone_right = _over(mean["right"], a), _over(mean["alone_right"], a)
    w, alone_wrong = _over(mean["fixed"], 1 - a), _over(mean["alone_wrong"], 1 - a)
    plain, refined = (draft_signal.signal(mean[name], scale) for name in ("of_all", "groups"))
    both = draft_signal.trained_together(draft_signal.signal(mean["of_drafts"], scale), refined)
    ratio = _over(refined.snr_squared, plain.snr_squared)
    return {
        **{name: mean[name] for name in ("p", "best", "spread", "kept", "fixed", "drawn")},
        **{"r": r, "w": w, "alone_right": alone_right, "alone_wrong": alone_wrong},
        **{"trust": r - alone_right, "times": _over(w, alone_wrong)},
        "refined": mean["right"] + mean["fixed"],
        "broken": a - mean["right"],
        **{"plain_active": plain.active, "refined_active": refined.active},
        **{"plain_snr": plain.snr_squared, "refined_snr": refined.snr_squared, "ratio": ratio},
        "ratio_early": ratio * (drafts + size) / (mean["drawn"] + size),
        "ratio_trained": _over(both.snr_squared, plain.snr_squared),
    }


def _over(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Returns part / total; where the total is 0, infinity, and NaN if the part is 0 too."""
    part, total = np.asarray(part, float), np.asarray(total, float)
    without = np.where(part > ROUNDED, np.inf, np.nan)
    return np.divide(part, total, out=np.broadcast_to(without, total.shape).copy(), where=total > ROUNDED)


def _sources(name: str, counts: Counts) -> int:
    """Returns on how many problems a figure rests."""
    if name in ("r", "alone_right", "trust"):
        return int(np.sum(counts.weight > 0))
    if name in ("w", "alone_wrong", "times"):
        return int(np.sum(counts.weight < 1))
    return counts.problems


def _interval(value: float, resampled: np.ndarray, least: float, most: float, problems: int) -> Estimate:
    """Returns a figure with the percentiles of its resamples; exact where all are equal, as in `measures.interval`.

    Resamples in which a ratio is infinite count, so that its upper end is a bound.
    """
    known = resampled[~np.isnan(resampled)]
    if not math.isfinite(value) or not len(known):
        return UNKNOWN
    if known.max() < known.min() + 1e-9:
        other = 1 - 0.025 ** (1 / max(problems, 1))
        high = math.inf if math.isinf(most) else value + other * (most - value)
        return Estimate(value, value - other * (value - least), high).without_noise()
    low, high = np.quantile(known, (0.025, 0.975), method="inverted_cdf")
    return Estimate(value, float(low), float(high)).without_noise()


def repair(counts: Counts) -> Estimate:
    """Returns the mean gain of refinements over plain answers where the draft kept of the first N answers is wrong.

    Its interval is that of Student (1908, Biometrika 6); with fewer than FEW such problems it is all that is possible.
    """
    wrong = ~counts.kept[:, 0]
    gains = counts.after_wrong[wrong] / counts.refinements - counts.plain[wrong, counts.drafts :].mean(axis=1)
    value = float(gains.mean()) if len(gains) else math.nan
    if len(gains) < FEW:
        return Estimate(value, -1.0, 1.0)
    if np.ptp(gains) < 1e-9:
        return Estimate(value, *measures.interval(gains, (-1.0, 1.0)))
    half = float(stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains))
    return Estimate(value, max(value - half, -1.0), min(value + half, 1.0))


def _ratios(counts: Counts, figures: dict[str, Estimate]) -> dict[str, Estimate]:
    """Returns figures of SNR^2 from bounds where too few problems are active for a bootstrap, else nothing.

    A group of n with the probability M of a gradient has at most SNR^2 = M n / 4, whatever the scale, because k right
    ones of n have the variance k (n - k) / (n (n - 1)) <= n / (4 (n - 1)). M is bounded by the exact interval of the
    fraction of problems that are active.
    """
    of_plain, of_refined, total = counts.active_plain, counts.active_refined, counts.drafts + counts.refinements
    if min(of_plain, of_refined) >= FEW:
        return {}
    most = lambda active, size: proportion_at_most(active, counts.problems) * size / 4
    plain_low, plain_high = figures["plain_snr"].low, figures["plain_snr"].high
    refined_low, refined_high = figures["refined_snr"].low, figures["refined_snr"].high
    if of_plain < FEW:
        plain_low, plain_high = 0.0, most(of_plain, total)
    if of_refined < FEW:
        refined_low, refined_high = 0.0, most(of_refined, counts.refinements)
    high = refined_high / plain_low if plain_low > 0 else math.inf
    unbounded = {name: Estimate(figures[name].value, 0.0, math.inf) for name in ("ratio_early", "ratio_trained")}
    return unbounded | {
        "ratio": Estimate(figures["ratio"].value, refined_low / plain_high, high),
        "plain_snr": Estimate(figures["plain_snr"].value, plain_low, plain_high),
        "refined_snr": Estimate(figures["refined_snr"].value, refined_low, refined_high),
    }


def proportion_at_most(successes: int, trials: int) -> float:
    """Returns the upper end of the exact 95 % interval of a proportion (Clopper & Pearson 1934, Biometrika 26)."""
    return float(stats.binomtest(successes, trials).proportion_ci(0.95, "exact").high)


def problems_needed(plain: float, refined: float, ratio: float) -> float:
    """Returns how many problems a probe needs to tell a ratio of SNR^2 from 1 where few of them are active.

    FEW problems of each method must be active for a bootstrap; so that they surely are, SEEN must be expected. The log
    of the ratio of two rare proportions has the variance 1 / a + 1 / b, where a and b are the counts (Katz, Baptista,
    Azen & Pike 1978, Biometrics 34). A ratio of SNR^2 is as uncertain as that of the active groups, because the SNR^2
    of rare groups is proportional to how many are active. The log must lie SHOWN standard deviations from 0. With so
    few counts this is rough: of 30 simulated probes of so many problems, 22 to 30 tell.

    Args:
        plain, refined: fraction of the problems that are active with GRPO and with iGRPO.
        ratio: what is to be told from 1; NaN asks only for FEW active problems.
    """
    least = SEEN / min(plain, refined)
    if math.isnan(ratio):
        return least
    distance = abs(math.log(ratio)) if ratio > 0 else math.inf
    return max(least, (SHOWN / distance) ** 2 * (1 / plain + 1 / refined)) if distance else math.inf
