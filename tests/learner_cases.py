"""Groups, advantages and learners of a tiny model, for tests of the update. A gradient is read off Adam's first moment.

The padding id 0 is also the EOS of every finished completion, and stands inside prompts; one context is a single token,
so that its completions have no prefix.
"""

import dataclasses

import jax
import numpy as np
import optax

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.learning import credit
from igrpo_jax.learning.learner import Learner
from igrpo_jax.learning.packing import MicroBatch, Piece
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.records import Completion, Group, Prompt, Score

TEMPERATURE, LONGEST_PROMPT, MAX_COMPLETION = 0.9, 20, 18
CONTEXTS = (18, 1, 20, 19, 17, 5, 18, 20)  # three prefixes of up to 16 positions, five of more
P, G = len(CONTEXTS), 4
ROW = LONGEST_PROMPT + MAX_COMPLETION
WHOLE = 768  # tokens of the micro-batch that holds every unit: 8 x (19 + 4 x 18), rounded up
DEFAULTS = {
    "prompts_per_step": P,
    "model.dtype": "float32",
    "algorithm.num_drafts": 0,
    "algorithm.num_generations": G,
    "rollout.temperature": TEMPERATURE,
    "rollout.max_completion_length": MAX_COMPLETION,
    "learner.remat": "none",
    "learner.logprob_chunk": 50,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_ratio": 0.0,
    "optimizer.max_grad_norm": 1e9,
}
ADVANTAGES = np.random.default_rng(5).normal(size=(P, G)).astype(np.float32)


def make_groups(seed=0, longest=MAX_COMPLETION):
    rng = np.random.default_rng(seed)
    groups = []
    for index, length in enumerate(CONTEXTS):
        context = rng.integers(0, 64, length, np.int32)
        context[2:3] = 0
        completions = []
        for i, size in enumerate(rng.permutation([1, longest, *rng.integers(2, longest, G - 2)])):
            finished = size < longest
            tokens = rng.integers(1, 64, size, np.int32)
            tokens[-1] = 0 if finished else tokens[-1]
            logprobs = rng.normal(-3, 1, size).astype(np.float32)
            score = Score(float(ADVANTAGES[index, i]), {}, None, "ok")
            completions.append(Completion("refine", i, tokens, logprobs, bool(finished), score=score))
        prompt = Prompt(f"{index}", index, "question", "answer", context)
        draft = Completion("draft", 0, context[1:4], np.zeros(3, np.float32), True, score=Score(1.0, {}, None, "ok"))
        groups.append(Group(prompt, (draft,), 0, context, tuple(completions)))  # drafts are no rows
    return groups


def make_learner(cfg, mesh=None, frozen=None, reference=None, **changes):
    """With its mesh: one device where none is given. What LoRA adapts and the reference are weights of the host."""
    tree = config.default()
    tree.update_from_flattened_dict(DEFAULTS | {name.replace("__", "."): x for name, x in changes.items()})
    mesh = sharding.make_mesh(mesh or config.MeshConfig(), None if mesh else jax.devices()[:1])
    programs = LearnerPrograms(config.freeze(tree), cfg, mesh, longest_prompt=LONGEST_PROMPT, total_steps=10)
    return Learner(programs, frozen=put(frozen or {}, mesh), reference=reference and put(reference, mesh)), mesh


def one_batch(packer, units, size=WHOLE):
    """The arrays of a micro-batch that holds all units, though several would be cheaper."""
    return packer.fill(MicroBatch(size, [[Piece(unit, 0, len(unit.completions)) for unit in units]]))


def put(params, mesh):
    return {path: jax.device_put(x, sharding.param_sharding(mesh, path)) for path, x in params.items()}


def updated(built, params, groups=None, advantages=ADVANTAGES, state=None):
    """State and metrics after one rollout's updates, from a fresh state unless one is given."""
    learner, mesh = built
    with jax.set_mesh(mesh):
        state, groups = learner.init(put(params, mesh)) if state is None else state, groups or make_groups()
        return learner.update(state, groups, advantages, 1, draft_advantages(learner, groups))


def draft_advantages(learner, groups):
    """Those of a run, by the rewards of the drafts alone; nothing where drafts are not trained on."""
    if "draft" not in learner.programs.stages:
        return ()
    unshown = [dataclasses.replace(group, kept=None) for group in groups]  # some are made with a draft that is none
    return credit.advantages(unshown, learner.programs.config).drafts


def gradient_of(state):
    first_moment = optax.tree_utils.tree_get(state.opt_state, "mu")  # (1 - b1) g
    return {path: np.asarray(x, np.float32) / np.float32(1 - 0.9) for path, x in first_moment.items()}


def assert_close(got, expected, relative):
    for path, x in expected.items():
        scale = np.abs(x).max()
        np.testing.assert_allclose(got[path], x, atol=relative * scale, rtol=0, err_msg=path)
