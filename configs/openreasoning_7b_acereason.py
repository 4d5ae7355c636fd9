"""OpenReasoning-Nemotron-7B on AceReason-Math, as in the paper.

    python -m igrpo_jax.main --config configs/openreasoning_7b_acereason.py --workdir runs/openreasoning_7b_acereason

The data comes from the hub. Every other setting is the paper's, and the default: 32 prompts a step, 4 drafts and 4
refinements of up to 4,096 tokens. Paper, after training: AIME24 85.6, AIME25 79.6. The model thinks at length:
completions that are cut at 4,096 tokens have no answer; watch `completions/clipped_ratio`, and raise
rollout.max_completion_length where it is high.

Memory, by arithmetic and not measured: weights, gradient and both moments take 122 GB over all devices, the sampler's
bfloat16 copy 15 GB on each, and a slot 0.52 GB. For 8 devices of 80 GB.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "nvidia/OpenReasoning-Nemotron-7B"
    c.data.train = "nvidia/AceReason-Math"
    c.data.prompt_column = "problem"
    return c
