"""The parts `decode` and `decode7b`: the sampler on fixed and on lognormal lengths, beside the memory's bandwidth."""

import functools
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
    """Measures each kind of lengths with each number of rows; fixed lengths, which need few programs, come first."""
    shape = task.sizes.large_shape if task.part == "decode7b" else task.sizes.shape
    fitting = fitting_rows(task, shape)
    for lengths in ("fixed", "lognormal"):
        for rows in task.sizes.rows:
            case = f"{rows} rows, {lengths}"
            if task.has(case):
                continue
            if not fitting:
                task.add(case, {"skipped": f"{shape} does not fit {task.memory / 1e9:.0f} GB"})
                continue
            measure = functools.partial(_measured, task, shape, lengths)
            figures = sizes.halved(min(rows, fitting), 8, measure)
            task.add(case, figures | sizes.smaller(rows, figures["slots"], "rows"))


def _measured(task: "Task", shape: str, lengths: str, rows: int) -> dict:
    args = sizes.decoded(task.sizes, shape, rows, lengths)
    bench = rollout.Bench(args)
    figures = rollout.measured(bench, args, rollout.length_sets(args), 1e9 * task.device["bandwidth_gb"])
    return {"shape": shape, "dtype": args.dtype} | {name: figures[name] for name in FIGURES}


def fitting_rows(task: "Task", shape: str) -> int:
    """Returns the most rows, of those asked for and their halves, whose cache fits beside the weights; 0 for none."""
    import jax

    from igrpo_jax.distributed.sharding import batch_shards
    from igrpo_jax.models.config import from_hf
    from igrpo_jax.models.costs import ModelCosts

    rows = max(task.sizes.rows)
    if task.memory is None:
        return rows
    cfg, mesh = from_hf(models.SHAPES[shape], shape), models.make_mesh()
    costs = ModelCosts(cfg, task.sizes.dtype, mesh.shape["tensor"])
    length, weights = task.sizes.prompt + task.sizes.completion, cfg.num_params * costs.item_bytes
    shards = batch_shards(mesh)
    while rows >= jax.device_count():
        # Decoding copies a part of the cache first, and has the logits of all rows in float32 a few times.
        beside = rows / shards * (1.5 * length * costs.token_bytes + 16 * cfg.vocab_size)
        if weights + beside <= sizes.USABLE * task.memory:
            return rows
        rows //= 2
    return 0
