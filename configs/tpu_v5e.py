"""DeepSeek-R1-Distill-Qwen-1.5B on MATH, on the 8 chips of one TPU v5e host.

    python -m igrpo_jax.main --config configs/tpu_v5e.py --workdir runs/tpu_v5e

Run this on the host of a v5e:2x4 (accelerator type v5litepod-8).

`python -m igrpo_jax.aot --config configs/tpu_v5e.py --topology v5e:2x4` reports that the run fits: an update takes 14.2
of 15.8 GiB per chip and sampling takes 15.0 GiB; in both, 5.4 GiB are for the code of all programs. A step in which
every completion has the greatest length takes at least 95 s.

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
