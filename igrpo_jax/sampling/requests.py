"""The sampler's requests, the samples that it returns, and a count of the device work that they took."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from igrpo_jax.records import Completion, Prompt


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
    # Whether its next score may bring more requests, asked whenever one is to come; a dispatch then waits a little.
    may_follow_up: Callable[[], bool] = lambda: False
    # Where the samples are scored (see `scoring`): the problem, the text of the draft that `tokens` show, and the
    # callback that gets each scored completion.
    prompt: Prompt | None = None
    draft: str | None = None
    scored: Callable[[Completion], None] | None = None

    def limit_of(self, number: int) -> int:
        """Returns the most tokens of the sample that is `number` within the request, from 0."""
        return int(np.broadcast_to(self.limit, (self.samples,))[number])


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
    preempted: int = 0  # samples preempted because pages ran out, and drawn again later
    pages: int = 0  # pages of the cache
    peak_pages: int = 0  # pages in use at once, at most

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
    def pages_in_use(self) -> float:
        """Fraction of the pages that were in use at the fullest moment."""
        return self.peak_pages / self.pages if self.pages else 0.0

    @property
    def overlap(self) -> float:
        """Fraction of the decode steps in which several stages were running."""
        return self.mixed_slot_steps / self.slot_steps if self.slot_steps else 0.0
