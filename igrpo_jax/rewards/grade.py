"""Grades answers in a file: `python -m igrpo_jax.rewards.grade IN.jsonl OUT.jsonl`.

IN has one JSON object per line with `gold` (the reference answer: text, a number, or a list of answers of which any is
right) and the text `prediction` (the whole text of a completion). OUT has the same rows, in order, with `score` (1 or
0), `extracted` (the answer found, or null), `status` ("ok", "unparseable", "timeout", "error") and `seconds` added.
Rows that time out are results, not failures: the exit code is 0. A line that is broken costs its own row alone: it
scores 0 with the status "error" and a `detail`, and a warning on stderr names it. Where more than half of the lines are
broken, and for other wrong input, there is one line on stderr and exit code 2. OUT is written completely or not at all,
unless it is a pipe or a device.

Not here: the format reward, which judges the layout of a text and not its answer.
"""

import argparse
import codecs
import collections
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from igrpo_jax import __version__
from igrpo_jax.config import RewardsConfig
from igrpo_jax.errors import InputError
from igrpo_jax.records import Candidate, Score
from igrpo_jax.rewards.mathematics import golds
from igrpo_jax.rewards.verifier import Verifier

_BLANK = Candidate("", "")


@dataclass(frozen=True)
class Row:
    """A line of the input."""

    columns: dict[str, Any]  # as in the file, {} if they cannot be read
    candidate: Candidate  # blank where there is a fault
    fault: str = ""  # why the row cannot be graded


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a JSON Lines file, without blank lines.

    Raises:
        InputError: the file cannot be read, or more than half of its lines are broken.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    lines = [line.removeprefix(codecs.BOM_UTF8).strip() for line in lines]
    rows = {number: _row(line) for number, line in enumerate(lines, start=1) if line}
    faults = [f"row {number}: {row.fault}" for number, row in rows.items() if row.fault]
    if not rows:
        raise InputError(f"{path}: is empty; give a file with one JSON object per line")
    if 2 * len(faults) > len(rows):
        more = f" (and {len(faults) - 1} more of {len(rows)} rows)" if len(faults) > 1 else ""
        raise InputError(f"{path}, {faults[0]}{more}")
    if faults:
        named = "; ".join(faults[:5]) + "; ..." * (len(faults) > 5)
        what = f"{len(faults)} of {len(rows)} rows cannot be graded and score 0"
        print(f'warning: {path}: {what} with the status "error": {named}', file=sys.stderr)
    return list(rows.values())


def _row(line: bytes) -> Row:
    try:
        columns = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return Row({}, _BLANK, f"not valid JSON ({error})")
    if not isinstance(columns, dict):
        return Row({}, _BLANK, f"must be an object, not {type(columns).__name__}")
    for column in ("gold", "prediction"):
        if column not in columns:
            return Row(columns, _BLANK, f'has no column "{column}"; it has {sorted(columns)}')
    try:
        gold = golds.gold_text(columns["gold"])
    except TypeError:
        what = "must be a string, a number, or a list of these, any of which is right"
        return Row(columns, _BLANK, f'"gold" = {columns["gold"]!r}: {what}')
    if not isinstance(columns["prediction"], str):
        return Row(columns, _BLANK, f'"prediction" = {columns["prediction"]!r}: must be a string')
    return Row(columns, Candidate(columns["prediction"], gold or ""))


def grade_rows(rows: list[Row], workers: int, timeout: float) -> Iterator[Score]:
    """Yields a Score per row, in order. Killable workers compute those of rows without a fault."""
    settings = RewardsConfig(accuracy=1.0, format=0.0, workers=workers, timeout=timeout)
    with Verifier(settings) as verifier:
        futures = collections.deque(verifier.check_answer(row.candidate) for row in rows if not row.fault)
        for row in rows:
            yield Score(0.0, {}, None, "error", detail=row.fault) if row.fault else futures.popleft().result()


def run(source: Path, target: Path, workers: int, timeout: float) -> None:
    """Grades `source` into `target`. Raises InputError as `read_rows` does, or where `target` cannot be written."""
    rows = read_rows(source)
    try:
        with _written(target) as out:
            for row, score in zip(rows, _progress(grade_rows(rows, workers, timeout), len(rows)), strict=True):
                graded = {"score": score.reward, "extracted": score.extracted, "status": score.status}
                graded |= {"seconds": round(score.seconds, 6)} | ({"detail": row.fault} if row.fault else {})
                out.write(_line(row.columns | graded))
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _written(target: Path) -> Iterator[TextIO]:
    """Opens a temporary file that replaces `target`, or the file it links to, when the block ends without an error.

    A pipe or a device is written to directly, because it cannot be replaced. So is /dev/stdout where it stands for a
    file: the shell has opened that, and may write more.
    """
    if target.exists() and (not target.is_file() or target.is_relative_to("/dev")):
        with target.open("a", encoding="utf-8") as out:
            yield out
        return
    place = target.resolve()
    # The temporary file is in the target's folder because a rename does not cross file systems.
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            yield out
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _line(columns: dict[str, Any]) -> str:
    """Returns a line of JSON; in ASCII where a text holds lone surrogates, which utf-8 cannot."""
    line = json.dumps(columns, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(columns) + "\n"
    return line


def _progress(scores: Iterator[Score], total: int) -> Iterable[Score]:
    from rich.console import Console
    from rich.progress import track

    return track(scores, "grading", total=total, console=Console(stderr=True))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m igrpo_jax.rewards.grade", description="Grade predictions against reference answers."
    )
    parser.add_argument("-V", "--version", action="version", version=__version__)
    parser.add_argument("source", metavar="IN.jsonl", type=Path, help='rows with "gold" and "prediction"')
    parser.add_argument(
        "target", metavar="OUT.jsonl", type=Path, help="the file to write: the same rows with their scores"
    )
    parser.add_argument("--workers", type=int, default=max(os.cpu_count() or 1, 1), help="processes (%(default)s)")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds one row may take (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.workers < 1 or not options.timeout > 0:
            raise InputError("--workers must be at least 1 and --timeout above 0")
        run(options.source, options.target, options.workers, options.timeout)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted before {options.target} was complete", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # SIGTERM unwinds the stack, so that no temporary file and no worker stays behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
