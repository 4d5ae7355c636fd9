"""The arms of the studies for matched_budget.py: methods with their settings, in groups, and the starts of their runs.

ARMS are those of the arithmetic model and of pretrained models, and LOOKUPS those of the look-ups.
"""

from dataclasses import dataclass
from typing import Any


def budget(total: int, drafts: bool) -> dict[str, Any]:
    """Returns the settings under which all of `total` completions are trained, or half of them are drafts."""
    half = total // 2 if drafts else 0
    return {"algorithm.num_drafts": half, "algorithm.num_generations": total - half}


@dataclass(frozen=True)
class Arm:
    """A method: its settings, the start from which it trains, and the arm with which it is compared."""

    name: str
    settings: dict[str, Any]
    against: str = ""
    start: str = "start"


GRPO, IGRPO = budget(8, False), budget(8, True)
CONTROLS = {
    "random": {"algorithm.draft_selection": "random"},
    "worst": {"algorithm.draft_selection": "worst"},
    "first": {"algorithm.draft_selection": "first"},
    "dropout": {"algorithm.draft_dropout": 0.5},
    "train_drafts": {"algorithm.train_drafts": True},
    "early_stop": {"algorithm.draft_early_stop": True},
    "tail": {"refine.max_draft_length": 8},
}
AGAINST_COPYING = ("random", "worst", "dropout", "train_drafts", "tail")

ARMS: dict[str, list[Arm]] = {
    "main": [Arm("grpo", GRPO), Arm("igrpo", IGRPO, "grpo")],
    "copying": [
        Arm("trusting_grpo", GRPO, start="trusting"),
        Arm("trusting_igrpo", IGRPO, "trusting_grpo", "trusting"),
        *(Arm(f"trusting_{name}", IGRPO | CONTROLS[name], "trusting_igrpo", "trusting") for name in AGAINST_COPYING),
        Arm("trusting_hot", IGRPO | {"rollout.temperature": 1.3}, "trusting_igrpo", "trusting"),
    ],
    "wrapper": [
        arm
        for loss in ("dapo", "gspo", "dr_grpo")
        for arm in (
            Arm(loss, GRPO | {"algorithm.loss_type": loss}),
            Arm(f"igrpo_{loss}", IGRPO | {"algorithm.loss_type": loss}, loss),
        )
    ],
    "controls": [Arm(f"igrpo_{name}", IGRPO | settings, "igrpo") for name, settings in CONTROLS.items()],
    "beta": [Arm(f"igrpo_beta_{beta:g}", IGRPO | {"algorithm.beta": beta}, "igrpo") for beta in (1e-4, 1e-3, 1e-2)],
    "completions": [
        arm
        for total in (4, 16, 32)
        for arm in (
            Arm(f"grpo_{total}", budget(total, False)),
            Arm(f"igrpo_{total}", budget(total, True), f"grpo_{total}"),
        )
    ],
}

# Variants of iGRPO that depart from the paper, at 8 sampled completions.
TRAINED = IGRPO | CONTROLS["train_drafts"]
UNSOLVED = TRAINED | {"algorithm.draft_when": "unsolved"}
PLAIN_CREDIT = TRAINED | {"algorithm.group": "prompt", "algorithm.refine_credit": "plain"}
VARIANTS: dict[str, dict[str, Any]] = {
    "worst": IGRPO | CONTROLS["worst"],
    # The draft with the most right digits, which earn nothing.
    "graded": IGRPO
    | {
        "algorithm.draft_metric": "right_digits",
        "rewards.functions": "('benchmarks.study_rewards:right_digits',)",
        "rewards.function_weights": "(0.0,)",
    },
    "train_drafts": TRAINED,
    "one_group": TRAINED | {"algorithm.group": "prompt"},
    "improvement": TRAINED | {"algorithm.group": "prompt", "algorithm.improvement_bonus": 1.0},
    "refinements_to_plain": IGRPO | {"algorithm.refine_credit": "plain"},
    # 6 completions, and then 4 drafts and 6 refinements: 8 on average.
    "alternate": {
        "algorithm.num_drafts": 4,
        "algorithm.num_generations": 6,
        "algorithm.alternate": True,
        "algorithm.draft_selection": "random",
    },
    # The groups and the credit of configs/critique_grpo.py, with 4 drafts, each refined once. This is not all of
    # Critique-GRPO, which CRITIQUE is: here the prompt has no {verdict}, drafts keep the clip, and there is no entropy
    # bonus.
    "critique_grpo": PLAIN_CREDIT
    | {
        "algorithm.num_generations": 1,
        "algorithm.loss_type": "dr_grpo",
        "algorithm.draft_selection": "refined",
        "algorithm.credit_completions": "all",
    },
}


def compared(start: str, methods: dict[str, dict[str, Any]]) -> list[Arm]:
    """Returns the arms of one start of the look-ups, which are compared with GRPO from the same start."""
    return [Arm(f"{start}_{name}", settings, f"{start}_grpo", start) for name, settings in methods.items()]


CLAIM = {"igrpo": IGRPO, "unsolved": UNSOLVED, "plain_credit": PLAIN_CREDIT}


def of_claim(start: str) -> list[Arm]:
    """Returns the arms that are run from every start of the look-ups."""
    half = Arm(f"{start}_grpo_4", budget(4, False), f"{start}_grpo", start)
    return [Arm(f"{start}_grpo", GRPO, start=start), half, *compared(start, CLAIM)]


LOOKUP_STARTS = ("dense", "sparse", "rare", "ignoring", "x60", "x23", "x8")
LOOKUPS: dict[str, list[Arm]] = {start: of_claim(start) for start in LOOKUP_STARTS}
LOOKUPS["variants"] = compared("sparse", VARIANTS)
# A refinement that states the answer of a wrong draft gets less than one with another wrong answer.
REPEATS = IGRPO | {"algorithm.repeat_penalty": 0.5}
LOOKUPS["repeats"] = [Arm("sparse_repeat_penalty", REPEATS, "sparse_igrpo", "sparse")]
# Other ways to credit refinements to the plain prompt than that of refinements_to_plain, each with one change.
TO_PLAIN = VARIANTS["refinements_to_plain"]
CREDIT = {
    "credit_all": {"algorithm.credit_completions": "all"},
    "credit_weighted": {"algorithm.credit_gamma": 0.0, "algorithm.importance_sampling_cap": 2.0},
    "credit_and_drafts": {"algorithm.train_drafts": True},
}
LOOKUPS["credit"] = [
    Arm(f"sparse_{name}", TO_PLAIN | change, "sparse_refinements_to_plain", "sparse") for name, change in CREDIT.items()
]
# q' says whether the draft is correct, to a model that was taught to use it. critique_grpo has all settings of
# configs/critique_grpo.py but its sizes, with 4 drafts, each refined once. The two others have no entropy bonus, and
# critique_right trains on right refinements alone.
TOLD = {"refine.instruction": "{verdict} {draft}"}
CRITIQUE = VARIANTS["critique_grpo"] | {"algorithm.epsilon": 1e9, "algorithm.entropy_coef": 0.001} | TOLD
NO_BONUS = {"algorithm.entropy_coef": 0.0}
LOOKUPS["critique"] = [
    Arm("critiqued_grpo", GRPO, start="critiqued"),
    *compared(
        "critiqued",
        {
            "igrpo": IGRPO | TOLD,
            "unsolved": UNSOLVED | TOLD,
            "critique_grpo": CRITIQUE,
            "critique_no_bonus": CRITIQUE | NO_BONUS,
            "critique_right": CRITIQUE | NO_BONUS | {"algorithm.credit_completions": "right"},
        },
    ),
]
# As in configs/self_verification.py: 4 solutions and 4 verdicts on one of them, all trained on.
VERIFY = TRAINED | {"algorithm.second_stage": "verify", "algorithm.draft_selection": "balanced"}
LOOKUPS["verifying"] = [
    Arm("verifying_grpo", GRPO, start="verifying"),
    *compared("verifying", {"self_verification": VERIFY}),
]


@dataclass(frozen=True)
class Prediction:
    """What was written down before the look-ups were run: where an arm ends, against GRPO with as many samples."""

    arm: str
    low: float  # pass@1 of the arm less that of GRPO at the end, in percentage points
    high: float
    words: str


FAR = 100.0
PREDICTIONS = (
    Prediction("dense_igrpo", -FAR, -30, "30 points behind or more"),
    Prediction("sparse_igrpo", -35, 5, "between 35 points behind and 5 ahead"),
    Prediction("rare_igrpo", 0, FAR, "ahead"),
    Prediction("ignoring_igrpo", -FAR, 0, "behind"),
    Prediction("dense_unsolved", -5, 5, "within 5 points"),
    Prediction("sparse_unsolved", 0, FAR, "ahead"),
    Prediction("rare_unsolved", 0, FAR, "ahead"),
    Prediction("x60_igrpo", -FAR, -30, "30 points behind or more"),
    Prediction("x23_igrpo", -FAR, -20, "20 points behind or more"),
    Prediction("x8_igrpo", -FAR, 0, "behind"),
    Prediction("x60_unsolved", -5, 5, "within 5 points"),
    Prediction("x23_unsolved", -5, 15, "between 5 points behind and 15 ahead"),
    Prediction("x8_unsolved", 0, FAR, "ahead"),
)

# Arms that the pages compare, beside those that each arm names itself.
CONTRASTS = (
    ("igrpo", "grpo_4"),
    ("trusting_train_drafts", "trusting_grpo"),
    *((f"{start}_igrpo", f"{start}_grpo_4") for start in LOOKUP_STARTS),
    *(
        (f"sparse_{name}", "sparse_unsolved")
        for name in ("train_drafts", "one_group", "improvement", "refinements_to_plain", "alternate", "igrpo")
    ),
    ("sparse_plain_credit", "sparse_refinements_to_plain"),
    *((f"critiqued_{name}", "critiqued_igrpo") for name in ("critique_grpo", "critique_no_bonus", "critique_right")),
)


def look_ups(error_rate: float, refinements: str) -> dict[str, Any]:
    """Returns the settings of a start whose teacher is wrong this often, as its drafts are."""
    errors = {"warm_start.error_rate": error_rate, "warm_start.draft_error_rate": error_rate}
    return errors | {"warm_start.refinements": refinements}


# The warm starts. Those of the arithmetic model: in the first, drafts are random steps, from which nothing can be
# learned; in the second, they are as good as the teacher's own solutions. Those of the look-ups expect 177, 3 and 0.9
# right answers in a run of GRPO that learns nothing, and those with a number in their name as many as it says. The last
# three have learned to ignore drafts, to give verdicts on them, and to use a critique of them; they expect 177, 177 and
# 3.
STARTS = {
    "start": {},
    "trusting": {"warm_start.draft_error_rate": 0.25},
    "dense": look_ups(0.3, "checked"),
    "sparse": look_ups(0.5, "checked"),
    "rare": look_ups(0.55, "checked"),
    "x60": look_ups(0.36, "checked"),
    "x23": look_ups(0.41, "checked"),
    "x8": look_ups(0.46, "checked"),
    "ignoring": look_ups(0.3, "independent"),
    "verifying": look_ups(0.3, "verdicts"),
    "critiqued": look_ups(0.5, "critiqued") | TOLD | {"model.builtin.max_position_embeddings": 96},
}
