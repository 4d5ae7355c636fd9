"""The update: the groups of a step in, new parameters out.

1. `packing` cuts the groups into micro-batches; what the completions of a group share is run once.
2. `accumulate`, one program per shape of micro-batch, adds gradients and sums in float32. Weights of tokens are those
   of the whole optimizer step, so that micro-batches simply add.
3. `apply` makes one AdamW step on the float32 master weights.

With several optimizer steps per rollout, log pi_old is computed first, by the function that the loss uses; with one it
is the policy itself, and its gradient is stopped. log pi_ref (beta > 0) is computed once per rollout. Groups whose
advantages are all zero have no gradient where beta = 0 and no entropy bonus asks for one: they are only scored, for the
entropy.

With algorithm.train_drafts the drafts of a prompt are a group as well, on the plain prompt, with a baseline of their
own. They are rows of the same optimizer steps, each minibatch has its share of them, and a row of either kind weighs
the same. What is measured under TRL's names stays that of the refinements; loss and gradient norm are of all rows.

A step whose loss, gradient or update is not finite changes nothing and is counted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from igrpo_jax.config import Config, OptimizerConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.programs import Key, Programs, program_bytes, tree_bytes
from igrpo_jax.learning import objectives
from igrpo_jax.learning.objectives import Loss
from igrpo_jax.learning.packing import Packer, Shape, Unit
from igrpo_jax.models import decoder, lora
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.costs import Costs
from igrpo_jax.models.logprobs import completion_logprobs
from igrpo_jax.records import Group, TrainBatch


class TrainState(NamedTuple):
    """All that training carries from step to step, on the mesh."""

    params: decoder.Params  # float32 master weights, with LoRA its adapters alone
    opt_state: optax.OptState
    step: jax.Array  # [] int32, optimizer steps tried
    skipped: jax.Array  # [] int32, of these not finite


class Sums(NamedTuple):
    """What micro-batches add up; all [] float32."""

    loss: Loss
    entropy: jax.Array  # over completion tokens, in nats
    tokens: jax.Array  # completion tokens
    mismatch: jax.Array  # sum of |log pi_old - the sampler's|
    worst_mismatch: jax.Array  # the largest of these


def make_optimizer(settings: OptimizerConfig, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a global-norm clip; linear warm-up, then a cosine down to min_lr_ratio of the peak."""
    warmup = min(round(settings.warmup_ratio * total_steps), max(total_steps - 1, 0))
    peak, floor = settings.learning_rate, settings.learning_rate * settings.min_lr_ratio

    def schedule(count: jax.Array) -> jax.Array:
        rising = (count + 1) / max(warmup, 1)  # the first step already learns
        along = jnp.clip((count - warmup) / max(total_steps - warmup, 1), 0, 1)
        falling = floor + (peak - floor) * 0.5 * (1 + jnp.cos(jnp.pi * along))
        return jnp.where(count < warmup, peak * rising, falling)

    def decays(params: decoder.Params) -> dict[str, bool]:
        return {path: not path.endswith(("scale", "_bias", "a_log", "skip")) for path in params}

    decay, mu_dtype = settings.weight_decay, settings.mu_dtype
    adamw = optax.adamw(schedule, settings.b1, settings.b2, weight_decay=decay, mask=decays, mu_dtype=mu_dtype)
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw), schedule


def _float32(shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


class Learner:
    """The update for one model, mesh and objective.

    Args:
        max_context: tokens of the longest q or q'.
        total_steps: rollouts of the whole run, for the learning rate.

    Attributes:
        abstract_frozen: shapes, dtypes and shardings of the weights that LoRA adapts; without LoRA there are none.
    """

    def __init__(
        self, config: Config, model: DecoderConfig, mesh: jax.sharding.Mesh, *, max_context: int, total_steps: int
    ):
        self._model, self._settings, self._seed, self._costs = (
            model,
            config.learner,
            config.seed,
            Costs(config, model, mesh),
        )
        self._dtype, self._temperature = config.model.dtype, config.rollout.temperature
        self._iterations, self._cap = config.algorithm.num_iterations, config.algorithm.importance_sampling_cap
        self._stages = (
            ("refine", "draft") if config.algorithm.train_drafts else ("refine",)
        )  # whose completions are rows
        self._lora = config.model.lora
        shapes = decoder.shapes(model)
        self._shapes = lora.shapes(self._lora, shapes) if self._lora.rank else shapes
        self._frozen: decoder.Params = {}
        self._reference: decoder.Params | None = None
        self.algorithm = objectives.resolve(config.algorithm)
        self.updates_per_step = config.learner.minibatches * self._iterations
        self.packer = Packer(config, self.algorithm, sharding.batch_shards(mesh), max_context)
        self._optimizer, self._schedule = make_optimizer(config.optimizer, total_steps * self.updates_per_step)
        whole = sharding.replicated(mesh)
        params = {path: sharding.param_sharding(mesh, path) for path in self._shapes}
        base = {path: sharding.param_sharding(mesh, path) for path in shapes} if self._lora.rank else {}
        self.abstract_frozen = {
            path: jax.ShapeDtypeStruct(shapes[path], self._dtype, sharding=place) for path, place in base.items()
        }
        opt_state = optax.tree.map_params(
            self._optimizer,
            lambda _, place: place,
            jax.eval_shape(self._optimizer.init, _float32(self._shapes)),
            params,
            transform_non_params=lambda _: whole,
        )
        self.state_sharding = TrainState(params, opt_state, whole, whole)
        self._batch_sharding = sharding.batch_sharding(mesh)
        platform = mesh.devices.flat[0].platform  # it may be another than the default: that of a topology
        options = decoder.remat_options(platform) if config.learner.remat != "none" else None
        self._jitted = {
            "accumulate": jax.jit(
                self._accumulate_program,
                donate_argnums=(1, 2),
                out_shardings=(params, whole),
                compiler_options=options,
            ),
            "score": jax.jit(self._logprobs, out_shardings=whole),
            "apply": jax.jit(self._apply_program, donate_argnums=0, out_shardings=(self.state_sharding, whole)),
        }
        self._zeros = jax.jit(self._zeros_program, out_shardings=(params, whole))
        self._programs = Programs(self.lower)

    def init(self, params: decoder.Params) -> TrainState:
        """Fresh optimizer state around `params`, which the state takes over."""
        opt_state = jax.jit(self._optimizer.init, out_shardings=self.state_sharding.opt_state)(params)
        zero = lambda: sharding.to_global(np.int32(0), self.state_sharding.step)
        return TrainState(params, opt_state, zero(), zero())

    def set_frozen(self, params: decoder.Params) -> None:
        """With LoRA, the model that is adapted, in model.dtype."""
        self._frozen = params

    def policy(self, params: decoder.Params) -> decoder.Params:
        """The policy's parameters, for sampling: those of a state, or adapters with the weights that they adapt."""
        return lora.attach(self._frozen, params, self._lora.scaling)

    def abstract_policy(self) -> decoder.Params:
        """Shapes, dtypes and shardings of what `policy` returns."""
        return lora.attach(self.abstract_frozen, self.abstract_state().params, self._lora.scaling)

    def set_reference(self, params: decoder.Params) -> None:
        """pi_ref as a state's params, where beta > 0; with learner.offload_reference it waits in host memory."""
        if self._settings.offload_reference:
            places = {path: place.with_memory_kind("pinned_host") for path, place in self.state_sharding.params.items()}
            params = jax.device_put(params, places)
        self._reference = params

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, for a checkpoint to be restored into."""
        shapes = _float32(self._shapes)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(shapes, jax.eval_shape(self._optimizer.init, shapes), count, count)
        place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return jax.tree.map(place, state, self.state_sharding)

    def update(
        self, state: TrainState, groups: list[Group], advantages: np.ndarray, step: int
    ) -> tuple[TrainState, dict]:
        """All optimizer steps of one rollout.

        Args:
            groups: P of them, G completions each, ordered.
            advantages: [P, G] float32, of the completions. Those of drafts, where they are trained on, follow
                from their rewards.
            step: of the run; with the seed it decides which units share a minibatch.

        Returns:
            the new state, and the metrics of the update by TRL's names.
        """
        parts = [self.packer.units(groups, advantages), self._draft_units(groups)]
        units = [unit for part in parts for unit in part]
        minibatches = self._settings.minibatches
        if self.updates_per_step > 1:
            for unit, (logprob, _) in zip(units, self._scored(state.params, units), strict=True):
                unit.old = logprob
        if self.algorithm.beta > 0:
            reference = jax.device_put(self._reference, self.state_sharding.params)
            for unit, (logprob, _) in zip(units, self._scored(reference, units), strict=True):
                unit.reference = logprob
            del reference
        metrics, flops = [], self._model_flops(units)
        for iteration in range(self._iterations):
            rng = np.random.default_rng([self._seed, step, iteration, 0x313B])
            orders = [rng.permutation(len(part)) if minibatches > 1 else np.arange(len(part)) for part in parts]
            for chosen in zip(*(np.array_split(order, minibatches) for order in orders), strict=True):
                picked = [part[i] for part, places in zip(parts, chosen, strict=True) for i in places]
                state, measured = self._optimizer_step(state, picked)
                metrics.append(measured)
        return state, _mean_metrics(metrics) | {"perf/update_flops": flops}

    def _trains(self, unit: Unit) -> bool:
        """Whether it has a gradient: what only the advantage trains has none without one."""
        return not self.algorithm.needs_advantage or bool(unit.advantage.any())

    def _model_flops(self, units: Sequence[Unit]) -> float:
        """What an update of `units` asks for; a backward pass is two forward ones, one where the base is frozen."""
        before = (self.updates_per_step > 1) + (self.algorithm.beta > 0)  # passes for log pi_old and log pi_ref
        backward = 1 if self._lora.rank else 2
        return sum(
            self._costs.useful(
                len(unit.context),
                [len(one.tokens) for one in unit.completions],
                before + self._iterations * (1 + backward * self._trains(unit)),
            )
            for unit in units
        )

    def _draft_units(self, groups: Sequence[Group]) -> list[Unit]:
        """Of the drafts, where they are trained on: none of a group whose draft stage was left out."""
        drafted = [group.of_drafts for group in groups if "draft" in self._stages and group.drafts]
        if not drafted:
            return []
        rewards = np.stack([group.rewards for group in drafted])
        r = self.algorithm
        return self.packer.units(drafted, objectives.group_advantages(rewards, r.scale_rewards, r.baseline))

    def draft_mismatch(self, params: decoder.Params, groups: Sequence[Group]) -> dict[str, float]:
        """How far log-probs of drafts are from the sampler's, over the first drafts that one micro-batch holds.

        A check of the sampler in Stage 1, whose tokens carry no loss; `params` are those that drafted.
        """
        units = []
        for group in groups:
            for start in range(0, len(group.drafts), self.packer.share):
                part = group.drafts[start : start + self.packer.share]
                units.append(Unit(group.prompt.tokens, part, np.zeros(self.packer.share, np.float32)))
        units = units[: self.packer.largest[0]]
        gaps = [gap for gap, _ in _rows(units, self._scored(params, units))]
        if not gaps:
            return {}
        gaps = np.concatenate(gaps)
        return {f"sampling/draft_logp_difference/{name}": float(f(gaps)) for name, f in _OVER.items()}

    def _optimizer_step(self, state: TrainState, units: Sequence[Unit]) -> tuple[TrainState, dict[str, float]]:
        self.packer.set_weights(units)
        idle = [unit for unit in units if not self._trains(unit)]  # scored for the metrics alone
        trained = [unit for unit in units if self._trains(unit)]
        grads, sums = self._zeros()
        padded = 0
        for stage in self._stages:
            for batch, _ in self.packer.micro_batches([unit for unit in trained if unit.stage == stage]):
                program = self._programs["accumulate", batch.shape]
                device_batch = self._to_device(batch)
                grads, sums[stage] = program(state.params, grads, sums[stage], device_batch, self._frozen)
                padded += batch.padded_tokens
        scored = self._scored(state.params, idle)
        state, applied = self._programs[("apply",)](state, grads, sums)
        sums, applied = sharding.to_host((sums, applied))
        padding = 1 - sum(unit.tokens for unit in trained) / padded if padded else 0.0
        return state, applied | _metrics(sums, idle, scored) | {"perf/padding_frac": padding}

    def _scored(self, params: decoder.Params, units: Sequence[Unit]) -> list[tuple[list, list]]:
        """For each unit log-probs and entropies of its completions, [T_i] float32 each, in nats."""
        found = {}
        for batch, chosen in self.packer.micro_batches(units):
            program = self._programs["score", batch.shape]
            logprob, entropy = sharding.to_host(program(params, self._to_device(batch), self._frozen))
            for i, unit in enumerate(chosen):
                sizes = [len(one.tokens) for one in unit.completions]
                found[id(unit)] = tuple([x[i, j, :n] for j, n in enumerate(sizes)] for x in (logprob, entropy))
        return [found[id(unit)] for unit in units]

    def lower(self, key: Key) -> jax.stages.Lowered:
        """The traced program of `key`: ("accumulate" or "score", shape of micro-batch) or ("apply",)."""
        kind, *shape = key
        state, sums = self.abstract_state(), self._abstract_sums()
        if kind == "apply":
            return self._jitted[kind].lower(state, state.params, sums)
        batch = self._abstract_batch(*shape)
        added = (state.params, sums["refine"]) if kind == "accumulate" else ()
        return self._jitted[kind].lower(state.params, *added, batch, self.abstract_frozen)

    @property
    def beside(self) -> dict[str, int]:
        """Bytes on each device of what training keeps there that is no argument of a program of that kind."""
        state = self.abstract_state()
        params, moments = tree_bytes(state.params), tree_bytes(state.opt_state)
        reference = params if self.algorithm.beta > 0 and not self._settings.offload_reference else 0
        return {
            "accumulate": moments + reference,
            "score": moments + params + reference,  # the gradient, which is as large as what is trained
            "apply": tree_bytes(self.abstract_frozen) + reference,
        }

    @property
    def resting_bytes(self) -> int:
        """Bytes on each device of all that training keeps there while completions are sampled."""
        return tree_bytes((self.abstract_state().params, self.abstract_frozen)) + self.beside["accumulate"]

    def predicted_bytes(self) -> int:
        """Bytes per device that an update of the longest rows needs, state included, by the compiler's own count."""
        accumulate, apply = self._programs["accumulate", self.packer.largest], self._programs[("apply",)]
        beside = self.beside
        return max(program_bytes(accumulate) + beside["accumulate"], program_bytes(apply) + beside["apply"])

    def _abstract_sums(self) -> dict[str, Sums]:
        whole, sums = self.state_sharding.step, jax.eval_shape(self._no_sums)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), sums)

    def _abstract_batch(self, shape: Shape) -> TrainBatch:
        place = self._batch_sharding
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), self.packer.fill([], shape)
        )

    def _to_device(self, batch: TrainBatch) -> TrainBatch:
        return TrainBatch(*sharding.to_global(batch, self._batch_sharding))

    def _logprobs(
        self, params: decoder.Params, batch: TrainBatch, frozen: decoder.Params, entropy_gradient: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        return completion_logprobs(
            self._model,
            lora.attach(frozen, params, self._lora.scaling),
            batch.prefix,
            batch.prefix_length,
            batch.last,
            batch.completions,
            dtype=self._dtype,
            temperature=self._temperature,
            chunk=self._settings.logprob_chunk,
            remat=self._settings.remat,
            entropy_gradient=entropy_gradient,
        )

    def loss(self, params: decoder.Params, batch: TrainBatch, frozen: decoder.Params) -> tuple[jax.Array, Sums]:
        """Loss of one micro-batch (its share of the optimizer step's) and its Sums; `frozen` is what LoRA adapts."""
        rows = lambda x: x.reshape(-1, *x.shape[2:])  # [Q, G, ...] -> [Q * G, ...]
        mask = jnp.arange(batch.weight.shape[-1]) < rows(batch.length)[:, None]
        rewarded = self.algorithm.entropy_coef > 0
        found = self._logprobs(params, batch, frozen, rewarded)
        logprob, entropy = (jnp.where(mask, rows(x), 0.0) for x in found)
        old = rows(batch.old_logprob) if self.updates_per_step > 1 else jax.lax.stop_gradient(logprob)
        reference = rows(batch.reference_logprob) if self.algorithm.beta > 0 else None
        drift = jnp.where(mask, jax.lax.stop_gradient(old) - rows(batch.sampler_logprob), 0.0)
        correction = jnp.minimum(jnp.exp(jnp.minimum(drift, 20.0)), self._cap) if self._cap else None
        advantage, weight = rows(batch.advantage), rows(batch.weight)
        bonus = (entropy, rows(batch.entropy_weight)) if rewarded else ()
        parts = objectives.loss(self.algorithm, logprob, old, reference, advantage, weight, mask, correction, *bonus)
        gap = jnp.abs(drift)
        sums = Sums(parts, jnp.sum(entropy), jnp.sum(mask, dtype=jnp.float32), jnp.sum(gap), jnp.max(gap))
        return parts.loss, sums

    def _accumulate_program(
        self, params: decoder.Params, grads: decoder.Params, sums: Sums, batch: TrainBatch, frozen: decoder.Params
    ) -> tuple[decoder.Params, Sums]:
        (_, more), grad = jax.value_and_grad(self.loss, has_aux=True)(params, batch, frozen)
        worst = jnp.maximum(sums.worst_mismatch, more.worst_mismatch)
        sums = jax.tree.map(jnp.add, sums, more)._replace(worst_mismatch=worst)
        return jax.tree.map(jnp.add, grads, grad), sums

    def _no_sums(self) -> dict[str, Sums]:
        return {stage: _nothing() for stage in self._stages}

    def _zeros_program(self) -> tuple[decoder.Params, dict[str, Sums]]:
        return {path: jnp.zeros(shape, jnp.float32) for path, shape in self._shapes.items()}, self._no_sums()

    def _apply_program(
        self, state: TrainState, grads: decoder.Params, sums: dict[str, Sums]
    ) -> tuple[TrainState, dict]:
        norm = optax.global_norm(grads)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A finite norm leaves AdamW no way to a step that is not; to look at the step itself would hold all of it.
        finite = jnp.isfinite(sum(part.loss.loss for part in sums.values())) & jnp.isfinite(norm)
        keep = lambda new, old: jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
        params, opt_state = keep(params, state.params), keep(opt_state, state.opt_state)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        metrics = {
            "grad_norm": norm,
            "learning_rate": self._schedule(state.step - state.skipped),  # Adam counts the steps made
            "nonfinite_steps": skipped,
        }
        return TrainState(params, opt_state, state.step + 1, skipped), metrics


def _nothing() -> Sums:
    zero = jnp.float32(0)
    return Sums(Loss(*[zero] * len(Loss._fields)), zero, zero, zero, zero)


_OVER = {"mean": np.mean, "max": np.max}


def _rows(units: Sequence[Unit], scored: Sequence[tuple[list, list]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """|log pi_old - the sampler's| and entropy [T_i] of every completion of `units`."""
    return [
        (np.abs(old - one.logprobs), entropy)
        for unit, (logprobs, entropies) in zip(units, scored, strict=True)
        for one, old, entropy in zip(unit.completions, unit.old or logprobs, entropies, strict=True)
    ]


def _metrics(sums: dict[str, Sums], idle: Sequence[Unit], scored: Sequence[tuple[list, list]]) -> dict[str, float]:
    """Of one optimizer step: the loss of all rows, and what is measured of refinements under TRL's names.

    Of drafts that are trained on it is `draft/entropy`, `draft/kl` and `draft/clip_ratio`, as their counterparts are.
    """
    measured = {}
    for stage, part in sums.items():
        chosen = [i for i, unit in enumerate(idle) if unit.stage == stage]
        if chosen or part.tokens or stage == "refine":
            measured[stage] = _measured(part, [idle[i] for i in chosen], [scored[i] for i in chosen])
    named = {"entropy": "entropy", "kl": "kl", "clip_ratio/region_mean": "clip_ratio"}
    drafts = {f"draft/{short}": measured["draft"][name] for name, short in named.items() if "draft" in measured}
    return measured["refine"] | drafts | {"loss": sum(part.loss.loss for part in sums.values())}


def _measured(sums: Sums, idle: Sequence[Unit], scored: Sequence[tuple[list, list]]) -> dict[str, float]:
    """Of the rows of a stage: clipping as the program summed it, entropy and mismatch over idle rows too."""
    rows = _rows(idle, scored)
    idle_tokens = sum(len(gap) for gap, _ in rows)
    tokens = max(sums.tokens + idle_tokens, 1)
    weighing = sum(len(one.tokens) for unit in idle for one, w in zip(unit.completions, unit.weight, strict=True) if w)
    counted = max(sums.loss.tokens + weighing, 1)
    return {
        "entropy": (sums.entropy + sum(entropy.sum() for _, entropy in rows)) / tokens,
        "kl": sums.loss.kl / counted,
        "clip_ratio/region_mean": sums.loss.clipped / counted,
        "ratio/mean": sums.loss.ratio / sums.loss.tokens if sums.loss.tokens else 1.0,
        "sampling/sampling_logp_difference/mean": (sums.mismatch + sum(gap.sum() for gap, _ in rows)) / tokens,
        "sampling/sampling_logp_difference/max": max([sums.worst_mismatch, *(gap.max() for gap, _ in rows)]),
        "perf/idle_frac": idle_tokens / tokens,
    }


def _mean_metrics(parts: list[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of a rollout; the largest of a max, the last of a count or rate."""
    last, largest = ("learning_rate", "nonfinite_steps"), ("sampling/sampling_logp_difference/max",)
    names = dict.fromkeys(name for part in parts for name in part)  # a minibatch may have no drafts
    merged = {name: float(np.mean([part[name] for part in parts if name in part])) for name in names}
    merged |= {name: float(parts[-1][name]) for name in last}
    return merged | {name: float(max(part[name] for part in parts)) for name in largest}
