"""Grades answers in a file: `python -m igrpo_jax.rewards.grade IN.jsonl OUT.jsonl`.

IN has one JSON object per line with the strings `gold` (the reference answer) and `prediction` (the whole text of a
completion); OUT has the same rows, in order, with `score` (1 or 0), `extracted` (the answer found, or null), `status`
("ok", "unparseable", "timeout", "error") and `seconds` added. Rows that time out are results, not failures: the exit
code is 0. Wrong input ends with one line on stderr and exit code 2. OUT is written completely or not at all.

Not here: the format reward, which judges the layout of a text and not its answer.
"""

import argparse
import collections
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from igrpo_jax.config import RewardsConfig
from igrpo_jax.errors import InputError
from igrpo_jax.records import Candidate, Score
from igrpo_jax.rewards.verifier import Verifier


def read_rows(path: Path) -> list[dict]:
    """Returns the rows of a JSON Lines file, without blank lines.

    Raises:
        InputError: the file cannot be read, a line is not a JSON object, or a column is missing or not a string.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, row {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: must be an object, not {type(row).__name__}")
        for column in ("gold", "prediction"):
            if column not in row:
                raise InputError(f'{path}, row {number}: has no column "{column}"; it has {sorted(row)}')
            if not isinstance(row[column], str):
                raise InputError(f'{path}, row {number}: "{column}" = {row[column]!r}: must be a string')
        rows.append(row)
    return rows


def grade_rows(rows: list[dict], workers: int, timeout: float) -> Iterator[Score]:
    """Yields a Score per row, in order. Killable workers compute them."""
    settings = RewardsConfig(accuracy=1.0, format=0.0, workers=workers, timeout=timeout)
    with Verifier(settings) as verifier:
        futures = collections.deque(verifier.submit(Candidate(row["prediction"], row["gold"])) for row in rows)
        while futures:
            yield futures.popleft().result()


def run(source: Path, target: Path, workers: int, timeout: float) -> None:
    """Grades `source` into `target`. Raises InputError as `read_rows` does, or where `target` cannot be written."""
    rows = read_rows(source)
    # The temporary file is in the target's folder because a rename does not cross file systems.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            for row, score in zip(rows, _progress(grade_rows(rows, workers, timeout), len(rows)), strict=True):
                graded = {"score": score.reward, "extracted": score.extracted, "status": score.status}
                out.write(json.dumps(row | graded | {"seconds": round(score.seconds, 6)}, ensure_ascii=False) + "\n")
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _progress(scores: Iterator[Score], total: int) -> Iterable[Score]:
    from rich.console import Console
    from rich.progress import track

    return track(scores, "grading", total=total, console=Console(stderr=True))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m igrpo_jax.rewards.grade", description="Grade predictions against reference answers."
    )
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
