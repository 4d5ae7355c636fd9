"""DeepSeek-R1-Distill-Qwen-1.5B on MATH, on the 8 chips of one TPU v5e host.

    python -m igrpo_jax.main --config configs/tpu_v5e.py --workdir runs/tpu_v5e

on the host of a v5e:2x4 (accelerator type v5litepod-8).

`python -m igrpo_jax.aot --config configs/tpu_v5e.py --topology v5e:2x4` says: fits, with 14.2 GiB of 15.8 GiB per chip
in an update and 15.0 GiB in sampling, 5.4 GiB of both for the code of all programs. A step in which every completion is
as long as allowed takes 95 s at least.

Adam's first moment is bfloat16, for room. Every other setting is the paper's, and the default. No TPU was at hand to
run it on.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    c.data.train = "math"
    c.rollout.slots = 64
    c.optimizer.mu_dtype = "bfloat16"
    return c
