"""What a process samples of some prompts with a follow-up each, for processes and meshes of any number.

As a module of its own, so that the processes of a test run the same as the test itself.
"""

import contextlib
import os
import signal
import threading
import time
import types
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import tiny_models
from engines import make_engine

from igrpo_jax import config
from igrpo_jax.distributed import cluster, preemption, sharding
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.records import Prompt, Score
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.scoring import sample_and_score, stage_key
from igrpo_jax.sampling.state import Sampling

CFG = tiny_models.tiny_config(num_heads=6, intermediate_size=64, pattern="*-")
# In groups of eight, four devices have the same key and value head, each for other sequences.
SPLIT = replace(CFG, head_dim=128, attention="splash_interpret")
LAYOUTS = ((4, CFG), (8, CFG), (8, SPLIT))  # devices of a group, and the model
RENDERER = types.SimpleNamespace(text=str, opening="")
PROMPTS, SAMPLES = 6, 3


class Sampler:
    """A sampler on all devices with groups of `tensor`, whose pages do not hold all slots."""

    def __init__(self, tensor, cfg, devices=None):
        mesh = sharding.make_mesh(config.MeshConfig(), devices)
        sizes = {"slots": 8, "longest_prompt": 24, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 2}
        self.engine = make_engine(cfg, mesh, (0, 17), tensor=tensor, pages=6, page_size=8, **sizes)
        self.scheduler = Scheduler(self.engine, ahead=1)
        host = tiny_models.random_params(cfg)
        self.params = {path: sharding.to_global(x, sharding.param_sharding(mesh, path)) for path, x in host.items()}

    def sample(self, grade):
        """Samples each prompt of this process; the best of its samples is continued by a request of its own."""
        drawn = {}
        self.scheduler.start(self.params, Sampling(0.8))
        try:
            for index in self.engine.team.positions(PROMPTS):
                self._submit(index, np.random.default_rng(index).integers(1, 64, 6 + index), 0, drawn)
            sample_and_score(self.scheduler, grade, RENDERER)
        finally:
            self.scheduler.finish()
        return drawn

    def _submit(self, index, tokens, stage, drawn):
        done = []

        def scored(completion):
            drawn[f"{index} {stage} {completion.sample_id}"] = completion.tokens.tolist()
            done.append(completion)
            if stage == 0 and len(done) == SAMPLES:
                best = max(done, key=lambda completion: (completion.score.reward, completion.sample_id))
                self._submit(index, np.append(tokens, best.tokens), 1, drawn)

        prompt = Prompt(str(index), index, "", "", tokens)
        self.scheduler.submit(
            Request(tokens.astype(np.int32), index, SAMPLES, stage_key(0, 1, stage), 8, prompt=prompt, scored=scored)
        )


def graded(pool, seconds):
    """Scores that come after a time of up to `seconds`, which is another one at each call."""
    waits = np.random.default_rng()

    def score(tokens, wait):
        time.sleep(wait)
        return Score(float(np.sum(tokens) % 7), {}, None, "ok")

    return lambda candidate, batch: pool.submit(score, candidate.tokens, seconds * waits.random())


def process():
    """Returns what this process sampled in each layout, with its team, and whether it heard of a notice to the last."""
    seen = []
    for tensor, cfg in LAYOUTS:
        sampler = Sampler(tensor, cfg)
        with ThreadPoolExecutor(4) as pool:
            drawn = sampler.sample(graded(pool, seconds=0.1))
        usage = sampler.scheduler.usage
        seen.append({"drawn": drawn, "team": sampler.engine.team.processes, "preempted": usage.preempted})
    cluster.any_of(False)
    if jax.process_index() == jax.process_count() - 1:  # it does not lead
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with contextlib.suppress(Preempted):
        sampler.sample(lambda candidate, batch: Future())  # no score ever comes
    return {"layouts": seen, "noted": cluster.any_of(preemption.noted())}
