"""DeepSeek-R1-Distill-Qwen-7B on MATH, as in the paper, on 8 chips of TPU v5p.

    python -m igrpo_jax.main --config configs/tpu_v5p.py --workdir DIR

on each of the two hosts of a v5p:2x2x2 (accelerator type v5p-16; tpu_scripts/ starts them all, docs/scaling.md says
how). DIR is a folder that both hosts see.

`python -m igrpo_jax.aot --config configs/tpu_v5p.py --topology v5p:2x2x2` says: fits, with 57.8 GiB of 95.7 GiB per
chip in an update and 48.3 GiB in sampling, 7.0 GiB of both for the code of all programs. A step in which every
completion is as long as allowed takes 69 s at least.

Every other setting is the paper's, and the default. No TPU was at hand to run it on.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    c.data.train = "math"
    c.rollout.slots = 128  # all drafts, or all refinements, of a step
    c.learner.tokens_per_microbatch = 32_768  # a prompt with all four of its refinements
    return c
