"""What a correct backend computes: outputs of a model with random weights in float32 on a CPU, kept in a small file.

    JAX_PLATFORMS=cpu python -m benchmarks.accelerator.reference

writes reference.npz beside this module (about a minute). Weights and tokens are drawn by numpy from a seed, which gives
the same numbers on every machine; a checksum in the file shows it. The file holds chosen positions only:

    logits     [Q, 2, 64]  of 64 tokens of the vocabulary at the last position of each context and one before
    logprob    [Q, G, T]   of each token of the completions, in nats
    entropy    [Q, G, T]   in nats
    norms      [parameters]    norm of the gradient of each parameter, by sorted path
    slices     [parameters, 8] eight entries of it

The gradient is that of the sum of log-probs with random weights, as an update computes it.
"""

import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import models
import numpy as np

PATH = Path(__file__).with_name("reference.npz")
CONTEXTS, GROUP, PREFIX, COMPLETION = 8, 2, 48, 32  # Q, G, tokens of the longest context without its last, T
VOCABULARY, ENTRIES = 64, 8  # tokens whose logits are kept, entries of each gradient
SHAPES = ("qwen2-tiny", "smollm2-135m")


class Batch(NamedTuple):
    """Contexts with completions, each context apart from its last token."""

    prefix: np.ndarray  # [Q, P] int32
    length: np.ndarray  # [Q] int32
    last: np.ndarray  # [Q] int32
    completions: np.ndarray  # [Q, G, T] int32
    weight: np.ndarray  # [Q, G, T] float32, of each log-prob in the sum whose gradient is taken


def params(cfg) -> dict[str, np.ndarray]:
    """Returns random float32 weights by path. Every sublayer takes part, and none has a scale of 1."""
    from igrpo_jax.models import decoder

    drawn = {}
    for number, (path, shape) in enumerate(sorted(decoder.shapes(cfg).items())):
        noise = np.random.default_rng([0, number]).standard_normal(shape, np.float32)
        drawn[path] = 1 + np.float32(0.1) * noise if path.endswith("scale") else np.float32(0.04) * noise
    return drawn


def batch(vocab_size: int) -> Batch:
    """Returns random tokens of `vocab_size`; contexts have different lengths, and are padded on the right."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.integers(0, vocab_size, shape, np.int32)
    length = np.linspace(PREFIX // 2, PREFIX, CONTEXTS).astype(np.int32)
    prefix = np.where(np.arange(PREFIX) < length[:, None], draw(CONTEXTS, PREFIX), 0).astype(np.int32)
    shape = (CONTEXTS, GROUP, COMPLETION)
    weight = (rng.standard_normal(shape) / np.prod(shape)).astype(np.float32)
    return Batch(prefix, length, draw(CONTEXTS), draw(*shape), weight)


def checksum(weights: dict[str, np.ndarray], data: Batch) -> int:
    """Returns a number that any other weights or tokens would change."""
    value = 0
    for array in (*(weights[path] for path in sorted(weights)), *data):
        value = zlib.crc32(np.ascontiguousarray(array).tobytes(), value)
    return value


def outputs(cfg, weights, data: Batch, dtype: str) -> dict[str, np.ndarray]:
    """Returns the arrays of the module's docstring, computed in `dtype` on the mesh that is set."""
    import jax

    packed = _packed(cfg, data)
    *per_token, gradient = jax.jit(partial(_gradient, cfg, dtype=dtype))(weights, *packed[:2])
    logprob, entropy = (np.asarray(x)[packed.places].reshape(data.completions.shape) for x in per_token)
    logits = jax.jit(partial(_logits, cfg, dtype=dtype))(weights, data)
    flat = [np.asarray(gradient[path], np.float32).ravel() for path in sorted(gradient)]
    return {
        "logits": np.asarray(logits),
        "logprob": logprob,
        "entropy": entropy,
        "norms": np.array([np.linalg.norm(x.astype(np.float64)) for x in flat], np.float32),
        "slices": np.stack([x[np.linspace(0, x.size - 1, ENTRIES).astype(int)] for x in flat]),
    }


class Packed(NamedTuple):
    """The completions of a Batch in packed sequences, with as many contexts on each shard of the batch."""

    batch: Any  # learning.packing.TrainBatch
    weight: np.ndarray  # [S, F] float32, of each log-prob
    places: tuple[np.ndarray, np.ndarray]  # where the tokens of all completions stand, in their order


def _packed(cfg, data: Batch) -> Packed:
    """Returns `data` packed for a model on the mesh that is set."""
    import jax

    from igrpo_jax.distributed import sharding
    from igrpo_jax.learning.packing import MicroBatch, Piece, Unit, fill
    from igrpo_jax.models import spans
    from igrpo_jax.models.segments import BLOCK, most_segments
    from igrpo_jax.records import Completion

    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else sharding.batch_shards(mesh)
    nothing = np.zeros(COMPLETION, np.float32)  # no log-probs of a sampler
    pieces = [
        Piece(
            Unit(
                np.append(prefix[:length], last),
                tuple(Completion("refine", i, tokens, nothing, True) for i, tokens in enumerate(completions)),
                np.zeros(GROUP, np.float32),
            ),
            0,
            GROUP,
        )
        for prefix, length, last, completions, _ in zip(*data, strict=True)
    ]
    by_shard = [pieces[i::shards] for i in range(shards)]
    most = max(sum(piece.prefix_group.tokens for piece in own) for own in by_shard)
    micro_batch = MicroBatch(-(-most // BLOCK) * BLOCK, by_shard)
    width = spans.width(cfg, 1 if mesh.empty else mesh.shape["tensor"])
    segments = most_segments(micro_batch.size, width) if width else None
    batch = fill(micro_batch, cfg.mamba and cfg.mamba.chunk_size, segments)
    number = {id(piece.unit): at for at, piece in enumerate(pieces)}
    places = np.zeros((2, *data.completions.shape), int)
    for shard, start, unit, i in micro_batch.places():
        places[:, number[id(unit)], i] = np.full(COMPLETION, shard), start + np.arange(COMPLETION)
    where = tuple(places.reshape(2, -1))
    weight = np.zeros(batch.tokens.shape, np.float32)
    weight[where] = data.weight.ravel()
    return Packed(batch, weight, where)


def _gradient(cfg, weights, batch, weight, dtype: str) -> tuple:
    import jax

    from igrpo_jax.models.logprobs import packed_logprobs

    def total(weights):
        logprob, entropy = packed_logprobs(
            cfg,
            weights,
            batch.tokens,
            batch.targets,
            batch.segments,
            batch.completion_tokens,
            dtype=dtype,
            temperature=1.0,
            chunk=256,
            remat="full",
        )
        return (logprob * weight).sum(), (logprob, entropy)

    gradient, (logprob, entropy) = jax.grad(total, has_aux=True)(weights)
    return logprob, entropy, gradient


def _logits(cfg, weights, data: Batch, dtype: str) -> Any:
    import jax.numpy as jnp

    from igrpo_jax.models import decoder

    cast = decoder.cast(weights, dtype)
    positions = jnp.broadcast_to(jnp.arange(PREFIX), data.prefix.shape)
    hidden, _ = decoder.apply(cfg, cast, data.prefix, positions)
    at = jnp.stack([data.length - 1, data.length // 2], axis=1)
    kept = jnp.linspace(0, cfg.vocab_size - 1, VOCABULARY).astype(int)
    return decoder.logits(cfg, cast, jnp.take_along_axis(hidden, at[:, :, None], axis=1))[..., kept]


def read(shape: str) -> dict[str, np.ndarray]:
    """Returns the reference of a shape, by the names of the module's docstring, and `checksum`."""
    with np.load(PATH) as file:
        return {name.partition("/")[2]: file[name] for name in file.files if name.startswith(f"{shape}/")}


def main() -> None:
    """Writes the file."""
    import jax

    from igrpo_jax.models.config import from_hf

    assert jax.default_backend() == "cpu", "export JAX_PLATFORMS=cpu"
    arrays = {}
    for shape in SHAPES:
        cfg = from_hf(models.SHAPES[shape], shape)
        weights, data = params(cfg), batch(cfg.vocab_size)
        arrays |= {f"{shape}/{name}": array for name, array in outputs(cfg, weights, data, "float32").items()}
        arrays[f"{shape}/checksum"] = np.uint32(checksum(weights, data))
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
