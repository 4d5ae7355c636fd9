"""Qwen2.5-7B-Instruct on MATH; model.path may name any other Qwen2.5.

    python -m igrpo_jax.main --config configs/qwen2_5_7b.py --workdir runs/qwen2_5_7b

The problems are MATH's train split from the hub, 7,500 as in the paper; --config.data.train=FILE names others. Every
other setting is the default, which is the paper's: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096 tokens.
The paper has no run of this model.

Qwen2.5-Math has a context of 4,096 tokens: lower data.max_prompt_length, refine.max_draft_length and
rollout.max_completion_length to fit it.

These settings are for 8 devices of 80 GB. Memory by arithmetic, not measured: weights, gradient and both moments take
122 GB over all devices. Four H100s share a copy of the weights to sample with, which `rollout.mesh.tensor` chooses by
formula: 3.8 GB on each, and at most 0.13 GB for each slot of their group. On devices whose figures are not known
(igrpo_jax/distributed/chips.py), such as A100s, each has a copy of its own: 15.2 GB on each, and at most 0.54 GB for
each of its slots.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "Qwen/Qwen2.5-7B-Instruct"
    config.data.train = "math"
    return config
