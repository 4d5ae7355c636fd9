"""What a run is made of, read and checked before anything is written: model files, problems, prompts, mesh.

Not here: weights (`weights`), and what lives while a run goes on (`train`).
"""

import functools
import hashlib
import importlib.util
import json
from dataclasses import dataclass, replace

import jax

from igrpo_jax import data, evaluation, sharding, trackers
from igrpo_jax.batch import Prompt
from igrpo_jax.config import Config, InputError, Log
from igrpo_jax.models import attention, decoder
from igrpo_jax.models.config import ModelConfig
from igrpo_jax.policy import Policy, open_policy
from igrpo_jax.prompts import Renderer
from igrpo_jax.rewards import reward
from igrpo_jax.sampling.engine import Engine


@dataclass(frozen=True)
class Task:
    """What is read and checked before anything is written: model, problems, prompts, mesh."""

    config: Config
    policy: Policy
    renderer: Renderer
    mesh: jax.sharding.Mesh
    prompts: list[Prompt]
    skipped: int  # training prompts longer than config.data.max_prompt_length
    notes: list[tuple[str, str]]  # what was found in the training set
    evaluated: evaluation.Plan
    max_context: int  # tokens of the longest q or q' in training
    total_steps: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the training prompts and answers in their order; a resume needs the same ones."""
        text = json.dumps([(prompt.tokens.tolist(), prompt.answer) for prompt in self.prompts])
        return hashlib.sha256(text.encode()).hexdigest()

    def step_prompts(self, step: int, redraw: int = 0) -> list[Prompt]:
        """The prompts of `step` (from 1), or those of its redraw 1, 2, …: a pure function of them and the seed."""
        c, count = self.config, len(self.prompts)
        if redraw:
            indices = data.redraw_indices(step - 1, redraw, c.prompts_per_step, count, c.seed)
        else:
            indices = data.step_indices(step - 1, c.prompts_per_step, count, c.seed)
        return [self.prompts[i] for i in indices]


def open_task(c: Config) -> Task:
    """Reads model files (not weights) and problems, and checks that they fit together."""
    reward.check(c.rewards)
    trackers.check(c.log)
    check_profiler(c.log)
    policy = open_policy(c.model)
    renderer = Renderer(policy.tokenizer, c.data, c.refine, c.draft_limit, policy.eos_ids)
    held_out = data.evaluation_rows(c) if c.evaluation.every or c.data.clean else {}
    training = data.training_set(c, held_out)
    kept, skipped = data.fit(training.rows, renderer.plain, c.data.max_prompt_length)
    prompts = [Prompt(row.id, row.index, row.question, row.answer, tokens, row.columns) for row, tokens in kept]
    max_context = max(len(prompt.tokens) for prompt in prompts)
    max_context += renderer.draft_overhead(c.rollout.max_completion_length) if c.algorithm.num_drafts else 0
    context = policy.model.max_position_embeddings
    check_context(c, context, max_context)
    asked = data.asked(held_out, c.evaluation.limit) if c.evaluation.every else {}
    evaluated = evaluation.plan(c, asked, renderer, context)
    mesh = sharding.make_mesh(c.mesh)
    policy = replace(policy, model=fitted(c, policy.model, mesh, max_context, evaluated))
    shards = sharding.batch_shards(mesh)
    if c.warm_start.steps and c.warm_start.batch_size % shards:
        raise InputError(
            f"config.warm_start.batch_size = {c.warm_start.batch_size}: must be a multiple of mesh.data x mesh.fsdp = "
            f"{shards}, over which a batch is split"
        )
    steps = c.steps or max(1, int(c.epochs * len(prompts) / c.prompts_per_step))
    return Task(c, policy, renderer, mesh, prompts, skipped, training.notes, evaluated, max_context, steps)


def check_profiler(settings: Log) -> None:
    """Raises InputError where JAX's profiler would end the process: it asks libtpu's, which crashes without a TPU."""
    if not settings.profile_steps or jax.config.jax_platforms or jax.default_backend() == "tpu":
        return
    if importlib.util.find_spec("libtpu"):
        raise InputError(
            f"config.log.profile_steps = {settings.profile_steps}: libtpu is installed and there is no TPU, where "
            "JAX's profiler crashes; export JAX_PLATFORMS=cpu, or cuda, or profile no step"
        )


def check_context(c: Config, context: int, max_context: int) -> None:
    """Raises InputError where the longest q or q', of `max_context` tokens, and a completion exceed the model's."""
    tokens = max_context + c.rollout.max_completion_length
    if tokens > context:
        raise InputError(
            f"config.rollout.max_completion_length: prompt, draft and completion may reach {tokens} tokens, the "
            f"model's context is {context}; lower rollout.max_completion_length, data.max_prompt_length or "
            "refine.max_draft_length"
        )


def fitted(
    c: Config, model: ModelConfig, mesh: jax.sharding.Mesh, max_context: int, evaluated: evaluation.Plan
) -> ModelConfig:
    """`model` with the attention of a run on `mesh`. Raises InputError where the mesh does not divide it."""
    sharding.check_divides(mesh, decoder.shapes(model))
    longest = max(max_context + c.rollout.max_completion_length, evaluated.max_context)
    chosen = attention.choose(c.learner.attention, mesh, c.model.dtype, model.head_dim, longest)
    return replace(model, attention=chosen)


def sampler(
    c: Config,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    eos_ids: tuple[int, ...],
    max_context: int,
    evaluated: evaluation.Plan,
) -> Engine:
    """The engine of a run, large enough for training and for what is evaluated in it."""
    return Engine(
        model,
        mesh,
        eos_ids,
        slots=c.rollout.slots,
        max_context=max(max_context, evaluated.max_context),
        max_completion=max(c.rollout.max_completion_length, evaluated.max_completion),
        length=max(max_context + c.rollout.max_completion_length, evaluated.length),
        dtype=c.model.dtype,
        steps_per_dispatch=c.rollout.steps_per_dispatch,
    )
