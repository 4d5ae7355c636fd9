"""Brings the policy's weights to the sampler's mesh, once a step: LoRA's changes merged, cast, and with copied heads.

On CPUs the copy has its weights by outputs (`models.products`).

The weights are copied part by part, where a part is a sublayer or a parameter outside the sublayers: in one program for
all weights the compiler would exchange many at once, and hold gigabytes in addition to the result. Parts with the same
shapes share a program. A matrix that is larger than every matrix of the sublayers is copied in pieces (`row_sync`).
"""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.programs import Cost, Program, tree_bytes
from igrpo_jax.models import decoder, heads, lora
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.products import OutputMajor, output_major, output_major_shape
from igrpo_jax.sampling.programs import weight_shardings
from igrpo_jax.sampling.row_sync import RowSync, SyncProgram

# Parts that are in flight before the host waits for the oldest. With 32 programs in flight on a device, XLA blocks its
# threads until one of them ends. On CPUs a program with collectives needs these same threads to end.
MAX_IN_FLIGHT = 8


class WeightSync:
    """The programs that make the rollout copy of the weights.

    Args:
        cfg: the model that is trained.
        mesh: mesh of the training.
        sampler_mesh: mesh of the copy, with the same devices in the same order; those of its axis `tensor` share one
            copy.
        dtype: dtype of the copy.
    """

    def __init__(self, cfg: DecoderConfig, mesh: jax.sharding.Mesh, sampler_mesh: jax.sharding.Mesh, dtype: str):
        self._cfg = cfg
        self._mesh = mesh
        self._tensor = sampler_mesh.shape["tensor"]
        self._dtype = dtype
        sampler_cfg = heads.spread_config(cfg, self._tensor)
        self._shapes = decoder.shapes(sampler_cfg)
        self._shardings = {path: sharding.param_sharding(sampler_mesh, path, gathered=True) for path in self._shapes}
        self._stored = weight_shardings(sampler_cfg, sampler_mesh)
        self._by_rows = {
            path: RowSync(path, self._shapes[path], mesh, self._shardings[path], dtype, pieces)
            for path in self._shapes
            if (pieces := self._pieces(path)) > 1
        }
        self._jitted = {
            first: jax.jit(self._synced, out_shardings={path: self._stored[path] for path in paths})
            for first, paths in _parts(self._shapes).items()
            if first == self._first_of(first) and first not in self._by_rows
        }

    def __call__(self, params: decoder.Params) -> decoder.Params:
        """Returns the rollout copy of `params`; parts that need no change are passed through without a copy."""
        synced = {path: by_rows(params[path]) for path, by_rows in self._by_rows.items()}
        dispatched: collections.deque[decoder.Params] = collections.deque()
        for part, paths in _parts(params).items():
            if part in synced:
                continue
            if all(self._is_ready(path, params[path]) for path in paths):
                synced |= {path: params[path] for path in paths}
                continue
            first = self._first_of(part)
            own = self._jitted[first]({first + path.removeprefix(part): params[path] for path in paths})
            synced |= {part + path.removeprefix(first): x for path, x in own.items()}
            dispatched.append(own)
            if len(dispatched) > MAX_IN_FLIGHT:
                jax.block_until_ready(dispatched.popleft())
        return {path: synced[path] for path in self._shapes}

    def programs(self, params: decoder.Params) -> list[SyncProgram]:
        """Returns each program as `aot` compiles it, for the abstract `params`; a run calls the jitted functions."""
        synced = [by_rows.program(params[path]) for path, by_rows in self._by_rows.items()]
        parts = _parts(params)
        firsts = [self._first_of(part) for part in parts]
        for first, jitted in self._jitted.items():
            own = {path: params[path] for path in parts[first]}
            held = tree_bytes(own) + self.copy_bytes(first)
            name = self._cfg.pattern[int(first.split("/")[1])] if first.startswith("blocks/") else first
            program = Program(
                "weights",
                jitted,
                lambda name, own=own: (own,),
                self._mesh,
                shapes=[(name,)],
                cost=lambda name, held=held: Cost(0, held),
            )
            synced.append(SyncProgram(program, firsts.count(first), held))
        return synced

    @functools.cached_property
    def received_bytes(self) -> int:
        """Bytes of the copy that a device receives from others, for the device that receives most."""
        counted: dict[tuple, np.ndarray] = {}
        total = np.zeros(self._mesh.size, np.int64)
        for path, shape in self._shapes.items():
            trained, copied = sharding.param_sharding(self._mesh, path), self._shardings[path]
            key = shape, trained.spec, copied.spec
            if key not in counted:
                counted[key] = _lacking(shape, trained, copied)
            total += counted[key]
        return int(total.max()) * jnp.dtype(self._dtype).itemsize

    def copy_bytes(self, part: str) -> int:
        """Returns the bytes of the rollout copy of a part on each device."""
        return sum(self._bytes(path) for path in self._shapes if _part(path) == part)

    def _bytes(self, path: str) -> int:
        """Returns the bytes of the rollout copy of a parameter on each device."""
        return tree_bytes(jax.ShapeDtypeStruct(self._shapes[path], self._dtype, sharding=self._shardings[path]))

    def _pieces(self, path: str) -> int:
        """Returns in how many pieces, each about as large as a sublayer's largest weight, a parameter is exchanged."""
        trained = sharding.param_sharding(self._mesh, path)
        is_exchanged = not self._shardings[path].is_equivalent_to(trained, len(self._shapes[path]))
        if _part(path) != path or not is_exchanged:
            return 1
        return math.ceil(self._bytes(path) / max(self._bytes(other) for other in self._shapes if _part(other) != other))

    def _first_of(self, part: str) -> str:
        """Returns the first part with the shapes of `part`."""
        top, _, number = part.partition("/")
        return f"{top}/{self._cfg.pattern.index(self._cfg.pattern[int(number)])}" if number else part

    def _is_ready(self, path: str, x: jax.Array | OutputMajor | lora.Adapted) -> bool:
        where, shape = self._stored[path], self._shapes[path]
        if isinstance(where, OutputMajor):
            if not isinstance(x, OutputMajor):
                return False
            x, where, shape = x.stored, where.stored, output_major_shape(path, shape)
        return (
            isinstance(x, jax.Array)
            and x.dtype == self._dtype
            and x.shape == shape
            and x.sharding.is_equivalent_to(where, x.ndim)
        )

    def _synced(self, params: decoder.Params) -> decoder.Params:
        """Returns the rollout copy of a part; as a program it also brings it to the sampler's mesh."""
        params = lora.merge(decoder.cast(params, self._dtype))
        spread = {path: heads.spread(self._cfg, self._tensor, path, x) for path, x in params.items()}
        # Heads are copied and dealt where the weights lie; else the compiler would bring these whole to every device.
        where = {path: sharding.param_sharding(self._mesh, path) for path in spread}
        for path, x in spread.items():
            if x.shape != params[path].shape:
                x = jax.lax.with_sharding_constraint(x, where[path])
            spread[path] = output_major(path, x) if isinstance(self._stored[path], OutputMajor) else x
        return spread


def _lacking(shape: tuple[int, ...], before: NamedSharding, after: NamedSharding) -> np.ndarray:
    """Returns, for each device, how many values of an array it needs `after` and does not hold `before`: [devices]."""
    held, needed = (x.devices_indices_map(shape) for x in (before, after))
    bounds = lambda index: np.array([part.indices(size)[:2] for part, size in zip(index, shape, strict=True)])
    counts = []
    for device in held:
        (start, stop), (first, last) = bounds(needed[device]).T, bounds(held[device]).T
        common = np.minimum(stop, last) - np.maximum(start, first)
        counts.append(np.prod(stop - start) - np.prod(np.maximum(common, 0)))
    return np.array(counts, np.int64)


def _part(path: str) -> str:
    """Returns the part of the parameter at `path`: its sublayer "blocks/I", or the first name of its path."""
    top, *rest = path.split("/")
    return f"{top}/{rest[0]}" if top == "blocks" else top


def _parts(tree: dict) -> dict[str, list[str]]:
    """Returns the paths of the parameters of each part."""
    parts: dict[str, list[str]] = {}
    for path in tree:
        parts.setdefault(_part(path), []).append(path)
    return parts
