"""The conclusion on simulated counts: models that copy, repair or ignore drafts, regions, and too few problems."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from igrpo_jax.probe import draft_signal, estimates
from igrpo_jax.probe.conclusion import COPIES, OBSERVED, Setting, conclude
from igrpo_jax.probe.estimates import NONE, UNKNOWN, Counts, Estimate, estimate

N, G, K = 4, 4, 8
SETTING = Setting(400, K, N, G, "group")


def simulated(success, after_right, after_wrong, problems=400, seed=0, samples=K):
    """Counts of `problems` whose p is `success`, a number or one for each; r and w likewise."""
    rng = np.random.default_rng(seed)
    p, r, w = (np.broadcast_to(value, problems) for value in (success, after_right, after_wrong))
    plain = rng.random((problems, samples)) < p[:, None]
    kept = np.stack([np.roll(plain, -start, axis=1)[:, :N].any(axis=1) for start in range(samples)], axis=1)
    drawn = lambda rate, shown: np.where(shown, rng.binomial(G, rate), NONE)
    return Counts(plain, kept, drawn(r, kept.any(axis=1)), drawn(w, ~kept.all(axis=1)), N, G)


def concluded(*args, problems=400, cosine=None, run=None, **more):
    """The conclusion for simulated counts, where `run` is the number of completions of a run of GRPO."""
    figures = estimate(simulated(*args, problems=problems, **more))
    if run:
        figures["successes"] = figures["p"].times(run)
    if cosine:
        figures["cosine"] = Estimate(*cosine)
    return conclude(figures, Setting(problems, K, N, G, "group"))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_estimates_hold_what_the_formulas_say(scale):
    """Problems of three kinds; every figure against the formula at the probabilities of the kinds."""
    p, r, w = np.array([0.02, 0.1, 0.6]), np.array([0.5, 0.8, 0.9]), np.array([0.1, 0.3, 0.2])
    figures = estimate(simulated(*(np.repeat(x, 1000) for x in (p, r, w)), problems=3000), scale)
    a = draft_signal.kept_right(p, N)
    plain = draft_signal.signal(draft_signal.right_counts(p, N + G).mean(axis=0), scale)
    refined = draft_signal.signal(draft_signal.igrpo_counts(p, r, w, N, G).mean(axis=0), scale)
    drafts = draft_signal.signal(draft_signal.right_counts(p, N).mean(axis=0), scale)
    ratio, drawn = refined.snr_squared / plain.snr_squared, draft_signal.expected_drafts(p, N).mean()
    expected = {
        "p": p.mean(),
        "best": a.mean(),
        "kept": a.mean(),
        "spread": (p * (1 - p)).mean(),
        "r": (a * r).sum() / a.sum(),
        "w": ((1 - a) * w).sum() / (1 - a).sum(),
        "alone_right": (a * p).sum() / a.sum(),
        "alone_wrong": ((1 - a) * p).sum() / (1 - a).sum(),
        "fixed": ((1 - a) * w).mean(),
        "broken": (a * (1 - r)).mean(),
        "refined": (a * r + (1 - a) * w).mean(),
        "drawn": drawn,
        "plain_active": plain.active,
        "refined_active": refined.active,
        "plain_snr": plain.snr_squared,
        "refined_snr": refined.snr_squared,
        "ratio": ratio,
        "ratio_early": ratio * (N + G) / (drawn + G),
        "ratio_trained": draft_signal.trained_together(drafts, refined).snr_squared / plain.snr_squared,
    }
    for name, value in expected.items():
        figure = figures[name]
        width = (figure.high - figure.low) / 4  # a standard error
        assert abs(figure.value - value) < 5 * width and width < 0.1 * max(1, value), name
        assert figure.low <= figure.value <= figure.high, name
    assert set(expected) | {"trust", "repair", "times"} == set(figures)
    repair = figures["repair"]
    assert repair.low <= expected["w"] - expected["alone_wrong"] <= repair.high < repair.low + 0.05


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 100 probes of 64 problems; a right interval of 95 % holds it fewer than 86 times once in ten thousand."""
    p, truth = 0.15, draft_signal.snr_ratio(0.15, 0.8, 0.3, N, G)
    held = {"p": 0, "w": 0, "ratio": 0}
    for seed in range(100):
        figures = estimate(simulated(p, 0.8, 0.3, problems=64, seed=seed))
        for name, value in (("p", p), ("w", 0.3), ("ratio", truth)):
            held[name] += figures[name].low <= value <= figures[name].high
    assert all(count >= 86 for count in held.values()), held


def test_a_model_that_copies_and_one_that_repairs_are_told_apart():
    p = np.random.default_rng(4).beta(0.4, 8, 400)  # rare, and unequal
    copies = concluded(p, *draft_signal.copying(p, 0.9))
    assert copies.behaviour == "copies" and copies.more_signal is False
    repairs = concluded(p, 0.8, np.minimum(p + 0.4, 1), cosine=(0.95, 0.9, 0.99))
    assert (
        repairs.behaviour == "repairs"
        and repairs.more_signal is True
        and repairs.answer == "more signal at the first step"
    )
    ignores = concluded(p, p, p)
    assert ignores.behaviour == "ignores" and ignores.more_signal is False
    misled = concluded(0.4, 0.4, 0.05)
    assert misled.behaviour == "is misled"


def test_a_model_that_ignores_drafts_is_not_taken_for_one_that_trusts_them():
    """Its r is far above its w, because right drafts come from easy problems."""
    p = np.random.default_rng(5).beta(0.3, 1.2, 400)
    figures = estimate(simulated(p, p, p))
    assert figures["r"].low > figures["w"].high + 0.2
    assert figures["trust"].low < 0 < figures["trust"].high and figures["repair"].low < 0 < figures["repair"].high


def test_a_model_is_said_to_ignore_drafts_only_where_no_effect_can_be_hidden():
    """It was said of 48 problems with a few right drafts, none of whose refinements was right, and with a fifth cut."""
    figures = estimate(simulated(0.02, 0.02, 0.02))
    figures |= {"cut_plain": Estimate(0.003, 0.0, 0.008), "cut_refined": Estimate(0.05, 0.03, 0.07)}
    reasons = lambda: " ".join(conclude(figures, SETTING).reasons)
    assert "the model ignores drafts: after" in reasons() and "are cut" not in reasons()
    cut = {**figures, "cut_refined": Estimate(0.21, 0.14, 0.28)}
    conclusion = conclude(cut, SETTING)
    assert conclusion.behaviour == "unclear" and "what the model makes of drafts is not clear: after" in str(conclusion)
    assert "0.21 (0.14 to 0.28) of the refinements are cut at the limit and 0.003 (0 to 0.008) of" in str(conclusion)
    figures["r"], figures["trust"] = Estimate(0.0, 0.0, 0.37), Estimate(-0.03, -0.09, 0.0)
    assert "too few right drafts to say what the model makes of them: after" in reasons()
    figures["w"], figures["repair"] = UNKNOWN, Estimate(math.nan, -1.0, 1.0)
    assert "too few right and wrong drafts to say what the model makes of them: after" in reasons()


@pytest.mark.parametrize("p", [0.5, 0.67, "unequal"])
def test_a_model_that_ignores_drafts_is_hardly_ever_said_to_be_misled(p):
    """Of 200 probes of 64 problems; where each is so in 2.5 %, more than 11 are once in a hundred times."""
    said = {"repairs": 0, "is misled": 0}
    for seed in range(200):
        rates = np.random.default_rng(1000 + seed).beta(1, 1, 64) if p == "unequal" else p
        repair = estimates.repair(simulated(rates, rates, rates, problems=64, seed=seed))
        said["repairs"] += repair.low > 0
        said["is misled"] += repair.high < 0
    assert max(said.values()) <= 11, said


def test_repair_of_few_problems_is_anything():
    counts = simulated(0.9, 0.9, 0.9, problems=20)
    assert np.sum(~counts.kept[:, 0]) == 0
    repair = estimates.repair(counts)
    assert math.isnan(repair.value) and repair[1:] == (-1, 1)
    few = Counts(counts.plain[:6], np.arange(6)[:, None] > np.full(K, 3), *[np.full(6, 3)] * 2, N, G)
    assert estimates.repair(few)[1:] == (-1, 1)  # four problems, whose gains are nearly alike
    same = simulated(0.0, 0.5, 0.0, problems=64)  # every gain is 0: exact, as of a proportion
    assert estimates.repair(same) == pytest.approx((0, -(1 - 0.025 ** (1 / 64)), 1 - 0.025 ** (1 / 64)))


def test_where_no_refinement_is_right_their_signal_has_a_bound():
    """M n / 4 of a group of four, where M is at most what 0 of 400 problems leave open; a bootstrap would say 0."""
    figures = estimate(simulated(0.1, 0.0, 0.0))
    most = estimates.proportion_at_most(0, 400)
    assert figures["refined_snr"] == (0, 0, most) and figures["plain_snr"].low > 0
    assert figures["ratio"] == (0, 0, most / figures["plain_snr"].low)


def test_a_hopeless_region():
    """p = .4: GRPO has more signal than a group of four can have, also where drafts repair everything."""
    conclusion = concluded(0.4, 0.5, 0.5)
    assert conclusion.more_signal is False and conclusion.answer == "drafts cannot pay by signal"
    assert "at most 0.75" in conclusion.reasons[0] and "p from 0.125 to 0.875" in conclusion.reasons[0]
    assert "less" not in concluded(0.05, 0.5, 0.5).answer


def test_the_rare_region_has_the_bound_of_how_much_likelier_a_wrong_draft_makes_success():
    figures = estimate(simulated(0.03, 1.0, 0.03, problems=800))
    (bound,) = [reason for reason in conclude(figures, SETTING).reasons if "p is small" in reason]
    assert f"at most {float(draft_signal.rare_bound(figures['times'].high, N, G, 'group')):.2f}" in bound
    assert not any("p is small" in reason for reason in concluded(0.3, 1.0, 0.3).reasons)


def test_a_bound_that_rests_on_one_right_answer_is_none():
    """After wrong drafts a plain answer is right at one problem only, which a third of the resamples lack."""
    plain = np.zeros((64, K), bool)
    plain[0, 7] = True
    kept = np.stack([np.roll(plain, -start, axis=1)[:, :N].any(axis=1) for start in range(K)], axis=1)
    counts = Counts(plain, kept, np.where(kept.any(axis=1), 4, NONE), np.where(np.arange(64) % 4, 0, 2), N, G)
    figures = estimate(counts)
    assert figures["times"].high == math.inf and 0 < figures["times"].low < figures["times"].value < math.inf
    assert not any("the ratio at most" in reason for reason in conclude(figures, SETTING).reasons)


REPAIRED = {"problems": 800, "cosine": (0.95, 0.93, 0.97)}


def test_more_signal_at_the_first_step_is_no_promise_where_grpo_takes_off():
    """p = .013 with runs of 12,800, 1,000 and 60 completions: about 170, 13 and 1 right ones."""
    found = {run: concluded(0.013, 0.12, 0.12, run=run, **REPAIRED) for run in (12_800, 1_000, 60)}
    assert all(each.more_signal is True and "pay" not in each.answer for each in found.values())
    large, between, small = (" ".join(each.reasons) for each in found.values())
    assert found[12_800].answer == "more signal at the first step, but GRPO takes off by itself"
    assert found[1_000].answer == found[60].answer == "more signal at the first step"
    assert {each.tone for each in found.values()} == {""}
    many = "-44.9 ± 2.6 at 19.5, -50.7 ± 1.6 at 52.3 and -52.7 ± 1.5 at 168 points against GRPO"
    assert f"enough to take off by itself: in the study iGRPO ended at {many}" in large
    assert (
        "may be enough to take off by itself: in the study all runs of GRPO (8) did from 19.5 on, and not all at 6.4"
        in between
    )
    few = "+3.5 ± 2.5 at 0.4, +8.0 ± 26.4 at 2.3, -52.1 ± 27.8 at 2.5 and -20.3 ± 15.9 at 6.4 points against GRPO"
    assert f"hardly any to learn from: in the study iGRPO ended at {few}" in small
    assert all("learnt after drafts need not reach the plain prompt" in text for text in (large, between, small))
    less = concluded(0.4, 0.5, 0.5, run=12_800)  # nothing is said of a start that has more signal
    assert "right completions in the run that the settings describe (x)" in " ".join(less.reasons)
    assert "the study" not in " ".join(less.reasons) and less.tone == "bad"


def test_what_may_be_either_is_said_to_be_neither():
    """The ends of an interval decide: of x, whether GRPO takes off, and of the answers that repeat a wrong draft's."""
    figures = estimate(simulated(0.013, 0.12, 0.12, problems=800)) | {"cosine": Estimate(0.95, 0.93, 0.97)}
    found = conclude(figures | {"successes": Estimate(15, 10, 20)}, Setting(800, K, N, G, "group"))
    assert found.answer == "more signal at the first step" and found.behaviour == "repairs" and found.unsolved
    ignored = estimate(simulated(0.02, 0.02, 0.02))
    for low, behaviour in ((COPIES - 0.1, "ignores"), (COPIES + 0.05, "copies")):
        same = Estimate(COPIES + 0.1, low, COPIES + 0.2)
        assert conclude(ignored | {"same_wrong": same}, SETTING).behaviour == behaviour


def test_what_the_study_observed_is_in_its_tables():
    files = (Path(__file__).parents[2] / "docs" / "study").glob("*/tables.md")
    tables = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for start, (_, *points) in OBSERVED.items():
        for arm, ended in zip(("igrpo", "unsolved"), points, strict=True):
            assert f"| {start}_{arm} | {start}_grpo | 10 | {ended} |" in tables


def test_unsolved_is_named_where_drafts_are_repaired_and_grpo_has_hardly_a_right_answer():
    rare = concluded(0.01, 0.3, 0.2, run=200)
    (sentence,) = [reason for reason in rare.reasons if "unsolved" in reason]
    few = "+12.7 ± 7.3 at 0.4, +44.7 ± 24.1 at 2.3, +20.9 ± 29.1 at 2.5"
    more = "+12.2 ± 15.8 at 6.4, +1.5 ± 0.9 at 19.5, -0.3 ± 1.1 at 52.3 and -0.8 ± 0.3 at 168 points against GRPO"
    assert rare.unsolved and f"{few}, {more}" in sentence
    assert f"only {200 * estimate(simulated(0.01, 0.3, 0.2))['p'].low:.2f} right completions, so try" in sentence
    others = [concluded(0.01, 0.3, 0.01, run=200)]  # no repair
    others += [concluded(0.01, 0.3, 0.2, run=12_800), concluded(0.01, 0.3, 0.2)]  # x is large, or not known
    for other in others:
        assert not other.unsolved and not any("unsolved" in reason for reason in other.reasons)


def test_small_numbers_are_not_shown_as_zero():
    """p = .0002 and w = .004, as on the sparse start of the study."""
    figures = estimate(simulated(0.0002, 0.0, 0.004, problems=4000, samples=32))
    figures |= {"reliance": Estimate(2.39, 2.37, 2.42), "cosine": Estimate(0.004, 0.003, 0.005)}
    text = " ".join(conclude(figures, Setting(4000, 32, N, G, "group")).reasons)
    assert "were all problems alike, at p = 0.000" in text and "with drafts this leaves at least 0.000" in text
    assert not re.search(r"\b0\.0+\b(?!\d)", text)
    figures["reliance"] = Estimate(34.5, 26.6, 42.5)
    text = " ".join(conclude(figures, Setting(4000, 32, N, G, "group")).reasons)
    assert "nats; so the success with drafts says nothing about that on the plain prompt" in text
    assert "leaves at least" not in text
    assert "of at least 0" not in text and "r = 0 and the cosine 0.004" in text


def test_the_least_w_is_that_of_the_draft_that_is_shown():
    figures = estimate(simulated(0.1, 0.5, 0.3), "group")
    least = [
        float(re.search(r"w would have to be at least ([\d.]+);", " ".join(conclude(figures, setting).reasons))[1])
        for setting in (SETTING, replace(SETTING, selection="random"))
    ]
    assert least[1] > least[0] + 0.02


def test_the_mean_of_which_few_active_problems_are_surely_seen():
    below = sum(math.exp(-estimates.SEEN) * estimates.SEEN**k / math.factorial(k) for k in range(estimates.FEW))
    assert below == pytest.approx(0.01, abs=1e-6)


def test_the_number_of_problems_by_hand():
    """5 % and 20 % active: 20 + 5 by the two proportions, times (3.24 / 2)^2 where the log is 2; 11.6 / 5 % is more."""
    assert estimates.problems_needed(0.05, 0.2, math.exp(2)) == pytest.approx(232.09, abs=0.01)
    assert estimates.problems_needed(0.05, 0.2, math.exp(-0.5)) == pytest.approx(6.48**2 * 25)
    assert estimates.problems_needed(0.2, 0.05, math.nan) == pytest.approx(232.09, abs=0.01)
    assert estimates.problems_needed(0.2, 0.05, 0.0) == pytest.approx(232.09, abs=0.01)
    assert estimates.problems_needed(0.2, 0.05, 1.0) == math.inf


@pytest.mark.parametrize(
    ("chances", "most", "samples"), [((0.013, 0.12, 0.12), 250, 8), ((0.0018, 0.02, 0.02), 400, 32)]
)
def test_a_probe_that_cannot_tell_says_how_many_problems_can(chances, most, samples):
    """Of 30 probes of so many problems, at least two thirds tell."""
    p, r, w = chances
    plain = 1 - (1 - p) ** (N + G)
    figures = {"plain_active": Estimate(plain, plain, plain)}
    refined = 1 - (1 - w) ** G
    figures["refined_active"] = Estimate(refined, refined, refined)
    figures["ratio"] = Estimate(draft_signal.snr_ratio(p, r, w, N, G), 0.0, math.inf)
    figures |= dict.fromkeys(("trust", "repair", "times", "alone_wrong", "r", "w"), UNKNOWN)
    figures |= {name: Estimate(p, p, p) for name in ("p", "best", "kept", "refined", "plain_snr")}
    conclusion = conclude(figures, Setting(64, samples, N, G, "group"))
    text = " ".join(conclusion.reasons)
    problems, drawn = (
        int(x.replace(",", ""))
        for x in re.search(rf"about ([\d,]+) problems would do \({samples} answers to each, ([\d,]+) in", text).groups()
    )
    assert 64 < problems <= most and drawn == problems * samples
    told = [
        concluded(p, r, w, problems=problems, samples=samples, seed=seed, cosine=(0.95, 0.9, 1.0)).more_signal
        for seed in range(30)
    ]
    assert told.count(True) >= 20 and False not in told
    few = [concluded(p, r, w, problems=64, seed=seed, cosine=(0.95, 0.9, 1.0)) for seed in range(30)]
    wanting = [each for each in few if "right and wrong answers are too few" in " ".join(each.reasons)]
    assert len(wanting) >= 5 and all(each.more_signal is None for each in wanting)


def test_too_few_problems():
    conclusion = concluded(0.08, 0.7, 0.25, problems=24, cosine=(0.9, 0.8, 1.0))
    assert conclusion.more_signal is None and conclusion.answer == "cannot tell"
    assert "24 problems are too few to tell" in " ".join(conclusion.reasons)
    figures = estimate(simulated(0.02, 0.5, 0.02))
    for ratio in (Estimate(0.9, 0.6, 1.1), Estimate(1.2, 0.9, 1.6)):
        conclusion = conclude(figures | {"ratio": ratio, "cosine": Estimate(1.0, 0.99, 1.0)}, SETTING)
        assert conclusion.more_signal is None and "too few to tell" in " ".join(conclusion.reasons)
    # Widths of 1.96 standard deviations shrink with the square root, and 3.24 of them must be log(1.2): log(1.2 / (0.9
    # 0.99^2)) must shrink by 2.79, and 400 problems become 7.78 times as many.
    assert "about 3,120 would do, with as many --gradients" in " ".join(conclusion.reasons)


def test_signal_that_points_elsewhere_and_signal_whose_direction_is_unknown():
    counted = (0.02, 0.6, 0.3)
    assert concluded(*counted, problems=800).answer == "cannot tell: more signal, unknown transfer"
    elsewhere = concluded(*counted, problems=800, cosine=(0.1, 0.0, 0.2))
    assert elsewhere.more_signal is False and elsewhere.answer == "drafts do not pay: their signal points elsewhere"
    backwards = concluded(*counted, problems=800, cosine=(-0.9, -1.0, -0.8))
    assert backwards.more_signal is False  # a large square is no help where the sign is wrong


def test_without_any_success():
    """0 of 64 problems: an upper bound of p, and nothing that can be told."""
    figures = estimate(simulated(0.0, 0.5, 0.0, problems=64))
    assert figures["p"].value == 0 and figures["p"].high == pytest.approx(1 - 0.025 ** (1 / 64))
    assert (figures["ratio"].low, figures["ratio"].high) == (0, math.inf) and not figures["r"].is_known
    figures |= {"successes": figures["p"].times(100), "cut_plain": Estimate(0.9, 0.8, 1.0)}
    conclusion = conclude(figures, Setting(64, K, N, G, "group"))
    assert conclusion.more_signal is None and any("hardly any to learn from" in reason for reason in conclusion.reasons)
    assert conclusion.behaviour == "unclear"  # no success shows nothing of what the model makes of drafts
    assert any("no plain answer is right, so p is at most 0.056" in reason for reason in conclusion.reasons)
    assert any("0.90 (0.80 to 1.00) of the plain answers are cut" in reason for reason in conclusion.reasons)
    figures["cut_plain"] = Estimate(0.6, 0.4, 0.8)
    assert not any("are cut" in reason for reason in conclude(figures, Setting(64, K, N, G, "group")).reasons)


def test_repair_where_no_plain_answer_is_right():
    """GRPO saw nothing in 400 problems, and refinements of wrong drafts are right half of the time."""
    figures = estimate(simulated(0.0, 0.5, 0.5))
    most = estimates.proportion_at_most(0, 400) * (N + G) / 4
    assert figures["ratio"].low == pytest.approx(figures["refined_snr"].low / most) and figures["ratio"].low > 1
    assert concluded(0.0, 0.5, 0.5, cosine=(0.9, 0.8, 1.0)).more_signal is True


def test_the_exact_bound_of_a_proportion():
    assert estimates.proportion_at_most(0, 10) == pytest.approx(1 - 0.025**0.1)
    assert estimates.proportion_at_most(3, 10) == pytest.approx(0.6525, abs=1e-4)  # a table of the binomial
    assert estimates.proportion_at_most(10, 10) == 1


def test_the_bound_of_a_signal_holds():
    """SNR^2 <= M n / 4 for any mixture of counts, by which few active problems are judged."""
    rng = np.random.default_rng(0)
    for size in (2, 4, 8):
        counts = rng.dirichlet(np.full(size + 1, 0.3), 500)
        for scale in ("group", "batch", "none"):
            signal = draft_signal.signal(counts, scale)
            assert np.all(signal.snr_squared <= signal.active * size / 4 + 1e-9)


def test_an_unknown_figure_says_so():
    assert not UNKNOWN.is_known and not UNKNOWN.times(3).is_known


@pytest.mark.parametrize("right", range(1, 24))
def test_a_share_that_is_0_up_to_rounding_is_0(right):
    """Some problems are always right and the others never, so no group has a gradient and no draft is broken."""
    alone = np.repeat([1.0, 0.0], [right, 24 - right])
    figures = estimate(simulated(alone, alone, alone, problems=24, samples=11))
    for name in ("plain_active", "refined_active", "plain_snr", "refined_snr", "broken", "fixed", "trust", "repair"):
        assert figures[name].value == 0 and (figures[name].low == 0 or name in ("trust", "repair")), name
    text = " ".join(conclude(figures, Setting(24, 11, N, G, "group")).reasons)
    assert re.search(r"problems with right and wrong answers are too few, and at least \d{2,3} problems would do", text)


def test_more_problems_than_can_be_asked_for_are_no_number():
    figures = estimate(simulated(0.02, 0.02, 0.02, problems=64))
    figures["ratio"] = Estimate(1 + 1e-6, 0.0, math.inf)
    text = " ".join(conclude(figures, Setting(64, K, N, G, "group")).reasons)
    assert "right and wrong answers are too few, and it would take more than 6,400 problems to tell" in text
    assert "would do" not in text
