"""The parts `decode` and `decode7b`: the sampler on fixed and on lognormal lengths, beside the memory's bandwidth."""

from typing import TYPE_CHECKING

import models
import rollout

from benchmarks.accelerator import sizes

if TYPE_CHECKING:
    from benchmarks.accelerator.part import Task

FIGURES = (
    *("tokens_per_second", "decode_step_seconds", "roofline_fraction", "slot_utilization", "peak_memory_bytes"),
    *("rollout_seconds", "compiles", "recompiles", "slots", "devices"),
)


def run(task: "Task") -> None:
    """Measures each number of rows with each kind of lengths; the programs of one number of rows are shared."""
    shape = task.sizes.large_shape if task.part == "decode7b" else task.sizes.shape
    fitting = fitting_rows(task, shape)
    for rows in task.sizes.rows:
        cases = {f"{rows} rows, {lengths}": lengths for lengths in ("fixed", "lognormal")}
        if all(map(task.has, cases)):
            continue
        if not fitting:
            task.add(next(iter(cases)), {"skipped": f"{shape} does not fit {task.memory / 1e9:.0f} GB"})
            continue
        sizes.halved(
            min(rows, fitting), 8, lambda size, rows=rows, cases=cases: _measure(task, shape, rows, size, cases)
        )


def _measure(task: "Task", shape: str, asked: int, rows: int, cases: dict[str, str]) -> None:
    """Measures those of `cases` that are missing, with `rows` rows in the place of those that were asked for."""
    bench = rollout.Bench(sizes.decoded(task.sizes, shape, rows, "fixed"))
    for case, lengths in cases.items():
        if task.has(case):
            continue
        args = sizes.decoded(task.sizes, shape, rows, lengths)
        figures = rollout.measured(bench, args, rollout.length_sets(args), 1e9 * task.device["bandwidth_gb"])
        figures = {name: figures[name] for name in FIGURES}
        task.add(case, {"shape": shape, "dtype": args.dtype} | figures | sizes.smaller(asked, rows, "rows"))


def fitting_rows(task: "Task", shape: str) -> int:
    """Returns the most rows, of those asked for and their halves, whose cache fits beside the weights; 0 for none."""
    import jax

    from igrpo_jax.distributed.sharding import batch_shards
    from igrpo_jax.models.config import from_hf
    from igrpo_jax.models.costs import ModelCosts

    rows = max(task.sizes.rows)
    if task.memory is None:
        return rows
    model, mesh = from_hf(models.SHAPES[shape], shape), models.make_mesh()
    costs = ModelCosts(model, task.sizes.dtype, mesh)
    length, weights = task.sizes.prompt + task.sizes.completion, model.num_params * costs.item_bytes
    shards = batch_shards(mesh)
    while rows >= jax.device_count():
        # Decoding copies a part of the cache first, and has the logits of all rows in float32 a few times.
        beside = rows / shards * (1.5 * length * costs.token_bytes + 16 * model.vocab_size)
        if weights + beside <= sizes.USABLE * task.memory:
            return rows
        rows //= 2
    return 0
