r"""How fast and how robust the verifier is: `python benchmarks/verifier.py --data DIR`.

DIR holds the data sets as *.jsonl, one JSON object a line with a string `answer` (other files are skipped). For each
reference answer three completions are written: the answer itself, another right form of it (\dfrac for \frac, a
decimal, other spacing, dollar signs, another order of a list, …) and a wrong one (the answer of another row). They are
shuffled with a fixed seed and the first N graded:

- worker: `grader.grade` in this process, on one core, with cleared caches. Most answers are new to the process.
- pool: the same rows through `rewards.verifier.Verifier`, from the first submit to the last result, workers warm. As
  in a run, equal rows are graded once.
  Also the seconds from nothing to the first result, for a first pool and for a second, and the memory of its workers.
- math-verify: `math_verify.parse` and `verify` as in its README, for LaTeX and plain expressions, without its time
  limits, on the same texts and reference answers. It is slow and runs on a subsample of --baseline-rows.
- fallback_fraction: share of rows that exact arithmetic could not decide, so that sympy decided.
- agreement: share of rows whose verdict is the intended one. Two reference answers may be equal by chance, so a
  "wrong" row is left out where `equivalent` finds its two reference answers equal.

With --mixed N, N cases of other kinds go through the pool with a short deadline: ordinary ones, hostile ones (towers of
powers, nested brackets, sums without end, inputs on which sympy is slow), texts that cannot be parsed, and random
bytes. Three functions in place of the grader (one hangs, one exhausts memory, one dies) go through the bare pool.
Reported: whether each case got exactly one result, in order; the longest time to a hostile result (scheduling and the
kill included); processes left behind; resident memory in MiB of the parent and of the largest worker, after the first
batch of a thousand and after the last.

The last line is one JSON object with all figures.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

SEED = 17
BATCH = 1000  # mixed cases in flight at once
WARM_UP_SECONDS = 60  # at most, for the workers' imports


# ----------------------------------------------------------------------------------------------------------- rows


def read_golds(folder: Path) -> list[str]:
    """Returns all reference answers in `folder`, in the order of file names and lines."""
    golds = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in filter(str.strip, path.read_text(encoding="utf-8").split("\n")):
            row = json.loads(line)
            if isinstance(row.get("answer"), str) and row["answer"].strip():
                golds.append(row["answer"])
    if not golds:
        sys.exit(f"{folder}: holds no *.jsonl with a column `answer`")
    return golds


def rewritten(gold: str, rng: random.Random) -> str:
    """Returns another way to write the same answer, or the answer itself where no rule applies."""
    forms = []
    if "\\frac" in gold:
        forms.append(gold.replace("\\frac", "\\dfrac"))
    if re.fullmatch(r"-?\d+", gold):
        forms += [f"{gold}.0", f"\\frac{{{2 * int(gold)}}}{{2}}", f"{int(gold):,}"]
    if fraction := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold):
        sign, top, bottom = fraction[1], int(fraction[2]), int(fraction[3])
        forms += [f"{sign}{top}/{bottom}", f"{sign}\\frac{{{3 * top}}}{{{3 * bottom}}}"]
        if bottom in (2, 4, 5, 8, 10, 16, 20, 25, 40, 50, 100):
            forms.append(f"{sign}{top / bottom}")
    if root := re.fullmatch(r"(\d*)\\sqrt\{(\d+)\}", gold):
        forms.append(f"\\sqrt{{{int(root[1] or 1) ** 2 * int(root[2])}}}")
    is_list = "," in gold and "\\!" not in gold and not re.search(r"\d,\d{3}\b", gold)  # no thousands
    if is_list and re.fullmatch(r"[^(){}\[\]]*", gold):
        forms.append(", ".join(reversed(gold.split(","))))
    if gold.startswith("\\$"):
        forms.append(gold[2:])
    if "\\text" not in gold and "\\mbox" not in gold:
        dense = re.sub(r"(\\[A-Za-z]+ )(?=[A-Za-z])| ", r"\1", gold)  # a blank ends the name of a command
        forms += [dense, gold.replace(",", ", ") if is_list else gold]
    forms += [f"${gold}$", f" {gold} ", gold.replace("(", "\\left(").replace(")", "\\right)")]
    return rng.choice([form for form in forms if form != gold] or [gold])


def write_rows(golds: list[str], count: int) -> list[tuple[str, str, bool]]:
    """Returns `count` rows (completion, reference answer, whether it is right)."""
    from igrpo_jax.rewards.mathematics import grader

    rng = random.Random(SEED)
    shells = ["So the answer is $\\boxed{%s}$.", "<think>\nWe try.\n</think>\n<answer>%s</answer>", "\\[\\boxed{%s}\\]"]
    rows = []
    for gold in rng.sample(golds, min(len(golds), count)):
        wrong = rng.choice(golds)
        rows += [(gold, gold, True), (rewritten(gold, rng), gold, True)]
        if not grader.equivalent(wrong, gold):
            rows.append((wrong, gold, False))
    rng.shuffle(rows)
    return [(rng.choice(shells).replace("%s", answer), gold, right) for answer, gold, right in rows[:count]]


# -------------------------------------------------------------------------------------------------------- measures


def measure_worker(rows: list) -> dict:
    from igrpo_jax.rewards.mathematics import grader, symbolic

    asked = []
    equal = symbolic.equal
    symbolic.equal = lambda a, b: asked.append((a, b)) or equal(a, b)
    grader.warm_up()
    fallbacks = agreed = 0
    disagreed = []
    for text, gold, right in rows:
        asked.clear()
        verdict = grader.grade(text, gold)[0] == 1.0
        fallbacks += bool(asked)
        agreed += verdict == right
        if verdict != right:
            disagreed.append((text, gold, right))
    symbolic.equal = equal
    rates = []
    for _ in range(3):
        grader.clear_cache()
        start = time.perf_counter()
        for text, gold, _ in rows:
            grader.grade(text, gold)
        rates.append(len(rows) / (time.perf_counter() - start))
    for text, gold, right in disagreed[:5]:
        print(f"  disagrees: {text!r} against {gold!r}, written as {'right' if right else 'wrong'}")
    return {
        "worker_per_second": round(max(rates), 1),
        "fallback_fraction": round(fallbacks / len(rows), 5),
        "agreement": round(agreed / len(rows), 5),
    }


def start_verifier(workers: int, timeout: float):
    """Returns a Verifier with warm workers, and the seconds until its first result."""
    from igrpo_jax import config
    from igrpo_jax.records import Candidate
    from igrpo_jax.rewards.verifier import Verifier

    start = time.perf_counter()
    verifier = Verifier(config.RewardsConfig(accuracy=1.0, format=0.0, workers=workers, timeout=timeout))
    verifier.submit(Candidate("\\boxed{1}", "1")).result()
    seconds = time.perf_counter() - start
    end = time.monotonic() + WARM_UP_SECONDS
    while len(workers_of(os.getpid())) < workers and time.monotonic() < end:
        time.sleep(0.1)
    for future in [verifier.submit(Candidate("\\boxed{1}", "1")) for _ in range(200 * workers)]:
        future.result()
    return verifier, seconds


def measure_pool(rows: list, workers: int) -> dict:
    from igrpo_jax.records import Candidate

    rates = []
    verifier, first = start_verifier(workers, timeout=30.0)
    with verifier:
        for _ in range(3):
            start = time.perf_counter()
            futures = [verifier.submit(Candidate(text, gold)) for text, gold, _ in rows]
            scores = [future.result() for future in futures]
            rates.append(len(rows) / (time.perf_counter() - start))
    failed = sum(score.status not in ("ok", "unparseable") for score in scores)
    verifier, again = start_verifier(workers, timeout=30.0)  # its server runs already
    with verifier:
        memory = sum(map(proportional, workers_of(os.getpid())))
    figures = {"pool_per_second": round(max(rates), 1), "pool_failed": failed, "workers": workers}
    return figures | {"start_seconds": round(first, 2), "restart_seconds": round(again, 2), "pool_mib": round(memory)}


def measure_math_verify(rows: list) -> dict:
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    reading = [LatexExtractionConfig(), ExprExtractionConfig()]

    def once(text: str, gold: str) -> bool:
        answer = parse(f"${gold}$", extraction_config=reading, parsing_timeout=None)
        prediction = parse(text, extraction_config=reading, parsing_timeout=None)
        return verify(answer, prediction, timeout_seconds=None)

    once("\\boxed{x+1}", "1+x")
    agreed = 0
    start = time.perf_counter()
    for text, gold, right in rows:
        agreed += once(text, gold) == right
    rate = len(rows) / (time.perf_counter() - start)
    agreement = round(agreed / len(rows), 5)
    return {"math_verify_per_second": round(rate, 1), "math_verify_rows": len(rows), "math_verify_agreement": agreement}


# ----------------------------------------------------------------------------------------------------------- mixed

HOSTILE = [
    "2^{2^{2^{49}}}",
    "9**9**9**9",
    "10^{999999999}",
    "((9!)!)!",
    "1000000!",
    r"\binom{1000000}{500000}",
    r"\sum_{k=1}^{100000000} \frac{1}{k}",
    r"\prod_{k=1}^{9999} (x+k)^{k}",
    r"\int_0^1 \int_0^1 \frac{\sin(x^y)}{\ln(x+y)} dx dy",
    "|x|" * 50,
    "(x+y+z)^{9999}",
    r"\sin(" * 40 + "x" + ")" * 40,
    "(" * 300 + "1" + ")" * 300,
    r"\frac{1}{" * 90 + "2" + "}" * 90,
    "7" * 900,
    "x" * 50_000,
    r"\sqrt{" * 60 + "2" + "}" * 60,
    "__import__('time').sleep(60)",
    r"\boxed{" * 5_000,
]


def mixed_cases(golds: list[str], count: int) -> list[tuple[str, str]]:
    """Returns (completion, reference answer) pairs: of ten, 4 are ordinary, 1 hostile, 2 empty, 3 random bytes."""
    rng = random.Random(SEED + 1)
    cases = []
    for _ in range(count):
        kind, gold = rng.random(), rng.choice(golds)
        if kind < 0.4:
            cases.append((f"\\boxed{{{rng.choice([gold, rng.choice(golds)])}}}", gold))
        elif kind < 0.5:
            cases.append((f"\\boxed{{{rng.choice(HOSTILE)}}}", rng.choice([gold, r"\sin^2 x + \sum_{k=1}^{n} k"])))
        elif kind < 0.7:
            cases.append((rng.choice(["", "no idea", "\\boxed{", "$$", "{" * 1000, "<answer>", "####"]), gold))
        else:
            noise = rng.randbytes(rng.randint(1, 400)).decode("latin-1" if kind < 0.85 else "utf-8", "replace")
            cases.append((f"\\boxed{{{noise}}}" if rng.random() < 0.5 else noise, gold))
    return cases


def measure_mixed(golds: list[str], count: int, workers: int, timeout: float) -> dict:
    from igrpo_jax.records import Candidate, Score

    cases = mixed_cases(golds, count)
    parent = os.getpid()
    finished: list[int] = []
    scores: list[Score] = []
    memory = []  # MiB of the parent and of the largest worker, after each batch
    elapsed = 0.0
    verifier, _ = start_verifier(workers, timeout)
    with verifier:
        for first in range(0, count, BATCH):
            start = time.perf_counter()
            futures = [verifier.submit(Candidate(text, gold)) for text, gold in cases[first : first + BATCH]]
            for place, future in enumerate(futures, start=first):
                future.add_done_callback(lambda _, place=place: finished.append(place))
            scores += [future.result() for future in futures]
            elapsed += time.perf_counter() - start
            del futures, future
            gc.collect()
            memory.append((resident(parent), max((resident(pid) for pid in workers_of(parent)), default=0)))
    time.sleep(1.0)
    # An ordinary case has the verdict of this process, so the results are in order.
    from igrpo_jax.rewards.mathematics import grader

    plain = [at for at, (text, _) in enumerate(cases) if re.fullmatch(r"\\boxed\{-?\d+\}", text)]
    ordered = all(scores[at].reward == grader.grade(*cases[at])[0] for at in plain if scores[at].status == "ok")
    return {
        "mixed_cases": count,
        "mixed_timeout": timeout,
        "mixed_seconds": round(elapsed, 1),
        "mixed_results": len(scores),
        "mixed_once_each": sorted(finished) == list(range(count)),
        "mixed_in_order": ordered,
        "mixed_statuses": dict(Counter(score.status for score in scores)),
        "mixed_longest_seconds": round(max(score.seconds for score in scores), 3),
        "mixed_left_behind": len(workers_of(parent)),
        "parent_mib": [round(memory[0][0]), round(memory[-1][0])],
        "worker_mib": [round(memory[0][1]), round(memory[-1][1])],
    }


def hostile_function(kind: str) -> str:
    """Hangs, exhausts memory or dies, in a worker in place of the grader."""
    if kind == "hang":
        while True:
            pass
    if kind == "memory":
        hoard = []
        while True:
            hoard.append(bytearray(64 << 20))
    if kind == "exit":
        os._exit(3)
    return kind


def measure_deadlines(workers: int, timeout: float) -> dict:
    """Measures seconds from start to result of each hostile function; ordinary ones afterwards must succeed."""
    from igrpo_jax.config import RewardsConfig
    from igrpo_jax.rewards.pool import Pool

    seconds: dict[str, list[float]] = {"hang": [], "memory": [], "exit": []}
    with Pool(hostile_function, workers, timeout, memory_gib=RewardsConfig().memory_gib) as pool:
        for _ in range(3):
            for kind in seconds:
                pool.submit("warm").result()
                start = time.perf_counter()
                pool.submit(kind).result()
                seconds[kind].append(time.perf_counter() - start)
        served = [future.result().status for future in [pool.submit("fine") for _ in range(50)]]
    time.sleep(1.0)
    return {
        "deadline_seconds": {kind: round(max(times), 2) for kind, times in seconds.items()},
        "deadline_served_after": served.count("ok") == 50,
        "deadline_left_behind": len(workers_of(os.getpid())),
    }


def workers_of(parent: int) -> list[int]:
    """Returns live worker processes of `parent`: the children of its server, of which they are forks."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                is_server = b"forkserver" in (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if fields[0] != "Z" and is_server:
                parents[int(entry.name)] = int(fields[1])
    return [pid for pid, server in parents.items() if parents.get(server) == parent]


def resident(pid: int) -> float:
    """Returns resident memory in MiB, 0 for a process that has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def proportional(pid: int) -> float:
    """Returns resident memory in MiB, of which a page that several processes share counts in parts."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def versions() -> dict:
    names = ("math-verify", "latex2sympy2-extended", "sympy", "pebble")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of *.jsonl with a column `answer`")
    parser.add_argument("--rows", type=int, default=5000, help="gradings per measurement (%(default)s)")
    parser.add_argument("--baseline-rows", type=int, default=500, help="of them for math-verify; 0: none (%(default)s)")
    parser.add_argument("--mixed", type=int, default=0, help="mixed and hostile cases; 0: none (%(default)s)")
    parser.add_argument("--timeout", type=float, default=1.0, help="deadline of a mixed case in seconds (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    options = parser.parse_args()

    golds = read_golds(options.data)
    figures: dict = {"references": len(golds)}
    rows = write_rows(golds, options.rows)
    lengths = statistics.mean(len(text) for text, _, _ in rows)
    print(
        f"{len(golds)} reference answers, {len(rows)} rows, {sum(r for *_, r in rows)} of them right, "
        f"{lengths:.0f} characters"
    )
    figures |= {"rows": len(rows)} | measure_worker(rows)
    print(f"worker: {figures['worker_per_second']} a second, {figures['agreement']:.3%} as written, "
          f"{figures['fallback_fraction']:.2%} asked sympy")  # fmt: skip
    figures |= measure_pool(rows, options.workers)
    print(f"pool of {options.workers}: {figures['pool_per_second']} a second, {figures['pool_failed']} failed; its "
          f"first result after {figures['start_seconds']} s, of a second pool after {figures['restart_seconds']} s; "
          f"{figures['pool_mib']} MiB")  # fmt: skip
    if options.baseline_rows:
        figures |= measure_math_verify(rows[: options.baseline_rows])
        figures["ratio"] = round(figures["worker_per_second"] / figures["math_verify_per_second"], 1)
        print(f"math-verify: {figures['math_verify_per_second']} a second on {figures['math_verify_rows']} rows, "
              f"{figures['math_verify_agreement']:.3%} as written; ratio {figures['ratio']}")  # fmt: skip
    if options.mixed:
        figures |= measure_mixed(golds, options.mixed, options.workers, options.timeout)
        figures |= measure_deadlines(options.workers, options.timeout)
        for name in figures:
            if name.startswith(("mixed", "deadline", "parent", "worker_mib")):
                print(f"{name}: {figures[name]}")
    print(json.dumps(figures | {"versions": versions()}))


if __name__ == "__main__":
    main()
