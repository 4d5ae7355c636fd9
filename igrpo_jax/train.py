"""Algorithm 1 of iGRPO (arXiv 2602.09000) as a run: `train` is its loop, `train_step` is what the loop does.

Per step: prompts -> drafts -> verifier -> best draft -> q' -> refinements -> verifier -> advantages -> one update.
Everything random is derived from (seed, step), so a resumed run continues as if it had never stopped. How a run is
opened is in `session.opening`, what it reports and saves in `session.run`.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from igrpo_jax.cli import exits
from igrpo_jax.config import Config
from igrpo_jax.distributed import cluster, watchdog
from igrpo_jax.distributed.programs import compilations, peak_memory
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.learning import credit, diagnostics
from igrpo_jax.learning.train_state import TrainState
from igrpo_jax.outputs.metrics import rollout_metrics
from igrpo_jax.rewards import main_guard
from igrpo_jax.session import ending
from igrpo_jax.session.opening import open_run
from igrpo_jax.session.run import Run, StepResult, throughput
from igrpo_jax.session.run_context import RunContext, run_context
from igrpo_jax.storage.writing import spool_folder

OnStep = Callable[[int, Mapping[str, float]], object]


def train(config: Config, workdir: str | Path, on_step: OnStep | None = None) -> None:
    """Runs or resumes the training that `config` describes in `workdir`.

    Args:
        on_step: called after each step has been reported and, where due, saved, with the step's number and metrics
            (docs/metrics.md), which include the scores of an evaluation after it. If an evaluation is interrupted, it
            is called once the resumed run has completed it. Of several processes, some may have none. If it raises, the
            step is saved and the run ends; the same call resumes after that step.

    Raises:
        InputError: something in `config` or what it names is wrong, or `workdir` holds another run.
        RunError: the run cannot continue: a full disk, too many steps that are not finite, or too many verifier
            failures, after which the last step is saved.
        Exception: what `on_step` raised, with a note that says so; or another error, with a note if the last step
            could be saved.
        Preempted: SIGTERM arrived; the last finished step is saved.
    """
    main_guard.check_main()
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step = {on_step!r}: must be a function of a step's number and its metrics, or None")
    with run_context(config, workdir) as context:
        if not ending.is_finished(context.workdir, config, context.console):
            _train(config, context, on_step)


def _train(config: Config, context: RunContext, on_step: OnStep | None) -> None:
    """Opens the run and takes its remaining steps. On Ctrl-C `run_context` clears this frame, which frees the state."""
    run, state = open_run(config, context)
    done = run.resumed_after
    is_watched = cluster.any_of(on_step is not None)  # it may be given on one process only
    if is_watched and done and run.progress.interrupted == done:
        _call(on_step, run, state, done, run.reported(done) | run.progress.scores.get(done, {}))
    for step in range(done + 1, run.inputs.total_steps + 1):
        with run.saving_at_end(step - 1, state):
            run.stop_if_preempted()
            result = train_step(run, state, step)
        state = result.state
        run.report(step, result)
        if run.evaluation_due(step):
            with run.saving_at_end(step, state):
                run.evaluate(state.params, step)
        run.save(step, state)
        if is_watched:
            _call(on_step, run, state, step, result.metrics | run.progress.scores.get(step, {}))
    run.finish(state)


def _refuse(argv: list[str]) -> None:
    """Raises InputError naming the training command, because users also try `python -m igrpo_jax.train`."""
    raise InputError("igrpo_jax.train: is not a command; to train, run python -m igrpo_jax.main --config FILE")


def _call(on_step: OnStep | None, run: Run, state: TrainState, step: int, metrics: Mapping[str, float]) -> None:
    """Calls `on_step`, if this process has one. If it raises on any process, all of them save `state` and end the run.

    Raises:
        Exception: what `on_step` raised here.
        RunError: it raised on another process.
    """
    failed: Exception | None = None
    try:
        if on_step:
            on_step(step, metrics)
    except Exception as error:  # it is the user's code, which may raise anything
        failed = error
    if not cluster.any_of(failed is not None):
        return
    run.save_and_wait(step, state)
    told = f"step {step} is saved in {run.workdir}, and the same call of train_model resumes after it"
    if failed is None:
        raise RunError(f"on_step: raised an error on another process; {told}")
    failed.add_note(f"on_step raised this; {told}")
    raise failed


def train_step(run: Run, state: TrainState, step: int) -> StepResult:
    """Runs one step of Algorithm 1: samples both stages, scores them, and makes one update, which donates `state`."""
    learner, name, is_first = run.learner, f"step {step}", step == run.resumed_after + 1
    with _profiled(run.config, run.workdir, step), compilations() as compiled:
        began = time.perf_counter()
        prompts = functools.partial(run.inputs.step_prompts, step)  # maps the number of a redraw to its prompts
        with watchdog.phase("rollout", name):
            groups, sampled = run.rollout.collect(learner.rollout_params(state.params), step, prompts)
        if is_first:
            run.compile_rest()
        advantages = credit.advantages(groups, run.config)
        with watchdog.phase("update", name), watchdog.phase("dispatch"):
            checked = diagnostics.rescored_metrics(learner, state.params, groups) if run.shows_samples(step) else {}
            updating = time.perf_counter()
            state, learned = learner.update(state, groups, advantages.refinements, step, advantages.drafts)
            ended = time.perf_counter()
    if is_first:
        compiled = []  # the first step of a launch compiles the run's programs, which do not count as recompilations
    times = {"perf/update_time": ended - updating, "perf/step_time": ended - began, "perf/recompiles": len(compiled)}
    times["perf/wall_time"] = time.time()
    changes = [credit.reward_changes(group, run.config.algorithm) for group in groups]
    metrics = {**checked, **learned, **rollout_metrics(groups, run.config, changes), **sampled}
    metrics |= {**credit.reward_metrics(groups, run.config), **times, **peak_memory()}
    metrics |= throughput(metrics, list(run.inputs.mesh.devices.flat))
    return StepResult(state, groups, advantages, metrics, compiled)


@contextlib.contextmanager
def _profiled(config: Config, workdir: Path, step: int):
    """Records the JAX profiler's trace of the steps in config.log.profile_steps into workdir/profile.

    Several processes have a folder each, because those of one host would write the same files.
    """
    if step in config.log.profile_steps:
        folder = spool_folder(workdir) / "profile"
        with jax.profiler.trace(str(folder / f"process_{jax.process_index()}" if jax.process_count() > 1 else folder)):
            yield
    else:
        yield


if __name__ == "__main__":
    exits.run(_refuse)
