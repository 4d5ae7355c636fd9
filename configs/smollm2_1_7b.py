"""SmolLM2-1.7B-Instruct on GSM8K; model.path may name any other SmolLM2.

    python -m igrpo_jax.main --config configs/smollm2_1_7b.py --workdir runs/smollm2_1_7b

The problems are GSM8K's train split from the hub; --config.data.train=FILE names others. Lengths are below the paper's,
because the model's context is 8,192 tokens and its answers are short. For SmolLM2-135M on a laptop see
smollm2_gsm8k_cpu.py.

These settings are for one device of 80 GB. Memory by arithmetic, not measured: weights, gradient and both moments take
27 GB, the sampler's bfloat16 copy takes 3.4 GB, and each slot takes at most 0.53 GB.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    config.data.train = "gsm8k"
    config.data.max_prompt_length = 512
    config.rollout.max_completion_length = 1024
    return config
