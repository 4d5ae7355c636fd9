"""A model by its name, ready to answer: what `evaluate` and `generate` share.

The name is the folder of a run (its newest checkpoint, or one of a step), a Hugging Face directory, or a hub id. Of a
run the weights are those that its export holds, in bfloat16, so that both give the same answers.
"""

import contextlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import jax

from igrpo_jax.config import Config, JudgeConfig, to_dict
from igrpo_jax.data.problems import Row
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import cluster, sharding
from igrpo_jax.distributed.programs import use_disk_cache
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import evaluator
from igrpo_jax.evaluation.evaluator import Evaluator, Plan
from igrpo_jax.models import attention, decoder, hf_read
from igrpo_jax.models.policy import Policy, open_policy, written
from igrpo_jax.outputs import weights
from igrpo_jax.outputs.checkpoint import saved_step
from igrpo_jax.outputs.console import Console
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.sampling.scheduler import Scheduler


@dataclass(frozen=True)
class Opened:
    """A model and what it is asked: read and checked, without weights and before any device work."""

    config: Config
    policy: Policy
    renderer: Renderer
    plan: Plan
    mesh: jax.sharding.Mesh
    run: Path | None  # folder of the run that the model is of
    step: int | None  # of its checkpoint
    name: str  # absolute, where the model is a folder
    weights_written: str  # when, in UTC: others at the same place are another model


def open_model(config: Config, model: str, step: int | None, rows: dict[str, list[Row]]) -> Opened:
    """Opens the model of this name for some problems.

    Args:
        c: whose config.model fits `model` (see `runtime.parse_model`).
        step: of a run's checkpoint, None = the newest.
        rows: problems by benchmark.

    Raises:
        InputError: no such model or checkpoint; problems that don't fit its context; a mesh that doesn't divide it.
    """
    run = Path(model) if Path(model, "checkpoints").is_dir() else None
    if step is not None and run is None:
        raise InputError(f"--step {step}: only the folder of a run has steps, which {model!r} is not; leave it out")
    step = saved_step(run, step) if run else None
    policy = open_policy(config.model)
    renderer = Renderer(policy.tokenizer, config.data, config.refine, config.draft_limit, policy.eos_ids)
    plan = evaluator.plan(config, rows, renderer, policy.model.max_position_embeddings)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divides(mesh, decoder.shapes(policy.model))
    chosen = attention.choose(
        config.learner.attention, mesh, config.model.dtype, policy.model.head_dim, plan.max_context
    )
    policy = replace(policy, model=replace(policy.model, attention=chosen))
    cluster.check_same({"config": to_dict(config), "model": model, "step": step, "problems": plan.fingerprint})
    name = str(Path(model).resolve()) if Path(model).exists() else model
    files = [run / "checkpoints" / str(step)] if run else hf_read.weight_files(model)
    newest = max(file.stat().st_mtime for file in files)
    when = datetime.fromtimestamp(newest, UTC).isoformat(sep=" ", timespec="milliseconds")
    return Opened(config, policy, renderer, plan, mesh, run, step, name, when)


def load(opened: Opened, console: Console, stack: contextlib.ExitStack) -> tuple[Evaluator, decoder.Params]:
    """Reads the weights, compiles the sampler and starts the verifier; what must be closed is put on `stack`."""
    config, policy, mesh = opened.config, opened.policy, opened.mesh
    use_disk_cache(config.compilation_cache)
    stack.enter_context(jax.set_mesh(mesh))
    if opened.run is None:
        params = weights.load(policy, mesh, config.seed, "float32", console)
    else:
        params = written(weights.saved(config, policy, opened.run, mesh, console, opened.step)[0])
    scheduler = _scheduler(config, policy, mesh, opened.plan, console)
    settings = replace(config.rewards, accuracy=1.0, format=0.0, overlong=0.0, custom="", judge=JudgeConfig())
    verifier = stack.enter_context(Verifier(settings))
    return Evaluator(config, opened.plan, scheduler, opened.renderer, verifier, console), params


def _scheduler(config: Config, policy: Policy, mesh: jax.sharding.Mesh, plan: Plan, console: Console) -> Scheduler:
    """A sampler of no more slots than there are samples."""
    shards = sharding.batch_shards(mesh)
    samples = sum(len(prompts) * evaluator.samples(config, name) for name, prompts in plan.prompts.items())
    engine = Engine(
        policy.model,
        mesh,
        policy.eos_ids,
        slots=min(config.rollout.slots, -(-samples // shards) * shards),
        max_context=plan.max_context,
        max_completion=plan.max_completion,
        length=plan.length,
        dtype=config.model.dtype,
        steps_per_dispatch=config.rollout.steps_per_dispatch,
    )
    with console.phase("compiling the sampler", len(engine.keys)) as update:
        engine.compile(update)
    console.message(f"{engine.slots} answers at once take {engine.predicted_bytes() / 2**30:.2f} GiB on each device")
    return Scheduler(engine, config.rollout.dispatches_ahead)
