"""The built-in arithmetic model of benchmarks/matched_budget.py: what all runs of the study have in common.

    python benchmarks/matched_budget.py --out studies/arithmetic

A 0.6 M parameter decoder that learns sums of three to five numbers, step by step, from a teacher that gets every fourth
step wrong: its samples are right about a third of the time. One such start is made and exported, and every run begins
from it, for 60 steps of 16 prompts with 8 completions each. Two minibatches to a rollout, so that ratios differ from 1
and the objectives from one another.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.steps = 60
    c.prompts_per_step = 16

    c.model.dtype = "float32"
    c.model.builtin.hidden_size = 128
    c.model.builtin.num_layers = 3
    c.model.builtin.num_heads = 4
    c.model.builtin.num_kv_heads = 2
    c.model.builtin.intermediate_size = 384
    c.model.builtin.max_position_embeddings = 128

    c.data.instruction = ""
    c.data.max_prompt_length = 32
    c.data.arithmetic.min_terms = 3
    c.data.arithmetic.max_terms = 5
    c.data.arithmetic.max_total = 9

    c.warm_start.steps = 450
    c.warm_start.error_rate = 0.25

    c.refine.instruction = "{draft}"
    c.rollout.max_completion_length = 32
    c.rollout.temperature = 1.0
    c.rollout.slots = 128

    c.rewards.workers = 1
    c.learner.minibatches = 2
    c.learner.remat = "none"  # small enough to keep all activations
    c.optimizer.learning_rate = 1.2e-4
    c.optimizer.warmup_ratio = 0.05

    c.evaluation.every = 10
    c.evaluation.benchmarks = ("arithmetic",)
    c.evaluation.samples = 2
    c.evaluation.temperature = 1.0
    c.evaluation.top_p = 1.0

    c.checkpoint.every = 0  # a run of the study takes a minute or two
    c.log.every = 10
    c.log.samples_every = 0
    c.log.trackers = ()
    return c
