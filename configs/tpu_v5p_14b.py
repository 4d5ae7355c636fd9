"""DeepSeek-R1-Distill-Qwen-14B on MATH, as in the paper, on 8 chips of TPU v5p.

    python -m igrpo_jax.main --config configs/tpu_v5p_14b.py --workdir DIR

Run this on each of the two hosts of a v5p:2x2x2 (accelerator type v5p-16); tpu_scripts/ starts them all, as
docs/scaling.md describes. DIR is a folder that both hosts see.

All eight chips share one copy of the weights to sample with, which `rollout.mesh.tensor` chooses by formula, and the
two hosts sample in lockstep. By the counts of `python -m igrpo_jax.aot --config configs/tpu_v5p_14b.py --topology
v5p:2x2x2` an update takes 67.0 of 95.7 GiB per chip and sampling takes 51.8 GiB, and a step in which every completion
has the greatest length takes at least 98 s (107 s where the four chips of a host share a copy).

Every other setting is the default, which is the paper's. It has not been run on a TPU.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"
    config.data.train = "math"
    config.rollout.slots = 128  # all drafts, or all refinements, of a step
    return config
