"""The arms of the study for matched_budget.py: methods with their settings, in groups, and the starts of their runs."""

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
# The supervised starts of the arithmetic model. In the first, drafts are random steps, from which nothing can be
# learned; in the second, they are as good as the teacher's own solutions.
STARTS = {"start": {}, "trusting": {"warm_start.draft_error_rate": 0.25}}
