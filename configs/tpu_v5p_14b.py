"""DeepSeek-R1-Distill-Qwen-14B on MATH, as in the paper, on 8 chips of TPU v5p.

    python -m igrpo_jax.main --config configs/tpu_v5p_14b.py --workdir DIR

on each of the two hosts of a v5p:2x2x2 (accelerator type v5p-16; tpu_scripts/ starts them all, docs/scaling.md says
how). DIR is a folder that both hosts see. Two chips share a copy of the weights and its slots.

`python -m igrpo_jax.aot --config configs/tpu_v5p_14b.py --topology v5p:2x2x2` says: fits, with 79.5 GiB of 95.7 GiB per
chip in an update and 73.0 GiB in sampling, 10.2 GiB of both for the code of all programs. A step in which every
completion is as long as allowed takes 163 s at least.

Every other setting is the paper's, and the default. No TPU was at hand to run it on.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"
    c.data.train = "math"
    c.mesh.tensor = 2
    return c
