"""Updates the parameters from a step's groups.

1. `packing` cuts the groups into micro-batches of real tokens; what the completions of a group share is run once.
2. `accumulate` (in `loss`), compiled for each size of micro-batch, adds gradients and sums in float32.
3. `apply` (in `train_state`) makes one optimizer step on the float32 master weights.

With several optimizer steps per update, log pi_old is computed first, by the function that the loss uses; with one it
is the policy itself, and its gradient is stopped. log pi_ref (beta > 0) is computed once per update. Without a KL term
(beta = 0) and an entropy bonus, groups whose advantages are all zero have no gradient, and nothing is computed for
them. Their entropy in the metrics is the one that the sampler measured.

With algorithm.train_drafts the drafts of a prompt are also trained on as a group, after the plain prompt, with their
own baseline (or one shared with the refinements, see `credit`). They are rows of the same optimizer steps, split evenly
over the minibatches, and weigh the same as refinements. Metrics under TRL's names still describe only the refinements,
or with algorithm.second_stage = "verify" the drafts, which are then the answers; loss and gradient norm cover all rows.

An optimizer step whose loss or gradient is not finite changes nothing and is counted.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from igrpo_jax.distributed import sharding
from igrpo_jax.learning.packing import MicroBatch, Unit
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.learning.rescoring import rescore_units
from igrpo_jax.learning.train_state import TrainState
from igrpo_jax.learning.update_metrics import mean_over_steps, optimizer_step_metrics
from igrpo_jax.models import decoder, lora
from igrpo_jax.records import Group


class Learner:
    """The update for one model, mesh and objective.

    Args:
        programs: the programs that it runs, with the optimizer and the abstract arrays of the state.
        frozen: the model that LoRA adapts, in model.dtype; {} without LoRA.
        reference: pi_ref as a state's params, where beta > 0, else None; with learner.offload_reference it waits in
            host memory.

    Attributes:
        optimizer_steps_per_update: minibatches times iterations.
    """

    def __init__(self, programs: LearnerPrograms, *, frozen: decoder.Params, reference: decoder.Params | None):
        self.programs = programs
        self.objective, self.packer = programs.objective, programs.packer
        config = programs.config
        self.optimizer_steps_per_update = config.optimizer_steps_per_update
        self._minibatch_count = config.learner.minibatches
        self._lora = config.model.lora
        self._seed = config.seed
        self._iterations = config.algorithm.num_iterations
        self._frozen = frozen
        if reference is not None and config.learner.offload_reference:
            shardings = programs.state_sharding.params.items()
            in_host = {path: where.with_memory_kind("pinned_host") for path, where in shardings}
            reference = jax.device_put(reference, in_host)
        self._reference = reference

    def init(self, params: decoder.Params) -> TrainState:
        """Returns a fresh optimizer state around `params`, which the state takes over."""
        opt_state = jax.jit(self.programs.optimizer.init, out_shardings=self.programs.state_sharding.opt_state)(params)
        zero = lambda: sharding.to_global(np.int32(0), self.programs.state_sharding.step)
        return TrainState(params, opt_state, zero(), zero())

    def rollout_params(self, params: decoder.Params) -> decoder.Params:
        """Returns the parameters to sample with: those of a state, or adapters with the weights that they adapt."""
        return lora.attach(self._frozen, params, self._lora.scaling)

    def update(
        self,
        state: TrainState,
        groups: list[Group],
        advantages: Sequence[np.ndarray],
        step: int,
        draft_advantages: Sequence[np.ndarray] = (),
    ) -> tuple[TrainState, dict]:
        """Makes all optimizer steps of one update.

        Args:
            groups: the groups of a step, in the order of the prompts.
            advantages: advantages of the refinements of each group, [G] float32.
            step: the step of the run; with the seed it decides which units share a minibatch.
            draft_advantages: advantages of the drafts of each group, [N] float32, if drafts are trained on.

        Returns:
            the new state, and the metrics of the update by TRL's names.
        """
        units_by_stage = [self.packer.units(groups, advantages), self._draft_units(groups, draft_advantages)]
        units = [unit for stage_units in units_by_stage for unit in stage_units]
        self._set_old_and_reference(state.params, units)
        metrics, flops = [], self._model_flops(units)
        for iteration in range(self._iterations):
            for minibatch in self._minibatches(units_by_stage, step, iteration):
                state, measured = self._optimizer_step(state, minibatch)
                metrics.append(measured)
        return state, mean_over_steps(metrics) | {"perf/update_flops": flops}

    def _set_old_and_reference(self, params: decoder.Params, units: Sequence[Unit]) -> None:
        """Sets log pi_old and log pi_ref of each unit, where the loss reads them."""
        units = [unit for unit in units if self._has_gradient(unit)]
        if self.optimizer_steps_per_update > 1:
            for unit, logprobs in zip(units, self.rescored(params, units), strict=True):
                unit.old = logprobs
        if self.objective.beta > 0:
            reference = jax.device_put(self._reference, self.programs.state_sharding.params)
            for unit, logprobs in zip(units, self.rescored(reference, units), strict=True):
                unit.reference = logprobs

    def _minibatches(self, units_by_stage: list[list[Unit]], step: int, iteration: int) -> Iterator[list[Unit]]:
        """Yields the units of each optimizer step of one iteration: an equal part of the units of each stage."""
        count = self._minibatch_count
        rng = np.random.default_rng([self._seed, step, iteration, 0x313B])
        orders = [rng.permutation(len(units)) if count > 1 else np.arange(len(units)) for units in units_by_stage]
        for parts in zip(*(np.array_split(order, count) for order in orders), strict=True):
            yield [units[i] for units, part in zip(units_by_stage, parts, strict=True) for i in part]

    def _optimizer_step(self, state: TrainState, units: Sequence[Unit]) -> tuple[TrainState, dict[str, float]]:
        self.packer.set_weights(units)
        idle = [unit for unit in units if not self._has_gradient(unit)]
        trained = [unit for unit in units if self._has_gradient(unit)]
        grads, sums = self.programs.zeros()
        padded = 0
        for stage in self.programs.stages:
            for batch in self.packer.micro_batches([unit for unit in trained if unit.stage == stage]):
                arrays = self.programs.to_devices(self.packer.fill(batch))
                grads, sums[stage] = self.programs.accumulate(
                    state.params, grads, sums[stage], arrays, self._frozen, shape=(batch.size,)
                )
                padded += batch.padded_tokens
        state, applied = self.programs.apply(state, grads, sums)
        sums, applied = sharding.to_host((sums, applied))
        padding = 1 - sum(unit.tokens for unit in trained) / padded if padded else 0.0
        measured = optimizer_step_metrics(sums, units, idle, self.objective, self.programs.stages[0])
        return state, applied | measured | {"perf/padding_frac": padding}

    def rescored(
        self, params: decoder.Params, units: Sequence[Unit], batches: Sequence[MicroBatch] | None = None
    ) -> list[list[np.ndarray]]:
        """Returns the log-probs of `units` under `params` as `rescore_units` does.

        Args:
            batches: micro-batches that hold all completions of the units; None to pack them.
        """
        batches = self.packer.micro_batches(units) if batches is None else batches
        return rescore_units(self.programs, params, self._frozen, batches, units)

    def _has_gradient(self, unit: Unit) -> bool:
        """Returns whether a unit has a gradient: where only the advantage gives one, a unit without advantages has
        none."""
        return not self.objective.needs_advantage or bool(unit.advantage.any())

    def _model_flops(self, units: Sequence[Unit]) -> float:
        """Returns the model FLOPs of an update of `units`; a backward pass is two forward passes, or one where the
        base is frozen."""
        # Passes for log pi_old and log pi_ref.
        before = (self.optimizer_steps_per_update > 1) + (self.objective.beta > 0)
        backward = 1 if self._lora.rank else 2
        return sum(
            self.programs.costs.model.useful_flops(
                len(unit.context),
                [len(completion.tokens) for completion in unit.completions],
                before + self._iterations * (1 + backward),
            )
            for unit in units
            if self._has_gradient(unit)
        )

    def _draft_units(self, groups: Sequence[Group], advantages: Sequence[np.ndarray]) -> list[Unit]:
        """Returns the units of drafts, where they are trained on; a group that skipped Stage 1 has none."""
        if "draft" not in self.programs.stages:
            return []
        assert len(advantages) == len(groups), "drafts are trained on: give their advantages to `update`"
        return self.packer.units([group.of_drafts for group in groups], advantages)
