"""Local copies of what lies in a bucket: a model, a file of problems, the folder of a run.

A copy is kept, and what has not changed in the bucket is not fetched again. A file is fetched under a temporary name
and renamed once it is complete. It is never a mix of two versions: size and etag are the same before and after.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from igrpo_jax.errors import InputError
from igrpo_jax.storage.addresses import filesystem, is_remote, path_of, patiently, refusing, written_at

AT_ONCE = 8  # files that are fetched or uploaded side by side
TRIES = 5  # for a file that is replaced while it is fetched

Wanted = Callable[[str], bool]  # takes the name of a file below a folder, such as "samples/step_000001.jsonl"


def kept_in(kind: str, path: Path) -> Path:
    """Returns the local folder or file of this kind that belongs to a path in a bucket, under ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root, "igrpo_jax_buckets", kind, *str(path).replace("://", "/").split("/")).expanduser()


def apart(path: Path) -> str:
    """Returns the kind of the copy of a path in a bucket that never lies in the copy of a folder above.

    `local` removes from the copy of a folder whatever it does not want there itself.
    """
    return f"copies/{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"


def read_bytes(path: Path) -> bytes:
    """Returns the contents of a file: those of one version, even if it is replaced in the meantime."""
    return patiently(path, filesystem(path).cat_file, str(path)) if is_remote(path) else path.read_bytes()


def local(source: str, address: str | Path, wanted: Wanted = lambda name: True, kind: str = "") -> Path:
    """Returns a local path: `address` itself where it is one, else the copy of the file or folder of a bucket.

    While something is fetched, a bar on stderr counts bytes.

    Args:
        source: the flag or the field that gives the address, and its value, with which errors begin.
        wanted: which files of a folder are fetched; the copy holds only these.
        kind: the kind of copy, "" for `apart`; copies of different kinds are kept apart.

    Raises:
        InputError: there is nothing at that address, or it cannot be read.
    """
    path = path_of(source, address)
    if not is_remote(path):
        return path
    kind = kind or apart(path)
    copy = kept_in(kind, path)
    with refusing(source):
        objects = _objects(path, wanted)
        if not objects:
            raise InputError(f"{source}: there is nothing at this address; give another")
        if set(objects) != {""}:
            _remove_others(copy, objects)
        _fetch(path, copy, kept_in(f"{kind}_tags", path), objects)
    return copy


def note_uploaded(path: Path, kind: str) -> None:
    """Notes that a folder of a bucket was just uploaded from its copy of this kind, so that `local` does not fetch it.

    Raises:
        OSError, or another one of `failures`: the bucket does not hold what the copy holds.
    """
    copy, tags, objects = kept_in(kind, path), kept_in(f"{kind}_tags", path), _objects(path, lambda name: True)
    sizes = {file.relative_to(copy).as_posix(): file.stat().st_size for file in copy.rglob("*") if file.is_file()}
    if wrong := sizes.items() ^ {(name, int(info["size"])) for name, info in objects.items()}:
        raise OSError(f"{path}: {min(wrong)[0]} is not in the bucket as it was uploaded")
    for name, info in objects.items():
        tag = _beside(tags, name)
        tag.parent.mkdir(parents=True, exist_ok=True)
        tag.write_text(_tag(info))


def _objects(path: Path, wanted: Wanted) -> dict[str, dict[str, Any]]:
    """Returns what the service reports about the file at `path`, under "", or about the files below it, by name."""
    service = filesystem(path)
    root = service._strip_protocol(str(path))
    found = patiently(path, service.find, str(path), detail=True)
    if set(found) == {root}:
        return {"": found[root]}
    # An object whose name ends in "/" stands for a folder. Consoles make them.
    below = {name.removeprefix(root + "/"): info for name, info in found.items() if name.startswith(root + "/")}
    return {name: info for name, info in below.items() if name and not name.endswith("/") and wanted(name)}


def _remove_others(copy: Path, objects: dict[str, Any]) -> None:
    """Removes the files of a copy that are not in the bucket any more, or are not wanted."""
    if copy.is_file():
        copy.unlink()
    for file in [file for file in copy.rglob("*") if file.is_file()]:
        is_arriving = file.name.startswith(".") and file.suffix == ".tmp"  # another process fetches it
        if not is_arriving and file.relative_to(copy).as_posix() not in objects:
            file.unlink()


def _tag(info: dict[str, Any]) -> str:
    """Returns a text that changes whenever an object is replaced."""
    return f"{info.get('generation') or info.get('ETag') or info.get('etag')} {info['size']}"


def _fetch(path: Path, copy: Path, tags: Path, objects: dict[str, dict[str, Any]]) -> None:
    missing = {}
    for name, info in objects.items():
        tag, file = _beside(tags, name), copy / name
        if not (file.is_file() and tag.is_file() and tag.read_text() == _tag(info)):
            missing[name] = info
    if not missing:
        return
    need = sum(int(info["size"]) for info in missing.values())
    copy.parent.mkdir(parents=True, exist_ok=True)
    if need > (free := shutil.disk_usage(copy.parent).free):
        raise OSError(f"{need / 2**20:,.0f} MiB to fetch, and {copy.parent} has {free / 2**20:,.0f} MiB free")
    bar = _bar(f"reading {path}", need)
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            fetch = lambda name: _fetch_file(path / name, copy / name, _beside(tags, name), missing[name], bar)
            list(pool.map(fetch, missing))
    finally:
        bar.close()


def _beside(tags: Path, name: str) -> Path:
    return (tags / name).with_name((tags / name).name + ".tag")


def _fetch_file(path: Path, file: Path, tag: Path, info: dict[str, Any], bar: Any) -> None:
    service = filesystem(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    tag.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        for _ in range(TRIES):
            patiently(path, service.get_file, str(path), str(temporary), callback=bar)
            before, info = info, patiently(path, service.info, str(path))
            if temporary.stat().st_size == int(info["size"]) and _tag(info) == _tag(before):
                break
        else:
            raise OSError(f"{path} changes while it is read")
        tag.unlink(missing_ok=True)
        os.utime(temporary, (written_at(info),) * 2)  # newer weights are another model: see evaluation.json
        os.replace(temporary, file)
        tag.write_text(_tag(info))
    finally:
        temporary.unlink(missing_ok=True)


def _bar(title: str, total: int) -> Any:
    """Returns a callback of fsspec that shows the bytes of several files on one line."""
    from fsspec.callbacks import TqdmCallback

    class Bytes(TqdmCallback):
        def set_size(self, size: int) -> None:
            """Does nothing, because the size is that of all files together."""

    return Bytes(size=total, tqdm_kwargs={"desc": title, "unit": "B", "unit_scale": True})
