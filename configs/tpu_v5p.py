"""DeepSeek-R1-Distill-Qwen-7B on MATH, as in the paper, on 8 chips of TPU v5p."""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    c.data.train = "math"
    c.rollout.slots = 128  # all drafts, or all refinements, of a step
    c.learner.tokens_per_microbatch = 32_768  # a prompt with all four of its refinements
    return c
