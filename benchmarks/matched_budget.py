"""Compares GRPO with iGRPO at the same number of sampled completions, on many seeds from one shared start.

    python benchmarks/matched_budget.py --out studies/arithmetic                          # 10 paired seeds
    python benchmarks/matched_budget.py --out studies/arithmetic --groups all             # and 3 of the other groups
    python benchmarks/matched_budget.py --out studies/lookups --setting lookups --groups all
    python benchmarks/matched_budget.py --out studies/smollm2 --setting smollm2 --model SMOLLM2_DIR --data DATA_DIR
    python benchmarks/matched_budget.py --out studies/qwen05 --setting qwen05 --model QWEN05_DIR --data DATA_DIR \\
        --minutes 9

Every run is `python -m igrpo_jax.main` with a file of configs/ and the settings of its arm in study_arms.py; its folder
is OUT/runs/ARM/seed_K. All runs begin from the same exported model. The seed decides the order of the prompts and the
samples, so that runs with the same seed are pairs; data and start do not depend on it. --jobs runs at a time share the
machine, each on its own cores, so that their seconds can be compared. The groups of arms are

    main          GRPO (8 completions) and iGRPO (4 drafts + 4 refinements)
    copying       the same from a start that has seen good drafts and copies them, and possible remedies
    wrapper       DAPO, GSPO and Dr. GRPO, each with and without the draft stage
    controls      iGRPO with another draft than the best, without some drafts, trained on drafts, ...
    beta          iGRPO with a KL term of 1e-4, 1e-3, 1e-2
    completions   GRPO and iGRPO with 4, 16 and 32 completions in total

and --groups takes names of single arms too. With --setting lookups each group but the last five is a start, and has
GRPO (8), GRPO (4), iGRPO (4 + 4), and its variants that refine unsolved prompts alone, or train refinements as answers
to the plain prompt:

    dense, sparse, rare   right answers are expected 177, 3 and 0.9 times in a run that learns nothing
    x60, x23, x8          between dense and sparse: 60, 23 and 8 times
    ignoring              as dense, from a start that has learned to ignore drafts
    variants              from the sparse start: further variants, and the paper's other baselines
    repeats               from the sparse start: iGRPO with a penalty on repeats of wrong answers, against iGRPO
    credit                from the sparse start: other ways to credit refinements to the plain prompt
    critique              from a start that uses a critique of drafts: GRPO, iGRPO with it, and Critique-GRPO
    verifying             from a start that gives verdicts on drafts: GRPO, and Self-Verification

With --setting qwen05 they are GRPO (8), iGRPO (4 + 4), and the iGRPO that trains on its drafts, which is the best
variant in docs/study.md.

After a kill the same command continues: it skips finished runs and resumes an unfinished one. OUT/study.json holds its
--setting, --steps, --model, --data, --screen, --held-out and --config flags, and others are refused in that folder.

With --minutes it is over after so many minutes: runs that are still going get SIGTERM earlier, by the setting's
preemption_grace, save a checkpoint and end, and the exit code is 75. What must be kept to go on elsewhere is OUT
without the folders `checkpoints` and `samples`; then only runs that had not ended begin again.

After every run OUT/results.json (all numbers), OUT/tables.md and OUT/GROUP.png are written anew; `--report-only` writes
them from the runs that exist. Intervals are 95 %, by Student's t over the seeds, and differences are differences of
pairs. The last line is one JSON object: `arms` with pass@1 before and after, `area` (mean height of the curve), and the
difference to the arm with which each arm is compared.

The settings smollm2 and qwen05 start every run from --model. They take the --screen shortest problems of GSM8K, and use
those that the model solves sometimes, because a model that never succeeds learns nothing. Evaluations use --held-out of
them that are not trained on; with 0 they use the same problems with other samples. Flags --config.FIELD=VALUE are
passed to every run.
"""

import argparse
import math
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import study_report
import study_runs
from study_arms import Arm
from study_commands import OutOfTime, call, in_parallel
from study_settings import SETTINGS, Study, open_study, read_config

from igrpo_jax.distributed.preemption import EXIT_CODE

OF_A_MODEL = ("model", "data", "screen", "held-out")  # flags of the settings that train a given model


def seeds_of(args: argparse.Namespace, group: str) -> int:
    """Returns how many seeds the arms of a group have: 10 where it is the main one or a single arm."""
    setting = SETTINGS[args.setting]
    return args.seeds or (setting.seeds if group in setting.arms and group != "main" else 10)


def wanted_runs(args: argparse.Namespace) -> list[tuple[int, Arm]]:
    """Returns (seed, arm) of all runs, seed by seed, so that a study that is cut short holds complete pairs."""
    runs = {
        (seed, arm.name): arm
        for group, arms in args.groups.items()
        for seed in range(seeds_of(args, group))
        for arm in arms
    }
    return [(seed, arm) for (seed, _), arm in sorted(runs.items(), key=lambda run: run[0][0])]


def run_all(args: argparse.Namespace, study: Study) -> None:
    """Does every run that is not finished.

    Raises:
        OutOfTime: the time was over before the last run; all runs that were going on have ended.
    """
    wanted = wanted_runs(args)
    missing = [(seed, arm) for seed, arm in wanted if not study.finished(arm.name, seed)]
    for seed, arm in wanted:
        if (seed, arm) not in missing:
            keep(study, arm.name, seed)
    print(f"{len(wanted)} runs of {study.steps} steps, {len(wanted) - len(missing)} of them there", flush=True)
    began, lock, done = time.monotonic(), threading.Lock(), 0

    def run_one(item: tuple[int, Arm], cores: list[int] | None) -> None:
        nonlocal done
        (seed, arm), start = item, time.monotonic()
        call(study.command(arm, seed), study.out / "logs" / f"{arm.name}_{seed}.txt", cores, study.stop_at)
        with lock:
            done += 1
            left = (len(missing) - done) * (time.monotonic() - began) / done
            row = keep(study, arm.name, seed)
            print(
                f"{done}/{len(missing)}  {arm.name} seed {seed}: pass@1 {row['before']:.3f} -> {row['after']:.3f} in "
                f"{time.monotonic() - start:.0f} s  left {int(left) // 60} min",
                flush=True,
            )
            report(args, study)

    in_parallel(args.jobs, run_one, missing)


def keep(study: Study, arm: str, seed: int) -> dict[str, Any]:
    """Returns the numbers of a finished run, and writes them into its folder.

    The checkpoints of a run that began from a pretrained model are deleted, since a disk holds only a few of them.
    """
    folder = study.run(arm, seed)
    row = study_runs.figures(folder, study.steps, study.benchmark)
    study_runs.write_figures(folder, study.benchmark, row)
    if study.pretrained:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return row


def report(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Writes results.json, tables.md and the plots of all finished runs into OUT, and returns the results."""
    results: dict[str, Any] = {"setting": args.setting, "steps": study.steps, "groups": {}, "arms": {}}
    for group, arms in SETTINGS[args.setting].arms.items():
        for arm in arms:
            runs = {}
            for folder in sorted((study.out / "runs" / arm.name).glob("seed_*"), key=lambda x: int(x.name[5:])):
                seed = int(folder.name[5:])
                if study.finished(arm.name, seed):
                    runs[str(seed)] = study_runs.figures(folder, study.steps, study.benchmark)
            if runs:
                results["groups"].setdefault(group, []).append(arm.name)
                facts = {"settings": arm.settings, "against": arm.against, "start": arm.start}
                results["arms"][arm.name] = facts | {"seeds": runs}
    study_report.write(study.out, results)
    return results


def grace_of(args: argparse.Namespace) -> float:
    """Returns the seconds that a run of this setting may take to end after SIGTERM."""
    return read_config(SETTINGS[args.setting].config).checkpoint.preemption_grace


def main() -> int:
    args = parse()
    stop_at = time.monotonic() + 60 * args.minutes - grace_of(args) if args.minutes else math.inf
    code = 0
    try:
        study = open_study(args, stop_at)
    except OutOfTime:
        print("the time is over before the first run; the same command goes on", flush=True)
        return EXIT_CODE
    try:
        if not args.report_only:
            run_all(args, study)
    except OutOfTime:
        print("the time is over; the same command goes on", flush=True)
        code = EXIT_CODE
    print(study_report.last_line(report(args, study)))
    return code


def parse() -> argparse.Namespace:
    """Returns the command's arguments; `flags` are those that are passed to every run, `groups` arms by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="arithmetic")
    parser.add_argument("--groups", help="names of groups or arms with commas between them, or all")
    parser.add_argument(
        "--seeds", type=int, default=0, help="of every group; default 10 of main, of single arms and of lookups, else 3"
    )
    parser.add_argument("--steps", type=int, default=0, help="default: the configuration's")
    parser.add_argument("--jobs", type=int, help="runs at a time; default 2, qwen05 1")
    parser.add_argument("--minutes", type=float, default=0, help="when to stop; default: at the end of the study")
    parser.add_argument("--model", default="", help="Hugging Face directory or hub id, for smollm2 and qwen05")
    parser.add_argument("--data", type=Path, help="folder of gsm8k_train.jsonl (id, prompt, answer, solution)")
    parser.add_argument("--screen", type=int, help="problems that the model is asked first; default 400, qwen05 1024")
    parser.add_argument("--held-out", type=int, help="problems for evaluations only; default 0, qwen05 128")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    args, args.flags = parser.parse_known_args()
    wrong = [flag for flag in args.flags if not flag.startswith("--config.")]
    if wrong:
        parser.error(f"unrecognized: {' '.join(wrong)}")
    if args.minutes and 60 * args.minutes <= grace_of(args):
        parser.error(f"--minutes {args.minutes:g}: runs may take {grace_of(args):g} s to stop; give more")
    args.out = args.out.absolute()
    setting = SETTINGS[args.setting]
    if not setting.screen and (given := [name for name in OF_A_MODEL if getattr(args, name.replace("-", "_"))]):
        with_model = " or ".join(name for name, other in SETTINGS.items() if other.screen)
        parser.error(
            f"--{', --'.join(given)}: --setting {args.setting} has a built-in model; leave them out, or give --setting "
            f"{with_model}"
        )
    args.jobs = args.jobs or setting.jobs
    args.screen = setting.screen if args.screen is None else args.screen
    args.held_out = setting.held_out if args.held_out is None else args.held_out
    alone = {arm.name: [arm] for arms in setting.arms.values() for arm in arms}  # groups of a single arm
    names = list(setting.arms) if args.groups == "all" else (args.groups or setting.groups).split(",")
    unknown = [name for name in names if name not in setting.arms and name not in alone]
    if unknown:
        known = f"there are {', '.join(setting.arms)}, and the arms {', '.join(alone)}"
        parser.error(f"--groups {','.join(unknown)}: {known}")
    args.groups = {name: setting.arms.get(name) or alone[name] for name in names}
    if setting.screen and not (args.model and args.data):
        parser.error(f"--setting {args.setting} needs --model and --data")
    return args


if __name__ == "__main__":
    sys.exit(main())
