"""The few shapes of micro-batches that a run has: how many tokens each shard of the batch runs at once.

They follow only from the configuration and the longest texts, so that their programs can be compiled before the first
update. A step's tokens fill micro-batches of the full size, and the remainder goes into smaller ones.
"""

import itertools
from collections.abc import Iterator

from igrpo_jax.config import Config
from igrpo_jax.models.segments import BLOCK

# The fixed cost of a micro-batch, in units of a full one's tokens: adding its gradient, and gathering the weights.
OVERHEAD = 1 / 32


class MicroShapes:
    """The sizes of micro-batches for one configuration and mesh.

    Args:
        shards: ways in which the batch is split over devices.
        longest_prompt: tokens of the longest q or q'.

    Attributes:
        sizes: tokens of a micro-batch on each shard, the largest first.
        completions_per_unit: how many completions of a group stay together, with one context.
        max_completion: tokens of the longest completion.
        unit: the longest unit: tokens of its prefix, number of its completions, and tokens of each completion.
    """

    def __init__(self, config: Config, shards: int, longest_prompt: int):
        self.shards = shards
        self.max_completion = config.rollout.max_completion_length
        minibatches = config.learner.minibatches
        # Completions of a group by stage: refinements, and drafts where they are trained on.
        groups = [config.algorithm.num_generations] + [config.algorithm.num_drafts] * config.algorithm.train_drafts
        groups = [size for size in groups if size]
        rows = [config.prompts_per_step * size for size in groups]
        self.completions_per_unit = (
            _most_completions_per_unit(groups, rows, minibatches, shards) if config.learner.shared_prefix else 1
        )
        self.unit = (longest_prompt - 1, self.completions_per_unit, self.max_completion)
        units = -(-max(rows) // self.completions_per_unit // minibatches // shards)  # on the fullest shard
        most = units * (self.unit[0] + self.completions_per_unit * self.max_completion)
        least = self.unit[0] + self.max_completion  # a context and one completion stay together
        full = max(min(config.learner.tokens_per_microbatch, most), least)
        sizes = {_rounded(max(round(full * part), BLOCK)) for part in config.learner.microbatch_sizes}
        self.sizes = tuple(sorted(sizes, reverse=True))

    @property
    def largest(self) -> int:
        """The largest size, which holds every context with one of its completions."""
        return self.sizes[0]

    def choices(self, tokens: int) -> Iterator[tuple[int, ...]]:
        """Yields the sizes of micro-batches that have space for `tokens` on all shards together.

        They come in rounds, each with one more micro-batch of the largest size, and within a round the cheapest first.
        Of the smaller sizes there are never more than a larger micro-batch would hold.
        """
        most = [-(-larger // size) for larger, size in itertools.pairwise(self.sizes)]
        for extra in itertools.count():
            full = -(-tokens // (self.largest * self.shards)) + extra
            least = max(0, full - 1) if extra == 0 else full
            counts = itertools.product(range(least, full + 1), *(range(count + 1) for count in most))
            options = [
                [size for size, count in zip(self.sizes, chosen, strict=True) for _ in range(count)]
                for chosen in counts
            ]
            roomy = [sizes for sizes in options if sum(sizes) * self.shards >= tokens]
            yield from map(tuple, sorted(roomy, key=self._cost))

    def _cost(self, sizes: list[int]) -> float:
        return sum(sizes) + len(sizes) * OVERHEAD * self.largest


def _rounded(size: int) -> int:
    """Returns `size` rounded up to a multiple of 512 or 128, or of BLOCK if it is small, which kernels handle well."""
    step = next((step for step in (512, 128) if size >= 4 * step), BLOCK)
    return -(-size // step) * step


def _most_completions_per_unit(groups: list[int], rows: list[int], minibatches: int, shards: int) -> int:
    """Returns the most completions per unit with which groups divide evenly into units and units into minibatches, and
    every minibatch has a unit for each shard; 1 if there is no such number.

    Args:
        groups: completions of a group, by stage.
        rows: completions of a step, by stage.
    """
    fitting = [
        part
        for part in range(2, min(groups) + 1)
        if all(size % part == 0 for size in groups)
        and all(count // part % minibatches == 0 for count in rows)
        and min(rows) // part // minibatches >= shards
    ]
    return max(fitting, default=1)
