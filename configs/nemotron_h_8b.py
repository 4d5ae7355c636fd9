"""Nemotron-H-8B-Base-8K, a hybrid of Mamba-2 and attention, on MATH, as in the paper.

    python -m igrpo_jax.main --config configs/nemotron_h_8b.py --workdir DIR

on each of the two hosts of a v5p:2x2x2 (accelerator type v5p-16; tpu_scripts/ starts them all, docs/scaling.md says
how), or on 8 GPUs of 80 GB. DIR is a folder that all hosts see. A base model: prompts have no chat template, and it has
to learn the two tags from the reward for them. Paper, after training: MATH500 78.8, GSM8K 91.3 (before: 61.2, 41.0).

Its context is 8,192 tokens: the paper's 1,024 of a prompt and 4,096 of a completion leave 3,072 for the wording and
what q' keeps of a draft (its end). Every other setting is the paper's.

`python -m igrpo_jax.aot --config configs/nemotron_h_8b.py --topology v5p:2x2x2` says: fits, with 70.2 GiB of 95.7 GiB
per chip in an update and 59.2 GiB in sampling, 17.7 GiB of both for the code of all programs. A step in which every
completion is as long as allowed takes 116 s at least. mesh.tensor may be up to 8, the number of its groups. No TPU was
at hand to run it on.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "nvidia/Nemotron-H-8B-Base-8K"
    c.data.train = "math"
    c.refine.max_draft_length = 2816
    return c
