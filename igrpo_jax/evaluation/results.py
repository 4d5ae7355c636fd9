"""The folder of an evaluation: its rows, its model and settings, its summary.

    NAME.jsonl       one row per sample of benchmark NAME: appended while it runs, put in order when it is complete
    evaluation.json  model and settings, so that another command with the same --workdir resumes, or is refused
    summary.json, summary.md   the measures of every benchmark in the folder; no timings, so that files can be compared

Several processes write files of their own (NAME.process-3.jsonl), which the first process joins at the end.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from igrpo_jax.config import Config
from igrpo_jax.distributed import cluster
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.evaluation.summary_tables import markdown
from igrpo_jax.outputs.files import rows_text, write_atomically, write_rows, writing
from igrpo_jax.outputs.workdir import LOCK, locked
from igrpo_jax.rewards.failures import FAILED, too_many_failed
from igrpo_jax.storage.addresses import failures, make_folder, names
from igrpo_jax.storage.reading import read_bytes
from igrpo_jax.storage.writing import Lines

# What evaluation.json has hashes of (`Policy.prompt_hashes`), and what is said where they differ.
CHANGED = {
    "chat_template": "the chat template of the model differs from that of the earlier evaluation",
    "tokenizer": "the tokenizer of the model differs from that of the earlier evaluation",
}

Key = tuple[int, tuple[int, ...], int]  # problem, drafts on the way to the sample's prompt, number of the sample


def key_of(row: dict[str, Any]) -> Key:
    """Returns what a row is found by."""
    return row["index"], tuple(row["drafts"]), row["sample_id"]


class Rows:
    """The rows of one benchmark, in memory and, where there is a folder, in its file; rows of that file are kept.

    Args:
        folder: None keeps them in memory only.
        process: number of this process, None if there is only one.
    """

    def __init__(self, folder: Path | None, name: str, process: int | None = None):
        self._folder = folder
        self._name = name
        self._rows: dict[Key, dict[str, Any]] = {}
        self._file: Lines | None = None
        if folder is None:
            return
        path = folder / (f"{name}.jsonl" if process is None else f"{name}.process-{process}.jsonl")
        with writing(path):
            make_folder(folder)
            self.reload()
            # A kill leaves half a line at the end; what is appended to it would be lost with it.
            self._file = Lines(path, rows_text(read_rows(path)))

    def get(self, key: Key) -> dict[str, Any] | None:
        return self._rows.get(key)

    def values(self) -> Iterable[dict[str, Any]]:
        return self._rows.values()

    def of(self, index: int, drafts: tuple[int, ...] = ()) -> list[dict[str, Any]]:
        """Returns the samples of the prompt that a problem has after these drafts, in order, up to the first gap."""
        samples: list[dict[str, Any]] = []
        while (index, drafts, len(samples)) in self._rows:
            samples.append(self._rows[index, drafts, len(samples)])
        return samples

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row, and writes it at once."""
        self._rows[key_of(row)] = row
        if self._file is not None:
            with writing(self._file.path):
                self._file.add(json.dumps(row, ensure_ascii=False))

    def take(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keeps rows of other processes, in memory."""
        self._rows |= {key_of(row): row for row in rows}

    def reload(self) -> None:
        """Reads the rows of all processes."""
        for path in _paths(self._folder, self._name):
            self.take(read_rows(path))

    def close(self) -> None:
        if self._file is not None:
            with writing(self._file.path):
                self._file.close()
            self._file = None

    def join(self) -> None:
        """Puts all rows in order into NAME.jsonl, its only file from then on."""
        if self._folder is None:
            return
        self.close()
        write_rows(self._folder / f"{self._name}.jsonl", (self._rows[key] for key in sorted(self._rows)))
        for path in _paths(self._folder, self._name)[1:]:
            path.unlink()


def drop_failed(folder: Path, name: str, most: float) -> None:
    """Removes the failed gradings of each round in which they are more than the share `most`, and what was drawn after
    them as drafts.

    An evaluation ends there with a VerifierError, and would take them for wrong answers when it is started again. So
    does a probe, which refines drafts before.
    """
    files = {path: read_rows(path) for path in _paths(folder, name)}
    every = [row for rows in files.values() for row in rows]
    rounds: dict[int, list[str]] = {}
    for row in every:
        rounds.setdefault(len(row["drafts"]), []).append(row["status"])
    failing = {number for number, statuses in rounds.items() if too_many_failed(statuses, most)}
    is_failed = lambda row: len(row["drafts"]) in failing and row["status"] in FAILED
    failed = {(row["index"], *row["drafts"], row["sample_id"]) for row in every if is_failed(row)}
    for path, rows in files.items():
        kept = [row for row in rows if not (is_failed(row) or _follows(row, failed))]
        if len(kept) < len(rows):
            write_rows(path, kept)


def _follows(row: dict[str, Any], samples: set[tuple[int, ...]]) -> bool:
    """Returns whether one of the drafts on the way to a row is among these samples: problem, drafts, number."""
    path = (row["index"], *row["drafts"])
    return any(path[:end] in samples for end in range(2, len(path) + 1))


def _paths(folder: Path, name: str) -> list[Path]:
    """Returns the joined file first, whether it exists or not, then the files of processes."""
    part = re.compile(re.escape(name) + r"\.process-\d+\.jsonl")
    return [folder / f"{name}.jsonl", *(folder / each for each in sorted(filter(part.fullmatch, names(folder))))]


def benchmark_of(path: Path) -> str:
    """Returns the name of the benchmark that a file of rows belongs to."""
    return re.sub(r"(\.process-\d+)?\.jsonl$", "", path.name)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the complete rows of a file; a broken line, as a kill leaves it, is dropped."""
    rows = []
    for line in _text(path).split("\n"):
        try:
            row = json.loads(line)
            key_of(row)
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def _text(path: Path) -> str:
    """Returns the text of a file, "" if there is none."""
    try:
        return read_bytes(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def recorded_date(folder: Path) -> str | None:
    """Returns the day that the chat template of the evaluation in `folder` takes for today, None without evaluation.

    It is "" if the template does not ask for the day, and for an evaluation of a version that did not record it.
    """
    try:
        return json.loads(read_bytes(folder / "evaluation.json")).get("template_date", "")
    except (OSError, ValueError, AttributeError):
        return None  # `claim` says what is wrong with a file that can't be read


def settings(config: Config, max_completion_length: int) -> dict[str, Any]:
    """Returns what evaluation.json records besides the model: the settings that decide which answers it gives.

    Args:
        config: with the day of the chat template.
        max_completion_length: tokens that an answer may have (`Plan.max_new_tokens`).
    """
    return {
        "dtype": config.model.dtype,
        "seed": config.seed,
        "temperature": config.evaluation.temperature,
        "top_p": config.evaluation.top_p,
        "max_completion_length": max_completion_length,
        "instruction": config.data.instruction,
        "system_prompt": config.data.system_prompt,
        "template_kwargs": config.data.template_kwargs,
        "template_date": config.data.template_date,
        "refine_instruction": config.refine.instruction,
        "max_draft_length": config.draft_limit,
    }


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Makes `folder`, and writes its evaluation.json. Raises RunError if that fails."""
    with writing(folder):
        make_folder(folder)
    write_atomically(folder / "evaluation.json", json.dumps(settings, indent=2) + "\n")


@contextlib.contextmanager
def held(folder: Path, settings: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Makes `folder` that of an evaluation with these settings, and keeps others out of it inside the `with` block.

    Yields a function that raises RunError if another process has taken the folder in the meantime; see `locked`.

    Raises:
        InputError: as `claim`; another evaluation is at work there.
    """
    cluster.from_first(functools.partial(check, folder, settings))  # a folder of something else gets no lock
    with locked(folder) as still_ours:
        cluster.from_first(functools.partial(claim, folder, settings))
        yield still_ours


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Makes `folder` the folder of an evaluation with these settings, or checks that it is that already.

    Raises:
        InputError: it holds an evaluation with other settings, other files, or cannot be written.
    """
    check(folder, settings)
    with _naming_refusals(folder):
        write_settings(folder, settings)


def check(folder: Path, settings: dict[str, Any]) -> None:
    """Raises InputError if `folder` cannot become that of an evaluation with these settings; writes nothing."""
    path = folder / "evaluation.json"
    with _naming_refusals(folder):
        present = names(folder)
        if path.name in present:
            old = json.loads(read_bytes(path))
            # Older versions did not write these. `pinning.dated` has asked for a day that was not recorded.
            old = {name: settings.get(name) for name in ("template_date", *CHANGED)} | old
            old = {"system_prompt": "", "template_kwargs": {}} | old
            differing = [name for name in settings if old.get(name) != settings[name]]
            if differing:
                changed = ", ".join(_difference(name, old, settings) for name in differing)
                raise InputError(
                    f"--workdir {folder}: holds an evaluation with other settings ({changed}); give another --workdir, "
                    "or the old values"
                )
        elif foreign := sorted(present - {LOCK}):
            raise InputError(
                f"--workdir {folder}: holds {foreign[0]} but no evaluation.json; give an empty or new folder"
            )


def _difference(name: str, old: dict[str, Any], settings: dict[str, Any]) -> str:
    """Returns what has changed in a setting, and says it in words if the two values alone would say nothing."""
    if name == "data":
        source = settings["data.train"] or "the built-in task"
        return f"data: the prompts or answers of {source} differ from those of the earlier evaluation"
    if name in CHANGED:
        return f"{name}: {CHANGED[name]}"
    changed = f"{name}: {old.get(name)!r} -> {settings[name]!r}"
    if name == "weights_written" and ":" in str(old.get(name)) and ":" not in settings[name]:
        changed += (
            ", the hub's revision, where an older version recorded the time of the download; if it began with this "
            "revision, write that into its evaluation.json"
        )
    return changed


@contextlib.contextmanager
def _naming_refusals(folder: Path) -> Iterator[None]:
    """Turns a refusal of the file system, or a file that can't be read, into an InputError that names the folder."""
    try:
        yield
    except failures(RunError, ValueError, AttributeError) as error:
        raise InputError(f"--workdir {folder}: cannot be used ({error}); give another folder") from error


def write_summary(folder: Path, head: dict[str, Any], benchmarks: dict[str, dict[str, Any]]) -> str:
    """Writes summary.json and summary.md, keeps other benchmarks that are in the folder, and returns the Markdown."""
    path = folder / "summary.json"
    before = json.loads(_text(path) or '{"benchmarks": {}}')["benchmarks"]
    every = dict(sorted((before | benchmarks).items()))
    write_atomically(path, json.dumps(head | {"benchmarks": every}, indent=2) + "\n")
    text = markdown(every)
    write_atomically(folder / "summary.md", text)
    return text
