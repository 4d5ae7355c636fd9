"""One run killed again and again at random moments, and what it came to, beside the same run left alone.

    python benchmarks/soak.py --out OUT                  # 30 times SIGKILL, configs/tiny_cpu.py with 8 prompts a step
    python benchmarks/soak.py --out OUT --kills 30 --signals KILL,TERM --seed 1
    python benchmarks/soak.py --out OUT --processes 2 --kills 10

The run is started, killed after a random time, and started again until it has been killed --kills times; then it is
left to end. The times are drawn so that every part of a run is hit: start, warm start, evaluation, rollout, update and
the writing of checkpoints. A run that ends before its number of kills is up is a failure of the benchmark (exit 1), and
so is any difference from the clean run. Of several processes one is killed, drawn at random, and the others must end by
themselves within a minute. The last line is one JSON object:

    kills                 by signal, and `phases`: how the last line began that the console had printed
    clean_seconds, soaked_seconds
    end_seconds           longest time from a signal to the end of all processes
    steps_run_again       steps whose results were dropped by a resume, over all kills
    different             names of what differs from the clean run: rows of metrics.jsonl (clocks apart), files of
                          samples, evaluations, arrays of the last checkpoint. Empty is what is hoped for
    logprob_difference    largest difference of the `sampling/` metrics: how many slots are decoded side by side depends
                          on the verifier's timing, and with it how sums round
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = ("steps=180", "prompts_per_step=8", "warm_start.steps=40", "evaluation.every=20", "evaluation.limit=16")
SHORT += ("checkpoint.every=3", "log.every=1")
CLOCKS = ("perf/", "verifier/latency")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--config", default="configs/tiny_cpu.py")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1, help="of the run, with one device each")
    parser.add_argument("--signals", default="KILL", help="KILL, TERM or both, taken in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args()


def started(args: argparse.Namespace, workdir: Path, log: Path) -> list[subprocess.Popen]:
    """The processes of a run; what the first one says is added to `log`."""
    run = [sys.executable, "-m", "igrpo_jax.main", "--config", args.config, "--workdir", str(workdir)]
    run += [f"--config.{override}" for override in (*SHORT, f"compilation_cache={args.out / 'programs'}")]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for own in range(args.processes):
        flags = ["--coordinator", f"localhost:{port}", "--processes", str(args.processes), "--process", str(own)]
        with (log if own == 0 else log.with_suffix(f".{own}.log")).open("a") as out:
            alone = args.processes == 1
            processes.append(subprocess.Popen(run + flags * (not alone), cwd=ROOT, stdout=out, stderr=out))
    return processes


def finished(args: argparse.Namespace, workdir: Path, log: Path) -> float:
    """Runs to the end, in so many seconds."""
    began = time.monotonic()
    codes = [process.wait() for process in started(args, workdir, log)]
    if any(codes):
        sys.exit(f"it ended with {codes} by itself; see {log}")
    return time.monotonic() - began


def last_step(workdir: Path) -> int:
    samples = workdir / "samples"
    steps = [int(path.stem[5:]) for path in samples.glob("step_*.jsonl")] if samples.exists() else []
    return max(steps, default=0)


def soak(args: argparse.Namespace, workdir: Path, start_seconds: float) -> dict:
    """Kills the run args.kills times and lets it end."""
    rng, kills, phases, again = random.Random(args.seed), collections.Counter(), collections.Counter(), 0
    slowest = 0.0
    names, log = args.signals.split(","), args.out / "soaked.log"
    while True:
        number = kills.total()
        before = last_step(workdir)
        processes = started(args, workdir, log)
        process = rng.choice(processes)
        if number < args.kills and waited(process, workdir, before, start_seconds, rng):
            name = names[number % len(names)]
            process.send_signal(signal.Signals[f"SIG{name}"])
            signalled = time.monotonic()
            codes = [one.wait() for one in processes]
            slowest = max(slowest, time.monotonic() - signalled)
            if 0 in codes or slowest > 60:
                sys.exit(f"killed with {name} it ended with {codes} after {slowest:.0f} s; see {log}")
            kills[name] += 1
            phases[re.split(r"\s*\d|:", log.read_text(errors="replace").strip().rpartition("\n")[2])[0]] += 1
            print(f"kill {number + 1} ({name}) after step {last_step(workdir)}", flush=True)
            again += max(before - resumed_from(log), 0)
            continue
        codes = [one.wait() for one in processes]
        if any(codes):
            sys.exit(f"it ended with {codes} by itself; see {log}")
        if number < args.kills:
            sys.exit(f"it ended after {number} kills; give it more steps, or take fewer kills")
        times = {"steps_run_again": again, "end_seconds": round(slowest, 1)}
        return {"kills": dict(kills), "phases": dict(phases), **times}


def waited(process: subprocess.Popen, workdir: Path, before: int, start_seconds: float, rng: random.Random) -> bool:
    """Waits for a random moment; False where the run has ended first.

    One in four is in the first seconds, while it starts. The others are some steps after those that were there, where
    the step in flight and those since the last checkpoint are to be lost.
    """
    moment = rng.uniform(0, start_seconds)
    steps, more = (0, moment) if rng.random() < 0.25 else (rng.randint(1, 8), rng.uniform(0, 1.5))
    while steps and last_step(workdir) < before + steps:
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(more)
    return process.poll() is None


def resumed_from(log: Path) -> int:
    """The step that the last start went back to; 0 where it began anew."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("restoring step ")]
    return int(lines[-1].split()[2]) if lines else 0


def differences(soaked: Path, clean: Path) -> tuple[list[str], float]:
    """Names of what differs, and the largest difference of the sampler's log-probs."""
    found, gap = [], 0.0
    mine, theirs = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (soaked, clean))
    if len(mine) != len(theirs):
        found.append(f"metrics.jsonl has {len(mine)} rows, not {len(theirs)}")
    for a, b in zip(mine, theirs, strict=False):
        for name in sorted(a.keys() | b.keys()):
            if name.startswith("sampling/"):
                gap = max(gap, abs(a[name] - b[name]))
            elif not name.startswith(CLOCKS) and a.get(name) != b.get(name):
                found.append(f"{name} of step {a['step']}")
    for folder in ("samples", "evaluations"):
        files = {path.relative_to(run) for run in (soaked, clean) for path in (run / folder).rglob("*.jsonl")}
        for name in sorted(files):
            a, b = soaked / name, clean / name
            if not (a.exists() and b.exists() and a.read_bytes() == b.read_bytes()):
                found.append(str(name))
    a, b = (checksums(run) for run in (soaked, clean))
    found += [f"checkpoint: {name}" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return found, gap


def checksums(run: Path) -> dict[str, int]:
    """Of all arrays of the last checkpoint, as they were saved: parameters, both moments, counts."""
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return json.loads((newest / "meta" / "metadata").read_text())["checksums"]


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    clean, soaked = args.out / "clean", args.out / "soaked"
    clean_seconds = finished(args, clean, args.out / "clean.log")
    # How long a start takes with compiled programs on disk: what a resume of the finished run takes.
    start_seconds = finished(args, clean, args.out / "clean.log")
    began = time.monotonic()
    result = soak(args, soaked, start_seconds)
    different, gap = differences(soaked, clean)
    result |= {"clean_seconds": round(clean_seconds, 1), "soaked_seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(result | {"different": different, "logprob_difference": gap}))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
