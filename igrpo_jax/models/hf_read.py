"""The weights of Hugging Face directories: safetensors, read into our layouts and shardings.

`hf_tables` says which tensor holds which parameter. Every tensor is used exactly once: a missing, extra or misshapen
one is an error that names it. A process reads only the slices that its devices hold, from the file directly into their
sharding. So no process ever holds the whole model, no device holds a second copy, and host memory need only hold a few
tensors.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from igrpo_jax.distributed import sharding
from igrpo_jax.models import decoder
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.decoder import Params
from igrpo_jax.models.hf_files import config_json
from igrpo_jax.models.hf_paths import path_error
from igrpo_jax.models.hf_tables import Entry, Index, table, tensor_shapes
from igrpo_jax.models.hf_tensors import BYTES, HEAD, StoredTensor, headers, named, opened, stored_tensors

PROBES, PROBE = 64, 1 << 14  # parts of a file that its fingerprint reads, and their bytes


def check_weights(path: str, cfg: DecoderConfig) -> int:
    """Returns the bytes that loading the model reads from its files. Reads only their headers.

    Raises:
        InputError: the files don't hold exactly the tensors of the model, or one of them is damaged.
    """
    shapes = decoder.shapes(cfg)
    return sum(_sizes(shapes, *_checked(path, cfg)).values())


def weight_files(path: str) -> list[Path]:
    """Returns the files that hold the weights."""
    return sorted({tensor.file for tensor in stored_tensors(path).values()})


def weights_fingerprint(path: str) -> str:
    """Returns a hash of the files that hold the weights, which tells newer weights at `path` from older ones.

    Of each file it reads its size and PROBES parts, at even distances, because a whole model takes minutes. Training
    changes every part; a file of up to 1 MiB is read whole.
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size}\n".encode() + _parts(file, state.st_size, state.st_mtime_ns))
    return digest.hexdigest()


@functools.cache  # a slow file system takes seconds, and a launch asks more than once
def _parts(file: Path, size: int, written: int) -> bytes:
    """Returns a hash of PROBES parts of a file that was `written` at this time."""
    digest = hashlib.sha256()
    with file.open("rb") as data:
        for i in range(PROBES):
            data.seek(size * i // PROBES)
            digest.update(data.read(PROBE))
    return digest.digest()


def load_params(
    path: str,
    cfg: DecoderConfig,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    report: Callable[[int], None] = lambda bytes_read: None,
) -> Params:
    """Returns the parameters of the directory or hub id `path` in `dtype`, each in its sharding on `mesh`.

    Besides the parameters themselves, a process needs host memory for its part of the largest tensor twice: once in
    `dtype` and once as the file stores it.

    Args:
        report: receives the bytes read so far, out of those that `check_weights` returns.

    Raises:
        InputError: a mesh that doesn't divide the model; files that are missing, damaged or of another model.
    """
    shapes = decoder.shapes(cfg)
    sharding.check_divides(mesh, shapes)
    return _load(path, shapes, *_checked(path, cfg), mesh, dtype, report)


def load_adapters(path: str, entries: dict[str, Entry], like: Params) -> Params:
    """Returns LoRA's adapters from the peft directory `path`, with the shapes, dtypes and shardings of `like`."""
    stored = headers(path, ["adapter_model.safetensors"])
    first = next(iter(like.values()))
    shapes = {own: x.shape for own, x in like.items()}
    return _load(path, shapes, entries, stored, first.sharding.mesh, str(first.dtype), lambda bytes_read: None)


def _load(
    path: str,
    shapes: dict[str, tuple[int, ...]],
    entries: dict[str, Entry],
    stored: dict[str, StoredTensor],
    mesh: jax.sharding.Mesh,
    dtype: str,
    report: Callable[[int], None],
) -> Params:
    sizes = _sizes(shapes, entries, stored)
    params, bytes_read = {}, 0
    for own, shape in shapes.items():
        entry, tensor = entries[own], stored[entries[own].name]
        # Pages of an open file count as this process's memory once they are read, so each tensor opens the file again.
        with opened(path, tensor.file) as file:
            read = functools.partial(entry.read, file.get_slice(tensor.name), shape, dtype=dtype)
            params[own] = _read_once(read, shape, sharding.param_sharding(mesh, own))
        bytes_read += sizes[own]
        report(bytes_read)
    return params


def _sizes(shapes: dict, entries: dict[str, Entry], stored: dict[str, StoredTensor]) -> dict[str, int]:
    """Returns the bytes that each parameter of ours takes in the files."""
    return {own: math.prod(shape) * BYTES[stored[entries[own].name].dtype] for own, shape in shapes.items()}


def _read_once(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...], placement: jax.sharding.NamedSharding
) -> jax.Array:
    """Returns the array of `shape` whose blocks `read` returns. A block that several devices hold is read once."""
    blocks = {}

    def block(index: Index) -> np.ndarray:
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in blocks:
            blocks[key] = read(index)
        return blocks[key]

    # Copies to the device run in the background: without the wait, those of many tensors would be in progress at once.
    return jax.block_until_ready(jax.make_array_from_callback(shape, placement, block))


def _checked(path: str, cfg: DecoderConfig) -> tuple[dict[str, Entry], dict[str, StoredTensor]]:
    """Returns the entry of each parameter and every tensor of the files, after a check that they fit."""
    model_type = config_json(path)["model_type"]
    entries, stored = table(model_type, cfg), named(model_type, stored_tensors(path))
    embedding = entries["embedding"].name
    if cfg.tie_embeddings and embedding not in stored and HEAD in stored:  # either of the two may be saved
        stored[embedding] = stored[HEAD]
    _check(path, tensor_shapes(entries, decoder.shapes(cfg)), stored)
    return entries, stored


def _check(path: str, expected: dict[str, tuple[int, ...]], tensors: dict[str, StoredTensor]) -> None:
    """Raises InputError unless `tensors` are those expected, each once, in the right shape and a dtype we read."""
    # A tied model may carry its head, and older files the frequencies of RoPE.
    extra = [x for x in tensors if x not in expected and x != HEAD and not x.endswith("rotary_emb.inv_freq")]
    shape = {name: tensors[name].shape for name in expected if name in tensors}
    misshapen = [f"{name} is {shape[name]}, not {expected[name]}" for name in shape if shape[name] != expected[name]]
    dtypes = [f"{name} is {tensors[name].dtype}" for name in shape if tensors[name].dtype not in BYTES]
    fix = "use the config.json that belongs to these weights, or download the directory again"
    for wrong, what, advice in (
        ([name for name in expected if name not in tensors], "missing from the files", fix),
        (extra, "in the files that the model has no place for", fix),
        (misshapen, "of another shape than config.json says", fix),
        (dtypes, "of a dtype that is not read", "save the model in " + ", ".join(BYTES)),
    ):
        if wrong:
            names = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise path_error(path, f"{len(wrong)} of {len(expected)} tensors {what}: {names}; {advice}")
