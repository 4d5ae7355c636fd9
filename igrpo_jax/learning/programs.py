"""The programs of the update: the gradient of a micro-batch, its log-probs, and the optimizer step."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from igrpo_jax.config import Config
from igrpo_jax.distributed import chips, cluster, sharding
from igrpo_jax.distributed.compiling import ProgramShapes
from igrpo_jax.distributed.programs import Program, is_refused, program_bytes, tree_bytes
from igrpo_jax.learning import forward, loss, objectives, train_state
from igrpo_jax.learning.forward import PolicyLogprobs
from igrpo_jax.learning.loss import LossSettings, MicroBatchSums
from igrpo_jax.learning.micro_shapes import MicroShapes
from igrpo_jax.learning.optimizer import make_optimizer, state_shardings
from igrpo_jax.learning.packing import Packer, TrainBatch
from igrpo_jax.learning.train_state import TrainState
from igrpo_jax.models import attention, decoder, lora, spans
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.costs import TrainingCosts
from igrpo_jax.models.logprobs import chunk_positions
from igrpo_jax.sampling.layout import shares_weights

# Values of learner.remat that "auto" tries, fastest first. On a CPU, where memory is slow, recomputing the logits is
# faster than keeping them, and kept logits would be more than half of the activation memory.
FASTEST_REMAT = {"cpu": ("logits", "dots")}
OTHER_FASTEST_REMAT = ("none", "logits", "dots")


class WaitingBytes(NamedTuple):
    """Bytes of training state that stay on each device while a program runs that does not take them as arguments."""

    accumulate: int
    rescore: int
    apply: int


class LearnerPrograms:
    """One `Program` for each function that an update runs on the devices, for one model, mesh and objective.

    Args:
        longest_prompt: tokens of the longest q or q'.
        total_steps: steps of the whole run, for the learning rate.

    Attributes:
        objective, packer: what is optimized, and what cuts groups into the micro-batches that the programs take.
        schedule: the learning rate by the number of optimizer steps made.
        costs: what the programs cost.
        state, frozen: the training state, and the weights that LoRA adapts ({} without LoRA), as abstract arrays.
        stages: the stages whose completions are trained on.
        state_sharding: the sharding of every array of the state; moments are sharded as their parameters.

    Raises:
        InputError: settings that do not fit the model, the mesh or what attention takes.
    """

    def __init__(
        self, config: Config, cfg: DecoderConfig, mesh: jax.sharding.Mesh, *, longest_prompt: int, total_steps: int
    ):
        self.config = config
        self.objective = objectives.resolve(config.algorithm)
        shapes = MicroShapes(config, sharding.batch_shards(mesh), longest_prompt)
        _check_tokens(config, cfg, shapes)
        width = spans.width(cfg, mesh.shape["tensor"])
        self.packer = Packer(self.objective, shapes, cfg.mamba.chunk_size if cfg.mamba else None, width)
        total_optimizer_steps = total_steps * config.optimizer_steps_per_update
        self.optimizer, self.schedule = make_optimizer(config.optimizer, total_optimizer_steps)
        self.costs = TrainingCosts(config, cfg, mesh, shapes.unit)
        if config.learner.remat == "auto":  # agreed on, so that all processes try the same
            self._usable = cluster.from_first(partial(chips.usable_bytes, mesh.devices.flat[0])) * chips.FILL_FRACTION
        self._mesh = mesh
        self._gradient_programs: dict[str, Program] = {}
        self._sizes = [(size,) for size in shapes.sizes]
        self._replicated = sharding.replicated(mesh)
        self._policy = PolicyLogprobs(
            cfg=cfg,
            dtype=config.model.dtype,
            temperature=config.rollout.temperature,
            chunk=chunk_positions(config.learner.logprob_chunk, cfg.vocab_size, mesh),
            remat="none",  # `rescore` differentiates nothing
            lora_scaling=config.model.lora.scaling,
        )
        self.stages = config.algorithm.trained_stages
        whole, rank = decoder.shapes(cfg), config.model.lora.rank
        self._shapes = lora.shapes(config.model.lora, whole) if rank else whole
        self.frozen = sharding.abstract_params(mesh, whole, config.model.dtype) if rank else {}
        self.state_sharding, self.state = self._make_state()

    def _make_state(self) -> tuple[TrainState, TrainState]:
        """Returns the shardings and the abstract arrays of the state."""
        params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in self._shapes.items()}
        opt_state, count = jax.eval_shape(self.optimizer.init, params), jax.ShapeDtypeStruct((), jnp.int32)
        param_sharding = {path: sharding.param_sharding(self._mesh, path) for path in self._shapes}
        moments_sharding = state_shardings(self._mesh, opt_state, self._shapes)
        shardings = TrainState(param_sharding, moments_sharding, self._replicated, self._replicated)
        return shardings, jax.tree.map(_with_sharding, TrainState(params, opt_state, count, count), shardings)

    @cached_property
    def accumulate(self) -> Program:
        """The gradient of a micro-batch, added to that of others; the shape is (tokens on each shard,)."""
        return self._gradient_program(self.remat)

    @cached_property
    def remat(self) -> str:
        """What the backward pass recomputes: for "auto" the fastest choice that fits by the compiler's count.

        With "auto", reading this property compiles the program of a full micro-batch. Several processes read it first
        at the same place, and none in a thread (`compiling`), because they agree on the choice. Choices that cannot fit
        by a formula are skipped, because a program takes minutes to compile.
        """
        requested = self.config.learner.remat
        if requested != "auto":
            return requested
        state = self.waiting_bytes.accumulate + 2 * tree_bytes(self.state.params) + tree_bytes(self.frozen)
        for remat in FASTEST_REMAT.get(self._mesh.devices.flat[0].platform, OTHER_FASTEST_REMAT):
            if state + self.costs.least_kept_bytes(*self._sizes[0], remat) > self._usable:
                continue
            # Compilers of several processes may disagree, and the processes must run the same program.
            if not cluster.any_of(not self._fits(remat)):
                return remat
        return "full"

    def _fits(self, remat: str) -> bool:
        """Returns whether the program of a full micro-batch fits on a device by the compiler's count."""
        try:
            program = self._gradient_program(remat).compile(*self._sizes[0])
        except jax.errors.JaxRuntimeError as error:
            if not is_refused(error):
                raise
            return False
        return program_bytes(program) + self.waiting_bytes.accumulate <= self._usable

    def _gradient_program(self, remat: str) -> Program:
        """Returns the program of `accumulate`, the same one for the same `remat`."""
        if remat not in self._gradient_programs:
            self._gradient_programs[remat] = self._make_gradient_program(remat)
        return self._gradient_programs[remat]

    def loss_settings(self, remat: str) -> LossSettings:
        """Returns what the program of `accumulate` is compiled with; but for `remat`, `rescore` has its `policy`."""
        return LossSettings(
            objective=self.objective,
            policy=replace(self._policy, remat=remat),
            on_policy=self.config.optimizer_steps_per_update == 1,
            correction_cap=self.config.algorithm.importance_sampling_cap,
        )

    def _make_gradient_program(self, remat: str) -> Program:
        platform = self._mesh.devices.flat[0].platform  # of a topology it may differ from the default platform
        params, sums = self.state.params, self._abstract_sums()[self.stages[0]]
        return Program(
            "accumulate",
            jax.jit(
                partial(loss.accumulate, self.loss_settings(remat)),
                donate_argnums=(1, 2),
                out_shardings=(self.state_sharding.params, self._replicated),
                compiler_options=decoder.barrier_options(platform),
            ),
            lambda size: (params, params, sums, self._abstract_batch(size), self.frozen),
            self._mesh,
            shapes=self._sizes,
            largest=self._sizes[:1],
            cost=partial(self.costs.accumulate, remat=remat),
        )

    @cached_property
    def rescore(self) -> Program:
        """The log-probs of a micro-batch; the shape is (tokens on each shard,)."""
        return Program(
            "rescore",
            jax.jit(partial(forward.rescore, self._policy), out_shardings=self._replicated),
            lambda size: (self.state.params, self._abstract_batch(size), self.frozen),
            self._mesh,
            shapes=self._sizes,
            largest=self._sizes[:1],
            cost=self.costs.rescore,
        )

    @cached_property
    def apply(self) -> Program:
        """The optimizer step."""
        return Program(
            "apply",
            jax.jit(
                partial(train_state.apply, self.optimizer, self.schedule),
                donate_argnums=0,
                out_shardings=(self.state_sharding, self._replicated),
            ),
            lambda: (self.state, self.state.params, self._abstract_sums()),
            self._mesh,
            cost=partial(self.costs.apply, tree_bytes(self.state.opt_state)),
        )

    @cached_property
    def zeros(self) -> Callable[[], tuple[decoder.Params, dict[str, MicroBatchSums]]]:
        """Returns a gradient of zero and, by stage, sums of zero, to which micro-batches are added."""
        return jax.jit(self._zero_sums, out_shardings=(self.state_sharding.params, self._replicated))

    def to_devices(self, batch: TrainBatch) -> TrainBatch:
        """Returns `batch`, which every process holds, split over the shards of the batch."""
        return sharding.to_global_batch(batch, self._mesh)

    @property
    def waiting_bytes(self) -> WaitingBytes:
        """For each program, the bytes on each device that training keeps there besides the program's arguments."""
        params, moments = tree_bytes(self.state.params), tree_bytes(self.state.opt_state)
        scores_reference = self.objective.beta > 0
        reference = params if scores_reference and not self.config.learner.offload_reference else 0
        return WaitingBytes(
            accumulate=moments + reference,
            rescore=moments + (params if scores_reference else 0),  # one of pi and pi_ref waits, the other is scored
            apply=tree_bytes(self.frozen) + reference,
        )

    @property
    def resident_bytes(self) -> int:
        """Bytes that training keeps on each device while completions are sampled.

        Where the sampler is sure to use the trained weights themselves (on an accelerator, float32, not split over
        mesh.fsdp, without LoRA, with the layout of the training), these are counted with the rollout and not here.
        """
        is_shared = self.config.model.dtype == "float32" and not self.config.model.lora.rank
        is_shared = is_shared and shares_weights(self._mesh, self.config.rollout.mesh.tensor)
        params = 0 if is_shared else tree_bytes(self.state.params)
        return params + tree_bytes(self.frozen) + self.waiting_bytes.accumulate

    @property
    def abstract_rollout_params(self) -> decoder.Params:
        """What `Learner.rollout_params` returns, as abstract arrays."""
        return lora.attach(self.frozen, self.state.params, self.config.model.lora.scaling)

    @property
    def program_shapes(self) -> ProgramShapes:
        """All programs that an update may call."""
        is_rescored = self.config.optimizer_steps_per_update > 1 or self.objective.beta > 0
        rescored = self._sizes if is_rescored else []
        if not rescored and self.config.algorithm.num_drafts and self.config.log.samples_every:
            rescored = self._sizes[:1]  # for `diagnostics`
        sizes = [
            (program, size) for program, of in ((self.accumulate, self._sizes), (self.rescore, rescored)) for size in of
        ]
        return [*sizes, (self.apply, ())]

    def predicted_bytes(self) -> int:
        """Returns the bytes per device that an update needs, state included, by the compiler's own count."""
        waiting = self.waiting_bytes
        accumulate, apply = self.accumulate.compile(*self._sizes[0]), self.apply.compile()
        return max(program_bytes(accumulate) + waiting.accumulate, program_bytes(apply) + waiting.apply)

    def _zero_sums(self) -> tuple[decoder.Params, dict[str, MicroBatchSums]]:
        grads = {path: jnp.zeros(shape, jnp.float32) for path, shape in self._shapes.items()}
        return grads, {stage: MicroBatchSums.zeros() for stage in self.stages}

    def _abstract_sums(self) -> dict[str, MicroBatchSums]:
        _, sums = jax.eval_shape(self._zero_sums)
        return jax.tree.map(lambda x: _with_sharding(x, self._replicated), sums)

    def _abstract_batch(self, size: int) -> TrainBatch:
        split = sharding.batch_sharding(self._mesh)
        batch = self.packer.empty(size)
        return jax.tree.map(lambda x: _with_sharding(x, split if x.ndim else self._replicated), batch)


def _check_tokens(config: Config, cfg: DecoderConfig, shapes: MicroShapes) -> None:
    """Raises InputError if a full micro-batch has more tokens than attention takes; it names what makes it so long."""
    context, _, completion = shapes.unit
    limit = f"config.rollout.max_completion_length = {completion} (after a context of {context + 1} tokens)"
    attention.check_tokens(cfg.attention, context + completion, limit)
    budget = f"config.learner.tokens_per_microbatch = {config.learner.tokens_per_microbatch}"
    attention.check_tokens(cfg.attention, shapes.largest, budget)


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
