"""Continuous batching on the host: a queue of prompts, slots that are refilled, and completions as they finish.

First in, first out: a prompt is prefilled once by the shard that has slots for its samples, which take slots in order.
It is prefilled again only after a preemption, or where another shard takes over some of its samples. One `advance` is
one dispatch of the device: at most K tokens per slot. While most slots run, at most one chunk of prompts is prefilled
between two dispatches, so that a long prompt does not hold up the others. The host may stay one dispatch behind, so
that the device has the next one while the results of the last are looked at.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.sampling.inputs import PromptChunk
from igrpo_jax.sampling.requests import Request, Sample, Usage
from igrpo_jax.sampling.shapes import WIDTH
from igrpo_jax.sampling.shard import QueuedSamples, RunningSample, Shard
from igrpo_jax.sampling.state import Sampling, State, Status


@dataclass(frozen=True)
class _Dispatch:
    """A dispatch whose results the host has not fetched yet."""

    number: int
    status: Status
    queued: bool  # something waited for a slot
    mixed: bool  # several stages were running


@dataclass
class _Harvest:
    """Finished samples whose tokens are on their way to the host."""

    done: list[RunningSample] = field(default_factory=list)
    results: list[tuple[jax.Array, ...]] = field(default_factory=list)  # of `Engine.harvest`


class _WeightTimer:
    """Waits in a thread until weights are ready, so that programs that need them can be sent to the device in the
    meantime.

    Args:
        began: time when the weights were requested, by `time.perf_counter`.
    """

    def __init__(self, weights: decoder.Params, began: float):
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._wait, args=(weights, began), name="weights", daemon=True)
        self._thread.start()

    def _wait(self, weights: decoder.Params, began: float) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # whoever uses the weights gets it too
            jax.block_until_ready(weights)
        self._seconds = time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """Time that it took."""
        self._thread.join()
        return self._seconds


class Scheduler:
    """Feeds one engine, whose pages, lanes and slots it owns.

    Args:
        ahead: dispatches that the device may be ahead of the host, 0 or 1. With 1 the host's work hides behind the
            device's; where both share the same cores there is nothing to hide behind. None means 1 on an accelerator
            and 0 on the CPU.
    """

    def __init__(self, engine: Engine, ahead: int | None = None):
        self.engine = engine
        self.ahead = int(jax.default_backend() != "cpu") if ahead is None else ahead
        self.usage = Usage()
        self.shards = [Shard(engine.sizes) for _ in range(engine.shards)]
        parts = engine.sizes.parts
        self._groups = [self.shards[first : first + parts] for first in range(0, engine.shards, parts)]
        self._weights: decoder.Params = {}
        self._weight_timer: _WeightTimer | None = None
        self._sampling = Sampling(1.0)
        self._state: State | None = None  # between `start` and `finish`: the cache makes room for the update
        self._waiting: deque[QueuedSamples] = deque()
        self._spare = max(1, engine.shard_slots // 8)  # a shard refills its slots once this many are free
        self._in_flight: deque[_Dispatch] = deque()
        self._harvests: deque[_Harvest] = deque()
        self._dispatched = 0

    def start(self, params: decoder.Params, sampling: Sampling) -> None:
        """Begins a rollout or an evaluation with these master weights. `usage` starts from zero.

        The weights are cast and gathered once here; `finish` frees them and the cache, before the update.
        """
        assert not self.pending, "the last rollout or evaluation still has samples to draw"
        began = time.perf_counter()
        self._weights = self.engine.weights(params)
        self._weight_timer = _WeightTimer(self._weights, began)
        self._sampling = sampling
        self.usage = Usage(pages=sum(shard.pool.count for shard in self.shards) if self.leads else 0)
        for shard in self.shards:
            shard.preempted = 0
        self._state = self.engine.empty()

    @property
    def weight_seconds(self) -> float:
        """Seconds that the weights of the last `start` took to be ready to sample with."""
        return self._weight_timer.seconds if self._weight_timer else 0.0

    @property
    def leads(self) -> bool:
        """Whether requests are submitted and samples drawn here; a process that does not lead calls `follow`."""
        return self.engine.team.leads

    def positions(self, count: int) -> range:
        """Returns which of `count` prompts this process submits (`Team.positions`)."""
        return self.engine.team.positions(count)

    def follow(self) -> None:
        """Runs whatever the leading process runs, until that process calls `finish`."""
        assert self._state is not None, "`start` comes first"
        state, self._state = self._state, None  # the first program is given its memory
        self.engine.follow(self._weights, state)

    def finish(self) -> None:
        """Ends the rollout or evaluation: frees the weights and the cache."""
        if self.leads:
            self.engine.release_followers()
        self._weights = {}
        self._state = None

    def submit(self, request: Request) -> None:
        """Queues a prompt. Raises InputError, before any device work, where it does not fit."""
        sizes, longest = self.engine.sizes, int(np.max(request.limit, initial=0))
        fits = 0 < len(request.tokens) <= sizes.longest_prompt and longest <= sizes.max_completion
        fits = fits and len(request.tokens) + longest <= sizes.length
        if not fits or np.min(request.limit, initial=1) < 1:
            raise InputError(
                f"prompt {request.index}: {len(request.tokens)} + {longest} tokens do not fit the cache of "
                f"{sizes.longest_prompt} + {sizes.max_completion}, together {sizes.length}; lower "
                "config.data.max_prompt_length, config.refine.max_draft_length or config.rollout.max_completion_length"
            )
        if request.samples > 0:
            self._waiting.append(QueuedSamples(request, deque(range(request.samples))))

    @property
    def pending(self) -> bool:
        """Whether a sample is queued, running, or on its way to the host."""
        return bool(self._queued or self._running_count or self._harvests)

    @property
    def _queued(self) -> bool:
        """Whether a sample waits for a slot."""
        return bool(self._waiting) or any(shard.pending for shard in self.shards)

    @property
    def _running_count(self) -> int:
        return sum(len(shard.running) for shard in self.shards)

    @property
    def demand(self) -> int:
        """Samples that have a slot, or wait for one; the next dispatch decodes at most as many."""
        waiting = sum(len(waiting.samples) for waiting in self._waiting)
        return self._running_count + waiting + sum(shard.pending for shard in self.shards)

    def drain(self) -> Iterator[Sample]:
        """Yields the samples of all queued requests, as they finish."""
        while self.pending:
            yield from self.advance()

    def advance(self) -> list[Sample]:
        """Fills free slots, runs one dispatch, and returns samples that are finished.

        With `ahead` = 1 the samples returned are those of earlier dispatches, while the device still runs this one.
        """
        self._fill()
        if self._running_count:
            self._dispatch()
            while len(self._in_flight) > self.ahead:
                self._harvests.append(self._fetch(self._in_flight.popleft()))
        if not self._running_count:
            self._in_flight.clear()  # nothing ran in it
        samples = []
        while len(self._harvests) > (self.ahead if self._running_count else 0):
            samples += self._collect(self._harvests.popleft())
        return samples

    def _fill(self) -> None:
        """Prefills prompts and starts samples as slots and pages allow: one chunk, or more if many slots are free."""
        self._begin()
        self._start_samples()
        while to_prefill := max(sum(shard.to_prefill for shard in group) for group in self._groups):
            size = self.engine.chunk_size(to_prefill)
            pieces = [piece for group in self._groups for piece in _pieces(group, size)]
            self._state = self.engine.prefill(self._weights, self._state, size, pieces)
            self._start_samples()
            self._begin()
            if self._running_count >= max(1, self.engine.slots - self._spare * self.engine.shards):
                break

    def _begin(self) -> None:
        """Gives lanes to queued prompts; once the queue is empty, idle shards take over samples of the fullest one."""
        while self._waiting:
            shard = max(self.shards, key=lambda shard: shard.idle)
            if not shard.can_begin(len(self._waiting[0].request.tokens)):
                return
            shard.begin(self._waiting.popleft())
        while True:
            shard = max(self.shards, key=lambda shard: shard.idle)
            fullest = min(self.shards, key=lambda shard: shard.idle)
            moved = fullest.hand_over(shard.idle) if shard.idle > 0 else None
            if moved is None:
                return
            if not shard.can_begin(len(moved.request.tokens)):
                self._waiting.appendleft(moved)
                return
            shard.begin(moved)

    def _start_samples(self) -> None:
        assignments = [shard.assign_slots(self._dispatched) for shard in self.shards]
        if any(assignments):
            self._state = self.engine.fork(self._state, assignments, self._sampling)

    def _dispatch(self) -> None:
        engine, sizes = self.engine, self.engine.sizes
        # The host assumes that the dispatches that it has not fetched yet drew as many tokens as they could.
        ahead = (len(self._in_flight) + 1) * sizes.steps_per_dispatch
        self._make_room(ahead)
        self.usage.peak_pages = max(self.usage.peak_pages, sum(shard.pool.used for shard in self.shards))
        busy = [len(shard.running) for shard in self.shards]
        samples = [sample for shard in self.shards for sample in shard.running.values()]
        furthest = max(sample.cached for sample in samples) + ahead
        rows = engine.row_bucket(max(busy))
        queued = self._queued
        fewer = max((size for size in engine.programs.window_lengths if size < rows), default=0)
        self._state, status = engine.decode(
            self._weights,
            self._state,
            [sorted(shard.running) for shard in self.shards],
            [shard.table for shard in self.shards],
            furthest,
            [self._min_active(running, queued, fewer) for running in busy],
            self._sampling,
        )
        for x in status:
            x.copy_to_host_async()
        mixed = len({sample.request.stage for sample in samples}) > 1
        self._in_flight.append(_Dispatch(self._dispatched, status, queued, mixed))
        self._dispatched += 1

    def _min_active(self, running: int, queued: bool, fewer: int) -> int:
        """Returns the number of active slots below which a shard stops; `running` are active now.

        While anything is queued, a shard stops to refill once `_spare` slots are free; with nothing queued, once the
        next smaller number of rows would hold its running samples.

        Args:
            fewer: the next smaller number of rows that can be decoded; 0 = none.
        """
        if queued:
            return max(1, running - self._spare + 1)
        if running > fewer:
            return fewer + 1
        return 1

    def _make_room(self, ahead: int) -> None:
        """Gives each slot the pages for `ahead` more tokens; samples preempted for that go back to the queue."""
        for shard in self.shards:
            for waiting in shard.make_room(ahead):
                self._put_back(waiting)

    def _put_back(self, waiting: QueuedSamples) -> None:
        """Puts preempted samples back at the front of the queue, in order of their numbers."""
        first = self._waiting[0] if self._waiting else None
        if first is not None and first.request is waiting.request:
            first.samples = deque(sorted([*waiting.samples, *first.samples]))
        else:
            self._waiting.appendleft(waiting)

    def _fetch(self, dispatch: _Dispatch) -> _Harvest:
        """Fetches the results of a dispatch, and frees the slots of the samples that it finished."""
        status = jax.device_get(dispatch.status)
        size, drawn = self.engine.shard_slots, 0
        slot_steps = int(status.steps.sum()) * size * self.engine.sizes.parts
        done, slots = [], []
        for number, shard in enumerate(self.shards):
            for local, sample in list(shard.running.items()):
                if sample.since > dispatch.number:
                    continue  # this sample took the slot after that dispatch
                slot = number * size + local
                drawn += int(status.count[slot]) - sample.count
                sample.count = int(status.count[slot])
                if not status.active[slot]:
                    done.append(shard.end(local))
                    slots.append(slot)
        usage = self.usage
        usage.slot_steps += slot_steps
        usage.tokens += drawn
        usage.mixed_slot_steps += slot_steps * dispatch.mixed
        usage.queued_slot_steps += slot_steps * dispatch.queued
        usage.queued_tokens += drawn * dispatch.queued
        usage.preempted = sum(shard.preempted for shard in self.shards)
        # A later dispatch may have run since. It wrote nothing to these slots, because they were inactive, and no fork
        # has taken them yet.
        return _Harvest(done, self.engine.harvest(self._state, slots))

    def _collect(self, harvest: _Harvest) -> list[Sample]:
        if not harvest.done:
            return []
        results = jax.device_get(harvest.results)
        samples = []
        for i, sample in enumerate(harvest.done):
            *rows, entropy = (result[i % WIDTH] for result in results[i // WIDTH])
            tokens, logprobs = (row[: sample.count].copy() for row in rows)
            finished = int(tokens[-1]) in self.engine.eos_ids
            samples.append(Sample(sample.request, sample.sample_id, tokens, logprobs, finished, float(entropy)))
        return samples


def _pieces(group: Sequence[Shard], size: int) -> Iterator[list[PromptChunk]]:
    """Yields, for each part, the next prompt tokens to prefill, up to `size` for all parts of a group together."""
    for shard in group:
        pieces = shard.pieces(size)
        size -= sum(len(piece.tokens) for piece in pieces)
        yield pieces
