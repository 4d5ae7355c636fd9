"""The host's record of one shard of the batch: which prompts are in its lanes, and which samples are in its slots.

Where attention splits sequences, a shard has several parts (`Sizes.parts`), and one of them is what "shard" means here.

A prompt takes a lane and all its pages, is prefilled piece by piece, and stays until its last sample has a slot. A
sample shares the full pages of its prompt, has its own copy of the partly filled page, and takes more pages before
each dispatch. When pages run out, the most recently started work is preempted and restarted later: first prompts of
which no sample runs, then samples. The oldest sample can always continue, because the pool holds the longest sequence.

A page that is given back may be taken again at once, although the device still has a dispatch to run: the device works
in order, and a slot that is not decoded any more writes nothing.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from igrpo_jax.sampling.inputs import PromptChunk, SlotAssignment
from igrpo_jax.sampling.pages import PagePool, pages_for
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.shapes import Sizes


@dataclass(eq=False)
class QueuedSamples:
    """Samples of a request that have no slot yet."""

    request: Request
    samples: deque[int]  # numbers within the request, the next one first


@dataclass(eq=False)
class PromptInLane(QueuedSamples):
    """A prompt in a lane, with the samples that wait for slots."""

    lane: int
    pages: list[int]
    began: int  # what begins later has a larger number
    prefilled: int = 0  # tokens of the prompt that are prefilled


@dataclass(eq=False)
class RunningSample:
    """The sample that a slot draws."""

    prompt: PromptInLane  # in whose lane it began
    number: int  # within the request
    slot: int
    pages: list[int]
    began: int
    since: int  # number of the first dispatch that decodes it
    count: int = 1  # tokens drawn, as of the last dispatch that the host has fetched

    @property
    def request(self) -> Request:
        return self.prompt.request

    @property
    def sample_id(self) -> int:
        return self.request.first + self.number

    @property
    def cached(self) -> int:
        """Tokens in the cache, as of the last dispatch that the host has fetched."""
        return len(self.request.tokens) + self.count - 1

    @property
    def most(self) -> int:
        """Tokens in the cache when the completion reaches its limit; its last token is never written."""
        return len(self.request.tokens) + self.request.limit_of(self.number) - 1


class Shard:
    """Slots, lanes and pages of one shard.

    Attributes:
        running: the sample of each slot in use.
        table: [B, R] int32, the pages of each slot.
        preempted: number of preempted samples so far.
    """

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.pool = PagePool(sizes.pages)
        self.running: dict[int, RunningSample] = {}
        self.table = np.zeros((sizes.shard_slots, sizes.slot_pages), np.int32)
        self.preempted = 0
        self._slots = list(range(sizes.shard_slots))  # free ones, a heap: the lowest first
        self._lanes = list(range(sizes.lanes))  # free ones
        self._prompts: deque[PromptInLane] = deque()  # in the order in which they began
        self._began = 0

    @property
    def pending(self) -> int:
        """Samples in lanes that have no slot yet."""
        return sum(len(prompt.samples) for prompt in self._prompts)

    @property
    def idle(self) -> int:
        """Free slots beyond those that samples in lanes wait for; negative where more wait than are free."""
        return len(self._slots) - self.pending

    @property
    def to_prefill(self) -> int:
        """Tokens of prompts in lanes that are not prefilled yet."""
        return sum(len(prompt.request.tokens) - prompt.prefilled for prompt in self._prompts)

    def can_begin(self, tokens: int) -> bool:
        """Returns whether a prompt of `tokens` tokens can take a lane.

        Each running sample and each prompt in a lane, this one included, must have a page to spare. Otherwise something
        would soon be preempted.
        """
        needed = pages_for(tokens, self.sizes.page_size) + len(self.running) + len(self._prompts) + 1
        return bool(self._lanes) and self.idle > 0 and self.pool.free >= needed

    def begin(self, waiting: QueuedSamples) -> None:
        """Gives a lane to a prompt, where `can_begin`."""
        pages = self.pool.take(pages_for(len(waiting.request.tokens), self.sizes.page_size))
        self._prompts.append(PromptInLane(waiting.request, waiting.samples, self._lanes.pop(), pages, self._number()))

    def hand_over(self, most: int) -> QueuedSamples | None:
        """Takes up to `most` samples for which no slot is free from the prompt that began last, and returns them."""
        if self.idle >= 0:
            return None
        prompt = self._prompts[-1]
        count = min(most, -self.idle, len(prompt.samples))
        samples = deque(prompt.samples.pop() for _ in range(count))
        samples.reverse()
        self._release_if_done(prompt)
        return QueuedSamples(prompt.request, samples)

    def pieces(self, size: int) -> list[PromptChunk]:
        """Returns the next tokens to prefill of prompts in lanes, up to `size` together."""
        pieces = []
        for prompt in self._prompts:
            end = min(len(prompt.request.tokens), prompt.prefilled + size)
            if size and end > prompt.prefilled:
                tokens = prompt.request.tokens[prompt.prefilled : end]
                pieces.append(PromptChunk(prompt.lane, tokens, prompt.prefilled, tuple(prompt.pages)))
                size -= len(tokens)
                prompt.prefilled = end
        return pieces

    def assign_slots(self, dispatch: int) -> list[SlotAssignment]:
        """Gives free slots to samples of prefilled prompts, in order, while the pool has a page for each that runs.

        Args:
            dispatch: number of the next dispatch.
        """
        assignments = []
        for prompt in list(self._prompts):
            if prompt.prefilled < len(prompt.request.tokens):
                break
            while prompt.samples and self._slots and self.pool.free > len(self.running):
                assignments.append(self._assign(prompt, dispatch))
            self._release_if_done(prompt)
        return assignments

    def make_room(self, ahead: int) -> Iterator[QueuedSamples]:
        """Gives each running sample the pages for `ahead` more tokens, oldest sample first.

        Yields the samples that were preempted to make room.
        """
        for sample in sorted(self.running.values(), key=lambda sample: sample.began):
            needed = pages_for(min(sample.cached + ahead, sample.most), self.sizes.page_size) - len(sample.pages)
            while sample.slot in self.running and needed > self.pool.free:
                returned = self._preempt()
                if returned is not None:
                    yield returned
            if sample.slot in self.running and needed > 0:
                more = self.pool.take(needed)
                self.table[sample.slot, len(sample.pages) : len(sample.pages) + needed] = more
                sample.pages += more

    def end(self, slot: int) -> RunningSample:
        """Frees a slot and its pages, and returns the sample that it drew."""
        sample = self.running.pop(slot)
        heapq.heappush(self._slots, slot)
        self.pool.give_back(sample.pages)
        return sample

    def _number(self) -> int:
        self._began += 1
        return self._began

    def _assign(self, prompt: PromptInLane, dispatch: int) -> SlotAssignment:
        request, slot = prompt.request, heapq.heappop(self._slots)
        full, rest = divmod(len(request.tokens), self.sizes.page_size)
        shared, own = prompt.pages[:full], self.pool.take(1 if rest else 0)
        self.pool.share(shared)
        pages = [*shared, *own]
        self.table[slot, : len(pages)] = pages
        number = prompt.samples.popleft()
        self.running[slot] = RunningSample(prompt, number, slot, pages, self._number(), dispatch)
        return SlotAssignment(
            lane=prompt.lane,
            slot=slot,
            sample=request.first + number,
            prompt=request.index,
            key=request.key,
            length=len(request.tokens),
            limit=request.limit_of(number),
            copied=(prompt.pages[full], own[0]) if rest else None,
        )

    def _release_if_done(self, prompt: PromptInLane) -> None:
        """Frees the lane of a prompt none of whose samples waits for a slot."""
        if not prompt.samples:
            self._prompts.remove(prompt)
            self._lanes.append(prompt.lane)
            self.pool.give_back(prompt.pages)

    def _preempt(self) -> QueuedSamples | None:
        """Preempts the prompt that began last of those without a running sample, or else the sample that began last.

        If the prompt of a preempted sample has left its lane, it is prefilled again later, in other pages. Until it has
        samples of its own that run, it may be preempted too, although other samples of its request run.

        Returns the samples that no longer have a place in a lane of this shard.
        """
        at_work = {sample.prompt for sample in self.running.values()}
        idle = next((prompt for prompt in reversed(self._prompts) if prompt not in at_work), None)
        if idle is not None:
            returned = QueuedSamples(idle.request, deque(idle.samples))
            idle.samples.clear()
            self._release_if_done(idle)
            return returned
        last = self.end(max(self.running.values(), key=lambda sample: sample.began).slot)
        self.preempted += 1
        for prompt in self._prompts:
            if prompt.request is last.request:
                prompt.samples.appendleft(last.number)
                return None
        return QueuedSamples(last.request, deque([last.number]))
