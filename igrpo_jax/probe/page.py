"""What a probe writes: the table of its figures, probe.json, and probe.html with the templates of a run's report.

All text of the model is escaped by the templates.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from igrpo_jax import __version__
from igrpo_jax.outputs.files import number, write_atomically
from igrpo_jax.probe.answers import Answered
from igrpo_jax.probe.conclusion import Conclusion, Setting, shown
from igrpo_jax.probe.estimates import FEW, Estimate
from igrpo_jax.report import pages

EXAMPLES = 2  # of each move, at most

# Names and meanings of the figures by section, in the order of the table.
FIGURES = {
    "Alone": {
        "p": "success of a plain answer, p",
        "best": "one of N plain answers is right",
        "spread": "mean of p (1 - p) over the problems",
        "successes": "right completions that GRPO would see in the run, if p stayed (x)",
        "length_plain": "tokens of a plain answer",
        "drawn": "drafts that algorithm.draft_early_stop draws",
        "cut_plain": "plain answers that were cut at the limit",
    },
    "With a draft": {
        "kept": "the kept draft is right, a",
        "refined": "a refinement is right, p'",
        "r": "success after a right draft, r",
        "alone_right": "plain success on the problems of right drafts",
        "w": "success after a wrong draft, w",
        "alone_wrong": "plain success on the problems of wrong drafts",
        "repair": "what a wrong draft adds to plain success, by the first N answers",
        "times": "how much likelier a wrong draft makes a right answer",
        "fixed": "refinements that are right after a wrong draft, of all",
        "broken": "refinements that are wrong after a right draft, of all",
        "copy": "tokens in common with the draft, from both ends",
        "same_answer": "refinements that state the draft's answer",
        "same_right": "of right drafts, refinements that state the draft's answer",
        "same_wrong": "of wrong drafts, refinements that state the draft's answer",
        "length_refined": "tokens of a refinement",
        "cut_refined": "refinements that were cut at the limit",
        "draft_cut": "kept drafts of which q' has only the end",
    },
    "Signal at equal samples": {
        "plain_active": "GRPO (N + G): groups with a gradient",
        "refined_active": "iGRPO (N + G): groups with a gradient",
        "plain_snr": "GRPO (N + G): SNR^2 of a group",
        "refined_snr": "iGRPO (N + G): SNR^2 of a group",
        "ratio": "SNR^2 of iGRPO over that of GRPO",
        "ratio_early": "the same per sample, with algorithm.draft_early_stop",
        "ratio_trained": "the same with algorithm.train_drafts",
    },
    "Transfer": {
        "cosine": "cosine of the gradients on q' and on the plain prompt",
        "cosine_credited": "the same of right refinements that algorithm.refine_credit = plain trains on",
        "along": "ratio of SNR^2 times the squared cosine",
        "reliance": "rho, log pi(o | q') - log pi(o | q) of right refinements, nats",
        "reliance_right": "rho after right drafts",
        "reliance_wrong": "rho after wrong drafts",
    },
}

# Why figures from gradients and log-probs are not known, by name.
_FEW_RIGHT = f"fewer than {FEW} problems have a right refinement"
_FEW_MIXED = (
    f"fewer than {FEW} problems have right and wrong answers on one of the prompts, or a mean gradient is lost in noise"
)
WANTING = {
    "cosine": _FEW_MIXED,
    "cosine_credited": _FEW_MIXED,
    "reliance": _FEW_RIGHT,
    "reliance_right": f"{_FEW_RIGHT} of a right draft that is kept",
    "reliance_wrong": f"{_FEW_RIGHT} of a wrong draft that is kept",
}


class Example(NamedTuple):
    """A question with a draft and what became of it."""

    title: str
    prompt_id: str
    question: str
    answer: str
    draft: str
    refinement: str


class Row(NamedTuple):
    """What was counted on one problem."""

    prompt_id: str
    question: str
    plain: str
    after_right: str
    after_wrong: str


def table(figures: Mapping[str, Estimate]) -> dict[str, list[tuple[str, str]]]:
    """Returns the meaning of each figure and the figure with its interval, or why it is not known, by section."""

    def text(name: str) -> str:
        reason = "" if figures[name].is_known else WANTING.get(name)
        return f"{shown(figures[name])}: {reason}" if reason else shown(figures[name])

    return {
        section: [(meaning, text(name)) for name, meaning in names.items() if name in figures]
        for section, names in FIGURES.items()
    }


def write(
    folder: Path,
    head: Mapping[str, Any],
    setting: Setting,
    figures: Mapping[str, Estimate],
    conclusion: Conclusion,
    answered: Sequence[Answered],
) -> dict[str, Any]:
    """Writes probe.json, and probe.html next to its style.css; returns what probe.json holds.

    Args:
        head: what probe.json begins with; its values stand under the title of the page too. `gradients` is the number
            of problems whose gradients were compared.
    """
    values = {
        name: {"value": number(x.value), "low": number(x.low), "high": number(x.high)} for name, x in figures.items()
    }
    summary = {**head, **asdict(setting), "conclusion": asdict(conclusion), "figures": values}
    write_atomically(folder / "probe.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    pages.write_asset(folder, "style.css")
    page = {
        "policy": pages.POLICY,
        "title": "Will drafts pay?",
        "version": __version__,
        "written": f"{datetime.now():%Y-%m-%d %H:%M}",
        "facts": [f"{name}: {value}" for name, value in head.items() if value is not None],
        "conclusion": conclusion,
        "sections": table(figures),
        "setting": setting,
        "compared": head["gradients"],
        "examples": examples(answered),
        "rows": [_row(problem) for problem in answered],
    }
    pages.write_page(folder, "probe.html", page)
    return summary


def examples(answered: Sequence[Answered]) -> list[Example]:
    """Returns the first refinements that fixed, broke or kept a draft, at most EXAMPLES of each."""
    titles = {
        (False, True): "fixed: a right answer after a wrong draft",
        (True, False): "broken: a wrong answer after a right draft",
        (False, False): "kept wrong",
        (True, True): "kept right",
    }
    chosen: dict[str, list[Example]] = {title: [] for title in titles.values()}
    for problem in answered:
        for part in problem.refined:
            moves = {titles[part.is_right, completion.score.is_right]: completion for completion in part.completions}
            for title, completion in moves.items():
                if len(chosen[title]) < EXAMPLES:
                    prompt, texts = problem.prompt, (part.draft.text, completion.text)
                    chosen[title].append(Example(title, prompt.id, prompt.question, prompt.answer, *texts))
    return [example for of_title in chosen.values() for example in of_title]


def _row(problem: Answered) -> Row:
    right = lambda completions: f"{sum(completion.score.is_right for completion in completions)} of {len(completions)}"
    after = {part.is_right: right(part.completions) for part in problem.refined}
    prompt = problem.prompt
    return Row(prompt.id, prompt.question, right(problem.plain), after.get(True, ""), after.get(False, ""))
