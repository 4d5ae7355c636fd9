"""What the figures of a probe say, in words: will drafts pay for this model and data? A pure function of the figures.

The rules are those of docs/when_drafts_pay.md, in this order:

1. GRPO's SNR^2 surely exceeds the largest that a group of G can have: no drafts can give more signal.
2. The ratio of SNR^2 is surely below 1: drafts give less signal.
3. Only the part of the signal counts that points along the gradient on plain prompts, the ratio times the squared
   cosine. It is surely above 1: drafts pay in the first steps; surely below 1: they do not, although they give more
   signal.
4. Else these problems are too few to tell, or the cosine could not be measured.

"Surely" is: with the whole 95 % interval.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from igrpo_jax.learning import draft_signal
from igrpo_jax.probe.estimates import Estimate

CLEAR = 0.3  # width of an interval of a success, below which no difference is taken for none
CUT = 0.5  # of the plain answers; where more are cut, the length is named first
COPIES = 0.5  # of the refinements of wrong drafts; where more state the draft's answer, the model is said to copy
# What a study observed of a model that repaired (docs/study.md, part two): it lost where GRPO had signal too.
LATER = (
    "later, when drafts are right more often, copying them may be all that is learnt, so keep plain answers in "
    "training (algorithm.train_drafts, or algorithm.draft_when = unsolved), and watch refine/copy_ratio"
)


@dataclass(frozen=True)
class Setting:
    """What the figures were measured for."""

    problems: int
    drafts: int  # N
    refinements: int  # G
    scale: str  # as algorithm.scale_rewards


@dataclass(frozen=True)
class Conclusion:
    """The answer with its reasons, as sentences without their full stop."""

    answer: str
    pays: bool | None  # None = cannot tell
    behaviour: str  # "repairs", "copies", "ignores", "is misled" or "unclear"
    reasons: list[str]

    @property
    def tone(self) -> str:
        """The class of the answer on a page: "good", "bad" or "" where it cannot tell."""
        return {True: "good", False: "bad", None: ""}[self.pays]


def conclude(figures: Mapping[str, Estimate], setting: Setting) -> Conclusion:
    """Returns the conclusion.

    Args:
        figures: those of `estimates.estimate`; and, where they were measured, `cosine` (between the gradient on plain
            prompts and that of the refinements), `reliance` (rho), `same_wrong` (fraction of the refinements of wrong
            drafts that state the draft's answer), `successes` (x, what GRPO would see in the run), and `cut_plain`
            (fraction of plain answers that were cut).
    """
    behaviour = behaves(figures)
    answer, pays, reasons = _signal(figures, setting)
    reasons += [
        *_rare(figures, setting),
        *_model(figures, behaviour),
        *_needed(figures, setting),
        *_transfer(figures),
    ]
    return Conclusion(answer, pays, behaviour, reasons)


def behaves(figures: Mapping[str, Estimate]) -> str:
    """Returns what the model makes of drafts, by plain answers to the same problems (`trust` and `repair`)."""
    repair, trust, same = figures["repair"], figures["trust"], figures.get("same_wrong")
    if repair.is_known and repair.low > 0:
        return "repairs"
    if (trust.is_known and trust.low > 0) or (same is not None and same.is_known and same.low > COPIES):
        return "copies"
    if repair.is_known and repair.high < 0:
        return "is misled"
    share = figures["kept"].value
    parts = [(share, trust), (1 - share, repair)]
    if (
        figures["refined"].value > 0
        and sum(weight * (part.high - part.low) for weight, part in parts if weight) < CLEAR
    ):  # NaN is not
        return "ignores"
    return "unclear"


def _signal(figures: Mapping[str, Estimate], setting: Setting) -> tuple[str, bool | None, list[str]]:
    """Returns the answer, whether drafts pay, and the reasons that decide it."""
    ratio, cosine, plain = figures["ratio"], figures.get("cosine"), figures["plain_snr"]
    total, most = setting.drafts + setting.refinements, draft_signal.largest_signal(setting.refinements, setting.scale)
    names = f"iGRPO ({setting.drafts} + {setting.refinements})", f"GRPO ({total})"
    compared = f"the SNR^2 of {names[0]} over that of {names[1]} is {shown(ratio)}"
    if plain.low > most:
        low = draft_signal.hopeless_from(setting.drafts, setting.refinements, setting.scale)
        return (
            "drafts cannot pay by signal",
            False,
            [
                f"plain answers differ so often that a group of {names[1]} has an SNR^2 of {shown(plain)}, and a group "
                f"of {setting.refinements} has at most {most:.2f}, whatever it is shown (if all problems were alike, "
                f"for p from {low:.3f} to {1 - low:.3f})",
                compared,
            ],
        )
    if ratio.high < 1:
        return "drafts do not pay by signal", False, [compared]
    if cosine is not None and cosine.is_known:
        along = along_plain(ratio, cosine)
        moved = (
            f"{compared}, and {shown(along)} of it points along the gradient on plain prompts (cosine {shown(cosine)})"
        )
        if along.low > 1:
            return "drafts pay in the first steps", True, [moved, LATER]
        if along.high < 1:
            return "drafts do not pay: their signal points elsewhere", False, [moved]
        return "cannot tell", None, [moved, _more(along, setting)]
    if ratio.low > 1:
        unknown = "whether it moves the plain prompt is not known, because the two gradients could not be compared"
        return "cannot tell: more signal, unknown transfer", None, [compared, unknown]
    return "cannot tell", None, [compared, _more(ratio, setting)]


def along_plain(ratio: Estimate, cosine: Estimate) -> Estimate:
    """Returns the ratio times the squared cosine, 0 for a negative one; with the ends of both intervals."""
    squares = [max(x, 0.0) ** 2 for x in cosine]
    product = lambda x, square: 0.0 if square == 0 else x * square
    return Estimate(*(product(x, square) for x, square in zip(ratio, squares, strict=True)))


def _more(ratio: Estimate, setting: Setting) -> str:
    """Returns the sentence about the number of problems that could tell."""
    text = f"the interval holds 1, so {setting.problems} problems are too few to tell"
    if not 0 < ratio.low <= ratio.value <= ratio.high < math.inf or ratio.value == 1:
        return text
    width = max(math.log(ratio.high / ratio.value), math.log(ratio.value / ratio.low))
    needed = setting.problems * (width / math.log(ratio.value)) ** 2
    if needed > 100 * setting.problems:
        return f"{text}; the ratio is so near 1 that it matters little"
    return f"{text}; if the ratio is what it seems, about {math.ceil(needed / 10) * 10:,} would do"


def _rare(figures: Mapping[str, Estimate], setting: Setting) -> list[str]:
    """Returns the reasons where success is rare."""
    p, times = figures["p"], figures["times"]
    cut, expected = figures.get("cut_plain"), figures.get("successes")
    sentences = []
    if cut is not None and cut.is_known and cut.low > CUT:
        sentences.append(
            f"{shown(cut)} of the plain answers are cut at the limit, so a higher rollout.max_completion_length may "
            "change all of this"
        )
    if p.value == 0:
        sentences.append(f"no plain answer is right, so p is at most {_number(p.high)}")
    if expected is not None and expected.is_known:
        text = f"GRPO would see {shown(expected)} right completions in the run that the settings describe"
        few = expected.high < 10
        sentences.append(f"{text}, which is hardly any to learn from" if few else text)
    if p.high < draft_signal.hopeless_from(setting.drafts, setting.refinements, setting.scale) / 2 and times.is_known:
        bound = draft_signal.rare_bound(times.high, setting.drafts, setting.refinements, setting.scale)
        if math.isfinite(float(bound)):
            sentences.append(
                f"success is rare, so the ratio is bounded by how much likelier a wrong draft makes a right answer: "
                f"w is {shown(times)} times p on the same problems, and the ratio at most {float(bound):.2f}"
            )
    return sentences


def _model(figures: Mapping[str, Estimate], behaviour: str) -> list[str]:
    """Returns what the model makes of drafts."""
    meaning = {
        "repairs": "the model repairs",
        "copies": "the model trusts drafts, and no repair is seen",
        "is misled": "wrong drafts mislead the model",
        "ignores": "the model ignores drafts",
        "unclear": "what the model makes of drafts is not clear at this many problems",
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
    sizes = (setting.drafts, setting.refinements, setting.scale)
    least, _ = draft_signal.repair_range(p.value, r.value, *sizes, transfer=transfer)
    where = f"at p = {p.value:.3f}, r = {r.value:.2f}" + (f" and the cosine {transfer:.2f}" if known else "")
    if math.isnan(float(least)):
        return [f"were all problems alike, {where}, no w would be enough for more signal than GRPO has"]
    return [
        f"were all problems alike, {where}, w would have to be at least {float(least):.3f}; it is {shown(figures['w'])}"
    ]


def _transfer(figures: Mapping[str, Estimate]) -> list[str]:
    """Returns what reliance on the draft leaves to the plain prompt."""
    rho = figures.get("reliance")
    if rho is None or not rho.is_known:
        return []
    bound = float(draft_signal.plain_success_bound(figures["refined"].value, max(rho.value, 0.0)))
    return [
        f"right refinements are exp(rho) times likelier with the draft than without it, rho = {shown(rho)} nats; of a "
        f"success of {figures['refined'].value:.3f} with drafts this leaves at least {bound:.3f} on the plain prompt"
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
