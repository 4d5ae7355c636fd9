"""DeepSeek-R1-Distill-Qwen-7B on MATH, as in the paper, on one node of 8 H100s.

    tpu_scripts/gpu_node.sh --config configs/gpu_h100.py --workdir runs/gpu_h100

This is `python -m igrpo_jax.main` as one process, with the environment that docs/scaling.md explains. On Slurm, run
`sbatch tpu_scripts/slurm.sbatch` with the same arguments, on any number of such nodes and with one process per GPU.

Memory by arithmetic, not measured on a GPU: weights, gradient and both moments take 122 GB over all GPUs. Four H100s
share a copy of the weights to sample with, which `rollout.mesh.tensor` chooses by formula: 3.8 GB on each, and at most
0.13 GB of pages for each of the 32 slots of their group. In its first step a run prints what it needs, by its
compiler's count, next to what a card has.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    config.data.train = "math"
    return config
