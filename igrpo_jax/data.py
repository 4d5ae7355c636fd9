"""Problems from files and the hub, and the order in which a run reads them.

Rows keep the id and the columns they came with; which column is the question and which the answer is the caller's say.
Every row is checked before a run starts: a blank or missing cell is an error that names the rows.

The order is a pure function of the seed. Epoch e is the permutation of (seed, e), and rollout s reads the problems
s*P .. s*P + P-1 of the epochs laid end to end, P being the prompts per step. The position in the data is therefore the
step alone, and a resumed run goes on where it was without replaying anything. Redraws (algorithm.max_redraws) do not
move it: they read an order of their step's own, and what they read comes in its own turn as well.

No grading, no prompts' wording, no tokenizer: `fit` is given the function that encodes a question.
"""

import csv
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_jax.config import Config, Evaluation, InputError
from igrpo_jax.tasks import arithmetic

Table = list[tuple[int, dict[str, Any]]]  # (number, columns) of each row; numbers start at 1, as editors count lines


@dataclass(frozen=True)
class Row:
    """One problem."""

    id: str  # the `id` column where there is one, else the row's number
    index: int  # position among the rows, from 0
    question: str
    answer: str
    columns: dict[str, Any]  # the columns that are neither question nor answer


def training_rows(c: Config) -> list[Row]:
    """The problems to train on: config.data.train, or the built-in task where that is empty."""
    if c.data.train:
        return load_rows(c.data.train, c.data.prompt_column, c.data.answer_column)
    return _builtin_rows(arithmetic.problems(c.data.arithmetic, c.seed)[0], "train")


def evaluation_rows(c: Config) -> dict[str, list[Row]]:
    """The first config.evaluation.limit problems (0 = all) of each benchmark by its name."""
    rows = {}
    for name in c.evaluation.benchmarks:
        if name == "arithmetic":
            rows[name] = _builtin_rows(arithmetic.problems(c.data.arithmetic, c.seed)[1], "test")
        else:
            rows[name] = benchmark_rows(name, c.evaluation)
        rows[name] = rows[name][: c.evaluation.limit or None]
    return rows


def _builtin_rows(problems: list[arithmetic.Problem], split: str) -> list[Row]:
    return [Row(f"{split}-{i}", i, one.question, str(one.answer), {}) for i, one in enumerate(problems)]


def load_rows(path: str, prompt_column: str, answer_column: str, field: str = "data.train") -> list[Row]:
    """Rows of a .jsonl, .json, .csv or .parquet file, or of the train split of a hub data set.

    Args:
        path: the file, or a hub id such as owner/name.
        prompt_column, answer_column: text; a number is accepted as an answer and written out.
        field: the config field that `path` came from, for errors.

    Raises:
        InputError: nothing to read, a line that is no JSON object, a column that is not there, blank cells.
    """
    return _rows(path, prompt_column, answer_column, f"config.{field} = {path!r}")


def _rows(path: str, prompt_column: str, answer_column: str, source: str) -> list[Row]:
    table = _read(path, source)
    if not table:
        raise InputError(f"{source}: is empty; give a file with at least one problem")
    _check_column(table, prompt_column, source, "data.prompt_column")
    _check_column(table, answer_column, source, "data.answer_column")
    _check_cells(table, prompt_column, source, (str,))
    _check_cells(table, answer_column, source, (str, int, float))
    return [
        Row(
            id=str(number if columns.get("id") is None else columns["id"]),
            index=index,
            question=columns[prompt_column],
            answer=str(columns[answer_column]),
            columns={name: value for name, value in columns.items() if name not in (prompt_column, answer_column)},
        )
        for index, (number, columns) in enumerate(table)
    ]


def benchmark_rows(name: str, evaluation: Evaluation) -> list[Row]:
    """The rows of data_dir/NAME.jsonl, whose columns are `prompt` and `answer`.

    Raises:
        InputError: no such file (the nearest is named), or one that `load_rows` refuses.
    """
    folder = Path(evaluation.data_dir)
    if not folder.is_dir():
        raise InputError(f"config.evaluation.data_dir = {evaluation.data_dir!r}: no such directory")
    file = folder / f"{name}.jsonl"
    if not file.is_file():
        there = sorted(file.stem for file in folder.glob("*.jsonl"))
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.0)
        advice = f"the nearest is {near[0]!r} of {', '.join(there)}" if there else "it holds no .jsonl file at all"
        raise InputError(f"config.evaluation.benchmarks = {name!r}: no {name}.jsonl in {str(folder)!r}; {advice}")
    return _rows(str(file), "prompt", "answer", f"config.evaluation.benchmarks = {name!r}: {file}")


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0..count-1 in which `epoch` reads the rows, [count] int64.

    Sorts raw draws of a bit generator: numpy promises that their stream never changes, but not that of `permutation`.
    """
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(draws, kind="stable")


def step_indices(step: int, per_step: int, count: int, seed: int) -> list[int]:
    """The `per_step` rows of rollout `step` (from 0). One that straddles two epochs takes from both."""
    epochs, places = np.divmod(np.arange(step * per_step, (step + 1) * per_step), count)
    orders = {epoch: epoch_order(count, seed, epoch) for epoch in set(epochs.tolist())}
    return [int(orders[epoch][place]) for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]


def redraw_indices(step: int, redraw: int, per_step: int, count: int, seed: int) -> list[int]:
    """The rows that redraw 1, 2, … of rollout `step` has for each of its `per_step` places.

    Different ones from redraw to redraw, and none that the rollout reads itself, while there are enough of them; a
    small data set is begun again. A row does not depend on which places need a redraw.
    """
    draws = np.random.Philox(np.random.SeedSequence([seed, step, 0x5EDA])).random_raw(count)
    order = np.argsort(draws, kind="stable")
    others = order[~np.isin(order, step_indices(step, per_step, count, seed))]
    order = others if len(others) else order
    return [int(order[i % len(order)]) for i in range((redraw - 1) * per_step, redraw * per_step)]


def fit(
    rows: list[Row], encode: Callable[[str], Iterable[int]], max_length: int
) -> tuple[list[tuple[Row, np.ndarray]], int]:
    """The rows whose encoded question has at most `max_length` tokens, with it ([L] int32), and how many were skipped.

    Raises:
        InputError: all of them are longer.
    """
    encoded = [(row, np.asarray(encode(row.question), np.int32)) for row in rows]
    kept = [(row, tokens) for row, tokens in encoded if len(tokens) <= max_length]
    if not kept:
        raise InputError(
            f"config.data.max_prompt_length = {max_length}: all {len(rows)} prompts are longer; the shortest has "
            f"{min(len(tokens) for _, tokens in encoded)} tokens, raise it to at least that"
        )
    return kept, len(rows) - len(kept)


def _read(path: str, source: str) -> Table:
    file, readers = Path(path), {".jsonl": _read_jsonl, ".csv": _read_csv}
    kinds = {".json": "json", ".parquet": "parquet"}
    known = (*readers, *kinds)
    if file.is_file() and file.suffix in known:
        if file.suffix in readers:
            return readers[file.suffix](file, source)
        return _read_datasets(source, kinds[file.suffix], data_files=path)
    if file.exists():
        raise InputError(f"{source}: can't be read; give a file that ends in {', '.join(known)}")
    if file.suffix in known or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise InputError(f"{source}: no such file; give one that ends in {', '.join(known)}, or a hub id (owner/name)")
    return _read_datasets(source, path)


def _read_jsonl(file: Path, source: str) -> Table:
    table = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                columns = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # bad JSON and bad utf-8 both
                raise InputError(f"{source}: line {number} is not JSON ({error}); give one object a line") from error
            if not isinstance(columns, dict):
                raise InputError(f"{source}: line {number} holds no JSON object; give one object a line")
            table.append((number, columns))
    return table


def _read_csv(file: Path, source: str) -> Table:
    """Cells stay the text they are: `datasets` would turn the answer 025 into the number 25 and NA into nothing."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = list(enumerate(csv.DictReader(lines), 1))
    except (csv.Error, ValueError) as error:
        raise InputError(f"{source}: is not a CSV file in utf-8 ({error}); save it as one") from error
    for number, columns in table:
        if None in columns:  # DictReader's key for cells past the header
            raise InputError(f"{source}: row {number} has more cells than the header; put cells with commas in quotes")
    return table


def _read_datasets(source: str, *args: str, **kwargs: str) -> Table:
    import datasets  # seconds to import, and JSON Lines don't need it

    try:
        return list(enumerate(datasets.load_dataset(*args, split="train", **kwargs), 1))
    except Exception as error:  # arrow, the hub and the builders share no base
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "give a local file in JSON Lines, or a hub id with a train split"
        raise InputError(f"{source}: can't be loaded ({type(error).__name__}: {said}); {fix}") from error


def _check_column(table: Table, name: str, source: str, setting: str) -> None:
    there = list(dict.fromkeys(column for _, columns in table for column in columns))
    if name not in there:
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.0)
        advice = f"its columns are {', '.join(there)}; the nearest is {near[0]!r}" if near else "it has none"
        fix = f" (set config.{setting})" if source.startswith("config.data.") else ""
        raise InputError(f"{source}: has no column {name!r}; {advice}{fix}")


def _check_cells(table: Table, name: str, source: str, types: tuple[type, ...]) -> None:
    """Raises InputError, naming rows, where the column is blank or no text."""
    blank, other = [], []
    for number, columns in table:
        value = columns.get(name)
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            blank.append(number)
        elif not isinstance(value, types):
            other.append(number)
    for rows, what, fix in (
        (blank, f"a blank {name!r}", "fill them in or take them out"),
        (other, f"a {name!r} that is not text", "write it as a string"),
    ):
        if rows:
            have, word = ("has", "row") if len(rows) == 1 else ("have", "rows")
            named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            raise InputError(f"{source}: {len(rows)} of {len(table)} rows {have} {what}: {word} {named}; {fix}")
