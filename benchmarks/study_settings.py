"""The settings of matched_budget.py: what each makes before its runs, and what all its runs have in common.

A run is `python -m igrpo_jax.main` with a file of configs/, the settings of its study, and those of its arm.
"""

import argparse
import collections
import dataclasses
import json
import math
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study_runs
from study_arms import ARMS, LOOKUPS, STARTS, Arm
from study_commands import ROOT, call, in_parallel, main_command

from igrpo_jax.outputs.files import write_atomically, write_rows


@dataclasses.dataclass(frozen=True)
class Study:
    """The folder of the runs, and the settings that they have in common."""

    out: Path
    config: Path
    benchmark: str
    settings: dict[str, Any]  # settings of all runs
    steps: int
    flags: list[str]  # further flags for every run
    pretrained: str = ""  # the model from which all runs start, instead of the warm starts
    stop_at: float = math.inf  # when runs are stopped, by time.monotonic()

    def run(self, arm: str, seed: int) -> Path:
        """Returns the folder of a run."""
        return self.out / "runs" / arm / f"seed_{seed}"

    def finished(self, arm: str, seed: int) -> bool:
        """Returns whether a run was evaluated after its last step."""
        return study_runs.finished(self.run(arm, seed), self.steps, self.benchmark)

    def model(self, start: str) -> Path:
        """Returns the folder of the model from which runs with this start train."""
        return Path(self.pretrained or self.out / "starts" / start / "model")

    def command(self, arm: Arm, seed: int) -> list[str]:
        """Returns the command of a run."""
        own = {"model.path": self.model(arm.start), "seed": seed, "steps": self.steps}
        settings = self.settings | arm.settings | own
        return main_command(self.config, self.run(arm.name, seed), settings) + self.flags


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task and a model; the defaults of the command's arguments are those of its setting."""

    config: Path
    groups: str = "main"
    arms: dict[str, list[Arm]] = dataclasses.field(default_factory=lambda: ARMS)  # by group
    seeds: int = 3  # of each group but main
    jobs: int = 2
    screen: int = 0  # problems that a pretrained model is asked first; 0 for the built-in model
    held_out: int = 0  # kept problems that are evaluated and not trained on; 0 evaluates those that are trained on
    samples: int = 4  # answers to each of the problems that are asked first


CONFIGS = ROOT / "configs"
SETTINGS = {
    "arithmetic": Setting(CONFIGS / "study_arithmetic.py"),
    "lookups": Setting(CONFIGS / "study_lookups.py", "dense,sparse,rare,ignoring", LOOKUPS, seeds=10),
    "smollm2": Setting(CONFIGS / "study_smollm2.py", screen=400),
    "qwen05": Setting(CONFIGS / "study_qwen05.py", "main,igrpo_train_drafts", jobs=1, screen=1024, held_out=128),
}


def read_config(file: Path) -> Any:
    """Returns the ConfigDict of a file in configs/."""
    return runpy.run_path(str(file))["get_config"]()


def open_study(args: argparse.Namespace, stop_at: float) -> Study:
    """Makes what the runs of a study need and is not there yet, nothing with --report-only; returns the study.

    Raises:
        OutOfTime: not everything could be made until `stop_at`.
        SystemExit: the folder is that of another study, a command failed, or the model solves too few problems
            sometimes.
    """
    check_same(args)
    setting = SETTINGS[args.setting]
    describe, make = (pretrained, select_problems) if setting.screen else (built_in, make_starts)
    study = describe(args, setting, stop_at)
    if not args.report_only:
        make(args, setting, study)
    return study


DECISIONS = "study.json"  # in the folder of a study: the arguments that all its runs have in common
SOLVED = "data/solved.jsonl"  # there too: the problems to train on that the model solves sometimes


def decisions(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments that decide what the runs of a study are, by name; `flags` are those of every run."""
    setting = SETTINGS[args.setting]
    decided: dict[str, Any] = {"setting": args.setting, "steps": steps_of(args)}
    if setting.screen:
        decided |= {"screen": args.screen, "held-out": args.held_out, "data": str(Path(args.data).absolute())}
        decided["model"] = str(Path(args.model).absolute()) if Path(args.model).is_dir() else args.model
    if not args.report_only:  # which makes no runs
        decided["flags"] = sorted(args.flags)
    return decided


def steps_of(args: argparse.Namespace) -> int:
    """Returns the number of steps of each run."""
    return args.steps or read_config(SETTINGS[args.setting].config).steps


def check_same(args: argparse.Namespace) -> None:
    """Checks that the runs or selected problems of the folder are of this study, and notes there what decides.

    With --report-only nothing is noted.

    Raises:
        SystemExit: they are of another one, and would be mixed up with those of this one.
    """
    file, decided, known = args.out / DECISIONS, decisions(args), {}
    begun = any((args.out / name).exists() for name in ("runs", SOLVED))  # before that a start may differ from the last
    if begun and file.exists():  # earlier versions wrote none
        known = json.loads(file.read_text(encoding="utf-8"))
    for name, value in decided.items():
        if known.get(name, value) != value:
            if name == "flags":
                has, given = (" ".join(flags) or "none" for flags in (known[name], value))
                raise SystemExit(
                    f"flags of the runs: {given}; the study in {args.out} has {has}; give these to resume it, or "
                    f"another --out for a new one; if they change no result, change them in {file}"
                )
            moved = f"; if it has only moved, change it in {file}" if name in ("model", "data") else ""
            raise SystemExit(
                f"--{name} {value}: the study in {args.out} has {known[name]}; give --{name} {known[name]} to resume "
                f"it, or another --out for a new one{moved}"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        write_atomically(file, json.dumps(known | decided) + "\n")


def built_in(args: argparse.Namespace, setting: Setting, stop_at: float) -> Study:
    """Returns the study of a built-in model."""
    data = args.out / "data"
    settings = {
        "warm_start.steps": 0,
        "data.train": data / "train.jsonl",
        "evaluation.data_dir": data,
        "evaluation.benchmarks": "('held_out',)",
    }
    return Study(args.out, setting.config, "held_out", settings, steps_of(args), args.flags, stop_at=stop_at)


def make_starts(args: argparse.Namespace, setting: Setting, study: Study) -> None:
    """Writes the problems as files and makes the warm starts of the wanted arms."""
    from igrpo_jax import config
    from igrpo_jax.data.builtin import TASKS

    tree = read_config(setting.config)
    data = args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    problems = TASKS[tree.data.task].problems(config.freeze(tree))
    for name, rows in zip(("train", "held_out"), problems, strict=True):
        lines = [
            {"id": f"{name}-{i}", "prompt": problem.question, "answer": str(problem.answer)}
            for i, problem in enumerate(rows)
        ]
        write_rows(data / f"{name}.jsonl", lines)
    needed = {arm.start for arms in args.groups.values() for arm in arms}
    missing = sorted(name for name in needed if not study.model(name).exists())
    if missing:
        print(f"warm starts: {', '.join(missing)} ({tree.warm_start.steps} steps each) ...", flush=True)
    in_parallel(args.jobs, lambda name, cores: make_start(study, name, cores), missing)


def make_start(study: Study, name: str, cores: list[int] | None) -> None:
    """Exports the model after its warm start: the checkpoint of step 0 of a run of one step at rate 0."""
    folder = study.model(name).parent
    once = STARTS[name] | {"steps": 1, "optimizer.learning_rate": 0.0, "evaluation.every": 0}
    call(main_command(study.config, folder / "run", once) + study.flags, folder / "log.txt", cores, study.stop_at)
    export = ["--workdir", str(folder / "run"), "--step", "0", "--out", str(study.model(name))]
    call([sys.executable, "-m", "igrpo_jax.export", *export], folder / "log.txt", cores)


def pretrained(args: argparse.Namespace, setting: Setting, stop_at: float) -> Study:
    """Returns the study of the given model."""
    benchmark = "held_out" if args.held_out else "solved"
    settings = {
        "data.train": args.out / SOLVED,
        "evaluation.data_dir": args.out / "data",
        "evaluation.benchmarks": f"('{benchmark}',)",
    }
    return Study(args.out, setting.config, benchmark, settings, steps_of(args), args.flags, args.model, stop_at)


def select_problems(args: argparse.Namespace, setting: Setting, study: Study) -> None:
    """Asks the model the problems with the shortest solutions, and writes those that it solves sometimes.

    They go to held_out.jsonl, evenly by length, and to solved.jsonl, which is written last. Where it is there, nothing
    is done.
    """
    if (args.out / SOLVED).exists():
        return
    data = args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    problems = study_runs.read_rows(args.data / "gsm8k_train.jsonl")
    for name in ("id", "solution"):  # what is used here; evaluate checks the others before it asks anything
        if lacking := sum(row.get(name) is None for row in problems):
            raise SystemExit(f"--data {args.data}: gsm8k_train.jsonl has {lacking} rows without {name}; give each one")
    problems = sorted(problems, key=lambda row: len(row["solution"]))[: args.screen]
    write_rows(data / "screened.jsonl", problems)
    print(f"asking the model {len(problems)} problems, {setting.samples} times each ...", flush=True)
    command = [sys.executable, "-m", "igrpo_jax.evaluate", "--config", str(study.config), "--model", args.model]
    command += ["--benchmarks", "screened", "--samples", str(setting.samples), "--workdir", str(args.out / "screen")]
    command += [f"--config.evaluation.data_dir={data}", *args.flags]
    call(command, args.out / "screen.txt", stop_at=study.stop_at)
    right: collections.Counter[str] = collections.Counter()
    for row in study_runs.read_rows(args.out / "screen" / "screened.jsonl"):
        right[row["prompt_id"]] += int(row["accuracy"])
    kept = [row for row in problems if 0 < right[str(row["id"])] < setting.samples]
    print(f"it solves {len(kept)} of them sometimes", flush=True)
    if len(kept) <= args.held_out:
        raise SystemExit(
            f"--screen {args.screen}: the model solves {len(kept)} of these problems sometimes, and --held-out "
            f"{args.held_out} leaves none to train on; raise --screen or lower --held-out"
        )
    train, held_out = split(kept, args.held_out)
    if held_out:
        write_rows(data / "held_out.jsonl", held_out)
    write_rows(args.out / SOLVED, train)


def split(rows: Sequence[dict], count: int) -> tuple[list[dict], list[dict]]:
    """Returns the rows without `count` of them that are taken evenly, and those."""
    taken = {i * len(rows) // count for i in range(count)}
    return [row for i, row in enumerate(rows) if i not in taken], [rows[i] for i in sorted(taken)]
