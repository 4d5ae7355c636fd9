"""OpenMath-Nemotron-14B on MATH, as in the paper.

    python -m igrpo_jax.main --config configs/openmath_nemotron_14b.py --workdir runs/openmath_nemotron_14b

The problems are MATH's train split from the hub, 7,500 as in the paper; --config.data.train=FILE names others. Every
other setting is the default, which is the paper's: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096 tokens.

These settings are for 8 devices of 80 GB. Two devices share a copy of the weights and its slots. Memory by arithmetic,
not measured: weights, gradient and both moments take 236 GB over all devices, the sampler's bfloat16 copy takes 15 GB
on each device, and each slot takes at most 0.9 GB there.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "nvidia/OpenMath-Nemotron-14B"
    config.data.train = "math"
    config.rollout.slots = 32
    config.mesh.tensor = 2
    return config
