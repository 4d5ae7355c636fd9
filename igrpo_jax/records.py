"""The structs that travel through a step: Prompt -> Completion -> Group. They have no logic except derived facts.

Token ids are plain int32 numpy arrays on the host until the update; nothing sampled is ever decoded and re-encoded on
its way to a loss. Lengths, not pad ids, say which tokens are real. Nothing here imports jax, because verifier workers
import this module.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """The result of grading one completion. Every completion gets a score, but not every score holds a verdict."""

    reward: float  # weighted sum of `rewards`; NaN if there is no verdict (see STATUSES)
    rewards: dict[str, float]  # by reward function: "accuracy", "format", …; unweighted; NaN if it does not apply
    extracted: str | None  # the final answer as found in the text, None if there is none
    status: str  # see STATUSES
    seconds: float = 0.0  # wall time in the worker; a call that several completions share is divided equally
    detail: str = ""  # why a grading failed
    logged: dict[str, list[float]] = field(default_factory=dict)  # what custom rewards gave to `log_metric`, by name
    extra: dict[str, Any] = field(default_factory=dict)  # what they gave to `log_extra` for this completion

    @property
    def is_right(self) -> bool:
        """Whether the answer is right: its accuracy is 1. False without an accuracy reward and without a verdict."""
        return not math.isnan(self.reward) and self.rewards.get("accuracy", 0.0) >= 1.0

    def of(self, name: str) -> float:
        """Returns what one reward function gave; NaN if it does not apply, and without a verdict.

        A completion without a verdict may have some rewards, such as its accuracy where the judge did not reply.
        """
        return math.nan if math.isnan(self.reward) else self.rewards.get(name, math.nan)


# "ok": graded. "unparseable": no answer was found, which is a verdict like any other. The others have no verdict.
# "timeout" and "error": the grading was killed or raised. "invalid": nothing said how good it is, such as when a judge
# did not reply. A completion without a verdict is not in its group's baseline, has advantage 0 and is never the kept
# draft. An evaluation, which has no groups, counts an answer whose grading failed as wrong.
STATUSES = ("ok", "unparseable", "timeout", "error", "invalid")


# The answer expected of a verification, by whether the solution that it was shown is right.
VERDICTS = {True: "1", False: "0"}


def same_answer(draft: str | None, refinement: str | None) -> bool:
    """Returns whether both answers were found and are the same string; None means that no answer was found."""
    return draft is not None and draft == refinement


@dataclass(frozen=True)
class Candidate:
    """A completion as reward functions see it."""

    text: str  # special tokens removed
    answer: str  # the reference answer; "" if there is none
    opening: str = ""  # how the chat template begins the reply, for example "<think>"
    question: str = ""
    columns: dict = field(default_factory=dict)  # the data set row's other columns
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # [T] int32, EOS included
    sample_id: int = 0  # within its prompt; a custom reward sees the completions of a request in this order
    stage: str = ""  # as in Completion
    draft: str | None = None  # text of the draft that its prompt shows, whole; None if it shows none


@dataclass(frozen=True)
class Prompt:
    """One problem as the policy sees it."""

    id: str  # name of the row in the data set, as files and pages show it
    index: int  # number of the row in the data set, from 0
    question: str
    answer: str  # the reference answer; "" if there is none
    tokens: np.ndarray  # [L] int32, chat template and generation prompt included
    columns: dict = field(default_factory=dict)  # the row's other columns


@dataclass(frozen=True)
class Completion:
    """One sampled answer: a draft (Stage 1), a refinement or a verification (Stage 2), or one of an evaluation."""

    stage: str  # "draft", "refine" or "verify" in a rollout, "eval" in an evaluation
    sample_id: int  # 0..N-1 or 0..G-1 within its prompt; below N * G where every draft is refined (draft_selection)
    tokens: np.ndarray  # [T] int32, the EOS included where the model ended by itself
    logprobs: np.ndarray  # [T] float32, of each token under the sampler at the sampling temperature, in nats
    finished: bool  # ended by an EOS token, not by the length limit
    text: str = ""  # the decoded tokens, for the verifier, files and the console
    score: Score | None = None  # None until the verifier has answered
    # Shannon entropy of the sampler at the sampling temperature, before top-p and top-k, summed over the tokens; nats.
    entropy: float = 0.0


@dataclass(frozen=True)
class Group:
    """A prompt with its N drafts, the draft that was kept, and the G refinements with one advantage baseline.

    Drafts are not among the `completions`: these are only the refinements, also where drafts are trained on. With
    algorithm.second_stage = "verify" drafts are solutions, and the completions are verifications of the kept one.
    """

    prompt: Prompt
    drafts: tuple[Completion, ...]  # N, may be empty
    kept: int | None  # index into drafts of the draft in q' (algorithm.draft_selection); None = the plain prompt
    context: np.ndarray  # [L'] int32: q' = prompt with the kept draft spliced in; the plain prompt where kept is None
    completions: tuple[Completion, ...]  # the G refinements; none where `stages` leaves Stage 2 out

    def reference_answer(self, completion: Completion) -> str:
        """Returns what one of the samples is graded against: a verification against the verdict on its solution."""
        if completion.stage != "verify":
            return self.prompt.answer
        assert self.kept is not None, "a verification was shown a solution"
        return VERDICTS[self.drafts[self.kept].score.is_right]

    @property
    def rewards(self) -> np.ndarray:
        """Rewards of the refinements, [G] float32."""
        return np.array([completion.score.reward for completion in self.completions], np.float32)

    @property
    def of_drafts(self) -> "Group":
        """The drafts as a separate group: they are its completions, and the plain prompt is its context.

        algorithm.train_drafts trains on it.
        """
        return Group(self.prompt, (), None, self.prompt.tokens, self.drafts)
