"""A small run with a real model: SmolLM2-135M-Instruct on GSM8K, in float32 on two CPU cores.

    python -m igrpo_jax.main --config configs/smollm2_gsm8k_cpu.py --workdir runs/smollm2 \
        --config.model.path=SMOLLM2_DIR --config.data.train=gsm8k_train.jsonl --config.steps=3

SMOLLM2_DIR is a Hugging Face directory (or the hub id HuggingFaceTB/SmolLM2-135M-Instruct). gsm8k_train.jsonl has the
columns `prompt` and `answer`. Three steps took 5 minutes and 5.2 GB on two quiet cores.

Expected: readable samples, finite losses, and rewards near zero. A model of this size rarely solves a problem and
hardly ever writes the tags that the format reward asks for. Groups whose rewards are all equal give no gradient, and an
alert says so.

To evaluate during the run as well, which is slow on a CPU, add these flags. DATA_DIR holds gsm8k_test.jsonl; without
data_dir the benchmark comes from the hub:

    --config.evaluation.every=3 --config.evaluation.data_dir=DATA_DIR --config.evaluation.limit=16

To evaluate on its own:

    python -m igrpo_jax.evaluate --config configs/smollm2_gsm8k_cpu.py --model SMOLLM2_DIR --workdir evaluations/x \
        --config.evaluation.data_dir=DATA_DIR --config.evaluation.limit=64 --samples 2
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.steps = 100
    config.prompts_per_step = 4

    config.model.dtype = "float32"  # bfloat16 is slower on XLA's CPU
    config.data.max_prompt_length = 384
    config.refine.max_draft_length = 192
    config.rollout.max_completion_length = 192
    config.rollout.slots = 16

    config.learner.tokens_per_microbatch = 3072

    config.evaluation.benchmarks = ("gsm8k",)
    config.evaluation.samples = 1
    config.checkpoint.every = 10
    config.checkpoint.keep = 1  # each checkpoint takes 1.6 GB
    config.log.samples_every = 1
    return config
