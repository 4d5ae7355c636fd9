"""Opens a run: goes from a configuration to the point where the first step can begin, with the state restored or new.

1. All inputs are read and checked, by every process in the same way; nothing is written yet.
2. The folder is claimed, and the table of what the run will do is printed. Nothing has been compiled so far.
3. The parts that must be closed later are opened: verifier, checkpoints, metrics, and the threads that compile
   (`distributed.compiling`).
4. The state comes from the newest checkpoint, or from the model's weights and a warm start. A resume that does not fit
   its checkpoint is refused here, before settings, rows or samples in the folder change.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from igrpo_jax.config import Config, freeze, to_dict
from igrpo_jax.data.builtin import TASKS
from igrpo_jax.distributed import chips, cluster, watchdog
from igrpo_jax.distributed.compiling import ProgramShapes, compiling
from igrpo_jax.distributed.programs import showing_waits
from igrpo_jax.distributed.teams import Team
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation.evaluator import Evaluator
from igrpo_jax.learning.learner import Learner
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.learning.rollout import Rollout
from igrpo_jax.learning.train_state import TrainState
from igrpo_jax.learning.update_metrics import NULLABLE
from igrpo_jax.learning.warm_start import warm_start
from igrpo_jax.models import decoder, hf_write
from igrpo_jax.outputs import hub, weights
from igrpo_jax.outputs.checkpoint import Checkpointer
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.workdir import (
    check_workdir,
    has_samples,
    prepare_workdir,
    read_config,
    record_settings,
    recorded_date,
)
from igrpo_jax.outputs.writer import Writer
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.sampling import page_count
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.session import ending, overview, resuming
from igrpo_jax.session.beginning import Beginning, claim_folder
from igrpo_jax.session.progress import Progress
from igrpo_jax.session.run import Run
from igrpo_jax.session.run_context import RunContext, enter_mesh
from igrpo_jax.session.run_inputs import RunInputs, open_inputs, open_run_programs, origin
from igrpo_jax.session.sft import refuse_sft


def open_run(config: Config, context: RunContext) -> tuple[Run, TrainState]:
    """Opens the run that `config` describes in the folder of `context`.

    Returns:
        The run, and the state that its next step begins with.

    Raises:
        InputError: something in `config` or what it names is wrong, or the folder holds another run.
        RunError: no checkpoint can be read; a full disk.
        Preempted: SIGTERM arrived during this call.
    """
    workdir = context.workdir
    refuse_sft(workdir)
    if config.checkpoint.export or config.checkpoint.push:
        hf_write.check_place(workdir / "export")
    inputs = open_inputs(config, cluster.from_first(functools.partial(recorded_date, workdir)))
    config = inputs.config
    read = {"training problems": inputs.fingerprint, "evaluation problems": inputs.evaluation_plan.fingerprint}
    enter_mesh(context, config, inputs.mesh, read | {"weights of config.model.path": inputs.policy.fingerprint})
    with watchdog.phase("start"):
        return _start(inputs, context)


@dataclass(frozen=True)
class _Parts:
    """What the state that a run begins with is made of."""

    inputs: RunInputs
    training: LearnerPrograms
    context: RunContext


def _start(inputs: RunInputs, context: RunContext) -> tuple[Run, TrainState]:
    """Claims the folder, puts the parts together, and brings them to where the first step can begin."""
    workdir, console, stack = context
    config, policy, plan = inputs.config, inputs.policy, inputs.evaluation_plan
    # Making these two checks slots, mesh, the objective's settings and LoRA's targets, before anything is written.
    sizes = {"longest_prompt": inputs.longest_prompt, "total_steps": inputs.total_steps}
    training = LearnerPrograms(config, policy.cfg, inputs.mesh, **sizes)
    # Processes of a team need equally many pages.
    memory = cluster.from_first(functools.partial(chips.known_bytes, inputs.mesh.devices.flat[0]))
    memory = memory and memory - training.resident_bytes
    sampler = open_run_programs(config, policy.cfg, inputs.mesh, policy.eos_ids, inputs.longest_prompt, plan, memory)
    resumes, still_ours = claim_folder(context, config, check_workdir, prepare_workdir)
    if not resumes:
        ending.remove_finished(workdir)  # left by a run that this one replaces
    if config.checkpoint.push:  # so that no run is refused at its end
        cluster.from_first(functools.partial(hub.open_repository, config.checkpoint.push, hub.SETTING, config))
    is_igrpo = config.algorithm.num_drafts > 0 and config.algorithm.second_stage == "refine"
    title = "iGRPO run" if is_igrpo else "Run"
    with showing_waits(console.waiting):
        engine = Engine(policy.cfg, inputs.mesh, page_count.fitted(sampler))
    scheduler = Scheduler(engine, config.rollout.dispatches_ahead)
    console.table(title, overview.before(config, inputs, engine, training, workdir))
    verifier = stack.enter_context(_verifier(config, workdir, inputs.total_steps, engine.team))
    checkpointer = stack.enter_context(Checkpointer(workdir, config.checkpoint))
    latest = _latest_step(workdir, checkpointer, resumes)
    if latest != inputs.total_steps:
        first = _first_program_shapes(inputs, engine, latest)
        warms_up = latest is None and config.warm_start.steps > 0
        update = lambda: training.program_shapes
        tell = lambda: console.table("Memory", overview.memory(engine, training))
        stack.enter_context(compiling(first, engine.program_shapes, update, console.phase, tell, warms_up))
    stack.enter_context(showing_waits(console.waiting))
    parts = _Parts(inputs, training, context)
    begun = _new_run(parts) if latest is None else _resumed(parts, checkpointer, latest)
    run = Run(
        config=config,
        workdir=workdir,
        inputs=inputs,
        learner=begun.learner,
        engine=engine,
        rollout=Rollout(config, inputs.renderer, scheduler, verifier),
        evaluator=Evaluator(config, plan, scheduler, inputs.renderer, verifier, console),
        writer=begun.writer,
        checkpointer=checkpointer,
        console=console,
        resumed_after=begun.resumed_after,
        progress=begun.progress,
        check_lock=still_ours,
    )
    run = _recorded(run) if resumes else run
    console.start(inputs.total_steps, run.resumed_after, config.log.every, run.writer.history, run.progress.scores)
    _evaluate_start(run, begun.state, is_new=latest is None)
    return run, begun.state


def _verifier(config: Config, workdir: Path, total_steps: int, team: Team) -> Verifier:
    """Returns the verifier, whose judge keeps its verdicts in `workdir`; entering it starts the workers.

    Args:
        team: the team of this process, whose share of the judge's budget is that of its prompts, rounded up.
    """
    judge, count = config.rewards.judge, config.prompts_per_step
    share = -(-judge.budget * len(team.positions(count)) // count)
    rewards = replace(config.rewards, judge=replace(judge, budget=judge.budget and max(1, share)))  # 0 has no limit
    limit, name = config.rollout.max_completion_length, config.data.answer_name
    return Verifier(rewards, limit, name, workdir / "judge.sqlite", total_steps, jax.process_index())


def _latest_step(workdir: Path, checkpointer: Checkpointer, resumes: bool) -> int | None:
    """Returns the step of the newest checkpoint, None for a new run.

    Raises:
        InputError: a run was here before, and its checkpoints are gone.
    """
    latest = cluster.from_first(lambda: checkpointer.latest_step() if resumes else None)
    if resumes and latest is None and has_samples(workdir):
        raise InputError(f"--workdir {workdir}: holds samples of a run but no checkpoint of it; give another folder")
    return latest


def _resumed(parts: _Parts, checkpointer: Checkpointer, latest: int) -> Beginning:
    """Returns what the newest checkpoint holds, of the step `latest`; refuses one that the configuration does not
    fit."""
    inputs, (workdir, console, stack) = parts.inputs, parts.context
    with console.phase(f"restoring step {latest}"):
        step, state, meta = checkpointer.restore(parts.training.state)
        _check_data(inputs, workdir, meta["data"])
        resuming.check_not_past_end(inputs.config, inputs.total_steps, workdir, step)
    learner = _learner(parts)  # which may refuse weights, so before anything is dropped
    progress = Progress.from_meta(meta, int(state.skipped))
    # Rows and samples of steps after the checkpoint are dropped here, because those steps are run again.
    writer = stack.enter_context(Writer(workdir, inputs.config, step, NULLABLE))
    # An evaluation after the checkpoint was saved is only in the rows.
    progress.recall(cluster.from_first(lambda: writer.scores))
    resuming.tell_lost_rows(writer.rows, meta["metrics_rows"], step, console)
    before = meta.get("total_steps", inputs.total_steps)
    if told := resuming.new_schedule(inputs.config, before, inputs.total_steps, step):
        console.message(told)
    told = resuming.changed_rewards(meta.get("rewards", {}), inputs.reward_sources, step)
    if told and step < inputs.total_steps:
        console.message(told)
    return Beginning(step, learner, state, progress, writer)


def _first_program_shapes(inputs: RunInputs, engine: Engine, latest: int | None) -> ProgramShapes:
    """Returns the programs that the first dispatch needs after the step `latest`; `latest` is None for a new run."""
    if latest is None and inputs.config.evaluation.every:
        return engine.first_program_shapes(*inputs.evaluation_plan.first(inputs.config))
    algorithm, prompts = inputs.config.algorithm, inputs.step_prompts((latest or 0) + 1)
    drafts = algorithm.drafts_in((latest or 0) + 1)
    samples = drafts or algorithm.num_generations
    if drafts and algorithm.draft_early_stop:
        samples = 1
    return engine.first_program_shapes([len(prompt.tokens) for prompt in prompts], samples)


def _recorded(run: Run) -> Run:
    """Records the settings with which a run is resumed; of one that is finished, evaluations keep those they had.

    Returns:
        The run with the settings that are recorded.
    """
    config, workdir, step = run.config, run.workdir, run.resumed_after
    if step == run.inputs.total_steps:
        made = freeze(cluster.from_first(lambda: to_dict(read_config(workdir))))
        if not any(replace(run, config=each).lacks_evaluation(step) for each in (made, config)):
            if told := resuming.unused_settings(made, config, workdir):
                run.console.message(told)
            config = replace(config, evaluation=made.evaluation)
    cluster.from_first(functools.partial(_record_resume, workdir, config))
    return replace(run, config=config)


def _record_resume(workdir: Path, config: Config) -> None:
    """Records that the run in `workdir` is resumed with the settings `config`."""
    ending.remove_finished(workdir)
    record_settings(workdir, config)


def _check_data(inputs: RunInputs, workdir: Path, fingerprint: str) -> None:
    """Raises InputError if the training set is not the one that the run began with."""
    if fingerprint == inputs.fingerprint:
        return
    config = inputs.config
    date, day = config.data.template_date, ""
    if date:
        day = (
            f" (the chat template writes the date, here config.data.template_date = {date!r}; if the run began on "
            f"another day, give that day and put it into {workdir}/config.json)"
        )
    raise InputError(
        f"config.data.train = {config.data.train!r}: its prompts or answers differ from those that the run in "
        f"{workdir} started with{day}; restore {origin(config)}, the tokenizer, its chat template and the version "
        "of igrpo_jax, or start a new run with another --workdir"
    )


def _new_run(parts: _Parts) -> Beginning:
    """Returns what a new run begins with."""
    inputs, config, (workdir, console, stack) = parts.inputs, parts.inputs.config, parts.context
    writer = stack.enter_context(Writer(workdir, config, nullable=NULLABLE))
    weights.record_first(inputs.policy, workdir)
    params, lora = None, config.model.lora.rank > 0
    if not (lora and inputs.policy.path):  # LoRA on a real model reads it once, as the weights that stay fixed
        params = weights.load(inputs.policy, inputs.mesh, config.seed, "float32", console)
        if config.warm_start.steps:
            params = _warm(inputs, params, writer, console)
    learner = _learner(parts, params)
    state = learner.init(weights.adapters(config, inputs.policy, inputs.mesh) if lora else params)
    return Beginning(0, learner, state, Progress(), writer)


def _learner(parts: _Parts, params: decoder.Params | None = None) -> Learner:
    """Returns the learner with the weights that no update changes: those that LoRA adapts, and those of the reference.

    Args:
        params: the weights that a new run starts from; None to read them from the model's files or workdir/reference.
    """
    inputs, config, (workdir, console, _) = parts.inputs, parts.inputs.config, parts.context
    first = functools.partial(
        weights.first, config, inputs.policy, workdir, inputs.mesh, console=console, params=params
    )
    lora = config.model.lora.rank > 0
    frozen, reference = first(config.model.dtype) if lora else {}, None
    if config.algorithm.beta > 0:
        reference = weights.adapters(config, inputs.policy, inputs.mesh) if lora else first("float32")
    return Learner(parts.training, frozen=frozen, reference=reference)


def _warm(inputs: RunInputs, params: decoder.Params, writer: Writer, console: Console) -> decoder.Params:
    """Returns `params` after the warm start on the built-in task."""
    config = inputs.config
    problems, _ = TASKS[config.data.task].problems(config)
    with console.phase("warm start", config.warm_start.steps) as update:

        def report(step: int, loss: float) -> None:
            update(step, f"loss {loss:.3f}")
            if step % max(1, config.warm_start.steps // 20) == 0:
                writer.write(0, {"warm_start/step": step, "warm_start/loss": loss})

        encode = inputs.policy.encode_completion
        return warm_start(config, inputs.policy.cfg, inputs.mesh, params, problems, inputs.renderer, encode, report)


def _evaluate_start(run: Run, state: TrainState, is_new: bool) -> None:
    """Evaluates and saves a new run before its first step; in a resumed run, makes up for an evaluation it lacks."""
    step = run.resumed_after
    if run.lacks_evaluation(step):
        with run.saving_at_end(step, state):  # the answers so far belong to this state
            run.evaluate(state.params, step)
    if is_new:
        run.save(step, state)
