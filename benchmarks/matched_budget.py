"""GRPO against iGRPO with the same number of sampled completions, on many seeds from one shared start.

    python benchmarks/matched_budget.py --out studies/arithmetic                          # 10 paired seeds
    python benchmarks/matched_budget.py --out studies/arithmetic --groups all             # and 3 seeds of all the rest
    python benchmarks/matched_budget.py --out studies/smollm2 --setting smollm2 --model SMOLLM2_DIR --data DATA_DIR

Every run is `python -m igrpo_jax.main` with a file of configs/ and the settings that ARMS below gives its arm, in
OUT/runs/ARM/seed_K. All begin from the same exported model; a seed decides the order of the prompts and what is
sampled, so that runs of one seed are pairs. Data and start do not depend on the seed. Killed, the same command goes on:
finished runs are skipped, and an unfinished one resumes. --jobs runs at a time share the cores, each with cores of its
own, so that their seconds compare.

    main          GRPO (8 completions) and iGRPO (4 drafts + 4 refinements)
    copying       the same from a start that has seen good drafts and copies them, and what might help against it
    wrapper       DAPO, GSPO and Dr. GRPO, each with and without the draft stage
    controls      iGRPO with another draft than the best, without some drafts, trained on drafts, ...
    beta          iGRPO with a KL term of 1e-4, 1e-3, 1e-2
    completions   4, 16 and 32 completions in all, of both

After every run OUT/results.json (all numbers), OUT/tables.md and OUT/GROUP.png are written anew; `--report-only` writes
them from the runs that are there. Intervals are 95 %, Student's t over the seeds; differences are of pairs. The last
line is one JSON object: `arms` with pass@1 before and after, `area` (mean height of the curve), and the difference to
the arm that each is compared with.

The setting smollm2 starts every run from --model, and trains it on those of the --screen shortest problems of GSM8K
that it solves sometimes, on which it is evaluated too (other samples): a model that never succeeds learns nothing.
Flags --config.FIELD=VALUE are given to every run.
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

ROOT = Path(__file__).resolve().parent.parent


def budget(total: int, drafts: bool) -> dict[str, Any]:
    """All of `total` completions trained, or half of them drafts."""
    half = total // 2 if drafts else 0
    return {"algorithm.num_drafts": half, "algorithm.num_generations": total - half}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method: its settings, the start it trains from, and the arm it is compared with."""

    name: str
    settings: dict[str, Any]
    against: str = ""
    start: str = "start"


GRPO, IGRPO = budget(8, False), budget(8, True)
CONTROLS = {
    "random": {"algorithm.draft_selection": "random"},
    "worst": {"algorithm.draft_selection": "worst"},
    "first": {"algorithm.draft_selection": "first"},
    "dropout": {"algorithm.draft_dropout": 0.5},
    "train_drafts": {"algorithm.train_drafts": True},
    "early_stop": {"algorithm.draft_early_stop": True},
    "tail": {"refine.max_draft_length": 8},
}
AGAINST_COPYING = ("random", "worst", "dropout", "train_drafts", "tail")

ARMS: dict[str, list[Arm]] = {
    "main": [Arm("grpo", GRPO), Arm("igrpo", IGRPO, "grpo")],
    "copying": [
        Arm("trusting_grpo", GRPO, start="trusting"),
        Arm("trusting_igrpo", IGRPO, "trusting_grpo", "trusting"),
        *(Arm(f"trusting_{name}", IGRPO | CONTROLS[name], "trusting_igrpo", "trusting") for name in AGAINST_COPYING),
        Arm("trusting_hot", IGRPO | {"rollout.temperature": 1.3}, "trusting_igrpo", "trusting"),
    ],
    "wrapper": [
        arm
        for loss in ("dapo", "gspo", "dr_grpo")
        for arm in (
            Arm(loss, GRPO | {"algorithm.loss_type": loss}),
            Arm(f"igrpo_{loss}", IGRPO | {"algorithm.loss_type": loss}, loss),
        )
    ],
    "controls": [Arm(f"igrpo_{name}", IGRPO | settings, "igrpo") for name, settings in CONTROLS.items()],
    "beta": [Arm(f"igrpo_beta_{beta:g}", IGRPO | {"algorithm.beta": beta}, "igrpo") for beta in (1e-4, 1e-3, 1e-2)],
    "completions": [
        arm
        for total in (4, 16, 32)
        for arm in (
            Arm(f"grpo_{total}", budget(total, False)),
            Arm(f"igrpo_{total}", budget(total, True), f"grpo_{total}"),
        )
    ],
}
# Supervised starts of the arithmetic model: drafts of random steps, which nothing can be learned from, or drafts that
# are as good as the teacher's own solutions.
STARTS = {"start": {}, "trusting": {"warm_start.draft_error_rate": 0.25}}


@dataclasses.dataclass(frozen=True)
class Study:
    """Where the runs are, and what they have in common."""

    out: Path
    config: Path
    benchmark: str
    settings: dict[str, Any]  # of all runs
    steps: int
    flags: list[str]  # for every run
    pretrained: str = ""  # the model that all runs start from, in the place of the supervised starts

    def run(self, arm: str, seed: int) -> Path:
        return self.out / "runs" / arm / f"seed_{seed}"

    def model(self, start: str) -> Path:
        return Path(self.pretrained or self.out / "starts" / start / "model")

    def command(self, arm: Arm, seed: int) -> list[str]:
        own = {"model.path": self.model(arm.start), "seed": seed, "steps": self.steps}
        settings = self.settings | arm.settings | own
        return main_command(self.config, self.run(arm.name, seed), settings) + self.flags


def read_config(file: Path) -> Any:
    """The ConfigDict of a file in configs/."""
    return runpy.run_path(str(file))["get_config"]()


def main_command(config: Path, workdir: Path, settings: dict[str, Any]) -> list[str]:
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "igrpo_jax.main", "--config", str(config), "--workdir", str(workdir), *flags]


def call(command: list[str], log: Path, cores: list[int] | None = None) -> None:
    """Runs a command with its output in `log`, which is locked as long as it runs.

    Raises:
        SystemExit: it failed; the message has the end of its output.
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
    """Waits until no other process has `log`. Children inherit the lock and keep it, should this process be killed."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"waiting for the run of another study that writes {log.name} ...", flush=True)
        fcntl.flock(log, fcntl.LOCK_EX)


def arithmetic(args: argparse.Namespace) -> Study:
    """The problems as files, and the supervised starts that the chosen groups need."""
    from igrpo_jax import config
    from igrpo_jax.data.arithmetic import problems
    from igrpo_jax.outputs.files import write_rows

    file = ROOT / "configs" / "study_arithmetic.py"
    tree = read_config(file)
    data = args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "held_out"), problems(config.freeze(tree).data.arithmetic, tree.seed), strict=True):
        lines = [{"id": f"{name}-{i}", "prompt": one.question, "answer": str(one.answer)} for i, one in enumerate(rows)]
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
    """The model that is given, and the problems that it solves sometimes."""
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
    """Exports what the supervised start has learned: the checkpoint of step 0 of a run of one step at rate 0."""
    folder = study.model(name).parent
    once = STARTS[name] | {"steps": 1, "optimizer.learning_rate": 0.0, "evaluation.every": 0}
    call(main_command(study.config, folder / "run", once) + study.flags, folder / "log.txt", cores)
    export = ["--workdir", str(folder / "run"), "--step", "0", "--out", str(study.model(name))]
    call([sys.executable, "-m", "igrpo_jax.export", *export], folder / "log.txt", cores)


def in_parallel(jobs: int, work: Callable[[Any, list[int] | None], None], items: Sequence[Any]) -> None:
    """`work(item, cores)` of all items, `jobs` at a time, each with cores of its own; the first error ends it."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    places = queue.SimpleQueue()
    for job in range(jobs):
        places.put(cores[job::jobs] if jobs > 1 else None)
    failed = threading.Event()

    def one(item: Any) -> None:
        place = places.get()
        try:
            if not failed.is_set():
                work(item, place)
        except BaseException:
            failed.set()
            raise
        finally:
            places.put(place)

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(one, item) for item in items]:
            future.result()


def seeds_of(args: argparse.Namespace, group: str) -> int:
    return args.seeds or (10 if group == "main" else 3)


def run_all(args: argparse.Namespace, study: Study) -> None:
    """Every run that is not finished, seed by seed, so that a study that is cut short holds whole pairs."""
    wanted = [(seed, arm) for group in args.groups for seed in range(seeds_of(args, group)) for arm in ARMS[group]]
    missing = [
        (seed, arm)
        for seed, arm in wanted
        if not study_runs.finished(study.run(arm.name, seed), study.steps, study.benchmark)
    ]
    print(f"{len(wanted)} runs of {study.steps} steps, {len(wanted) - len(missing)} of them there", flush=True)
    began, lock, done = time.monotonic(), threading.Lock(), 0

    def one(item: tuple[int, Arm], cores: list[int] | None) -> None:
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

    in_parallel(args.jobs, one, missing)


def report(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Writes results.json, tables.md and plots of all finished runs in OUT; returns the results."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--setting", choices=("arithmetic", "smollm2"), default="arithmetic")
    parser.add_argument("--groups", default="main", help="of those above, with commas between them; or all")
    parser.add_argument("--seeds", type=int, default=0, help="of every group; default 10 of main, 3 of the others")
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
    study = pretrained(args) if args.setting == "smollm2" else arithmetic(args)
    if not args.report_only:
        run_all(args, study)
    print(study_report.last_line(report(args, study)))


if __name__ == "__main__":
    main()
