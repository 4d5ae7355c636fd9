"""SmolLM2-135M-Instruct in benchmarks/matched_budget.py: what all of its runs have in common, for two CPU cores.

    python benchmarks/matched_budget.py --setting smollm2 --model SMOLLM2_DIR --data DATA_DIR --out studies/smollm2

DATA_DIR holds gsm8k_train.jsonl (id, prompt, answer, solution). The study first asks the model the problems with the
shortest solutions and trains on those that it solves sometimes: the others give it no gradient. Right answers alone are
rewarded, since a model of this size hardly ever writes the tags of the format reward.

On a GPU: more steps and problems, such as --steps 100 --screen 2000 --jobs 1 --config.model.dtype=bfloat16
--config.prompts_per_step=32 --config.rollout.slots=256.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.steps = 6
    c.prompts_per_step = 8

    c.model.dtype = "float32"  # bfloat16 is slower on XLA's CPU
    c.data.instruction = "Solve the problem. Think briefly, then end with the final answer as \\boxed{answer}."
    c.data.max_prompt_length = 256
    c.refine.max_draft_length = 128
    c.rollout.max_completion_length = 128
    c.rollout.temperature = 0.7
    c.rollout.slots = 32

    c.rewards.format = 0.0
    c.rewards.workers = 1
    c.learner.minibatches = 2
    c.learner.tokens_per_microbatch = 3072
    c.optimizer.learning_rate = 1e-5

    c.evaluation.every = 3
    c.evaluation.benchmarks = ("gsm8k",)
    c.evaluation.samples = 8
    c.evaluation.temperature = 0.7
    c.evaluation.top_p = 1.0

    c.checkpoint.every = 0
    c.checkpoint.keep = 1
    c.log.samples_every = 0
    c.log.trackers = ()
    return c
