"""Algorithm 1 of iGRPO (arXiv 2602.09000) as a run: `train` is the loop, the rest puts it together.

Per step: prompts -> drafts -> verifier -> best draft -> q' -> refinements -> verifier -> advantages -> one update.
Everything random is derived from (seed, step), so a resumed run goes on as if it had never stopped.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from igrpo_jax.config import Config, to_dict
from igrpo_jax.data import arithmetic
from igrpo_jax.distributed import chips, cluster, preemption, watchdog
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.distributed.programs import compilations, use_disk_cache
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.evaluation import evaluator
from igrpo_jax.evaluation.evaluator import Evaluator
from igrpo_jax.learning import objectives
from igrpo_jax.learning.learner import Learner, TrainState
from igrpo_jax.learning.rollout import Rollout
from igrpo_jax.learning.warm_start import warm_start
from igrpo_jax.models import decoder, hf_write
from igrpo_jax.outputs import weights
from igrpo_jax.outputs.checkpoint import Checkpointer
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.metrics import Writer, rollout_metrics
from igrpo_jax.outputs.workdir import locked, prepare_workdir
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.session import overview
from igrpo_jax.session.task import Task, open_task, sampler


def train(config: Config, workdir: Path) -> None:
    """Runs or resumes the training that `c` describes in `workdir`.

    Raises:
        InputError: something in `c` or what it names is wrong, or `workdir` holds another run.
        RunError: the run cannot go on: a full disk, too many verifier failures or steps that are not finite.
        Preempted: SIGTERM came, and what can be resumed is saved.
    """
    use_disk_cache(config.compilation_cache)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preemption.noticed(config.checkpoint.preemption_grace))
        task = open_task(config)
        problems = {"training problems": task.fingerprint, "evaluation problems": task.evaluated.fingerprint}
        cluster.check_same({"config": to_dict(config), **problems})
        stack.enter_context(jax.set_mesh(task.mesh))
        stack.enter_context(watchdog.watching(config.watchdog))
        with watchdog.phase("start"):
            run = start(config, task, workdir, stack)
        first, done = run.first_step, run.first_step
        state, run.state = run.state, None  # the update donates it
        try:
            for step in range(first + 1, task.total_steps + 1):
                run.stop_if_preempted()
                state, results = one_step(run, task, state, step)
                run.report(step, *results)
                done = step
                if run.evaluation_due(step):
                    run.evaluate(state.params, step)
                run.save(step, state)
        except Preempted:
            run.leave(done, state)
        run.finish(first, state)


def one_step(run: "Run", task: Task, state: TrainState, step: int) -> tuple[TrainState, tuple]:
    """One pass of Algorithm 1's loop: the new state, and for `Run.report` groups, advantages [P, G] and metrics."""
    config, learner, name = run.config, run.learner, f"step {step}"
    with profiled(config, run.workdir, step), compilations() as compiled:
        began = time.perf_counter()
        with watchdog.phase("rollout", name):
            params, fresh = learner.policy(state.params), functools.partial(task.step_prompts, step)
            groups, sampled = run.rollout.collect(params, fresh(), step, fresh)
        rewards = np.stack([group.rewards for group in groups])
        advantages = objectives.group_advantages(rewards, learner.algorithm.scale_rewards, learner.algorithm.baseline)
        with watchdog.phase("update", name), watchdog.phase("dispatch"):
            checked = learner.draft_mismatch(state.params, groups) if run.shows_samples(step) else {}
            updating = time.perf_counter()
            state, learned = learner.update(state, groups, advantages, step)
            ended = time.perf_counter()
    times = {"perf/update_time": ended - updating, "perf/step_time": ended - began}
    times["perf/recompiles"] = len(compiled)
    run.warn_of_compiles(step, compiled)
    return state, (groups, advantages, {**learned, **checked, **rollout_metrics(groups, config), **sampled, **times})


def utilization(metrics: Mapping[str, float], devices: Sequence[jax.Device]) -> dict[str, float]:
    """Share of the devices' published peak that an update made use of; nothing where the peak is not known."""
    chip = chips.CHIPS.get(devices[0].device_kind)
    if chip is None:
        return {}
    return {"perf/mfu": metrics["perf/update_flops"] / (metrics["perf/update_time"] * chip.flops * len(devices))}


@contextlib.contextmanager
def profiled(config: Config, workdir: Path, step: int):
    """Records the JAX profiler's trace of the steps in config.log.profile_steps into workdir/profile."""
    if step in config.log.profile_steps:
        with jax.profiler.trace(str(workdir / "profile")):
            yield
    else:
        yield


class Run:
    """The living parts of a run, and what happens between two updates."""

    def __init__(self, config: Config, task: Task, workdir: Path, console: Console):
        self.config, self.workdir = config, workdir
        self._task, self._console = task, console
        policy = task.policy
        engine = sampler(config, policy.model, task.mesh, policy.eos_ids, task.max_context, task.evaluated)
        ahead = config.rollout.dispatches_ahead
        self.scheduler = Scheduler(engine, (jax.default_backend() != "cpu") if ahead is None else ahead)
        self._warned: set[str] = set()  # kinds of programs
        self.scores: dict[int, dict[str, float]] = {}  # evaluations by step
        self.state: TrainState | None = None
        self.first_step = 0
        self.expected_rows = 0  # of metrics.jsonl, by the checkpoint that was restored
        self._skipped = 0  # optimizer steps that were not finite
        self._bad_steps = 0  # the same of steps, in a row

    def open_verifier(self, stack: contextlib.ExitStack) -> None:
        """Starts the workers, and the judge with its file of verdicts in the workdir."""
        config = self.config
        limit, judge = config.rollout.max_completion_length, config.rewards.judge
        # Of several processes each has a file of its own, for SQLite can't lock one across machines; its budget is a
        # part of that of all.
        own = jax.process_index()
        cache = self.workdir / (f"judge.process-{own}.sqlite" if own else "judge.sqlite")
        judge = replace(judge, budget=judge.budget and max(1, judge.budget // jax.process_count()))
        settings = replace(config.rewards, judge=judge)
        verifier = stack.enter_context(Verifier(settings, limit, config.data.answer_column or "answer", cache))
        parts = (self.scheduler, self._task.renderer, verifier)
        self.rollout = Rollout(config, self._task.renderer, self.scheduler, verifier)
        self._evaluator = Evaluator(config, self._task.evaluated, *parts, self._console)

    def report(self, step: int, groups: list, advantages: np.ndarray, metrics: dict[str, float]) -> None:
        """Files and console of one step."""
        tokens = metrics["perf/draft_tokens"] + metrics["perf/completion_tokens"]
        metrics["perf/tokens_per_second"] = tokens / metrics["perf/step_time"]
        metrics |= utilization(metrics, self._task.mesh.devices.flat)
        if step == 1:
            self.checkpointer.wait()  # of step 0: a folder with samples and without a checkpoint is taken for damaged
        self.writer.write(step, metrics)
        self.writer.samples(step, groups, advantages)
        self._check_finite(step, groups, advantages, metrics)
        self._console.step(step, metrics)
        if self.shows_samples(step):
            best = max(range(len(groups)), key=lambda i: np.abs(advantages[i]).max())
            self._console.sample(groups[best], advantages[best])

    def _check_finite(self, step: int, groups: list, advantages: np.ndarray, metrics: dict[str, float]) -> None:
        """Keeps the batch of a step that was skipped. Raises RunError after too many in a row."""
        skipped = round(metrics["nonfinite_steps"])
        bad, self._skipped = skipped > self._skipped, skipped
        self._bad_steps = self._bad_steps + 1 if bad else 0
        if not bad:
            return
        self.writer.nonfinite(step, groups, advantages)
        kept = self.workdir / "nonfinite" / f"step_{step:06d}.jsonl"
        self._console.message(f"step {step}: loss or gradient is not finite: nothing changed; its batch is in {kept}")
        if self._bad_steps >= self.config.learner.max_nonfinite_steps:
            raise RunError(
                f"steps {step - self._bad_steps + 1} to {step}: loss or gradient was not finite, "
                f"config.learner.max_nonfinite_steps = {self._bad_steps} times in a row (batches in {kept.parent}); "
                "lower optimizer.learning_rate in a new run, or see whether the model's own weights are sound"
            )

    def warn_of_compiles(self, step: int, compiled: list[str]) -> None:
        """Says which kinds of programs had to be compiled after the first step, once of each."""
        names = {name.partition(" ")[0]: name for name in reversed(compiled)}
        new = [name for kind, name in names.items() if kind not in self._warned]
        if step > self.first_step + 1 and new:
            self._console.message(
                f"step {step}: compiled {'; '.join(new)}: shapes not met before. Later ones of the kind are only "
                "counted, in perf/recompiles"
            )
            self._warned |= names.keys()

    def evaluation_due(self, step: int) -> bool:
        every = self.config.evaluation.every
        return every > 0 and (step % every == 0 or step == self._task.total_steps)

    def shows_samples(self, step: int) -> bool:
        """Whether `step` is one whose samples are looked at: printed, and their drafts scored by the trainer too."""
        return self.config.log.samples_every > 0 and step % self.config.log.samples_every == 0

    def evaluate(self, params: decoder.Params, step: int) -> None:
        """Single-shot evaluation, written under `step` (0 is before the first update)."""
        out = self.workdir / "evaluations" / f"step_{step:06d}"
        began = time.perf_counter()
        with watchdog.phase("evaluation", f"step {step}"):
            scores = evaluator.flat(self._evaluator.run(self.learner.policy(params), out, {"step": step}))
        self.scores[step] = scores
        self.writer.write(step, {**scores, "perf/evaluation_time": time.perf_counter() - began})
        self._console.evaluation(step, scores)

    def is_best(self, step: int) -> bool:
        """Whether `step` was evaluated, and its config.checkpoint.best_metric is the highest so far."""
        name = self.config.checkpoint.best_metric
        known = {at: scores[name] for at, scores in self.scores.items() if name in scores}
        return step in known and known[step] >= max(known.values())

    def save(self, step: int, state: TrainState, force: bool = False) -> None:
        """Saves where it is due, or at any step with `force`."""
        config = self.config
        self.writer.sync()
        epoch, index = divmod(step * config.prompts_per_step, len(self._task.prompts))
        meta = {"step": step, "seed": config.seed, "epoch": epoch, "index": index, "metrics_rows": self.writer.rows}
        meta |= {"data": self._task.fingerprint, "bad_steps": self._bad_steps}
        meta["evaluations"] = {str(at): scores for at, scores in self.scores.items()}
        force = force or step in (0, self._task.total_steps) or self.is_best(step)
        score = self.scores.get(step, {}).get(config.checkpoint.best_metric)
        self.checkpointer.save(step, state, meta, force=force, score=score)

    def restore(self) -> None:
        """Goes back to the newest checkpoint that is sound.

        Raises:
            InputError: the training set is not that of the run.
        """
        config = self.config
        self.first_step, self.state, meta = self.checkpointer.restore(self.learner.abstract_state())
        if meta["data"] != self._task.fingerprint:
            raise InputError(
                f"config.data.train = {config.data.train!r}: its prompts or answers are not those that the run in "
                f"{self.workdir} began with; bring them back, or start a new run with another --workdir"
            )
        self.scores = {int(at): scores for at, scores in meta["evaluations"].items()}
        self._bad_steps, self._skipped = meta["bad_steps"], int(self.state.skipped)
        self.expected_rows = meta["metrics_rows"]

    def stop_if_preempted(self) -> None:
        """Raises Preempted after a notice; of several processes all do so after the same step."""
        if cluster.any_of(preemption.noted()):
            raise Preempted

    def leave(self, step: int, state: TrainState) -> None:
        """Saves what is done, and ends the run: raises Preempted with the words for it."""
        self.save(step, state, force=True)
        self.checkpointer.wait()
        raise Preempted(f"preempted: step {step} of {self._task.total_steps} is saved in {self.workdir}")

    def finish(self, first: int, state: TrainState) -> None:
        """Waits for files, exports where asked, and says what came out of the run and where it is."""
        with self._console.phase("writing the last checkpoint"):
            self.checkpointer.wait()
        if self.config.checkpoint.export:
            out = self.workdir / "export"
            # Of the same run when it was shorter.
            cluster.from_first(functools.partial(shutil.rmtree, out, ignore_errors=True))
            size = hf_write.model_bytes(self._task.policy.model)
            with self._console.phase("exporting (MB)", size >> 20) as update:
                self._task.policy.save(out, self.learner.policy(state.params), lambda done: update(done >> 20))
        rows = overview.after(self.workdir, self.scores, first, self._task.total_steps)
        best = [step for step in self.scores if self.is_best(step)]
        if best:
            rows.insert(1, ("best checkpoint", f"step {max(best)}, by {self.config.checkpoint.best_metric}"))
        self._console.table("Done", rows)


def start(config: Config, task: Task, workdir: Path, stack: contextlib.ExitStack) -> Run:
    """Claims `workdir` and brings a run to where its first step can begin: restored, or warm and evaluated.

    What must be closed, however the run ends, goes onto `stack`.
    """
    console = stack.enter_context(Console())
    # These two check slots, mesh, the objective's settings and LoRA's targets, before anything is written.
    run = Run(config, task, workdir, console)
    sizes = {"max_context": task.max_context, "total_steps": task.total_steps}
    run.learner = Learner(config, task.policy.model, task.mesh, **sizes)
    claimed = cluster.from_first(functools.partial(prepare_workdir, workdir, config))
    if not (workdir / "config.json").is_file():
        raise InputError(f"--workdir {workdir}: process 0 made it, here it is not; give a folder that all hosts share")
    stack.enter_context(locked(workdir))
    run.open_verifier(stack)
    run.checkpointer = stack.enter_context(Checkpointer(workdir, config.checkpoint))
    latest = cluster.from_first(lambda: run.checkpointer.latest_step() if claimed else None)
    if claimed and latest is None and any((workdir / "samples").glob("step_*.jsonl")):
        raise InputError(f"--workdir {workdir}: holds samples of a run but no checkpoint of it; give another folder")
    engine = run.scheduler.engine
    with console.phase("compiling the sampler", len(engine.keys)) as update:
        engine.compile(update)
    with console.phase("compiling the update"):
        run.learner.predicted_bytes()
    title = "iGRPO run" if config.algorithm.num_drafts else "Run"
    console.table(title, overview.before(config, task, engine, run.learner))
    if latest is not None:
        with console.phase(f"restoring step {latest}"):
            run.restore()
    # What the steps after the checkpoint left behind is dropped here: they are run again.
    run.writer = stack.enter_context(Writer(workdir, config, None if latest is None else run.first_step))
    if run.writer.rows < run.expected_rows:
        console.message(
            f"metrics.jsonl has {run.writer.rows} rows up to step {run.first_step}, the checkpoint counted "
            f"{run.expected_rows}: rows were lost, and stay so"
        )
    params = None
    if latest is None and not (config.model.lora.rank and task.policy.path):
        params = weights.load(task.policy, task.mesh, config.seed, "float32", console)
        if config.warm_start.steps:
            params = _warm(config, task, params, run.writer, console)
    first = functools.partial(weights.first, config, task.policy, workdir, task.mesh, console=console, params=params)
    if config.model.lora.rank:
        run.learner.set_frozen(first(config.model.dtype))
        params = weights.adapters(config, task.policy, task.mesh)
    if config.algorithm.beta > 0:
        lora = config.model.lora.rank > 0
        run.learner.set_reference(weights.adapters(config, task.policy, task.mesh) if lora else first("float32"))
    del first
    if latest is None:
        run.state = run.learner.init(params)
        if config.evaluation.every:
            run.evaluate(run.state.params, 0)
        run.save(0, run.state)
    elif run.evaluation_due(run.first_step) and run.first_step not in run.scores:
        run.evaluate(run.state.params, run.first_step)
    console.start(task.total_steps, run.first_step, config.log.every, run.writer.history, run.scores)
    return run


def _warm(config: Config, task: Task, params: decoder.Params, writer: Writer, console: Console) -> decoder.Params:
    problems, _ = arithmetic.problems(config.data.arithmetic, config.seed)
    with console.phase("supervised warm start", config.warm_start.steps) as update:

        def report(step: int, loss: float) -> None:
            update(step, f"loss {loss:.3f}")
            if step % max(1, config.warm_start.steps // 20) == 0:
                writer.write(0, {"warm_start/step": step, "warm_start/loss": loss})

        encode = task.policy.encode_completion
        return warm_start(config, task.policy.model, task.mesh, params, problems, task.renderer, encode, report)
