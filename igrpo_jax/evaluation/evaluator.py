"""Evaluates a policy on held-out problems. The main result is the single shot: answers to the plain prompt, also where
the policy was trained with drafts. Only accuracy counts, whatever the rewards of training are.

`evaluation.rounds` adds rounds of draft -> refine, which start from the single-shot samples:

1. `summaries` chooses one of the first `evaluation.drafts` samples as the draft.
2. The chosen draft is put into the prompt, as in training, and that prompt is sampled as often as the plain one.
3. The next round chooses among those.

The numbers of the drafts chosen so far, one per round, identify a prompt; () is the plain one. Where vote and oracle
choose the same draft, they use the same samples.

The randomness of a sample is derived only from (seed, benchmark, round, problem, sample), neither from the training
step nor from what was sampled before a restart. So two evaluations of the same weights give the same numbers, also
where one was killed and resumed, and a difference between two evaluations comes from the weights. This holds in
float32; in bfloat16 the other samples of a batch may decide a near tie.
"""

import contextlib
import functools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from igrpo_jax.config import Config
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import cluster, preemption
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.errors import InputError, quoted
from igrpo_jax.evaluation import results
from igrpo_jax.evaluation.planning import Plan, samples_per_problem
from igrpo_jax.evaluation.results import Rows
from igrpo_jax.evaluation.summaries import CHAINS, Summaries
from igrpo_jax.models import decoder
from igrpo_jax.outputs.console import Console
from igrpo_jax.records import Completion, Prompt, Score
from igrpo_jax.rewards.failures import check_errors
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.scoring import sample_and_score, stage_key
from igrpo_jax.sampling.state import Sampling


class RoundPrompt(NamedTuple):
    """A problem's plain prompt, or its prompt in a round of draft -> refine."""

    prompt: Prompt
    drafts: tuple[int, ...]  # sample numbers of the drafts chosen so far, one per round; () for the plain prompt
    tokens: np.ndarray  # [L] int32, with the last draft in it


class Evaluator:
    """Samples and scores benchmarks with a sampler that it shares with the run. Several processes split the problems.

    Args:
        plan: the benchmarks and lengths of config.evaluation.
        scheduler: its engine must be large enough for the prompts and completions of `plan`.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        scheduler: Scheduler,
        renderer: Renderer,
        verifier: Verifier,
        console: Console,
    ):
        self.plan = plan
        self._config = config
        self._scheduler = scheduler
        self._renderer = renderer
        self._verifier = verifier
        self._console = console
        self._summaries = Summaries(config, plan, verifier)
        self._process = jax.process_index()
        self._processes = jax.process_count()

    def run(
        self, params: decoder.Params, out: Path | None = None, head: dict[str, Any] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Returns the summary of every benchmark by its name; `summaries.flat` makes metrics of it.

        Args:
            out: folder of rows and summaries (see `results`); None writes nothing. Of the rows that it holds only what
                is missing is drawn, and what a verifier failed on too often.
            head: what summary.json begins with.

        Raises:
            VerifierError: more gradings failed than config.rewards.max_error_fraction allows.
            InputError: `out` holds rows of other problems.
        """
        summaries: dict[str, dict[str, Any]] = {}
        for name in self.plan.prompts:
            rows = self.sampled(params, name, out)
            # One process decides: where the verifier takes too long for a vote, processes might decide differently.
            summaries[name] = cluster.from_first(functools.partial(self._summaries.summary, name, rows))
            if out is not None and self._process == 0:
                results.write_summary(out, head or {}, summaries)
        return summaries

    def sampled(
        self,
        params: decoder.Params,
        name: str,
        out: Path | None = None,
        chains: Sequence[str] = CHAINS,
    ) -> Rows:
        """Returns all rows of a benchmark: the single shot, and the rounds of the given `chains`."""
        prompts = self.plan.prompts[name]
        if out is not None:
            if self._process == 0:
                results.drop_failed(out, name, self._config.rewards.max_error_fraction)
            _wait_for_all()
        rows = Rows(out, name, self._process if self._processes > 1 else None)
        self._check(name, rows, out)
        own = [prompts[position] for position in self._scheduler.positions(len(prompts))]
        with contextlib.closing(rows):
            self._sample_all(params, name, own, rows, chains)
        if out is None:
            # JSON makes the rows the same as those of NAME.jsonl, and in ASCII it can hold lone surrogates.
            for part in cluster.share(list(rows.values())):
                rows.take(part)
        else:
            _wait_for_all()
            rows.reload()
            _wait_for_all()
            if self._process == 0:
                rows.join()
        return rows

    def paths(self, prompt: Prompt, rows: Rows) -> list[tuple[int, ...]]:
        """Returns `RoundPrompt.drafts` of the plain prompt, (), and of each round's prompt in the chain "vote"."""
        rounds = range(1, self._config.evaluation.rounds + 1)
        return [(), *(self._summaries.chosen([prompt], rows, "vote", number, sampled=1)[0] for number in rounds)]

    def _sample_all(
        self, params: decoder.Params, name: str, prompts: Sequence[Prompt], rows: Rows, chains: Sequence[str]
    ) -> None:
        """Samples the single shot and the rounds of `prompts`."""
        plain = [RoundPrompt(prompt, (), prompt.tokens) for prompt in prompts]
        self._sample(params, name, plain, rows, 0)
        for number in range(1, self._config.evaluation.rounds + 1):
            asked = {}
            for chain in chains:
                for prompt, drafts in zip(prompts, self._summaries.chosen(prompts, rows, chain, number), strict=True):
                    draft = np.array(rows.of(prompt.index, drafts[:-1])[drafts[-1]]["tokens"], np.int32)
                    tokens = self._renderer.with_draft(prompt.question, draft)
                    asked[prompt.index, drafts] = RoundPrompt(prompt, drafts, tokens)
            self._sample(params, name, list(asked.values()), rows, number)

    def _sample(self, params: decoder.Params, name: str, asked: Sequence[RoundPrompt], rows: Rows, number: int) -> None:
        """Draws and scores those samples of the prompts that `rows` lack.

        Args:
            number: of the round, 0 for the single shot.

        Raises:
            Preempted: a process received SIGTERM; then all leave here.
        """
        count, settings = samples_per_problem(self._config, name), self._config.evaluation
        present = [[rows.get((each.prompt.index, each.drafts, i)) for i in range(count)] for each in asked]
        missing = [(each, gap) for each, samples in zip(asked, present, strict=True) for gap in _gaps(samples)]
        # A program that all processes must run, even if they lack nothing, moves the weights to the sampler's mesh.
        if not cluster.any_of(bool(missing)):
            return
        # Computed once on all processes: under the mesh of all of them it is a program of all devices.
        key = stage_key(self._config.seed, zlib.crc32(name.encode()), number)
        before = [row for samples in present for row in samples if row]
        right, done = sum(row["accuracy"] for row in before), len(before)
        graded = any(each.prompt.answer for each in asked)  # questions of `generate` have no reference answer
        scores = [Score(row["accuracy"], {}, row["extracted"], row["status"]) for row in before]
        what = f"round {number}" if number else "single shot"
        with self._console.phase(f"{name}, {what}", len(asked) * count, done) as update:

            def scored(asked: RoundPrompt, completion: Completion) -> None:
                nonlocal right, done
                rows.add(_row(asked, completion, settings.rounds > 0))
                scores.append(completion.score)
                right += completion.score.rewards["accuracy"]
                done += 1
                update(done, f"accuracy {right / done:.3f}" if graded else "")

            requests = [
                Request(
                    tokens=each.tokens,
                    index=each.prompt.index,
                    samples=samples,
                    key=key,
                    limit=self.plan.limit(each.tokens),
                    stage="eval",
                    first=first,
                    prompt=each.prompt,
                    scored=functools.partial(scored, each),
                )
                for each, (first, samples) in missing
            ]
            with contextlib.suppress(Preempted):  # below, all processes leave together
                self._draw(params, requests)
        if cluster.any_of(preemption.noted()):
            raise Preempted
        # Of all processes, as `results.drop_failed` counts them, so that none continues alone.
        parts = cluster.share([(score.status, score.detail) for score in scores])
        everyone = [Score(0.0, {}, None, status, detail=detail) for part in parts for status, detail in part]
        check_errors(everyone, self._config.rewards.max_error_fraction)

    def _draw(self, params: decoder.Params, requests: Sequence[Request]) -> None:
        """Samples and scores `requests` of this process."""
        settings = self._config.evaluation
        self._scheduler.start(params, Sampling(settings.temperature, settings.top_p))
        try:
            for request in requests:
                self._scheduler.submit(request)
            sample_and_score(self._scheduler, self._verifier.check_answer, self._renderer)
        finally:
            self._scheduler.finish()

    def _check(self, name: str, rows: Rows, out: Path | None) -> None:
        """Raises InputError if `rows`, which `out` holds, are of other problems, or lack what the rounds need."""
        known = {prompt.index: prompt for prompt in self.plan.prompts[name]}
        for row in rows.values():
            prompt = known.get(row["index"])
            if prompt is not None and (row["prompt"], row["answer"]) != (prompt.question, prompt.answer):
                raise InputError(
                    f"--workdir {out}: {_changed(name, row, prompt)}; give another --workdir, or the old {name}"
                )
            if self._config.evaluation.rounds and "tokens" not in row:
                raise InputError(
                    f"config.evaluation.rounds = {self._config.evaluation.rounds}: {name}.jsonl in {out} was written "
                    "without rounds, and its rows lack the tokens of the drafts; give another --workdir"
                )


def _changed(name: str, row: dict[str, Any], prompt: Prompt) -> str:
    """Returns how a problem of the benchmark `name` differs from that of a row that an earlier evaluation wrote."""
    if row["prompt"] != prompt.question:
        return (
            f"its {name}.jsonl answers different questions from those that {name} has now (the first is in row "
            f"{row['prompt_id']})"
        )
    return (
        f"its {name}.jsonl was graded against different reference answers (the first is in row {prompt.id}: "
        f"{quoted(row['answer'])} there, {quoted(prompt.answer)} now)"
    )


def _wait_for_all() -> None:
    """Waits until every process has come here; after that, all may read what one has written."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("evaluation")


def _row(asked: RoundPrompt, completion: Completion, with_tokens: bool) -> dict[str, Any]:
    """Returns a row of NAME.jsonl; `tokens` are kept where a later round reads the sample as a draft."""
    prompt, score = asked.prompt, completion.score
    row = {
        "prompt_id": prompt.id,
        "index": prompt.index,
        "drafts": list(asked.drafts),
        "sample_id": completion.sample_id,
        "prompt": prompt.question,
        "text": completion.text,
        "token_count": len(completion.tokens),
        "finished": completion.finished,
        "extracted": score.extracted,
        "answer": prompt.answer,
        "accuracy": score.rewards["accuracy"],
        "status": score.status,
    }
    return row | {"tokens": completion.tokens.tolist()} if with_tokens else row


def _gaps(samples: Sequence[object | None]) -> Iterator[tuple[int, int]]:
    """Yields (first, count) of each run of None."""
    start = None
    for number, sample in enumerate([*samples, True]):
        if sample is None and start is None:
            start = number
        elif sample is not None and start is not None:
            yield start, number - start
            start = None
