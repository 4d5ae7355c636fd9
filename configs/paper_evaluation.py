"""The paper's evaluation: 64 samples on AIME, 8 on the others, temperature 0.6, top-p 0.95, up to 65,000 tokens.

    python -m igrpo_jax.evaluate --config configs/paper_evaluation.py --model MODEL --workdir evaluations/mine

Benchmarks come from the hub; with --config.evaluation.data_dir=FOLDER, a file NAME.jsonl in that folder is used first.
Where a prompt and 65,000 tokens exceed the model's context, completions are cut to it, and a message says so.
`rollout.slots` completions are drawn at once, in as many pages of the cache as memory holds. Where completions of that
length fill them, some are put back and drawn again later: fewer slots are then faster.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.evaluation.benchmarks = ("aime25", "aime24", "math500", "amc23", "gsm8k", "minerva")
    config.evaluation.samples = None  # the paper's number for each benchmark
    config.evaluation.temperature = 0.6
    config.evaluation.top_p = 0.95
    config.evaluation.max_completion_length = 65_000
    return config
