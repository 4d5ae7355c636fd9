"""Nemotron-H-8B-Base-8K, a hybrid of Mamba-2 and attention, on MATH, as in the paper.

    python -m igrpo_jax.main --config configs/nemotron_h_8b.py --workdir runs/nemotron_h_8b \
        --config.data.train=math_train.jsonl

math_train.jsonl has the columns `prompt` and `answer` (the paper: the 7,500 problems of MATH's train split). A base
model: prompts have no chat template, and it has to learn the two tags from the reward for them. Paper, after training:
MATH500 78.8, GSM8K 91.3 (before: 61.2, 41.0).

Its context is 8,192 tokens: the paper's 1,024 of a prompt and 4,096 of a completion leave 3,072 for the wording and
what q' keeps of a draft (its end). Every other setting is the paper's.

Memory, by arithmetic and not measured: weights, gradient and both moments take 130 GB over all devices, the sampler's
bfloat16 copy 16 GB on each, and a slot 0.23 GB (0.1 of it the states of Mamba-2, whatever its length). For 8 devices of
80 GB. mesh.tensor may be up to 8, the number of its groups.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "nvidia/Nemotron-H-8B-Base-8K"
    c.data.train = "math_train.jsonl"
    c.refine.max_draft_length = 2816
    return c
