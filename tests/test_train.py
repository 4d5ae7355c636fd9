"""Whole runs of a micro model: what they write, and that a killed and resumed run equals an uninterrupted one."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import time
import weakref
from types import SimpleNamespace

import chat_templates
import jax
import numpy as np
import pytest
from builders import completion, group, run_config
from whole_runs import check_same_rows, faulty, final_state, rewind, rows, run, samples, settings, start

from igrpo_jax import config, train
from igrpo_jax.cli import exits
from igrpo_jax.data import arithmetic
from igrpo_jax.distributed import cluster, sharding, watchdog
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.distributed.programs import compilations
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.evaluation import comparison, evaluator, planning, summaries
from igrpo_jax.evaluation.evaluator import Evaluator
from igrpo_jax.learning import rollout
from igrpo_jax.models.policy import open_policy
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.workdir import check_workdir, prepare_workdir
from igrpo_jax.rewards.failures import VerifierError
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.session import opening, overview, run_context, run_inputs
from igrpo_jax.session.beginning import claim_folder
from igrpo_jax.session.run import Run as Opened
from igrpo_jax.session.run import utilization
from igrpo_jax.session.run_inputs import open_inputs


def test_a_run_says_that_it_replaces_one_without_a_checkpoint(tmp_path):
    printed = io.StringIO()
    for seed in (0, 1):
        with contextlib.ExitStack() as stack, Console(printed) as console:
            context = run_context.RunContext(tmp_path, console, stack)
            resumes, _ = claim_folder(context, config.Config(seed=seed), check_workdir, prepare_workdir)
            assert not resumes
    assert " ".join(printed.getvalue().split()) == (
        f"--workdir {tmp_path}: the run in it ended before its first checkpoint; this one takes its place, with other "
        "settings (seed: 0 -> 1)"
    )


def test_a_callback_gets_each_step_with_the_scores_after_it(monkeypatch, tmp_path):
    """After the step is saved, so that nothing is lost where it raises."""
    calls = []

    class Run:
        resumed_after, inputs = 2, SimpleNamespace(total_steps=4)
        progress = SimpleNamespace(scores={2: {"eval/x": 0.25}}, interrupted=2)  # an earlier launch ended there
        reported = lambda self, step: {"reward": step / 2}
        stop_if_preempted = finish = lambda self, *_: None
        saving_at_end = lambda self, *_: contextlib.nullcontext()
        report = lambda self, step, _: calls.append(f"report {step}")
        save = lambda self, step, _: calls.append(f"save {step}")
        evaluation_due = lambda self, step: step == 4
        evaluate = lambda self, _, step: self.progress.scores.update({step: {"eval/x": 0.5}})

    state = SimpleNamespace(params=None)
    monkeypatch.setattr(train, "open_run", lambda *_: (Run(), state))
    step = lambda run, state, step: train.StepResult(state, [], np.zeros(0), {"reward": step / 2}, [])
    monkeypatch.setattr(train, "train_step", step)
    train.train(config.Config(compilation_cache=""), tmp_path, lambda *call: calls.append(call))
    assert calls == [
        (2, {"reward": 1.0, "eval/x": 0.25}),
        *("report 3", "save 3", (3, {"reward": 1.5})),
        *("report 4", "save 4", (4, {"reward": 2.0, "eval/x": 0.5})),
    ]


def test_a_step_samples_scores_and_updates(monkeypatch, tmp_path):
    """Drafts of step 7 are those of its prompts and of the policy before it; rescoring is for steps that show samples.

    With the bonus a right refinement of a wrong draft earns 1.5, beside 0 and drafts of 0 and 1: mean 5/8, std 3/4.
    """
    drafts = [completion("draft", i, [3], accuracy=accuracy) for i, accuracy in enumerate((0.0, 1.0))]
    refined = [completion("refine", i, [3, 4], accuracy=accuracy) for i, accuracy in enumerate((1.0, 0.0))]
    groups, told, before, after = [group(drafts, 0, refined)], [], SimpleNamespace(params="old"), object()
    algorithm = {"train_drafts": True, "improvement_bonus": 0.5, "group": "prompt"}
    monkeypatch.setattr(train.diagnostics, "rescored_metrics", lambda learner, *args: {"rescored": args})

    def collect(params, step, prompts):
        told.append((params, step, prompts(), prompts(2)))
        return groups, {"perf/draft_tokens": 2, "perf/completion_tokens": 4}

    def update(state, groups, advantages, step, draft_advantages):
        told.append((state, groups, step))
        told.append([[own.tolist() for own in stage] for stage in (advantages, draft_advantages)])
        return after, {"loss": 0.5}

    run = SimpleNamespace(
        config=run_config(**{f"algorithm.{name}": value for name, value in algorithm.items()}),
        workdir=tmp_path,
        resumed_after=6,
        inputs=SimpleNamespace(
            step_prompts=lambda *place: place, mesh=SimpleNamespace(devices=np.array(jax.devices()))
        ),
        learner=SimpleNamespace(rollout_params=lambda params: f"{params}, cast", update=update),
        rollout=SimpleNamespace(collect=collect),
        compile_rest=lambda: told.append("compiled"),
        shows_samples=lambda step: step == 8,
    )
    result = train.train_step(run, before, 7)
    (sampled, compiled, updated, (refinements, of_drafts)) = told
    assert sampled == ("old, cast", 7, (7,), (7, 2)) and compiled == "compiled" and updated == (before, groups, 7)
    assert refinements == [pytest.approx([7 / 6, -5 / 6], rel=1e-3)]
    assert of_drafts == [pytest.approx([-5 / 6, 1 / 2], rel=1e-3)]
    assert [[own.tolist() for own in stage] for stage in result.advantages] == told[3]
    assert result.state is after and result.groups is groups and "rescored" not in result.metrics
    assert (result.metrics["refine/reward_change"], result.metrics["reward_std"]) == (0.25, pytest.approx(0.75))
    assert result.metrics["perf/tokens_per_second"] == pytest.approx(6 / result.metrics["perf/step_time"])
    shown = train.train_step(run, before, 8)
    assert shown.metrics["rescored"] == ("old", groups)
    assert told[4:] == [("old, cast", 8, (8,), (8, 2)), (before, groups, 8), told[3]]


def test_a_step_whose_callback_raises_is_saved(monkeypatch, tmp_path):
    calls = []

    class Run:
        resumed_after, inputs, workdir = 0, SimpleNamespace(total_steps=9), tmp_path
        progress = SimpleNamespace(scores={}, interrupted=0)  # in the evaluation before the first step
        stop_if_preempted = report = save = finish = lambda self, *_: None
        saving_at_end = lambda self, *_: contextlib.nullcontext()
        evaluation_due = lambda self, step: False
        save_and_wait = lambda self, step, state: calls.append((step, state.params))

    monkeypatch.setattr(train, "open_run", lambda *_: (Run(), SimpleNamespace(params=0)))
    more = lambda state: SimpleNamespace(params=state.params + 1)
    monkeypatch.setattr(train, "train_step", lambda run, state, step: train.StepResult(more(state), [], [], {}, []))

    def enough(step, metrics):
        if step == 3:
            raise OverflowError("enough")

    with pytest.raises(OverflowError, match="enough") as caught:
        train.train(config.Config(compilation_cache=""), tmp_path, enough)
    told = f"step 3 is saved in {tmp_path}, and the same call of train_model resumes after it"
    assert calls == [(3, 3)] and caught.value.__notes__ == [f"on_step raised this; {told}"]
    monkeypatch.setattr(train.cluster, "any_of", lambda here: True)  # it raised on another process, in its first step
    with pytest.raises(RunError, match="on_step: raised an error on another process; step 1 is saved"):
        train.train(config.Config(compilation_cache=""), tmp_path, lambda *_: None)
    assert calls == [(3, 3), (1, 1)]
    asked = []  # no callback here, but on another process, whose answers all must hear
    monkeypatch.setattr(train.cluster, "any_of", lambda here: asked.append(here) or len(asked) == 1)
    train.train(config.Config(compilation_cache=""), tmp_path)
    assert asked == [False] * 10 and calls == [(3, 3), (1, 1)]


@pytest.mark.slow(seconds=12)
def test_where_the_verifier_fails_the_steps_before_are_saved(monkeypatch, tmp_path):
    """In the evaluation before step 1, whose answers are kept, and then in the rollout of step 2."""
    fields = {"steps": 2, "evaluation.every": 2, "warm_start.steps": 0, "learner.minibatches": 1, "rollout.slots": 8}
    c = settings(**fields, **{"checkpoint.every": 100, "compilation_cache": str(tmp_path / "cache")})
    workdir, fails = tmp_path / "run", {"evaluation": 1, "rollout": 2}  # the calls that fail
    drawn, draw = [], Evaluator._draw
    monkeypatch.setattr(Evaluator, "_draw", lambda *args: (drawn.append(args), draw(*args)))

    def failing(name):
        def check(*_):
            fails[name] -= 1
            if fails[name] == 0:
                raise VerifierError("too many gradings failed", comes_again=name == "rollout")

        return check

    monkeypatch.setattr(evaluator, "check_errors", failing("evaluation"))
    monkeypatch.setattr(rollout, "check_errors", failing("rollout"))
    for step in range(2):
        goes_on = "with that mended, a resume goes on" if step else "the same command resumes"
        told = f"too many gradings failed; step {step} is saved in {workdir}; {goes_on} from there"
        with pytest.raises(VerifierError, match=re.escape(told)):
            train.train(c, workdir)
        assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {str(step)}
    assert len(drawn) == 1 and [row["step"] for row in rows(workdir) if "loss" in row] == [1]


def test_what_an_error_leaves_whole_is_saved(monkeypatch, tmp_path):
    """By one process, and unless an update has taken the state; where saving fails too, the first error is raised."""
    saved, full = [], []

    def save_and_wait(self, step, state):
        if full:
            raise RunError("the disk is full")
        saved.append((step, state))

    monkeypatch.setattr(Opened, "save_and_wait", save_and_wait)
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Opened))
    opened, state = Opened(**fields | {"workdir": tmp_path}), {"params": jax.numpy.zeros(3)}

    def notes():
        with pytest.raises(RunError, match="no more workers") as caught, opened.saving_at_end(4, state):
            raise RunError("no more workers")
        return getattr(caught.value, "__notes__", [])

    assert notes() == [run_context.saved_at(4, tmp_path)] and saved == [(4, state)]
    full.append(True)
    assert notes() == ["step 4 could not be saved: RunError: the disk is full"]
    full.clear()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert notes() == []
    state["params"].delete()
    assert notes() == [] and len(saved) == 1


def test_a_run_that_is_interrupted_says_what_it_has_saved(monkeypatch, tmp_path, capsys):
    """The temporary folder is a save that did not end; of a bucket nothing is asked."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "open_run", interrupted)
    workdir = tmp_path / "run"
    command = lambda _: train.train(config.Config(compilation_cache=""), workdir)

    def said():
        with pytest.raises(SystemExit) as stop:
            exits.run(command)
        assert stop.value.code == 130
        return capsys.readouterr().err.removeprefix("igrpo_jax: interrupted; ")

    assert said() == f"no step is saved in {workdir}; the same command starts from the beginning\n"
    for name in ("2", "10", "12.orbax-checkpoint-tmp"):
        (workdir / "checkpoints" / name).mkdir(parents=True)
    assert said() == f"step 10 is saved in {workdir}; the same command resumes from there\n"
    monkeypatch.setattr(run_context, "is_remote", lambda path: True)
    assert said() == f"the same command resumes from what is saved in {workdir}, if anything is\n"


def test_an_interrupt_leaves_no_state_on_the_devices(monkeypatch, tmp_path):
    """A notebook keeps the error and its traceback while the cell is run again, as pytest does here."""
    arrays = []

    def array():
        made = jax.numpy.zeros(3)
        arrays.append(weakref.ref(made))
        return made

    class Run:
        resumed_after, inputs = 0, SimpleNamespace(total_steps=1)
        stop_if_preempted = lambda self: None
        saving_at_end = Opened.saving_at_end

    def interrupted(run, state, step):
        made = array()
        raise KeyboardInterrupt(made.shape)

    monkeypatch.setattr(train, "open_run", lambda *_: (Run(), SimpleNamespace(params=array())))
    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        train.train(config.Config(compilation_cache=""), tmp_path)
    assert caught.value.__traceback__ and [made() for made in arrays] == [None, None]


@pytest.mark.slow(seconds=20)
def test_a_run_writes_what_the_contract_names(whole):
    workdir, _ = whole
    lines = rows(workdir)
    steps = [row for row in lines if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(row["loss"]) for row in steps)
    full = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-2])
    names = """loss reward reward_std rewards/accuracy/mean rewards/format/mean frac_reward_zero_std entropy kl
    grad_norm completions/mean_length completions/clipped_ratio learning_rate clip_ratio/region_mean
    sampling/sampling_logp_difference/mean sampling/sampling_logp_difference/max draft/reward draft/best_reward
    draft/solved_none draft/solved_some draft/solved_all draft/mean_length refine/fixed refine/broken refine/kept_right
    refine/kept_wrong refine/gain_vs_best_draft refine/copy_ratio verifier/timeout_frac verifier/error_frac
    verifier/latency_p99 perf/step_time perf/rollout_time perf/update_time perf/verify_wait_time perf/draft_tokens
    perf/weight_sync_time perf/completion_tokens perf/tokens_per_second perf/slot_utilization perf/stage_overlap_frac
    perf/pages_in_use_frac perf/preempted_samples
    perf/recompiles perf/update_flops perf/wall_time perf/peak_host_memory"""
    assert not set(names.split()) - set(full), set(names.split()) - set(full)
    assert [row["step"] for row in lines if "eval/arithmetic/pass@1" in row] == [0, 2, 4, 5]
    assert any("warm_start/loss" in row for row in lines)
    assert list(samples(workdir)) == [f"step_{step:06d}.jsonl" for step in range(1, 6)]
    first = [json.loads(line) for line in samples(workdir)["step_000001.jsonl"].splitlines()]
    assert len(first) == 4 * (2 + 2)
    columns = (
        "prompt_id stage sample_id parent_draft_id prompt text token_count finished rewards extracted answer advantage"
    )
    assert set(columns.split()) <= set(first[0])
    assert json.loads((workdir / "config.json").read_text())["prompts_per_step"] == 4
    assert (workdir / "tensorboard").is_dir() and (workdir / "checkpoints" / "5").is_dir()
    assert list((workdir / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_evaluations_of_a_run_record_their_settings_and_can_be_compared(whole):
    workdir, _ = whole
    first, last = (workdir / "evaluations" / f"step_{step:06d}" for step in (0, 5))
    recorded = json.loads((last / "evaluation.json").read_text())
    assert (recorded["model"], recorded["step"], recorded["dtype"]) == (str(workdir.resolve()), 5, "float32")
    assert recorded["temperature"] == 0.6 and recorded["max_completion_length"] == 24
    text = comparison.compare(first, last)
    assert f"A = {first}: {workdir.resolve()}, step 0" in text and "records no settings" not in text
    assert "Settings and problems are the same.\n" in text


def test_utilization_is_of_the_peak_of_all_devices():
    """2 PFLOP in 4 s are 0.5 PFLOP/s, of two H100 with 0.989 each."""
    metrics = {"perf/update_flops": 2e15, "perf/update_time": 4.0}
    cards = [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 2
    assert utilization(metrics, cards) == {"perf/mfu": pytest.approx(0.5 / (2 * 0.989))}
    assert utilization(metrics, [SimpleNamespace(device_kind="cpu")]) == {}


def test_a_profiler_that_would_crash_is_refused(monkeypatch):
    """JAX's, where libtpu is installed and looked for, and there is no TPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    for platforms, steps, refused in ((None, (2,), True), ("cpu", (2,), False), (None, (), False)):
        monkeypatch.setattr(run_inputs.jax, "config", SimpleNamespace(jax_platforms=platforms))
        with pytest.raises(InputError, match="JAX_PLATFORMS=cpu") if refused else contextlib.nullcontext():
            run_inputs.check_profiler(config.LogConfig(profile_steps=steps))


@pytest.mark.slow
def test_a_run_says_what_it_does_and_where_it_wrote(whole):
    _, out = whole
    for words in (
        "drafts per step          8 (N = 2)",
        "refinements per step     8 (G = 2)",
        "programs to compile",
        "step 1/5  solved",
        "--- kept of 2 drafts",
        "--- refinement 1 of 2",
        "before,",
        "metrics.jsonl",
    ):
        assert words in out, words


def recompiles(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["perf/recompiles"] for row in lines if "loss" in row]


@pytest.mark.slow
def test_all_is_compiled_in_the_first_step(whole):
    """The table with their number comes before the first program that is waited for."""
    workdir, out = whole
    assert out.index("programs to compile") < (out.find("compiling ") if "compiling " in out else len(out))
    assert recompiles(workdir) == [0] * 5
    assert "new shapes" not in out


@pytest.mark.slow(seconds=17)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(whole, tmp_path):
    """SIGKILL after step 3, with checkpoints at 2 and 4: step 3 is run again from the same state.

    Red when the optimizer state, the data position or the keys are not what they were, or when rows are written twice.
    """
    workdir, _ = whole
    assert any(row["grad_norm"] > 0 for row in rows(workdir) if "loss" in row), (
        "a run that learns nothing shows nothing"
    )
    killed = tmp_path / "run"
    process = start(tmp_path, killed)
    deadline = time.monotonic() + 240
    # Saves are asynchronous; that of step 4 waits for that of step 2, so the run can't end before this is true.
    while not ((killed / "samples" / "step_000003.jsonl").exists() and (killed / "checkpoints" / "2").exists()):
        assert process.poll() is None, process.ended().stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.ended().returncode == -signal.SIGKILL
    assert "resumed after" in run(tmp_path, killed)
    check_same_rows(rows(killed), rows(workdir))
    assert samples(killed) == samples(workdir)
    assert recompiles(killed) == [0] * 5  # a resume has to compile again, which is nothing to be alarmed about
    a, b = final_state(killed, settings()), final_state(workdir, settings())
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.proof
@pytest.mark.slow
def test_no_samples_before_the_first_checkpoint_is_whole(tmp_path):
    """Of a large model it takes longer than a step. A kill in between would leave samples of a run and no checkpoint,
    which is refused."""
    inject = """
import time
rename, report = os.rename, Run.report
def slow(*args):
    time.sleep(3 * ("orbax-checkpoint-tmp" in str(args[0])))
    return rename(*args)
def killed(self, *args):
    report(self, *args)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename, Run.report = slow, killed
"""
    short = ("warm_start.steps=0", "evaluation.every=0", "checkpoint.best_metric=", "steps=1")
    assert faulty(inject, tmp_path, tmp_path / "run", *short).returncode == -signal.SIGKILL
    assert list(samples(tmp_path / "run")) == ["step_000001.jsonl"]
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()


@pytest.mark.proof
@pytest.mark.slow
def test_a_run_takes_the_folder_of_one_that_was_killed_before_its_first_step(tmp_path):
    """By SIGKILL while its checkpoint of step 0 has its temporary name, after evaluations and the warm start."""
    inject = """
rename = os.rename
def killed(*args):
    if "orbax-checkpoint-tmp" in str(args[0]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(*args)
os.rename = killed
"""
    short, workdir = ("warm_start.steps=2", "steps=1", "evaluation.limit=1"), tmp_path / "run"
    assert faulty(inject, tmp_path, workdir, *short).returncode == -signal.SIGKILL
    left = sorted(path.name for path in workdir.iterdir())
    assert {".lock", "config.json", "metrics.jsonl", "checkpoints", "evaluations"} <= set(left)
    assert all("orbax-checkpoint-tmp" in path.name for path in (workdir / "checkpoints").iterdir())
    said = " ".join(run(tmp_path, workdir, *short, "seed=1").split())
    assert f"--workdir {workdir}: the run in it ended before its first checkpoint; this one takes its place" in said
    assert "(seed: 0 -> 1)" in said and "Done" in said
    lines = rows(workdir)
    assert [row["step"] for row in lines if "loss" in row] == [1]
    assert [row["step"] for row in lines if "eval/arithmetic/pass@1" in row] == [0, 1]
    assert [row["warm_start/step"] for row in lines if "warm_start/step" in row] == [1, 2]  # none of the killed run's
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["0", "1"]


def test_clean_compares_with_all_that_evaluation_may_ask(tmp_path):
    """Also where the run itself never evaluates, or only a few of the problems."""
    words = " ".join(f"word{i}" for i in range(20))
    for name, questions in {"train": ["1+1", words], "mine": ["2+2", words]}.items():
        lines = [json.dumps({"prompt": question, "answer": "2"}) for question in questions]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    c = settings()  # the built-in model has never seen a data set, which `freeze` would say
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, train=str(tmp_path / "train.jsonl"), clean=True))
    c = dataclasses.replace(c, prompts_per_step=1, checkpoint=dataclasses.replace(c.checkpoint, best_metric=""))
    for every, asked in ((0, {}), (1, {"mine": ["2+2"]})):
        held_out = {"every": every, "benchmarks": ("mine",), "data_dir": str(tmp_path), "limit": 1}
        inputs = open_inputs(dataclasses.replace(c, evaluation=dataclasses.replace(c.evaluation, **held_out)))
        assert [prompt.question for prompt in inputs.prompts] == ["1+1"]
        assert ("training problems like mine's", "1 of 2, left out") in inputs.notes
        assert {name: [one.question for one in some] for name, some in inputs.evaluation_plan.prompts.items()} == asked


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(whole):
    """Of the evaluations at 0, 2, 4 and 5 the highest, the latest of equals, beside the newest two."""
    workdir, _ = whole
    scores = {row["step"]: row["eval/arithmetic/pass@1"] for row in rows(workdir) if "eval/arithmetic/pass@1" in row}
    assert list(scores) == [0, 2, 4, 5]
    best = max(scores, key=lambda step: (scores[step], step))
    assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} == {4, 5, best}
    summary = json.loads((workdir / "evaluations" / "step_000004" / "summary.json").read_text())
    assert summary["benchmarks"]["arithmetic"]["single_shot"]["pass@1"] == scores[4]


COOLER = {"evaluation.temperature": 0.9}


@pytest.mark.slow(seconds=18)
@pytest.mark.parametrize(
    ("step", "changed", "kept"),
    [(0, {}, True), *(pytest.param(1, *each, marks=pytest.mark.proof) for each in (({}, True), (COOLER, False)))],
)
def test_an_evaluation_that_was_preempted_goes_on(tmp_path, monkeypatch, step, changed, kept):
    """Its answers are those of the state that was saved; other settings need others. What a kill left is of no use."""
    c = {"steps": 1, "evaluation.every": 1, "warm_start.steps": 0, "learner.minibatches": 1, "rollout.slots": 8}
    c |= {"evaluation.samples": 8, "compilation_cache": str(tmp_path / "cache")}
    check, graded = Verifier.check_answer, []

    def told(self, candidate, batch=None):
        graded.append(candidate)
        if len(graded) == 1 and not folder.exists():  # as a run that was killed in this evaluation would leave it
            folder.mkdir(parents=True)
            left = {"index": 0, "drafts": [], "sample_id": 0, "status": "ok", "accuracy": 7.0}
            (folder / "arithmetic.jsonl").write_text(json.dumps(left) + "\n")
        if len(graded) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        score = check(self, candidate, batch)
        score.result()  # workers that are still starting would leave no answer before the signal
        return score

    monkeypatch.setattr(Verifier, "check_answer", told)
    folder = tmp_path / "run" / "evaluations" / f"step_{step:06d}"
    stop = 32 * step + 12  # in the middle of the evaluation after `step`
    with pytest.raises(Preempted, match=f"preempted: step {step} of 1 is saved"):
        train.train(settings(**c), tmp_path / "run")
    before = (folder / "arithmetic.jsonl").read_text().splitlines()
    assert 0 < len(before) < 32 and "7.0" not in before[0]
    graded.clear()
    stop = -1
    train.train(settings(**c, **changed), tmp_path / "run")
    after = (folder / "arithmetic.jsonl").read_text().splitlines()
    later = 32 * (1 - step)  # of the evaluation after the last step
    assert len(graded) == later + (32 - len(before) if kept else 32) and len(after) == 32
    assert (set(before) <= set(after)) == kept


@pytest.mark.slow(seconds=12)
def test_a_step_that_is_evaluated_after_a_resume_may_be_the_best(tmp_path, monkeypatch, capsys):
    """The evaluation of step 1 is preempted, and its score comes when the step is saved already.

    A resume of 400 steps was killed before it saved anything, which changes no learning rate, and processes tell each
    other things in JSON.
    """
    fields = {"steps": 3, "evaluation.every": 1, "warm_start.steps": 0, "learner.minibatches": 1, "rollout.slots": 8}
    c = settings(**fields, **{"checkpoint.every": 1, "checkpoint.keep": 1})
    scores, preempted = {0: 0.1, 1: 0.9, 2: 0.2, 3: 0.3}, {1}

    def evaluated(self, params, out, head):
        if head["step"] in preempted:
            raise Preempted
        return head["step"]

    monkeypatch.setattr(Evaluator, "run", evaluated)
    monkeypatch.setattr(summaries, "flat", lambda step: {"eval/arithmetic/pass@1": scores[step]})
    with pytest.raises(Preempted):
        train.train(c, tmp_path)
    preempted.clear()
    kept = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(kept | {"steps": 400}))
    monkeypatch.setattr(cluster, "from_first", lambda decide: json.loads(json.dumps(decide())))
    capsys.readouterr()
    seen = {}
    train.train(c, tmp_path, lambda step, metrics: seen.update({step: metrics}))
    said = capsys.readouterr().out
    assert "eval/arithmetic/pass@1 0.900 at step 1, the best so far\n" in said
    assert "learning rate" not in said
    idle = "warm_start.batch_size, warm_start.learning_rate: need model.path to be empty and warm_start.steps above 0"
    assert re.search(rf"\n  without effect +{idle}\n", said)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}
    written = [row for row in rows(tmp_path) if "eval/arithmetic/pass@1" in row]
    assert {row["step"]: row["eval/arithmetic/pass@1"] for row in written} == scores and len(written) == len(scores)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    steps = {row["step"]: row.keys() - {"step"} for row in lines if "loss" in row}
    for step, metrics in seen.items():
        assert metrics.keys() - {"eval/arithmetic/pass@1"} == steps[step]  # on_step gets all of the step's row
    assert seen.keys() == {1, 2, 3} and seen[1]["eval/arithmetic/pass@1"] == 0.9


@pytest.mark.slow
def test_a_best_metric_that_is_none(tmp_path):
    done = faulty("", tmp_path, tmp_path / "run", "checkpoint.best_metric=eval/arithmetic/pass@9")
    assert done.returncode == 2 and "the nearest is 'eval/arithmetic/pass@1'" in done.stderr
    assert not (tmp_path / "run").exists() and "compiling" not in done.stdout


REWARDS = """
def is_right(completions, answer, trainer_state, **columns):
    assert trainer_state.global_step == 0 and len(set(columns["prompts"])) == 1
    return [float(f"<answer>{gold}</answer>" in text) for text, gold in zip(completions, answer)]


def never(completions, **columns):
    return [None] * len(completions)


def by_reference(completions, **columns):
    return [len(text) for text in columns["reference"]]
"""


def test_custom_rewards_are_called_with_right_and_wrong_answers(tmp_path, monkeypatch):
    """To the first two problems; the table of the run shows what they gave."""
    (tmp_path / "rewards_of_mine.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    c = settings()

    def notes(*names):
        paths = tuple(f"rewards_of_mine:{name}" for name in names)
        return open_inputs(dataclasses.replace(c, rewards=dataclasses.replace(c.rewards, functions=paths))).notes

    both = "1 for a right answer, 0 for a wrong one"  # of either problem
    (right, never) = notes("is_right", "never")
    assert right == ("reward is_right", both)
    alike = re.escape(both.replace("1", "None").replace("0", "None"))
    tried = r" \(right was '<think>It is \\\\boxed\{(\d+)\}\. Done\.</think><answer>\1</answer>'\)"
    assert never[0] == "reward never" and re.fullmatch(alike + tried, never[1])
    with pytest.raises(InputError) as refused:
        notes("is_right", "by_reference")
    assert re.fullmatch(
        r"config\.rewards\.functions = 'rewards_of_mine:by_reference': fails on the training problem '.+': "
        r"KeyError: 'reference' \(in by_reference, .+rewards_of_mine\.py, line 12; it was given .* columns answer\)",
        str(refused.value),
    )
    assert notes() == []


@pytest.mark.slow
def test_a_custom_reward_that_fails_ends_a_run_before_it_writes_or_compiles(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(REWARDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = faulty("", tmp_path, tmp_path / "run", "rewards.custom=rewards_of_mine:by_reference")
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "KeyError: 'reference' (in by_reference, " in line and line.endswith("the columns answer)")
    assert not (tmp_path / "run").exists() and "compiling" not in done.stdout


def test_a_best_metric_without_benchmarks():
    c = settings()
    nothing = dataclasses.replace(c, evaluation=dataclasses.replace(c.evaluation, benchmarks=()))
    with pytest.raises(InputError, match=r"best_metric = 'eval/arithmetic/pass@1': .*; name a benchmark in evaluation"):
        open_inputs(nothing)


@pytest.mark.slow
def test_a_run_evaluates_what_a_best_metric_may_name(whole):
    inputs = open_inputs(settings())
    known = set(planning.metric_names(inputs.config, inputs.evaluation_plan))
    for row in rows(whole[0]):
        written = {name for name in row if name.startswith("eval/")}
        assert written <= known and (not written or known - written <= {"eval/arithmetic/solved_length"})


@pytest.mark.slow
def test_a_finished_run_compiles_nothing_and_reads_neither_model_nor_problems(whole, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
    monkeypatch.setattr(train, "open_run", None)
    with compilations() as compiled:
        train.train(settings(), whole[0])
    printed = capsys.readouterr().out
    done = whole[1].partition("Done\n")[2].replace("5\n", "5, resumed after 5\n", 1)
    assert not compiled and printed == f"Done\n{done}"
    assert {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(whole, tmp_path):
    """Also where its note is gone, with fewer slots and smaller micro-batches, as after want of memory. A row that was
    lost is missed, and config.json keeps the settings of what was evaluated, and has the other new ones."""
    workdir = shutil.copytree(whole[0], tmp_path / "copy")
    (workdir / "finished.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[1:]))
    recorded = lambda: json.loads((workdir / "config.json").read_text())
    kept = recorded()["evaluation"]
    said = run(tmp_path, workdir, "rollout.slots=1", "learner.tokens_per_microbatch=256", "evaluation.samples=3")
    assert "resumed after 5" in said and "missing rows" in said
    assert "nothing was evaluated" in said and recorded()["evaluation"] == kept
    assert recorded()["rollout"]["slots"] == 1
    assert (workdir / "metrics.jsonl").read_text() == "".join(lines[1:])


@pytest.mark.slow
def test_a_different_configuration_is_refused_by_name(whole):
    workdir, _ = whole
    other = settings(seed=7, **{"rollout.slots": 8})  # one slot for each device of this process
    before = (workdir / "config.json").read_text()
    with pytest.raises(InputError, match="seed: 0 -> 7"):
        train.train(other, workdir)
    assert (workdir / "config.json").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 6])
def test_a_resume_that_is_refused_leaves_the_folder_as_it_was(whole, monkeypatch, steps):
    """One with fewer steps than the run has made, and one whose problems are not those that it began with."""
    workdir, said = whole[0], "config.steps = 3: ends after step 3, but the run in .* has already reached step 5"
    if steps > 5:
        monkeypatch.setattr(opening.RunInputs, "fingerprint", "of other problems")
        said = "its prompts or answers differ from those that the run in"
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(InputError, match=said):
        train.train(settings(steps=steps, **{"rollout.slots": 8}), workdir)  # one for each device of this process
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before and (workdir / "finished.json").is_file()


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_is_not_overwritten(whole, tmp_path):
    copy = shutil.copytree(whole[0], tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    before = rows(copy)
    done = faulty("", tmp_path, copy)
    assert done.returncode == 2 and "holds samples of a run but no checkpoint" in done.stderr
    assert rows(copy) == before and len(samples(copy)) == 5


@pytest.mark.proof
@pytest.mark.slow(seconds=14)
def test_a_resumed_run_keeps_its_reference(tmp_path):
    """With beta > 0, kl shows which policy the reference is: were it the policy at the time of the resume, the kl of
    step 3 would start again at 0. The departures from the paper are random too.
    """
    constant = ("algorithm.beta=0.1", "optimizer.warmup_ratio=0", "optimizer.min_lr_ratio=1")
    constant += ("algorithm.loss_type=gspo_token", "algorithm.entropy_coef=0.01", "algorithm.max_redraws=2")
    constant += ("algorithm.draft_selection=random", "algorithm.draft_dropout=0.2", "algorithm.train_drafts=True")
    constant += ("checkpoint.every=1", "checkpoint.keep=9", "steps=3")
    run(tmp_path, tmp_path / "whole", *constant)
    rewind(tmp_path / "whole", tmp_path / "part", 2)
    assert "resumed after 2" in run(tmp_path, tmp_path / "part", *constant)
    whole = [row for row in rows(tmp_path / "whole") if "loss" in row]
    check_same_rows([row for row in rows(tmp_path / "part") if "loss" in row], whole)
    assert whole[1]["kl"] > 0 and whole[2]["kl"] > 0
    assert sum(row["redraw/groups"] for row in whole) > 0 and all(row["draft/entropy"] > 0 for row in whole)


@pytest.mark.slow
def test_a_run_keeps_the_day_of_its_chat_template(tmp_path, monkeypatch):
    """The next day had other prompts, and the resume was refused with a message about the data. Here each launch ends
    where it would compile."""
    path, workdir = tmp_path / "model", tmp_path / "run"
    builtin = open_policy(settings().model)
    builtin.save(path, builtin.load(sharding.make_mesh(config.MeshConfig(), jax.devices()[:1]), 0))
    (path / "chat_template.jinja").write_text("{{ strftime_now('%d') }}" + arithmetic.CHAT_TEMPLATE)
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+2", "answer": "3"}\n' * 4)
    fields = {"model.path": str(path), "data.train": str(tmp_path / "train.jsonl"), "warm_start.steps": 0}
    fields |= {"evaluation.every": 0, "checkpoint.best_metric": "", "rollout.slots": 8}
    opened = []

    def compiles(inputs, *_):
        opened.append(inputs)
        raise InputError("this far")

    def start(day, says="this far", **more):
        chat_templates.set_today(monkeypatch, day)
        with pytest.raises(InputError) as caught:
            train.train(settings(**fields, **more), workdir)
        assert says in str(caught.value)
        return json.loads((workdir / "config.json").read_text())

    monkeypatch.setattr(opening, "_first_program_shapes", compiles)
    written = start("2026-11-26")
    assert written["data"]["template_date"] == "2026-11-26"
    written["data"]["template_date"] = "2026-11-25"  # of a run that ended before its first checkpoint, and is replaced
    (workdir / "config.json").write_text(json.dumps(written))
    written = start("2026-11-26", seed=7)
    assert written["data"]["template_date"] == "2026-11-26" and written["seed"] == 7
    fields["seed"] = 7
    (workdir / "damaged_checkpoints" / "1").mkdir(parents=True)  # from here on the run has something to lose
    assert start("2026-11-27") == written
    opened.pop(0)
    assert opened[0].fingerprint == opened[1].fingerprint
    opening._check_data(opened[1], workdir, opened[0].fingerprint)
    other = {"data.template_date": "2026-11-27"}
    start("2026-11-27", "other settings (data.template_date: '2026-11-26' -> '2026-11-27'); give another", **other)
    # A run of a version that wrote no day must be told its day. What it is told is compared with its prompts.
    del written["data"]["template_date"]
    (workdir / "config.json").write_text(json.dumps(written))
    assert start("2026-11-27", "that of the first launch was not recorded; give the day of that launch") == written
    start("2026-11-27", **other)
    with pytest.raises(InputError) as caught:
        opening._check_data(opened[2], workdir, opened[0].fingerprint)
    day = "(the chat template writes the date, here config.data.template_date = '2026-11-27'; if the run began on"
    assert day in str(caught.value)
    assert "restore the problems, the tokenizer," in str(caught.value)
    data = dataclasses.replace(opened[2].config.data, clean=True)
    cleaned = dataclasses.replace(opened[2], config=dataclasses.replace(opened[2].config, data=data))
    named = "restore the problems, config.evaluation.benchmarks and config.evaluation.data_dir (what they ask"
    with pytest.raises(InputError, match=re.escape(named)):
        opening._check_data(cleaned, workdir, opened[0].fingerprint)


@pytest.mark.proof
@pytest.mark.slow
def test_learning_rate_zero_changes_nothing_but_is_evaluated(tmp_path):
    run(tmp_path, tmp_path / "run", "optimizer.learning_rate=0", "steps=2")
    lines = rows(tmp_path / "run")
    first, last = (
        (tmp_path / "run" / "evaluations" / f"step_{n:06d}" / "arithmetic.jsonl").read_text() for n in (0, 2)
    )
    assert first == last  # the same weights give the same answers at any step
    answers = [json.loads(line) for line in first.splitlines()]
    (score,) = {row["eval/arithmetic/pass@1"] for row in lines if "eval/arithmetic/pass@1" in row}
    assert len(answers) == 4 and score == np.mean([row["accuracy"] for row in answers])
    assert all(row["accuracy"] == (row["extracted"] == row["answer"]) for row in answers)
    # With minibatches pi_old is computed on other micro-batches than the loss, so sums may be rounded differently.
    updates = [row for row in lines if "loss" in row]
    assert len(updates) == 2
    assert all(row["ratio/mean"] == pytest.approx(1, abs=1e-6) for row in updates)
    assert all(row["clip_ratio/region_mean"] == 0 for row in updates)


def test_what_does_not_fit_is_said(monkeypatch):
    """By the phase that needs more than a device has, with what to lower."""
    needs = {"update": 90 << 30, "rollout": 1 << 30}
    monkeypatch.setattr(overview, "predicted_bytes", lambda *_: needs)
    training = SimpleNamespace(remat="dots")
    # JAX reports no memory of a CPU, and none of a GPU where CUDA alone manages it.
    cpu, h100 = {"platform": "cpu"}, {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "client": None}
    for kind, reported, limit in (
        (cpu, None, ""),
        (h100, None, ", of 79.10 GiB"),
        (h100, {"bytes_limit": 2 << 30}, ", of 2.00 GiB"),
    ):
        device = SimpleNamespace(**kind, memory_stats=lambda reported=reported: reported)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        recomputed, predicted, *lines = overview.memory(None, training)
        assert recomputed == ("recomputed in the backward pass", "all but matrix products")
        assert predicted[1] == f"update 90.00 GiB, rollout 1.00 GiB{limit}"
        said = ("does not fit", f"update: lower {watchdog.SMALLER['update']}, or use more devices")
        assert lines == ([said] if limit else [])
