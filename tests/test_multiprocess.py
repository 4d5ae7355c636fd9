"""Several processes train together: as one would, on any number of them, and none waits for ever for one that is gone.

All is on one machine, with gloo between the processes: numbers, deadlocks and checkpoints are covered, neither NCCL nor
TPU links, nor how a real cluster is found. One run of two processes is ended by a notice of preemption, and four go on
with it; one process with as many devices does the same here.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import safetensors.numpy

from igrpo_jax import config, rollout, train
from igrpo_jax.preemption import Preempted

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="compares with one process of eight devices")

REWARD = """
def graded(prompts, completions, **columns):
    return [len(text) * 7919 % 5 / 4 for text in completions]
"""
SETTINGS = {
    "seed": 3,
    "prompts_per_step": 5,  # three for one process, two for the other
    "warm_start.steps": 2,
    "algorithm.beta": 0.1,
    "algorithm.max_redraws": 1,
    "rewards.custom": "some_reward:graded",
    "optimizer.learning_rate": 1e-3,
    "evaluation.every": 4,
    "checkpoint.every": 1,
    "checkpoint.best_metric": "",
    "log.profile_steps": (),
    "log.tensorboard": False,
}
# In step 2 what process 1 of two samples ends after two tokens: a process that waited for another would wait for ever.
UNEVEN = """
import dataclasses
from igrpo_jax import rollout
submit = rollout._Step._submit
def uneven(self, item, *args, **kwargs):
    whole = self._rollout
    if self._step == 2 and item.place % 2:
        self._rollout = dataclasses.replace(whole, max_completion_length=2)
    submit(self, item, *args, **kwargs)
    self._rollout = whole
rollout._Step._submit = uneven
"""
NOTICE = """
import os, signal
from igrpo_jax import train, watchdog
begin = train.Verifier.submit
def graded(self, candidate):
    if "rollout (step 4)" in watchdog.current():
        os.kill(os.getpid(), signal.SIGTERM)
    return begin(self, candidate)
train.Verifier.submit = graded
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(count: int, **more: str) -> dict[str, str]:
    path = os.pathsep.join([str(runs.ROOT), *sys.path])
    devices = f"--xla_force_host_platform_device_count={8 // count}"
    common = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices, "PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | common | more


def started(program: str, arguments: list, env: dict[str, str]) -> subprocess.Popen:
    start = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        start, cwd=runs.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def ended(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str]]:
    """Exit codes and what was said."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def run(folder: Path, workdir: Path, count: int, inject: dict[int, str], slurm: bool, **fields) -> list:
    """A run of `count` processes that have eight devices together; `inject` are statements for some of them."""
    overrides = [f"{name}={value}" for name, value in (SETTINGS | fields).items()]
    _, _, name, *arguments = runs.command(folder, workdir, *overrides)
    port, processes = free_port(), []
    for own in range(count):
        if slurm:  # JAX finds the port by the job's number
            job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": f"{count}"}
            job |= {"SLURM_PROCID": f"{own}", "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": f"{port}"}
            env, flags = environment(count, **job), []
        else:
            env = environment(count)
            flags = ["--coordinator", f"localhost:{port}", "--processes", str(count), "--process", str(own)]
        program = f"import sys\n{inject.get(own, '')}\nfrom igrpo_jax import main, runtime\n"
        program += f"sys.argv[0] = {name!r}\nruntime.run(main.main)\n"
        processes.append(started(program, arguments + flags, env))
    return ended(processes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("several")
    (path / "some_reward.py").write_text(REWARD)
    sys.path.insert(0, str(path))  # of the processes too
    yield path
    sys.path.remove(str(path))


@pytest.fixture(scope="module")
def two(folder):
    """Two processes up to a notice in step 4, which only the second gets."""
    inject = {0: UNEVEN, 1: UNEVEN + NOTICE}
    return folder / "two", run(folder, folder / "two", 2, inject, slurm=True, steps=1000)


@pytest.fixture(scope="module")
def four(folder, two):
    """Four processes that take up the run of the two, and end it."""
    shutil.copytree(two[0], folder / "four")
    return folder / "four", run(folder, folder / "four", 4, {}, slurm=False, steps=4, **{"checkpoint.export": True})


def settings(**fields) -> config.Config:
    return runs.settings(**{name.replace("__", "."): value for name, value in fields.items()})


@pytest.fixture(scope="module")
def alone(folder, compile_fast):
    """The folders of one process that does the same: up to the notice, and to the end."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((rollout._Step, "_submit"), (train.Verifier, "submit")):
            patch.setattr(owner, name, getattr(owner, name))  # so that it is put back
        exec(UNEVEN + NOTICE, {})
        with pytest.raises(Preempted, match="step 3 of 1000 is saved"):
            train.train(runs.settings(**SETTINGS, steps=1000), folder / "alone")
    shutil.copytree(folder / "alone", folder / "whole")
    train.train(runs.settings(**SETTINGS, steps=4, **{"checkpoint.export": True}), folder / "whole")
    return folder / "alone", folder / "whole"


def check_close(mine: Path, theirs: Path) -> None:
    """Rows of metrics but for the last digits: sums over devices have another order between processes."""
    for row, other in zip(runs.rows(mine), runs.rows(theirs), strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert value == pytest.approx(other[name], rel=1e-4, abs=1e-5), (row["step"], name)


def test_two_processes_are_as_one(two, alone):
    """Metrics, samples and what is saved, with a reference model, redraws, and lengths that differ widely."""
    workdir, processes = two
    assert [code for code, _ in processes] == [75, 75], processes
    assert "SIGTERM: saving" in processes[1][1] and "SIGTERM of process 1 (" in processes[0][1]
    assert all("preempted: step 3 of 1000 is saved" in said for _, said in processes)
    check_close(workdir, alone[0])
    assert runs.samples(workdir) == runs.samples(alone[0])
    steps = [row for row in runs.rows(workdir) if "loss" in row]
    assert len(steps) == 3 and all(row["grad_norm"] > 0 for row in steps)
    assert sum(row["redraw/groups"] for row in steps) > 0
    second = [json.loads(line) for line in runs.samples(workdir)["step_000002.jsonl"].splitlines()]
    lengths = [[row["token_count"] for row in second if row["prompt_id"] == name] for name in prompts_of(second)]
    assert max(map(max, lengths[1::2])) == 2 and max(map(max, lengths[::2])) == 24


def prompts_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["prompt_id"] for row in rows))


def test_one_process_restores_what_two_saved(two, alone):
    three = runs.settings(**SETTINGS, steps=3)
    a, b = (runs.final_state(workdir, three) for workdir in (two[0], alone[0]))
    assert a.keys() == b.keys() and any("mu" in name for name in a)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_four_processes_go_on_from_what_two_saved(four, alone):
    workdir, processes = four
    assert [code for code, _ in processes] == [0] * 4, processes
    assert "Done" in processes[0][1] and "step 4" not in processes[3][1]
    check_close(workdir, alone[1])
    assert runs.samples(workdir) == runs.samples(alone[1])
    step = Path("evaluations", "step_000004")
    assert [file.read_text() for file in sorted((workdir / step).iterdir())] == [
        file.read_text() for file in sorted((alone[1] / step).iterdir())
    ]
    exported = [safetensors.numpy.load_file(one / "export" / "model.safetensors") for one in (workdir, alone[1])]
    for name, tensor in exported[0].items():
        one, other = (x.astype(np.float32) for x in (tensor, exported[1][name]))
        np.testing.assert_allclose(one, other, rtol=2**-6, atol=1e-5, err_msg=name)  # in bfloat16


DRIVER = """
import os, signal, sys, time
import jax
from igrpo_jax import cluster, config, runtime, watchdog

def main(argv):
    address, own = runtime.address(argv), int(argv[-1])
    with cluster.joined(config.Cluster(start_timeout=60, silence=6), address):
        {body}
runtime.run(main)
"""
AGREE = """
        cluster.check_same({"config": {"seed": 1}})
        assert cluster.gather(b"x" * own * 600_000) == [b"x" * i * 600_000 for i in range(2)]
        assert cluster.from_first(lambda: [own, "first"]) == [0, "first"]
        assert cluster.any_of(own == 1) and not cluster.any_of(False)
        try:
            cluster.check_same({"config": {"seed": 1, "optimizer": {"b1": own}}})
        except config.InputError as error:
            print(error)
        with watchdog.phase("update", "step 7"):
            if own:
                raise config.RunError("the disk is full")
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
            cluster.gather(b"")
"""
LATE = """
        cluster.check_same({"seed": own})
"""


def driven(body: str, count: int, of: int | None = None) -> list[subprocess.Popen]:
    """`count` of `of` processes that only run `body`."""
    port, program = free_port(), DRIVER.replace("{body}", body.strip())
    flags = ["--coordinator", f"localhost:{port}", "--processes", of or count, "--process"]
    return [started(program, [*flags, own], environment(8)) for own in range(count)]


@pytest.fixture(scope="module")
def failures():
    """What several small groups of processes said, all at the same time."""
    bodies = {"error": (AGREE, 2), "facts": (LATE, 2)}
    bodies |= {"first": (KILLED.replace("VICTIM", "0"), 2), "second": (KILLED.replace("VICTIM", "1"), 3)}
    groups = {name: driven(*body) for name, body in bodies.items()}
    groups["alone"] = [
        started(DRIVER.replace("{body}", "pass").replace("=60", "=3"), ARGUMENTS_ALONE(), environment(8))
    ]
    began = time.monotonic()
    found = {name: ended(processes) for name, processes in groups.items()}
    assert time.monotonic() - began < 60
    return found


def ARGUMENTS_ALONE() -> list:
    return ["--coordinator", f"localhost:{free_port()}", "--processes", 2, "--process", 0]


def test_an_error_of_one_ends_all_with_its_message(failures):
    (first, said), (second, told) = failures["error"]
    assert (first, second) == (1, 1)
    assert "error: process 1 (" in said and ") failed in update (step 7): RunError: the disk is full" in said
    assert told.endswith("igrpo_jax: error: the disk is full\n")
    assert all("config.optimizer.b1: process 1 (" in text and ") has 1, process 0 (" in text for text in (said, told))


def test_other_facts_are_told_by_all(failures):
    for code, said in failures["facts"]:
        assert code == 2 and "error: seed: process 1 (" in said and "start every process with the same command" in said


@pytest.mark.parametrize("name, victim", [("first", 0), ("second", 1)])
def test_a_killed_process_is_named_by_the_others(failures, name, victim):
    processes = failures[name]
    assert processes[victim][0] == -signal.SIGKILL
    for own, (code, said) in enumerate(processes):
        if own != victim:
            assert code == 1, said
            last = said.strip().splitlines()[-1]
            assert f"error: process {victim} (" in last and f"it was in rollout (step {victim})" in last


def test_a_process_that_waits_in_vain_says_so(failures):
    ((code, said),) = failures["alone"]
    assert code == 1 and "process 0 of 2: not all processes have come to localhost:" in said
