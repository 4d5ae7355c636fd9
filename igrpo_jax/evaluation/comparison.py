"""Compares two evaluations: lists all differences besides the model, then says by how much the second is better.

Problems are compared in pairs: those that both folders hold, by the mean accuracy of their single-shot answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_jax.errors import InputError, one_line
from igrpo_jax.evaluation import measures
from igrpo_jax.evaluation.results import benchmark_of, read_rows
from igrpo_jax.evaluation.summary_tables import percent
from igrpo_jax.outputs.evaluation_settings import MODEL, cell, last_evaluation, read_settings
from igrpo_jax.outputs.lines import plain_text


@dataclass(frozen=True)
class Problem:
    """A problem of one evaluation with its single-shot answers."""

    answer: Any  # the reference answer
    accuracies: list[float]  # of the answers


# By id, question, reference answer and how many problems with the same stood before. The answer is None unless problems
# of one id and question differ in it: a reference answer may be corrected between two evaluations of a problem.
Problems = dict[tuple[str, str, Any, int], Problem]


@dataclass(frozen=True)
class Paired:
    """The single shot of two evaluations on the problems of a benchmark that both hold; fractions, not percent."""

    problems: int
    left_out: int  # problems in one of them only
    first: float  # pass@1
    second: float
    change: float  # second - first, with its 95 % interval
    low: float
    high: float
    better: int  # problems on which the second has the higher accuracy
    worse: int
    p_value: float  # of the exact sign test


def paired(first: Path, second: Path) -> dict[str, Paired | None]:
    """Returns by how much `second` is better on each benchmark that both folders hold, compared problem by problem.

    None stands for a benchmark of which no problem is in both.

    Raises:
        InputError: a folder holds no rows, or the two have no benchmark in common.
    """
    return {name: _pair(*both) if _share(*both) else None for name, both in _common(first, second).items()}


def compare(first: Path, second: Path) -> str:
    """Returns the differences of two evaluations besides the model, and `paired` as a Markdown table.

    Args:
        first, second: folder of an evaluation, or of a run, whose last evaluation is meant.

    Raises:
        InputError: as `paired` does, and where no problem of a benchmark is in both.
    """
    first, second = last_evaluation(first), last_evaluation(second)
    benchmarks, settings = _common(first, second), [read_settings(folder) for folder in (first, second)]
    for name, both in benchmarks.items():
        if not _share(*both):
            raise InputError(f"--compare {first},{second}: no problem of {name} is in both; give the same problems")
    lines = [*_differences([first, second], settings, benchmarks), ""]
    lines += [
        "Single-shot pass@1 in percent, paired by problem. The interval is a bootstrap over problems, and exact where "
        "all problems changed alike; p is that of an exact sign test of better against worse.",
        "",
        "| benchmark | problems | A | B | B - A | 95 % interval | better, worse | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, both in benchmarks.items():
        pair = _pair(*both)
        count = f"{pair.problems}" + (f" ({pair.left_out} in one only)" if pair.left_out else "")
        cells = [name, count, percent(pair.first), percent(pair.second), f"{100 * pair.change:+.2f}"]
        cells += [f"{100 * pair.low:+.2f} to {100 * pair.high:+.2f}", f"{pair.better}, {pair.worse}"]
        lines.append(_row([*cells, f"{pair.p_value:.2g}"]))
    return "\n".join(lines) + "\n"


def _share(first: Problems, second: Problems) -> bool:
    return not first.keys().isdisjoint(second)


def _pair(first: Problems, second: Problems) -> Paired:
    common = [problem for problem in first if problem in second]
    a, b = (np.array([np.mean(problems[key].accuracies) for key in common]) for problems in (first, second))
    left_out = len(first.keys() | second.keys()) - len(common)
    better, worse = int((b > a).sum()), int((b < a).sum())
    changed = measures.difference(a, b)
    p_value = measures.sign_test(better, worse)
    return Paired(len(common), left_out, float(a.mean()), float(b.mean()), *changed, better, worse, p_value)


def _differences(
    folders: list[Path], settings: list[dict[str, Any] | None], benchmarks: dict[str, tuple[Problems, Problems]]
) -> list[str]:
    """Returns lines that name both evaluations, and a table of all their differences besides the model."""
    lines, known = [], [part for part in settings if part is not None]
    for label, folder, part in zip("AB", folders, settings, strict=True):
        about = f"{label} = {folder}" + (f": {_model(part)}" if part else ", which records no settings")
        lines.append(one_line(plain_text(about)))
    rows = []
    if len(known) == 2:
        names = [name for name in dict.fromkeys([*known[0], *known[1]]) if name not in MODEL]
        rows = [(name, *(cell(part, name) for part in known)) for name in names]
    for name, both in benchmarks.items():
        for title, read in DATA.items():
            rows.append((f"{name}: {title}", *(str(read(*pair)) for pair in (both, both[::-1]))))
    rows = [row for row in rows if row[1] != row[2]]
    if rows:
        lines += ["", "They differ in more than the model, so B - A is not due to the model alone:", ""]
        lines += ["| | A | B |", "|---|---|---|"]
        return lines + [_row(row) for row in rows]
    if len(known) == 2:
        same = all(known[0].get(name) == known[1].get(name) for name in MODEL)
        lines += ["", "Settings and problems are the same" + (", and so is the model." if same else ".")]
    return lines


def _row(cells: Sequence[str]) -> str:
    """Returns a row of a Markdown table; what the data hold is one line without escapes in it."""
    # Each by itself: an escape sequence that does not end would take the rest of the table with it.
    return "| " + " | ".join(plain_text(cell).replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"


def _only(own: Problems, other: Problems) -> str:
    missing = [key for key in own if key not in other]
    return f"{len(missing)}, the first is {missing[0][0]}" if missing else "none"


def _answers(own: Problems) -> str:
    """Returns how many answers each problem has; an evaluation that was killed has fewer to some."""
    counts = [len(problem.accuracies) for problem in own.values()]
    low, high = min(counts), max(counts)
    return f"{high}" if low == high else f"{low} to {high}: incomplete"


def _changed_answer(own: Problems, other: Problems) -> str:
    changed = (key for key in own if key in other and own[key].answer != other[key].answer)
    return next((f"{key[0]}: {own[key].answer}" for key in changed), "none")


# What is compared of a benchmark's data: each function gets its problems in one folder and those in the other.
DATA: dict[str, Callable[[Problems, Problems], object]] = {
    "problems": lambda own, other: len(own),
    "problems that the other lacks": lambda own, other: _only(own, other),
    "answers to a problem": lambda own, other: _answers(own),
    "first reference answer that differs": lambda own, other: _changed_answer(own, other),
}


def _model(settings: Mapping[str, Any]) -> str:
    step = settings.get("step")
    return f"{settings.get('model')}" + ("" if step is None else f", step {step}")


def _common(first: Path, second: Path) -> dict[str, tuple[Problems, Problems]]:
    """Returns the problems of both folders for each benchmark that both hold; raises as `paired` does."""
    parts = [_rows(folder) for folder in (first, second)]
    repeated = set().union(*map(_repeated, parts))
    firsts, seconds = (_problems(part, repeated) for part in parts)
    names = [name for name in firsts if name in seconds]
    if not names:
        raise InputError(
            f"--compare {first},{second}: no benchmark is in both ({', '.join(firsts)}; {', '.join(seconds)}); give "
            "folders that hold the NAME.jsonl of the same benchmark"
        )
    return {name: (firsts[name], seconds[name]) for name in names}


def _rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of the single shot of each benchmark, in the order of the problems."""
    if not folder.is_dir():
        raise InputError(f"--compare: {str(folder)!r} is not a folder; give two folders of evaluations, A,B")
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        if shot := [row for row in read_rows(path) if not row["drafts"]]:
            rows.setdefault(benchmark_of(path), []).extend(shot)
    if not rows:
        fix = "give the --workdir of one, or of a run that made one"
        raise InputError(f"--compare: {str(folder)!r} holds no rows of an evaluation; {fix}")
    return {name: sorted(part, key=lambda row: row["index"]) for name, part in rows.items()}


def _repeated(rows: dict[str, list[dict[str, Any]]]) -> set[tuple[str, str, str]]:
    """Returns benchmark, id and question of the problems that are there with several reference answers."""
    answers: dict[tuple[str, str, str], set[str]] = {}
    for name, part in rows.items():
        for row in part:
            answers.setdefault((name, row["prompt_id"], row["prompt"]), set()).add(str(row.get("answer")))
    return {key for key, several in answers.items() if len(several) > 1}


def _problems(rows: dict[str, list[dict[str, Any]]], repeated: set[tuple[str, str, str]]) -> dict[str, Problems]:
    """Returns the problems of each benchmark with their single-shot answers; those in `repeated` by their answers."""
    benchmarks: dict[str, Problems] = {}
    for name, part in rows.items():
        places: dict[tuple[str, str, Any], dict[int, int]] = {}
        for row in part:
            id, question = row["prompt_id"], row["prompt"]
            named = id, question, str(row.get("answer")) if (name, id, question) in repeated else None
            # Numbers of problems differ where a folder holds some of them only, so they only tell repeats apart.
            same = places.setdefault(named, {})
            key = *named, same.setdefault(row["index"], len(same))
            problem = benchmarks.setdefault(name, {}).setdefault(key, Problem(row.get("answer"), []))
            problem.accuracies.append(row["accuracy"])
    return benchmarks
