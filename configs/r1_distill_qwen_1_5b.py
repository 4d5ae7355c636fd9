"""DeepSeek-R1-Distill-Qwen-1.5B on MATH.

    python -m igrpo_jax.main --config configs/r1_distill_qwen_1_5b.py --workdir runs/r1_distill_qwen_1_5b

The problems are MATH's train split from the hub, 7,500 as in the paper; --config.data.train=FILE names others. Every
other setting is the default, which is the paper's: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096 tokens.

The chat template opens <think> for the model, so that a completion starts inside it; rewards read the opened tag and
the completion together. A draft's reasoning enters q' as it was sampled (see igrpo_jax/data/prompts.py).

These settings are for one device of 80 GB. Memory by arithmetic, not measured: weights, gradient and both moments take
28 GB, the sampler's bfloat16 copy takes 3.6 GB, and each slot takes at most 0.27 GB.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    config.data.train = "math"
    return config
