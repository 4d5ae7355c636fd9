"""Measures the time and the memory of `python -m igrpo_jax.report` for a run of many steps.

    python benchmarks/report_scale.py [--steps 1000] [--prompts 16] [--drafts 4] [--completions 4] [--words 200]

It makes up a run with the writer that training uses, by default 1,000 steps of 16 prompts with 4 drafts and 4
refinements each, which are 128,000 samples of about 1,200 characters. Then the command runs in its own process. The
last line is one JSON object: `seconds` of the command, imports included; `peak_mib`, its largest resident memory;
`samples`, their number; `input_mib` and `output_mib`, the sizes of the samples and of the report; `open_seconds`, the
time from asking a headless Chromium for the page of samples until it shows its first step (null where there is no
Chromium).
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from igrpo_jax import config as config_lib
from igrpo_jax.outputs.files import write_atomically, write_rows
from igrpo_jax.outputs.metrics import rollout_metrics
from igrpo_jax.outputs.writer import Writer
from igrpo_jax.records import Completion, Group, Prompt, Score

TEXT = (
    "we have to find the number of all such pairs so let $x = \\frac{a}{b}$ and note that it is even , hence by parity "
    "$n^2 \\equiv 1 \\pmod 8$ for odd n therefore the sum over k equals \\sum_{k=1}^n k = n(n+1)/2 wait check again"
)
WORDS = TEXT.split()
PROBLEMS = 64  # problems of an evaluation


def write_run(
    folder: Path, steps: int, prompts: int, drafts: int = 4, completions: int = 4, words: int = 200, evaluate: int = 0
) -> None:
    """Writes a run's folder as training does: solve rates rise, and refinements change some words of the best draft.

    Args:
        steps, prompts: steps of the run, and prompts per step.
        drafts, completions: per prompt; 0 drafts for a run of the base algorithm.
        words: mean number of words of a sample.
        evaluate: steps between evaluations; 0 = none.
    """
    tree = config_lib.default()
    tree.update_from_flattened_dict(
        {
            "steps": steps,
            "prompts_per_step": prompts,
            "log.trackers": (),
            "evaluation.every": evaluate,
            "evaluation.benchmarks": ("made_up",),
            "algorithm.num_drafts": drafts,
            "algorithm.num_generations": completions,
        }
    )
    config = config_lib.freeze(tree)
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(config_lib.to_dict(config)))
    with Writer(folder, config) as writer:
        for step in range(steps + 1):
            skill = 0.2 + 0.6 * step / max(steps, 1)
            if step:
                groups = [_group(rng, number, skill, drafts, completions, words) for number in range(prompts)]
                rewards = np.stack([group.rewards for group in groups])
                writer.write(step, {**_made_up(rng, skill), **rollout_metrics(groups, config)})
                writer.samples(step, groups, rewards - rewards.mean(axis=1, keepdims=True))
            if evaluate and step % evaluate == 0:
                _evaluate(rng, writer, folder, step, skill)


def _group(rng: np.random.Generator, number: int, skill: float, drafts: int, completions: int, words: int) -> Group:
    """Returns a made-up group; `skill` is the probability of a right answer."""
    gold = int(rng.integers(100))
    prompt = Prompt(f"problem-{number}", number, f"What is $x_{{{number}}}$?", str(gold), np.zeros(8, np.int32))
    drawn = tuple(_completion(rng, "draft", i, None, gold, skill, words) for i in range(drafts))
    best = int(np.argmax([draft.score.reward for draft in drawn])) if drawn else None
    kept = None if best is None else drawn[best]
    refined = tuple(_completion(rng, "refine", i, kept, gold, skill, words) for i in range(completions))
    return Group(prompt, drawn, best, prompt.tokens, refined)


def _completion(
    rng: np.random.Generator, stage: str, number: int, draft: Completion | None, gold: int, skill: float, words: int
) -> Completion:
    if draft is None:
        tokens = rng.integers(len(WORDS), size=rng.integers(words // 2, words * 3 // 2 + 1))
    else:
        tokens = np.where(rng.random(len(draft.tokens)) < 0.1, rng.integers(len(WORDS)), draft.tokens)
    right, finished = bool(rng.random() < skill), bool(rng.random() < 0.95)
    stated = str(gold if right else gold + int(rng.integers(1, 9))) if finished else None
    text = " ".join(WORDS[token] for token in tokens) + (f"\n\\boxed{{{stated}}}" if finished else "")
    rewards = {"accuracy": float(right and finished), "format": float(finished)}
    status = "ok" if finished else "unparseable"
    score = Score(sum(rewards.values()), rewards, stated, status, seconds=0.01)
    return Completion(stage, number, tokens.astype(np.int32), np.zeros(len(tokens), np.float32), finished, text, score)


def _made_up(rng: np.random.Generator, skill: float) -> dict[str, float]:
    """Returns made-up metrics of learner, sampler and clock."""
    rollout, wait, update = rng.uniform(2, 3), rng.uniform(0, 0.3), rng.uniform(1, 1.5)
    return {
        "loss": float(rng.normal(0, 0.01)),
        "entropy": 1 - skill + 0.05 * rng.random(),
        "kl": 0.0,
        "grad_norm": float(rng.lognormal(-1, 0.4)),
        "learning_rate": 1e-6,
        "clip_ratio/region_mean": 0.01 * rng.random(),
        "verifier/unparseable_frac": 0.05,
        "verifier/timeout_frac": 0.0,
        "verifier/error_frac": 0.0,
        "verifier/invalid_frac": 0.0,
        "perf/rollout_time": rollout,
        "perf/verify_wait_time": wait,
        "perf/update_time": update,
        "perf/step_time": rollout + update + 0.1,
        "perf/slot_utilization": rng.uniform(0.8, 0.9),
        "perf/stage_overlap_frac": rng.uniform(0.2, 0.5),
        "perf/recompiles": 0,
    }


def _evaluate(rng: np.random.Generator, writer: Writer, folder: Path, step: int, skill: float) -> None:
    """Writes a made-up evaluation of a step."""
    right = rng.random(PROBLEMS) < skill
    rows = []
    for index, is_right in enumerate(right.tolist()):
        row = {"prompt_id": str(index), "index": index, "drafts": [], "sample_id": 0, "prompt": f"What is x_{index}?"}
        rows.append(row | {"accuracy": float(is_right)})
    out = folder / "evaluations" / f"step_{step:06d}"
    out.mkdir(parents=True)
    write_rows(out / "made_up.jsonl", rows)
    solved = float(right.mean())
    width = 1.96 * (solved * (1 - solved) / PROBLEMS) ** 0.5
    scores = {"pass@1": solved, "pass@1_low": solved - width, "pass@1_high": solved + width}
    writer.write(step, {f"eval/made_up/{name}": value for name, value in scores.items()})


def _opened(out: Path, temporary: Path) -> float | None:
    """Returns the seconds until the page of samples shows a step; None where there is no Chromium."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    chromium = importlib.import_module("chromium")
    if chromium.browser() is None:
        return None
    with chromium.opened(temporary / "profile") as page:
        began = time.perf_counter()
        page.open((out / "samples.html").as_uri())
        page.wait("document.readyState === 'complete' && document.querySelector('.prompt > header')")
        return round(time.perf_counter() - began, 2)


def _mib(folder: Path) -> float:
    """Returns the size of all files in a folder in MiB."""
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 1000), ("prompts", 16), ("drafts", 4), ("completions", 4), ("words", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run, out = Path(temporary, "run"), Path(temporary, "report")
        print("making up a run ...", flush=True)
        write_run(run, **vars(given), evaluate=max(1, given.steps // 10))
        command = [sys.executable, "-m", "igrpo_jax.report", "--workdir", str(run), "--out", str(out)]
        began = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            raise SystemExit(f"the command ended with status {process.returncode}")
        samples = given.steps * given.prompts * (given.drafts + given.completions)
        sizes = {"samples": samples, "input_mib": _mib(run / "samples"), "output_mib": _mib(out)}
        sizes["open_seconds"] = _opened(out, Path(temporary))
    print(json.dumps({"seconds": round(seconds, 1), "peak_mib": used.ru_maxrss // 1024} | sizes))


if __name__ == "__main__":
    main()
