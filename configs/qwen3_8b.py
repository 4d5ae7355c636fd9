"""Qwen3-8B on MATH; with model.path any dense Qwen3.

    python -m igrpo_jax.main --config configs/qwen3_8b.py --workdir runs/qwen3_8b

The problems are MATH's train split from the hub, 7,500 as in the paper; --config.data.train=FILE takes others. Every
other setting is the paper's, and the default: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096 tokens. The
paper has no run of it. The chat template leaves thinking on, and it is the model that opens <think>.

Memory, by arithmetic and not measured: weights, gradient and both moments take 131 GB over all devices, the sampler's
bfloat16 copy 16 GB on each, and a slot 1.4 GB. For 8 devices of 80 GB.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "Qwen/Qwen3-8B"
    c.data.train = "math"
    return c
