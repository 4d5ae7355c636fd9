"""The built-in arithmetic model of benchmarks/matched_budget.py: the settings that all runs of the study share.

    python benchmarks/matched_budget.py --out studies/arithmetic

A decoder with 0.6 M parameters learns sums of three to five numbers, step by step, from a teacher that gets every
fourth step wrong: its samples are right about 39 % of the time. This start is made and exported once, and every
run begins from it, for 60 steps of 16 prompts with 8 completions each. There are two minibatches per rollout, so that
ratios differ from 1 and the objectives differ from one another.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.steps = 60
    config.prompts_per_step = 16

    config.model.dtype = "float32"
    config.model.builtin.hidden_size = 128
    config.model.builtin.num_layers = 3
    config.model.builtin.num_heads = 4
    config.model.builtin.num_kv_heads = 2
    config.model.builtin.intermediate_size = 384
    config.model.builtin.max_position_embeddings = 128

    config.data.instruction = ""
    config.data.max_prompt_length = 32
    config.data.arithmetic.min_terms = 3
    config.data.arithmetic.max_terms = 5
    config.data.arithmetic.max_total = 9

    config.warm_start.steps = 450
    config.warm_start.error_rate = 0.25

    config.refine.instruction = "{draft}"
    config.rollout.max_completion_length = 32
    config.rollout.temperature = 1.0
    config.rollout.slots = 128

    config.rewards.workers = 1
    config.learner.minibatches = 2
    config.optimizer.learning_rate = 1.2e-4
    config.optimizer.warmup_ratio = 0.05

    config.evaluation.every = 10
    config.evaluation.benchmarks = ("arithmetic",)
    config.evaluation.samples = 2
    config.evaluation.temperature = 1.0
    config.evaluation.top_p = 1.0

    config.checkpoint.every = 0  # a run of the study takes a minute or two
    config.log.every = 10
    config.log.samples_every = 0
    config.log.trackers = ()
    return config
