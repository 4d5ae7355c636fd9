"""Several processes train together: as one would, on any number of them, and none waits for ever for one that is gone.

All is on one machine, with gloo between the processes: numbers, deadlocks and checkpoints are covered, neither NCCL nor
TPU links, nor how a real cluster is found. One run of two processes is ended by a notice of preemption, and four go on
with it; one process with as many devices does the same here.
"""

import json
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import devices
import jax
import numpy as np
import pytest
import safetensors.numpy
import sampled_together
import whole_runs
from processes import Started, ended, free_port

from igrpo_jax import train
from igrpo_jax.distributed import peers
from igrpo_jax.learning import stages
from igrpo_jax.outputs.checkpoint_reading import saved_step
from igrpo_jax.report.runs import local_copy
from igrpo_jax.storage.addresses import path_of

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="compares with one process of eight devices")

REWARD = """
def graded(prompts, completions, **columns):
    return [len(text) * 7919 % 5 / 4 for text in completions]
"""
SETTINGS = {
    "seed": 3,
    "steps": 4,
    "prompts_per_step": 5,  # three for one process, two for the other
    "warm_start.steps": 0,
    "data.arithmetic.min_terms": 2,
    "data.arithmetic.max_terms": 2,
    "rollout.max_completion_length": 12,  # one length of prompts, one of completions: few programs
    "rollout.slots": 8,  # one for each device
    "learner.minibatches": 1,
    "algorithm.max_redraws": 1,
    "algorithm.filter_groups_metric": "reward",
    "rewards.custom": "some_reward:graded",
    "optimizer.learning_rate": 1e-3,
    "evaluation.every": 4,
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
    "checkpoint.best_metric": "",
    "log.samples_every": 0,
    "log.trackers": (),
}
# In step 2 what process 1 of two samples ends after two tokens: a process that waited for another would wait for ever.
UNEVEN = """
import dataclasses
from igrpo_jax.learning import stages
submit = stages.StageRunner._submit
def uneven(self, work, *args, **kwargs):
    settings = self._rollout
    if self._step == 2 and work.position.index % 2:
        self._rollout = dataclasses.replace(settings, max_completion_length=2)
    submit(self, work, *args, **kwargs)
    self._rollout = settings
stages.StageRunner._submit = uneven
"""
NOTICE = """
import os, signal
from igrpo_jax.distributed import watchdog
from igrpo_jax.rewards.verifier import Verifier
begin = Verifier.submit
def graded(self, candidate, batch):
    if "rollout (step 4)" in watchdog.current():
        os.kill(os.getpid(), signal.SIGTERM)
    return begin(self, candidate, batch)
Verifier.submit = graded
"""


def codes_and_texts(processes: list[Started]) -> list[tuple[int, str]]:
    """Waits for `processes`, and returns their exit codes and what they printed."""
    return [(done.returncode, done.stdout + done.stderr) for done in ended(processes)]


def run(folder: Path, workdir: Path | str, count: int, inject: dict[int, str], slurm: bool, whole=8, **fields) -> list:
    """A run of `count` processes that have `whole` devices together; `inject` are statements for some of them."""
    overrides = [f"{name}={value}" for name, value in (SETTINGS | fields).items()]
    arguments = ["igrpo_jax.main", *whole_runs.command(folder, workdir, *overrides)]
    return command("main", arguments, folder, count, inject, slurm, whole)


def command(name: str, arguments: list, folder: Path, count: int, inject: dict[int, str], slurm: bool, whole=8) -> list:
    """As `run`, of the command `name` of the package."""
    port, processes = free_port(), []
    for own in range(count):
        if slurm:  # JAX finds the port by the job's number
            job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": f"{count}"}
            job |= {"SLURM_PROCID": f"{own}", "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": f"{port}"}
            flags = []
        else:
            job = {}
            flags = ["--coordinator", f"localhost:{port}", "--processes", str(count), "--process", str(own)]
        program = f"from igrpo_jax import {name}\nfrom igrpo_jax.cli import exits\nexits.run({name}.main)\n"
        program = f"{inject.get(own, '')}\n{program}"
        env = devices.environment(whole // count, JAX_PLATFORMS="cpu", PYTHONPATH=str(folder), **job)
        processes.append(Started(program, arguments + flags, env))
    return codes_and_texts(processes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("several")
    (path / "some_reward.py").write_text(REWARD)
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))


@pytest.fixture(scope="module")
def two(folder):
    """Two processes up to a notice in step 4, which only the second gets."""
    inject = {0: UNEVEN, 1: UNEVEN + NOTICE}
    layout = {"rollout.mesh.tensor": 4}  # the devices of a process share one copy of the weights
    return folder / "two", run(folder, folder / "two", 2, inject, slurm=True, **layout)


@pytest.fixture(scope="module")
def four(folder, two):
    """Four processes that take up the run of the two, and end it."""
    shutil.copytree(two[0], folder / "four")
    changes = {"checkpoint.export": True, "rollout.mesh.tensor": 4}  # two teams of two processes
    return folder / "four", run(folder, folder / "four", 4, {}, slurm=False, **changes)


@pytest.fixture(scope="module")
def one(folder):
    """One process that runs to the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.StageRunner, "_submit", stages.StageRunner._submit)  # so that it is put back
        exec(UNEVEN, {})
        train.train(whole_runs.settings(**SETTINGS, **{"checkpoint.export": True}), folder / "one")
    return folder / "one"


def check_close(mine: list[dict], theirs: list[dict]) -> None:
    """Rows of metrics but for the last digits: sums over devices have another order between processes."""
    for row, other in zip(mine, theirs, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert value == pytest.approx(other[name], rel=1e-4, abs=1e-5), (row["step"], name)


def tokens_of(workdir: Path) -> list[tuple[float, float]]:
    """Drafts' and refinements' of each step, those of redrawn groups included."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["perf/draft_tokens"], row["perf/completion_tokens"]) for row in rows if "loss" in row]


@pytest.mark.proof
@pytest.mark.slow(seconds=60)
def test_training_on_eight_devices_and_sampling_in_two_groups_of_them_is_as_on_one_device(folder):
    """Weights are split over eight devices in an update, and over four to sample with."""
    runs = []
    for whole, layout in ((1, {}), (8, {"rollout.mesh.tensor": 4})):
        workdir = folder / f"on {whole}"
        processes = run(folder, workdir, 1, {}, slurm=False, whole=whole, **layout)
        assert [code for code, _ in processes] == [0], processes
        assert ("2 groups of 4 devices" in processes[0][1]) == bool(layout)
        runs.append(workdir)
    check_close(*map(whole_runs.rows, runs))
    assert sum("loss" in row and row["grad_norm"] > 0 for row in whole_runs.rows(runs[0])) == 4
    assert whole_runs.samples(runs[0]) == whole_runs.samples(runs[1])


@pytest.mark.slow(seconds=30)
def test_two_processes_are_as_one(two, one):
    """Metrics and samples, with redraws, lengths that differ widely, and 4 devices that share weights; and a
    notice to one of them ends both."""
    workdir, processes = two
    assert [code for code, _ in processes] == [75, 75], processes
    assert all("preempted: step 3 of 4 is saved" in said for _, said in processes)
    rows = whole_runs.rows(workdir)
    check_close(rows, [row for row in whole_runs.rows(one) if row["step"] < 4])
    assert tokens_of(workdir) == tokens_of(one)[:3]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 3 and all(row["grad_norm"] > 0 for row in steps)
    assert sum(row["redraw/groups"] for row in steps) > 0
    samples, whole = whole_runs.samples(workdir), whole_runs.samples(one)
    assert len(samples) == 3 and samples.items() <= whole.items()
    prompts = {}
    for row in map(json.loads, samples["step_000002.jsonl"].splitlines()):
        prompts.setdefault(row["prompt_id"], []).append(row["token_count"])
    longest = [max(lengths) for lengths in prompts.values()]
    assert max(longest[1::2]) == 2 and max(longest[::2]) == 12


@pytest.mark.slow
def test_one_process_restores_what_two_saved(two, one, folder):
    shutil.copytree(one, folder / "three", ignore=shutil.ignore_patterns("4"))
    three = whole_runs.settings(**SETTINGS | {"steps": 3})
    a, b = (whole_runs.final_state(workdir, three) for workdir in (two[0], folder / "three"))
    assert a.keys() == b.keys() and any("mu" in name for name in a)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow(seconds=15)
def test_two_processes_evaluate_the_newest_checkpoint_as_one(two, folder):
    answers = []
    for count in (1, 2):
        out = folder / f"evaluated by {count}"
        flags = ["--model", two[0], "--workdir", out, "--benchmarks", "arithmetic", "--samples", 2]
        arguments = ["igrpo_jax.evaluate", *flags, "--config.rollout.slots=8"]
        processes = command("evaluate", arguments, folder, count, {}, slurm=False)
        assert [code for code, _ in processes] == [0] * count, processes
        assert json.loads((out / "summary.json").read_text())["step"] == 3
        rows = map(json.loads, (out / "arithmetic.jsonl").read_text().splitlines())
        answers.append(sorted((row["prompt"], row["sample_id"], row["text"]) for row in rows))
    assert answers[0] == answers[1] and len(set(answers[0])) == 8


@pytest.mark.proof
@pytest.mark.slow(seconds=25)
def test_four_processes_go_on_from_what_two_saved(four, one):
    workdir, processes = four
    assert [code for code, _ in processes] == [0] * 4, processes
    assert "Done" in processes[0][1] and "step 4" not in processes[3][1]
    check_close(whole_runs.rows(workdir), whole_runs.rows(one))
    assert whole_runs.samples(workdir) == whole_runs.samples(one)
    evaluated = [sorted((folder / "evaluations" / "step_000004").iterdir()) for folder in (workdir, one)]
    assert [file.name for file in evaluated[0]] == [file.name for file in evaluated[1]] and len(evaluated[0]) == 4
    settings = [json.loads((files[0].parent / "evaluation.json").read_text()) for files in evaluated]
    evaluated = [[file for file in files if file.name != "evaluation.json"] for files in evaluated]
    assert settings[0].pop("model") != settings[1].pop("model") and settings[0] == settings[1]
    assert [file.read_text() for file in evaluated[0]] == [file.read_text() for file in evaluated[1]]
    exported = [safetensors.numpy.load_file(folder / "export" / "model.safetensors") for folder in (workdir, one)]
    for name, tensor in exported[0].items():
        mine, theirs = (x.astype(np.float32) for x in (tensor, exported[1][name]))
        np.testing.assert_allclose(mine, theirs, rtol=2**-6, atol=1e-5, err_msg=name)


@pytest.mark.proof
@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("victim", [0, 1])
def test_two_processes_share_a_bucket_and_go_on_there_after_a_kill(folder, one, bucket, victim):
    """The first process holds the lock and writes rows and samples; both write checkpoints."""
    layout, sudden = {"rollout.mesh.tensor": 4}, NOTICE.replace("SIGTERM", "SIGKILL")
    inject = {own: UNEVEN + sudden * (own == victim) for own in range(2)}
    processes = run(folder, bucket.address, 2, inject, slurm=False, **layout)
    assert processes[victim][0] == -signal.SIGKILL, processes
    code, said = processes[1 - victim]
    assert code == peers.LOST and f"process {victim} (" in said, processes
    place = path_of("", bucket.address)
    assert saved_step(place) in (2, 3)  # the save of the third may not have ended
    processes = run(folder, bucket.address, 2, {0: UNEVEN, 1: UNEVEN}, slurm=False, **layout)
    assert [code for code, _ in processes] == [0, 0], processes
    assert "resumed after" in processes[0][1]
    copy, settings = local_copy(bucket.address), whole_runs.settings(**SETTINGS)
    check_close(whole_runs.rows(copy), whole_runs.rows(one))
    assert whole_runs.samples(copy) == whole_runs.samples(one)
    mine, theirs = (whole_runs.final_state(workdir, settings) for workdir in (place, one))
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


TOGETHER = """
import json, sys
import sampled_together
from igrpo_jax import config
from igrpo_jax.cli import exits, parsing
from igrpo_jax.distributed import cluster, preemption

def main(argv):
    with cluster.joined(config.ClusterConfig(), parsing.cluster_arguments(argv)), preemption.noticed(60):
        print(json.dumps(sampled_together.process()))
exits.run(main)
"""


@pytest.mark.proof
@pytest.mark.slow(seconds=20)
def test_a_group_of_devices_may_span_processes():
    """In its process, and over both: the tokens of one device, although pages run out, and scores come whenever they
    come; a notice to the process that follows ends both."""
    port, tests = free_port(), str(Path(__file__).parents[1])
    flags = ["together", "--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
    env = devices.environment(4, JAX_PLATFORMS="cpu", PYTHONPATH=tests)
    processes = codes_and_texts([Started(TOGETHER, [*flags, own], env) for own in range(2)])
    assert [code for code, _ in processes] == [0, 0], processes
    ours = [json.loads(text[text.index('{"layouts"') :].splitlines()[0]) for _, text in processes]
    for layout, teams in enumerate([[[0], [1]], [[0, 1], [0, 1]], [[0, 1], [0, 1]]]):
        cfg = replace(sampled_together.LAYOUTS[layout][1], attention="xla")
        alone = sampled_together.Sampler(1, cfg, jax.devices()[:1])
        with ThreadPoolExecutor(4) as pool:
            expected = alone.sample(sampled_together.graded(pool, seconds=0))
        assert len(expected) == 36 and len({tuple(tokens) for tokens in expected.values()}) > 20
        each = [process["layouts"][layout] for process in ours]
        assert [part["team"] for part in each] == teams
        assert each[0]["drawn"] | each[1]["drawn"] == expected
        assert each[0]["preempted"] > 0
    assert not ours[1]["layouts"][1]["drawn"] and ours[1]["layouts"][0]["drawn"]
    assert all(process["noted"] for process in ours)


DRIVER = """
import os, signal, sys, tempfile, threading, time
from pathlib import Path
from types import SimpleNamespace
import jax
from igrpo_jax import config
from igrpo_jax.cli import exits, parsing
from igrpo_jax.distributed import abort, chips, cluster, disk_cache, peers, preemption, watchdog
from igrpo_jax.errors import InputError, RunError

def main(argv):
    address, own = parsing.cluster_arguments(argv), int(argv[-1])
    with cluster.joined(config.ClusterConfig(start_timeout=START, silence=6), address):
        {body}
exits.run(main)
"""
AGREE = """
        cluster.check_same({"config": {"seed": 1}})
        assert cluster.gather(b"x" * own * 600_000) == [b"x" * i * 600_000 for i in range(2)]
        assert cluster.from_first(lambda: [own, "first"]) == [0, "first"]
        assert cluster.any_of(own == 1) and not cluster.any_of(False)
        # JAX says nothing of the memory of another process's device; ours stand for it, here for a chip.
        other = next(device for device in jax.devices() if device.process_index != own)
        facts = {"client": other.client, "memory_stats": other.memory_stats}
        chip = SimpleNamespace(platform="tpu", device_kind="TPU v5", **facts)
        assert chips.usable_bytes(chip) == chips.CHIPS["TPU v5"].hbm_bytes
        try:
            cluster.check_same({"config": {"seed": 1, "optimizer": {"b1": own}}})
        except InputError as error:
            print(error)
        with watchdog.phase("update", "step 7"):
            if own:
                raise RunError("the disk is full")
            cluster.gather(b"")
"""
KILLED = """
        with watchdog.phase("rollout", f"step {own}"):
            cluster.gather(b"")
            time.sleep(2)  # all have heard of it
            if own == VICTIM:
                os.kill(os.getpid(), signal.SIGKILL)
            if own == 2:
                time.sleep(600)
            if VICTIM == 0:  # and no thread of Python's gets to run before JAX aborts
                sys.setswitchinterval(0.2)
                while True:
                    pass
            cluster.gather(b"")
"""
OTHERS = """
        print("shared:", disk_cache.is_shared(Path(tempfile.gettempdir())))
        cluster.check_same({"seed": own})
"""
NOTICED = """
        with tempfile.TemporaryDirectory() as mine:
            print("shared:", disk_cache.is_shared(Path(mine)))
        with preemption.noticed(60):
            if own:
                os.kill(os.getpid(), signal.SIGTERM)
            while True:
                preemption.check()
                time.sleep(0.1)
"""
KILLED_AT_THE_END = """
        if own == 0:
            time.sleep(3)  # as the end of a tracker may take
        if own == 1:  # while it waits for process 0
            threading.Timer(1, os.kill, [os.getpid(), signal.SIGKILL]).start()
"""
HELD_UP = """
        def late(function):
            return lambda argument: (time.sleep(own), function(argument), time.sleep(2 * own))
        peers.Peers._stop, abort.restore_abort = late(peers.Peers._stop), late(abort.restore_abort)
        raise preemption.Preempted
"""
DAMAGED = """
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from igrpo_jax.outputs import checkpoint
        parts = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec("x"))
        numbers = np.random.default_rng(0).random(1 << 16, np.float32)
        state = {"x": jax.make_array_from_callback(numbers.shape, parts, lambda index: numbers[index])}
        with checkpoint.Checkpointer(Path("FOLDER"), config.CheckpointConfig(every=1, keep=2)) as store:
            for step in (1, 2):
                store.save(step, state, {})
            store.wait()
            if own == 0:
                files = Path("FOLDER").glob("checkpoints/2/state/ocdbt.process_1/d/*")
                os.truncate(max(files, key=lambda path: path.stat().st_size), 100)
            cluster.from_first(lambda: None)
            abstract = {"x": jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=parts)}
            print("restored step", store.restore(abstract)[0], flush=True)
"""


def driven(body: str, count: int, of: int | None = None, start_timeout: int = 60) -> list[Started]:
    """`count` of `of` processes that only run `body`."""
    port, program = free_port(), DRIVER.replace("{body}", body.strip()).replace("START", f"{start_timeout}")
    flags = ["driver", "--coordinator", f"localhost:{port}", "--processes", of or count, "--process"]
    return [Started(program, [*flags, own], devices.environment(1, JAX_PLATFORMS="cpu")) for own in range(count)]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What several small groups of processes said, all at the same time."""
    bodies = {"error": (AGREE, 2), "facts": (OTHERS, 2), "notice": (NOTICED, 2)}
    bodies |= {"first": (KILLED.replace("VICTIM", "0"), 2), "second": (KILLED.replace("VICTIM", "1"), 3)}
    bodies |= {"end": (KILLED_AT_THE_END, 3), "late": (HELD_UP, 2)}
    bodies["damaged"] = DAMAGED.replace("FOLDER", str(tmp_path_factory.mktemp("damaged"))), 2
    groups = {name: driven(*body) for name, body in bodies.items()}
    groups["alone"] = driven("pass", 1, of=2, start_timeout=3)
    began = time.monotonic()
    found = {name: codes_and_texts(processes) for name, processes in groups.items()}
    assert time.monotonic() - began < 60
    return found


@pytest.mark.slow(seconds=12)
def test_an_error_of_one_ends_all_with_its_message(failures):
    (first, said), (second, told) = failures["error"]
    assert (first, second) == (1, 1)
    assert "error: process 1 (" in said and ") failed in update (step 7): RunError: the disk is full" in said
    assert told.endswith("igrpo_jax: error: the disk is full\n")
    assert all("config.optimizer.b1: process 1 (" in text and ") has 1, process 0 (" in text for text in (said, told))


@pytest.mark.slow
def test_other_facts_are_told_by_all(failures):
    for code, said in failures["facts"]:
        assert code == 2 and "error: seed: process 1 (" in said and "start every process with the same command" in said


@pytest.mark.slow
def test_a_folder_that_is_another_on_each_host_is_not_taken_for_shared(failures):
    assert all("shared: True" in said for _, said in failures["facts"])
    assert all("shared: False" in said for _, said in failures["notice"])


@pytest.mark.slow
def test_a_notice_to_one_is_one_to_all(failures):
    assert [code for code, _ in failures["notice"]] == [75, 75]
    assert "igrpo_jax: SIGTERM of process 1 (" in failures["notice"][0][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, victim, phase",
    [("first", 0, "rollout (step 0)"), ("second", 1, "rollout (step 1)"), ("end", 1, "no phase of a run")],
)
def test_a_killed_process_is_named_by_the_others(failures, name, victim, phase):
    processes = failures[name]
    assert processes[victim][0] == -signal.SIGKILL
    for own, (code, said) in enumerate(processes):
        if own != victim:
            assert code == peers.LOST, said
            last = said.strip().splitlines()[-1]
            assert f"error: process {victim} (" in last and f"it was in {phase}" in last


@pytest.mark.slow
def test_a_process_that_is_held_up_at_the_end_ends_as_the_others_do(failures):
    """Process 0, which is ready to end, keeps what JAX needs to end the others without an abort."""
    assert [code for code, _ in failures["late"]] == [75, 75], failures["late"]
    assert all(said.endswith("the same command resumes from there\n") for _, said in failures["late"])


@pytest.mark.slow
def test_all_set_a_checkpoint_aside_of_which_one_cannot_read_its_part(failures):
    for code, said in failures["damaged"]:
        assert code == 0 and said.count("restored step 1") == 1, said
        assert "step 2 skipped, moved to damaged_checkpoints: Damaged: process 1: ValueError: OUT_OF_RANGE: " in said


@pytest.mark.slow
def test_a_process_that_waits_in_vain_says_so(failures):
    ((code, said),) = failures["alone"]
    assert code == 1 and "process 0 of 2: not all processes have reached localhost:" in said
