"""OpenMath-Nemotron-14B on MATH, as in the paper.

    python -m igrpo_jax.main --config configs/openmath_nemotron_14b.py --workdir runs/openmath_nemotron_14b

The problems are MATH's train split from the hub, 7,500 as in the paper; --config.data.train=FILE names others. Every
other setting is the default, which is the paper's: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096 tokens.

These settings are for 8 devices of 80 GB. Memory by arithmetic, not measured: weights, gradient and both moments take
236 GB over all devices. Eight H100s share a copy of the weights to sample with, which `rollout.mesh.tensor` chooses by
formula: 3.7 GB on each, and at most 0.23 GB for each slot of their group. On devices whose figures are not known
(igrpo_jax/distributed/chips.py), such as A100s, two share a copy: 14.8 GB on each, and at most 0.92 GB for each of
their slots.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "nvidia/OpenMath-Nemotron-14B"
    config.data.train = "math"
    config.rollout.slots = 32
    config.mesh.tensor = 2
    return config
