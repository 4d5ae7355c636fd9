"""DeepSeek-R1-Distill-Qwen-14B on MATH, as in the paper, on 8 chips of TPU v5p.

    python -m igrpo_jax.main --config configs/tpu_v5p_14b.py --workdir DIR

Run this on each of the two hosts of a v5p:2x2x2 (accelerator type v5p-16); tpu_scripts/ starts them all, as
docs/scaling.md describes. DIR is a folder that both hosts see. Two chips share a copy of the weights and its slots.

`python -m igrpo_jax.aot --config configs/tpu_v5p_14b.py --topology v5p:2x2x2` reports that the run fits: an update
takes 79.5 of 95.7 GiB per chip and sampling takes 73.0 GiB; in both, 10.2 GiB are for the code of all programs. A step
in which every completion has the greatest length takes at least 163 s.

Every other setting is the default, which is the paper's. It has not been run on a TPU.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"
    config.data.train = "math"
    config.mesh.tensor = 2
    return config
