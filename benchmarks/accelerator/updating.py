"""The part `update`: gradient and AdamW step, beside the measured matmul peak and the predicted memory."""

from typing import TYPE_CHECKING

import update

from benchmarks.accelerator import sizes

if TYPE_CHECKING:
    from benchmarks.accelerator.part import Task

FIGURES = (
    *("update_seconds", "update_seconds_best", "tokens_per_second", "mfu", "padding_fraction", "attention", "devices"),
    *("real_tokens", "seconds_per_token", "programs", "compile_seconds", "recompiles", "recomputed"),
    *("predicted_memory_bytes", "loss"),
)


def run(task: "Task") -> None:
    """Measures each case of `sizes.updates`.

    The allocator's peak is that of the process. So it is compared with the largest prediction of the cases so far.
    """
    import jax
    import models

    shape, reduced = sizes.trainable(task.sizes.shape, task.memory, jax.device_count())
    largest = 0
    for case, args in sizes.updates(task.sizes, shape):
        if task.has(case):
            continue
        try:
            figures = update.ours(args)
        except Exception as error:
            if not sizes.is_out_of_memory(error) or args.remat == "full":
                raise
            task.add(case, {"skipped": f"the memory does not suffice for remat {args.remat}"})
            continue
        largest = max(largest, figures["predicted_memory_bytes"])
        measured = {"shape": shape, "dtype": args.dtype, "remat": args.remat} | {
            name: figures[name] for name in FIGURES
        }
        if peak := models.peak_bytes():
            measured |= {"peak_memory_bytes": peak, "peak_over_predicted": round(peak / largest, 3)}
        task.add(case, measured | ({"reduced": reduced} if reduced else {}))
