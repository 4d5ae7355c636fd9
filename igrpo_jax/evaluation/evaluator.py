"""Evaluation on held-out problems: the plain prompt, single shot, whatever the training was; that is the headline.
What counts is the accuracy alone, whatever the rewards of training are.

Beside it, `evaluation.rounds` rounds of draft -> refine on the same samples:

1. Of the first `evaluation.drafts` samples one is chosen: by majority vote of their answers (the first of the largest
   class), and, to show what choosing is worth, by an oracle that knows the answer (the first right one).
2. The chosen draft is put into the prompt, as in training, and that prompt is sampled as often as the plain one.
3. The next round chooses among those.

A prompt is named by the drafts on the way to it, () being the plain one. Where vote and oracle choose the same, they
share its samples. The randomness of a sample is derived from (seed, benchmark, round, problem, sample) alone, neither
from the training step nor from what was sampled before a restart. So two evaluations of the same weights are equal, a
difference is the model's, and a killed one resumes to the same numbers (in float32; in bfloat16 what runs beside a
sample may turn a near tie).
"""

import contextlib
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from igrpo_jax.config import Config
from igrpo_jax.data.catalog import samples_of
from igrpo_jax.data.problems import Row
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import cluster, preemption
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import measures, results
from igrpo_jax.evaluation.results import Rows
from igrpo_jax.models import decoder
from igrpo_jax.outputs.console import Console
from igrpo_jax.records import Completion, Prompt
from igrpo_jax.rewards.verifier import Verifier, check_errors
from igrpo_jax.sampling.scheduler import Request, Scheduler
from igrpo_jax.sampling.scoring import sample_and_score, stage_key
from igrpo_jax.sampling.steps import Sampling

CHAINS = ("vote", "oracle")  # ways to choose a draft


@dataclass(frozen=True)
class Plan:
    """What is asked, and in how many tokens."""

    prompts: dict[str, list[Prompt]]  # by benchmark
    context: int  # tokens the model can read
    max_context: int  # tokens of the longest prompt, with a draft in it where there are rounds
    max_completion: int  # tokens of the longest completion that any prompt has room for
    wanted: int  # tokens that a completion may have where the model's context allows it

    @property
    def length(self) -> int:
        """Most tokens of a prompt and its completion."""
        return min(self.max_context + self.max_completion, self.context)

    def limit(self, tokens: np.ndarray) -> int:
        """Most tokens of a completion of this prompt: up to the model's context, whatever else is asked beside it."""
        return min(self.wanted, self.context - len(tokens))

    @property
    def fingerprint(self) -> str:
        """Of all problems: prompts and answers in their order."""
        facts = {name: [(one.tokens.tolist(), one.answer) for one in some] for name, some in self.prompts.items()}
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def notes(self) -> list[str]:
        shortest = self.context - self.max_context
        if shortest >= self.wanted:
            return []
        return [
            f"completions end with the model's context of {self.context} tokens, at {shortest} tokens after the "
            f"longest prompt, not at {self.wanted}"
        ]


def samples(config: Config, name: str) -> int:
    """Completions per problem of a benchmark."""
    return config.evaluation.samples or samples_of(name)


def plan(config: Config, rows: dict[str, list[Row]], renderer: Renderer, context: int) -> Plan:
    """The prompts of every benchmark; none is left out.

    Args:
        context: tokens the model can read.

    Raises:
        InputError: a prompt leaves no room for an answer in the model's context.
    """

    def prompt(row: Row) -> Prompt:
        return Prompt(row.id, row.index, row.question, row.answer, renderer.plain(row.question), row.columns)

    prompts = {name: [prompt(row) for row in some] for name, some in rows.items()}
    every = [(len(prompt.tokens), name, prompt.id) for name, some in prompts.items() for prompt in some]
    wanted = config.evaluation.max_completion_length or config.rollout.max_completion_length
    if not every:
        return Plan(prompts, context, 0, 0, wanted)
    longest, name, problem = max(every)
    longest += renderer.draft_overhead(wanted) if config.evaluation.rounds else 0
    if longest >= context:
        drafts = " with a draft (at most config.refine.max_draft_length)" if config.evaluation.rounds else ""
        raise InputError(
            f"problem {problem} of {name} has {longest} tokens{drafts}, and the model's context of {context} leaves no "
            "room for an answer; use a model with a longer one, or leave it out"
        )
    return Plan(prompts, context, longest, min(wanted, context - min(every)[0]), wanted)


class Evaluator:
    """Samples and scores benchmarks with a sampler that it shares with the run.

    Args:
        plan: of config.evaluation.
        scheduler: whose engine holds prompts and completions of the `plan`.

    Several processes split the problems.
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
        self._config, self.plan, self._console = config, plan, console
        self._scheduler, self._renderer, self._verifier = scheduler, renderer, verifier
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._classes_of: dict[tuple, list[int]] = {}  # by the answers; a vote must not differ the second time

    def run(
        self, params: decoder.Params, out: Path | None = None, head: dict[str, Any] | None = None, resume: bool = False
    ) -> dict[str, dict[str, Any]]:
        """The summary of every benchmark by its name; `flat` makes metrics of it.

        Args:
            out: folder of rows and summaries (see `results`); None writes nothing.
            head: what summary.json begins with.
            resume: take up the rows in `out`.

        Raises:
            VerifierError: more gradings failed than config.rewards.max_error_fraction allows.
            InputError: with `resume`, rows of other problems.
        """
        summaries = {}
        for name in self.plan.prompts:
            rows = self.sampled(params, name, out, resume)
            # Of one process: a vote that takes too long for the verifier ends otherwise, and others decide by it.
            summaries[name] = cluster.from_first(functools.partial(self.summary, name, rows))
            if out is not None and self._process == 0:
                results.write_summary(out, head or {}, summaries)
        return summaries

    def sampled(
        self,
        params: decoder.Params,
        name: str,
        out: Path | None = None,
        resume: bool = False,
        chains: Sequence[str] = CHAINS,
    ) -> Rows:
        """All rows of a benchmark: the single shot, and the rounds of these chains."""
        prompts = self.plan.prompts[name]
        if out is not None and not resume:
            if self._process == 0:
                results.clear(out, name)
            wait_for_all()
        rows = Rows(out, name, self._process if self._processes > 1 else None)
        self._check(name, rows)
        mine = prompts[self._process :: self._processes]
        with contextlib.suppress(Preempted):  # all leave together
            self._sample_all(params, name, mine, rows, chains)
        rows.close()
        if cluster.any_of(preemption.noted()):
            raise Preempted
        if out is None:
            for part in cluster.gather(json.dumps(list(rows.values())).encode()):
                rows.take(json.loads(part))
        else:
            wait_for_all()
            rows.reload()
            wait_for_all()
            if self._process == 0:
                rows.join()
        return rows

    def _sample_all(
        self, params: decoder.Params, name: str, mine: Sequence[Prompt], rows: Rows, chains: Sequence[str]
    ) -> None:
        """The single shot of some problems, and the rounds."""
        self._sample(params, name, [(prompt, (), prompt.tokens) for prompt in mine], rows, "single shot")
        for number in range(1, self._config.evaluation.rounds + 1):
            asked = {}
            for chain in chains:
                for prompt, drafts in zip(mine, self._chosen(mine, rows, chain, number), strict=True):
                    draft = np.array(rows.of(prompt.index, drafts[:-1])[drafts[-1]]["tokens"], np.int32)
                    asked[prompt.index, drafts] = (prompt, drafts, self._renderer.with_draft(prompt.question, draft))
            self._sample(params, name, list(asked.values()), rows, f"round {number}")

    def paths(self, prompt: Prompt, rows: Rows) -> list[tuple[int, ...]]:
        """The plain prompt and those of the rounds, in the chain that votes."""
        rounds = range(1, self._config.evaluation.rounds + 1)
        return [(), *(self._chosen([prompt], rows, "vote", number)[0] for number in rounds)]

    def summary(self, name: str, rows: Rows) -> dict[str, Any]:
        """The measures of a benchmark's rows: `problems`, `samples`, `single_shot` and, for each round, both chains."""
        prompts, count = self.plan.prompts[name], samples(self._config, name)
        ks = _ks(self._config, name)
        plain = self._answers(prompts, [()] * len(prompts), rows, count)
        rounds = []
        for number in range(1, self._config.evaluation.rounds + 1):
            chains = {}
            for chain in CHAINS:
                paths = self._chosen(prompts, rows, chain, number)
                answers = self._answers(prompts, paths, rows, count)
                draft = [
                    rows.of(prompt.index, path[:-1])[path[-1]]["accuracy"] == 1
                    for prompt, path in zip(prompts, paths, strict=True)
                ]
                chains[chain] = measures.summary(answers, ks) | {"draft_accuracy": float(np.mean(draft))}
                chains[chain] |= measures.refined(np.array(draft), answers.correct)
            rounds.append(chains)
        return {
            "problems": len(prompts),
            "samples": count,
            "single_shot": measures.summary(plain, ks),
            "rounds": rounds,
        }

    def _sample(
        self,
        params: decoder.Params,
        name: str,
        asked: list[tuple[Prompt, tuple[int, ...], np.ndarray]],
        rows: Rows,
        what: str,
    ) -> None:
        """Draws and scores what is missing of the samples of some prompts (problem, drafts, tokens)."""
        numbers, settings = range(samples(self._config, name)), self._config.evaluation
        there = [[rows.get((prompt.index, drafts, i)) for i in numbers] for prompt, drafts, _ in asked]
        missing = [(*one, *gap) for one, some in zip(asked, there, strict=True) for gap in _gaps(some)]
        if not missing:
            return
        before = [row["accuracy"] for some in there for row in some if row]
        right, done, scores = sum(before), len(before), []
        with self._console.phase(f"{name}, {what}", len(asked) * len(numbers), done) as update:

            def scored(prompt: Prompt, drafts: tuple[int, ...], completion: Completion) -> None:
                nonlocal right, done
                rows.add(_row(prompt, drafts, completion, settings.rounds > 0))
                scores.append(completion.score)
                right, done = right + completion.score.rewards["accuracy"], done + 1
                update(done, f"accuracy {right / done:.3f}")

            self._scheduler.start(params, Sampling(settings.temperature, settings.top_p))
            for prompt, drafts, tokens, first, count in missing:
                key = stage_key(self._config.seed, zlib.crc32(name.encode()), len(drafts))
                request = Request(
                    tokens=tokens,
                    index=prompt.index,
                    samples=count,
                    key=key,
                    limit=self.plan.limit(tokens),
                    stage="eval",
                    first=first,
                    prompt=prompt,
                    scored=functools.partial(scored, prompt, drafts),
                )
                self._scheduler.submit(request)
            sample_and_score(self._scheduler, self._verifier.check_answer, self._renderer)
            self._scheduler.finish()
        check_errors(scores, self._config.rewards.max_error_fraction)

    def _chosen(self, prompts: Sequence[Prompt], rows: Rows, chain: str, number: int) -> list[tuple[int, ...]]:
        """For each problem, the drafts on the way to its prompt of round `number`, in the chain of this name."""
        paths: list[tuple[int, ...]] = [()] * len(prompts)
        for _ in range(number):
            drafts = [
                rows.of(prompt.index, path)[: self._config.evaluation.drafts]
                for prompt, path in zip(prompts, paths, strict=True)
            ]
            if chain == "oracle":
                places = [next((i for i, row in enumerate(some) if row["accuracy"] == 1), 0) for some in drafts]
            else:
                places = [measures.vote(classes) or 0 for classes in self._classes(drafts)]
            paths = [(*path, place) for path, place in zip(paths, places, strict=True)]
        return paths

    def _answers(self, prompts: Sequence[Prompt], paths: Sequence[tuple], rows: Rows, count: int) -> measures.Answers:
        every = [rows.of(prompt.index, path)[:count] for prompt, path in zip(prompts, paths, strict=True)]
        grid = lambda read: np.array([[read(row) for row in some] for some in every])
        return measures.Answers(
            correct=grid(lambda row: row["accuracy"] == 1),
            lengths=grid(lambda row: row["token_count"]),
            finished=grid(lambda row: row["finished"]),
            parsed=grid(lambda row: row["extracted"] is not None),
            failed=grid(lambda row: row["status"] in ("timeout", "error")),
            classes=np.array(self._classes(every)),
        )

    def _classes(self, every: list[list[dict]]) -> list[list[int]]:
        """Numbers of the classes of equal answers, for each problem's rows."""
        keys = [tuple(row["extracted"] for row in some) for some in every]
        futures = {key: self._verifier.classes(key) for key in dict.fromkeys(keys) if key not in self._classes_of}
        self._classes_of |= {key: future.result() for key, future in futures.items()}
        return [self._classes_of[key] for key in keys]

    def _check(self, name: str, rows: Rows) -> None:
        known = {prompt.index: (prompt.question, prompt.answer) for prompt in self.plan.prompts[name]}
        for row in rows.values():
            if known.get(row["index"], (row["prompt"], row["answer"])) != (row["prompt"], row["answer"]):
                raise InputError(
                    f"--workdir: its {name}.jsonl answers other problems than {name} has now (the first: "
                    f"{row['prompt_id']}); give another --workdir"
                )
            if self._config.evaluation.rounds and "tokens" not in row:
                raise InputError(
                    f"config.evaluation.rounds = {self._config.evaluation.rounds}: {name}.jsonl in --workdir was "
                    "written without rounds, and its rows lack the tokens of the drafts; give another --workdir"
                )


def wait_for_all() -> None:
    """Returns when every process has come here: what one has written, the others may read from then on."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("evaluation")


def flat(summaries: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The metrics of a run: `eval/NAME/pass@1` and friends; `eval/NAME/refine_1/…`, `…/refine_1_oracle/…` of rounds."""
    metrics = {}
    for name, one in summaries.items():
        metrics |= {f"eval/{name}/{measure}": value for measure, value in one["single_shot"].items()}
        for number, chains in enumerate(one["rounds"], 1):
            for chain, values in chains.items():
                stage = f"refine_{number}" + ("_oracle" if chain == "oracle" else "")
                metrics |= {f"eval/{name}/{stage}/{measure}": value for measure, value in values.items()}
    return metrics


def metric_names(config: Config, plan: Plan) -> list[str]:
    """Returns the names of all metrics that an evaluation of `plan` can write, as `flat` names them.

    `solved_length` and `unsolved_length` are written only where an evaluation has answers of that kind.
    """
    names = []
    for benchmark in plan.prompts:
        measured = measures.summary_names(_ks(config, benchmark))
        names += [f"eval/{benchmark}/{name}" for name in measured]
        for number in range(1, config.evaluation.rounds + 1):
            for stage in (f"refine_{number}", f"refine_{number}_oracle"):
                of_round = [*measured, "draft_accuracy", *measures.REFINED]
                names += [f"eval/{benchmark}/{stage}/{name}" for name in of_round]
    return names


def _ks(config: Config, name: str) -> list[int]:
    """Returns the k of pass@k and maj@k of a benchmark, none above its samples."""
    count = samples(config, name)
    return [k for k in config.evaluation.pass_at or _doubled(count) if k <= count]


def _row(prompt: Prompt, drafts: tuple[int, ...], completion: Completion, with_tokens: bool) -> dict[str, Any]:
    """Returns a row of NAME.jsonl; `tokens` are kept where a later round reads the sample as a draft."""
    score = completion.score
    row = {
        "prompt_id": prompt.id,
        "index": prompt.index,
        "drafts": list(drafts),
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


def _gaps(there: Sequence[object | None]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of None."""
    start = None
    for place, present in enumerate([*there, True]):
        if present is None and start is None:
            start = place
        elif present is not None and start is not None:
            yield start, place - start
            start = None


def _doubled(samples: int) -> list[int]:
    """1, 2, 4, ... up to `samples`, which is always the last."""
    powers = [1 << i for i in range(samples.bit_length())]
    return powers if powers[-1] == samples else [*powers, samples]
