"""What the figures of a probe say, in words: do drafts give more signal? A pure function of the figures.

The rules are those of docs/when_drafts_pay.md, whose table is made of ANSWERS, in this order:

1. GRPO's SNR^2 surely exceeds the largest that a group of G can have: no drafts can give more signal.
2. The ratio of SNR^2 is surely below 1: drafts give less signal.
3. Only the signal that points along the gradient on plain prompts counts: the ratio times the squared cosine. If it is
   surely above 1, drafts give more signal at the first step; if surely below 1, they do not. More signal at the first
   step is no promise: iGRPO lost in spite of it wherever GRPO took off by itself (OBSERVED).
4. Else these problems are too few to tell, or the cosine could not be measured.

"Surely" means that it holds for the whole 95 % interval.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from igrpo_jax.probe import draft_signal
from igrpo_jax.probe.estimates import HALF_WIDTH, SHOWN, UNKNOWN, Estimate, problems_needed

CLEAR = 0.3  # width of an interval below which an effect of drafts that is not seen is taken for none
MORE_CUT = 0.1  # fraction by which more refinements than plain answers are cut, from which a draft counts as disturbing
LEAST_BOUND = 1e-3  # fraction of the success with drafts; a smaller bound on plain success is not reported
CUT = 0.5  # fraction of plain answers; where surely more are cut, a reason names the length limit
MOST = 100  # times the problems of a probe; where more are needed, it says no number
COPIES = 0.5  # fraction of refinements of wrong drafts; where surely more repeat the answer, it "copies"
# Starts of a model that repaired (docs/study.md, part two): x, and the points of pass@1 by which iGRPO and
# algorithm.draft_when = unsolved ended ahead of GRPO.
OBSERVED = {
    "rare": (0.4, "+3.5 ± 2.5", "+12.7 ± 7.3"),
    "sparse": (2.3, "+8.0 ± 26.4", "+44.7 ± 24.1"),
    "critiqued": (2.5, "-52.1 ± 27.8", "+20.9 ± 29.1"),
    "x8": (6.4, "-20.3 ± 15.9", "+12.2 ± 15.8"),
    "x23": (19.5, "-44.9 ± 2.6", "+1.5 ± 0.9"),
    "x60": (52.3, "-50.7 ± 1.6", "-0.3 ± 1.1"),
    "dense": (168, "-52.7 ± 1.5", "-0.8 ± 0.3"),
}
# x from which GRPO takes off by itself. Of ten runs with 8 completions for each prompt all did at 19.5, nine at 6.4,
# and from two starts eight at 2.5 and four at 2.3. If each right completion sets a run off with the same probability,
# the lowest count gives 1 - exp(-0.22 x) of runs: 95 % at 14. With 4 completions one of ten did not, at 26.
TAKES_OFF = 14
LATER = (
    "what is learnt after drafts need not reach the plain prompt, so keep plain answers in training "
    "(algorithm.train_drafts), and watch whether draft/accuracy rises as GRPO's accuracy does"
)
# The answers, and where each is given.
ANSWERS = {
    "drafts cannot pay by signal": (
        "GRPO's SNR^2 is surely above the largest that a group of G can have: the grey band, for unequal problems"
    ),
    "drafts do not pay by signal": "the ratio of SNR^2 is surely below 1",
    "more signal at the first step": "the ratio times k^2 is surely above 1",
    "more signal at the first step, but GRPO takes off by itself": (
        f"so it is, and GRPO would surely see at least {TAKES_OFF} right completions in the run (x)"
    ),
    "drafts do not pay: their signal points elsewhere": ("the ratio may be above 1, but times k^2 it is surely below"),
    "cannot tell: more signal, unknown transfer": "the ratio is surely above 1, and k could not be measured",
    "cannot tell": "the interval holds 1; it says how many problems might do",
}
HOPELESS, LESS, MORE, MORE_AND_GRPO, ELSEWHERE, UNKNOWN_TRANSFER, CANNOT_TELL = ANSWERS


@dataclass(frozen=True)
class Setting:
    """What the figures were measured for."""

    problems: int
    samples: int  # K, plain answers to each
    drafts: int  # N
    refinements: int  # G
    scale: str  # as algorithm.scale_rewards
    selection: str = "best"  # as algorithm.draft_selection


@dataclass(frozen=True)
class Conclusion:
    """The answer with its reasons, as sentences without their full stop."""

    answer: str
    more_signal: bool | None  # at the first step, along the gradient on plain prompts; None = cannot tell
    behaviour: str  # "repairs", "copies", "ignores", "is misled" or "unclear"
    unsolved: bool  # whether a reason recommends algorithm.draft_when = unsolved
    reasons: list[str]

    @property
    def tone(self) -> str:
        """The class of the answer on a page: "bad", or "" if it cannot tell or is no promise."""
        return "bad" if self.more_signal is False else ""


def conclude(figures: Mapping[str, Estimate], setting: Setting) -> Conclusion:
    """Returns the conclusion.

    Args:
        figures: those of `estimates.estimate`; and, where they were measured, `cosine` (between the gradient on plain
            prompts and that of the refinements), `reliance` (rho), `same_wrong` (fraction of the refinements of wrong
            drafts that state the draft's answer), `successes` (x, what GRPO would see in the run), and `cut_plain`
            and `cut_refined` (fractions of plain answers and of refinements that were cut).
    """
    behaviour = behaves(figures)
    answer, reasons = _signal(figures, setting)
    more = {MORE: True, MORE_AND_GRPO: True, HOPELESS: False, LESS: False, ELSEWHERE: False}.get(answer)
    x = figures.get("successes", UNKNOWN)
    unsolved = behaviour == "repairs" and x.low < TAKES_OFF  # as docs/study.md has it
    reasons += [
        *([LATER] if more else []),
        *_expected(figures, more),
        *([_unsolved(x)] if unsolved else []),
        *_rare(figures, setting),
        *_model(figures, behaviour),
        *_more_cut(figures),
        *_needed(figures, setting),
        *_transfer(figures),
    ]
    return Conclusion(answer, more, behaviour, unsolved, reasons)


def behaves(figures: Mapping[str, Estimate]) -> str:
    """Returns how the model uses drafts, compared with plain answers to the same problems (`trust` and `repair`)."""
    repair, trust, same = figures["repair"], figures["trust"], figures.get("same_wrong")
    if repair.is_known and repair.low > 0:
        return "repairs"
    if (trust.is_known and trust.low > 0) or (same is not None and same.is_known and same.low > COPIES):
        return "copies"
    if repair.is_known and repair.high < 0:
        return "is misled"
    if figures["refined"].value > 0 and not _too_few(figures) and not _more_cut(figures):
        return "ignores"
    return "unclear"


def _too_few(figures: Mapping[str, Estimate]) -> list[str]:
    """Returns which drafts, "right" or "wrong", are too few to say that they have no effect."""
    effects = {"right": ("r", "trust"), "wrong": ("w", "repair")}
    # Where no refinement is right, the bootstrap of the effect sees only the noise of plain answers.
    is_clear = lambda figure: figure.high - figure.low < CLEAR  # False for NaN
    return [draft for draft, names in effects.items() if not all(is_clear(figures[name]) for name in names)]


def _more_cut(figures: Mapping[str, Estimate]) -> list[str]:
    """Returns the reason where surely, and far, more refinements than plain answers are cut."""
    plain, refined = figures.get("cut_plain", UNKNOWN), figures.get("cut_refined", UNKNOWN)
    if not (refined.low > plain.high and refined.value - plain.value > MORE_CUT):  # True for NaN
        return []
    return [
        f"{shown(refined)} of the refinements are cut at the limit and {shown(plain)} of the plain answers, so a draft "
        "disturbs the model or makes its answers longer; a higher rollout.max_completion_length may change this"
    ]


def _signal(figures: Mapping[str, Estimate], setting: Setting) -> tuple[str, list[str]]:
    """Returns the answer, and the reasons that decide it."""
    ratio, cosine, plain = figures["ratio"], figures.get("cosine"), figures["plain_snr"]
    total, most = setting.drafts + setting.refinements, draft_signal.largest_signal(setting.refinements, setting.scale)
    names = f"iGRPO ({setting.drafts} + {setting.refinements})", f"GRPO ({total})"
    compared = f"the SNR^2 of {names[0]} over that of {names[1]} is {shown(ratio)}"
    if plain.low > most:
        low = draft_signal.hopeless_from(setting.drafts, setting.refinements, setting.scale)
        limit = (
            f"plain answers differ so often that a group of {names[1]} has an SNR^2 of {shown(plain)}, and a group of "
            f"{setting.refinements} has at most {_number(most)}, whatever it is shown (if all problems were alike, for "
            f"p from {low:.3g} to {1 - low:.3g})"
        )
        return HOPELESS, [limit, compared]
    if ratio.high < 1:
        return LESS, [compared]
    if cosine is not None and cosine.is_known:
        along = along_plain(ratio, cosine)
        moved = (
            f"{compared}, and {shown(along)} of it points along the gradient on plain prompts (cosine {shown(cosine)})"
        )
        if along.low > 1:
            x = figures.get("successes", UNKNOWN)
            return (MORE_AND_GRPO if x.low >= TAKES_OFF else MORE), [moved]
        if along.high < 1:
            return ELSEWHERE, [moved]
        return CANNOT_TELL, [moved, _more(figures, along, setting)]
    if ratio.low > 1:
        unknown = (
            "whether it moves the plain prompt is not known, because the two gradients could not be compared; "
            f"{_wanting(figures, math.nan, setting)}, with as many --gradients"
        )
        return UNKNOWN_TRANSFER, [compared, unknown]
    return CANNOT_TELL, [compared, _more(figures, ratio, setting)]


def along_plain(ratio: Estimate, cosine: Estimate) -> Estimate:
    """Returns the ratio times the squared cosine, 0 for a negative one; with the ends of both intervals."""
    squares = [max(x, 0.0) ** 2 for x in cosine]
    product = lambda x, square: 0.0 if square == 0 else x * square
    return Estimate(*(product(x, square) for x, square in zip(ratio, squares, strict=True)))


def _more(figures: Mapping[str, Estimate], ratio: Estimate, setting: Setting) -> str:
    """Returns the sentence about the number of problems that could tell, as surely as `problems_needed` asks for.

    Args:
        ratio: that of SNR^2, or that along the plain gradient, whose interval has the width of the cosine's in it.
    """
    few = "1 problem is" if setting.problems == 1 else f"{setting.problems:,} problems are"
    text = f"the interval holds 1, so {few} too few to tell"
    cosine = figures.get("cosine")
    if ratio.low == 0 and figures["ratio"].low > 0 and cosine is not None:
        return f"{text}; the cosine is lost in noise, so compare the gradients of more problems (--gradients)"
    if not 0 < ratio.low <= ratio.value <= ratio.high < math.inf or ratio.value == 1:
        return f"{text}; {_wanting(figures, ratio.value, setting)}"
    width = max(math.log(ratio.high / ratio.value), math.log(ratio.value / ratio.low)) * SHOWN / HALF_WIDTH
    needed = setting.problems * (width / math.log(ratio.value)) ** 2
    if needed > MOST * setting.problems:
        return f"{text}; the ratio is so near 1 that it matters little"
    enough = f"{text}; if the ratio is what it seems, about {math.ceil(needed / 10) * 10:,} would do"
    return f"{enough}, with as many --gradients" if cosine is not None and cosine.is_known else enough


def _wanting(figures: Mapping[str, Estimate], ratio: float, setting: Setting) -> str:
    """Returns a text on how many problems would do where few have right and wrong answers, by `problems_needed`.

    Where few problems are active, K answers make K / (N + G) times as many active as N + G answers do. A fraction that
    was 0 is replaced by the upper end of its interval, so more problems may be needed.
    """
    plain, refined = figures["plain_active"], figures["refined_active"]
    of_answers = setting.samples / (setting.drafts + setting.refinements)
    shares = min(1.0, (plain.value or plain.high) * of_answers), refined.value or refined.high
    needed = problems_needed(*shares, ratio)
    if not math.isfinite(needed):
        return "the ratio is so near 1 that it matters little"
    few = "problems with right and wrong answers are too few"
    if needed > MOST * setting.problems:
        return f"{few}, and it would take more than {MOST * setting.problems:,} problems to tell"
    problems = math.ceil(needed / 10) * 10
    answers = f"{setting.samples} answers to each, {problems * setting.samples:,} in all"
    least = "about" if plain.value and refined.value else "at least"
    return f"{few}, and {least} {problems:,} problems would do ({answers})"


def _expected(figures: Mapping[str, Estimate], more: bool | None) -> list[str]:
    """Returns the reason about x, the right completions that GRPO would see: whether it takes off by itself."""
    x = figures.get("successes", UNKNOWN)
    if not x.is_known:
        return []
    text = f"GRPO would see {shown(x)} right completions in the run that the settings describe (x)"
    if more is False:
        return [text]
    many = {seen: points for seen, points, _ in OBSERVED.values() if seen >= TAKES_OFF}
    few = {seen: points for seen, points, _ in OBSERVED.values() if seen < TAKES_OFF}
    ended = lambda starts: _listed(f"{points} at {seen}" for seen, points in starts.items())
    if x.low >= TAKES_OFF:
        lost = f"in the study iGRPO ended at {ended(many)} points against GRPO"
        return [f"{text}, enough to take off by itself: {lost}, in spite of more signal at the first step"]
    if x.high < TAKES_OFF:
        hardly = f"in the study iGRPO ended at {ended(few)} points against GRPO"
        return [f"{text}, which is hardly any to learn from: {hardly}"]
    maybe = f"in the study all runs of GRPO (8) did from {min(many)} on, and not all at {max(few)}"
    return [f"{text}, which may be enough to take off by itself: {maybe}"]


def _unsolved(x: Estimate) -> str:
    """Returns what the study recommends where drafts are repaired and GRPO has hardly a right answer."""
    ended = _listed(f"{points} at {seen}" for seen, _, points in OBSERVED.values())
    return (
        f"the model repairs, and GRPO may see only {_number(x.low)} right completions, so try algorithm.draft_when = "
        "unsolved with algorithm.train_drafts (configs/unsolved.py), which no ratio here describes: in the study it "
        f"ended at {ended} points against GRPO"
    )


def _listed(items: Iterable[str]) -> str:
    *others, last = items
    return f"{', '.join(others)} and {last}"


def _rare(figures: Mapping[str, Estimate], setting: Setting) -> list[str]:
    """Returns the reasons where p is small."""
    p, times = figures["p"], figures["times"]
    cut = figures.get("cut_plain")
    sentences = []
    if cut is not None and cut.is_known and cut.low > CUT:
        sentences.append(
            f"{shown(cut)} of the plain answers are cut at the limit, so a higher rollout.max_completion_length may "
            "change all of this"
        )
    if p.value == 0:
        sentences.append(f"no plain answer is right, so p is at most {_number(p.high)}")
    if p.high < draft_signal.hopeless_from(setting.drafts, setting.refinements, setting.scale) / 2 and times.is_known:
        bound = draft_signal.rare_bound(times.high, setting.drafts, setting.refinements, setting.scale)
        if math.isfinite(float(bound)):
            sentences.append(
                f"p is small, so the ratio is bounded by how much likelier a wrong draft makes a right answer: "
                f"w is {shown(times)} times p on the same problems, and the ratio at most {_number(float(bound))}"
            )
    return sentences


def _model(figures: Mapping[str, Estimate], behaviour: str) -> list[str]:
    """Returns the reason about how the model uses drafts."""
    few = " and ".join(_too_few(figures))
    meaning = {
        "repairs": "the model repairs",
        "copies": "the model trusts drafts, and no repair is seen",
        "is misled": "wrong drafts mislead the model",
        "ignores": "the model ignores drafts",
        "unclear": (
            f"too few {few} drafts to say what the model makes of them"
            if few
            else "what the model makes of drafts is not clear"
        ),
    }[behaviour]
    parts = []
    for draft, success, alone in (("wrong", "w", "alone_wrong"), ("right", "r", "alone_right")):
        if figures[success].is_known:
            against = f"{shown(figures[success])} of its answers are right, {shown(figures[alone])} without it"
            parts.append(f"after a {draft} draft {against}")
    return [f"{meaning}: {'; '.join(parts)}"] if parts else [meaning]


def _needed(figures: Mapping[str, Estimate], setting: Setting) -> list[str]:
    """Returns how large w would have to be, if all problems were like those that have wrong drafts."""
    p, r, cosine = figures["alone_wrong"], figures["r"], figures.get("cosine")
    if not (p.is_known and r.is_known and 0 < p.value < 1):
        return []
    known = cosine is not None and cosine.is_known and cosine.value > 0
    transfer = cosine.value if cosine is not None and known else 1.0
    sizes = (setting.drafts, setting.refinements, setting.scale, transfer, setting.selection)
    least, _ = draft_signal.repair_range(p.value, r.value, *sizes)
    where = f"at p = {_number(p.value)}, r = {_number(r.value)}"
    where += f" and the cosine {_number(transfer)}" if known else ""
    if math.isnan(float(least)):
        return [f"were all problems alike, {where}, no w would be enough for more signal than GRPO has"]
    enough = f"w would have to be at least {_number(float(least))}; it is {shown(figures['w'])}"
    return [f"were all problems alike, {where}, {enough}"]


def _transfer(figures: Mapping[str, Estimate]) -> list[str]:
    """Returns the reason about the least success on the plain prompt, given the reliance on drafts."""
    rho = figures.get("reliance")
    if rho is None or not rho.is_known:
        return []
    refined = figures["refined"].value
    bound = float(draft_signal.plain_success_bound(refined, max(rho.value, 0.0)))
    left = f"of a success of {_number(refined)} with drafts this leaves at least {_number(bound)} on the plain prompt"
    if bound < LEAST_BOUND * refined:
        left = "so the success with drafts says nothing about that on the plain prompt"
    return [
        f"right refinements are exp(rho) times likelier with the draft than without it, rho = {shown(rho)} nats; {left}"
    ]


def shown(figure: Estimate) -> str:
    """Returns a figure with its interval."""
    if not figure.is_known:
        return "not known"
    if math.isnan(figure.value):
        return f"not known ({_number(figure.low)} to {_number(figure.high)})"
    return f"{_number(figure.value)} ({_number(figure.low)} to {_number(figure.high)})"


def _number(value: float) -> str:
    if math.isinf(value):
        return "any"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
