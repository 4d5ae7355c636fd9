"""OpenMath-Nemotron-14B on MATH, as in the paper.

    python -m igrpo_jax.main --config configs/openmath_nemotron_14b.py --workdir runs/openmath_nemotron_14b

The problems are MATH's train split from the hub, 7,500 as in the paper; --config.data.train=FILE takes others. Every
other setting is the paper's, and the default: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096 tokens.

Memory, by arithmetic and not measured: weights, gradient and both moments take 236 GB over all devices, the sampler's
bfloat16 copy 30 GB on each, and a slot 1.8 GB. For 8 devices of 80 GB; two of them share a copy of the weights and its
slots.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "nvidia/OpenMath-Nemotron-14B"
    c.data.train = "math"
    c.rollout.slots = 32
    c.mesh.tensor = 2
    return c
