"""Qwen2.5-Coder-0.5B-Instruct in benchmarks/matched_budget.py: the settings that all its runs share, for one GPU.

    python benchmarks/matched_budget.py --setting qwen05 --model QWEN05_DIR --data DATA_DIR --out studies/qwen05 \
        --minutes 9

QWEN05_DIR is a Hugging Face directory (or the hub id Qwen/Qwen2.5-Coder-0.5B-Instruct). DATA_DIR holds
gsm8k_train.jsonl (id, prompt, answer, solution). The study asks the model the problems with the shortest solutions
first and keeps those that it solves sometimes; most of them are trained on, the others are held out. Only right answers
are rewarded, because a model that has not learned the tags of the format reward hardly ever writes them. Nothing was
measured on a GPU: the numbers of slots and tokens are guesses that leave space on a card of 80 GB.

Three steps on a CPU, to see that it runs:

    python benchmarks/matched_budget.py --setting qwen05 --model QWEN05_DIR --data DATA_DIR --out studies/qwen05_cpu \
        --groups igrpo --seeds 1 --steps 3 --screen 8 --held-out 2 --config.model.dtype=float32 \
        --config.prompts_per_step=2 --config.rollout.slots=16 --config.evaluation.every=3
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.steps = 40
    config.prompts_per_step = 32

    config.data.instruction = "Solve the problem. Think briefly, then end with the final answer as \\boxed{answer}."
    config.data.max_prompt_length = 256
    config.refine.max_draft_length = 384
    config.rollout.max_completion_length = 384
    config.rollout.temperature = 0.7
    config.rollout.slots = 256

    config.rewards.format = 0.0
    config.learner.minibatches = 2
    config.learner.tokens_per_microbatch = 16384
    config.optimizer.learning_rate = 5e-6

    config.evaluation.every = 10
    config.evaluation.benchmarks = ("gsm8k",)
    config.evaluation.samples = 4
    config.evaluation.temperature = 0.7
    config.evaluation.top_p = 1.0

    config.checkpoint.every = 0
    config.checkpoint.keep = 1  # each checkpoint takes 6 GB
    config.checkpoint.preemption_grace = 60.0
    config.log.samples_every = 0
    config.log.trackers = ()
    return config
