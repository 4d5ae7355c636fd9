"""Qwen2.5-1.5B-Instruct with LoRA on GSM8K, for the one TPU chip of 16 GB that Colab lends (v5e-1).

    python -m igrpo_jax.main --config configs/colab_tpu.py --workdir runs/colab

`python -m igrpo_jax.aot --config configs/colab_tpu.py --topology v5e:1x1` reports that the run fits: an update takes
12.1 of 15.8 GiB per chip and sampling takes 10.0 GiB; in both, 0.8 GiB are for the code of all programs. A step in
which every completion has the greatest length takes at least 9 s. It has not been run on a TPU.

The frozen weights are bfloat16. So are the sampler's, with the adapters merged. Each copy takes 2.9 GiB.

All weights of a 0.5B model can be trained too: --config.model.path=Qwen/Qwen2.5-0.5B-Instruct
--config.model.lora.rank=0 --config.optimizer.learning_rate=1e-6. By the same aot command this takes 89% of the memory.

Each step is 16 problems, with 4 drafts and 4 refinements of up to 512 tokens. The single shot is measured on 64
held-out problems before the first step and every 20 steps.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    config.model.lora.rank = 32
    config.data.train = "gsm8k"
    config.data.max_prompt_length = 512
    config.steps = 60
    config.prompts_per_step = 16
    config.rollout.max_completion_length = 512
    config.rollout.temperature = 1.0
    config.rollout.slots = 64  # all drafts, or all refinements, of a step
    config.learner.tokens_per_microbatch = 2560  # a problem with two of its refinements
    config.optimizer.learning_rate = 2e-5  # adapters need a higher rate than all weights do
    config.evaluation.every = 20
    config.evaluation.benchmarks = ("gsm8k",)
    config.evaluation.limit = 64
    config.checkpoint.every = 20
    return config
