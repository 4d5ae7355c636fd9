"""The host side of sampling: a queue of prompts, refilled slots, finished completions as they come.

First in, first out: a prompt is prefilled once when a slot is free for its first sample, and its samples take slots in
order. One `advance` is one dispatch of the device: at most K tokens per slot. The host may stay one dispatch behind, so
that the device has the next one while the results of the last are looked at.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np

from igrpo_jax.distributed.programs import pick_bucket
from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder
from igrpo_jax.records import Completion, Prompt
from igrpo_jax.sampling.engine import WIDTH, Engine
from igrpo_jax.sampling.steps import PrefilledPrompts, Sampling, State, Status


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt, sampled `samples` times, the samples numbered from `first`. Each request equals only itself."""

    tokens: np.ndarray  # [L] int32
    index: int  # number of the prompt; the randomness is derived from it, `key` and the sample's number
    samples: int
    key: np.ndarray  # [2] uint32, key data of the step and stage
    limit: int | np.ndarray  # most tokens of a completion, for all samples or [samples] for each
    stage: str = ""  # as in Completion; Usage.overlap counts the decode steps in which several stages run
    first: int = 0  # number of the first sample
    # Where the samples are scored (see `scoring`): the problem, and the callback that gets each scored completion.
    prompt: Prompt | None = None
    scored: Callable[[Completion], None] | None = None


@dataclass(frozen=True)
class Sample:
    """One drawn completion, not scored yet."""

    request: Request
    sample_id: int
    tokens: np.ndarray  # [T] int32, EOS included
    logprobs: np.ndarray  # [T] float32, nats, at the sampling temperature
    finished: bool  # ended by EOS
    entropy: float  # of the sampler's distribution, summed over the tokens, in nats


@dataclass
class Usage:
    """Device work since the last `start`."""

    slot_steps: int = 0  # slots x decode steps
    tokens: int = 0  # drawn by decode steps
    queued_slot_steps: int = 0  # slots x decode steps of the dispatches during which the queue was not empty
    queued_tokens: int = 0  # tokens drawn by the same dispatches
    mixed_slot_steps: int = 0  # slots x decode steps while requests of several stages were running

    def __add__(self, other: "Usage") -> "Usage":
        """Returns the work of both together."""
        return Usage(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def slot_utilization(self) -> float:
        """Fraction of slots x steps that drew a token."""
        return self.tokens / self.slot_steps if self.slot_steps else 0.0

    @property
    def queued_slot_utilization(self) -> float:
        """The same fraction over the dispatches during which the queue was not empty."""
        return self.queued_tokens / self.queued_slot_steps if self.queued_slot_steps else 0.0

    @property
    def overlap(self) -> float:
        """Fraction of the decode steps in which several stages were running."""
        return self.mixed_slot_steps / self.slot_steps if self.slot_steps else 0.0


@dataclass
class _Waiting:
    """A request in the queue, and which of its samples is next to take a slot."""

    request: Request
    prefilled: PrefilledPrompts | None = None  # the batch that its prompt was prefilled with
    row: int = 0  # of its prompt in that batch
    next_sample: int = 0


@dataclass
class _Running:
    """The sample that a slot draws."""

    request: Request
    sample: int
    since: int  # number of the first dispatch that decodes it in this slot
    position: int  # tokens in the slot's cache, as of the last dispatch that the host has read
    count: int = 1  # tokens drawn, as of the same dispatch


@dataclass(frozen=True)
class _Dispatch:
    """A dispatch whose results the host has not read yet."""

    number: int
    status: Status
    queued: bool  # something waited for a slot
    mixed: bool  # several stages were running


@dataclass
class _Harvest:
    """Finished samples whose tokens are on their way to the host."""

    done: list[_Running] = field(default_factory=list)
    pieces: list[tuple[jax.Array, ...]] = field(default_factory=list)


class Scheduler:
    """Feeds one engine, whose slots it owns.

    Args:
        ahead: dispatches that the device may be ahead of the host, 0 or 1. With 1 the host's work hides behind the
            device's; where both share the same cores there is nothing to hide behind. None means 1 on an accelerator
            and 0 on the CPU.
    """

    def __init__(self, engine: Engine, ahead: int | None = None):
        self.engine = engine
        self.ahead = int(jax.default_backend() != "cpu") if ahead is None else ahead
        self.usage = Usage()
        self._weights: decoder.Params = {}
        self._sampling = Sampling(1.0)
        self._state: State | None = None  # between `start` and `finish`: the cache makes room for the update
        self._waiting: deque[_Waiting] = deque()
        self._free = [list(range(engine.shard_slots)) for _ in range(engine.shards)]  # heaps: the lowest slot first
        self._running: dict[int, _Running] = {}
        self._unread: deque[_Dispatch] = deque()
        self._harvests: deque[_Harvest] = deque()
        self._dispatched = 0

    def start(self, params: decoder.Params, sampling: Sampling) -> None:
        """Begins a rollout or an evaluation with these master weights. `usage` starts anew.

        The weights are cast and gathered once here; `finish` frees them and the cache, before the update.
        """
        assert not self.pending, "the last rollout or evaluation still has samples to draw"
        self._weights = self.engine.weights(params)
        self._sampling = sampling
        self.usage = Usage()
        self._state = self.engine.empty()

    def finish(self) -> None:
        """Ends the rollout or evaluation: frees the weights and the cache."""
        self._weights = {}
        self._state = None

    def submit(self, request: Request) -> None:
        """Queues a prompt. Raises InputError, before any device work, where it does not fit."""
        engine, longest = self.engine, int(np.max(request.limit, initial=0))
        fits = 0 < len(request.tokens) <= engine.max_context and longest <= engine.max_completion
        fits = fits and len(request.tokens) + longest <= engine.length
        if not fits or np.min(request.limit, initial=1) < 1:
            raise InputError(
                f"prompt {request.index}: {len(request.tokens)} + {longest} tokens do not fit the cache of "
                f"{engine.max_context} + {engine.max_completion}, together {engine.length}; lower "
                "config.data.max_prompt_length, config.refine.max_draft_length or config.rollout.max_completion_length"
            )
        if request.samples > 0:
            self._waiting.append(_Waiting(request))

    @property
    def pending(self) -> bool:
        return bool(self._waiting or self._running or self._harvests)

    def drain(self) -> Iterator[Sample]:
        """Yields the samples of all queued requests, as they finish."""
        while self.pending:
            yield from self.advance()

    def advance(self) -> list[Sample]:
        """Fills free slots, runs one dispatch, and returns samples that are finished.

        With `ahead` = 1 the samples returned are those of earlier dispatches, while the device still runs this one.
        """
        self._admit()
        if self._running:
            self._dispatch()
            while len(self._unread) > self.ahead:
                self._harvests.append(self._read(self._unread.popleft()))
        if not self._running:
            self._unread.clear()  # nothing ran in it
        samples = []
        while len(self._harvests) > (self.ahead if self._running else 0):
            samples += self._collect(self._harvests.popleft())
        return samples

    def _admit(self) -> None:
        while self._waiting and any(self._free):
            head = self._waiting[0]
            if head.prefilled is None:
                self._prefill()
            request = head.request
            count = min(sum(map(len, self._free)), request.samples - head.next_sample)
            slots = [self._take_slot() for _ in range(count)]
            own = range(head.next_sample, head.next_sample + count)
            limits = np.broadcast_to(request.limit, (request.samples,))[own]
            samples = [request.first + i for i in own]
            self._state = self.engine.insert(
                self._state,
                head.prefilled,
                head.row,
                slots,
                samples,
                key=request.key,
                prompt=request.index,
                limits=limits,
                sampling=self._sampling,
            )
            for slot, sample in zip(slots, samples, strict=True):
                self._running[slot] = _Running(request, sample, self._dispatched, len(request.tokens))
            head.next_sample += count
            if head.next_sample == request.samples:
                self._waiting.popleft()

    def _prefill(self) -> None:
        batch = [self._waiting[i] for i in range(min(self.engine.prefill_width, len(self._waiting)))]
        prefilled = self.engine.prefill(self._weights, [item.request.tokens for item in batch])
        for row, item in enumerate(batch):
            item.prefilled, item.row = prefilled, row

    def _take_slot(self) -> int:
        """Returns the lowest free slot of the shard that has the most free ones."""
        shard = max(range(self.engine.shards), key=lambda i: len(self._free[i]))
        return shard * self.engine.shard_slots + heapq.heappop(self._free[shard])

    def _give_back(self, slot: int) -> None:
        shard, local = divmod(slot, self.engine.shard_slots)
        heapq.heappush(self._free[shard], local)

    def _dispatch(self) -> None:
        engine = self.engine
        rows = self._compact()
        busy = [engine.shard_slots - len(free) for free in self._free]
        # While something waits, slots are refilled a few at a time; later a shard stops where fewer rows would do.
        spare = max(1, engine.shard_slots // 8)
        fewer = max((size for size in engine.buckets if size < rows), default=0)
        least = [max(1, n - spare + 1 if self._waiting else fewer + 1 if n > fewer else 1) for n in busy]
        # The host assumes that the dispatches that it has not read yet drew as many tokens as they could.
        ahead = (len(self._unread) + 1) * engine.steps_per_dispatch
        furthest = max(running.position for running in self._running.values()) + ahead
        read = pick_bucket(engine.buckets[rows], min(furthest, engine.length))
        self._state, status = engine.decode(self._weights, self._state, rows, read, least, self._sampling)
        for x in status:
            x.copy_to_host_async()
        mixed = len({running.request.stage for running in self._running.values()}) > 1
        self._unread.append(_Dispatch(self._dispatched, status, bool(self._waiting), mixed))
        self._dispatched += 1

    def _compact(self) -> int:
        """Returns the fewest rows that hold all running slots; while nothing waits, slots beyond them move down."""
        engine = self.engine
        need = max(engine.shard_slots - len(free) for free in self._free)
        rows = engine.shard_slots if self._waiting else pick_bucket(tuple(engine.buckets), need)
        pairs = []
        for slot in [slot for slot in self._running if slot % engine.shard_slots >= rows]:
            shard, local = divmod(slot, engine.shard_slots)
            target = shard * engine.shard_slots + heapq.heappop(self._free[shard])
            pairs.append((slot, target))
            heapq.heappush(self._free[shard], local)
            self._running[target] = self._running.pop(slot)
            self._running[target].since = self._dispatched
        if pairs:
            self._state = engine.move(self._state, pairs)
        return rows

    def _read(self, dispatch: _Dispatch) -> _Harvest:
        """Reads the results of a dispatch, and frees the slots of the samples that it finished."""
        status = jax.device_get(dispatch.status)
        slot_steps, drawn = int(status.steps.sum()) * self.engine.shard_slots, 0
        slots = []
        for slot, running in self._running.items():
            if running.since > dispatch.number:
                continue  # another sample was in the slot at that time
            drawn += int(status.count[slot]) - running.count
            running.count, running.position = int(status.count[slot]), int(status.position[slot])
            if not status.active[slot]:
                slots.append(slot)
        usage = self.usage
        usage.slot_steps += slot_steps
        usage.tokens += drawn
        usage.mixed_slot_steps += slot_steps * dispatch.mixed
        usage.queued_slot_steps += slot_steps * dispatch.queued
        usage.queued_tokens += drawn * dispatch.queued
        harvest = _Harvest([self._running.pop(slot) for slot in slots], self.engine.harvest(self._state, slots))
        for slot in slots:
            self._give_back(slot)
        return harvest

    def _collect(self, harvest: _Harvest) -> list[Sample]:
        if not harvest.done:
            return []
        pieces = jax.device_get(harvest.pieces)
        samples = []
        for i, running in enumerate(harvest.done):
            *rows, entropy = (piece[i % WIDTH] for piece in pieces[i // WIDTH])
            tokens, logprobs = (row[: running.count].copy() for row in rows)
            finished = int(tokens[-1]) in self.engine.eos_ids
            samples.append(Sample(running.request, running.sample, tokens, logprobs, finished, float(entropy)))
        return samples
