"""DeepSeek-R1-Distill-Qwen-1.5B on MATH.

    python -m igrpo_jax.main --config configs/r1_distill_qwen_1_5b.py --workdir runs/r1_distill_qwen_1_5b

The problems are MATH's train split from the hub, 7,500 as in the paper; --config.data.train=FILE takes others. Every
other setting is the paper's, and the default: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096 tokens.

The chat template opens <think> for the model, so that a completion starts inside it; rewards read the opened tag and
the completion together. A draft's reasoning is part of q' as it was sampled (see igrpo_jax/data/prompts.py).

Memory, by arithmetic and not measured: weights, gradient and both moments take 28 GB over all devices, the sampler's
bfloat16 copy 4 GB on each, and a slot 0.26 GB. One device of 80 GB holds it.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    c.data.train = "math"
    return c
