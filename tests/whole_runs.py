"""Whole runs of a micro model, in processes of their own: how to start one, and what to compare of two."""

import json
import shutil
import subprocess
from pathlib import Path

import devices
import jax
import numpy as np
import processes
import pytest

from igrpo_jax import config
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.outputs.checkpoint import Checkpointer
from igrpo_jax.session import ending
from igrpo_jax.session.run_inputs import open_inputs

CONFIG = """
from igrpo_jax.config import default

def get_config():
    c = default()
    c.steps, c.prompts_per_step, c.compilation_cache = 5, 4, ""
    c.model.dtype = "float32"
    b = c.model.builtin
    b.hidden_size, b.num_layers, b.num_heads, b.num_kv_heads, b.intermediate_size = 32, 1, 2, 1, 48
    c.data.instruction, c.refine.instruction, c.data.max_prompt_length = "", "{draft}", 32
    c.data.arithmetic.train_problems, c.data.arithmetic.test_problems = 10, 4  # step 3 crosses into the second epoch
    c.warm_start.steps, c.warm_start.batch_size, c.warm_start.learning_rate = 60, 16, 1e-2
    c.algorithm.num_drafts, c.algorithm.num_generations = 2, 2
    c.learner.minibatches, c.learner.microbatch_sizes = 2, (1.0,)  # each size is a program to compile
    c.rollout.max_completion_length, c.rollout.slots, c.rollout.temperature = 24, 2, 0.7
    # A worker takes a second to start. On a machine that is busy an answer may wait for longer than the default.
    c.rewards.workers, c.rewards.timeout = 1, 60.0
    c.optimizer.learning_rate = 1e-2
    c.evaluation.every, c.evaluation.benchmarks = 2, ("arithmetic",)
    c.checkpoint.every, c.checkpoint.keep, c.checkpoint.best_metric = 2, 2, "eval/arithmetic/pass@1"
    c.log.samples_every, c.log.trackers = 2, ()  # tensorboardX imports torch where there is one
    return c
"""
TIMES = ("perf/", "verifier/latency", "eval_time")


def settings(**fields) -> config.Config:
    scope: dict = {}
    exec(CONFIG, scope)  # the text that the subprocess reads as a file
    tree = scope["get_config"]()
    tree.update_from_flattened_dict(fields)
    return config.freeze(tree)


def rows(workdir: Path) -> list[dict]:
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in lines]


def check_same_rows(mine: list[dict], theirs: list[dict]) -> None:
    """Bit for bit, but for the sampler's log-probs and entropies, which are only measured: when a prompt goes on to its
    second stage is the verifier's timing, and with it how many slots are decoded side by side and how sums round."""
    assert len(mine) == len(theirs)
    for row, other in zip(mine, theirs, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            of_sampler = name.startswith("sampling/") or name.endswith("entropy")
            assert value == (pytest.approx(other[name], abs=1e-5) if of_sampler else other[name]), name


def samples(workdir: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((workdir / "samples").iterdir())}


def final_state(workdir: Path, run_config: config.Config) -> dict[str, np.ndarray]:
    inputs = open_inputs(run_config)
    with jax.set_mesh(inputs.mesh), Checkpointer(workdir, run_config.checkpoint) as store:
        sizes = {"longest_prompt": inputs.longest_prompt, "total_steps": inputs.total_steps}
        programs = LearnerPrograms(run_config, inputs.policy.cfg, inputs.mesh, **sizes)
        step, state, meta = store.restore(programs.state)
    assert meta["step"] == step == run_config.steps
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def rewind(workdir: Path, target: Path, step: int) -> None:
    """Makes `target` the run in `workdir` as it was after `step`, of which there is a checkpoint."""
    shutil.copytree(workdir, target, ignore=shutil.ignore_patterns("export", ending.FILE))
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    for path in (target / "samples").iterdir():
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def command(tmp_path: Path, workdir: Path | str, *overrides: str) -> list[str]:
    """Returns the flags of `igrpo_jax.main` for a run of CONFIG with `overrides`, as field=value."""
    (tmp_path / "micro.py").write_text(CONFIG)
    flags = ["--config", str(tmp_path / "micro.py"), "--workdir", str(workdir)]
    return flags + [f"--config.{override}" for override in overrides]


# What the statements of `start` see, and what runs after them: the module as `python -m` would run it.
SEEN = """
import os, runpy, signal, sys
from igrpo_jax import main
from igrpo_jax.cli import exits
from igrpo_jax.learning import objectives
from igrpo_jax.learning.learner import Learner
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.session.run import Run
"""
MAIN = """
sys.modules.pop("igrpo_jax.main")
runpy.run_module("igrpo_jax.main", run_name="__main__", alter_sys=True)
"""


def start(*args, inject: str = "") -> processes.Started:
    """Starts a run of `command(*args)` after the statements `inject`, which see the names of SEEN.

    It has one device: eight are what other tests are for, and slow.
    """
    return processes.Started(f"{SEEN}{inject}{MAIN}", ["igrpo_jax.main", *command(*args)], devices.environment(1))


def faulty(inject: str, *args, timeout: int = 300) -> subprocess.CompletedProcess:
    return start(*args, inject=inject).ended(timeout)


def run(*args) -> str:
    """Runs to the end without an error, and returns what was printed."""
    done = faulty("", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout
