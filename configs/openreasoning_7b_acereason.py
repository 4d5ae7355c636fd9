"""OpenReasoning-Nemotron-7B on AceReason-Math, as in the paper.

    python -m igrpo_jax.main --config configs/openreasoning_7b_acereason.py --workdir DIR

Run this on each of the two hosts of a v5p:2x2x2 (accelerator type v5p-16; tpu_scripts/ starts them all, as
docs/scaling.md describes), or on 8 GPUs of 80 GB. DIR is a folder that all hosts see.

Every other setting is the default, which is the paper's: 32 prompts a step, 4 drafts and 4 refinements of up to 4,096
tokens. Paper, after training: AIME24 85.6, AIME25 79.6. The model thinks at length, and completions that are cut at
4,096 tokens have no answer: watch `completions/clipped_ratio`, and raise rollout.max_completion_length where it is
high.

configs/tpu_v5p.py, a model of the same shape with larger micro-batches and twice the slots, takes 48.1 of 95.7 GiB per
chip there by the compiler's count (docs/scaling.md). It has not been run on a TPU.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "nvidia/OpenReasoning-Nemotron-7B"
    config.data.train = "nvidia/AceReason-Math"
    config.data.prompt_column = "problem"
    return config
