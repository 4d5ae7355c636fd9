"""DeepSeek-R1-Distill-Qwen-7B on MATH, as in the paper, on one node of 8 H100s.

    tpu_scripts/gpu_node.sh --config configs/gpu_h100.py --workdir runs/gpu_h100

This is `python -m igrpo_jax.main` as one process, with the environment that docs/scaling.md explains. On Slurm, run
`sbatch tpu_scripts/slurm.sbatch` with the same arguments, on any number of such nodes and with one process per GPU.

Memory by arithmetic, not measured on a GPU: weights, gradient and both moments take 122 GB over all GPUs, the sampler's
bfloat16 copy takes 15 GB on each GPU, and each of a GPU's 8 slots takes at most 0.52 GB of pages and as much again
while it decodes. At its start a run prints what it needs, by its compiler's count, next to what a card has.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    config.data.train = "math"
    return config
