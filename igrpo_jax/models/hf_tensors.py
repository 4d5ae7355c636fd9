"""The safetensors files of Hugging Face directories: which tensors they hold, by their headers.

Not here: which of them hold our parameters (`hf_tables`), and how these are read (`hf_read`).
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16, without which safetensors cannot return such tensors)
import numpy as np
import safetensors

from igrpo_jax.errors import InputError
from igrpo_jax.models.hf_paths import first_line, path_error, read_json, resolve
from igrpo_jax.models.hf_tables import FAMILIES, PIECE

BYTES = {"F32": 4, "BF16": 2, "F16": 2}  # the dtypes of safetensors that can be read, and their size
HEAD = "lm_head.weight"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the files, as their headers describe it."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # in the words of safetensors


@contextlib.contextmanager
def opened(path: str, file: Path) -> Iterator[Any]:
    """Opens a safetensors file of the model at `path`."""
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (safetensors.SafetensorError, OSError) as error:
        fix = "it is damaged or cut short; copy or download it again"
        raise path_error(path, f"{file.name} can't be read ({first_line(error)}); {fix}") from error


def stored_tensors(path: str) -> dict[str, StoredTensor]:
    """Returns every tensor of the files by name."""
    root = resolve(path)
    if (root / SINGLE).is_file():
        files = [SINGLE]
    elif (root / INDEX).is_file():
        file_of = read_json(path, root / INDEX).get("weight_map")
        if not (isinstance(file_of, dict) and file_of and all(isinstance(name, str) for name in file_of.values())):
            raise path_error(path, f"{INDEX} has no weight_map from tensors to files; copy or download it again")
        files = sorted(set(file_of.values()))
    else:
        raise path_error(path, f"no {SINGLE} and no {INDEX}; only weights in the safetensors format are read")
    return headers(path, files)


def headers(path: str, files: list[str]) -> dict[str, StoredTensor]:
    """Returns the tensors of `files` by name."""
    root, tensors = resolve(path), {}
    for name in files:
        if not (root / name).is_file():
            raise path_error(path, f"{INDEX} names {name}, which is not there; copy or download the directory again")
        with opened(path, root / name) as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                if key in tensors:
                    raise path_error(path, f"tensor {key} is in two files; keep one set of weights in the directory")
                header = file.get_slice(key)
                tensors[key] = StoredTensor(root / name, key, tuple(header.get_shape()), header.get_dtype())
    return tensors


def named(model_type: str, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns `tensors` by the names in the family's table, where files may use another prefix."""
    if not FAMILIES[model_type].prefixes:
        return tensors
    ours, theirs = FAMILIES[model_type].prefixes
    return {re.sub(f"^{re.escape(theirs)}", ours, name): tensor for name, tensor in tensors.items()}


def has_own_head(path: str, raw: dict[str, Any]) -> bool:
    """Returns whether the files hold both embeddings and a head, and these differ.

    As in transformers, they are compared in the dtype of config.json, which is `raw`; without one, exactly. A head of
    another shape or of a dtype that is not read differs too, so that it is refused with the other tensors. Where there
    are no files, or damaged ones, the answer is False; whoever reads the weights reports that.
    """
    try:
        tensors = named(raw["model_type"], stored_tensors(path))
    except InputError:
        return False
    embedding = tensors.get(FAMILIES[raw["model_type"]].entries["embedding"].name)
    head = tensors.get(HEAD)
    if embedding is None or head is None:
        return False
    if embedding.shape != head.shape or len(head.shape) != 2 or not {embedding.dtype, head.dtype} <= BYTES.keys():
        return True
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    dtype = np.dtype(dtype) if dtype in ("bfloat16", "float16") else np.dtype("float32")
    count, width = head.shape
    rows = max(1, PIECE // max(1, width))
    pieces = [slice(at, min(at + rows, count)) for at in range(0, count, rows)]
    with opened(path, embedding.file) as ours, opened(path, head.file) as theirs:
        one, other = ours.get_slice(embedding.name), theirs.get_slice(head.name)
        return any(not np.array_equal(one[piece].astype(dtype), other[piece].astype(dtype)) for piece in pieces)
