"""Answers questions, to try a model by hand: `python -m igrpo_jax.generate --model MODEL --prompt "What is 7 * 8?"`.

MODEL is the folder of a run, a Hugging Face directory or a hub id. --prompts FILE reads questions from a file: the
lines of a .txt, or a column of JSON Lines, CSV, JSON or Parquet. --samples K answers each K times; --rounds 1 refines
as well: an answer of the majority among the first `evaluation.drafts` is put into the prompt as a draft. The settings
temperature, top_p and max_completion_length of config.evaluation say how answers are drawn.

jax is imported inside functions only: the verifier's worker processes import this module too.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from igrpo_jax.cli import exits, parsing
from igrpo_jax.config import Config
from igrpo_jax.errors import InputError
from igrpo_jax.loading import check_model
from igrpo_jax.rewards import main_guard
from igrpo_jax.storage import reading

USAGE = (
    'python -m igrpo_jax.generate --model MODEL (--prompt "..." | --prompts FILE) [--samples K] [--rounds R] '
    "[--config.FIELD=VALUE ...]"
)
FLAGS = {
    "prompt": "the question to answer",
    "prompts": "file of questions: .txt with one on each line, .jsonl, .csv, .json or .parquet",
    "samples": "answers to each question; default: evaluation.samples, or if None 1, with rounds evaluation.drafts",
    "rounds": "rounds of draft -> refine after the first answers; default: evaluation.rounds",
    "step": "step of the checkpoint that answers, where --model is a run; default: the newest",
}
FIELDS = ("text", "extracted", "token_count", "finished", "sample_id", "drafts")  # of an answer; nothing is graded
NAME = "prompts"  # the name of the benchmark that the questions form


def main(argv: list[str]) -> None:
    config, values = parsing.parse_model(argv, USAGE, FLAGS)
    if not values["model"]:
        raise InputError("--model: missing; give the folder of a run, a Hugging Face directory or a hub id")
    if bool(values["prompt"]) == bool(values["prompts"]):
        raise InputError('--prompt: give either --prompt "a question" or --prompts FILE')
    if (given := sum(bool(re.match(r"--?prompts?(=|$)", argument)) for argument in argv)) > 1:
        raise InputError(f"--prompt: given {given} times; put several questions into a file, for --prompts FILE")
    if values["prompt"] and not is_text(values["prompt"]):
        raise InputError(f"--prompt {values['prompt']!r}: is not UTF-8 text; encode it so, or put it into a file")
    questions = [values["prompt"]] if values["prompt"] else read(values["prompts"], config.data.prompt_column)
    step = parsing.number("step", values["step"])
    from igrpo_jax.distributed import cluster

    with cluster.joined(config.cluster, parsing.cluster_arguments(argv)):
        show(questions, generate(config, values["model"], questions, step))


def is_text(question: str) -> bool:
    """Returns whether a tokenizer can read `question`: no lone surrogates, which stand for bytes that are not utf-8."""
    try:
        question.encode()
    except UnicodeEncodeError:
        return False
    return True


def read(path: str, column: str) -> list[str]:
    """Returns the questions of a file; blank lines of a .txt are left out.

    Raises:
        InputError: no such file, no question in it, no column of questions, or rows without one.
    """
    from igrpo_jax.data import columns, readers

    source, questions = f"--prompts {path}", []
    file = reading.local(source, path)
    if file.suffix.lower() == ".txt":
        if not file.is_file():
            raise InputError(f"{source}: no such file; give one with a question on each line")
        try:
            text = file.read_text(encoding="utf-8-sig")
        except ValueError as error:
            raise InputError(f"{source}: is not UTF-8 text ({error}); save it as UTF-8") from error
        questions = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        if file.is_file() and not readers.ending(file):
            raise InputError(f"{source}: can't be read; give a file that ends in .txt, {readers.FILES}")
        table = readers.read(str(file), source)
        if table:
            name = columns.choose_prompt(table, column, source)
            questions = [text for _, _, (text,) in columns.texts(table, [(name, columns.question)], source)]
    if not questions:
        raise InputError(f"{source}: is empty; give a file with at least one question")
    return questions


def generate(
    config: Config, model: str | Path, questions: Sequence[str], step: int | None = None
) -> list[list[dict[str, Any]]]:
    """Returns the model's answers to each of `questions`.

    Args:
        config: what `load_config(..., model=model)` returns; `evaluation` says how answers are drawn.
        model: the folder of a run, a Hugging Face directory or a hub id.
        questions: the texts to answer, none of them blank.
        step: the step of the checkpoint, where `model` is a run; None for the newest.

    Returns:
        A list for each question, of its answers in their order. An answer has its `text`, the `extracted` final answer
        (None if it states none), `token_count`, `finished`, `sample_id`, and the numbers of the `drafts` behind it.

    Raises:
        InputError: `config` is not that of `model`, or something in it is wrong.
    """
    if isinstance(questions, str) or not questions:
        raise InputError(f"questions = {questions!r}: give a list with at least one question")
    if wrong := [text for text in questions if not isinstance(text, str) or not text.strip() or not is_text(text)]:
        raise InputError(f"questions: {wrong[0]!r} is not a question; give UTF-8 texts that are not blank")
    main_guard.check_main()
    check_model(config, model)
    from igrpo_jax.data.problems import Row
    from igrpo_jax.evaluation import inference
    from igrpo_jax.outputs.console import Console

    rows = {NAME: [Row(str(i + 1), i, question, "", {}) for i, question in enumerate(questions)]}
    config = replace(config, evaluation=replace(config.evaluation, samples=config.evaluation.samples or drafts(config)))
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(Console())
        inputs = inference.open_evaluation(config, str(model), step, rows)
        for note in inputs.plan.notes:
            console.message(note)
        evaluator, params = inference.load(inputs, console, stack)
        drawn = evaluator.sampled(params, NAME, chains=("vote",))
        return [
            [
                {name: row[name] for name in FIELDS}
                for path in evaluator.paths(prompt, drawn)
                for row in drawn.of(prompt.index, path)
            ]
            for prompt in inputs.plan.prompts[NAME]
        ]


def show(questions: Sequence[str], answers: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Prints questions with their answers."""
    from igrpo_jax.outputs.console import Console

    with Console() as console:
        for question, rows in zip(questions, answers, strict=True):
            console.message(f"=== {question}")
            for row in rows:
                console.message(f"--- {title(row)}\n{row['text']}")


def title(row: dict) -> str:
    """Returns the line above an answer: its round, number, final answer and length."""
    stage = f"round {len(row['drafts'])}, from draft {row['drafts'][-1] + 1}, answer" if row["drafts"] else "answer"
    answer = "states none" if row["extracted"] is None else row["extracted"]
    cut = "" if row["finished"] else ", cut at the limit"
    return f"{stage} {row['sample_id'] + 1}: {answer} ({row['token_count']} tokens{cut})"


def drafts(config: Config) -> int:
    """Returns the answers per question where --samples is not given: one, or as many as a draft is chosen from."""
    return config.evaluation.drafts if config.evaluation.rounds else 1


if __name__ == "__main__":
    exits.run(main)
