"""The evaluation of the paper: 64 samples on AIME, 8 on the others, temperature 0.6, top-p 0.95, up to 65,000 tokens.

    python -m igrpo_jax.evaluate --config configs/paper_evaluation.py --model MODEL --workdir evaluations/mine

Benchmarks come from the hub; --config.evaluation.data_dir=FOLDER takes NAME.jsonl from a folder first. A model whose
context is shorter than a prompt and 65,000 tokens has its completions cut to it, and says so. `rollout.slots` answers
are drawn at once, each with a cache of that length: lower it where the memory does not suffice.
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.evaluation.benchmarks = ("aime25", "aime24", "math500", "amc23", "gsm8k", "minerva")
    c.evaluation.samples = None  # of each benchmark, as in the paper
    c.evaluation.temperature, c.evaluation.top_p = 0.6, 0.95
    c.evaluation.max_completion_length = 65_000
    return c
