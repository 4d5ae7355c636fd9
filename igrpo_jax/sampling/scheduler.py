"""The host side of sampling: a queue of prompts, refilled slots, finished completions as they come.

First in, first out: a prompt is prefilled once when a slot is free for its first sample, and its samples take slots in
order. One `advance` is one dispatch of the device: at most K tokens per slot.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from igrpo_jax.batch import pick_bucket
from igrpo_jax.config import InputError
from igrpo_jax.models import decoder
from igrpo_jax.sampling.engine import Engine, Prefix, Sampling


@dataclass(frozen=True)
class Request:
    """One prompt, sampled `samples` times."""

    tokens: np.ndarray  # [L] int32
    index: int  # of the prompt; with `key` and the sample's number it derives the randomness
    samples: int
    key: np.ndarray  # [2] uint32, key data of the step and stage
    limit: int  # most tokens of a completion
    tag: Any = None  # the caller's own, handed back with each sample


@dataclass(frozen=True)
class Sample:
    request: Request
    sample_id: int
    tokens: np.ndarray  # [T] int32, EOS included
    logprobs: np.ndarray  # [T] float32, nats, at the sampling temperature
    finished: bool  # ended by EOS


@dataclass
class Usage:
    """Device work since the last `start`."""

    slot_steps: int = 0  # slots x decode steps
    tokens: int = 0  # drawn by decode steps

    @property
    def slot_utilization(self) -> float:
        return self.tokens / self.slot_steps if self.slot_steps else 0.0


@dataclass
class _Waiting:
    request: Request
    prefix: Prefix | None = None
    row: int = 0
    next_sample: int = 0


class Scheduler:
    """Feeds one engine, whose slots it owns."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.usage = Usage()
        self._weights: decoder.Params = {}
        self._sampling = Sampling(1.0)
        self._state = engine.empty()
        self._waiting: deque[_Waiting] = deque()
        self._free: deque[int] = deque(range(self.engine.slots))
        self._running: dict[int, tuple[Request, int]] = {}
        self._counts = np.zeros((self.engine.slots,), np.int64)
        self._positions = np.zeros((self.engine.slots,), np.int64)

    def start(self, params: decoder.Params, sampling: Sampling) -> None:
        """Begins a phase: a rollout or an evaluation with these master weights. `usage` starts anew.

        The weights are cast and gathered once here; `finish` lets them go before the update donates its own.
        """
        assert not self.pending, "the last phase still has samples to draw"
        self._weights, self._sampling, self.usage = self.engine.weights(params), sampling, Usage()

    def finish(self) -> None:
        self._weights = {}

    def submit(self, request: Request) -> None:
        """Queues a prompt. Raises InputError, before any device work, where it does not fit."""
        engine = self.engine
        if not 0 < len(request.tokens) <= engine.max_context or not 0 < request.limit <= engine.max_completion:
            raise InputError(
                f"prompt {request.index}: {len(request.tokens)} + {request.limit} tokens do not fit the cache of "
                f"{engine.max_context} + {engine.max_completion}; lower config.data.max_prompt_length, "
                "config.refine.max_draft_length or config.rollout.max_completion_length"
            )
        if request.samples > 0:
            self._waiting.append(_Waiting(request))

    @property
    def pending(self) -> bool:
        return bool(self._waiting or self._running)

    def drain(self) -> Iterator[Sample]:
        """All samples of what is queued, as they finish."""
        while self.pending:
            yield from self.advance()

    def advance(self) -> list[Sample]:
        """Fills free slots, runs one dispatch, and returns the samples that it finished."""
        self._admit()
        if not self._running:
            return []
        engine, running = self.engine, len(self._running)
        spare = max(1, engine.slots // 8)  # refill in batches, while there is something to refill with
        furthest = max(self._positions[slot] for slot in self._running) + engine.steps_per_dispatch
        self._state, steps = engine.decode(
            self._weights,
            self._state,
            pick_bucket(engine.read_buckets, int(furthest) + 1),
            max(1, running - spare) if self._waiting else 1,
            self._sampling,
        )
        active, counts, positions, steps = jax.device_get(
            (self._state.active, self._state.count, self._state.position, steps)
        )
        self.usage.slot_steps += int(steps) * engine.slots
        self.usage.tokens += int(sum(counts[slot] - self._counts[slot] for slot in self._running))
        self._counts, self._positions = counts.astype(np.int64), positions.astype(np.int64)
        return self._collect([slot for slot in self._running if not active[slot]])

    def _admit(self) -> None:
        while self._free and self._waiting:
            head = self._waiting[0]
            if head.prefix is None:
                self._prefill()
            request = head.request
            count = min(len(self._free), request.samples - head.next_sample)
            slots = [self._free.popleft() for _ in range(count)]
            samples = range(head.next_sample, head.next_sample + count)
            self._state = self.engine.insert(
                self._state,
                head.prefix,
                head.row,
                slots,
                request.key,
                request.index,
                samples,
                request.limit,
                self._sampling,
            )
            for slot, sample in zip(slots, samples, strict=True):
                self._running[slot] = (request, sample)
                self._counts[slot], self._positions[slot] = 1, len(request.tokens)
            head.next_sample += count
            if head.next_sample == request.samples:
                self._waiting.popleft()

    def _prefill(self) -> None:
        batch = [self._waiting[i] for i in range(min(self.engine.prefill_width, len(self._waiting)))]
        prefix = self.engine.prefill(self._weights, [item.request.tokens for item in batch])
        for row, item in enumerate(batch):
            item.prefix, item.row = prefix, row

    def _collect(self, slots: list[int]) -> list[Sample]:
        if not slots:
            return []
        tokens, logprobs = self.engine.harvest(self._state, slots)
        done = []
        for slot, ids, values in zip(slots, tokens, logprobs, strict=True):
            request, sample = self._running.pop(slot)
            self._free.append(slot)
            count = int(self._counts[slot])
            ended = int(ids[count - 1]) in self.engine.eos_ids
            done.append(Sample(request, sample, ids[:count].copy(), values[:count].copy(), ended))
        return done
