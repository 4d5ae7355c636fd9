"""FLOPs and bytes of a model's passes by formula: what a program must do, for a roofline.

The compiler's own count takes the body of a loop once and nothing of a Pallas kernel. Here multiply-adds are two FLOPs,
and bytes are what crosses the memory of the device if each product reads its inputs and writes its output once; norms,
rotations and the softmax are left out of both. Every Cost is that of one device and one call.

`ModelCosts` counts forward passes and the sampler's cache; `TrainingCosts` adds the backward pass and the optimizer.

Legend: D model, V vocab, N heads, K kv heads, H head dim, G groups, P state.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import jax.sharding

from igrpo_jax.config import Config
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.chips import Chip
from igrpo_jax.distributed.programs import Cost
from igrpo_jax.models import decoder, lora
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.logprobs import chunk_positions

REDUCTION_SECONDS = 8e-6  # that a chip of a TPU slice waits for a reduction of few bytes over its neighbours


class ModelCosts:
    """The costs of a forward pass, and of slots of the sampler's cache, in one dtype.

    Args:
        tensor: devices that share one copy of the weights.
    """

    def __init__(self, cfg: DecoderConfig, dtype: str, tensor: int):
        self.cfg = cfg
        self.item_bytes = jnp.dtype(dtype).itemsize
        self.tensor = tensor
        linear = [(path, shape) for path, shape in decoder.shapes(cfg).items() if sharding.is_linear(path)]
        self.linear_weights = sum(math.prod(shape) for _, shape in linear)
        self.head_weights = cfg.vocab_size * cfg.hidden_size
        # Numbers that come out of all products for a token, and those with the numbers that go in.
        self.outputs = sum(math.prod(shape) / _inputs(path, shape) for path, shape in linear)
        self._activations = sum(_inputs(path, shape) for path, shape in linear) + self.outputs
        self._attended = cfg.pattern.count("*") * cfg.num_heads * cfg.head_dim
        self._key_values = 2 * cfg.pattern.count("*") * cfg.num_kv_heads * cfg.head_dim * self.item_bytes

    @property
    def token_bytes(self) -> float:
        """Bytes of the cache per position of a slot, on a device that holds the slot."""
        return self._key_values / self.tensor

    @property
    def state_bytes(self) -> float:
        """Bytes of the cache per slot, whatever its length."""
        m = self.cfg.mamba
        if m is None:
            return 0.0
        seen = (m.conv_size - 1) * (m.num_heads * m.head_dim + 2 * m.num_groups * m.state_size) * self.item_bytes
        state = 4 * m.num_heads * m.head_dim * m.state_size
        return self.cfg.pattern.count("M") * (seen + state) / self.tensor

    def cache_slots(self, slots: float, length: int) -> Cost:
        """Returns the cost of reading or writing this many slots of `length` positions once."""
        return Cost(0, slots * (length * self.token_bytes + self.state_bytes))

    def layers(self, tokens: float, pairs: float) -> Cost:
        """Returns the cost of all sublayers once over `tokens`, of which `pairs` of query and key attend."""
        flops = 2 * self.linear_weights * tokens + 4 * self._attended * pairs + self._recurrence() * tokens
        moved = self.item_bytes * (self.linear_weights + self._activations * tokens)
        return Cost(flops / self.tensor, moved / self.tensor)

    def logits(self, positions: float, chunks: float = 1.0) -> Cost:
        """Returns the cost of one product with the head, whose weight each chunk reads again; logits are written and
        read in float32."""
        moved = self.item_bytes * self.head_weights * chunks + 8 * self.cfg.vocab_size * positions
        return Cost(2 * self.head_weights * positions / self.tensor, moved / self.tensor)

    def prefill(self, size: int) -> Cost:
        """Returns the cost of reading one prompt of `size` tokens, with the logits after its last token."""
        last = Cost(2 * self.head_weights / self.tensor, self.item_bytes * self.head_weights / self.tensor)
        return self.layers(size, size**2 / 2) + last + self.cache_slots(1, size)

    def decode(self, rows: int, read: float) -> Cost:
        """Returns the cost of one token in each of `rows` slots, with `read` positions to attend to."""
        m, weights = self.cfg.mamba, self.linear_weights + self.head_weights
        states = 4 * m.num_heads * m.head_dim * m.state_size * self.cfg.pattern.count("M") if m else 0
        flops = rows * (2 * weights + 4 * self._attended * read + states) / self.tensor
        logits = 3 * 4 * rows * self.cfg.vocab_size / self.tensor  # written, and read to weigh and to draw
        moved = self.item_bytes * weights / self.tensor + logits
        held = rows / self.cfg.row_parts
        return Cost(flops, moved + held * read * self.token_bytes + 2 * rows * self.state_bytes)

    def decode_seconds(self, chip: Chip, rows: int, read: float) -> float:
        """Returns the least time of `decode` on a chip, with the reductions that `tensor` devices wait for.

        Each is taken to last REDUCTION_SECONDS, and as long as its bytes need on the links. They are two of each layer
        (one of Mamba-2), one of the embedding and two of the draw; and where attention splits rows, two exchanges of
        query heads in each of its sublayers.
        """
        cost = self.decode(rows, read)
        seconds = max(cost.flops / chip.flops, cost.bytes / chip.bandwidth)
        if self.tensor == 1:
            return seconds
        sublayers = len(self.cfg.pattern)
        received = 2 * (self.tensor - 1) / self.tensor * rows * self.cfg.hidden_size * self.item_bytes
        seconds += (sublayers + 3) * REDUCTION_SECONDS + (sublayers + 1) * received / chip.links
        others, exchanges = self.cfg.row_parts - 1, 2 * self.cfg.pattern.count("*")
        if not others:
            return seconds
        sent = others * rows * self.cfg.num_heads / self.tensor * self.cfg.head_dim * self.item_bytes
        return seconds + exchanges * (REDUCTION_SECONDS + sent / chip.links)

    def useful_flops(self, context: int, lengths: Sequence[int], passes: float) -> float:
        """Returns the FLOPs of `passes` forward passes over completions of `lengths` tokens after one shared context.

        They are counted as model FLOPs utilization counts them (PaLM, 2204.02311, appendix B): of all devices together,
        without padding and without what is computed once more to save memory.
        """
        prefix, tokens = context - 1, sum(lengths)
        layers = self.layers(prefix + tokens, _pairs(prefix, lengths))
        return passes * self.tensor * (layers + self.logits(tokens)).flops

    def _recurrence(self) -> float:
        """Returns the FLOPs of a token in the chunked form of Mamba-2: pairs within the chunk, and the state written
        and read."""
        m = self.cfg.mamba
        if m is None:
            return 0.0
        channels = m.num_heads * m.head_dim
        pairs = m.chunk_size * (m.num_groups * m.state_size + channels)
        return self.cfg.pattern.count("M") * 2 * (pairs + 2 * channels * m.state_size)


class TrainingCosts:
    """The costs of the programs of an update.

    Args:
        unit: what a full micro-batch consists of: the tokens of a prefix, the number of its completions, and their
            tokens.
    """

    def __init__(self, config: Config, cfg: DecoderConfig, mesh: jax.sharding.Mesh, unit: tuple[int, int, int]):
        self.model = ModelCosts(cfg, config.model.dtype, mesh.shape["tensor"])
        self._chunk = chunk_positions(config.learner.logprob_chunk, cfg.vocab_size, mesh)
        self._unit = unit
        tensor = self.model.tensor
        shapes = decoder.shapes(cfg)
        trained = lora.shapes(config.model.lora, shapes) if config.model.lora.rank else shapes
        pieces = mesh.shape["fsdp"] * tensor
        self._trained = sum(map(math.prod, trained.values())) / pieces  # numbers on this device
        is_muon = config.optimizer.name == "muon"
        self._orthogonalized = sum(map(_newton_schulz, trained, trained.values())) / pieces if is_muon else 0

    def accumulate(self, size: int, remat: str) -> Cost:
        """Returns the cost of the gradient of `size` tokens on each shard: forward, backward (twice as much), and
        forward once more of what is recomputed; gradients are added in float32."""
        model = self.model
        layers, positions = self._forward(size)
        passes = 4 if remat == "full" else 3
        added = 2 * 4 * (model.linear_weights / model.tensor + self._trained)
        # The backward pass of the head: logits once more or kept, two products, and the sum of its gradient per chunk.
        head_gradient = Cost(0, self._chunks(positions) * 8 * model.head_weights / model.tensor)
        backward = self._logits(positions) * (2 if remat == "none" else 3) + head_gradient
        return layers * passes + self._logits(positions) + backward + Cost(0, added)

    def least_kept_bytes(self, size: int, remat: str) -> float:
        """Returns fewer bytes than the backward pass of `size` tokens keeps on a device.

        With "dots" they are what products give, with "logits" half as much again, for the inputs of other functions,
        and with "none" the logits too.
        """
        model = self.model
        kept = {"full": 0.0, "dots": 1.0, "logits": 1.5, "none": 1.5}[remat]
        logits = 4 * self._forward(size)[1] * model.cfg.vocab_size if remat == "none" else 0
        return (kept * size * model.outputs * model.item_bytes + logits) / model.tensor

    def rescore(self, size: int) -> Cost:
        """Returns the cost of the log-probs of a micro-batch of `size` tokens on each shard."""
        layers, positions = self._forward(size)
        return layers + self._logits(positions)

    def apply(self, moment_bytes: int) -> Cost:
        """Returns the cost of an optimizer step: the norm; then weight, gradient and moments in, weight and moments
        out; for Muon five steps of Newton and Schulz with each matrix, divided over the devices.

        Args:
            moment_bytes: bytes of the optimizer's state on this device.
        """
        return Cost(15 * self._trained + self._orthogonalized, 3 * 4 * self._trained + 2 * moment_bytes)

    def _forward(self, size: int) -> tuple[Cost, float]:
        """Returns the cost of all sublayers of a micro-batch once, and its positions that go through the head."""
        prefix, completions, length = self._unit
        units = size / (prefix + completions * length)
        return self.model.layers(size, units * _pairs(prefix, [length] * completions)), units * completions * length

    def _logits(self, positions: float) -> Cost:
        return self.model.logits(positions, self._chunks(positions))

    def _chunks(self, positions: float) -> float:
        """Returns how many chunks the head runs in, as `models.logprobs` cuts them."""
        return max(1.0, positions / self._chunk)


def _pairs(prefix: int, lengths: Sequence[int]) -> float:
    """Returns how many pairs of query and key attend, of a prefix and of completions that share it."""
    return prefix**2 / 2 + sum(length * (prefix + length / 2) for length in lengths)


def _newton_schulz(path: str, shape: tuple[int, ...]) -> int:
    """Returns the FLOPs of the five steps with which Muon orthogonalizes a matrix; 0 for what is not a matrix."""
    inputs = sharding.matrix_inputs(path)
    if inputs is None:
        return 0
    small, large = sorted((math.prod(shape[:inputs]), math.prod(shape[inputs:])))
    return 5 * (4 * small**2 * large + 2 * small**3)


def _inputs(path: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape[: sharding.input_axes(path)])
