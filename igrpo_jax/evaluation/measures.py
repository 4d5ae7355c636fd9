"""The measures of an evaluation, as pure functions of its graded answers. Numpy only.

    pass@k   1 - C(n-c, k) / C(n, k) of a problem with c of n samples right (Chen et al. 2021, arXiv 2107.03374): the
             chance that at least one of k of them, drawn without replacement, is right. pass@1 is the mean accuracy.
    maj@k    whether the largest class of equal answers is right (the first one in a tie); the mean over the n // k
             disjoint runs of k consecutive samples. A sample without an answer has no vote.
    interval the 2.5 and 97.5 percent points of the mean when the problems are drawn again with replacement: it shows
             how much other problems of the same kind would change it, not how much other samples of these would. Where
             all problems have the same value the bootstrap is one point, and the interval is exact instead: 0 of n
             right gives 0 to 1 - 0.025^(1/n) (Clopper & Pearson 1934, Biometrika 26).
    sign     the chance that the problems that changed would split between better and worse at least as unequally if
    test     both ways were equally likely (two-sided binomial). With one answer to each problem it is McNemar's exact
             test (McNemar 1947, Psychometrika 12). It is exact at the edge, where a bootstrap is too narrow.

Legend: P problems, K samples of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REDRAWN = 10_000  # times the problems are drawn again for an interval


@dataclass(frozen=True)
class Answers:
    """The graded samples of one benchmark; every problem has the same number of them."""

    correct: np.ndarray  # [P, K] bool
    lengths: np.ndarray  # [P, K] int, tokens
    finished: np.ndarray  # [P, K] bool, ended by an EOS and not by the limit
    parsed: np.ndarray  # [P, K] bool, an answer was found
    failed: np.ndarray  # [P, K] bool, the grading timed out or raised
    classes: np.ndarray  # [P, K] int, equal numbers where a problem's answers are equivalent; -1 without an answer


def summary(answers: Answers, ks: Sequence[int] = ()) -> dict[str, float]:
    """Returns all measures by name; one that has no samples (such as solved_length where none is solved) is absent.

    Args:
        ks: the k of pass@k and maj@k, each at most K.
    """
    correct, lengths = answers.correct, answers.lengths
    low, high = interval(correct.mean(axis=1))
    result = {"pass@1": float(correct.mean()), "pass@1_low": low, "pass@1_high": high}
    for k in ks:
        if k > 1:
            result[f"pass@{k}"] = float(pass_at(correct, k).mean())
            result[f"maj@{k}"] = float(majority_at(answers.classes, correct, k).mean())
    result["mean_length"] = float(lengths.mean())
    for name, mask in (("solved_length", correct), ("unsolved_length", ~correct)):
        if mask.any():
            result[name] = float(lengths[mask].mean())
    result["clipped_ratio"] = float(1 - answers.finished.mean())
    result["unparseable_frac"] = float(1 - answers.parsed.mean())
    result["error_frac"] = float(answers.failed.mean())
    return result


def summary_names(ks: Sequence[int]) -> list[str]:
    """Returns the names of all measures that `summary` can give for these `ks`."""
    at = [f"{measure}@{k}" for k in ks if k > 1 for measure in ("pass", "maj")]
    lengths = ("mean_length", "solved_length", "unsolved_length")
    return ["pass@1", "pass@1_low", "pass@1_high", *at, *lengths, "clipped_ratio", "unparseable_frac", "error_frac"]


def pass_at(correct: np.ndarray, k: int) -> np.ndarray:
    """Returns the unbiased estimate of pass@k of each problem, [P] float64, from correct [P, K] bool; k is at most K.

    Raises:
        ValueError: k is not within 1 and K.
    """
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k}: must be within 1 and the {samples} samples")
    all_sets = math.comb(samples, k)
    return np.array([1 - math.comb(samples - int(right), k) / all_sets for right in correct.sum(axis=1)])


def vote(classes: Sequence[int]) -> int | None:
    """Returns the index of the first answer of the largest class; among equally large ones, the class that came first.

    Returns None without answers.
    """
    counts: dict[int, int] = {}
    for number in classes:
        if number >= 0:
            counts[number] = counts.get(number, 0) + 1
    return list(classes).index(max(counts, key=counts.__getitem__)) if counts else None


def majority_at(classes: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """Returns the fraction of each problem's K // k disjoint runs of k samples whose vote is right, [P] float64.

    Raises:
        ValueError: k is not within 1 and K.
    """
    samples = classes.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k}: must be within 1 and the {samples} samples")
    fractions = []
    for problem, right in zip(classes, correct, strict=True):
        chosen = [(start, vote(problem[start : start + k].tolist())) for start in range(0, samples - k + 1, k)]
        fractions.append(np.mean([index is not None and right[start + index] for start, index in chosen]))
    return np.array(fractions)


def interval(values: np.ndarray, bounds: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of `values` [P] over the problems, by percentiles of the bootstrap.

    Where all values are equal the interval is exact: P equal values have a chance of at least 0.025 as long as up to
    u = 1 - 0.025^(1/P) of all problems have another value, which may lie anywhere within `bounds`.

    Args:
        bounds: the smallest and the largest value that a problem can have.
    """
    values = np.asarray(values, np.float64)
    if np.ptp(values) < 1e-9:  # sums of fractions differ in their last digits
        value, other = float(values[0]), 1 - 0.025 ** (1 / len(values))
        return value - other * (value - bounds[0]), value + other * (bounds[1] - value)
    draw = np.random.Generator(np.random.PCG64(0))
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(REDRAWN)]
    low, high = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Returns the mean of `second` - `first` ([P] each, of the same problems) and its 95 % interval.

    Both values of a problem are drawn again together.
    """
    change = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    return float(change.mean()), *interval(change, (-1.0, 1.0))


def sign_test(better: int, worse: int) -> float:
    """Returns the two-sided p-value of `better` against `worse` problems; 1 where no problem changed."""
    changed = better + worse
    tail = sum(math.comb(changed, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**changed)


REFINED = ("fixed", "broken", "kept_right", "kept_wrong")  # names of what `refined` returns


def refined(drafts: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Returns fractions of all refinements by whether the draft and the refinement are right, under the names REFINED.

    Args:
        drafts: [P] bool, whether the draft in the prompt is right; correct: [P, K] bool of its refinements.
    """
    before = np.broadcast_to(drafts[:, None], correct.shape)
    parts = (~before & correct, before & ~correct, before & correct, ~before & ~correct)
    return {name: float(part.mean()) for name, part in zip(REFINED, parts, strict=True)}
