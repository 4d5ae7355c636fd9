"""DeepSeek-R1-Distill-Qwen-7B on MATH, as in the paper.

    python -m igrpo_jax.main --config configs/r1_distill_qwen_7b.py --workdir runs/r1_distill_qwen_7b

The problems are MATH's train split from the hub, 7,500 as in the paper; --config.data.train=FILE names others. Every
other setting is the default, which is the paper's: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096 tokens.
Paper, after training: AIME24 56.3, AIME25 40.2, MATH500 93.8 (before: 54.4, 38.6, 92.8).

The chat template opens <think> for the model, so that a completion starts inside it; rewards read the opened tag and
the completion together. A draft's reasoning enters q' as it was sampled (see igrpo_jax/data/prompts.py).

These settings are for 8 devices of 80 GB. Memory by arithmetic, not measured: weights, gradient and both moments take
122 GB over all devices. Four H100s share a copy of the weights to sample with, which `rollout.mesh.tensor` chooses by
formula: 3.8 GB on each, and at most 0.13 GB for each slot of their group. On devices whose figures are not known
(igrpo_jax/distributed/chips.py), such as A100s, each has a copy of its own: 15.2 GB on each, and at most 0.54 GB for
each of its slots.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    config.data.train = "math"
    return config
