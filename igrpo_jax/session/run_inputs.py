"""What a run is made of, read and checked before anything is written: model files, problems, prompts, mesh.

Not here: weights (`outputs.weights`), and what lives during a run (`session.run`).
"""

import difflib
import functools
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass, replace
from typing import Any

import jax

from igrpo_jax.config import Config, LogConfig
from igrpo_jax.data import order, problems
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import planning
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.policy import Policy, fit_to_mesh, open_model
from igrpo_jax.outputs import trackers
from igrpo_jax.records import Prompt
from igrpo_jax.rewards import functions, verifier
from igrpo_jax.sampling.configured import open_programs
from igrpo_jax.sampling.programs import SamplerPrograms
from igrpo_jax.session import rehearsal

COLUMNS = "columns of the data"  # stands for these among the modules of custom rewards; no module has such a name


@dataclass(frozen=True)
class RunInputs:
    """What is read and checked before anything is written: model, problems, prompts, mesh."""

    config: Config
    policy: Policy
    renderer: Renderer
    mesh: jax.sharding.Mesh
    prompts: list[Prompt]
    skipped: int  # training prompts longer than config.data.max_prompt_length
    notes: list[tuple[str, str]]  # findings in the training set, and what rewards gave at their first call
    evaluation_plan: planning.Plan
    longest_prompt: int  # tokens of the longest q or q' in training
    total_steps: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the training prompts and answers in their order; a resume needs the same ones."""
        text = json.dumps([(prompt.tokens.tolist(), prompt.answer) for prompt in self.prompts])
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def reward_sources(self) -> dict[str, str]:
        """Hashes of the files of custom rewards, by module, and of the columns that these get, by COLUMNS; a resume
        tells where they are others.
        """
        rewards = verifier.custom_rewards(self.config.rewards, self.config.data.answer_name)
        if not rewards:
            return {}
        columns = hashlib.sha256()
        for prompt in self.prompts:
            columns.update(json.dumps(prompt.columns, sort_keys=True, default=_described).encode())
        return {**functions.sources(rewards), COLUMNS: columns.hexdigest()}

    def step_prompts(self, step: int, redraw: int = 0) -> list[Prompt]:
        """Returns the prompts of `step` (from 1), or of its redraw 1, 2, …; they depend only on these and the seed."""
        config, count = self.config, len(self.prompts)
        batch = config.algorithm.batches_until(step) - 1
        if redraw:
            indices = order.redraw_indices(batch, redraw, config.prompts_per_step, count, config.seed)
        else:
            indices = order.step_indices(batch, config.prompts_per_step, count, config.seed)
        return [self.prompts[i] for i in indices]


def _described(value: Any) -> str:
    """Returns a cell that is not JSON, such as a time or an image, as Python prints it, without its place in memory."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def origin(config: Config) -> str:
    """Returns in words what decides which problems are trained on, for a resume that must bring them back."""
    if not config.data.clean:
        return "the problems"
    return (
        "the problems, config.evaluation.benchmarks and config.evaluation.data_dir (what they ask, config.data.clean = "
        "True leaves out)"
    )


def open_inputs(config: Config, recorded_date: str | None = None) -> RunInputs:
    """Reads model files (not weights) and problems, and checks that they fit together.

    Args:
        recorded_date: the day that the run has recorded for its chat template (`recorded_date` of `outputs.workdir`).

    Raises:
        InputError: a file cannot be used, or the settings do not fit the model, the problems or the devices.
        RunError: the judge gives no verdict.
    """
    verifier.check(config.rewards, jax.process_index())
    budget = rehearsal.checked_budget(config)
    trackers.check(config.log)
    check_profiler(config.log)
    config, policy, renderer = open_model(config, recorded_date)
    held_out = problems.evaluation_rows(config) if config.evaluation.every or config.data.clean else {}
    training = problems.training_set(config, held_out)
    kept, skipped = problems.fit(training.rows, renderer.plain, config.data.max_prompt_length)
    prompts = [Prompt(row.id, row.index, row.question, row.answer, tokens, row.columns) for row, tokens in kept]
    check_prompts_per_step(config, len(prompts), skipped)
    longest_prompt = max(len(prompt.tokens) for prompt in prompts)
    if config.algorithm.num_drafts:
        questions = [prompt.question for prompt in prompts]
        longest_prompt += renderer.draft_overhead(config.rollout.max_completion_length, questions)
    max_positions = policy.cfg.max_position_embeddings
    check_positions(config, max_positions, longest_prompt)
    asked = problems.asked(held_out, config.evaluation.limit) if config.evaluation.every else {}
    evaluation_plan = planning.make_plan(config, asked, renderer, max_positions)
    check_best_metric(config, evaluation_plan)
    batches = order.steps_of_epochs(config.epochs, config.prompts_per_step, len(prompts))
    steps = config.steps or batches * (2 if config.algorithm.alternate else 1)
    notes = training.notes + rehearsal.rehearsed_rewards(config, prompts, policy, renderer.opening, steps)
    notes += rehearsal.rehearsed_judge(config, prompts[0], renderer.opening) + budget
    mesh = sharding.make_mesh(config.mesh)
    policy = replace(policy, cfg=fit_to_mesh(config, policy.cfg, mesh))
    shards = sharding.batch_shards(mesh)
    if config.warm_start.steps and config.warm_start.batch_size % shards:
        raise InputError(
            f"config.warm_start.batch_size = {config.warm_start.batch_size}: must be a multiple of mesh.data x "
            f"mesh.fsdp = {shards}, over which a batch is split"
        )
    check_profiled(config.log, steps)
    return RunInputs(config, policy, renderer, mesh, prompts, skipped, notes, evaluation_plan, longest_prompt, steps)


def check_prompts_per_step(config: Config, count: int, skipped: int) -> None:
    """Raises InputError if a step needs more prompts than there are: it would hold some of them more than once.

    Args:
        skipped: how many were left out, because they are longer than config.data.max_prompt_length.
    """
    if config.prompts_per_step <= count:
        return
    left, fix = "", "give more problems"
    if skipped:
        limit = f"config.data.max_prompt_length = {config.data.max_prompt_length}"
        left, fix = f" left of {count + skipped} ({limit} leaves out {skipped})", f"raise that limit, or {fix}"
    raise InputError(
        f"config.prompts_per_step = {config.prompts_per_step}: there {'is' if count == 1 else 'are'} {count} training "
        f"problem{'s' * (count > 1)}{left}, so a step would hold some of them more than once; set it to {count} or "
        f"less, or {fix}"
    )


def check_profiler(settings: LogConfig) -> None:
    """Raises InputError if JAX's profiler would end the process: it uses libtpu's, which crashes without a TPU."""
    if not settings.profile_steps or jax.config.jax_platforms or jax.default_backend() == "tpu":
        return
    if importlib.util.find_spec("libtpu"):
        raise InputError(
            f"config.log.profile_steps = {settings.profile_steps}: libtpu is installed but there is no TPU, and "
            "JAX's profiler crashes then; export JAX_PLATFORMS=cpu, or cuda, or profile no step"
        )


def check_profiled(settings: LogConfig, steps: int) -> None:
    """Raises InputError if a step is to be profiled that comes after the last one, `steps`."""
    if settings.profile_steps and max(settings.profile_steps) > steps:
        raise InputError(
            f"config.log.profile_steps = {settings.profile_steps}: the run ends after step {steps}; name steps from 1 "
            f"to {steps}"
        )


def check_best_metric(config: Config, plan: planning.Plan) -> None:
    """Raises InputError, with the nearest right name, where no evaluation writes config.checkpoint.best_metric."""
    name = config.checkpoint.best_metric
    names = planning.metric_names(config, plan)
    if name and name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        fix = f"the nearest is {near[0]!r}" if near else "name a benchmark in evaluation.benchmarks"
        raise InputError(f"config.checkpoint.best_metric = {name!r}: evaluations write no such metric; {fix}")


def check_positions(config: Config, max_positions: int, longest_prompt: int) -> None:
    """Raises InputError if the longest q or q' (`longest_prompt` tokens) and a completion exceed `max_positions`."""
    tokens = longest_prompt + config.rollout.max_completion_length
    if tokens > max_positions:
        raise InputError(
            f"config.rollout.max_completion_length: prompt, draft and completion may reach {tokens} tokens, but the "
            f"model's context is {max_positions}; lower rollout.max_completion_length, data.max_prompt_length or "
            "refine.max_draft_length"
        )


def open_run_programs(
    config: Config,
    cfg: DecoderConfig,
    mesh: jax.sharding.Mesh,
    eos_ids: tuple[int, ...],
    longest_prompt: int,
    plan: planning.Plan,
    memory: float | None,
) -> SamplerPrograms:
    """Returns the sampler's programs of a run, large enough for training and for what is evaluated in it.

    Args:
        plan: that of its evaluations.
        memory: bytes of each device that training leaves to sampling; None = any.
    """
    return open_programs(
        config,
        cfg,
        mesh,
        eos_ids,
        memory,
        longest_prompt=max(longest_prompt, plan.longest_prompt),
        max_completion=max(config.rollout.max_completion_length, plan.max_completion),
        length=max(longest_prompt + config.rollout.max_completion_length, plan.length),
    )
