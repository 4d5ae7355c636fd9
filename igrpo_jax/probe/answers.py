"""The answers of a probe: plain ones, and refinements of drafts that Stage 1 would keep. They are kept in a file.

Each problem gets K plain answers. Any N consecutive ones, in a circle, are a set of drafts as Stage 1 draws it, of
which `select_draft` keeps one. The first kept draft that is right and the first that is wrong, where there are
such, are each refined G times, with the temperature, lengths and wording of training, while other problems still get
plain answers.

A row of `answers.jsonl` has the number of the draft behind it in `drafts` (none for a plain answer), as the rows of an
evaluation have. A second start draws what is missing, and what could not be graded.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import watchdog
from igrpo_jax.evaluation.results import Rows, drop_failed
from igrpo_jax.learning.selection import select_draft
from igrpo_jax.learning.stages import SELECTION, STAGES
from igrpo_jax.models import decoder
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.files import number
from igrpo_jax.outputs.metrics import content, copy_ratio, same_answer
from igrpo_jax.probe.estimates import NONE, Counts
from igrpo_jax.records import Completion, Prompt, Score
from igrpo_jax.rewards.failures import check_errors
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.scoring import sample_and_score, stage_key
from igrpo_jax.sampling.state import Sampling

NAME = "answers"  # of the file of rows
TEXTS = ("length_plain", "length_refined", "cut_plain", "cut_refined", "draft_cut", "copy", "same_answer")


@dataclass(frozen=True)
class Refined:
    """The refinements of one draft of a problem."""

    draft: Completion
    context: np.ndarray  # [L'] int32, q'
    completions: tuple[Completion, ...]  # G

    @property
    def is_right(self) -> bool:
        """Whether the draft is right."""
        return self.draft.score.is_right


@dataclass(frozen=True)
class Answered:
    """One problem with all its answers."""

    prompt: Prompt
    plain: tuple[Completion, ...]  # K
    kept: np.ndarray  # [K] bool, whether the kept draft of each set is right; shorter where a set keeps none
    refined: tuple[Refined, ...]  # of a right draft, of a wrong one, or of both

    @property
    def lacks(self) -> str:
        """What it lacks to be counted; "" if it lacks nothing."""
        every = [*self.plain, *(completion for part in self.refined for completion in part.completions)]
        if any(np.isnan(completion.score.reward) for completion in every):
            return "a verdict on an answer"
        if len(self.kept) < len(self.plain):
            return "a draft in each set that has config.algorithm.draft_metric"
        return ""

    def weight(self, part: Refined) -> float:
        """Returns the fraction of sets whose kept draft is right or wrong in the same way as that of `part`."""
        return float(np.mean(self.kept == part.is_right))


class Part(NamedTuple):
    """Samples of a problem that are drawn together."""

    stage: str  # "draft" of plain answers, "refine" of refinements
    path: tuple[int, ...]  # the number of the draft in the context
    context: np.ndarray  # [L] int32
    numbers: range  # of the samples


class Answers:
    """Draws the answers that the rows in `folder` lack, and returns all answers.

    Args:
        samples: K, plain answers to each problem.
        verifier: gives the rewards of training.
    """

    def __init__(
        self,
        config: Config,
        renderer: Renderer,
        scheduler: Scheduler,
        verifier: Verifier,
        console: Console,
        folder: Path,
        samples: int,
    ):
        self._config = config
        self._renderer = renderer
        self._scheduler = scheduler
        self._verifier = verifier
        self._console = console
        self._samples = samples
        drop_failed(folder, NAME, 0.0)  # a problem without all its verdicts is left out
        self._rows = Rows(folder, NAME)

    def collect(self, params: decoder.Params, prompts: Sequence[Prompt]) -> list[Answered]:
        """Returns the answers to `prompts`, in their order.

        Raises:
            VerifierError: more gradings failed than config.rewards.max_error_fraction allows, those of an earlier
                launch among them.
        """
        self._verifier.start_step(1)
        missing = [(prompt, self._next(prompt)) for prompt in prompts]
        with contextlib.closing(self._rows):
            if any(parts for _, parts in missing):
                self._draw(params, missing)
        answered = [self._answered(prompt) for prompt in prompts]
        plain = [completion.score for problem in answered for completion in problem.plain]
        refined = [x.score for problem in answered for part in problem.refined for x in part.completions]
        for scores in (plain, refined):
            check_errors(scores, self._config.rewards.max_error_fraction)
        self._rows.join()
        return answered

    def _plain(self, prompt: Prompt) -> list[Completion]:
        return [completion_of(row, "draft") for row in self._rows.of(prompt.index)][: self._samples]

    def _kept(self, prompt: Prompt) -> list[int]:
        """Returns the number of each set's kept draft, without sets in which no draft has algorithm.draft_metric."""
        plain, algorithm, seed = self._plain(prompt), self._config.algorithm, self._config.seed
        seed_of_prompt = [seed, prompt.index, SELECTION]
        return kept_drafts(
            plain, algorithm.num_drafts, algorithm.draft_selection, algorithm.draft_metric, seed_of_prompt
        )

    def _contexts(self, prompt: Prompt) -> list[tuple[tuple[int, ...], np.ndarray]]:
        """Returns the number of each draft that is refined, with q'."""
        plain = self._plain(prompt)
        first: dict[bool, int] = {}
        for draft in self._kept(prompt):
            first.setdefault(plain[draft].score.is_right, draft)
        shown = lambda draft: self._renderer.with_draft(prompt.question, draft.tokens, draft.score.is_right)
        return [((draft,), shown(plain[draft])) for draft in first.values()]

    def _answered(self, prompt: Prompt) -> Answered:
        plain, size = self._plain(prompt), self._config.algorithm.num_generations
        refined = []
        for path, context in self._contexts(prompt):
            rows = self._rows.of(prompt.index, path)[:size]
            refined.append(Refined(plain[path[0]], context, tuple(completion_of(row, "refine") for row in rows)))
        kept = np.array([plain[draft].score.is_right for draft in self._kept(prompt)], bool)
        return Answered(prompt, tuple(plain), kept, tuple(refined))

    def _next(self, prompt: Prompt) -> list[Part]:
        """Returns the parts of a prompt to draw next: plain answers, or refinements once all plain answers exist."""
        wanted: list[tuple[str, tuple[int, ...], np.ndarray, int]] = [("draft", (), prompt.tokens, self._samples)]
        if len(self._plain(prompt)) == self._samples:
            size = self._config.algorithm.num_generations
            wanted = [("refine", path, context, size) for path, context in self._contexts(prompt)]
        parts = [
            Part(stage, path, context, range(len(self._rows.of(prompt.index, path)), count))
            for stage, path, context, count in wanted
        ]
        return [part for part in parts if part.numbers]

    def _draw(self, params: decoder.Params, missing: Sequence[tuple[Prompt, list[Part]]]) -> None:
        """Draws and scores what is missing; a prompt is refined as soon as it has all its plain answers."""
        settings, right, drawn = self._config.rollout, 0, 0
        most = 2 * self._config.algorithm.num_generations  # refinements of a prompt; half if its kept drafts agree
        drafting = {prompt.index for prompt, parts in missing if parts and parts[0].stage == "draft"}
        total = len(missing) * (self._samples + most)
        done = total - most * len(drafting) - sum(len(part.numbers) for _, parts in missing for part in parts)

        def submit(prompt: Prompt, parts: Sequence[Part]) -> None:
            for part in parts:
                self._scheduler.submit(
                    Request(
                        tokens=part.context,
                        index=prompt.index,
                        samples=len(part.numbers),
                        key=stage_key(self._config.seed, 0, STAGES[part.stage]),  # steps of training begin at 1
                        limit=settings.max_completion_length,
                        stage=part.stage,
                        first=part.numbers.start,
                        may_follow_up=lambda: prompt.index in drafting,
                        prompt=prompt,
                        scored=functools.partial(scored, prompt, part.path),
                    )
                )

        with self._console.phase("answers", total, done) as update, watchdog.phase("rollout", "answers"):

            def scored(prompt: Prompt, path: tuple[int, ...], completion: Completion) -> None:
                nonlocal done, right, drawn
                self._rows.add(_row(prompt, path, completion))
                done += 1
                if not path:
                    drawn, right = drawn + 1, right + completion.score.is_right
                # What a kill left behind a gap is drawn again, perhaps only after the prompt is refined.
                if prompt.index in drafting and len(self._plain(prompt)) == self._samples:
                    drafting.remove(prompt.index)
                    parts = self._next(prompt)
                    done += most - sum(len(part.numbers) for part in parts)
                    submit(prompt, parts)
                update(done, f"plain ones right {right / drawn:.3f}" if drawn else "")

            self._scheduler.start(params, Sampling(settings.temperature, settings.top_p, settings.top_k))
            for prompt, parts in missing:
                submit(prompt, parts)
            sample_and_score(self._scheduler, self._verifier.submit, self._renderer)
            self._scheduler.finish()


def kept_drafts(
    plain: Sequence[Completion], drafts: int, selection: str, metric: str, seed: Sequence[int]
) -> list[int]:
    """Returns the number of the draft that Stage 1 keeps of each set of `drafts` consecutive answers, in a circle.

    A set in which no draft has the reward `metric` is left out.
    """
    numbers = []
    for start in range(len(plain)):
        of_set = [(start + i) % len(plain) for i in range(drafts)]
        kept = select_draft([plain[i] for i in of_set], selection, np.random.default_rng([*seed, start]), metric)
        if kept is not None:
            numbers.append(of_set[kept])
    return numbers


def counts(answered: Sequence[Answered], drafts: int) -> Counts:
    """Returns the counts of problems that lack nothing."""

    def after(problem: Answered, draft: bool) -> int:
        parts = [part for part in problem.refined if part.is_right == draft]
        return sum(completion.score.is_right for completion in parts[0].completions) if parts else NONE

    return Counts(
        plain=np.array([[completion.score.is_right for completion in problem.plain] for problem in answered]),
        kept=np.array([problem.kept for problem in answered]),
        after_right=np.array([after(problem, True) for problem in answered]),
        after_wrong=np.array([after(problem, False) for problem in answered]),
        drafts=drafts,
        refinements=len(answered[0].refined[0].completions),
    )


def texts(answered: Sequence[Answered], draft_limit: int) -> dict[str, np.ndarray]:
    """Returns measures of the texts of each problem, [P] each; NaN if a problem has no such text.

    Mean lengths in tokens (length_plain, length_refined), the fraction that was cut (cut_plain, cut_refined), copy (as
    refine/copy_ratio), same_answer (as refine/same_answer), same_right and same_wrong (the same after right and after
    wrong drafts), draft_cut (fraction of drafts of which q' has only the end).
    """
    of_problems = [_texts(problem, draft_limit) for problem in answered]
    names = (*TEXTS, "same_right", "same_wrong")
    return {name: np.array([values.get(name, np.nan) for values in of_problems], float) for name in names}


def _texts(problem: Answered, draft_limit: int) -> dict[str, float]:
    """Returns measures of the texts of one problem; refinements are weighted by how often such a draft is kept."""
    values = {
        "length_plain": float(np.mean([len(completion.tokens) for completion in problem.plain])),
        "cut_plain": float(np.mean([not completion.finished for completion in problem.plain])),
    }
    for part in problem.refined:
        draft, completions, weight = part.draft, part.completions, problem.weight(part)
        same = [same_answer(draft.score.extracted, completion.score.extracted) for completion in completions]
        measured: dict[str, Sequence[float]] = {
            "same_answer": same,
            "copy": [copy_ratio(content(draft), content(completion)) for completion in completions],
            "length_refined": [len(completion.tokens) for completion in completions],
            "cut_refined": [not completion.finished for completion in completions],
            "draft_cut": [len(content(draft)) > draft_limit],
        }
        values |= {name: values.get(name, 0.0) + weight * float(np.mean(x)) for name, x in measured.items()}
        values["same_right" if part.is_right else "same_wrong"] = float(np.mean(same))
    return values


def completion_of(row: dict[str, Any], stage: str) -> Completion:
    """Returns a row as a completion; the sampler's log-probs, which nothing here reads, are 0."""
    known = lambda value: np.nan if value is None else value
    rewards = {name: known(value) for name, value in row["rewards"].items()}
    score = Score(known(row["reward"]), rewards, row["extracted"], row["status"])
    tokens = np.array(row["tokens"], np.int32)
    logprobs = np.zeros(len(tokens), np.float32)
    return Completion(stage, row["sample_id"], tokens, logprobs, row["finished"], row["text"], score)


def _row(prompt: Prompt, path: tuple[int, ...], completion: Completion) -> dict[str, Any]:
    score = completion.score
    return {
        "prompt_id": prompt.id,
        "index": prompt.index,
        "drafts": list(path),
        "sample_id": completion.sample_id,
        "prompt": prompt.question,
        "answer": prompt.answer,
        "text": completion.text,
        "tokens": completion.tokens.tolist(),
        "finished": completion.finished,
        "extracted": score.extracted,
        "reward": number(score.reward),
        "rewards": {name: number(value) for name, value in score.rewards.items()},
        "status": score.status,
    }
