"""Measures what a model makes of a draft in its prompt before any training: whether it copies, and what it copies.

    python benchmarks/draft_probe.py --model MODEL_DIR --data DATA_DIR --out studies/probe \
        --config.evaluation.max_completion_length=96
    python benchmarks/draft_probe.py --model QWEN05_DIR --data DATA_DIR --out studies/probe_qwen05 --problems 64 \
        --among 1024 --samples 1 --config configs/study_qwen05.py --kinds plain,right,wrong,own \
        --config.model.dtype=float32 --config.rollout.slots=64

DATA_DIR holds gsm8k_train.jsonl (id, prompt, answer, solution). The --problems shortest solutions serve as drafts: as
they are ("right"), or with another number instead of the final answer ("wrong"). With --among N the problems are taken
evenly from the N shortest ones. `python -m igrpo_jax.evaluate` answers each prompt --samples times with the settings of
--config; after a kill the same command continues. --kinds chooses among the kinds of prompts:

    plain           the question alone
    right, wrong    with a draft, in the wording of config.refine.instruction
    ..._bare        with the draft after no more than the word "Draft:"
    ..._tail        with only the last sentence of the draft, which states the answer
    ..._hot         at twice the temperature
    own             with the model's own first answer to the plain prompt as the draft, as in training

OUT/tables.md and OUT/results.json hold for each kind: the accuracy, its 95 % interval (bootstrap over problems), the
fraction of answers that are the draft's own, and `copied`, the fraction of the words of an answer that it has in common
with the draft, counted from both ends (as refine/copy_ratio counts tokens). Own drafts are also split into those that
are right and those that are wrong. Copying attracts training only if right drafts are worth more than the plain prompt,
and if copying is the reason; drafts can help only if wrong ones of the model's own are repaired. The last line is one
JSON object with the same numbers.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import study_runs

from igrpo_jax import config
from igrpo_jax.evaluation import measures
from igrpo_jax.outputs.files import write_atomically, write_rows
from igrpo_jax.outputs.metrics import copy_ratio
from igrpo_jax.records import same_answer

ROOT = Path(__file__).resolve().parent.parent
WORDINGS = {"": config.RefineConfig().instruction, "_bare": "Draft:\n{draft}"}
HOT = ("plain_hot", "right_hot", "wrong_hot")
KINDS = ("plain", *(f"{right}{how}" for right in ("right", "wrong") for how in ("", "_bare", "_tail")), *HOT)


def prompts(problems: Sequence[dict]) -> dict[str, list[dict]]:
    """Returns the rows (id, prompt, answer, draft) of every kind of prompt, without the hot ones and own drafts."""
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
                kinds.setdefault(right + wording, []).append(_with_draft(row, words, draft, stated))
            tail = _with_draft(row, WORDINGS[""], draft.rpartition("\n")[2], stated)
            kinds.setdefault(f"{right}_tail", []).append(tail)
    return kinds


def own_drafts(problems: Sequence[dict], answers: Sequence[dict]) -> list[dict]:
    """Returns the rows of the kind "own".

    Args:
        answers: rows of the evaluation of the plain prompts; sample 0 of a problem is its draft.
    """
    first = {row["prompt_id"]: row for row in answers if row["sample_id"] == 0}
    rows = []
    for row in problems:
        answer = first[row["id"]]
        asked = _with_draft(row, WORDINGS[""], answer["text"].strip(), answer["extracted"])
        rows.append(asked | {"draft_right": answer["accuracy"] >= 1})
    return rows


def _with_draft(row: dict, words: str, draft: str, stated: str | None) -> dict:
    """Returns the row of a problem with a draft in its prompt; `stated` is the answer that the draft states."""
    return row | {"prompt": f"{row['prompt']}\n\n{words.replace('{draft}', draft)}", "draft": draft, "stated": stated}


def evaluate(args: argparse.Namespace, names: Sequence[str], workdir: Path, hot: bool = False) -> None:
    """Answers the prompts of these kinds into `workdir`, at the temperature of training or, if `hot`, at twice it."""
    temperature = config.RolloutConfig().temperature * (2 if hot else 1)
    command = [sys.executable, "-m", "igrpo_jax.evaluate", "--config", str(args.config), "--model", args.model]
    command += ["--benchmarks", ",".join(names), "--samples", str(args.samples), "--workdir", str(workdir)]
    command += [f"--config.evaluation.temperature={temperature}", f"--config.evaluation.data_dir={args.out / 'data'}"]
    subprocess.run([*command, *args.flags], check=True, cwd=ROOT)


def figures(rows: Sequence[dict], asked: Sequence[dict]) -> dict[str, float]:
    """Returns the numbers of one kind of prompt from the rows of its evaluation; rows of other problems don't count."""
    drafts = {row["id"]: row for row in asked}
    rows = [row for row in rows if row["prompt_id"] in drafts]
    right: dict[str, list[float]] = {}
    for row in rows:
        right.setdefault(row["prompt_id"], []).append(row["accuracy"])
    low, high = measures.interval(np.array([np.mean(values) for values in right.values()]))
    result = {"problems": len(right), "accuracy": float(np.mean([row["accuracy"] for row in rows]))}
    result |= {"low": low, "high": high, "length": float(np.mean([row["token_count"] for row in rows]))}
    result["cut"] = float(np.mean([not row["finished"] for row in rows]))
    if "stated" in asked[0]:
        result["draft_answer"] = float(
            np.mean([same_answer(drafts[row["prompt_id"]]["stated"], row["extracted"]) for row in rows])
        )
        pairs = [(drafts[row["prompt_id"]]["draft"].split(), row["text"].split()) for row in rows]
        result["copied"] = float(np.mean([copy_ratio(np.array(draft), np.array(text)) for draft, text in pairs]))
    return {name: round(value, 4) for name, value in result.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """Returns the results as a Markdown table."""
    headings = ["prompt", "problems", "accuracy", "interval", "states the draft's answer", "copied", "tokens", "cut"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for name, numbers in results.items():
        cells = [name, str(numbers["problems"]), f"{100 * numbers['accuracy']:.1f}"]
        cells.append(f"{100 * numbers['low']:.1f} to {100 * numbers['high']:.1f}")
        cells += [f"{100 * numbers[key]:.0f}" if key in numbers else "" for key in ("draft_answer", "copied")]
        lines.append("| " + " | ".join([*cells, f"{numbers['length']:.0f}", f"{100 * numbers['cut']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def measure(args: argparse.Namespace, problems: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Asks the model every kind of prompt that is wanted, and returns the numbers of each."""
    kinds, data = prompts(problems), args.out / "data"
    data.mkdir(parents=True, exist_ok=True)

    def answers(names: Sequence[str], folder: str = "evaluations", hot: bool = False) -> dict[str, list[dict]]:
        for name in names:
            write_rows(data / f"{name}.jsonl", kinds[name])
        if names:
            evaluate(args, names, args.out / folder, hot)
        return {name: study_runs.read_rows(args.out / folder / f"{name}.jsonl") for name in names}

    given: dict[str, list[dict]] = {}
    if "own" in args.kinds:
        rows = study_runs.read_rows(args.out / "evaluations" / "plain.jsonl")
        # The evaluation of own drafts compares the settings of these rows with its own.
        given["plain"] = rows if len(rows) == len(problems) * args.samples else answers(["plain"])["plain"]
        kinds["own"] = own_drafts(problems, given["plain"])
    given |= answers([name for name in args.kinds if name in kinds and name not in given])
    results = {name: figures(given[name], kinds[name]) for name in args.kinds if name in given}
    for name, right in (("own_right", True), ("own_wrong", False)):
        some = [row for row in kinds.get("own", []) if row["draft_right"] == right]
        if some:
            results[name] = figures(given["own"], some)
    hot = answers([name.removesuffix("_hot") for name in args.kinds if name in HOT], "hot", hot=True)
    results |= {f"{name}_hot": figures(rows, kinds[name]) for name, rows in hot.items()}
    return results


def main() -> None:
    args = parse()
    problems = [row for row in study_runs.read_rows(args.data / "gsm8k_train.jsonl") if row["answer"].isdigit()]
    problems = sorted(problems, key=lambda row: len(row["solution"]))[: args.among]
    problems = problems[:: max(1, len(problems) // args.problems)][: args.problems]
    results = measure(args, problems)
    write_atomically(args.out / "results.json", json.dumps(results) + "\n")
    write_atomically(args.out / "tables.md", table(results))
    print(table(results))
    print(json.dumps({"model": args.model, "problems": len(problems), "samples": args.samples, "prompts": results}))


def parse() -> argparse.Namespace:
    """Returns the command's arguments; `flags` are those that are passed to evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory or hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder of gsm8k_train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "study_smollm2.py", help="file of settings")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of prompts with commas between them")
    parser.add_argument("--problems", type=int, default=48)
    parser.add_argument("--among", type=int, help="the shortest problems, from which they are taken evenly")
    parser.add_argument("--samples", type=int, default=4)
    args, args.flags = parser.parse_known_args()  # --config.FIELD=VALUE go to evaluate
    args.out, args.config, args.kinds = args.out.absolute(), args.config.absolute(), args.kinds.split(",")
    args.among = args.among or args.problems
    unknown = [kind for kind in args.kinds if kind not in (*KINDS, "own")]
    if unknown:
        parser.error(f"--kinds {','.join(unknown)}: there are {', '.join((*KINDS, 'own'))}")
    if "own" in args.kinds and "plain" not in args.kinds:
        parser.error("--kinds own: needs the answers to plain prompts; add plain")
    return args


if __name__ == "__main__":
    main()
