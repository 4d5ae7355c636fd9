"""An open run, and what it does between two updates: report, check, evaluate, save; and how it ends."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.distributed import chips, cluster, preemption, watchdog
from igrpo_jax.distributed.compiling import compile_all
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.errors import named
from igrpo_jax.evaluation import results, summaries
from igrpo_jax.evaluation.evaluator import Evaluator
from igrpo_jax.learning.credit import Advantages
from igrpo_jax.learning.learner import Learner
from igrpo_jax.learning.rollout import Rollout
from igrpo_jax.learning.train_state import TrainState
from igrpo_jax.models import decoder, hf_write
from igrpo_jax.models.policy import export_dtype
from igrpo_jax.outputs import hub
from igrpo_jax.outputs.checkpoint import Checkpointer
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.evaluation_settings import evaluation_folder
from igrpo_jax.outputs.writer import Writer
from igrpo_jax.records import Group
from igrpo_jax.rewards.failures import VerifierError
from igrpo_jax.sampling.engine import Engine
from igrpo_jax.session import ending, overview
from igrpo_jax.session.progress import Progress, check_finite
from igrpo_jax.session.run_context import preempted_after, saved_at
from igrpo_jax.session.run_inputs import RunInputs
from igrpo_jax.storage.addresses import resolved
from igrpo_jax.storage.reading import local
from igrpo_jax.storage.writing import remove_tree


class StepResult(NamedTuple):
    """The result of one step of Algorithm 1: its groups, and the state after the update."""

    state: TrainState
    groups: list[Group]  # one per prompt
    advantages: Advantages
    metrics: dict[str, float]
    compiled: list[str]  # programs that were compiled during the step, as "kind shape"; none of a launch's first step


@dataclass(frozen=True)
class Run:
    """The objects that an open run consists of; only `progress` changes from step to step.

    All processes call every method.
    """

    config: Config
    workdir: Path
    inputs: RunInputs
    learner: Learner
    engine: Engine
    rollout: Rollout
    evaluator: Evaluator
    writer: Writer
    checkpointer: Checkpointer
    console: Console
    resumed_after: int  # the step whose state the run begins with; 0 is before the first update
    progress: Progress
    check_lock: Callable[[], None]  # raises RunError where another run has taken the workdir

    def compile_rest(self) -> None:
        """Compiles the programs of the run that are not compiled yet, which on a CPU are most of them."""
        with self.console.waiting("the programs of later steps"):
            compile_all([*self.engine.program_shapes, *self.learner.programs.program_shapes])

    def report(self, step: int, result: StepResult) -> None:
        """Writes the files of a step, and prints what it did.

        Raises:
            RunError: config.learner.max_nonfinite_steps steps in a row skipped an optimizer step; a file cannot be
                written.
        """
        groups, advantages, metrics = result.groups, result.advantages, result.metrics
        self._warn_of_compiles(step, result.compiled)
        if step == 1:
            self.checkpointer.wait()  # for step 0: a folder with samples but no checkpoint is taken for damaged
        self.writer.write(step, metrics)
        self.writer.samples(step, groups, *advantages)
        skipped, most = round(result.metrics["nonfinite_steps"]), self.config.learner.max_nonfinite_steps
        check_finite(step, skipped, groups, advantages, self.progress, most, self.writer, self.console)
        self.console.step(step, metrics)
        if self.shows_samples(step) and any(group.completions for group in groups):
            refined = advantages.refinements
            best = max(range(len(groups)), key=lambda i: np.abs(refined[i]).max(initial=-1))
            self.console.sample(groups[best], refined[best])

    def reported(self, step: int) -> dict[str, float]:
        """Returns the metrics of a step that an earlier launch reported; none where its row is lost."""
        row = cluster.from_first(lambda: next((row for row in self.writer.history if row["step"] == step), {}))
        return {name: math.nan if value is None else value for name, value in row.items() if name != "step"}

    def _warn_of_compiles(self, step: int, compiled: Sequence[str]) -> None:
        """Names the programs that were compiled after the first step, the first one of each kind."""
        if new := self.progress.first_of_their_kind(compiled):
            self.console.message(
                f"step {step}: compiled {'; '.join(new)}: new shapes; further recompilations of these programs are "
                "only counted, in perf/recompiles"
            )

    def shows_samples(self, step: int) -> bool:
        """Returns whether samples of `step` are printed; the log-probs of its drafts are then rescored too."""
        return self.config.log.samples_every > 0 and step % self.config.log.samples_every == 0

    def evaluation_due(self, step: int) -> bool:
        """Returns whether `step` ends with an evaluation; the last step always does unless evaluations are off."""
        every = self.config.evaluation.every
        return every > 0 and (step % every == 0 or step == self.inputs.total_steps)

    def lacks_evaluation(self, step: int) -> bool:
        """Returns whether `step` ends with an evaluation that has no scores yet."""
        return self.evaluation_due(step) and step not in self.progress.scores

    def evaluate(self, params: decoder.Params, step: int) -> None:
        """Evaluates the policy after `step`, and writes its scores under that step.

        If this is preempted, the checkpoint of this policy records it, and a resume keeps the answers so far. Answers
        that no such record claims are deleted: they may come from other weights, of a step that was run again.

        Raises:
            Preempted: SIGTERM arrived during this call.
            VerifierError: more gradings failed than config.rewards.max_error_fraction allows; the other answers are
                kept as on a preemption.
        """
        out = evaluation_folder(self.workdir, step)
        began = time.perf_counter()
        settings = {"model": str(resolved(self.workdir)), "step": step}
        settings |= results.settings(self.config, self.evaluator.plan.max_new_tokens)
        asked = {"rounds": self.config.evaluation.rounds, "problems": self.evaluator.plan.fingerprint} | settings
        if jax.process_index() == 0:
            if self.progress.evaluating != asked:
                remove_tree(out)
            results.write_settings(out, settings)
        self.progress.evaluating = asked
        with watchdog.phase("evaluation", f"step {step}"):
            scores = summaries.flat(self.evaluator.run(self.learner.rollout_params(params), out, {"step": step}))
        times = {"perf/evaluation_time": time.perf_counter() - began, "perf/wall_time": time.time()}
        self.writer.write(step, {**scores, **times})
        # Not before: where the row can't be written, the run ends, and a resume writes it.
        self.progress.scores[step], self.progress.evaluating = scores, None
        self.console.evaluation(step, scores)

    def save(self, step: int, state: TrainState, force: bool = False) -> None:
        """Saves a checkpoint where one is due, or at any step with `force`.

        It is due at multiples of config.checkpoint.every, before the first step, after the last, and where
        config.checkpoint.best_metric is higher than at the steps that are saved.

        Raises:
            RunError: see `Checkpointer.save`.
        """
        self.check_lock()
        meta = {"step": step, "total_steps": self.inputs.total_steps, "metrics_rows": self.writer.rows}
        meta |= {"data": self.inputs.fingerprint, "rewards": self.inputs.reward_sources} | self.progress.meta()
        force = force or step in (0, self.inputs.total_steps)
        scores = self.progress.values(self.config.checkpoint.best_metric)
        self.checkpointer.save(step, state, meta, force=force, scores=scores, before=self.writer.sync)

    def stop_if_preempted(self) -> None:
        """Raises Preempted if any process has had a notice, so that all leave after the same step."""
        if cluster.any_of(preemption.noted()):
            raise Preempted

    def save_and_wait(self, step: int, state: TrainState) -> None:
        """Saves the state after `step`, at which the run ends early, and returns when it is written."""
        self.save(step, state, force=True)
        self.checkpointer.wait()

    @contextlib.contextmanager
    def saving_at_end(self, step: int, state: TrainState) -> Iterator[None]:
        """Saves the state after `step` where the run ends within the block, which saves nothing itself.

        Raises:
            Preempted, VerifierError: what the block raised, with a message that says what is saved.
            Exception: any other error of the block, with a note that says what is saved, if something could be.
        """
        try:
            yield
        except Preempted:
            self.save_and_wait(step, state)
            raise preempted_after(step, self.inputs.total_steps, self.workdir) from None
        except VerifierError as error:  # all processes have it
            self.save_and_wait(step, state)
            saved = saved_at(step, self.workdir, error.comes_again)
            raise VerifierError(f"{error}; {saved}", error.comes_again) from error
        except Exception as error:
            self._save_after(error, step, state)
            raise

    def _save_after(self, error: Exception, step: int, state: TrainState) -> None:
        """Saves the state after `step`, after which `error` ends the run, and adds a note on it to `error`.

        An update that fails may have donated the state. Of several processes only one may have the error, and a save
        takes all of them. In both cases nothing is saved.
        """
        if jax.process_count() > 1 or any(array.is_deleted() for array in jax.tree.leaves(state)):
            return
        try:
            self.save_and_wait(step, state)
        except Exception as failed:  # what ended the run is the first error, whatever the second one is
            error.add_note(f"step {step} could not be saved: {named(failed)}")
        else:
            error.add_note(saved_at(step, self.workdir))

    def finish(self, state: TrainState) -> None:
        """Waits for the last checkpoint, exports where asked, and prints the final scores and where the files are."""
        with self.console.phase("writing the last checkpoint"):
            self.checkpointer.wait()
        if self.config.checkpoint.export or self.config.checkpoint.push:
            self._export(state)
        self.writer.sync()
        total, best_metric = self.inputs.total_steps, self.config.checkpoint.best_metric
        ending.write_finished(self.workdir, self.config, total, self.writer.rows, self.progress)
        self.console.table("Done", overview.after(self.workdir, self.progress, best_metric, self.resumed_after, total))

    def _export(self, state: TrainState) -> None:
        """Writes the policy as a Hugging Face directory to workdir/export, and to the hub where that is asked for."""
        out = self.workdir / "export"
        # A run that ended earlier with fewer steps may have left one.
        cluster.from_first(functools.partial(remove_tree, out))
        # They are in the last checkpoint, and take as much memory as the copies of the weights that an export holds.
        for moment in jax.tree.leaves(state.opt_state):
            moment.delete()
        params = decoder.cast(self.learner.rollout_params(state.params), self.config.model.dtype)  # as it samples
        dtype = export_dtype(params)
        size = hf_write.model_bytes(self.inputs.policy.cfg, dtype)
        with self.console.phase("exporting", size >> 20, unit="MiB") as update:
            compared = self.inputs.policy.save(out, params, lambda done: update(done >> 20), dtype)
        self.console.message(f"the export is {dtype}; read back, {compared}")
        if self.config.checkpoint.push:
            repository = hub.Repository(self.config.checkpoint.push, hub.SETTING)
            copy = local(f"--workdir {self.workdir}", out)
            total = self.inputs.total_steps
            push = functools.partial(hub.upload, repository, copy, self.config, self.workdir, total, out)
            with self.console.phase("writing to the hub"):
                pushed = cluster.from_first(push)
            self.console.message(pushed)


def throughput(metrics: Mapping[str, float], devices: Sequence[jax.Device]) -> dict[str, float]:
    """Returns the tokens per second of a step, and `perf/mfu` where the peak of the devices is known."""
    tokens = metrics["perf/draft_tokens"] + metrics["perf/completion_tokens"]
    return {"perf/tokens_per_second": tokens / metrics["perf/step_time"]} | utilization(metrics, devices)


def utilization(metrics: Mapping[str, float], devices: Sequence[jax.Device]) -> dict[str, float]:
    """Returns `perf/mfu`, the fraction of the devices' published peak that an update uses; {} if none is known."""
    chip = chips.CHIPS.get(devices[0].device_kind)
    if chip is None:
        return {}
    return {"perf/mfu": metrics["perf/update_flops"] / (metrics["perf/update_time"] * chip.flops * len(devices))}
