"""How a run writes its files: whole or not at all, as JSON lines, and with one clear line where the disk refuses."""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_jax.errors import RunError
from igrpo_jax.storage.addresses import failures, reason
from igrpo_jax.storage.writing import write_text


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of a disk or a bucket, such as that of a full one, into one line that names `path`.

    Raises:
        RunError: instead of the error.
    """
    try:
        yield
    except failures() as error:
        raise RunError(
            f"{path}: cannot be written ({reason(error)}); fix this and run the same command again"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all, as `write_text` does, with the error of a run.

    Raises:
        RunError: the file cannot be written.
    """
    with writing(path):
        write_text(path, text)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes `rows` as a file of JSON lines, whole or not at all.

    Raises:
        RunError: the file cannot be written.
        ValueError: a row holds a number that is not finite, which JSON lacks.
    """
    write_atomically(path, rows_text(rows))


def rows_text(rows: Iterable[dict[str, Any]]) -> str:
    """Returns `rows` as JSON lines.

    Raises:
        ValueError: a row holds a number that is not finite, which JSON lacks.
    """
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def number(value: Any) -> float | None:
    """Returns a Python, numpy or jax scalar as a Python float, None if it is not finite, as JSON needs it."""
    value = float(np.asarray(value).astype(np.float64).reshape(()))
    return value if math.isfinite(value) else None
