"""Critique-GRPO (arXiv 2506.03106) on Qwen3-8B, with the verdict on a draft as its critique.

    python -m igrpo_jax.main --config configs/critique_grpo.py --workdir runs/critique_grpo

Of each prompt 7 answers are sampled. Each of them is refined once, in a prompt that shows the answer and says whether
it is correct. One refinement is kept, a right one if there is any. These 8 completions are one group: their baseline
is the mean of all 8 rewards, nothing divides by a standard deviation, and the refinement is trained on as an answer
to the plain prompt, with each token as p / (p + 0.1). Where a published script of the authors has a value, it is used
here: 128 prompts a step, two minibatches, learning rate 1e-6, temperature 1, 6,144 tokens, entropy bonus 0.001, no KL
penalty, no clip, and the sum over the tokens of a completion in the place of their mean.

What differs: the wording of the critique and of the refinement prompt, which are ours; of refinements that are all
wrong the first one is kept; the constant that the sum over tokens is divided by (that of Dr. GRPO); and the critique,
which is only the verdict. The authors' critique with the reference answer, and one that the model writes itself, are
not available. The problems are MATH's train split. A prompt samples 14 completions, so compare with GRPO at equal
samples. Where right answers are rare, set algorithm.entropy_coef to 0: in our study (docs/study.md) the bonus alone
then moved the policy, and nothing was learnt.
"""

from igrpo_jax.config import default

NO_CLIP = 1e9


def get_config():
    config = default()
    config.prompts_per_step = 128

    config.model.path = "Qwen/Qwen3-8B"
    config.data.train = "math"
    config.data.max_prompt_length = 2048

    config.algorithm.loss_type = "dr_grpo"
    config.algorithm.num_drafts = 7
    config.algorithm.num_generations = 1
    config.algorithm.draft_selection = "refined"
    config.algorithm.train_drafts = True
    config.algorithm.group = "prompt"
    config.algorithm.refine_credit = "plain"
    config.algorithm.credit_completions = "all"
    config.algorithm.credit_gamma = 0.1
    config.algorithm.epsilon = NO_CLIP
    config.algorithm.entropy_coef = 0.001
    config.refine.instruction = (
        "Below is an earlier answer to this problem. It is {verdict}. Work out where it goes wrong, if it does, and "
        "give a complete and correct answer of your own.\n\n<draft>\n{draft}\n</draft>"
    )

    config.rewards.format = 0.0  # which refinement is kept depends only on its answer
    config.rollout.max_completion_length = 6144
    config.rollout.temperature = 1.0
    config.learner.minibatches = 2
    config.optimizer.learning_rate = 1e-6
    return config
