"""Kills a run again and again at random moments, and compares its result with that of the same run left alone.

    python benchmarks/soak.py --out OUT                  # SIGKILL 30 times, configs/tiny_cpu.py with 8 prompts a step
    python benchmarks/soak.py --out OUT --kills 30 --signals KILL,TERM --seed 1
    python benchmarks/soak.py --out OUT --processes 2 --kills 10
    python benchmarks/soak.py --out OUT --bucket gs --kills 10   # the killed run in a bucket, the clean one in a folder
    python benchmarks/soak.py --out OUT --bucket s3 --kills 10

The run is started, killed after a random time, and started again until it has been killed --kills times; then it runs
to its end. The times are drawn so that kills hit every part of a run: start, warm start, evaluation, rollout, update
and the writing of checkpoints. The benchmark fails (exit 1) if the run ends before it was killed --kills times, or if
its result differs from that of the clean run. Where a run has several processes, one of them is killed, drawn at
random, and the others must end by themselves within a minute. With --bucket the killed run writes to a storage service
on localhost, and every second start has an empty disk, as on another machine. The service of gs:// is
tests/bucket_server.py, which answers every hundredth request with 503 or not at all; that of s3:// is moto. The last
line is one JSON object:

    kills                 number of kills by signal
    phases                number of kills by the beginning of the last line that the console had printed
    clean_seconds         time of the clean run
    soaked_seconds        time of the killed run
    end_seconds           longest time from a signal to the end of all processes
    steps_run_again       steps whose results a resume dropped, over all kills
    different             names of what differs from the clean run: rows of metrics.jsonl (except clocks), files of
                          samples and evaluations, arrays of the last checkpoint. It should be empty
    sampler_difference    largest difference of the `sampling/` metrics and of entropies: the number of slots that are
                          decoded together depends on the verifier's timing, and the rounding of sums on that number
"""

import argparse
import collections
import contextlib
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from igrpo_jax.storage.addresses import is_remote, names, path_of
from igrpo_jax.storage.reading import local

ROOT = Path(__file__).parents[1]
SHORT = ("prompts_per_step=8", "warm_start.steps=40", "evaluation.every=20", "evaluation.limit=16")
SHORT += ("checkpoint.every=3", "log.every=1")
CLOCKS = ("perf/", "verifier/latency")


def parse() -> argparse.Namespace:
    """Returns the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--config", default="configs/tiny_cpu.py")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1, help="processes of the run, with one device each")
    parser.add_argument("--signals", default="KILL", help="KILL, TERM or both, taken in turn")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--bucket", choices=("gs", "s3"), help="the killed run writes to such a bucket on localhost")
    parser.add_argument("--steps", type=int, default=180)
    return parser.parse_args()


def started(args: argparse.Namespace, workdir: Path, log: Path) -> list[subprocess.Popen]:
    """Starts a run and returns its processes. The output of the first is appended to `log`."""
    run = [sys.executable, "-m", "igrpo_jax.main", "--config", args.config, "--workdir", str(workdir)]
    settings = (*SHORT, f"steps={args.steps}", f"compilation_cache={args.out / 'programs'}")
    run += [f"--config.{override}" for override in settings]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(args.processes):
        flags = ["--coordinator", f"localhost:{port}", "--processes", str(args.processes), "--process", str(index)]
        with (log if index == 0 else log.with_suffix(f".{index}.log")).open("a") as out:
            alone = args.processes == 1
            processes.append(subprocess.Popen(run + flags * (not alone), cwd=ROOT, stdout=out, stderr=out))
    return processes


def finished(args: argparse.Namespace, workdir: Path, log: Path) -> float:
    """Runs to the end, and returns the seconds that it took."""
    began = time.monotonic()
    codes = [process.wait() for process in started(args, workdir, log)]
    if any(codes):
        sys.exit(f"it ended with {codes} by itself; see {log}")
    return time.monotonic() - began


def last_step(workdir: Path) -> int:
    """Returns the last step that has samples, 0 where there is none."""
    return max((int(name[5:-6]) for name in names(workdir / "samples") if name.endswith(".jsonl")), default=0)


@contextlib.contextmanager
def bucket(scheme: str, folder: Path) -> Iterator[Path]:
    """Yields a folder in a bucket on localhost."""
    with _google(folder.absolute()) if scheme == "gs" else _amazon():
        yield path_of("--workdir", f"{scheme}://bucket/soaked")


@contextlib.contextmanager
def _google(folder: Path) -> Iterator[None]:
    """Serves gs://, and answers one request in a hundred badly."""
    command = [sys.executable, str(ROOT / "tests" / "bucket_server.py"), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as service:
        address = service.stdout.readline().strip()
        os.environ |= {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
        faults = json.dumps({"every": 100, "kinds": [{"status": 503}, {"drop": True}]}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{address}/faults", faults, method="PUT")).close()
        try:
            yield
        finally:
            service.kill()


@contextlib.contextmanager
def _amazon() -> Iterator[None]:
    """Serves s3://."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would print a line for each request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
    os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "none")
    fsspec.filesystem("s3").mkdir("s3://bucket")
    try:
        yield
    finally:
        server.stop()


def soak(args: argparse.Namespace, workdir: Path, start_seconds: float) -> dict:
    """Kills the run args.kills times, lets it end, and returns the counts."""
    rng = random.Random(args.seed)
    kills, phases = collections.Counter(), collections.Counter()
    again = 0  # steps that were run again
    slowest = 0.0  # seconds from a signal to the end of all processes
    names, log = args.signals.split(","), args.out / "soaked.log"
    while True:
        number = kills.total()
        if args.bucket:
            os.environ["XDG_CACHE_HOME"] = str(args.out.absolute() / "disks" / str(number // 2))
        before = last_step(workdir)
        processes = started(args, workdir, log)
        process = rng.choice(processes)
        if number < args.kills and waited(process, workdir, before, start_seconds, rng):
            name = names[number % len(names)]
            process.send_signal(signal.Signals[f"SIG{name}"])
            signalled = time.monotonic()
            codes = [each.wait() for each in processes]
            slowest = max(slowest, time.monotonic() - signalled)
            if 0 in codes or slowest > 60:
                sys.exit(f"killed with {name} it ended with {codes} after {slowest:.0f} s; see {log}")
            kills[name] += 1
            phases[re.split(r"\s*\d|:", log.read_text(errors="replace").strip().rpartition("\n")[2])[0]] += 1
            print(f"kill {number + 1} ({name}) after step {last_step(workdir)}", flush=True)
            again += max(before - resumed_from(log), 0)
            continue
        codes = [each.wait() for each in processes]
        if any(codes):
            sys.exit(f"it ended with {codes} by itself; see {log}")
        if number < args.kills:
            sys.exit(f"it ended after {number} kills; give it more steps, or take fewer kills")
        times = {"steps_run_again": again, "end_seconds": round(slowest, 1)}
        return {"kills": dict(kills), "phases": dict(phases), **times}


def waited(process: subprocess.Popen, workdir: Path, before: int, start_seconds: float, rng: random.Random) -> bool:
    """Waits for a random moment, and returns whether the run is still alive then.

    One moment in four is in the first seconds, while the run starts. The others are some steps after the step of the
    last kill, so that the kill loses the step in flight and the steps since the last checkpoint.
    """
    moment = rng.uniform(0, start_seconds)
    steps, more = (0, moment) if rng.random() < 0.25 else (rng.randint(1, 8), rng.uniform(0, 1.5))
    while steps and last_step(workdir) < before + steps:
        if process.poll() is not None:
            return False
        time.sleep(0.2 if is_remote(workdir) else 0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(more)
    return process.poll() is None


def resumed_from(log: Path) -> int:
    """Returns the step from which the last start resumed; 0 where it began anew."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("restoring step ")]
    return int(lines[-1].split()[2]) if lines else 0


def differences(soaked: Path, clean: Path) -> tuple[list[str], float]:
    """Returns the names of what differs, and the largest difference of the sampler's log-probs and entropies."""
    different = []
    gap = 0.0
    mine, theirs = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (soaked, clean))
    if len(mine) != len(theirs):
        different.append(f"metrics.jsonl has {len(mine)} rows, not {len(theirs)}")
    for a, b in zip(mine, theirs, strict=False):
        for name in sorted(a.keys() | b.keys()):
            of_sampler = name.startswith("sampling/") or name.endswith("entropy")
            if of_sampler and None not in (a.get(name), b.get(name)):
                gap = max(gap, abs(a[name] - b[name]))
            elif not name.startswith(CLOCKS) and a.get(name) != b.get(name):
                different.append(f"{name} of step {a['step']}")
    for folder in ("samples", "evaluations"):
        files = {path.relative_to(run) for run in (soaked, clean) for path in (run / folder).rglob("*.jsonl")}
        for name in sorted(files):
            a, b = soaked / name, clean / name
            if not (a.exists() and b.exists() and a.read_bytes() == b.read_bytes()):
                different.append(str(name))
    a, b = (checksums(run) for run in (soaked, clean))
    different += [f"checkpoint: {name}" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return different, gap


def checksums(run: Path) -> dict[str, int]:
    """Returns the checksums of the arrays of the last checkpoint when saved: parameters, both moments, counts."""
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return json.loads((newest / "meta" / "metadata").read_text())["checksums"]


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    clean, soaked = args.out / "clean", args.out / "soaked"
    clean_seconds = finished(args, clean, args.out / "clean.log")
    # A start of the finished run, had it been killed just before its end.
    (clean / "finished.json").unlink()
    start_seconds = finished(args, clean, args.out / "clean.log")
    began = time.monotonic()
    if args.bucket:
        with bucket(args.bucket, args.out / "service") as remote:
            result = soak(args, remote, start_seconds)
            shutil.copytree(local("--workdir", remote), soaked)
    else:
        result = soak(args, soaked, start_seconds)
    different, gap = differences(soaked, clean)
    result |= {"clean_seconds": round(clean_seconds, 1), "soaked_seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(result | {"different": different, "sampler_difference": gap}))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
