"""Refinement of only the unsolved prompts (`draft_when = unsolved`), for DeepSeek-R1-Distill-Qwen-1.5B on MATH.

    python -m igrpo_jax.main --config configs/unsolved.py --workdir runs/unsolved

Each prompt has 4 drafts, which are trained on as a GRPO group. Where none of them is right, the best is refined 4
times, and the refinements are trained on too. Where one is right nothing is refined, and as many completions are drafts
of a further prompt, so that a step samples what it would sample with the paper's settings.

In our study (docs/study.md, part two) this gained where the samples of a whole run of GRPO would hold about three right
answers or fewer, was level with GRPO or a little ahead where they would hold 6 to 50, and lost about a point where they
would hold about 170. It was run only on small models.

Other settings are those of configs/r1_distill_qwen_1_5b.py.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    config.data.train = "math"
    config.algorithm.draft_when = "unsolved"
    config.algorithm.train_drafts = True
    return config
