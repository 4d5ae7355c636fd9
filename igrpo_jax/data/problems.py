"""Problems to train on and to evaluate on.

Rows keep their id and columns. Every row is checked before a run starts: a blank or missing cell is an error that names
the rows, and a row with a cell that can't be read is left out and named. Answers that no completion can match are
counted and named, and more than MAX_UNEQUAL of them are an error, also in the user's own benchmark. Problems that
repeat, or that evaluation uses too, are counted. `data.clean` leaves all of these out. Questions that repeat with
another answer are separate problems, and named.

Not here: the order in which a run reads them (`order`), grading, the wording of prompts, and the tokenizer; `fit`
receives a function that encodes a question. `readers` reads files, `columns` finds columns, and `catalog` lists the
known names.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from igrpo_jax.config import Config, DataConfig, EvaluationConfig
from igrpo_jax.data import choices, columns, overlap, readers
from igrpo_jax.data.builtin import TASKS, Problem
from igrpo_jax.data.catalog import BENCHMARKS, TRAINING_SETS, Benchmark, Hub
from igrpo_jax.data.readers import Table
from igrpo_jax.errors import InputError, quoted
from igrpo_jax.rewards.mathematics import grader

MAX_UNEQUAL = 0.1  # largest share of reference answers that no completion can match


@dataclass(frozen=True)
class Row:
    """One problem."""

    id: str  # the `id` column where there is one, else the row's number
    index: int  # position among the rows, from 0
    question: str
    answer: str  # "" if the problems have none, which no reward of the library asks for then
    columns: dict[str, Any]  # the columns that are not the question, unchanged
    reply: str = ""  # what follows the question, where that is a chat that ends with a reply


@dataclass(frozen=True)
class TrainingSet:
    """The problems to train on, and notes about them."""

    rows: list[Row]
    notes: list[tuple[str, str]]  # name and text, for the table that a run prints


def training_set(config: Config, held_out: dict[str, list[Row]]) -> TrainingSet:
    """Returns the problems of config.data.train, or of the built-in task where that is empty.

    Args:
        held_out: the benchmarks of the run, with which training problems are compared.
    """
    if not config.data.train:
        return TrainingSet(_builtin_rows(TASKS[config.data.task].problems(config)[0], "train"), [])
    rows, mapping, told = load_rows(config.data, config.rewards.answer_readers)
    kept, notes = cleaned(config, rows, held_out)
    return TrainingSet(kept, [("columns", str(mapping)), *told, *notes])


def cleaned(config: Config, rows: list[Row], held_out: dict[str, list[Row]]) -> tuple[list[Row], list[tuple[str, str]]]:
    """Returns those of the rows of config.data.train that are trained on, and notes about what config.data.clean leaves
    out, or would leave out.

    Args:
        held_out: as for `training_set`.

    Raises:
        InputError: no completion can match too many of the answers; no row is kept.
    """
    questions = [row.question for row in rows]
    repeats, others = overlap.repeated(questions, [row.answer for row in rows])
    left_out = set(repeats) if config.data.clean else set()
    treatment = "left out" if config.data.clean else "kept"
    notes = []
    if repeats:
        notes.append(("repeated problems", f"{len(repeats):,} of {len(rows):,}, {treatment}"))
    if others:
        notes.append(("repeated questions with other answers", f"{_counted(rows, others)}, kept"))
    if config.rewards.accuracy and (unequal := unequal_rows(rows)):
        what = _counted(rows, unequal)
        if not config.data.clean:
            fix = f"{columns.FIX.format('answer_column')}, or set config.data.clean=True"
            _check_unequal(rows, unequal, f"config.data.train = {config.data.train!r}", fix)
        notes.append(("answers that no completion can match", f"{what}, {treatment}"))
        left_out |= set(unequal) if config.data.clean else set()
    for name, benchmark in held_out.items():
        same = overlap.overlapping(questions, [row.question for row in benchmark])
        left_out |= set(same) if config.data.clean else set()
        if same:
            notes.append((f"training problems like {name}'s", f"{len(same):,} of {len(rows):,}, {treatment}"))
    kept = [row for position, row in enumerate(rows) if position not in left_out]
    if not kept:
        raise InputError(
            f"config.data.clean = True: leaves none of the {len(rows)} problems of {config.data.train!r}: evaluation "
            "asks them too, or no completion can match their answers; train on others"
        )
    return kept, notes


def unequal_rows(rows: Sequence[Row]) -> list[int]:
    """Returns the positions of the rows whose answer no completion can match, such as prose or a formula cut off.

    100,000 rows take a few seconds.
    """
    where: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        where.setdefault(row.answer, []).append(position)
    return sorted(position for gold in where if not grader.accepts_itself(gold) for position in where[gold])


def _check_unequal(rows: Sequence[Row], unequal: Sequence[int], source: str, fix: str) -> None:
    """Raises InputError if more than MAX_UNEQUAL of the rows are `unequal`."""
    if len(unequal) > MAX_UNEQUAL * len(rows):
        raise InputError(
            f"{source}: no completion can match the reference answers of {_counted(rows, unequal)}, more than "
            f"{MAX_UNEQUAL:.0%}; the first is {quoted(rows[unequal[0]].answer)}; put final answers into "
            f"\\boxed{{}} ({fix})"
        )


def _counted(rows: Sequence[Row], positions: Sequence[int]) -> str:
    """Returns how many and which of the rows are at these positions."""
    named = readers.few([rows[position].id for position in positions])
    return f"{len(positions):,} of {len(rows):,}: row{'s' * (len(positions) > 1)} {named}"


def evaluation_rows(config: Config) -> dict[str, list[Row]]:
    """Returns the problems of each benchmark of config.evaluation by name. `asked` applies config.evaluation.limit."""
    rows = {}
    for name in config.evaluation.benchmarks:
        if name in TASKS:
            rows[name] = _builtin_rows(TASKS[name].problems(config)[1], "test")
        else:
            rows[name] = benchmark_rows(name, config.evaluation)
    return rows


def asked(rows: dict[str, list[Row]], limit: int) -> dict[str, list[Row]]:
    """Returns the first `limit` problems of each benchmark; 0 = all."""
    return {name: problems[: limit or None] for name, problems in rows.items()}


def _check_no_other_part(settings: DataConfig, hub_id: str) -> None:
    """Raises InputError if a subset or split is set beside the name of a data set, which stands for one part of it."""
    for name in _chosen_parts(settings):
        fix = f"{settings.train!r} stands for one part of {hub_id}; set config.data.train = {hub_id!r} for another"
        raise InputError(f"config.data.{name} = {getattr(settings, name)!r}: {fix}")


def _chosen_parts(settings: DataConfig) -> list[str]:
    """Returns which of "subset" and "split" is not the default."""
    return [name for name in ("subset", "split") if getattr(settings, name) != getattr(DataConfig(), name)]


def _builtin_rows(problems: Sequence[Problem], split: str) -> list[Row]:
    return [Row(f"{split}-{i}", i, problem.question, str(problem.answer), {}) for i, problem in enumerate(problems)]


def load_rows(
    settings: DataConfig, answer_readers: Sequence[str] | None = None
) -> tuple[list[Row], columns.Mapping, list[tuple[str, str]]]:
    """Returns the rows of config.data.train, the columns that were read, and notes on what is changed of the file.

    `data.train` is a name of TRAINING_SETS, a file or folder, or a hub id. Rows without an answer are left out where
    `data.clean` is set.

    Args:
        answer_readers: as for `columns.choose`.

    Raises:
        InputError: nothing to read, a missing column, blank cells, more broken rows than readers.MAX_BROKEN.
    """
    source = f"config.data.train = {settings.train!r}"
    preset = None if Path(settings.train).exists() else TRAINING_SETS.get(settings.train)
    path, subset, split = settings.train, settings.subset, settings.split
    prompt, answer = settings.prompt_column, settings.answer_column
    if preset:
        _check_no_other_part(settings, preset.id)
        path, subset, split = preset.id, preset.subset, preset.split
        prompt, answer = prompt or preset.prompt, answer or preset.answer
    table = readers.read(path, source, subset, split, chosen=() if preset else _chosen_parts(settings))
    _check_not_empty(table, source)
    mapping = columns.choose(table, prompt, answer, source, answer_readers=answer_readers)
    notes = []
    if settings.clean and mapping.answer:
        answered = [row for row in table if not columns.is_blank(columns.answer, columns.cell(row[1], mapping.answer))]
        if not answered:
            raise InputError(f"{source}: none of its {len(table)} rows has a {mapping.answer!r}; name another column")
        if unanswered := len(table) - len(answered):
            notes.append(("problems without an answer", f"{unanswered:,}, left out"))
        table = answered
    if moved := columns.system_turns(table, mapping.prompt):
        fix = "data.system_prompt makes one system turn for all"
        notes.append(("system turns", f"{moved:,}, each put in front of the words of its user; {fix}"))
    if not prompt:
        table, mapping = choices.shown(table, mapping, source, "config.data.prompt_column")
    return _rows(table, mapping, source), mapping, notes


def benchmark_rows(name: str, settings: EvaluationConfig) -> list[Row]:
    """Returns the problems of a benchmark: its file in data_dir (NAME.jsonl, .json, .csv or .parquet), else the hub.

    Raises:
        InputError: neither a file nor a name of BENCHMARKS (the nearest is named); a file that can't be used; the hub
            can't be reached.
    """
    source = f"config.evaluation.benchmarks = {name!r}"
    known, where = BENCHMARKS.get(name), f"config.evaluation.data_dir = {settings.data_dir!r}"
    folder = readers.local_copy(settings.data_dir, where)
    if settings.data_dir and not folder.is_dir():
        raise InputError(f"{where}: no such directory")
    files = [file for file in folder.iterdir() if readers.ending(file)] if settings.data_dir else []
    by_stem = {file.stem: file for file in sorted(files)}
    for stem in (name, *(known.files if known else ())):
        if stem in by_stem:
            where = f"{source}: {by_stem[stem]}"
            table = readers.read(str(by_stem[stem]), where)
            return _benchmark(table, known, settings.prompt_column, settings.answer_column, where)
    if known is None:
        there = [*BENCHMARKS, *TASKS, *by_stem]
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.0)[0]
        looked = f"no {name}.jsonl in {str(folder)!r} and no benchmark of that name" if files else "no such benchmark"
        fix = "" if settings.data_dir else "; config.evaluation.data_dir names a folder of your own NAME.jsonl"
        raise InputError(f"{source}: {looked}; the nearest is {near!r} of {', '.join(dict.fromkeys(there))}{fix}")
    hub = known.hub
    fix = f"without the hub, give its folder: config.evaluation.data_dir=FOLDER with {name}.jsonl (prompt, answer)"
    table = readers.read(hub.id, source, hub.subset, hub.split, _access(hub) + fix)
    return _benchmark(table, known, hub.prompt, hub.answer, source, "give it as a file in config.evaluation.data_dir")


def _access(hub: Hub) -> str:
    """Returns how to get access to a gated data set, "" for others."""
    if not hub.gated:
        return ""
    page = f"https://huggingface.co/datasets/{hub.id}"
    return f"it is gated: accept its conditions at {page}, and log in with `hf auth login` or set HF_TOKEN; "


def _benchmark(
    table: Table,
    known: Benchmark | None,
    prompt: str,
    answer: str,
    source: str,
    fix: str = "config.evaluation.{} names another",
) -> list[Row]:
    """Returns the rows of a benchmark's table.

    If a file of a known benchmark has the same columns as on the hub, they are read in the same way.
    """
    _check_not_empty(table, source)
    hub = known.hub if known else None
    if hub and not (prompt or answer) and all(name in table[0][1] for name in (*hub.prompt.split("+"), hub.answer)):
        prompt, answer = hub.prompt, hub.answer
    of_hub = known.choices if hub and (prompt, answer) == (hub.prompt, hub.answer) else None
    if of_hub and table[0][1].keys() & set(of_hub.columns):  # without them, the questions hold their choices already
        table = choices.lettered(table, hub, of_hub, source)
        prompt, answer = choices.PROMPT, choices.ANSWER
    mapping = columns.choose(table, prompt, answer, source, fix)
    if not prompt:
        table, mapping = choices.shown(table, mapping, source, "config.evaluation.prompt_column")
    rows = _rows(table, mapping, source)
    if unequal := unequal_rows(rows):
        if known is None:  # the answers of a known benchmark are what they are
            _check_unequal(rows, unequal, source, fix.format("answer_column"))
        logging.warning(
            "%s: no completion can match the reference answers of %s; fix them, or every completion is graded wrong",
            *(source, _counted(rows, unequal)),
        )
    _, others = overlap.repeated([row.question for row in rows], [row.answer for row in rows])
    if others:
        logging.warning(
            "%s: these questions appear earlier with a different answer: %s; each counts as a separate problem",
            *(source, _counted(rows, others)),
        )
    return rows


def _rows(table: Table, mapping: columns.Mapping, source: str) -> list[Row]:
    reads = [(mapping.prompt, columns.question), *[(mapping.answer, columns.answer)] * bool(mapping.answer)]
    named = lambda number, cells: str(number if cells.get("id") is None else cells["id"])
    return [
        Row(
            named(number, cells),
            index,
            question,
            answers[0] if answers else "",
            mapping.rest(cells),
            columns.reply(columns.cell(cells, mapping.prompt)) or "",
        )
        for index, (number, cells, (question, *answers)) in enumerate(columns.texts(table, reads, source))
    ]


def fit(
    rows: Sequence[Row], encode: Callable[[str], Iterable[int]], max_length: int
) -> tuple[list[tuple[Row, np.ndarray]], int]:
    """Returns the rows whose encoded question has at most `max_length` tokens, and how many rows were skipped.

    Each row comes with its encoded question ([L] int32).

    Raises:
        InputError: all of them are longer, or a question cannot be encoded.
    """
    encoded = [(row, encoded_question(row, encode)) for row in rows]
    kept = [(row, tokens) for row, tokens in encoded if len(tokens) <= max_length]
    if not kept:
        raise InputError(
            f"config.data.max_prompt_length = {max_length}: all {len(rows)} prompts are longer; the shortest has "
            f"{min(len(tokens) for _, tokens in encoded)} tokens, raise it to at least that"
        )
    return kept, len(rows) - len(kept)


def encoded_question(row: Row, encode: Callable[[str], Iterable[int]]) -> np.ndarray:
    """Returns the question as `encode` gives it, [L] int32; an InputError of it names the row."""
    try:
        return np.asarray(encode(row.question), np.int32)
    except InputError as error:
        raise InputError(f"problem {row.id}: {error}") from error


def _check_not_empty(table: Table, source: str) -> None:
    if not table:
        raise InputError(f"{source}: is empty; give a file with at least one problem")
