"""What the host knows of a shard, whatever the order of events: who has which page, and that all samples are drawn.

Two fuzzers: one calls the methods of a `Shard` in any order, and one lets a `Scheduler` drive devices of numpy, whose
pages hold for each position whose token it is.
"""

import collections
import math
from collections import deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_jax.distributed.teams import Team
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.shapes import WIDTH, Sizes
from igrpo_jax.sampling.shard import QueuedSamples, Shard
from igrpo_jax.sampling.state import Sampling, Status

KEY = np.array([1, 2], np.uint32)
END = 10**6  # the token that ends a completion


def request_of(index, tokens, limits):
    """A request for one sample per limit; its tokens are no other's."""
    return Request(1000 * index + np.arange(tokens), index, len(limits), KEY, np.array(limits))


# Ranges of sizes. In small pools most samples are preempted, and prompts take several chunks to be prefilled anew.
ANY = {"prompt": (1, 8), "completion": (1, 20), "page_size": (1, 4), "slots": (1, 5), "steps": (1, 4), "chunk": (1, 8)}
TIGHT = ANY | {"prompt": (4, 8), "completion": (8, 20), "page_size": (1, 2), "slots": (2, 4), "steps": (1, 2)}
TIGHT |= {"chunk": (1, 2)}


@st.composite
def sizes_of(draw, ranges):
    """Sizes with pools that hold one sequence, or a few pages more."""
    drawn = {name: draw(st.integers(*bounds)) for name, bounds in ranges.items()}
    sizes = Sizes(
        shard_slots=drawn["slots"],
        pages=0,
        page_size=drawn["page_size"],
        length=drawn["prompt"] + drawn["completion"],
        longest_prompt=drawn["prompt"],
        max_completion=drawn["completion"],
        steps_per_dispatch=drawn["steps"],
        prefill_chunk=drawn["chunk"],
    )
    return replace(sizes, pages=sizes.least_pages + draw(st.integers(0, 8)))


@st.composite
def requests_of(draw, sizes):
    often_most = lambda most: st.one_of(st.just(most), st.integers(1, most))
    limits = st.lists(often_most(sizes.max_completion), min_size=1, max_size=6)
    prompts = draw(st.lists(st.tuples(often_most(sizes.longest_prompt), limits), min_size=1, max_size=6))
    return [request_of(index, tokens, limits) for index, (tokens, limits) in enumerate(prompts)]


def check_pages(shard):
    """Every page has the users that it should have, and several only as a full page of one prompt."""
    holders = collections.defaultdict(list)
    parts = [*shard._prompts, *shard.running.values()]
    for part in parts:
        assert len(set(part.pages)) == len(part.pages)
        for place, page in enumerate(part.pages):
            holders[page].append((part.request, place))
    for page, users in holders.items():
        request, place = users[0]
        is_full_of_prompt = (place + 1) * shard.sizes.page_size <= len(request.tokens)
        assert len(users) == 1 or (set(users) == {users[0]} and is_full_of_prompt), (page, users)
    counts = [len(holders[page]) for page in range(shard.sizes.pages)]
    assert counts == shard.pool._users and max(holders, default=0) < shard.sizes.pages
    assert shard.pool.used == sum(map(bool, counts)) and shard.pool.used + shard.pool.free == shard.sizes.pages
    for slot, sample in shard.running.items():
        assert sample.slot == slot
        np.testing.assert_array_equal(shard.table[slot, : len(sample.pages)], sample.pages)


def check_is_free(shard):
    assert not shard.running and not shard.pending and not shard.to_prefill
    assert shard.pool.free == shard.sizes.pages
    assert sorted(shard._slots) == list(range(shard.sizes.shard_slots))
    assert sorted(shard._lanes) == list(range(shard.sizes.lanes))


class AnyOrder:
    """A shard with a queue, whose events happen as they are drawn."""

    def __init__(self, sizes, requests):
        self.shard, self.queue, self.ended = Shard(sizes), deque(), []
        self.queue += [QueuedSamples(request, deque(range(request.samples))) for request in requests]
        self.wanted = self.samples()

    def samples(self):
        """Every sample that is known, wherever it is."""
        waiting = [(part.request, number) for part in [*self.queue, *self.shard._prompts] for number in part.samples]
        in_slots = [(sample.request, sample.number) for sample in self.shard.running.values()]
        return collections.Counter(waiting + in_slots + self.ended)

    def begin(self, _):
        if self.queue and self.shard.can_begin(len(self.queue[0].request.tokens)):
            self.shard.begin(self.queue.popleft())

    def read(self, size):
        pieces = self.shard.pieces(size)
        assert sum(len(piece.tokens) for piece in pieces) <= size
        assert not any(piece.before for piece in pieces[1:])

    def start(self, dispatch):
        prompts = {prompt.lane: prompt for prompt in self.shard._prompts}
        assignments = self.shard.assign_slots(dispatch)
        assert not assignments or self.shard.pool.free >= len(self.shard.running) - 1
        for assignment in assignments:
            prompt, sample = prompts[assignment.lane], self.shard.running[assignment.slot]
            assert prompt.request is sample.request and prompt.prefilled == len(prompt.request.tokens)
            assert assignment.length == prompt.prefilled
            assert assignment.sample == sample.sample_id and assignment.limit == sample.request.limit_of(sample.number)
            full, rest = divmod(assignment.length, self.shard.sizes.page_size)
            assert sample.pages[:full] == prompt.pages[:full] and len(sample.pages) == len(prompt.pages)
            assert assignment.copied == ((prompt.pages[full], sample.pages[full]) if rest else None)

    def draw(self, ahead):
        """Makes room for some tokens, and draws some of them in each slot."""
        shard = self.shard
        before = sorted(shard.running.values(), key=lambda sample: sample.began)
        at_work = [sample.prompt for sample in before]
        in_lanes = list(shard._prompts)
        idle = [prompt for prompt in in_lanes if prompt not in at_work]
        self.queue.extendleft(shard.make_room(ahead))
        # What began last is preempted: prompts before samples, and never all samples.
        goes_on = [sample for sample in before if shard.running.get(sample.slot) is sample]
        left = [prompt for prompt in idle if prompt in shard._prompts]
        assert goes_on == before[: len(goes_on)] and left == idle[: len(left)]
        assert len(goes_on) == len(before) or (goes_on and not left)
        assert all(sample.prompt in shard._prompts for sample in goes_on if sample.prompt in in_lanes)
        for sample in shard.running.values():
            held = len(sample.pages) * shard.sizes.page_size
            assert held >= min(sample.cached + ahead, sample.most)
            sample.count = min(sample.count + ahead, sample.request.limit_of(sample.number))

    def end(self, number):
        if self.shard.running:
            slot = sorted(self.shard.running)[number % len(self.shard.running)]
            sample = self.shard.end(slot)
            self.ended.append((sample.request, sample.number))

    def hand_over(self, most):
        waiting = list(self.shard._prompts[-1].samples) if self.shard._prompts else []
        if (moved := self.shard.hand_over(most)) is not None:
            assert 0 < len(moved.samples) <= most and list(moved.samples) == waiting[-len(moved.samples) :]
            self.queue.append(moved)


EVENTS = [AnyOrder.begin, AnyOrder.read, AnyOrder.start, AnyOrder.draw, AnyOrder.end, AnyOrder.hand_over]


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [ANY, TIGHT], ids=["any", "tight"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_events_in_any_order(ranges, data):
    sizes = data.draw(sizes_of(ranges))
    case = AnyOrder(sizes, data.draw(requests_of(sizes)))
    for event, number in data.draw(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(1, 8)), max_size=60)):
        event(case, number)
        check_pages(case.shard)
        assert case.samples() == case.wanted
    while len(case.ended) < sum(case.wanted.values()):
        ended = len(case.ended)
        for event in (AnyOrder.begin, AnyOrder.read, AnyOrder.start):
            event(case, sizes.longest_prompt)
        case.draw(sizes.max_completion)
        case.end(0)
        check_pages(case.shard)
        assert len(case.ended) > ended or case.shard.to_prefill
    assert case.samples() == case.wanted
    check_is_free(case.shard)


@dataclass
class Slot:
    """A sample on a device of numpy."""

    prompt: int
    sample: int
    length: int  # of the prompt
    total: int  # of the completion
    count: int = 1

    def tokens(self):
        return [self.sample] * (self.total - 1) + [END]

    def token(self, position):
        """Whose token belongs at a position, and which it is."""
        return (self.prompt, position) if position < self.length else (self.prompt, self.sample, position)


@dataclass
class Device:
    """One shard's pages, lanes and slots."""

    sizes: Sizes
    pages: dict = field(default_factory=dict)  # by page and offset, whose token it holds
    lanes: dict = field(default_factory=dict)  # the prompt, and how many of its tokens are prefilled
    slots: dict = field(default_factory=dict)
    steps: int = 0

    def place(self, pages, position):
        return int(pages[position // self.sizes.page_size]), position % self.sizes.page_size

    def read(self, piece):
        prompt = int(piece.tokens[0]) // 1000
        assert piece.before == 0 or self.lanes[piece.lane] == (prompt, piece.before)
        for position, token in enumerate(piece.tokens, piece.before):
            assert token == 1000 * prompt + position
            self.pages[self.place(piece.pages, position)] = (prompt, position)
        self.lanes[piece.lane] = (prompt, piece.before + len(piece.tokens))

    def start(self, assignments, totals):
        held = dict(self.pages)
        for assignment in assignments:
            assert self.lanes[assignment.lane] == (assignment.prompt, assignment.length)
            for offset in range(self.sizes.page_size) if assignment.copied else ():
                self.pages[assignment.copied[1], offset] = held.get((assignment.copied[0], offset))
            total = min(totals[assignment.prompt, assignment.sample], assignment.limit)
            self.slots[assignment.slot] = Slot(assignment.prompt, assignment.sample, assignment.length, total)

    def decode(self, slots, table, furthest, min_active):
        rows = [self.slots[slot] for slot in slots]
        pages = dict(zip(map(id, rows), table[slots], strict=True))
        self.steps = 0
        is_active = lambda row: row.count < row.total
        while self.steps < self.sizes.steps_per_dispatch and sum(map(is_active, rows)) >= max(1, min_active):
            self.steps += 1
            for row in filter(is_active, rows):
                last = row.length - 1 + row.count
                assert last < furthest
                self.pages[self.place(pages[id(row)], last)] = row.token(last)
                for position in range(last + 1):
                    assert self.pages[self.place(pages[id(row)], position)] == row.token(position)
                row.count += 1


class Engine:
    """What a Scheduler calls, on devices of numpy; `totals` has the tokens of each completion, by prompt and sample."""

    eos_ids = frozenset([END])

    def __init__(self, sizes, shards, totals):
        self.sizes, self.shards, self.totals = sizes, shards, totals
        self.shard_slots, self.slots = sizes.shard_slots, sizes.shard_slots * shards
        self.programs = SimpleNamespace(window_lengths={1: (), sizes.shard_slots: ()})
        self.dispatches = 0
        self.team = Team()

    def release_followers(self):
        pass

    def weights(self, params):
        return params

    def empty(self):
        return [Device(self.sizes) for _ in range(self.shards)]

    def chunk_size(self, to_prefill):
        return min(to_prefill, self.sizes.prefill_chunk)

    def row_bucket(self, needed):
        return min(rows for rows in self.programs.window_lengths if rows >= needed)

    def prefill(self, weights, state, size, pieces):
        for device, own in zip(state, pieces, strict=True):
            assert sum(len(piece.tokens) for piece in own) <= size and len({piece.lane for piece in own}) == len(own)
            assert not any(piece.before for piece in own[1:])
            for piece in own:
                device.read(piece)
        return state

    def fork(self, state, assignments, sampling):
        for device, own in zip(state, assignments, strict=True):
            for first in range(0, len(own), WIDTH):
                device.start(own[first : first + WIDTH], self.totals)
        return state

    def decode(self, weights, state, slots, tables, furthest, min_active, sampling):
        self.dispatches += 1
        counts, active = np.zeros((2, self.shards, self.shard_slots), int)
        for shard, device in enumerate(state):
            device.decode(slots[shard], tables[shard].copy(), min(furthest, self.sizes.length), min_active[shard])
            for slot, row in device.slots.items():
                counts[shard, slot], active[shard, slot] = row.count, row.count < row.total
        steps = [device.steps for device in state]
        return state, Status(*map(jnp.asarray, (active.ravel() > 0, counts.ravel(), steps)))

    def harvest(self, state, slots):
        rows = [state[slot // self.shard_slots].slots[slot % self.shard_slots] for slot in slots]
        tokens = np.zeros((-(-len(rows) // WIDTH) * WIDTH, self.sizes.max_completion), int)
        for i, row in enumerate(rows):
            tokens[i, : row.total] = row.tokens()
        return [(piece, piece * 0.0, np.zeros(WIDTH)) for piece in tokens.reshape(-1, WIDTH, tokens.shape[1])]


def run(sizes, shards, ahead, later, totals):
    """Draws completions of `totals` tokens, by prompt and sample; returns the scheduler.

    Args:
        later: requests, each with the number of calls before which it is submitted.
    """
    engine = Engine(sizes, shards, totals)
    scheduler = Scheduler(engine, ahead)
    scheduler.start({}, Sampling(1.0))
    # In each dispatch the sample that began first draws all tokens that it may, or some sample ends early. The results
    # come one dispatch late where the device is ahead.
    most = sum(math.ceil(total / sizes.steps_per_dispatch) + 1 + ahead for total in totals.values())
    samples, calls, later = [], 0, deque(later)
    while scheduler.pending or later:
        while later and (later[0][1] <= calls or not scheduler.pending):
            scheduler.submit(later.popleft()[0])
        samples += scheduler.advance()
        for shard in scheduler.shards:
            check_pages(shard)
        calls += 1
        assert engine.dispatches <= most, "samples are drawn again and again"
        assert calls <= 2 * (most + len(totals)), "nothing runs although samples wait"
    assert len(samples) == len(totals)
    assert {(sample.request.index, sample.sample_id) for sample in samples} == totals.keys()
    for sample in samples:
        total = totals[sample.request.index, sample.sample_id]
        assert sample.tokens.tolist() == [sample.sample_id] * (total - 1) + [END]
    for shard in scheduler.shards:
        check_is_free(shard)
    return scheduler


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [ANY, TIGHT], ids=["any", "tight"])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_scheduler_draws_all_from_pages_that_hold_what_they_should(ranges, data):
    sizes = data.draw(sizes_of(ranges))
    requests = data.draw(requests_of(sizes))
    calls = sorted(data.draw(st.integers(0, 6)) for _ in requests)
    totals = {
        (request.index, number): request.limit_of(number) for request in requests for number in range(request.samples)
    }
    shards, ahead = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1))
    run(sizes, shards, ahead, zip(requests, calls, strict=True), totals)


SIZES = Sizes(
    shard_slots=4,
    pages=10,
    page_size=4,
    length=12,
    longest_prompt=8,
    max_completion=4,
    steps_per_dispatch=4,
    prefill_chunk=64,
)


def test_a_prompt_begins_where_a_page_is_left_for_each_that_runs_or_waits():
    shard = Shard(SIZES)
    assert shard.can_begin(8) and not shard.can_begin(40)  # 2 pages and 1; 10 and 1
    shard.begin(QueuedSamples(request_of(0, 5, [4, 4]), deque([0, 1])))
    assert shard.pool.used == 2
    assert shard.can_begin(24) and not shard.can_begin(25)  # with the page of the prompt that waits
    shard.pieces(64)
    assert len(shard.assign_slots(0)) == 2 and not shard.pending
    assert list(shard.make_room(100)) == []  # of 5 + 4 tokens the last one is never written, so that 2 pages hold all
    assert shard.pool.used == 3  # each has the first page of the prompt, and a copy of the second one
    assert shard.can_begin(16) and not shard.can_begin(17)  # 4 pages, and 1 for each of three
    shard.begin(QueuedSamples(request_of(1, 1, [4, 4]), deque([0, 1])))
    assert not shard.can_begin(1)  # the slots are those of the samples that wait


def test_the_prompt_that_began_last_is_preempted_first():
    sizes = Sizes(
        shard_slots=3,
        pages=9,
        page_size=1,
        length=8,
        longest_prompt=2,
        max_completion=6,
        steps_per_dispatch=1,
        prefill_chunk=64,
    )
    shard = Shard(sizes)
    first, *others = (request_of(index, tokens, [6]) for index, tokens in enumerate((1, 2, 2)))
    shard.begin(QueuedSamples(first, deque([0])))
    shard.pieces(64)
    shard.assign_slots(0)
    for request in others:
        shard.begin(QueuedSamples(request, deque([0])))
    assert shard.pool.free == 4
    preempted = list(shard.make_room(5))  # one page more than are free
    assert [(waiting.request, list(waiting.samples)) for waiting in preempted] == [(others[1], [0])]
    assert shard.pool.free == 1 and shard.pending == 1 and len(shard.running) == 1


def test_a_sample_that_begins_anew_does_not_stop_the_one_that_began_first():
    """Both are of one prompt. Its pages are in use twice: by the sample that goes on, and to prefill for the other."""
    tokens, total = 4, 13
    sizes = Sizes(
        shard_slots=2,
        pages=tokens + total + 1,
        page_size=1,
        length=tokens + total,
        longest_prompt=tokens,
        max_completion=total,
        steps_per_dispatch=1,
        prefill_chunk=1,
    )
    request = request_of(0, tokens, [total, total])
    scheduler = run(sizes, 1, 0, [(request, 0)], {(0, 0): total, (0, 1): total})
    assert scheduler.usage.preempted > 0 and scheduler.usage.pages_in_use == 1
    scheduler.start({}, Sampling(1.0))
    scheduler.submit(replace(request, samples=1, limit=total))
    assert len(list(scheduler.drain())) == 1 and scheduler.usage.preempted == 0  # since this start


@pytest.mark.parametrize(
    ("running", "queued", "fewer", "least"),
    [(16, True, 4, 15), (1, True, 4, 1), (16, False, 4, 5), (5, False, 4, 5), (4, False, 4, 1), (3, False, 0, 1)],
)
def test_a_dispatch_goes_on_with_so_many_active_slots(running, queued, fewer, least):
    """Of 16 slots, 2 are free before it stops for samples that wait; else as many run as a smaller program has rows."""
    assert (
        Scheduler(Engine(replace(SIZES, shard_slots=16, pages=9), 1, {}), 0)._min_active(running, queued, fewer)
        == least
    )
