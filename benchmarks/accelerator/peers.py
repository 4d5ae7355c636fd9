"""The part `peers`: transformers' `generate` and a torch update on the same work, where both are installed."""

import argparse
import importlib.util
from typing import TYPE_CHECKING

import rollout
import update_torch

from benchmarks.accelerator import sizes

if TYPE_CHECKING:
    from benchmarks.accelerator.part import Task


def run(task: "Task") -> None:
    """Measures each case that the peer can run, under the names that the parts `decode` and `update` give them.

    `generate` runs those of fixed lengths, and torch the updates with full recomputation, since it recomputes its
    layers too.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        task.add("peers", {"skipped": f"{' and '.join(missing)} not installed"})
        return
    import torch

    platform = task.device["platform"]
    if platform != "cpu" and not torch.cuda.is_available():
        task.add("peers", {"skipped": f"this torch {torch.__version__} does not run on the {platform}"})
        return
    versions = {"torch": torch.__version__}
    for rows in task.sizes.rows:
        case = f"{rows} rows, fixed"
        if not task.has(case):
            figures = sizes.halved(rows, 8, lambda size, rows=rows: _generated(task, rows, size))
            task.add(case, {"peer": "generate, static cache"} | figures | versions)
    for case, args in sizes.updates(task.sizes, _trained_shape(task)):
        if args.remat == "full" and not task.has(case):
            figures = sizes.halved(args.tokens_per_microbatch, 1024, lambda size, args=args: _updated(args, size))
            task.add(case, {"peer": "torch, SDPA, compiled"} | figures | versions)


def _trained_shape(task: "Task") -> str:
    return sizes.trainable(task.sizes.shape, task.memory, 1)[0]


def _generated(task: "Task", asked: int, rows: int) -> dict:
    args = sizes.decoded(task.sizes, task.sizes.shape, rows, "fixed")
    figures = rollout.peer(argparse.Namespace(**vars(args), peer="static"))
    return {"shape": args.shape, "dtype": args.dtype, **figures, **sizes.smaller(asked, rows, "rows")}


def _updated(args: argparse.Namespace, microbatch: int) -> dict:
    changed = vars(args) | {"tokens_per_microbatch": microbatch, "peer": "compile"}
    figures = update_torch.peer(argparse.Namespace(**changed))
    names = ("update_seconds", "tokens_per_second", "peak_memory_bytes")
    known = {name: figures[name] for name in names if name in figures}
    note = sizes.smaller(args.tokens_per_microbatch, microbatch, "tokens of a micro-batch")
    return {"shape": args.shape, "dtype": args.dtype} | known | note
