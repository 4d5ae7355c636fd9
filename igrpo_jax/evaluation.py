"""Single-shot evaluation on held-out problems: the plain prompt, no draft, no selection, whatever the training was.
What counts is the accuracy alone, whatever the rewards of training are.

The samples' randomness is derived from (seed, benchmark, problem, sample) and not from the step, so two evaluations of
the same weights are equal and a difference is the model's.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from igrpo_jax.batch import Completion, Prompt
from igrpo_jax.config import Config
from igrpo_jax.metrics import write_atomically
from igrpo_jax.models import decoder
from igrpo_jax.prompts import Renderer
from igrpo_jax.rewards.reward import Verifier, check_errors
from igrpo_jax.rollout import Target, sample_and_score, stage_key
from igrpo_jax.sampling.scheduler import Request, Scheduler
from igrpo_jax.sampling.steps import Sampling


def max_completion(c: Config) -> int:
    """Tokens an evaluated completion may have."""
    return c.evaluation.max_completion_length or c.rollout.max_completion_length


def evaluate(
    c: Config,
    params: decoder.Params,
    benchmarks: dict[str, Sequence[Prompt]],
    scheduler: Scheduler,
    renderer: Renderer,
    verifier: Verifier,
    out: Path | None = None,
) -> dict[str, float]:
    """Metrics `eval/NAME/pass@1` and friends of every benchmark.

    Args:
        out: folder for NAME.jsonl with one row per sample; None writes nothing.

    Returns:
        For each benchmark pass@1 (mean accuracy over problems and samples), mean_length (tokens), clipped_ratio (share
        cut at the length limit), error_frac (gradings that failed or ran out of time) and unparseable_frac (share
        without a stated answer).

    Raises:
        VerifierError: more gradings failed than config.rewards.max_error_fraction allows.
    """
    settings = c.evaluation
    metrics = {}
    for name, prompts in benchmarks.items():
        scheduler.start(params, Sampling(settings.temperature, settings.top_p))
        key = stage_key(c.seed, zlib.crc32(name.encode()), 0)
        answered: list[dict[int, Completion]] = [{} for _ in prompts]
        for prompt, into in zip(prompts, answered, strict=True):
            target = Target(prompt, "eval", into)
            limit = max_completion(c)
            scheduler.submit(Request(prompt.tokens, prompt.index, settings.samples, key, limit, target))
        sample_and_score(scheduler, verifier.check_answer, renderer)
        scheduler.finish()
        samples = [into[i] for into in answered for i in sorted(into)]
        check_errors([one.score for one in samples], c.rewards.max_error_fraction)
        metrics |= {f"eval/{name}/{measure}": value for measure, value in _measures(samples).items()}
        if out is not None:
            _write(out / f"{name}.jsonl", prompts, answered)
    return metrics


def _measures(samples: list[Completion]) -> dict[str, float]:
    return {
        "pass@1": float(np.mean([one.score.rewards["accuracy"] for one in samples])),
        "mean_length": float(np.mean([len(one.tokens) for one in samples])),
        "clipped_ratio": float(np.mean([not one.finished for one in samples])),
        "error_frac": float(np.mean([one.score.status in ("timeout", "error") for one in samples])),
        "unparseable_frac": float(np.mean([one.score.status == "unparseable" for one in samples])),
    }


def _write(path: Path, prompts: Sequence[Prompt], answered: list[dict[int, Completion]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt_id": prompt.id,
            "sample_id": i,
            "prompt": prompt.question,
            "text": into[i].text,
            "token_count": len(into[i].tokens),
            "finished": into[i].finished,
            "extracted": into[i].score.extracted,
            "answer": prompt.answer,
            "accuracy": into[i].score.rewards["accuracy"],
        }
        for prompt, into in zip(prompts, answered, strict=True)
        for i in sorted(into)
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
