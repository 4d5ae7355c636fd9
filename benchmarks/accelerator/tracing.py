"""The part `profile`: a trace of one decode dispatch and one update, reduced to the operations that take the time.

The raw trace is deleted; with PROFILE_KEEP=1 in the environment it stays in DIR/profile, for TensorBoard.
"""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import rollout
import update

from benchmarks.accelerator import sizes
from benchmarks.accelerator.decoding import fitting_rows

if TYPE_CHECKING:
    from benchmarks.accelerator.part import Task

TOP = 10


class Operation(NamedTuple):
    """One run of an operation on a device. Times are in nanoseconds."""

    name: str
    start: float
    end: float


def run(task: "Task") -> None:
    """Traces a dispatch of the sampler and an update, each after one that compiles."""
    import jax

    if not task.has("decode dispatch"):
        rows = min(task.sizes.rows[0], fitting_rows(task, task.sizes.shape) or task.sizes.rows[-1])
        bench = rollout.Bench(sizes.decoded(task.sizes, task.sizes.shape, rows, "fixed"))
        filled = rollout.Filled(bench.engine, bench.params, bench.prompts[0], bench.engine.shard_slots)
        filled.dispatch()
        steps = []
        measured = traced(task, lambda: steps.append(filled.dispatch()))
        task.add("decode dispatch", {"rows": rows, "steps": steps[0]} | measured)
        del bench, filled
    if not task.has("update"):
        shape, reduced = sizes.trainable(task.sizes.shape, task.memory, jax.device_count())
        case, args = next(sizes.updates(task.sizes, shape))
        learning = update.Bench(args)
        learning.step()
        note = {"reduced": reduced} if reduced else {}
        task.add("update", {"shape": shape, "rows": case} | traced(task, learning.step) | note)


def traced(task: "Task", call: Callable[[], Any]) -> dict[str, Any]:
    """Returns the summary of a trace of `call`."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    kept = task.results.folder / "profile" if os.environ.get("PROFILE_KEEP") == "1" else None
    folder = kept or Path(tempfile.mkdtemp(prefix="profile_"))
    try:
        with jax.profiler.trace(str(folder), profiler_options=options):
            jax.block_until_ready(call())
        newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        return summary(jax.profiler.ProfileData.from_file(str(newest)))
    finally:
        if kept is None:
            shutil.rmtree(folder, ignore_errors=True)


def summary(profile: Any) -> dict[str, Any]:
    """Returns what the operations of the first device took, from a jax.profiler.ProfileData.

    span_ms      from the first operation's start to the last one's end
    busy_ms      the part of it in which at least one operation ran; `gaps_ms` and `gap_fraction` are the rest
    longest_gaps_ms   the ten longest times in which nothing ran
    operations   runs of operations
    top          the ten names with the most time of their own: milliseconds, runs, and the fraction of all
    """
    lines = device_lines(profile)
    operations = [operation for line in lines for operation in line]
    if not operations:
        return {"skipped": "the trace holds no operations of a device"}
    own: Counter[str] = Counter()
    for line in lines:
        own.update(own_time(line))
    runs = Counter(operation.name for operation in operations)
    busy, gaps = busy_and_gaps(operations)
    span, total = busy + sum(gaps), sum(own.values())
    return {
        "span_ms": round(span / 1e6, 4),
        "busy_ms": round(busy / 1e6, 4),
        "gaps_ms": round(sum(gaps) / 1e6, 4),
        "gap_fraction": round(sum(gaps) / span, 4) if span else 0.0,
        "longest_gaps_ms": [round(gap / 1e6, 4) for gap in sorted(gaps, reverse=True)[:TOP]],
        "operations": len(operations),
        "top": [
            {"name": name, "ms": round(time / 1e6, 4), "runs": runs[name], "fraction": round(time / total, 4)}
            for name, time in own.most_common(TOP)
        ],
    }


def device_lines(profile: Any) -> list[list[Operation]]:
    """Returns the operations of the first device, by line of the trace (a stream, a core, a thread)."""
    planes = sorted((plane for plane in profile.planes if plane.name.startswith("/device:")), key=lambda p: p.name)
    planes = [plane for plane in planes if "TPU" in plane.name or "GPU" in plane.name]
    if planes:
        named = list(planes[0].lines)
        # A TPU's plane also has lines of steps and modules, which cover those of operations.
        chosen = [line for line in named if line.name == "XLA Ops"] or [
            line for line in named if line.name.startswith("Stream")
        ]
        return [[_operation(event, dict(event.stats)) for event in line.events] for line in chosen]
    lines = []
    for plane in profile.planes:
        if plane.name == "/host:CPU":
            events = [[(event, dict(event.stats)) for event in line.events] for line in plane.lines]
            lines += [[_operation(event, stats) for event, stats in line if "hlo_op" in stats] for line in events]
    return lines


def _operation(event: Any, stats: dict[str, Any]) -> Operation:
    name = str(stats.get("hlo_op", event.name)).split(" = ")[0]
    if name.startswith("command_buffer"):  # a CUDA graph of many kernels, each with a name of its own
        name = event.name
    return Operation(name[:80], event.start_ns, event.start_ns + event.duration_ns)


def own_time(line: Iterable[Operation]) -> Counter[str]:
    """Returns the nanoseconds of each name without those of the operations inside it, such as a loop's body."""
    own: Counter[str] = Counter()
    around: list[Operation] = []
    for operation in sorted(line, key=lambda operation: (operation.start, -operation.end)):
        while around and around[-1].end <= operation.start:
            around.pop()
        duration = operation.end - operation.start
        own[operation.name] += duration
        if around:
            own[around[-1].name] -= min(duration, around[-1].end - operation.start)
        around.append(operation)
    return own


def busy_and_gaps(operations: Iterable[Operation]) -> tuple[float, list[float]]:
    """Returns the nanoseconds in which at least one operation ran, and each time between two of them."""
    busy, gaps = 0.0, []
    reached = None
    for operation in sorted(operations, key=lambda operation: operation.start):
        if reached is not None and operation.start > reached:
            gaps.append(operation.start - reached)
        begins = operation.start if reached is None else max(operation.start, reached)
        busy += max(0.0, operation.end - begins)
        reached = operation.end if reached is None else max(reached, operation.end)
    return busy, gaps
