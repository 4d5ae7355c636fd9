"""DeepSeek-R1-Distill-Qwen-7B on MATH, as in the paper, on 16 chips of TPU v6e.

    python -m igrpo_jax.main --config configs/tpu_v6e.py --workdir DIR

Run this on each of the four hosts of a v6e:4x4 (accelerator type v6e-16); tpu_scripts/ starts them all, as
docs/scaling.md describes. DIR is a folder that all hosts see. Two chips share the weights in an update.

Eight chips, those of two hosts, share a copy of the weights to sample with, which `rollout.mesh.tensor` chooses by
formula, and the two hosts sample in lockstep. Two chips have the same key and value head, each for half of the slots.
By the formulas of `python -m igrpo_jax.aot --config configs/tpu_v6e.py --topology v6e:4x4` a step in which every
completion has the greatest length then takes at least 33 s (86 s with a copy on each chip), 30 s of which are decoding.
By the compiler's count an update takes 21.7 of 31.2 GiB per chip and sampling 11.3.

Every other setting is the default, which is the paper's. It has not been run on a TPU.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    config.data.train = "math"
    config.mesh.tensor = 2
    config.rollout.slots = 128  # all drafts, or all refinements, of a step
    return config
