"""SmolLM2-1.7B-Instruct on GSM8K; with model.path any SmolLM2.

    python -m igrpo_jax.main --config configs/smollm2_1_7b.py --workdir runs/smollm2_1_7b

The problems are GSM8K's train split from the hub; --config.data.train=FILE takes others. The model's context of 8,192
tokens and its short answers ask for less than the paper's lengths. For SmolLM2-135M on a laptop see
smollm2_gsm8k_cpu.py.

Memory, by arithmetic and not measured: weights, gradient and both moments take 27 GB over all devices, the sampler's
bfloat16 copy 3 GB on each, and a slot 0.5 GB. One device of 80 GB holds it.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    c.data.train = "gsm8k"
    c.data.max_prompt_length = 512
    c.rollout.max_completion_length = 1024
    return c
