"""Qwen2.5-1.5B-Instruct with LoRA on GSM8K, for the one TPU chip of 16 GB that Colab lends (v5e-1).

    python -m igrpo_jax.main --config configs/colab_tpu.py --workdir runs/colab

`python -m igrpo_jax.aot --config configs/colab_tpu.py --topology v5e:1x1` says: fits, with 14.2 GiB of 15.8 GiB per
chip in an update and 13.6 GiB in sampling, 4.5 GiB of both for the code of all programs. A step in which every
completion is as long as allowed takes 15 s at least.

The frozen weights are bfloat16, so are the sampler's, with the adapters merged: 2.9 GiB each. No TPU was at hand to run
it on.

All weights of a 0.5B model (--config.model.path=Qwen/Qwen2.5-0.5B-Instruct --config.model.lora.rank=0
--config.optimizer.learning_rate=1e-6) fit as well, by the same command: 96%.

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
