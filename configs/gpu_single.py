"""DeepSeek-R1-Distill-Qwen-1.5B on MATH, on one GPU of 80 GB.

    XLA_CLIENT_MEM_FRACTION=0.92 python -m igrpo_jax.main --config configs/gpu_single.py \
        --workdir runs/gpu_single

Unless told otherwise, JAX takes 0.75 of a card's memory. docs/scaling.md has other settings and where they come from.

Memory by arithmetic, not measured on a GPU: weights, gradient and both moments take 28 GB, the sampler's bfloat16 copy
takes 3.6 GB, and each of the 64 slots takes at most 0.27 GB of pages. In its first step a run prints what it needs, by
its compiler's count, next to what the card has.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    config.data.train = "math"
    return config
