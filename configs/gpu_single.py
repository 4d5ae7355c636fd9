"""DeepSeek-R1-Distill-Qwen-1.5B on MATH, on one GPU of 80 GB.

    XLA_CLIENT_MEM_FRACTION=0.92 python -m igrpo_jax.main --config configs/gpu_single.py \
        --workdir runs/gpu_single

JAX takes 0.75 of a card's memory unless told otherwise; docs/scaling.md has other settings and where they come from.

Memory, by arithmetic: weights, gradient and both moments take 28 GB, the sampler's bfloat16 copy 4 GB, and each of the
64 slots 0.26 GB. A run says at its start what it needs, by its compiler's count, beside what the card has. Not measured
on a GPU.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    c.data.train = "math"
    return c
