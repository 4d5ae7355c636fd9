"""Is this machine fast with the package, and is it right? One command measures everything, the most important first.

    python -m benchmarks.accelerator --out DIR                  on a GPU or TPU, one device or a mesh of all
    python -m benchmarks.accelerator --out DIR --tiny           small enough for a test on a CPU
    python -m benchmarks.accelerator --out DIR --shape smollm2-135m --minutes 40     by hand on a CPU

It needs no network, no weights and no files but the repository's. Each part runs in a process of its own within a
limit of its own. DIR/results.jsonl gets each figure as it comes, DIR/results.md is the page of them, and
DIR/logs has what the parts printed. The same command goes on where it was stopped; a part that is done is not measured
again. The exit code is 0, 1 where a check of correctness or a part failed, and 2 where nothing could be measured.
benchmarks/accelerator.md explains the figures, and how to use the command on a machine without a network.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.accelerator import plan, table
from benchmarks.accelerator.plan import Part
from benchmarks.accelerator.results import Results
from igrpo_jax.cli import exits
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.storage.writing import write_text

ROOT = Path(__file__).parents[2]
TAIL = 6  # last lines of a failed part that are shown


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(plan.NAMES)}")
    parser.add_argument("--peers", action="store_true", help="also measure transformers and torch")
    parser.add_argument("--shape", default="", help="the model of decode, update, step, peers and profile")
    parser.add_argument("--tiny", action="store_true", help="a model of two narrow layers")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        raise InputError(f"--minutes {args.minutes:g}: must be above 0")
    if args.shape and (args.tiny or args.shape not in shapes()):
        wrong = "goes without --tiny" if args.tiny else f"no such shape; shapes are {', '.join(shapes())}"
        raise InputError(f"--shape {args.shape}: {wrong}")
    return args


def shapes() -> list[str]:
    import models

    return list(models.SHAPES)


def main(argv: list[str]) -> None:
    args = parse(argv[1:])
    results = Results(args.out)
    results.open({"tiny": args.tiny, "shape": args.shape or "default"})
    deadline = time.monotonic() + 60 * args.minutes
    done = [name for name, end in results.ends().items() if end["end"] == "done"]
    if done:
        print(f"already in {args.out}: {', '.join(done)}", flush=True)
    left_out, failed = [], []
    for part in plan.chosen(args.only, args.peers, done):
        scale = "tiny" if args.tiny else scale_of(results, args)
        seconds = plan.limit(part, scale, deadline - time.monotonic())
        if seconds is None:
            left_out.append(part.name)
            continue
        end = measure(part, scale, args.shape, seconds, results)
        write_text(args.out / "results.md", table.page(results))
        if end != "done":
            failed.append(part.name)
        if part.name == "device" and end != "done":
            log = args.out / "logs" / "device.txt"
            raise RunError(f"device: could not be measured, and the other parts need it; {log} has the error")
    if left_out:
        print(f"no time was left for {', '.join(left_out)}; the same command measures them")
    raise SystemExit(conclusion(results, failed))


def scale_of(results: Results, args: argparse.Namespace) -> str:
    """Returns the scale of the sizes for the device that was measured.

    Raises:
        InputError: the device is a CPU, and no shape was chosen for it.
    """
    device = results.device()
    if device is None or device["platform"] != "cpu":
        return "full"
    if args.shape:
        return "small"
    raise InputError(
        "JAX finds no accelerator here, and on a CPU the real shapes take hours; give another --out with --tiny or "
        "--shape smollm2-135m (where there is a GPU, benchmarks/accelerator.md says what JAX needs)"
    )


def measure(part: Part, scale: str, shape: str, seconds: float, results: Results) -> str:
    """Runs one part in a process of its own, writes how it ended, prints one line, and returns the end."""
    expected = part.seconds[scale]
    print(f"{part.name:<12} expected {expected:4.0f} s, at most {seconds:4.0f} s ...", end="", flush=True)
    before, began = len(results.cases(part.name)), time.monotonic()
    log = results.folder / "logs" / f"{part.name}.txt"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.accelerator.part", part.name, str(results.folder), scale, shape]
    flags = part.gpu_flags if (results.device() or {}).get("platform") == "gpu" else ""
    end, why = run_limited(command, log, seconds, flags)
    used = time.monotonic() - began
    row = {"part": part.name, "end": end, "seconds": round(used, 2), "expected": expected}
    results.add(row | ({"why": why} if why else {}))
    new = len(results.cases(part.name)) - before
    print(f" used {used:.1f} s: {end}, {new} new results" + (f"\n    {why}" if why else ""), flush=True)
    return end


def run_limited(command: list[str], log: Path, seconds: float, flags: str = "") -> tuple[str, str]:
    """Runs a command for at most `seconds`, and returns how it ended ("done", "failed" or "late") and why.

    Whatever it started ends with it. Its output goes to `log`, and `flags` are added to its XLA_FLAGS. It can see that
    this process has died by the end of its standard input.
    """
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(flags),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if late:
        return "late", f"stopped after {seconds:.0f} s; its results so far are kept"
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-TAIL:]
        return "failed", f"exit code {process.returncode}: " + " / ".join(line.strip()[:300] for line in lines)
    return "done", ""


def environment(flags: str = "") -> dict[str, str]:
    """Returns the environment of a part: this one's, with most of a GPU's memory for JAX unless it says otherwise.

    Args:
        flags: added to XLA_FLAGS.
    """
    defaults = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; JAX refuses both at once
        defaults["XLA_CLIENT_MEM_FRACTION"] = "0.92"
    added = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()} if flags else {}
    return defaults | os.environ | added


def conclusion(results: Results, failed: list[str]) -> int:
    """Prints what was found and where it is, and returns the exit code."""
    wrong = table.failed_checks(results)
    for check in wrong:
        print(f"FAILED check of correctness: {check}")
    if failed:
        print(f"not finished: {', '.join(failed)}; the same command tries them again")
    print(f"results: {results.folder / 'results.md'}, {results.path}")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    exits.run(main)
