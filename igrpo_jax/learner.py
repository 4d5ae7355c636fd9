"""The update: packed rows in, new parameters out, one jitted program.

1. `pack` lays the refinements of a step out as rows [context | completion | padding] and cuts them into micro-batches.
   Token weights are computed on all rows of an optimizer step, so that micro-batches are plain addition.
2. `update` scans over micro-batches, adds gradients in float32, and makes one AdamW step on the master weights.
3. With several optimizer steps per rollout, log pi_old is recomputed first, by the function that the loss uses; with
   one it is the policy itself, and its gradient is stopped.

A step whose loss, gradient or update is not finite changes nothing and is counted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from igrpo_jax import algorithms, config, sharding
from igrpo_jax.algorithms import Loss
from igrpo_jax.batch import Group, TrainBatch, length_buckets, pick_bucket
from igrpo_jax.logprobs import completion_logprobs
from igrpo_jax.models import decoder
from igrpo_jax.models.config import ModelConfig


class TrainState(NamedTuple):
    """All that training carries from step to step, on the mesh."""

    params: decoder.Params  # float32 master weights
    opt_state: optax.OptState
    step: jax.Array  # [] int32, optimizer steps tried
    skipped: jax.Array  # [] int32, of these not finite


class Sums(NamedTuple):
    """What a micro-batch adds up; the update divides."""

    loss: Loss
    entropy: jax.Array  # [] float32, over all completion tokens, in nats
    tokens: jax.Array  # [] float32, completion tokens
    mismatch: jax.Array  # [] float32, sum of |log pi_old - sampler's|
    worst_mismatch: jax.Array  # [] float32, the largest of these


def make_optimizer(settings: config.Optimizer, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a global-norm clip; linear warm-up, then a cosine down to min_lr_ratio of the peak."""
    warmup = min(round(settings.warmup_ratio * total_steps), max(total_steps - 1, 0))
    peak, floor = settings.learning_rate, settings.learning_rate * settings.min_lr_ratio

    def schedule(count: jax.Array) -> jax.Array:
        rising = (count + 1) / max(warmup, 1)  # the first step already learns
        along = jnp.clip((count - warmup) / max(total_steps - warmup, 1), 0, 1)
        falling = floor + (peak - floor) * 0.5 * (1 + jnp.cos(jnp.pi * along))
        return jnp.where(count < warmup, peak * rising, falling)

    def decays(params: decoder.Params) -> dict[str, bool]:
        return {path: not path.endswith(("scale", "_bias")) for path in params}

    adamw = optax.adamw(schedule, settings.b1, settings.b2, weight_decay=settings.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw), schedule


class Learner:
    """The jitted update for one model, mesh and objective.

    Args:
        max_context: tokens of the longest q or q'.
        total_steps: rollouts of the whole run, for the learning rate.
        reference: parameters of pi_ref where beta > 0.
    """

    def __init__(
        self,
        c: config.Config,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
        *,
        max_context: int,
        total_steps: int,
        reference: decoder.Params | None = None,
    ):
        self._model, self._mesh, self._settings, self._rollout, self._seed = model, mesh, c.learner, c.rollout, c.seed
        self._dtype, self._reference = c.model.dtype, reference
        self.algorithm = algorithms.resolve(c.algorithm)
        self._iterations = c.algorithm.num_iterations
        self.updates_per_step = c.learner.minibatches * self._iterations
        self._optimizer, self._schedule = make_optimizer(c.optimizer, total_steps * self.updates_per_step)
        self._row_buckets = length_buckets(max_context + c.rollout.max_completion_length, 64)
        self._width_buckets = length_buckets(c.rollout.max_completion_length, 64)
        whole = sharding.replicated(mesh)
        params = {path: sharding.param_sharding(mesh, path) for path in decoder.shapes(model)}
        abstract = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in decoder.shapes(model).items()}
        opt_state = optax.tree.map_params(
            self._optimizer,
            lambda _, place: place,
            jax.eval_shape(self._optimizer.init, abstract),
            params,
            transform_non_params=lambda _: whole,
        )
        self.state_sharding = TrainState(params, opt_state, whole, whole)
        self._batch_sharding = sharding.batch_sharding(mesh, axis=1)
        self._update = jax.jit(
            self._update_program,
            donate_argnums=0,
            out_shardings=(self.state_sharding, whole),
            compiler_options=decoder.remat_options(jax.default_backend()) if c.learner.remat == "full" else None,
        )
        self._score = jax.jit(self._score_program, out_shardings=whole)

    def init(self, params: decoder.Params) -> TrainState:
        """Fresh optimizer state around `params`, which the state takes over."""
        opt_state = jax.jit(self._optimizer.init, out_shardings=self.state_sharding.opt_state)(params)
        zero = lambda: sharding.to_global(np.int32(0), self.state_sharding.step)  # noqa: E731
        return TrainState(params, opt_state, zero(), zero())

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, for a checkpoint to be restored into."""
        shapes = {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in decoder.shapes(self._model).items()}
        count = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(shapes, jax.eval_shape(self._optimizer.init, shapes), count, count)
        place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(place, state, self.state_sharding)

    def update(self, state: TrainState, groups: list[Group], gains: np.ndarray, step: int) -> tuple[TrainState, dict]:
        """All optimizer steps of one rollout.

        Args:
            groups: P of them, G completions each, ordered.
            gains: [P, G] float32 advantages.
            step: of the run; with the seed it decides which rows share a minibatch.

        Returns:
            the new state, and the metrics of the update by TRL's names.
        """
        rows = [(group.context, one) for group in groups for one in group.completions]
        off_policy = self.updates_per_step > 1
        metrics = []
        for iteration in range(self._iterations):
            order = np.arange(len(rows))
            if self._settings.minibatches > 1:
                order = np.random.default_rng([self._seed, step, iteration, 0x313B]).permutation(len(rows))
            parts = np.split(order, self._settings.minibatches)
            if iteration == 0 and off_policy:
                old = self._old_logprobs(state, rows, gains, parts)
            for part in parts:
                batch = self.pack([rows[i] for i in part], gains.reshape(-1)[part])
                if off_policy:
                    batch = self._with_old(batch, [old[i] for i in part])
                state, sums = self._update(state, self._to_device(batch), self._reference)
                metrics.append(sums)
        return state, _mean_metrics(sharding.to_host(metrics))

    def pack(self, rows: list[tuple], advantage: np.ndarray) -> TrainBatch:
        """Host arrays [M, R, ...] of one optimizer step; rows of padding have length and weight 0.

        Args:
            rows: (context [L] int32, Completion) each.
            advantage: [rows] float32.
        """
        lengths = np.array([len(one.tokens) for _, one in rows])
        size = pick_bucket(self._row_buckets, max(len(context) + len(one.tokens) for context, one in rows))
        width = pick_bucket(self._width_buckets, int(lengths.max()))
        finished = np.array([one.finished for _, one in rows])
        budget = self._rollout.max_completion_length
        weight = algorithms.token_weights(self.algorithm, lengths, finished, budget, width)
        shards = sharding.batch_shards(self._mesh)
        per_micro = max(1, self._settings.tokens_per_microbatch // size // shards) * shards
        per_micro = min(per_micro, -(-len(rows) // shards) * shards)
        micros = -(-len(rows) // per_micro)
        total = micros * per_micro
        batch = TrainBatch(
            tokens=np.zeros((total, size), np.int32),
            context_length=np.zeros((total,), np.int32),
            completion_length=np.zeros((total,), np.int32),
            advantage=np.zeros((total,), np.float32),
            weight=np.zeros((total, width), np.float32),
            old_logprob=np.zeros((total, width), np.float32),
            sampler_logprob=np.zeros((total, width), np.float32),
        )
        batch.advantage[: len(rows)], batch.weight[: len(rows)] = advantage, weight
        for i, (context, one) in enumerate(rows):
            batch.tokens[i, : len(context) + len(one.tokens)] = np.concatenate([context, one.tokens])
            batch.context_length[i], batch.completion_length[i] = len(context), len(one.tokens)
            batch.sampler_logprob[i, : len(one.tokens)] = one.logprobs
        return TrainBatch(*(x.reshape(micros, per_micro, *x.shape[1:]) for x in batch))

    def _with_old(self, batch: TrainBatch, old: list[np.ndarray]) -> TrainBatch:
        flat = batch.old_logprob.reshape(-1, batch.old_logprob.shape[-1])
        for i, values in enumerate(old):
            flat[i, : len(values)] = values
        return batch

    def _old_logprobs(
        self, state: TrainState, rows: list[tuple], gains: np.ndarray, parts: list[np.ndarray]
    ) -> list[np.ndarray]:
        """log pi_old of each row's completion, [T] float32, by the function and in the shapes that the loss uses."""
        old: list[np.ndarray] = [np.zeros(0)] * len(rows)
        for part in parts:
            batch = self.pack([rows[i] for i in part], gains.reshape(-1)[part])
            values = sharding.to_host(self._score(state.params, self._to_device(batch)))
            for i, value in zip(part, values.reshape(-1, values.shape[-1]), strict=False):  # padding rows follow
                old[i] = value[: len(rows[i][1].tokens)]
        return old

    def _to_device(self, batch: TrainBatch) -> TrainBatch:
        return TrainBatch(*sharding.to_global(batch, self._batch_sharding))

    def _logprobs(self, params: decoder.Params, micro: TrainBatch) -> tuple[jax.Array, jax.Array]:
        return completion_logprobs(
            self._model,
            params,
            micro.tokens,
            micro.context_length,
            micro.weight.shape[-1],
            dtype=self._dtype,
            temperature=self._rollout.temperature,
            chunk=self._settings.logprob_chunk,
            remat=self._settings.remat,
        )

    def _score_program(self, params: decoder.Params, batch: TrainBatch) -> jax.Array:
        return jax.lax.map(lambda micro: self._logprobs(params, micro)[0], batch)

    def loss(self, params: decoder.Params, micro: TrainBatch, reference: decoder.Params | None) -> tuple:
        """Loss of one micro-batch (its share of the whole batch's) and its Sums."""
        mask = jnp.arange(micro.weight.shape[-1]) < micro.completion_length[:, None]
        logprob, entropy = self._logprobs(params, micro)
        logprob = jnp.where(mask, logprob, 0.0)
        old = micro.old_logprob if self.updates_per_step > 1 else jax.lax.stop_gradient(logprob)
        ref = None
        if self.algorithm.beta > 0:
            ref = jnp.where(mask, jax.lax.stop_gradient(self._logprobs(reference, micro)[0]), 0.0)
        parts = algorithms.loss(self.algorithm, logprob, old, ref, micro.advantage, micro.weight, mask)
        gap = jnp.where(mask, jnp.abs(jax.lax.stop_gradient(old) - micro.sampler_logprob), 0.0)
        total_entropy = jnp.sum(jnp.where(mask, entropy, 0.0))
        sums = Sums(parts, total_entropy, jnp.sum(mask, dtype=jnp.float32), jnp.sum(gap), jnp.max(gap))
        return parts.loss, sums

    def gradient(self, params: decoder.Params, batch: TrainBatch, reference: decoder.Params | None) -> tuple:
        """float32 gradient of a whole batch [M, R, ...] and its Sums, micro-batch by micro-batch."""

        def body(carry, micro):
            grads, sums = carry
            (_, more), grad = jax.value_and_grad(self.loss, has_aux=True)(params, micro, reference)
            worst = jnp.maximum(sums.worst_mismatch, more.worst_mismatch)
            sums = jax.tree.map(jnp.add, sums, more)._replace(worst_mismatch=worst)
            return (jax.tree.map(jnp.add, grads, grad), sums), None

        zero = jnp.float32(0)
        nothing = Sums(Loss(*[zero] * len(Loss._fields)), zero, zero, zero, zero)
        (grads, sums), _ = jax.lax.scan(body, (jax.tree.map(jnp.zeros_like, params), nothing), batch)
        return grads, sums

    def _update_program(self, state: TrainState, batch: TrainBatch, reference: decoder.Params | None) -> tuple:
        grads, sums = self.gradient(state.params, batch, reference)
        norm = optax.global_norm(grads)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(sums.loss.loss) & jnp.isfinite(norm) & jnp.isfinite(optax.global_norm(updates))
        keep = lambda new, old: jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)  # noqa: E731
        params, opt_state = keep(params, state.params), keep(opt_state, state.opt_state)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        trained, tokens = jnp.maximum(sums.loss.tokens, 1), jnp.maximum(sums.tokens, 1)
        metrics = {
            "loss": sums.loss.loss,
            "entropy": sums.entropy / tokens,
            "kl": sums.loss.kl / trained,
            "clip_ratio/region_mean": sums.loss.clipped / trained,
            "ratio/mean": sums.loss.ratio / trained,
            "sampling/sampling_logp_difference/mean": sums.mismatch / tokens,
            "sampling/sampling_logp_difference/max": sums.worst_mismatch,
            "grad_norm": norm,
            "learning_rate": self._schedule(state.step - state.skipped),  # Adam counts the steps made
            "nonfinite_steps": skipped,
        }
        return TrainState(params, opt_state, state.step + 1, skipped), metrics


def _mean_metrics(parts: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over the optimizer steps of a rollout; the largest of a max, the last of a count or rate."""
    last, largest = ("learning_rate", "nonfinite_steps"), ("sampling/sampling_logp_difference/max",)
    merged = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
    merged |= {name: float(parts[-1][name]) for name in last}
    return merged | {name: float(max(part[name] for part in parts)) for name in largest}
