"""How a run writes its files: whole or not at all, as JSON lines, and with one clear line where the disk refuses."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_jax.errors import InputError, RunError


def local_folder(flag: str, folder: str | Path) -> Path:
    """Returns `folder`, which `flag` names, as a path.

    Raises:
        InputError: it is the address of a bucket. `Path` would make a local folder named `gs:` of it.
    """
    if bucket := re.match(r"([A-Za-z][\w+.-]+):/+(.*)", str(folder)):
        raise InputError(
            f"{flag} {bucket[1]}://{bucket[2]}: buckets are not supported yet; give a local or mounted folder, such as "
            f"runs/{Path(bucket[2]).name or 'NAME'}, and copy it to the bucket afterwards"
        )
    return Path(folder)


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a kill leaves either the old file or the whole new one.

    The text goes to `path` + ".tmp" first, which may be left behind by a kill. A lone surrogate, which model text may
    hold, is written as \\udXXX, which is also how JSON spells it.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError, such as that of a full disk, into one line that names `path`.

    Raises:
        RunError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); make it possible and run the same command again"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Does what `replace_text` does, with the error of a run.

    Raises:
        RunError: the file cannot be written.
    """
    with writing(path):
        replace_text(path, text)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes `rows` as a file of JSON lines, whole or not at all.

    Raises:
        RunError: the file cannot be written.
        ValueError: a row holds a number that is not finite, which JSON lacks.
    """
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def number(value: Any) -> float | None:
    """Returns a Python, numpy or jax scalar as a Python float, None where it is not finite, as JSON needs it."""
    value = float(np.asarray(value).astype(np.float64).reshape(()))
    return value if math.isfinite(value) else None
