"""DeepSeek-R1-Distill-Qwen-7B on MATH, as in the paper, on 16 chips of TPU v6e.

    python -m igrpo_jax.main --config configs/tpu_v6e.py --workdir DIR

on each of the four hosts of a v6e:4x4 (accelerator type v6e-16; tpu_scripts/ starts them all, docs/scaling.md says
how). DIR is a folder that all of them see. Two chips share a copy of the weights and its slots.

`python -m igrpo_jax.aot --config configs/tpu_v6e.py --topology v6e:4x4` says: fits, with 25.8 GiB of 31.2 GiB per chip
in an update and 25.0 GiB in sampling, 4.2 GiB of both for the code of all programs. A step in which every completion is
as long as allowed takes 51 s at least.

Every other setting is the paper's, and the default. No TPU was at hand to run it on.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    c.data.train = "math"
    c.mesh.tensor = 2
    c.rollout.slots = 128  # all drafts, or all refinements, of a step
    return c
