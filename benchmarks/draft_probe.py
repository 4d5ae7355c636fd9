"""Measures what a model makes of a draft in its prompt before any training: whether it copies, and what it copies.

    python benchmarks/draft_probe.py --model MODEL_DIR --data DATA_DIR --out studies/probe

DATA_DIR holds gsm8k_train.jsonl (id, prompt, answer, solution). The --problems shortest solutions serve as drafts: as
they are ("right"), or with another number instead of the final answer ("wrong"). `python -m igrpo_jax.evaluate` answers
each prompt --samples times; after a kill the same command continues. The kinds of prompts are

    plain           the question alone
    right, wrong    with a draft, in the wording of config.refine.instruction
    ..._bare        with the draft after no more than the word "Draft:"
    ..._tail        with only the last sentence of the draft, which states the answer
    ..._hot         at twice the temperature

OUT/tables.md and OUT/results.json hold for each kind: the accuracy, its 95 % interval (bootstrap over problems), the
fraction of answers that are the draft's own, and `copied`, the fraction of the words of an answer that it has in common
with the draft, counted from both ends (as refine/copy_ratio counts tokens). Copying attracts training only if right
drafts are worth more than the plain prompt, and if copying is the reason. The last line is one JSON object with the
same numbers.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import study_runs

from igrpo_jax import config
from igrpo_jax.evaluation import measures
from igrpo_jax.outputs.files import write_atomically, write_rows
from igrpo_jax.outputs.metrics import copy_ratio

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "study_smollm2.py"
WORDINGS = {"": config.RefineConfig().instruction, "_bare": "Draft:\n{draft}"}


def prompts(problems: list[dict]) -> dict[str, list[dict]]:
    """Returns the rows (id, prompt, answer, draft) of every kind of prompt except the hot ones."""
    kinds: dict[str, list[dict]] = {"plain": [row | {"draft": ""} for row in problems]}
    rng = np.random.default_rng(0)
    for right in ("right", "wrong"):
        for row in problems:
            draft, stated = row["solution"].strip(), row["answer"]
            if right == "wrong":
                stated = str(int(row["answer"]) + int(rng.integers(1, 10)))
                head, _, tail = draft.rpartition("\n")
                number = rf"(?<!\d){re.escape(row['answer'])}(?!\d)"
                draft = f"{head}\n{re.sub(number, stated, tail)}".strip()
            draft += f"\nThe answer is \\boxed{{{stated}}}."
            for wording, words in WORDINGS.items():
                _add(kinds, right + wording, row, words, draft, stated)
            _add(kinds, f"{right}_tail", row, WORDINGS[""], draft.rpartition("\n")[2], stated)
    return kinds


def _add(kinds: dict[str, list[dict]], kind: str, row: dict, words: str, draft: str, stated: str) -> None:
    """Adds a row with a draft to `kinds`; `stated` is the answer that the draft states."""
    prompt = f"{row['prompt']}\n\n{words.replace('{draft}', draft)}"
    kinds.setdefault(kind, []).append(row | {"prompt": prompt, "draft": draft, "stated": stated})


def evaluate(args: argparse.Namespace, names: list[str], workdir: Path, temperature: float) -> None:
    """Answers the prompts of these kinds at a temperature, into `workdir`."""
    command = [sys.executable, "-m", "igrpo_jax.evaluate", "--config", str(CONFIG), "--model", args.model]
    command += ["--benchmarks", ",".join(names), "--samples", str(args.samples), "--workdir", str(workdir)]
    command += [f"--config.evaluation.temperature={temperature}", f"--config.evaluation.data_dir={args.out / 'data'}"]
    command.append("--config.evaluation.max_completion_length=96")
    subprocess.run([*command, *args.flags], check=True, cwd=ROOT)


def figures(rows: list[dict], asked: list[dict]) -> dict[str, float]:
    """Returns the numbers of one kind of prompt from the rows of its evaluation."""
    drafts = {row["id"]: row for row in asked}
    right: dict[str, list[float]] = {}
    for row in rows:
        right.setdefault(row["prompt_id"], []).append(row["accuracy"])
    low, high = measures.interval(np.array([np.mean(values) for values in right.values()]))
    result = {"accuracy": float(np.mean([row["accuracy"] for row in rows])), "low": low, "high": high}
    result["length"] = float(np.mean([row["token_count"] for row in rows]))
    if "stated" in asked[0]:
        result["draft_answer"] = float(
            np.mean([row["extracted"] == drafts[row["prompt_id"]]["stated"] for row in rows])
        )
        pairs = [(drafts[row["prompt_id"]]["draft"].split(), row["text"].split()) for row in rows]
        result["copied"] = float(np.mean([copy_ratio(np.array(draft), np.array(text)) for draft, text in pairs]))
    return {name: round(value, 4) for name, value in result.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """Returns the results as a Markdown table."""
    lines = ["| prompt | accuracy | interval | states the draft's answer | copied | tokens |", "|---" * 6 + "|"]
    for name, numbers in results.items():
        cells = [name, f"{100 * numbers['accuracy']:.1f}", f"{100 * numbers['low']:.1f} to {100 * numbers['high']:.1f}"]
        cells += [f"{100 * numbers[key]:.0f}" if key in numbers else "" for key in ("draft_answer", "copied")]
        lines.append("| " + " | ".join([*cells, f"{numbers['length']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory or hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder of gsm8k_train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--problems", type=int, default=48)
    parser.add_argument("--samples", type=int, default=4)
    args, args.flags = parser.parse_known_args()  # --config.FIELD=VALUE go to evaluate
    args.out = args.out.absolute()
    problems = [row for row in study_runs.read_rows(args.data / "gsm8k_train.jsonl") if row["answer"].isdigit()]
    problems = sorted(problems, key=lambda row: len(row["solution"]))[: args.problems]
    kinds = prompts(problems)
    (args.out / "data").mkdir(parents=True, exist_ok=True)
    for name, rows in kinds.items():
        write_rows(args.out / "data" / f"{name}.jsonl", rows)
    hot = ["plain", "right", "wrong"]
    temperature = config.RolloutConfig().temperature
    evaluate(args, list(kinds), args.out / "evaluations", temperature)
    evaluate(args, hot, args.out / "hot", 2 * temperature)
    results = {}
    for folder, suffix, names in (("evaluations", "", list(kinds)), ("hot", "_hot", hot)):
        for name in names:
            rows = study_runs.read_rows(args.out / folder / f"{name}.jsonl")
            results[name + suffix] = figures(rows, kinds[name])
    write_atomically(args.out / "results.json", json.dumps(results) + "\n")
    write_atomically(args.out / "tables.md", table(results))
    print(table(results))
    print(json.dumps({"model": args.model, "problems": len(problems), "samples": args.samples, "prompts": results}))


if __name__ == "__main__":
    main()
