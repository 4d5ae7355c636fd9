"""A generative judge: a model behind an OpenAI-compatible endpoint that scores completions in [0, 1].

    with Judge(config.rewards.judge, cache) as judge:
        judge.start_step()                                                          # refills the budget
        futures = [judge.submit(question, answer, text) for text in completions]    # returns at once
        judgements = [future.result() for future in futures]                        # never raises

A score of None means that there is no verdict: the endpoint failed, its reply was not the JSON object asked for, or the
budget was spent. It never counts as a 0. One thread runs an event loop with all requests, and reads and writes the file
of verdicts; the caller's thread uploads and closes it.

- Each request has a wall-clock deadline. A request that is worth another attempt waits as long as the server says, or
  twice as long as the last time, and keeps its place among the `concurrency` in flight while it waits.
- `rehearse` asks once before a run starts.
- Identical submissions share one request while it is in flight, and its verdict afterwards, across runs. Their key is
  made of the model's name, everything that it is shown and how it is sampled. The endpoint is not part of it: a server
  that serves another model under the same name needs another file.

Not here: the client and its errors (`endpoint`), the messages (`judge_messages`), the file of verdicts (`verdicts`),
and what a missing verdict means for a reward (`verifier`). No jax.
"""

import asyncio
import hashlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from absl import logging

from igrpo_jax.config import JudgeConfig
from igrpo_jax.errors import RunError
from igrpo_jax.rewards.endpoint import Failure, connect, failure_of
from igrpo_jax.rewards.judge_messages import parse_score, render
from igrpo_jax.rewards.verdicts import Verdicts

BACKOFF = 1.0  # seconds before the second attempt; doubles for each later one, plus up to half of it at random
MAX_WAIT = 60.0  # seconds; a server that asks for a longer wait is not asked again
UPLOAD_TIMEOUT = 60.0  # seconds that `close` waits for a bucket, and the other processes of a run with it
CLOSE_TIMEOUT = 5.0  # seconds that `close` waits for the thread; only a stuck name lookup takes longer than a moment


@dataclass(frozen=True)
class Judgement:
    """The judge's verdict on one completion, or why there is none. Every submission gets exactly one."""

    score: float | None  # within 0 and 1; None = no verdict
    detail: str = ""  # why there is no verdict
    cached: bool = False  # the verdict came from the file, or from an identical submission in flight
    requests: int = 0  # sent for this submission, retries included
    seconds: float = 0.0  # wall time since the submission


class Judge:
    """Submits completions to the endpoint; a context manager, usable from any thread.

    Args:
        settings: the settings of the endpoint and of the requests.
        cache: the SQLite file of the verdicts. It is created where it is missing; several processes may share it.

    Raises:
        InputError: no openai client, no key, a wrong address, or a cache that cannot be used.
    """

    def __init__(self, settings: JudgeConfig, cache: Path):
        self._settings = settings
        self._client, self._secret = connect(settings)
        # OpenAI's newer models refuse the old name of this limit; other servers do not know the new one.
        official = self._client.base_url.host.endswith(("openai.com", "openai.azure.com"))
        self._sampling: dict[str, float] = {"max_completion_tokens" if official else "max_tokens": settings.max_tokens}
        if settings.temperature is not None:
            self._sampling["temperature"] = settings.temperature
        self._random = random.Random()  # its own, so that the jitter does not change anyone's seeded numbers
        self._lock = threading.Lock()
        self._waiting: dict[str, list[tuple[Future, float]]] = {}  # key -> futures and times of identical submissions
        self._closed = False
        self.start_step()
        self._verdicts = Verdicts(cache)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._tasks: set[asyncio.Task] = set()
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(self) -> None:
        """Uploads the verdicts, if their file is in a bucket and the last upload was a while ago."""
        self._verdicts.save()

    def submit(self, question: str, answer: str, completion: str) -> Future[Judgement]:
        """Returns a future of the Judgement. Does not block. The future never raises; its callbacks must not block."""
        messages = render(self._settings, question, answer, completion)
        key = json.dumps([self._settings.model, messages, self._settings.temperature, self._settings.max_tokens])
        key = hashlib.sha256(key.encode()).hexdigest()
        future: Future[Judgement] = Future()
        future.set_running_or_notify_cancel()  # so that nobody can cancel it and then wait for ever
        with self._lock:
            closed = self._closed
            if not closed:
                waiting = self._waiting.setdefault(key, [])
                waiting.append((future, time.monotonic()))
                if len(waiting) == 1:
                    self._loop.call_soon_threadsafe(self._start, key, messages)
        if closed:
            future.set_result(Judgement(None, "the judge is closed"))
        return future

    def start_step(self) -> None:
        """Refills the budget of requests."""
        with self._lock:
            self._left = self._settings.budget

    def close(self) -> None:
        """Drops the requests in flight promptly, and closes the file of verdicts, which a bucket may take a while for.

        Submissions without a verdict get none. Safe to call twice.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(CLOSE_TIMEOUT)
        for key in list(self._waiting):
            self._answer(key, Judgement(None, "the judge was closed"))
        upload = threading.Thread(target=self._verdicts.close, name="verdicts", daemon=True)
        upload.start()
        upload.join(UPLOAD_TIMEOUT)
        if upload.is_alive():
            logging.warning(
                "judge: the latest verdicts may be lost: uploading them takes more than %g s", UPLOAD_TIMEOUT
            )

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    def _start(self, key: str, messages: list[dict]) -> None:
        task = self._loop.create_task(self._judge(key, messages))
        self._tasks.add(task)  # the loop itself holds only weak references to tasks
        task.add_done_callback(self._tasks.discard)

    async def _judge(self, key: str, messages: list[dict]) -> None:
        try:
            score = self._verdicts.get(key)
            if score is not None:
                judgement = Judgement(score, cached=True)
            else:
                async with self._slots:
                    judgement = await self._ask(messages)
                if judgement.score is not None:
                    self._verdicts.put(key, judgement.score)
        except Exception as error:  # whatever it is, only this submission fails
            judgement = Judgement(None, f"{type(error).__name__}: {error}")
        self._answer(key, judgement)

    async def _ask(self, messages: list[dict]) -> Judgement:
        sent, garbled, wait, detail = 0, 0, 0.0, ""
        while self._take_request():
            await asyncio.sleep(wait)
            sent += 1
            try:
                return Judgement(await self._send(messages), requests=sent)
            except Failure as failure:
                detail, garbled = str(failure), garbled + failure.garbled
                # A model that writes no JSON gets one more attempt. After a second failure a third rarely succeeds.
                final = not failure.transient or failure.wait > MAX_WAIT or garbled > 1
                if final or sent > self._settings.max_retries:
                    return Judgement(None, f"{detail} (requests sent: {sent})", requests=sent)
                backoff = min(BACKOFF * 2 ** min(sent - 1, 10), MAX_WAIT)
                wait = max(backoff, failure.wait) + backoff * self._random.uniform(0, 0.5)
        budget = f"the step's budget of {self._settings.budget} requests is spent"
        return Judgement(None, f"{budget}; before that: {detail}" if detail else budget, requests=sent)

    def _take_request(self) -> bool:
        if self._settings.budget == 0:
            return True
        with self._lock:
            granted = self._left > 0
            self._left -= granted
        return granted

    async def _send(self, messages: list[dict]) -> float:
        """Sends one request and returns its score. Raises Failure and nothing else."""
        try:
            # The client's own time-out measures silence only: a server that sends a byte now and then never exceeds it.
            async with asyncio.timeout(self._settings.timeout):
                reply = await self._client.chat.completions.create(
                    model=self._settings.model, messages=messages, **self._sampling
                )
        except Exception as error:
            raise failure_of(error, self._settings.timeout) from error
        try:
            choice = reply.choices[0]
            text, cut = choice.message.content, getattr(choice, "finish_reason", None) == "length"
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise Failure("the server's answer is not a chat completion") from error
        try:
            return parse_score(text if isinstance(text, str) else "")
        except ValueError as error:
            why = f"; it was cut at max_tokens = {self._settings.max_tokens}" if cut else ""
            raise Failure(f"the reply is not a verdict: {error}{why}", garbled=True) from error

    def _answer(self, key: str, judgement: Judgement) -> None:
        with self._lock:
            waiting = self._waiting.pop(key, [])  # popping them makes this call the only one that answers them
        if judgement.score is None:
            detail = judgement.detail.replace(self._secret, "***") if self._secret else judgement.detail
            detail = "".join(letter if letter.isprintable() else " " for letter in detail[:300])  # for terminals
            judgement = replace(judgement, detail=detail)
            logging.log_every_n(logging.WARNING, "judge: no verdict: %s", 100, detail)
        shared = replace(judgement, requests=0, cached=judgement.score is not None)
        for position, (future, start) in enumerate(waiting):  # the first submission is the one that sent requests
            result = shared if position else judgement
            future.set_result(replace(result, seconds=time.monotonic() - start))


def rehearse(settings: JudgeConfig, question: str, answer: str, completion: str) -> float:
    """Asks the judge about one completion before a run starts, with one more attempt. Returns its score.

    Raises:
        InputError: as `Judge`.
        RunError: it gave no verdict. A judge that is down may be up again when the same command is run again.
    """
    once = replace(settings, budget=0, max_retries=min(settings.max_retries, 1))
    with tempfile.TemporaryDirectory() as folder, Judge(once, Path(folder, "judge.sqlite")) as judge:
        judgement = judge.submit(question, answer, completion).result()
    if judgement.score is None:
        raise RunError(
            f"config.rewards.judge.base_url = {settings.base_url!r}: the judge {settings.model!r} gives no verdict on "
            f"a training problem: {judgement.detail}; check base_url, model, timeout, max_tokens and the key in "
            f"{settings.api_key_env}"
        )
    return judgement.score


def statistics(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Returns the `judge/…` metrics of a step.

    The latency is the median wall time in seconds of the submissions that sent requests.
    """
    seconds = sorted(judgement.seconds for judgement in judgements if judgement.requests) or [0.0]
    return {
        "judge/requests": float(sum(judgement.requests for judgement in judgements)),
        "judge/cached_frac": sum(judgement.cached for judgement in judgements) / max(len(judgements), 1),
        "judge/invalid_frac": sum(judgement.score is None for judgement in judgements) / max(len(judgements), 1),
        "judge/latency_p50": seconds[(len(seconds) - 1) // 2],
    }
