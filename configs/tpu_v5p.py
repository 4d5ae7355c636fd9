"""DeepSeek-R1-Distill-Qwen-7B on MATH, as in the paper, on 8 chips of TPU v5p.

    python -m igrpo_jax.main --config configs/tpu_v5p.py --workdir DIR

Run this on each of the two hosts of a v5p:2x2x2 (accelerator type v5p-16); tpu_scripts/ starts them all, as
docs/scaling.md describes. DIR is a folder that both hosts see.

Four chips share a copy of the weights to sample with, which `rollout.mesh.tensor` chooses by formula: 64 slots in each
of two groups, each on one host. By the formulas of `python -m igrpo_jax.aot --config configs/tpu_v5p.py --topology
v5p:2x2x2` a step in which every completion has the greatest length then takes at least 44 s (71 s with a copy on each
chip), 29 s of which are decoding. By the compiler's count an update takes 48.1 of 95.7 GiB per chip and sampling 22.2.

Every other setting is the default, which is the paper's. It has not been run on a TPU.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    config.data.train = "math"
    config.rollout.slots = 128  # all drafts, or all refinements, of a step
    config.learner.tokens_per_microbatch = 32_768  # a prompt with all four of its refinements
    return config
