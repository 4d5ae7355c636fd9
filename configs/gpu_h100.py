"""DeepSeek-R1-Distill-Qwen-7B on MATH, as in the paper, on one node of 8 H100s.

    tpu_scripts/gpu_node.sh --config configs/gpu_h100.py --workdir runs/gpu_h100

which is `python -m igrpo_jax.main` with the environment that docs/scaling.md gives reasons for, as one process; on
Slurm `sbatch tpu_scripts/slurm.sbatch` with the same arguments, on any number of such nodes and with a process for each
GPU.

Memory, by arithmetic: weights, gradient and both moments take 122 GB over all GPUs, the sampler's bfloat16 copy 15 GB
on each, and each of the 8 slots of a GPU 0.52 GB. A run says at its start what it needs, by its compiler's count,
beside what a card has. Not measured on a GPU.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    c.data.train = "math"
    return c
