"""A model by its name, ready to answer: what `evaluate` and `generate` share.

The name is the folder of a run (its newest checkpoint, or that of a step), a Hugging Face directory, or a hub id. The
weights of a run are cast and merged as in its export without a given dtype, so that both give the same answers.
"""

import contextlib
import functools
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import jax

from igrpo_jax.config import Config, RewardsConfig, to_dict
from igrpo_jax.data.problems import Row
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import chips, cluster, sharding
from igrpo_jax.distributed.compiling import compiling
from igrpo_jax.distributed.disk_cache import use_disk_cache
from igrpo_jax.distributed.programs import showing_waits, tree_bytes
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation.evaluator import Evaluator
from igrpo_jax.evaluation.planning import Plan, make_plan, samples_per_problem
from igrpo_jax.models import decoder, hf_paths, hf_read
from igrpo_jax.models.policy import Policy, export_dtype, fit_to_mesh, open_model, written
from igrpo_jax.outputs import weights
from igrpo_jax.outputs.checkpoint_reading import saved_step
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.workdir import read_config
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.sampling import page_count
from igrpo_jax.sampling.configured import open_programs, with_slots_for
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.sampling.layout import shares_weights
from igrpo_jax.sampling.programs import SamplerPrograms
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.storage.addresses import is_remote, modified, path_of


@dataclass(frozen=True)
class EvaluationInputs:
    """A model and the problems that it answers, read and checked before any device work; without weights."""

    config: Config
    policy: Policy
    renderer: Renderer
    plan: Plan
    mesh: jax.sharding.Mesh
    run: Path | None  # folder of the run whose model this is; None for other models
    step: int | None  # step of the run's checkpoint; None without a run
    name: str  # absolute, where the model is a folder
    weights_written: str  # when, in UTC, or the hub's revision: newer weights at the same path are another model


def open_evaluation(
    config: Config, model: str, step: int | None, rows: dict[str, list[Row]], recorded_date: str | None = None
) -> EvaluationInputs:
    """Returns the model named `model`, with the plan for the problems in `rows`.

    Args:
        config: its `model` fits `model` (see `cli.parsing.parse_model`).
        step: step of a run's checkpoint, None = the newest.
        rows: problems by benchmark.
        recorded_date: the day that a resumed evaluation has recorded for its chat template; None = a new evaluation.

    Raises:
        InputError: no such model or checkpoint; a chat template or tokenizer that the run did not begin with; problems
            that don't fit the context; a mesh that doesn't divide the model.
    """
    asked = step
    run, step = checkpoint_of(model, asked)
    config, policy, renderer = open_model(config, recorded_date)
    if run:
        weights.check_tokenizer(policy, run)
    plan = make_plan(config, rows, renderer, policy.cfg.max_position_embeddings)
    mesh = sharding.make_mesh(config.mesh)
    run, step = checkpoint_of(model, asked)  # again: the run may have removed the one that was the newest
    policy = replace(policy, cfg=fit_to_mesh(config, policy.cfg, mesh))
    read = {"problems": plan.fingerprint, "weights of the model": "" if run else policy.fingerprint}
    cluster.check_same({"config": to_dict(config), "model": model, "step": step, **read})
    return EvaluationInputs(config, policy, renderer, plan, mesh, run, step, *identity(model, run, step))


def checkpoint_of(model: str, step: int | None) -> tuple[Path | None, int | None]:
    """Returns the folder of a run and the step of its checkpoint if `model` names a run, else None and None.

    Raises:
        InputError: the run has no such checkpoint, or a step is given where there is no run.
    """
    folder = path_of(f"--model {model}", model)
    run = folder if (folder / "checkpoints").is_dir() else None
    if step is not None and run is None:
        raise InputError(f"--step {step}: only the folder of a run has steps, which {model!r} is not; leave it out")
    return run, saved_step(run, step) if run else None


def identity(model: str, run: Path | None, step: int | None) -> tuple[str, str]:
    """Returns the name of a model, absolute where it is a folder, and when its weights were written, in UTC.

    For a model of the hub this is its revision: its files have the time at which this machine downloaded them.
    """
    folder = path_of(f"--model {model}", model)
    if not (is_remote(model) or folder.is_dir()):
        return model, hf_paths.resolve(model).name
    name = model if is_remote(model) else str(folder.resolve())
    files = [run / "checkpoints" / str(step)] if run else hf_read.weight_files(model)
    newest = max(modified(file) for file in files)
    return name, datetime.fromtimestamp(newest, UTC).isoformat(sep=" ", timespec="milliseconds")


def load(inputs: EvaluationInputs, console: Console, stack: contextlib.ExitStack) -> tuple[Evaluator, decoder.Params]:
    """Starts the verifier, makes the sampler and reads the weights; `stack` closes what must be closed."""
    config, policy, mesh = inputs.config, inputs.policy, inputs.mesh
    use_disk_cache(config.compilation_cache)
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(showing_waits(console.waiting))
    of_workers = {name: getattr(config.rewards, name) for name in ("workers", "timeout", "memory_gib")}
    verifier = stack.enter_context(Verifier(RewardsConfig(accuracy=1.0, format=0.0, **of_workers)))
    sampler = _programs(config, policy, mesh, inputs.plan)
    engine = Engine(policy.cfg, mesh, page_count.fitted(sampler))
    scheduler = Scheduler(engine, config.rollout.dispatches_ahead)
    tell = lambda: console.message(
        f"{engine.slots} answers at once take {engine.programs.predicted_bytes / 2**30:.2f} GiB on each device"
    )
    first = engine.first_program_shapes(*inputs.plan.first(config))
    stack.enter_context(compiling(first, engine.program_shapes, None, console.phase, tell))
    evaluator = Evaluator(config, inputs.plan, scheduler, inputs.renderer, verifier, console)
    return evaluator, _weights(inputs, console)


def _weights(inputs: EvaluationInputs, console: Console) -> decoder.Params:
    """Reads the weights that answer: of a run those of its export, rounded to the dtype of the evaluation."""
    config, policy, mesh = inputs.config, inputs.policy, inputs.mesh
    if inputs.run is None:
        return weights.load(policy, mesh, config.seed, config.model.dtype, console)
    dtypes = (read_config(inputs.run).model.dtype, config.model.dtype)
    dtype = "bfloat16" if "bfloat16" in dtypes else "float32"
    params, _ = weights.saved(config, policy, inputs.run, mesh, console, inputs.step, dtype)
    return written(params, export_dtype(params))


def _programs(config: Config, policy: Policy, mesh: jax.sharding.Mesh, plan: Plan) -> SamplerPrograms:
    """Returns the programs of a sampler with hardly more slots than there are samples."""
    # Processes of a team need as many pages.
    memory = cluster.from_first(functools.partial(chips.known_bytes, mesh.devices.flat[0]))
    if memory is not None and (config.model.lora.rank or not shares_weights(mesh, config.rollout.mesh.tensor)):
        # The loaded weights stay on the devices next to the sampler's copy.
        memory -= tree_bytes(sharding.abstract_params(mesh, decoder.shapes(policy.cfg), config.model.dtype))
    samples = sum(len(prompts) * samples_per_problem(config, name) for name, prompts in plan.prompts.items())
    return open_programs(
        with_slots_for(config, mesh, samples),
        policy.cfg,
        mesh,
        policy.eos_ids,
        memory,
        longest_prompt=plan.longest_prompt,
        max_completion=plan.max_completion,
        length=plan.length,
    )
