"""A built-in model that repairs drafts more easily than it solves: look-ups that are right only if all of them are.

    python -m igrpo_jax.main --config configs/study_lookups.py
    python benchmarks/matched_budget.py --setting lookups --groups all --out studies/lookups

A decoder with 0.2 M parameters imitates a teacher that is wrong at every second of 12 look-ups. The teacher is right
once in 4,096 times, although at each look-up the right digit is by far the most likely one. With a draft it looks up
again where it disagrees with it, and is right eleven times as often. A model as good as the teacher gives three right
answers in 100 steps of 16 prompts with 8 completions, if nothing is learnt in the meantime.

How dense right answers are follows from warm_start.error_rate, which draft_error_rate is set to as well: at 0.3 there
are 177 in such a run, at 0.5 three, at 0.55 fewer than one. With warm_start.refinements=independent the model learns
to ignore drafts, which is the control. The reward is only the accuracy: 1 only if all look-ups are right.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.steps = 100
    config.prompts_per_step = 16

    config.model.dtype = "float32"
    config.model.builtin.hidden_size = 96
    config.model.builtin.num_layers = 2
    config.model.builtin.num_heads = 4
    config.model.builtin.num_kv_heads = 2
    config.model.builtin.intermediate_size = 288
    config.model.builtin.max_position_embeddings = 64

    config.data.task = "lookups"
    config.data.instruction = ""
    config.data.max_prompt_length = 16
    config.data.lookups.items = 12

    config.warm_start.steps = 1200
    config.warm_start.batch_size = 64
    config.warm_start.learning_rate = 3e-3
    config.warm_start.error_rate = 0.5
    config.warm_start.draft_error_rate = 0.5
    config.warm_start.refinements = "checked"

    config.refine.instruction = "{draft}"
    config.rollout.max_completion_length = 16  # two tags, twelve digits and the EOS are 15
    config.rollout.temperature = 1.0
    config.rollout.slots = 128

    config.rewards.format = 0.0
    config.rewards.workers = 1
    config.learner.minibatches = 2
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_ratio = 0.05

    config.evaluation.every = 20
    config.evaluation.benchmarks = ("lookups",)
    config.evaluation.samples = 4
    config.evaluation.temperature = 1.0
    config.evaluation.top_p = 1.0

    config.checkpoint.every = 0  # a run takes a minute or two
    config.log.every = 10
    config.log.samples_every = 0
    config.log.trackers = ()
    return config
