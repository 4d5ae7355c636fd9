"""The warm start of the built-in model, so that reinforcement learning has something to improve.

The loss is the cross-entropy on solutions by a noisy teacher (`data.builtin`). Some examples show a draft
in the prompt, in the form of Stage 2, so that the model has seen one. A model from files never gets a warm start.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from igrpo_jax.config import Config
from igrpo_jax.data.builtin import TASKS, Problem, is_right
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.programs import Program, length_buckets, pick_bucket
from igrpo_jax.learning import packing
from igrpo_jax.learning.optimizer import state_shardings
from igrpo_jax.learning.packing import MicroBatch, Piece, TrainBatch, Unit
from igrpo_jax.learning.supervised import imitated
from igrpo_jax.models import attention, decoder
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.logprobs import chunk_positions, packed_logprobs
from igrpo_jax.models.segments import BLOCK


def warm_start(
    config: Config,
    cfg: DecoderConfig,
    mesh: jax.sharding.Mesh,
    params: decoder.Params,
    problems: Sequence[Problem],
    renderer: Renderer,
    encode: Callable[[str], np.ndarray],
    report: Callable[[int, float], None],
) -> decoder.Params:
    """Returns `params` after config.warm_start.steps supervised steps.

    Args:
        encode: maps the text of a completion to ids [T] int32, EOS included.
        report: is called with (step from 1, mean loss in nats per token).
    """
    settings = config.warm_start
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, settings.steps // 10, settings.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.0))
    rng = np.random.default_rng([config.seed, 0x5757])
    chunk = chunk_positions(config.learner.logprob_chunk, cfg.vocab_size, mesh)

    def loss(params, batch):
        logprob, _ = packed_logprobs(
            cfg,
            params,
            batch.tokens,
            batch.targets,
            batch.segments,
            batch.completion_tokens,
            dtype=config.model.dtype,
            temperature=1.0,
            chunk=chunk,
            remat="logits",
        )
        return -jnp.sum(jnp.where(batch.mask, logprob, 0.0)) / jnp.sum(batch.mask)

    def step(params, opt_state, batch):
        mean_loss, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, mean_loss

    shapes = {path: x.shape for path, x in params.items()}
    moments = state_shardings(mesh, jax.eval_shape(optimizer.init, params), shapes)
    shardings = {path: x.sharding for path, x in params.items()}, moments
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, None))
    program = Program("warm start", jitted, lambda size: (params, opt_state, batch), mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=moments)(params)
    for number in range(1, settings.steps + 1):
        # Prompts with a draft are twice as long; a batch holds one kind only, so that there are few sizes of it.
        shows_draft = config.algorithm.num_drafts > 0 and rng.random() < settings.draft_fraction
        rows = [_example(config, rng, problems, renderer, encode, shows_draft) for _ in range(settings.batch_size)]
        batch = sharding.to_global_batch(_pack(cfg, rows, sharding.batch_shards(mesh)), mesh)
        params, opt_state, mean_loss = program(params, opt_state, batch, shape=batch.tokens.shape[-1:])
        report(number, float(mean_loss))
    return params


def _example(config: Config, rng: np.random.Generator, problems, renderer: Renderer, encode, shows_draft: bool) -> Unit:
    """Returns one example: a context with its completion."""
    problem = problems[int(rng.integers(len(problems)))]
    draft, completion = TASKS[config.data.task].example(config, problem, shows_draft, rng)
    context = renderer.plain(problem.question)
    if draft is not None:
        context = renderer.with_draft(problem.question, encode(draft), is_right(problem, draft))
    return Unit(context, (imitated(encode(completion)),), np.zeros(1))


def _pack(cfg: DecoderConfig, units: Sequence[Unit], shards: int) -> TrainBatch:
    """Returns the host arrays of a batch whose examples are dealt out to the shards.

    Raises:
        InputError: they are more than attention takes.
    """
    dealt = [[Piece(unit, 0, 1) for unit in units[i::shards]] for i in range(shards)]
    longest = max(sum(piece.unit.tokens for piece in pieces) for pieces in dealt)
    size = pick_bucket(length_buckets(1 << 24, BLOCK), longest)
    attention.check_tokens(cfg.attention, size, f"config.warm_start.batch_size = {len(units)}")
    return packing.fill(MicroBatch(size, dealt), cfg.mamba.chunk_size if cfg.mamba else None)
