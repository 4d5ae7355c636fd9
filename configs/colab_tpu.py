"""Qwen2.5-1.5B-Instruct with LoRA on GSM8K, for the one TPU chip of 16 GB that Colab lends (v5e-1).

    python -m igrpo_jax.main --config configs/colab_tpu.py --workdir runs/colab

The frozen weights are bfloat16, so are the sampler's, with the adapters merged: 3.1 GB each. The rest is the cache of
the slots (28 KiB a token) and the update's activations. No TPU was at hand to run it on.

All weights of a 0.5B model fit as well: --config.model.path=Qwen/Qwen2.5-0.5B-Instruct --config.model.lora.rank=0
--config.optimizer.learning_rate=1e-6.

Each step is 16 problems, with 4 drafts and 4 refinements of up to 512 tokens; the single shot is measured on 64
held-out problems before the first step and every 20 steps.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    c.model.lora.rank = 32
    c.data.train = "gsm8k"
    c.data.max_prompt_length = 512
    c.steps = 60
    c.prompts_per_step = 16
    c.rollout.max_completion_length = 512
    c.rollout.temperature = 1.0
    c.rollout.slots = 32
    c.learner.tokens_per_microbatch = 2560  # a problem with two of its refinements
    c.optimizer.learning_rate = 2e-5  # adapters take more than all weights would
    c.evaluation.every = 20
    c.evaluation.benchmarks = ("gsm8k",)
    c.evaluation.limit = 64
    c.checkpoint.every = 20
    return c
