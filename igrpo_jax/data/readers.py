"""Reads tables from files, folders, buckets and the hub: unchanged rows with their numbers. `columns` interprets them.

JSON Lines and CSV are read here, so that an error names the bad line and every cell stays the text that it is. `.json`,
`.parquet`, folders of its `save_to_disk` and hub ids go through `datasets`. A column of CSV without a name, such as the
index that pandas writes, is left out. A broken line of JSON Lines or row of CSV is left out. In JSON Lines, lone
surrogates and bytes that are not utf-8 become U+FFFD. Warnings count both and name the rows. A file with more than
MAX_BROKEN of its rows broken is refused. The ending of a file's name is read without regard to case.
"""

import codecs
import csv
import itertools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging as absl_logging

from igrpo_jax.errors import InputError
from igrpo_jax.storage import reading

Table = list[tuple[int, dict[str, Any]]]  # (number, columns) of each row; numbers start at 1, as editors count lines

KINDS = {".json": "json", ".parquet": "parquet"}  # formats that `datasets` reads, with its names for them
SUFFIXES = (".jsonl", ".csv", *KINDS)
FILES = ", ".join(SUFFIXES)
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
MAX_BROKEN = 0.5  # share of the rows of a file that may be broken; they are left out
_SURROGATE = re.compile("[\ud800-\udfff]")
SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder of `save_to_disk`: of splits, or of one
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}  # words that name a split in a file name


def ending(name: str | Path) -> str:
    """Returns which of SUFFIXES a file's name ends in, in either case; "" for other names."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def read(
    path: str, source: str, subset: str = "", split: str = "train", fix: str = "", chosen: Sequence[str] = ()
) -> Table:
    """Returns the rows of a file, of the files of a folder in the order of their names, or of a hub data set.

    Where a word in a file name of a folder is a split (gsm8k_test.jsonl, train-00000-of-00002.parquet), only the files
    of `split` are read. Of a folder that `DatasetDict.save_to_disk` wrote, `split` is read.

    Args:
        path: a file with one of SUFFIXES, a folder of files with one of them, also in a bucket, a local folder of
            `datasets`' save_to_disk, or a hub id such as owner/name.
        source: the field and its value, with which errors begin.
        subset: the subset of a hub data set.
        split: the split of a hub data set, or of a folder's files.
        fix: what errors of the hub advise; by default to give a local file.
        chosen: "subset" and "split", where they are the user's settings in config.data.

    Raises:
        InputError: there is nothing to read, or it can't be read; a local file or folder has no part that is `chosen`.
    """
    file = local_copy(path, source)
    _check_parts(file, {"subset": subset, "split": split}, chosen)
    if file.is_dir():
        return _read_folder(file, source, split)
    if file.is_file() and ending(file):
        return _read_files([file], source)
    if file.suffix.lower() in PACKED and file.is_file():
        raise InputError(f"{source}: is packed; unpack it first, and give a file that ends in {FILES}")
    if file.exists():
        raise InputError(f"{source}: can't be read; give a file that ends in {FILES}")
    if ending(file) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise InputError(f"{source}: no such file; give one that ends in {FILES}, or a hub id (owner/name)")
    fix = fix or f"give a local file in JSON Lines, or a hub id with a split {split!r}"
    return _read_datasets(source, fix, lambda datasets: datasets.load_dataset(path, subset or None, split=split))


def local_copy(address: str, source: str) -> Path:
    """Returns the path of a local file or folder, which may not exist, or of the copy of one in a bucket.

    For a folder in a bucket, only the files with one of SUFFIXES are copied.

    Raises:
        InputError: a bucket holds none, or they can't be fetched.
    """
    return reading.local(source, address, lambda name: "/" not in name and bool(ending(name)))


def _check_parts(path: Path, values: dict[str, str], chosen: Sequence[str]) -> None:
    """Raises InputError if a local file or folder has no part that is chosen: it would be read as if nothing were."""
    is_folder = path.is_dir()
    has_splits = is_folder and ((path / SAVED[0]).is_file() or any(_splits(path).values()))
    for name in chosen if path.exists() else ():
        if name == "subset" or not has_splits:
            raise InputError(
                f"config.data.{name} = {values[name]!r}: {str(path)!r} is a local {'folder' if is_folder else 'file'} "
                f"without {name}s; leave the setting out, and give the file of what you want as config.data.train"
            )


def _splits(folder: Path) -> dict[Path, set[str]]:
    """Returns the files of a folder in the order of their names, with the words of SPLITS that are in each name."""
    files = sorted(file for file in folder.iterdir() if ending(file))
    return {file: SPLITS.intersection(re.split("[^a-z]+", file.stem.lower())) for file in files}


def _read_folder(folder: Path, source: str, split: str) -> Table:
    if any((folder / name).is_file() for name in SAVED):
        return _read_saved(folder, source, split)
    splits = _splits(folder)
    files = list(splits)
    if not files:
        raise InputError(f"{source}: holds no file that ends in {FILES}; give a folder of them, or one file")
    if named := set().union(*splits.values()):
        files = [file for file in files if split in splits[file]]
        if not files:
            raise InputError(
                f"{source}: has files of {', '.join(sorted(named))}, but none of the split {split!r}; set "
                "config.data.split, or give one file"
            )
    kinds = sorted({ending(file) for file in files})
    if len(kinds) > 1:
        raise InputError(f"{source}: holds files of several kinds ({', '.join(kinds)}); give one file, or one kind")
    return _read_files(files, source)


def _read_saved(folder: Path, source: str, split: str) -> Table:
    """Returns the rows of a folder that `save_to_disk` wrote; of several splits, those of `split`."""
    if (folder / SAVED[0]).is_file():
        splits = sorted(file.parent.name for file in folder.glob(f"*/{SAVED[1]}"))
        if split not in splits:
            has = f"splits {', '.join(splits)}" if splits else "no split"
            raise InputError(f"{source}: was saved with {has}, and has none named {split!r}; set config.data.split")
        folder /= split
    fix = "give a local folder that save_to_disk wrote, or a file in JSON Lines"
    return _read_datasets(source, fix, lambda datasets: datasets.load_from_disk(str(folder)))


def _read_files(files: list[Path], source: str) -> Table:
    suffix = ending(files[0])
    for file in files if suffix != ".parquet" else []:
        with file.open("rb") as opened:
            if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise InputError(f"{source}{f': {file.name}' * (len(files) > 1)}: is UTF-16; save it as utf-8")
    if suffix in KINDS:
        fix = "give a whole file, or one in JSON Lines"
        # The libraries fail on empty files, each in its own way.
        names = [str(file) for file in files if not _is_empty(file)]
        if not names:
            return []
        load = lambda datasets: datasets.load_dataset(KINDS[suffix], data_files=names, split="train")
        return _read_datasets(source, fix, load)
    reader, table = {".jsonl": _read_jsonl, ".csv": _read_csv}[suffix], []
    for file in files:
        where = source if len(files) == 1 else f"{source}: {file.name}"
        table += reader(file, where)
    return table if len(files) == 1 else list(enumerate((columns for _, columns in table), 1))


def _is_empty(file: Path) -> bool:
    """Returns whether a file of one of KINDS has no rows; False where it can't be read, which its reader reports."""
    if ending(file) == ".json":
        with file.open("rb") as opened:
            return b"".join(opened.read(1000).removeprefix(codecs.BOM_UTF8).split()) in (b"", b"[]")
    if not file.stat().st_size:
        return True
    from pyarrow import ArrowException, parquet  # of `datasets`, and as slow to import

    try:
        return parquet.read_metadata(file).num_rows == 0
    except (ArrowException, OSError):
        return False


def _read_jsonl(file: Path, source: str) -> Table:
    """Returns the rows without blank and broken lines.

    Raises:
        InputError: more than MAX_BROKEN of the lines are broken.
    """
    table: Table = []
    broken, mended = [], []  # "line N is ..." of broken lines, and the numbers of those with U+FFFD
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                columns = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                broken.append(f"line {number} is not JSON ({error})")
                continue
            if not isinstance(columns, dict):
                broken.append(f"line {number} holds no JSON object")
                continue
            if not line.isascii() or b"\\u" in line:
                text = _without_surrogates(columns)
                mended += [str(number)] * (text != columns)
                columns = text
            table.append((number, columns))
    _warn_of_broken(source, "line", broken, len(table), "give one object per line")
    if mended:
        what = "hold surrogates or bytes that are not characters, now U+FFFD: line"
        absl_logging.warning(
            "%s: %d of %d lines %s %s", source, len(mended), len(table) + len(broken), what, few(mended)
        )
    return table


def _warn_of_broken(source: str, word: str, broken: list[str], kept: int, fix: str) -> None:
    """Warns of the rows that are left out. `broken` says what is wrong with each, and `word` is what a row is called.

    Raises:
        InputError: they are more than MAX_BROKEN of all rows.
    """
    count = kept + len(broken)
    if len(broken) > MAX_BROKEN * count:
        raise InputError(f"{source}: {broken[0]}, one of {len(broken)} broken {word}s of {count}; {fix}")
    if broken:
        what = f"{word}s are broken and left out:"
        absl_logging.warning("%s: %d of %d %s %s", source, len(broken), count, what, few(broken))


def few(names: Sequence[object]) -> str:
    """Returns the first five of a list as text, and dots for the rest."""
    return ", ".join(map(str, names[:5])) + ", ..." * (len(names) > 5)


def _without_surrogates(value: Any) -> Any:
    """Returns a value of JSON with U+FFFD instead of lone surrogates, which no tokenizer takes."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    return value


def _read_csv(file: Path, source: str) -> Table:
    """Returns the rows with cells as text. `datasets` would turn the answer 025 into the number 25 and lose NA.

    Raises:
        InputError: more than MAX_BROKEN of the rows are broken; the header is not valid CSV, has semicolons or tabs
            instead of commas, or names a column twice; or a quote that is never closed swallows the last rows.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    table: Table = []
    broken = []  # "row N ..." of broken rows
    fix = (
        "save it as CSV in utf-8, with commas between cells, quotes around cells that hold commas or quotes, and these "
        "quotes doubled"
    )
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader, header = csv.reader(lines, strict=True), [""]
        for number in itertools.count():  # row 0 is the header
            try:
                cells = next(row for row in reader if row)
            except StopIteration:
                break
            except csv.Error as error:
                if "end of data" in str(error):
                    raise InputError(f"{source}: row {number} opens a quote that is never closed; {fix}") from error
                cells, problem = [], f"is not valid CSV ({error})"
            else:
                problem = "has bytes that are not utf-8" if any(map(_SURROGATE.search, cells)) else ""
                problem = "has more cells than the header" if number and len(cells) > len(header) else problem
            if not number:
                header = cells
                if problem := problem or _header_problem(cells):
                    raise InputError(f"{source}: the header {problem}; {fix}")
            elif problem:
                broken.append(f"row {number} {problem}")
            else:
                named = itertools.zip_longest(header, cells)
                table.append((number, {name: text for name, text in named if name.strip()}))
    _warn_of_broken(source, "row", broken, len(table), fix)
    return table


def _header_problem(names: list[str]) -> str:
    """Returns what is wrong with the names of the columns of CSV, "" if nothing is."""
    if len(names) == 1 and re.search("[;\t]", names[0]):
        return f"has one cell, {names[0]!r}, without a comma"
    twice = next((name for name in names if name.strip() and names.count(name) > 1), "")
    return f"names {twice!r} twice" if twice else ""


def _with_short_numbers(rows: Any, scalar: type[Any]) -> Iterator[dict[str, Any]]:
    """Yields the rows with the shortest decimals that single and half precision numbers stand for: 0.1 for 0.100000001.

    The library makes Python's numbers of them, which have double precision.

    Args:
        scalar: the type of the features that are single values; arrays have a dtype too, and stay as they are.
    """
    columns = getattr(rows, "features", None) or {}
    types = {name: feature.dtype for name, feature in columns.items() if isinstance(feature, scalar)}
    short = {name: np.dtype(kind).type for name, kind in types.items() if kind in ("float32", "float16")}
    for row in rows:
        yield row | {name: float(str(kind(row[name]))) for name, kind in short.items() if row[name] is not None}


def _read_datasets(source: str, fix: str, load: Callable[[Any], Any]) -> Table:
    """Returns the rows of what `load` returns, which receives the module `datasets`."""
    import datasets  # takes seconds to import; JSON Lines don't need it

    # Each attempt to reach the hub, and each file that can't be read, would be logged; the error below reports it.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    if not (sys.stderr and sys.stderr.isatty()):  # a log would get a line for each state of the bars
        datasets.disable_progress_bars()
    try:
        return list(enumerate(_with_short_numbers(load(datasets), datasets.Value), 1))
    except Exception as raised:  # arrow, the hub and the builders share no base
        error = raised
        if isinstance(raised, datasets.exceptions.DatasetGenerationError) and isinstance(raised.__cause__, Exception):
            error = raised.__cause__  # says what is wrong, where the builder says that something is
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source}: can't be loaded ({type(error).__name__}: {reason}); {fix}") from error
