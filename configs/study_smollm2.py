"""SmolLM2-135M-Instruct in benchmarks/matched_budget.py: the settings that all its runs share, for two CPU cores.

    python benchmarks/matched_budget.py --setting smollm2 --model SMOLLM2_DIR --data DATA_DIR --out studies/smollm2

DATA_DIR holds gsm8k_train.jsonl (id, prompt, answer, solution). The study first asks the model the problems with the
shortest solutions and trains on those that it solves sometimes, because the others give no gradient. Only right answers
are rewarded, because a model of this size hardly ever writes the tags of the format reward.

A GPU allows more steps and problems, such as --steps 100 --screen 2000 --jobs 1 --config.model.dtype=bfloat16
--config.prompts_per_step=32 --config.rollout.slots=256.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.steps = 6
    config.prompts_per_step = 8

    config.model.dtype = "float32"  # bfloat16 is slower on XLA's CPU
    config.data.instruction = "Solve the problem. Think briefly, then end with the final answer as \\boxed{answer}."
    config.data.max_prompt_length = 256
    config.refine.max_draft_length = 128
    config.rollout.max_completion_length = 128
    config.rollout.temperature = 0.7
    config.rollout.slots = 32

    config.rewards.format = 0.0
    config.rewards.workers = 1
    config.learner.minibatches = 2
    config.learner.tokens_per_microbatch = 3072
    config.optimizer.learning_rate = 1e-5

    config.evaluation.every = 3
    config.evaluation.benchmarks = ("gsm8k",)
    config.evaluation.samples = 8
    config.evaluation.temperature = 0.7
    config.evaluation.top_p = 1.0

    config.checkpoint.every = 0
    config.checkpoint.keep = 1
    config.log.samples_every = 0
    config.log.trackers = ()
    return config
