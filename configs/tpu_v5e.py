"""DeepSeek-R1-Distill-Qwen-1.5B on MATH, on the 8 chips of one TPU v5e host.

    python -m igrpo_jax.main --config configs/tpu_v5e.py --workdir runs/tpu_v5e

Run this on the host of a v5e:2x4 (accelerator type v5litepod-8).

All eight chips share one copy of the weights to sample with, which `rollout.mesh.tensor` chooses by formula. The model
has two key and value heads: four chips have the same one, each for a quarter of the slots. By the formulas of `python
-m igrpo_jax.aot --config configs/tpu_v5e.py --topology v5e:2x4` a step in which every completion has the greatest
length then takes at least 58 s (95 s with a copy on each chip), 49 s of which are decoding. By the compiler's count an
update takes 11.0 of 15.8 GiB per chip and sampling 4.6, and the code of all programs 1.3.

Adam's first moment is bfloat16, to save memory. Every other setting is the default, which is the paper's. It has not
been run on a TPU.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    config.data.train = "math"
    config.rollout.slots = 64
    config.optimizer.mu_dtype = "bfloat16"
    return config
