"""Compares GRPO with iGRPO at the same number of sampled completions, on many seeds from one shared start.

    python benchmarks/matched_budget.py --out studies/arithmetic                          # 10 paired seeds
    python benchmarks/matched_budget.py --out studies/arithmetic --groups all             # and 3 of the other groups
    python benchmarks/matched_budget.py --out studies/smollm2 --setting smollm2 --model SMOLLM2_DIR --data DATA_DIR

Every run is `python -m igrpo_jax.main` with a file of configs/ and the settings of its arm in study_arms.py; its folder
is OUT/runs/ARM/seed_K. All runs begin from the same exported model. The seed decides the order of the prompts and the
samples, so that runs with the same seed are pairs; data and start do not depend on it. After a kill the same command
continues: it skips finished runs and resumes an unfinished one. --jobs runs at a time share the machine, each on its
    own
cores, so that their seconds can be compared. The groups of arms are

    main          GRPO (8 completions) and iGRPO (4 drafts + 4 refinements)
    copying       the same from a start that has seen good drafts and copies them, and possible remedies
    wrapper       DAPO, GSPO and Dr. GRPO, each with and without the draft stage
    controls      iGRPO with another draft than the best, without some drafts, trained on drafts, ...
    beta          iGRPO with a KL term of 1e-4, 1e-3, 1e-2
    completions   GRPO and iGRPO with 4, 16 and 32 completions in total

After every run OUT/results.json (all numbers), OUT/tables.md and OUT/GROUP.png are written anew; `--report-only` writes
them from the runs that exist. Intervals are 95 %, by Student's t over the seeds, and differences are differences of
pairs. The last line is one JSON object: `arms` with pass@1 before and after, `area` (mean height of the curve), and the
difference to the arm with which each arm is compared.

The setting smollm2 starts every run from --model. It takes the --screen shortest problems of GSM8K, and trains on those
that the model solves sometimes, because a model that never succeeds learns nothing. Evaluations use the same problems
with other samples. Flags --config.FIELD=VALUE are passed to every run.
"""

import argparse
import collections
import dataclasses
import fcntl
import os
import queue
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import study_report
import study_runs
from study_arms import ARMS, STARTS, Arm

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Study:
    """The folder of the runs, and the settings that they have in common."""

    out: Path
    config: Path
    benchmark: str
    settings: dict[str, Any]  # settings of all runs
    steps: int
    flags: list[str]  # further flags for every run
    pretrained: str = ""  # the model from which all runs start, instead of the supervised starts

    def run(self, arm: str, seed: int) -> Path:
        """Returns the folder of a run."""
        return self.out / "runs" / arm / f"seed_{seed}"

    def model(self, start: str) -> Path:
        """Returns the folder of the model from which runs with this start train."""
        return Path(self.pretrained or self.out / "starts" / start / "model")

    def command(self, arm: Arm, seed: int) -> list[str]:
        """Returns the command of a run."""
        own = {"model.path": self.model(arm.start), "seed": seed, "steps": self.steps}
        settings = self.settings | arm.settings | own
        return main_command(self.config, self.run(arm.name, seed), settings) + self.flags


def read_config(file: Path) -> Any:
    """Returns the ConfigDict of a file in configs/."""
    return runpy.run_path(str(file))["get_config"]()


def main_command(config: Path, workdir: Path, settings: dict[str, Any]) -> list[str]:
    """Returns the command of a run in `workdir` with these settings."""
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "igrpo_jax.main", "--config", str(config), "--workdir", str(workdir), *flags]


def call(command: list[str], log: Path, cores: list[int] | None = None) -> None:
    """Runs a command with its output in `log`, which is locked while it runs.

    Args:
        cores: the cores on which it may run; None for all.

    Raises:
        SystemExit: the command failed; the message has the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        _lock(file)
        pin = (lambda: os.sched_setaffinity(0, cores)) if cores and hasattr(os, "sched_setaffinity") else None
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
        code = subprocess.run(command, stdout=file, stderr=file, preexec_fn=pin, env=environment).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)}\nended with exit code {code}; the end of {log}:\n{tail}")


def _lock(log: TextIO) -> None:
    """Waits until no other process locks `log`. Children inherit the lock and keep it if this process is killed."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"waiting for the run of another study that writes {log.name} ...", flush=True)
        fcntl.flock(log, fcntl.LOCK_EX)


def arithmetic(args: argparse.Namespace) -> Study:
    """Writes the problems as files and makes the supervised starts that the chosen groups need; returns the study."""
    from igrpo_jax import config
    from igrpo_jax.data.arithmetic import problems
    from igrpo_jax.outputs.files import write_rows

    file = ROOT / "configs" / "study_arithmetic.py"
    tree = read_config(file)
    data = args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "held_out"), problems(config.freeze(tree).data.arithmetic, tree.seed), strict=True):
        lines = [
            {"id": f"{name}-{i}", "prompt": problem.question, "answer": str(problem.answer)}
            for i, problem in enumerate(rows)
        ]
        write_rows(data / f"{name}.jsonl", lines)
    settings = {
        "warm_start.steps": 0,
        "data.train": data / "train.jsonl",
        "evaluation.data_dir": data,
        "evaluation.benchmarks": "('held_out',)",
    }
    study = Study(args.out, file, "held_out", settings, args.steps or tree.steps, args.flags)
    needed = {arm.start for group in args.groups for arm in ARMS[group]}
    missing = sorted(name for name in needed if not study.model(name).exists())
    if missing:
        print(f"supervised starts: {', '.join(missing)} ({tree.warm_start.steps} steps each) ...", flush=True)
    in_parallel(args.jobs, lambda name, cores: make_start(study, name, cores), missing)
    return study


def pretrained(args: argparse.Namespace) -> Study:
    """Selects the problems that the given model solves sometimes; returns the study."""
    from igrpo_jax.outputs.files import write_rows

    file, data, samples = ROOT / "configs" / "study_smollm2.py", args.out / "data", 4
    tree = read_config(file)
    data.mkdir(parents=True, exist_ok=True)
    settings = {"data.train": data / "solved.jsonl", "evaluation.data_dir": data}
    settings["evaluation.benchmarks"] = "('solved',)"
    study = Study(args.out, file, "solved", settings, args.steps or tree.steps, args.flags, args.model)
    if not (data / "solved.jsonl").exists():
        problems = study_runs.read_rows(args.data / "gsm8k_train.jsonl")
        problems = sorted(problems, key=lambda row: len(row["solution"]))[: args.screen]
        write_rows(data / "screened.jsonl", problems)
        print(f"asking the model {len(problems)} problems, {samples} times each ...", flush=True)
        command = [sys.executable, "-m", "igrpo_jax.evaluate", "--config", str(file), "--model", args.model]
        command += ["--benchmarks", "screened", "--samples", str(samples), "--workdir", str(args.out / "screen")]
        call([*command, f"--config.evaluation.data_dir={data}", *args.flags], args.out / "screen.txt")
        right: collections.Counter[str] = collections.Counter()
        for row in study_runs.read_rows(args.out / "screen" / "screened.jsonl"):
            right[row["prompt_id"]] += int(row["accuracy"])
        kept = [row for row in problems if 0 < right[row["id"]] < samples]
        print(f"it solves {len(kept)} of them sometimes", flush=True)
        write_rows(data / "solved.jsonl", kept)
    return study


def make_start(study: Study, name: str, cores: list[int] | None) -> None:
    """Exports the model after its supervised start: the checkpoint of step 0 of a run of one step at rate 0."""
    folder = study.model(name).parent
    once = STARTS[name] | {"steps": 1, "optimizer.learning_rate": 0.0, "evaluation.every": 0}
    call(main_command(study.config, folder / "run", once) + study.flags, folder / "log.txt", cores)
    export = ["--workdir", str(folder / "run"), "--step", "0", "--out", str(study.model(name))]
    call([sys.executable, "-m", "igrpo_jax.export", *export], folder / "log.txt", cores)


def in_parallel(jobs: int, work: Callable[[Any, list[int] | None], None], items: Sequence[Any]) -> None:
    """Calls `work(item, cores)` for all items, `jobs` at a time, each with its own cores; the first error ends it."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    free_cores = queue.SimpleQueue()
    for job in range(jobs):
        free_cores.put(cores[job::jobs] if jobs > 1 else None)
    failed = threading.Event()

    def work_on(item: Any) -> None:
        own_cores = free_cores.get()
        try:
            if not failed.is_set():
                work(item, own_cores)
        except BaseException:
            failed.set()
            raise
        finally:
            free_cores.put(own_cores)

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work_on, item) for item in items]:
            future.result()


def seeds_of(args: argparse.Namespace, group: str) -> int:
    """Returns how many seeds the arms of a group have."""
    return args.seeds or (10 if group == "main" else 3)


def run_all(args: argparse.Namespace, study: Study) -> None:
    """Does every run that is not finished, seed by seed, so that a study that is cut short holds complete pairs."""
    wanted = [(seed, arm) for group in args.groups for seed in range(seeds_of(args, group)) for arm in ARMS[group]]
    missing = [
        (seed, arm)
        for seed, arm in wanted
        if not study_runs.finished(study.run(arm.name, seed), study.steps, study.benchmark)
    ]
    print(f"{len(wanted)} runs of {study.steps} steps, {len(wanted) - len(missing)} of them there", flush=True)
    began, lock, done = time.monotonic(), threading.Lock(), 0

    def run_one(item: tuple[int, Arm], cores: list[int] | None) -> None:
        nonlocal done
        (seed, arm), start = item, time.monotonic()
        call(study.command(arm, seed), study.out / "logs" / f"{arm.name}_{seed}.txt", cores)
        with lock:
            done += 1
            left = (len(missing) - done) * (time.monotonic() - began) / done
            row = study_runs.figures(study.run(arm.name, seed), study.benchmark)
            print(
                f"{done}/{len(missing)}  {arm.name} seed {seed}: pass@1 {row['before']:.3f} -> {row['after']:.3f} in "
                f"{time.monotonic() - start:.0f} s  left {int(left) // 60} min",
                flush=True,
            )
            report(args, study)

    in_parallel(args.jobs, run_one, missing)


def report(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Writes results.json, tables.md and the plots of all finished runs into OUT, and returns the results."""
    results: dict[str, Any] = {"setting": args.setting, "steps": study.steps, "groups": {}, "arms": {}}
    for group, arms in ARMS.items():
        for arm in arms:
            runs = {}
            for folder in sorted((study.out / "runs" / arm.name).glob("seed_*"), key=lambda x: int(x.name[5:])):
                if study_runs.finished(folder, study.steps, study.benchmark):
                    runs[folder.name[5:]] = study_runs.figures(folder, study.benchmark)
            if runs:
                results["groups"].setdefault(group, []).append(arm.name)
                facts = {"settings": arm.settings, "against": arm.against, "start": arm.start}
                results["arms"][arm.name] = facts | {"seeds": runs}
    study_report.write(study.out, results)
    return results


def main() -> None:
    args = parse()
    study = pretrained(args) if args.setting == "smollm2" else arithmetic(args)
    if not args.report_only:
        run_all(args, study)
    print(study_report.last_line(report(args, study)))


def parse() -> argparse.Namespace:
    """Returns the command's arguments; `flags` are those that are passed to every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--setting", choices=("arithmetic", "smollm2"), default="arithmetic")
    parser.add_argument("--groups", default="main", help="names of groups with commas between them, or all")
    parser.add_argument(
        "--seeds", type=int, default=0, help="seeds of every group; default 10 of main, 3 of the others"
    )
    parser.add_argument("--steps", type=int, default=0, help="default: the configuration's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--model", default="", help="smollm2: Hugging Face directory or hub id")
    parser.add_argument("--data", type=Path, help="smollm2: folder of gsm8k_train.jsonl (id, prompt, answer, solution)")
    parser.add_argument("--screen", type=int, default=400, help="smollm2: problems that the model is asked first")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    args, args.flags = parser.parse_known_args()
    wrong = [flag for flag in args.flags if not flag.startswith("--config.")]
    if wrong:
        parser.error(f"unrecognized: {' '.join(wrong)}")
    args.out = args.out.absolute()
    args.groups = list(ARMS) if args.groups == "all" else args.groups.split(",")
    unknown = [group for group in args.groups if group not in ARMS]
    if unknown:
        parser.error(f"--groups {','.join(unknown)}: there are {', '.join(ARMS)}")
    if args.setting == "smollm2" and not (args.model and args.data):
        parser.error("--setting smollm2 needs --model and --data")
    return args


if __name__ == "__main__":
    main()
