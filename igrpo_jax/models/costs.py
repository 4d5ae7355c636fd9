"""FLOPs and bytes of each kind of program by formula: what it must do, for a roofline.

The compiler's own count takes the body of a loop once and nothing of a Pallas kernel. Here multiply-adds are two FLOPs,
and bytes are what crosses the memory of the device if each product reads its inputs and writes its output once; norms,
rotations and the softmax are left out of both. All figures are of one device and one call.

Legend: D model, V vocab, N heads, K kv heads, H head dim, G groups, P state; of a micro-batch see `packing.Shape`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import jax.sharding

from igrpo_jax.config import Config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import decoder, lora
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.logprobs import LOGITS_BYTES


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)


class Costs:
    """Of the programs of a run `c` with `model` on `mesh`, by the keys of `learner` and `sampling/engine`.

    Args:
        width: slots that a call of "insert", "move" or "harvest" works on, where these are asked for.
    """

    def __init__(self, config: Config, model: DecoderConfig, mesh: jax.sharding.Mesh, width: int = 0):
        self._c, self._model, self._width = config, model, width
        self._shards, self._tensor = sharding.batch_shards(mesh), mesh.shape["tensor"]
        self._bytes = jnp.dtype(config.model.dtype).itemsize
        shapes = decoder.shapes(model)
        linear = [(path, shape) for path, shape in shapes.items() if sharding.is_linear(path)]
        self._products = sum(math.prod(shape) for _, shape in linear)
        self._ends = sum(_inputs(path, shape) + math.prod(shape) / _inputs(path, shape) for path, shape in linear)
        self._head = model.vocab_size * model.hidden_size
        self._attended = model.pattern.count("*") * model.num_heads * model.head_dim
        self._key_values = 2 * model.pattern.count("*") * model.num_kv_heads * model.head_dim * self._bytes
        trained = lora.shapes(config.model.lora, shapes) if config.model.lora.rank else shapes
        pieces = mesh.shape["fsdp"] * self._tensor
        self._trained = sum(map(math.prod, trained.values())) / pieces  # numbers on this device
        self._stored = 4 * self._trained + bool(config.model.lora.rank) * self._bytes * model.num_params / pieces
        self._gathered = self._bytes * model.num_params / self._tensor

    @property
    def token_bytes(self) -> float:
        """Of the cache, per position of a slot."""
        return self._key_values / self._tensor

    @property
    def state_bytes(self) -> float:
        """Of the cache, per slot, whatever its length."""
        m = self._model.mamba
        if m is None:
            return 0.0
        seen = (m.conv_size - 1) * (m.num_heads * m.head_dim + 2 * m.num_groups * m.state_size) * self._bytes
        state = 4 * m.num_heads * m.head_dim * m.state_size
        return self._model.pattern.count("M") * (seen + state) / self._tensor

    def __call__(self, kind: str, *shape) -> Cost:
        return getattr(self, f"_{kind}")(*shape)

    def useful(self, context: int, lengths: Sequence[int], passes: float) -> float:
        """FLOPs of `passes` forward passes over completions of `lengths` tokens that share a context of `context`.

        As model FLOPs utilization counts them (PaLM, 2204.02311, appendix B): of all devices together, without padding
        and without what is computed once more to save memory.
        """
        prefix, tokens = context - 1, sum(lengths)
        run = self._run(prefix + tokens, _pairs(prefix, lengths))
        return passes * self._tensor * (run + self._logits(tokens)).flops

    def _accumulate(self, shape: tuple[int, int, int, int]) -> Cost:
        """Forward, backward (twice as much), with full remat forward once more; gradients added in float32."""
        run, positions = self._forward(shape)
        passes = 4 if self._c.learner.remat == "full" else 3
        added = 2 * 4 * (self._products / self._tensor + self._trained)
        # Of the backward pass of the head: logits once more, two products, and the sum of its gradient per chunk.
        backward = self._logits(positions) * 3 + Cost(0, self._chunks(positions) * 8 * self._head / self._tensor)
        return run * passes + self._logits(positions) + backward + Cost(0, added)

    def _score(self, shape: tuple[int, int, int, int]) -> Cost:
        run, positions = self._forward(shape)
        return run + self._logits(positions)

    def _apply(self) -> Cost:
        """Norm; then weight, gradient and both moments in, weight and moments out."""
        moments = 4 + jnp.dtype(self._c.optimizer.mu_dtype).itemsize
        return Cost(15 * self._trained, (4 + 4 + 2 * (4 + moments)) * self._trained)

    def _weights(self) -> Cost:
        return Cost(0, self._stored + self._gathered)

    def _prefill(self, size: int) -> Cost:
        last = Cost(2 * self._head / self._tensor, self._bytes * self._head / self._tensor)
        kept = Cost(0, size * self.token_bytes + self.state_bytes)
        return self._run(size, size**2 / 2) + last + kept

    def _empty(self, length: int) -> Cost:
        return Cost(0, self._c.rollout.slots / self._shards * (length * self.token_bytes + self.state_bytes))

    def _insert(self, size: int) -> Cost:
        return Cost(0, (1 + self._width) * (size * self.token_bytes + self.state_bytes))

    def _move(self, length: int) -> Cost:
        return Cost(0, 2 * self._width * (length * self.token_bytes + self.state_bytes))

    def _harvest(self) -> Cost:
        return Cost(0, 2 * self._width * 8 * self._c.rollout.max_completion_length)

    def _decode(self, rows: int, read: float) -> Cost:
        """One token in each of `rows` slots, with `read` positions to attend to."""
        m, sizes = self._model.mamba, self._products + self._head
        states = 4 * m.num_heads * m.head_dim * m.state_size * self._model.pattern.count("M") if m else 0
        flops = rows * (2 * sizes + 4 * self._attended * read + states) / self._tensor
        logits = 3 * 4 * rows * self._model.vocab_size / self._tensor  # written, and read to weigh and to draw
        moved = self._bytes * sizes / self._tensor + logits
        return Cost(flops, moved + rows * (read * self.token_bytes + 2 * self.state_bytes))

    def _forward(self, shape: tuple[int, int, int, int]) -> tuple[Cost, float]:
        """All sublayers of a micro-batch once, and the positions of it that go through the head."""
        units, prefix, share, width = shape
        units /= self._shards
        positions = units * share * width
        return self._run(units * prefix + positions, units * _pairs(prefix, [width] * share)), positions

    def _run(self, tokens: float, pairs: float) -> Cost:
        """All sublayers once over `tokens`, of which `pairs` of query and key attend."""
        flops = 2 * self._products * tokens + 4 * self._attended * pairs + self._recurrence() * tokens
        moved = self._bytes * (self._products + self._ends * tokens)
        return Cost(flops / self._tensor, moved / self._tensor)

    def _recurrence(self) -> float:
        """FLOPs of a token in the chunked form of Mamba-2: pairs within the chunk, and the state written and read."""
        m = self._model.mamba
        if m is None:
            return 0.0
        channels = m.num_heads * m.head_dim
        pairs = m.chunk_size * (m.num_groups * m.state_size + channels)
        return self._model.pattern.count("M") * 2 * (pairs + 2 * channels * m.state_size)

    def _chunks(self, positions: float) -> float:
        chunk = self._c.learner.logprob_chunk or LOGITS_BYTES * self._tensor // (4 * self._model.vocab_size)
        return max(1.0, positions / chunk)

    def _logits(self, positions: float) -> Cost:
        """One product with the head, whose weight each chunk reads anew; logits are written and read."""
        moved = self._bytes * self._head * self._chunks(positions) + 8 * self._model.vocab_size * positions
        return Cost(2 * self._head * positions / self._tensor, moved / self._tensor)


def _pairs(prefix: int, lengths: Sequence[int]) -> float:
    """Query and key that attend, of a prefix and of completions that share it."""
    return prefix**2 / 2 + sum(length * (prefix + length / 2) for length in lengths)


def _inputs(path: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape[: sharding.input_axes(path)])
