"""The tables of a run: what it will do, how much memory it needs, and its scores at the end."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax

from igrpo_jax.config import Config
from igrpo_jax.distributed import chips, watchdog
from igrpo_jax.distributed.chips import CHIPS, size
from igrpo_jax.evaluation import planning
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.outputs.checkpoint import best_of
from igrpo_jax.outputs.writer import rows_until
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.schema.unused import unused
from igrpo_jax.session.progress import Progress
from igrpo_jax.session.run_inputs import RunInputs
from igrpo_jax.storage.addresses import names

SEEN_STEPS = 20  # last steps of a resumed run, whose mean padding predicts that of the next ones

# By config.learner.remat.
_RECOMPUTED = {"none": "nothing", "logits": "logits", "dots": "all but matrix products", "full": "all"}


def before(
    config: Config, inputs: RunInputs, engine: Engine, training: LearnerPrograms, workdir: Path
) -> list[tuple[str, object]]:
    """Returns the rows of the table that is printed before anything is compiled."""
    cfg, mesh = inputs.policy.cfg, inputs.mesh
    tokens = config.trained_completions * config.rollout.max_completion_length
    shapes = training.packer.shapes
    sizes = ", ".join(f"{size:,}" for size in shapes.sizes)
    received = engine.sync.received_bytes
    frozen, trained = training.frozen, sum(x.size for x in training.state.params.values())
    return [
        (
            "model",
            f"{inputs.policy.path or 'built-in'}, {cfg.num_params / 1e6:,.1f} M parameters, {config.model.dtype}",
        ),
        ("mesh", f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x tensor {mesh.shape['tensor']}"),
        ("sampling", sampling_layout(engine)),
        *([("weights to sample with", f"{size(received)} to each device in a step")] * bool(received)),
        ("attention", f"{cfg.attention} (training and prefill)"),
        *([("LoRA", f"rank {config.model.lora.rank}, {trained / 1e6:,.2f} M trained parameters")] * bool(frozen)),
        ("objective", f"{config.algorithm.loss_type}, beta {config.algorithm.beta:g}"),
        ("training prompts", f"{len(inputs.prompts):,} ({inputs.skipped} longer than data.max_prompt_length skipped)"),
        *([("day of the chat template", config.data.template_date)] * bool(config.data.template_date)),
        *inputs.notes,
        *(("evaluation", note) for note in _evaluation(config, inputs.evaluation_plan)),
        *(("without effect", text) for text in unused(config)),
        ("steps", f"{inputs.total_steps:,} of {config.prompts_per_step} prompts"),
        *_stages(config),
        ("trained tokens per step", f"at most {tokens:,}"),
        ("padding of the update", _padding(workdir)),
        ("micro-batches", f"{sizes} tokens on each shard; {shapes.completions_per_unit} completions share a prompt"),
        ("cache", _cache(engine)),
        (
            "programs to compile",
            f"at most {len(engine.program_shapes)} of the sampler, and of the update one for each size of micro-batch",
        ),
    ]


def _evaluation(config: Config, plan: planning.Plan) -> list[str]:
    """Returns what a user should know of the evaluations of a run, and of those that it will not make."""
    given = [f"evaluation.{name}" for name in ("benchmarks", "data_dir") if getattr(config.evaluation, name)]
    if given and not config.evaluation.every:
        return [f"off: {' and '.join(given)} given, but evaluation.every = 0; set it to the steps between evaluations"]
    return [*plan.notes, *planning.left_out(config, plan)]


def _stages(config: Config) -> list[tuple[str, str]]:
    """Returns the rows about the two stages of a step, or about the one that there is without drafts."""
    algorithm, prompts = config.algorithm, config.prompts_per_step
    if not algorithm.num_drafts:
        return [("completions per step", f"{prompts * algorithm.num_generations:,} (G = {algorithm.num_generations})")]
    drafts = f"{prompts * algorithm.num_drafts:,} (N = {algorithm.num_drafts})"
    refinements = f"{prompts * algorithm.num_generations:,} (G = {algorithm.num_generations})"
    if algorithm.draft_selection == "refined":
        refinements += " of the drafts that are kept, and as many of every other draft"
    if algorithm.draft_when == "unsolved":
        drafts, refinements = f"{drafts}, and those of additional prompts", f"at most {refinements}"
    if algorithm.second_stage == "verify":
        verifications = f"at most {refinements}, of prompts with right and wrong solutions, trained"
        return [("solutions per step", f"{drafts}, trained"), ("verifications per step", verifications)]
    if algorithm.alternate:
        drafts += ", in every other step"
    trained = ", both trained" if algorithm.train_drafts else ", the trained completions"
    return [("drafts per step", drafts), ("refinements per step", refinements + trained)]


def sampling_layout(engine: Engine) -> str:
    """Returns how devices share the weights to sample with and, for a known chip, the least time of a decode step."""
    groups, tensor, costs = engine.groups, engine.tensor, engine.programs.costs
    plural = lambda count, name: f"{count} {name}{'s' * (count > 1)}"
    text = f"{plural(groups, 'group')} of {plural(tensor, 'device')} (rollout.mesh.tensor)"
    rows = engine.sizes.parts * engine.shard_slots
    text += f", {rows} slots each"
    if engine.sizes.parts > 1:
        text += f"; {engine.sizes.parts} devices have the same key and value heads, each for {engine.shard_slots} slots"
    if len(engine.team.processes) > 1:
        text += f"; {len(engine.team.processes)} processes sample in lockstep, because a group has devices of several"
    chip = CHIPS.get(engine.mesh.devices.flat[0].device_kind)
    if chip is None:
        return text
    seconds = costs.decode_seconds(chip, rows, engine.sizes.length // 2)
    return f"{text}; a decode step takes at least {1e3 * seconds:.2g} ms"


def _cache(engine: Engine) -> str:
    """Returns the slots and pages of each shard, and the memory of the pages on each device."""
    sizes, costs = engine.sizes, engine.programs.costs
    pages = size(sizes.pages * sizes.page_size * costs.token_bytes)
    how = "read in place" if engine.programs.reads_pages else "copied side by side to decode"
    held = f"{sizes.pages:,} pages of {sizes.page_size} tokens ({pages})"
    where = "shard" if sizes.parts == 1 else f"of {sizes.parts} parts of a shard"
    return f"{held} for {sizes.shard_slots} slots on each {where}, {how}"


def _padding(workdir: Path) -> str:
    """Returns how much of the next updates will be padding, as predicted from the last ones, if there were any."""
    rows = [json.loads(row) for row in rows_until(workdir / "metrics.jsonl", math.inf)]
    seen = [row["perf/padding_frac"] for row in rows if row.get("perf/padding_frac") is not None][-SEEN_STEPS:]
    if not seen:
        return "not known before there are completions"
    return f"about {sum(seen) / len(seen):.0%}, as in the last {len(seen)} steps"


def memory(engine: Engine, training: LearnerPrograms) -> list[tuple[str, object]]:
    """Returns the rows of the table that is printed once all programs of the sampler and the update are compiled."""
    needs, available = predicted_bytes(engine, training), chips.known_bytes(jax.local_devices()[0])
    predicted = ", ".join(f"{phase} {size(need)}" for phase, need in needs.items())
    return [
        ("recomputed in the backward pass", _RECOMPUTED[training.remat]),
        ("predicted bytes per device", predicted + (f", of {size(available)}" if available else "")),
        *(
            ("does not fit", f"{phase}: lower {watchdog.SMALLER[phase]}, or use more devices")
            for phase, need in needs.items()
            if available and need > available
        ),
    ]


def predicted_bytes(engine: Engine, training: LearnerPrograms) -> dict[str, int]:
    """Returns the bytes that update and rollout need on each device, as the compiler counts them."""
    rollout = engine.programs.predicted_bytes + training.resident_bytes
    return {"update": training.predicted_bytes(), "rollout": rollout}


def after(
    workdir: Path, progress: Progress, best_metric: str, resumed_after: int, total: int
) -> list[tuple[str, object]]:
    """Returns the rows of the table at a run's end.

    Args:
        progress: its scores are the metrics of the run's evaluations.
        best_metric: config.checkpoint.best_metric.
        resumed_after: the step whose state the run began with, 0 if it was not resumed.
        total: the number of steps of the run.
    """
    rows: list[tuple[str, object]] = [
        ("steps", f"{total}" + (f", resumed after {resumed_after}" if resumed_after else ""))
    ]
    saved = [int(name) for name in names(workdir / "checkpoints") if name.isdecimal()]
    best, scores = best_of(progress.values(best_metric), saved), progress.scores
    if best is not None:
        rows.append(("best checkpoint", f"step {best}, by {best_metric}"))
    single_shot = {name for values in scores.values() for name in values if name.endswith("pass@1")}
    for name in sorted(single_shot):
        rows.append((name, _change({step: scores[step][name] for step in scores if name in scores[step]})))
    trackers = ("tensorboard", "wandb", "trackio", "mlflow")
    for name in ("metrics.jsonl", "samples", "evaluations", *trackers, "checkpoints", "export", "profile"):
        if (workdir / name).exists():
            rows.append((name, workdir / name))
    return rows


def _change(values: Mapping[int, float]) -> str:
    """Returns, as text, the first and the last of the values by step and their difference; or the only value."""
    (first, before), (last, now) = min(values.items()), max(values.items())
    if first == last:
        return f"{now:.3f} at step {last}"
    began = f"at step {first}" if first else "before"
    return f"{before:.3f} {began}, {now:.3f} after ({now - before:+.3f})"
