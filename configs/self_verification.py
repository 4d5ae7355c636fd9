"""Self-Verification (arXiv 2506.01369) on Qwen2.5-Math-7B: the policy solves, and gives verdicts on its solutions.

    python -m igrpo_jax.main --config configs/self_verification.py --workdir runs/self_verification

Of each problem 8 solutions are sampled, a GRPO group. Where some are right and some wrong, one of them, chosen at
random, is shown in a second prompt, and 8 verifications state whether it is right: 1 or 0. They are rewarded where they
agree with the verifier. Both groups are trained on in the same update. Where the paper (table 6) has a value it is used
here: two minibatches, learning rate 1e-6, KL penalty 0.001, entropy bonus 0.001, groups of 8, temperature 0.6, prompts
and completions of 2,048 tokens each. Its 128 prompts a step are problems and verifications together; 64 problems with
at most as many verifications come nearest.

What differs: solutions are those of the same step, not of a buffer that is refreshed every 60 steps; the dynamic
reward, of which an update of this kind leaves only that prompts with solutions all alike are not verified
(docs/igrpo.md); the wording, which puts the solution into the user's turn and asks for 1 or 0 instead of Yes or No;
solutions of more than 1,280 tokens, of which the prompt shows the end, where the paper leaves the problem out; the
rewards of -0.5 for code and for verdicts without reasons, which only this model needed; the schedule of the learning
rate. The problems are MATH's train split, of all levels. Verdicts that weigh answers when the trained model is used are
not part of this.
"""

from igrpo_jax.config import default


def get_config():
    config = default()
    config.steps = 1500
    config.prompts_per_step = 64

    config.model.path = "Qwen/Qwen2.5-Math-7B"
    config.data.train = "math"
    config.data.max_prompt_length = 640

    config.algorithm.second_stage = "verify"
    config.algorithm.num_drafts = 8
    config.algorithm.num_generations = 8
    config.algorithm.train_drafts = True
    config.algorithm.draft_selection = "random"
    config.algorithm.beta = 0.001
    config.algorithm.entropy_coef = 0.001
    config.refine.max_draft_length = 1280
    config.refine.instruction = (
        "Below is a solution to this problem. Do not solve the problem; find out whether the final answer of the "
        "solution is right.\n\n<solution>\n{draft}\n</solution>\n\nVerify the solution step by step. Then give only 1 "
        "if it is right, or 0 if it is wrong, as your final answer."
    )

    config.rewards.format = 0.0  # as in the paper, a right verdict is all that a verification earns
    config.rollout.max_completion_length = 2048
    config.rollout.temperature = 0.6
    config.learner.minibatches = 2
    config.optimizer.learning_rate = 1e-6
    return config
