"""Nemotron-H-8B-Base-8K, a hybrid of Mamba-2 and attention, on MATH, as in the paper.

    python -m igrpo_jax.main --config configs/nemotron_h_8b.py --workdir DIR

Run this on each of the two hosts of a v5p:2x2x2 (accelerator type v5p-16; tpu_scripts/ starts them all, as
docs/scaling.md describes), or on 8 GPUs of 80 GB. DIR is a folder that all hosts see.

This is a base model: its prompts have no chat template, and it has to learn the two tags from the reward for them.
Paper, after training: MATH500 78.8, GSM8K 91.3 (before: 61.2, 41.0).

The model's context is 8,192 tokens. The paper's 1,024 tokens of a prompt and 4,096 of a completion leave 3,072 for the
instruction and for the part of a draft (its end) that q' keeps. Every other setting is the default, which is the
paper's.

All eight chips share one copy of the weights to sample with, which `rollout.mesh.tensor` chooses by formula (8 is also
the number of the model's groups), and the two hosts sample in lockstep. By the formulas of `python -m igrpo_jax.aot
--config configs/nemotron_h_8b.py --topology v5p:2x2x2` a step in which every completion has the greatest length then
takes at least 33 s, 24 s of which are decoding (116 s in all with a copy on each chip, half as many slots and
`learner.remat=full`). By the compiler's count an update takes 81.0 of 95.7 GiB per chip, or 52.4 where it recomputes
everything (`learner.remat=full`), and sampling takes 16.9. It has not been run on a TPU.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "nvidia/Nemotron-H-8B-Base-8K"
    config.data.train = "math"
    config.refine.max_draft_length = 2816
    config.rollout.slots = 128  # all drafts, or all refinements, of a step
    return config
