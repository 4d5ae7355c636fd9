"""OpenMath-Nemotron-7B on MATH, as in the paper.

    python -m igrpo_jax.main --config configs/openmath_nemotron_7b.py --workdir runs/openmath_nemotron_7b

The problems are MATH's train split from the hub, 7,500 as in the paper; --config.data.train=FILE names others. Every
other setting is the default, which is the paper's: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096 tokens.

These settings are for 8 devices of 80 GB. Memory by arithmetic, not measured: weights, gradient and both moments take
122 GB over all devices. Four H100s share a copy of the weights to sample with, which `rollout.mesh.tensor` chooses by
formula: 3.8 GB on each, and at most 0.13 GB for each slot of their group. On devices whose figures are not known
(igrpo_jax/distributed/chips.py), such as A100s, each has a copy of its own: 15.2 GB on each, and at most 0.54 GB for
each of its slots.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "nvidia/OpenMath-Nemotron-7B"
    config.data.train = "math"
    return config
