"""Will a configuration fit, and what bounds it, without the hardware:

    python -m igrpo_jax.aot --config configs/tpu_v5p.py --topology v5p:2x2x2

compiles the programs of a run for that slice with libtpu, the compiler of TPUs; without --topology it compiles them for
the devices of this machine. It prints a table of the programs, then "fits", or "does not fit" with the settings to
change, and one JSON object as the last line. The exit code is 0 where it fits and 3 where it does not. `footprint` and
`models.costs` say how bytes and seconds are counted.

It cannot show how near a chip comes to its published peaks, what its links deliver, or how long the host takes.
"""

import functools
import json
import time
from typing import TYPE_CHECKING, Any

from igrpo_jax.aot.progress import Progress
from igrpo_jax.aot.slices import check, topology
from igrpo_jax.cli import exits, parsing
from igrpo_jax.config import Config
from igrpo_jax.distributed.chips import size

if TYPE_CHECKING:
    from igrpo_jax.aot.footprint import Footprint, ProgramFootprint

USAGE = "python -m igrpo_jax.aot --config FILE [--topology v5p:2x2x2 [--slices N]] [--config.FIELD=VALUE ...]"
FLAGS = {
    "topology": "slice of TPUs to compile for, such as v5p:2x2x2; default: the devices of this machine",
    "slices": "how many such slices, which the data center's network (DCN) connects; default: 1",
}
DOES_NOT_FIT = 3  # exit code
PRACTICAL = 1 / 3  # mean length of completions relative to the limit, typical of math problems with a generous limit

# Columns of the table of programs.
COLUMNS = (
    *("program", "compiled in", "arguments", "temporaries", "output", "beside", "total", "of HBM"),
    *("TFLOP", "GB moved", "GB received", "least ms", "bound"),
)


def main(argv: list[str]) -> None:
    config, given = parsing.parse_config(argv, USAGE, FLAGS)
    began = time.perf_counter()
    with Progress(functools.partial(print, flush=True)) as progress:
        slices = parsing.number("slices", given["slices"], least=1) or 1
        check(given["topology"], slices)
        where = given["topology"] or "the devices of this machine"
        if slices > 1:
            where = f"{slices} x {where}"
        progress.message(f"compiling the programs of {given['config']} for {where}; this takes minutes")
        run = compiled(config, given["topology"], slices, progress)
    print("\n".join(["", *table(run), "", *step_lines(run), *traffic_lines(run), "", *conclusion(run)]))
    figures = {"topology": given["topology"] or run.chip.name, "slices": slices} | summary(run)
    print(json.dumps(figures | {"seconds": round(time.perf_counter() - began, 1)}))
    if not run.fits:
        raise SystemExit(DOES_NOT_FIT)


def compiled(config: Config, slice_name: str | None, slices: int, progress: Progress) -> "Footprint":
    """Returns the footprint of `config` on slices, or on the devices of this machine, with its programs compiled.

    Raises:
        InputError: as `topology`; or settings that a run would refuse too.
    """
    with progress.doing("loading jax and the compiler"):
        devices = topology(slice_name, slices)
        from igrpo_jax.aot import building, footprint
        from igrpo_jax.distributed.disk_cache import use_disk_cache
    if not slice_name:
        use_disk_cache(config.compilation_cache)  # where a run on these devices finds what was compiled
    with progress.doing("dividing the model among the devices"):
        run = footprint.prepare(config, devices)
    with progress.doing("counting how many pages fit"):
        run = footprint.fitted(run)
    progress.message("\n".join(head(run)))
    building.build(run, progress)
    return run


def head(footprint: "Footprint") -> list[str]:
    """Returns the lines that name the model, the devices and the sizes that programs are compiled for."""
    from igrpo_jax.session import overview

    config, mesh = footprint.config, footprint.mesh
    processes = len({device.process_index for device in mesh.devices.flat})
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    name, slots = config.model.path or "the built-in model", footprint.engine.sizes
    resident = sum(footprint.resident.values())
    return [
        f"{name}, {footprint.cfg.num_params / 1e9:.2f} B parameters, {config.model.dtype}; "
        f"{mesh.size} x {footprint.chip.name} in {processes} process{'es' * (processes > 1)} ({sizes})",
        f"sampling with {overview.sampling_layout(footprint.engine)}",
        f"contexts of up to {footprint.longest_prompt:,} tokens, "
        f"completions of {config.rollout.max_completion_length:,}, "
        f"attention {footprint.cfg.attention}",
        f"on each device: {', '.join(f'{name} {size(count)}' for name, count in footprint.resident.items())} of "
        f"{slots.pages:,} pages of {slots.page_size} tokens for {slots.shard_slots} slots; together "
        f"{resident / footprint.chip.hbm_bytes:.0%} of {size(footprint.chip.hbm_bytes)}, before what programs and "
        "their code need",
    ]


def table(footprint: "Footprint") -> list[str]:
    """Returns one line for each program, then one for each program's collectives."""
    rows = [COLUMNS, *(_row(footprint, part) for part in footprint.programs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines += ["", f"machine code of all programs: {size(footprint.code)}, part of the shares of HBM; collectives:"]
    for part in footprint.programs:
        kinds = [f"{x.count:g} {kind} ({x.bytes / 1e9:.3g} GB)" for kind, x in sorted(part.sent.items())]
        lines.append(f"  {part.name}: {', '.join(kinds) or 'none'}")
    return lines


def _row(footprint: "Footprint", part: "ProgramFootprint") -> list[str]:
    seconds, bound = footprint.least(part.cost, part.received)
    parts = (part.arguments, part.temporaries, part.output, part.beside, part.total)
    sizes = ["-"] * len(parts) if part.refused else [*map(size, parts)]
    of_memory = "too much" if part.refused else f"{(part.total + footprint.code) / footprint.chip.hbm_bytes:.1%}"
    figures = [part.cost.flops / 1e12, part.cost.bytes / 1e9, part.received / 1e9, seconds * 1e3]
    return [part.name, f"{part.seconds:.1f} s", *sizes, of_memory, *(f"{x:.3g}" for x in figures), bound]


def step_lines(footprint: "Footprint") -> list[str]:
    """Returns lines with the least time of the longest step, of its parts, and of a step with practical lengths."""
    parts, practical = footprint.step(), footprint.step(PRACTICAL)
    total, usual = (sum(seconds for seconds, _ in of.values()) for of in (parts, practical))
    longest = footprint.config.rollout.max_completion_length
    title = f"a step in which every completion takes {longest:,} tokens cannot take less than {total:.3g} s:"
    return [
        title,
        *(f"  {name:<24}{seconds:10.3g} s  {bound}" for name, (seconds, bound) in parts.items()),
        f"one in which drafts and completions are a third as long on average: {usual:.3g} s",
    ]


def traffic_lines(footprint: "Footprint") -> list[str]:
    """Returns lines on what each chip receives in a step: the weights to sample with, and data of other slices."""
    calls, received = sum(sync.calls for sync in footprint.syncs), footprint.weights_received / 1e9
    lines = [f"weights to sample with: {calls} calls of their programs, {received:.3g} GB to each chip in a step"]
    if footprint.slices > 1:
        count = footprint.over_dcn / 1e9
        lines.append(f"between the {footprint.slices} slices: {count:.3g} GB over DCN to each chip in the longest step")
    return lines


def conclusion(footprint: "Footprint") -> list[str]:
    """Returns the lines that say whether the run fits and, where it does not, which settings to change."""
    fullest, available = footprint.fullest, size(footprint.chip.hbm_bytes)
    if footprint.fits:
        return [f"fits: {footprint.used_fraction:.1%} of {available} at its fullest, in {fullest.name}"]
    if fullest.refused:
        need = f"{fullest.name} alone is more than the compiler allows ({fullest.refused[:200]})"
    else:
        need = f"{fullest.name} needs {size(fullest.total + footprint.code)} of {available}"
    return [f"does not fit: {need}. Settings to change:", *(f"  {line}" for line in advice(footprint))]


def advice(footprint: "Footprint") -> list[str]:
    """Returns settings that lower what the fullest program needs, with their present values."""
    config, fullest, sizes = footprint.config, footprint.fullest.program, footprint.mesh.shape
    training = footprint.learner
    lines = []
    if fullest in (training.accumulate, training.rescore):
        lines = _advise_update(config)
    elif fullest in tuple(footprint.sampler):
        lines = _advise_rollout(footprint)
    if sizes["data"] > 1:
        lines.append(f"mesh.fsdp = {sizes['fsdp']}: a larger one, instead of mesh.data, splits the training state")
    else:
        lines.append(f"a larger slice: mesh.fsdp = {sizes['fsdp']} then splits the training state further")
    if config.optimizer.mu_dtype == "float32" and config.optimizer.name != "adafactor" and not config.model.lora.rank:
        lines.append("optimizer.mu_dtype = float32: bfloat16")
    if config.optimizer.name != "adafactor" and not config.model.lora.rank:
        lines.append(f"optimizer.name = {config.optimizer.name}: adafactor, which keeps hardly any state")
    if config.algorithm.beta > 0 and not config.learner.offload_reference:
        lines.append("learner.offload_reference = False: True")
    if not config.model.lora.rank:
        lines.append("model.lora.rank = 0: 16, which trains only adapters")
    return lines


def _advise_update(config: Config) -> list[str]:
    lines = [f"learner.tokens_per_microbatch = {config.learner.tokens_per_microbatch}: lower it"]
    if config.learner.remat not in ("auto", "full"):
        lines.append(f"learner.remat = {config.learner.remat}: auto")
    return lines


def _advise_rollout(footprint: "Footprint") -> list[str]:
    config, sizes, fullest = footprint.config, footprint.engine.sizes, footprint.fullest
    page = footprint.sampler.costs.token_bytes * sizes.page_size
    over = fullest.total + footprint.code - footprint.chip.hbm_bytes
    most = 0 if fullest.refused or not page else int(sizes.pages - over / page)
    lines = []
    if most >= sizes.least_pages:
        lines.append(f"rollout.pages = {config.rollout.pages}: at most about {most} ({size(page)} each)")
    elif config.rollout.pages:
        lines.append(f"rollout.pages = {config.rollout.pages}: fewer, or 0 for as many as memory holds")
    lines.append(f"rollout.slots = {config.rollout.slots}: fewer")
    lines.append(f"rollout.max_completion_length = {config.rollout.max_completion_length}: lower it")
    if config.algorithm.num_drafts:
        lines.append(f"refine.max_draft_length = {config.draft_limit}: lower it")
    lines.append(f"rollout.mesh.tensor = {footprint.engine.tensor}: a larger one, which splits weights and cache")
    return lines


def summary(footprint: "Footprint") -> dict[str, Any]:
    """Returns the figures of the table as they go into the JSON object."""
    return {
        "fits": footprint.fits,
        "devices": footprint.mesh.size,
        "mesh": dict(footprint.mesh.shape),
        "sampling_tensor": footprint.engine.tensor,
        "hbm_bytes": footprint.chip.hbm_bytes,
        "weights_received": footprint.weights_received,
        "over_dcn": footprint.over_dcn,
        "share": round(footprint.used_fraction, 4),
        "fullest": footprint.fullest.name,
        "code": footprint.code,
        "least_step_seconds": {name: seconds for name, (seconds, _) in footprint.step().items()},
        "practical_step_seconds": {name: seconds for name, (seconds, _) in footprint.step(PRACTICAL).items()},
        "programs": [_figures(footprint, part) for part in footprint.programs],
    }


def _figures(footprint: "Footprint", part: "ProgramFootprint") -> dict[str, Any]:
    names = ("name", "kind", "arguments", "temporaries", "output", "beside", "total", "code", "received", "refused")
    seconds, bound = footprint.least(part.cost, part.received)
    return {name: getattr(part, name) for name in names} | {
        "compile_seconds": round(part.seconds, 2),
        "flops": part.cost.flops,
        "bytes_moved": part.cost.bytes,
        "least_seconds": seconds,
        "bound": bound,
        "collectives": {kind: {"count": x.count, "bytes": x.bytes} for kind, x in part.sent.items()},
    }


if __name__ == "__main__":
    exits.run(main)
