"""The real thing in small: SmolLM2-135M-Instruct on GSM8K, in float32 on two CPU cores.

    python -m igrpo_jax.main --config configs/smollm2_gsm8k_cpu.py --workdir runs/smollm2 \
        --config.model.path=SMOLLM2_DIR --config.data.train=gsm8k_train.jsonl --config.steps=3

SMOLLM2_DIR is a Hugging Face directory (or the hub id HuggingFaceTB/SmolLM2-135M-Instruct), gsm8k_train.jsonl has the
columns `prompt` and `answer`. Three steps took 5 minutes and 5.2 GB on two quiet cores. What to expect: readable
samples, finite losses, and rewards near zero. A model of this size rarely solves a problem and hardly ever writes the
tags that the format reward asks for. Groups whose rewards are all equal give no gradient: an alert says so.

To evaluate as well (slow on a CPU), in the run or on its own; DATA_DIR holds gsm8k_test.jsonl, else the hub is asked:
    --config.evaluation.every=3 --config.evaluation.data_dir=DATA_DIR --config.evaluation.limit=16

    python -m igrpo_jax.evaluate --config configs/smollm2_gsm8k_cpu.py --model SMOLLM2_DIR --workdir evaluations/x \
        --config.evaluation.data_dir=DATA_DIR --config.evaluation.limit=64 --samples 2
"""

from igrpo_jax.config import default


def get_config():
    c = default()
    c.steps = 100
    c.prompts_per_step = 4

    c.model.dtype = "float32"  # bfloat16 is slower on XLA's CPU
    c.data.max_prompt_length = 384
    c.refine.max_draft_length = 192
    c.rollout.max_completion_length = 192
    c.rollout.slots = 16

    c.learner.tokens_per_microbatch = 3072

    c.evaluation.benchmarks = ("gsm8k",)
    c.evaluation.samples = 1
    c.checkpoint.every = 10
    c.checkpoint.keep = 1  # 1.6 GB each
    c.log.samples_every = 1
    return c
