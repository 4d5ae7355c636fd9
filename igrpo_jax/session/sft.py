"""Supervised fine-tuning (SFT) as a separate run: examples, steps, rows of metrics, checkpoints, and how it resumes.

It imitates the solutions of config.data.train with the settings of a run: `model`, `optimizer`, `learner`, `mesh`,
`steps` or `epochs`, `prompts_per_step` examples a step, `checkpoint` and `log`. A step is one optimizer step whatever
`learner.minibatches` is. Its folder is exported and evaluated like any run's, and the file SFT in it says that
reinforcement learning does not go on there.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.data import order, problems, solutions
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import cluster, preemption, sharding, watchdog
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.distributed.programs import peak_memory, showing_waits
from igrpo_jax.errors import InputError
from igrpo_jax.learning import supervised
from igrpo_jax.learning.credit import Advantages
from igrpo_jax.learning.learner import Learner
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.learning.supervised import Example, ExampleDraft
from igrpo_jax.learning.train_state import TrainState
from igrpo_jax.models.policy import Policy, fit_to_mesh, open_model
from igrpo_jax.outputs import trackers, weights
from igrpo_jax.outputs.checkpoint import Checkpointer
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.files import write_atomically
from igrpo_jax.outputs.workdir import SFT, Claim, check_workdir, prepare_workdir, record_settings, recorded_date
from igrpo_jax.outputs.writer import Writer
from igrpo_jax.records import Prompt
from igrpo_jax.schema.unused import SFT_RUN, unused
from igrpo_jax.session import resuming
from igrpo_jax.session.beginning import Beginning, claim_folder
from igrpo_jax.session.progress import Progress, check_finite
from igrpo_jax.session.run_context import RunContext, enter_mesh, preempted_after, run_context
from igrpo_jax.session.run_inputs import check_prompts_per_step, origin
from igrpo_jax.storage.addresses import names
from igrpo_jax.storage.reading import read_bytes


@dataclass(frozen=True)
class SftInputs:
    """What is read and checked before anything is written."""

    config: Config
    policy: Policy
    renderer: Renderer
    mesh: jax.sharding.Mesh
    examples: list[Example]
    notes: list[tuple[str, str]]
    longest_prompt: int  # tokens of the longest prompt, with a draft in it where drafts are shown
    total_steps: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the examples in their order; a resume needs the same ones."""
        rows = [
            [
                example.prompt.tokens.tolist(),
                example.target.tolist(),
                [(draft.tokens.tolist(), draft.is_right) for draft in example.drafts],
            ]
            for example in self.examples
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def refuse_sft(workdir: Path) -> None:
    """Raises InputError if `workdir` is the folder of an SFT run."""
    if SFT in names(workdir):
        raise InputError(
            f"--workdir {workdir}: holds an SFT run; export it, and train the export (model.path) in another --workdir"
        )


def train_sft(config: Config, workdir: str | Path) -> None:
    """Runs or resumes the SFT that `config` describes in `workdir`.

    Raises:
        InputError: something in `config` or what it names is wrong, or `workdir` holds another run.
        RunError: the run cannot go on: a full disk, or steps that are not finite.
        Preempted: SIGTERM arrived, and what can be resumed is saved.
    """
    with run_context(config, workdir) as context:
        inputs = open_sft(config, cluster.from_first(functools.partial(recorded_date, context.workdir)))
        read = {"examples": inputs.fingerprint, "weights of config.model.path": inputs.policy.fingerprint}
        enter_mesh(context, inputs.config, inputs.mesh, read)
        _run(inputs, context)


def open_sft(config: Config, recorded_date: str | None = None) -> SftInputs:
    """Reads model files (not weights) and solutions, and checks that they fit together.

    Raises:
        InputError: a file cannot be used, or the settings do not fit the model, the solutions or the devices.
    """
    if not (config.model.path and config.data.train):
        raise InputError(
            "config.model.path, config.data.train: SFT needs a model and solutions; the built-in model has a warm "
            "start of its own, config.warm_start.steps"
        )
    trackers.check(config.log)
    config, policy, renderer = open_model(config, recorded_date)
    found, notes = solutions.load_solutions(config, renderer.opening)
    by_row = {each.row.index: each for each in found}
    kept, skipped = problems.fit([each.row for each in found], renderer.plain, config.data.max_prompt_length)
    examples, longest = [], config.rollout.max_completion_length
    for row, tokens in kept:
        each = by_row[row.index]
        target = policy.encode_completion(each.text)
        if len(target) <= longest:
            prompt = Prompt(row.id, row.index, row.question, row.answer, tokens)
            encoded = (ExampleDraft(policy.encode_completion(draft.text), draft.is_right) for draft in each.drafts)
            examples.append(Example(prompt, target, tuple(encoded)))
    if not examples:
        raise InputError(
            f"config.rollout.max_completion_length = {longest}: all {len(kept)} solutions are longer; raise it"
        )
    check_prompts_per_step(config, len(examples), skipped if len(examples) == len(kept) else 0)
    left_out = skipped + len(kept) - len(examples)
    notes += [("too long", f"{left_out:,} of {len(found):,}, left out")] * bool(left_out)
    longest_prompt = max(len(example.prompt.tokens) for example in examples)
    if config.sft.draft_fraction:
        drafts = max((len(draft.tokens) for example in examples for draft in example.drafts), default=0)
        longest_prompt += renderer.draft_overhead(drafts, [example.prompt.question for example in examples])
    max_positions = policy.cfg.max_position_embeddings
    if longest_prompt + longest > max_positions:
        raise InputError(
            f"config.rollout.max_completion_length = {longest}: with prompts of up to {longest_prompt} tokens it "
            f"exceeds the model's context of {max_positions}; lower it, or config.data.max_prompt_length"
        )
    mesh = sharding.make_mesh(config.mesh)
    policy = replace(policy, cfg=fit_to_mesh(config, policy.cfg, mesh))
    steps = config.steps or order.steps_of_epochs(config.epochs, config.prompts_per_step, len(examples))
    return SftInputs(config, policy, renderer, mesh, examples, notes, longest_prompt, steps)


def _run(inputs: SftInputs, context: RunContext) -> None:
    """Claims the folder, restores or creates the state, and runs the steps that are left."""
    config, total, (workdir, console, stack) = inputs.config, inputs.total_steps, context
    sizes = {"longest_prompt": inputs.longest_prompt, "total_steps": total}
    programs = LearnerPrograms(supervised.learner_config(config), inputs.policy.cfg, inputs.mesh, **sizes)
    claim = functools.partial(_claim, inputs)
    resumes, still_ours = claim_folder(context, config, _check, claim)
    console.table("SFT run", _overview(inputs, workdir))
    store = stack.enter_context(Checkpointer(workdir, config.checkpoint))
    stack.enter_context(showing_waits(console.waiting))
    latest = cluster.from_first(lambda: store.latest_step() if resumes else None)
    ended = f"step {total} is in {workdir}; python -m igrpo_jax.export --workdir {workdir} --out HF_DIR"
    if latest != total:
        begun = _begin(inputs, programs, store, latest, context)
        if resumes:
            cluster.from_first(functools.partial(record_settings, workdir, config))
        _steps(inputs, begun, store, still_ours, context)
    console.message(ended)


def _begin(
    inputs: SftInputs, programs: LearnerPrograms, store: Checkpointer, latest: int | None, context: RunContext
) -> Beginning:
    """Returns what the checkpoint of the step `latest` holds, or what a new run begins with where it is None."""
    config, total, (workdir, console, stack) = inputs.config, inputs.total_steps, context
    if latest is None:
        weights.record_first(inputs.policy, workdir)
    frozen = {}
    if config.model.lora.rank:  # other weights are refused before any row is dropped
        frozen = weights.first(config, inputs.policy, workdir, inputs.mesh, config.model.dtype, console)
    learner = Learner(programs, frozen=frozen, reference=None)
    if latest is None:
        state = _first_state(inputs, learner, console)
        return Beginning(0, learner, state, Progress(), stack.enter_context(Writer(workdir, config)))
    with console.phase(f"restoring step {latest}"):
        step, state, meta = store.restore(programs.state)
    resuming.check_not_past_end(config, total, workdir, step)
    made_for = supervised.learner_config(config)
    if told := resuming.new_schedule(made_for, meta.get("total_steps", total), total, step):
        console.message(told)
    writer = stack.enter_context(Writer(workdir, config, step))
    return Beginning(step, learner, state, Progress.from_meta(meta, int(state.skipped)), writer)


def _steps(
    inputs: SftInputs, begun: Beginning, store: Checkpointer, still_ours: Callable[[], None], context: RunContext
) -> None:
    """Runs the steps that are left, and saves the state after those that are due, the last one and a preemption."""
    done, learner, state, progress, writer = begun
    total = inputs.total_steps
    context.console.start(total, done, inputs.config.log.every, writer.history)
    meta_of = lambda step: {"step": step, "total_steps": total} | progress.meta()
    try:
        for step in range(done + 1, total + 1):
            if cluster.any_of(preemption.noted()):
                raise Preempted
            state = _step(inputs, learner, state, step, progress, writer, context.console)
            done = step
            still_ours()
            store.save(step, state, meta_of(step), force=step == total, before=writer.sync)
    except Preempted:
        still_ours()
        store.save(done, state, meta_of(done), force=True, before=writer.sync)
        store.wait()
        raise preempted_after(done, total, context.workdir) from None
    with context.console.phase("writing the last checkpoint"):
        store.wait()
    writer.sync()


def _step(
    inputs: SftInputs,
    learner: Learner,
    state: TrainState,
    step: int,
    progress: Progress,
    writer: Writer,
    console: Console,
) -> TrainState:
    """Makes one step on the examples that (seed, step) choose, and writes its row.

    Raises:
        RunError: config.learner.max_nonfinite_steps steps in a row changed nothing, because loss or gradient was not
            finite.
    """
    config, began = inputs.config, time.perf_counter()
    indices = order.step_indices(step - 1, config.prompts_per_step, len(inputs.examples), config.seed)
    made = supervised.groups(config, [inputs.examples[i] for i in indices], inputs.renderer, step)
    advantages = Advantages([np.ones(1, np.float32)] * len(made), [])
    with watchdog.phase("update", f"step {step}"), watchdog.phase("dispatch"):
        state, learned = learner.update(state, made, advantages.refinements, step)
    row: dict[str, Any] = supervised.metrics(learned, made)
    row |= {"perf/step_time": time.perf_counter() - began, "perf/wall_time": time.time(), **peak_memory()}
    writer.write(step, row)
    skipped, most = round(row["nonfinite_steps"]), config.learner.max_nonfinite_steps
    check_finite(step, skipped, made, advantages, progress, most, writer, console)
    console.step(step, row)
    return state


def _check(workdir: Path, config: Config) -> None:
    """Raises InputError if `workdir` holds another run, or a run of reinforcement learning; writes nothing."""
    present = names(workdir)
    # A launch that was killed before it wrote this file has neither checkpoints nor samples.
    if SFT not in present and present & {"checkpoints", "samples"}:
        raise InputError(f"--workdir {workdir}: holds a run that is not of SFT; give another folder")
    check_workdir(workdir, config)


def _claim(inputs: SftInputs, workdir: Path, config: Config) -> Claim:
    """Claims `workdir` for SFT on these examples.

    Raises:
        InputError: it holds another run, a run of reinforcement learning, or one of SFT on other examples.
    """
    _check(workdir, config)  # again, inside the lock: another process may have begun a run since
    kind, present = workdir / SFT, names(workdir)
    claim = prepare_workdir(workdir, config)
    if claim.resumes and kind.name in present and json.loads(read_bytes(kind))["examples"] != inputs.fingerprint:
        raise InputError(
            f"config.data.train = {inputs.config.data.train!r}: its examples differ from those that the run in "
            f"{workdir} began with; restore {origin(inputs.config)} and the tokenizer, or give another --workdir"
        )
    write_atomically(kind, json.dumps({"examples": inputs.fingerprint}) + "\n")
    return claim


def _first_state(inputs: SftInputs, learner: Learner, console: Console) -> TrainState:
    """Returns the state before the first step."""
    config = inputs.config
    if config.model.lora.rank:
        return learner.init(weights.adapters(config, inputs.policy, inputs.mesh))
    return learner.init(weights.load(inputs.policy, inputs.mesh, config.seed, "float32", console))


def _overview(inputs: SftInputs, workdir: Path) -> list[tuple[str, object]]:
    """Returns the rows of the table that is printed before the first step."""
    config, lora = inputs.config, inputs.config.model.lora
    later = "none in SFT; afterwards python -m igrpo_jax"
    evaluates, exports = config.evaluation.every > 0, config.checkpoint.export or bool(config.checkpoint.push)
    drafts = f"{config.sft.draft_fraction:.0%} of the examples of problems that have one"
    return [
        ("model", f"{config.model.path}, {inputs.policy.cfg.num_params / 1e6:,.1f} M parameters"),
        ("trained", f"LoRA of rank {lora.rank}" if lora.rank else "all weights"),
        ("examples", f"{len(inputs.examples):,}, {config.prompts_per_step} a step, {inputs.total_steps:,} steps"),
        *inputs.notes,
        ("shown with a draft", drafts if config.sft.draft_fraction else "none"),
        ("optimizer", f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}"),
        *(("without effect", text) for text in unused(config, SFT_RUN)),
        *([("evaluation", f"{later}.evaluate --model {workdir} --workdir OUT")] * evaluates),
        *([("export", f"{later}.export --workdir {workdir} --out HF_DIR")] * exports),
        ("workdir", workdir),
    ]
