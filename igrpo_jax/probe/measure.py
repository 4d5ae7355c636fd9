"""Measures a model on its problems: starts its parts, draws answers, computes gradients, and concludes."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_jax.data.order import step_indices
from igrpo_jax.distributed import chips
from igrpo_jax.distributed.compiling import compiling
from igrpo_jax.distributed.programs import showing_waits
from igrpo_jax.errors import RunError
from igrpo_jax.evaluation import measures
from igrpo_jax.learning import objectives
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.models import decoder, lora
from igrpo_jax.outputs import weights
from igrpo_jax.outputs.console import Console
from igrpo_jax.probe import answers, estimates, gradients, page
from igrpo_jax.probe.answers import Answered, Answers
from igrpo_jax.probe.conclusion import Setting, along_plain, conclude
from igrpo_jax.probe.estimates import UNKNOWN, Estimate
from igrpo_jax.probe.gradients import Gradients, Measured, learner_config
from igrpo_jax.records import Prompt
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.sampling import page_count
from igrpo_jax.sampling.configured import with_slots_for
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.sampling.programs import SamplerPrograms
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.session.run_inputs import RunInputs, open_run_programs

NAMED = 5  # ids of problems that are left out, in a message


@dataclass(frozen=True)
class ProbeInputs:
    """What is measured, and on which model."""

    inputs: RunInputs
    run: Path | None  # folder of the run whose model this is; None for other models
    step: int | None  # the step of the run's checkpoint
    problems: int  # at most
    samples: int  # K, plain answers to each
    gradients: int  # problems whose gradients are compared, at most

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts that the run would read first."""
        every = self.inputs.prompts
        return [every[i] for i in step_indices(0, min(self.problems, len(every)), len(every), self.inputs.config.seed)]


def programs(asked: ProbeInputs) -> tuple[LearnerPrograms, SamplerPrograms]:
    """Returns what computes gradients, and what samples, with no more slots than the plain answers need.

    Raises:
        InputError: settings that do not fit the model or the devices.
    """
    inputs, config, policy = asked.inputs, asked.inputs.config, asked.inputs.policy
    sizes = {"longest_prompt": inputs.longest_prompt, "total_steps": 1}
    training = LearnerPrograms(learner_config(config), policy.cfg, inputs.mesh, **sizes)
    memory = chips.known_bytes(inputs.mesh.devices.flat[0])
    memory = memory and memory - training.resident_bytes
    config = with_slots_for(config, inputs.mesh, len(asked.prompts) * asked.samples)
    plan = inputs.evaluation_plan
    sampler = open_run_programs(config, policy.cfg, inputs.mesh, policy.eos_ids, inputs.longest_prompt, plan, memory)
    return training, sampler


def measure(
    asked: ProbeInputs,
    training: LearnerPrograms,
    sampler: SamplerPrograms,
    folder: Path,
    console: Console,
    stack: contextlib.ExitStack,
) -> tuple[list[Answered], list[Measured]]:
    """Returns the problems that lack nothing, and what was measured of each of them.

    Args:
        training, sampler: what `programs` returned.
        folder: holds what an earlier launch has drawn and computed.
        stack: gets what must be closed.

    Raises:
        RunError: every problem lacks something.
    """
    inputs, config, prompts = asked.inputs, asked.inputs.config, asked.prompts
    stack.enter_context(showing_waits(console.waiting))
    engine = Engine(inputs.policy.cfg, inputs.mesh, page_count.fitted(sampler))
    name, limit = config.data.answer_name, config.rollout.max_completion_length
    verifier = stack.enter_context(
        Verifier(config.rewards, limit, name, folder / "judge.sqlite", max_steps=inputs.total_steps)
    )
    first = engine.first_program_shapes([len(prompt.tokens) for prompt in prompts], asked.samples)
    stack.enter_context(compiling(first, engine.program_shapes, None, console.phase, lambda: None))
    params, frozen = _weights(asked, console)
    scheduler = Scheduler(engine, config.rollout.dispatches_ahead)
    drawn = Answers(config, inputs.renderer, scheduler, verifier, console, folder, asked.samples)
    everyone = drawn.collect(lora.attach(frozen, params, config.model.lora.scaling), prompts)
    answered = [problem for problem in everyone if not problem.lacks]
    if not answered:
        fix = "see whether the judge and the reward functions reply, then give another --workdir"
        raise RunError(f"no problem can be counted: {left_out(everyone)}; {fix}")
    if len(answered) < len(everyone):
        console.message(f"left out: {left_out(everyone)}")
    return answered, Gradients(training, params, frozen, console, folder).measure(answered, asked.gradients)


def left_out(everyone: Sequence[Answered]) -> str:
    """Returns which problems cannot be counted, and why; the first NAMED of each kind by their ids."""
    ids: dict[str, list[str]] = {}
    for problem in everyone:
        if problem.lacks:
            ids.setdefault(problem.lacks, []).append(problem.prompt.id)
    named = lambda of: ", ".join(of[:NAMED]) + (", ..." if len(of) > NAMED else "")
    return "; ".join(f"{len(of)} without {lacks} ({named(of)})" for lacks, of in ids.items())


def _weights(asked: ProbeInputs, console: Console) -> tuple[decoder.Params, decoder.Params]:
    """Returns what is trained, in float32, and what LoRA adapts, {} without LoRA."""
    inputs, config = asked.inputs, asked.inputs.config
    if asked.run is not None:
        saved, _ = weights.saved(config, inputs.policy, asked.run, inputs.mesh, console, asked.step, "float32")
        frozen, trained = lora.detach(saved)
        return trained, frozen
    if config.model.lora.rank:
        frozen = weights.load(inputs.policy, inputs.mesh, config.seed, config.model.dtype, console)
        return weights.adapters(config, inputs.policy, inputs.mesh), frozen
    return weights.load(inputs.policy, inputs.mesh, config.seed, "float32", console), {}


def plan(asked: ProbeInputs) -> list[tuple[str, object]]:
    """Returns the rows of the table that is printed before the first answer."""
    inputs, config, algorithm = asked.inputs, asked.inputs.config, asked.inputs.config.algorithm
    name = f"{inputs.policy.path or 'built-in'}, {inputs.policy.cfg.num_params / 1e6:,.1f} M parameters"
    size, count = algorithm.num_generations, len(asked.prompts)
    kept = f"each the {algorithm.draft_selection} of {algorithm.num_drafts}"
    return [
        ("model", f"{name}, {config.model.dtype}"),
        ("problems", f"{count:,} of {len(inputs.prompts):,}"),
        *inputs.notes,
        ("plain answers", f"{asked.samples} to each problem, of up to {config.rollout.max_completion_length:,} tokens"),
        ("refinements", f"{size} of a right and {size} of a wrong draft, {kept}"),
        ("gradients", f"of {min(count, asked.gradients):,} problems; of all {count:,} how much they rely on drafts"),
    ]


def finish(
    inputs: RunInputs,
    folder: Path,
    head: dict[str, Any],
    answered: Sequence[Answered],
    measured: Sequence[Measured],
    console: Console,
) -> dict[str, Any]:
    """Writes and prints the figures and the conclusion; returns what probe.json holds."""

    config, algorithm = inputs.config, inputs.config.algorithm
    scale = objectives.resolve(algorithm).scale_rewards
    samples = len(answered[0].plain)
    sizes = algorithm.num_drafts, algorithm.num_generations
    setting = Setting(len(answered), samples, *sizes, scale, algorithm.draft_selection)
    figures = all_figures(inputs, answered, measured, scale)
    conclusion = conclude(figures, setting)
    compared = sum(bool(each.sketches) for each in measured)
    about = {**head, "data": config.data.train or "the built-in task", "gradients": compared}
    summary = page.write(folder, about, setting, figures, conclusion, answered)
    for section, lines in page.table(figures).items():
        if lines:
            console.table(section, lines)
    console.message("\n".join([f"conclusion: {conclusion.answer}", *(f"  {reason}" for reason in conclusion.reasons)]))
    return summary


def all_figures(
    inputs: RunInputs, answered: Sequence[Answered], measured: Sequence[Measured], scale: str
) -> dict[str, Estimate]:
    """Returns every figure of a probe by name."""
    config, algorithm = inputs.config, inputs.config.algorithm
    figures = estimates.estimate(answers.counts(answered, algorithm.num_drafts), scale)
    sampled = inputs.total_steps * config.prompts_per_step * (algorithm.num_drafts + algorithm.num_generations)
    figures["successes"] = figures["p"].times(sampled)
    for name, values in answers.texts(answered, config.draft_limit).items():
        known = values[~np.isnan(values)]
        bounds = (0.0, float(config.rollout.max_completion_length)) if name.startswith("length") else (0.0, 1.0)
        figures[name] = Estimate(float(known.mean()), *measures.interval(known, bounds)) if len(known) else UNKNOWN
    figures |= gradients.reliance(answered, measured)
    compared = [each.sketches for each in measured if each.sketches]
    if compared:
        kinds = {kind: np.stack([sketches[kind] for sketches in compared]) for kind in gradients.KINDS}
        figures["cosine"] = gradients.cosine(kinds["plain"], kinds["refine"])
        figures["cosine_credited"] = gradients.cosine(kinds["plain"], kinds["credited"])
        if figures["cosine"].is_known:
            figures["along"] = along_plain(figures["ratio"], figures["cosine"])
    return figures
