"""Samples and scores queued requests at the same time. The rollout and the evaluation share it.

1. The caller submits requests that carry their problem (`prompt`) and a callback (`scored`) to the scheduler.
2. `sample_and_score` runs the scheduler, and gives each sample to the verifier as soon as it is drawn, together with
   the `Batch` of its request, whose completions a custom reward sees all at once.
3. Once a score is there, the callback of its request gets the completion with it, and may submit more requests.

The verifier works while the device samples. Where much of what the next dispatch might draw depends on scores that have
just been asked for, the dispatch waits a little: a decode step of few rows takes nearly as long as one of many. Scores
come in any order; no result may depend on it.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import numpy as np

from igrpo_jax.distributed import preemption, watchdog
from igrpo_jax.records import Candidate, Completion, Score
from igrpo_jax.rewards.custom import Batch
from igrpo_jax.sampling.requests import Request, Sample
from igrpo_jax.sampling.scheduler import Scheduler

if TYPE_CHECKING:
    from igrpo_jax.data.prompts import Renderer  # with transformers, which sampling does not need

Grade = Callable[[Candidate, Batch], Future[Score]]
_Grading = dict[Future[Score], tuple[Request, Completion]]  # the completions whose scores are to come


def stage_key(seed: int, step: int, stage: int) -> np.ndarray:
    """Returns the key data [2] uint32 of one stage of one step; prompts, samples and positions fold in after it.

    Args:
        step: the step of the run, or in an evaluation a number that stands for the benchmark.
        stage: the number of the stage, 1 or 2, or in an evaluation that of the round, 0 for the single shot.
    """
    return np.asarray(_stage_key(seed, np.uint32(step), np.uint32(stage)))


@functools.partial(jax.jit, static_argnums=0)  # in eager mode each operation would be a dispatch
def _stage_key(seed: int, step: jax.Array, stage: jax.Array) -> jax.Array:
    """Returns the key data of `stage_key`."""
    return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), stage))


def sample_and_score(scheduler: Scheduler, grade: Grade, renderer: "Renderer") -> float:
    """Runs until every queued request, and every request that a callback submits in the meantime, is sampled and
    scored.

    A process that does not lead its team has no requests: it follows the leader until the leader is done. Only the
    leader reacts to SIGTERM, and then stops the whole team.

    Args:
        scheduler: started; all its requests have a `prompt` and a `scored`.
        grade: called with a candidate and the batch of its request; returns at once; its future never raises.

    Returns:
        Seconds in which the host waited only for the verifier.

    Raises:
        Preempted: the machine is about to be taken away.
    """
    if not scheduler.leads:
        with watchdog.phase("following"):
            scheduler.follow()
        return 0.0
    waited = 0.0
    grading: _Grading = {}
    with _open_batches() as batches:
        while scheduler.pending or grading:
            preemption.check()
            if scheduler.pending:
                began = time.perf_counter()
                with watchdog.phase("dispatch"):
                    samples = scheduler.advance()
                # Half a dispatch is the most that waiting can lose where scores take long.
                patience = (time.perf_counter() - began) / 2
                awaited = _submit_gradings(samples, grade, renderer, batches, grading)
                if 2 * len(awaited) > scheduler.demand:
                    waited += _wait_for_all(awaited, patience)
            else:
                waited += _wait_for_any(grading)
            _deliver_scores(grading)
    return waited


def _submit_gradings(
    samples: list[Sample], grade: Grade, renderer: "Renderer", batches: dict[Request, Batch], grading: _Grading
) -> list[Future[Score]]:
    """Has samples graded, and adds them to `grading`; returns the scores that may bring more requests."""
    awaited = []
    for sample in samples:
        completion, candidate = _completed(sample, renderer)
        batch = batches.setdefault(sample.request, Batch(sample.request.samples))
        future = grade(candidate, batch)
        grading[future] = (sample.request, completion)
        if sample.request.may_follow_up():
            awaited.append(future)
    return awaited


def _wait_for_all(awaited: list[Future[Score]], patience: float) -> float:
    """Waits for these scores, at most `patience` seconds, and returns the seconds that it took."""
    began = time.perf_counter()
    wait(awaited, timeout=patience)
    return time.perf_counter() - began


def _wait_for_any(grading: _Grading) -> float:
    """Waits for the next score, and returns the seconds that it took."""
    began = time.perf_counter()
    with watchdog.phase("verifier", f"{len(grading)} scores to come"):
        while not wait(grading, timeout=1.0, return_when=FIRST_COMPLETED).done:
            preemption.check()
    return time.perf_counter() - began


def _deliver_scores(grading: _Grading) -> None:
    """Gives each completion whose score is there to the callback of its request, and takes it out of `grading`."""
    for future in [future for future in grading if future.done()]:
        request, completion = grading.pop(future)
        assert request.scored is not None, "a request whose samples are scored has a callback"
        request.scored(replace(completion, score=future.result()))


@contextlib.contextmanager
def _open_batches() -> Iterator[dict[Request, Batch]]:
    """Yields a dictionary of batches, and closes them at the end, so that none waits for samples that never come."""
    batches: dict[Request, Batch] = {}
    try:
        yield batches
    finally:
        for batch in batches.values():
            batch.close()


def _completed(sample: Sample, renderer: "Renderer") -> tuple[Completion, Candidate]:
    """Returns a sample as a completion that waits for its score, and as reward functions see it."""
    request, text = sample.request, renderer.text(sample.tokens)
    completion = Completion(
        stage=request.stage,
        sample_id=sample.sample_id,
        tokens=sample.tokens,
        logprobs=sample.logprobs,
        finished=sample.finished,
        text=text,
        entropy=sample.entropy,
    )
    prompt = request.prompt
    assert prompt is not None, "a request whose samples are scored has a problem"
    candidate = Candidate(
        text=text,
        answer=prompt.answer,
        opening=renderer.opening,
        question=prompt.question,
        columns=prompt.columns,
        tokens=sample.tokens,
        sample_id=sample.sample_id,
        stage=request.stage,
        draft=request.draft,
    )
    return completion, candidate
