"""Qwen3-8B on MATH; model.path may name any other dense Qwen3.

    python -m igrpo_jax.main --config configs/qwen3_8b.py --workdir runs/qwen3_8b

The problems are MATH's train split from the hub, 7,500 as in the paper; --config.data.train=FILE names others. Every
other setting is the default, which is the paper's: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096 tokens.
The paper has no run of this model.

The chat template leaves thinking on, and the model itself opens <think>.

These settings are for 8 devices of 80 GB. Memory by arithmetic, not measured: weights, gradient and both moments take
131 GB over all devices. Eight H100s share a copy of the weights to sample with, which `rollout.mesh.tensor` chooses by
formula: 2.0 GB on each, and at most 0.17 GB for each slot of their group. On devices whose figures are not known
(igrpo_jax/distributed/chips.py), such as A100s, each has a copy of its own: 16.4 GB on each, and at most 1.4 GB for
each of its slots.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "Qwen/Qwen3-8B"
    config.data.train = "math"
    return config
