"""The table of all panels of a report, by section, in the order of the page."""

from igrpo_jax.report.plots import Line, Panel

SFT, LEARNING, REFINING = "Supervised fine-tuning", "Is it learning?", "What refining does"
HEALTH, VERIFIER, TIME = "Health of the update", "Verifier", "Time and memory"
WARM_START, OTHER = "Warm start", "All other metrics"
OF_DRAFTS = "Some drafts are measured, at the steps whose samples are printed."

PANELS: dict[str, tuple[Panel, ...]] = {
    SFT: (
        Panel(
            "sft_loss",
            "Loss on solutions",
            "nats per token",
            "Cross-entropy of the solutions that a step imitates, before its update. Most of its fall is in the first "
            "steps.",
            (Line("loss", "trained", ("sft/loss",)),),
        ),
    ),
    LEARNING: (
        Panel(
            "solve_rate",
            "Solve rate in training",
            "% of answers",
            "Right answers on the step's training prompts. Best draft: prompts of which at least one draft is right. "
            "Refinements that see a right draft have an easier task than a single shot.",
            (
                Line("refinements", "trained", ("rewards/accuracy/mean",)),
                Line("best draft", "best", ("draft/solved_some", "draft/solved_all")),
                Line("drafts", "draft", ("draft/accuracy",)),
            ),
            100,
        ),
        Panel(
            "reward",
            "Reward",
            "weighted sum",
            "Means over the step. Refinements are worth their draft stage where they earn more than the best draft.",
            (
                Line("refinements", "trained", ("reward",)),
                Line("best draft", "best", ("draft/best_reward",)),
                Line("drafts", "draft", ("draft/reward",)),
            ),
        ),
        Panel(
            "reward_std",
            "Spread of rewards",
            "standard deviation",
            "Mean over groups of the standard deviation within the group. Advantages come from it; at 0 there is "
            "nothing to learn.",
            (Line("refinements", "trained", ("reward_std",)),),
        ),
        Panel(
            "verdicts",
            "Verdicts on own solutions",
            "% of verifications",
            "Verdicts that agree with the verifier, on right and on wrong solutions; and how many say that the "
            "solution is right. Where one line is near 100 and the other near 0, all verdicts are alike.",
            (
                Line("on right ones", "good", ("verify/accuracy_right",)),
                Line("on wrong ones", "bad", ("verify/accuracy_wrong",)),
                Line("says right", "muted", ("verify/says_right",)),
            ),
            100,
        ),
    ),
    REFINING: (
        Panel(
            "moves",
            "Draft → refinement",
            "% of refinements",
            "What became of the draft that a refinement was shown. Fixed should outweigh broken; all kept is copying.",
            (
                Line("kept right", "calm", ("refine/kept_right",)),
                Line("fixed", "good", ("refine/fixed",)),
                Line("broken", "bad", ("refine/broken",)),
                Line("kept wrong", "idle", ("refine/kept_wrong",)),
            ),
            100,
            stacked=True,
            compared=(
                Line("fixed", "good", ("refine/fixed",)),
                Line("broken", "bad", ("refine/broken",)),
            ),
        ),
        Panel(
            "copying",
            "Copying",
            "%",
            "Tokens that a refinement shares with its draft, and refinements that state the draft's answer. Near 100 % "
            "there is nothing left to learn from.",
            (
                Line("tokens copied", "trained", ("refine/copy_ratio",)),
                Line("same answer", "good", ("refine/same_answer",)),
            ),
            100,
        ),
        Panel(
            "zero_variance",
            "Groups without a gradient",
            "% of prompts",
            "All trained completions of the prompt earned the same: all right (too easy, or a copied right draft), all "
            "wrong (too hard), or alike otherwise.",
            (
                Line("all right", "calm", ("samples/equal_right",)),
                Line("all wrong", "idle", ("samples/equal_wrong",)),
                Line("alike otherwise", "muted", ("samples/equal_mixed",)),
            ),
            100,
            stacked=True,
            compared=(Line("equal rewards", "trained", ("frac_reward_zero_std",)),),
        ),
    ),
    HEALTH: (
        Panel(
            "loss",
            "Loss",
            "objective",
            "The advantages of a group sum to 0, so the loss stays near 0 whatever is learned.",
            (Line("loss", "trained", ("loss",)),),
        ),
        Panel(
            "kl",
            "KL to the reference",
            "nats per token",
            "The k3 estimate of KL(policy, reference). It is measured where algorithm.beta is not 0.",
            (
                Line("refinements", "trained", ("kl",)),
                Line("drafts", "draft", ("draft/kl",)),
            ),
        ),
        Panel(
            "learning_rate",
            "Learning rate",
            "last optimizer step",
            "As the schedule says.",
            (Line("learning rate", "trained", ("learning_rate",)),),
        ),
        Panel(
            "entropy",
            "Entropy",
            "nats per token",
            "Of the policy at the sampled tokens. A fall to nothing means that samples no longer differ.",
            (
                Line("refinements", "trained", ("entropy",)),
                Line("drafts", "draft", ("draft/entropy",)),
            ),
        ),
        Panel(
            "lengths",
            "Length",
            "tokens",
            "Mean length of completions, end token included.",
            (
                Line("refinements", "trained", ("completions/mean_length",)),
                Line("drafts", "draft", ("draft/mean_length",)),
            ),
            limit="rollout.max_completion_length",
        ),
        Panel(
            "truncated",
            "Cut and unparseable",
            "%",
            "Completions cut at the length limit, drafts cut to fit the prompt, and samples without a readable answer.",
            (
                Line("refinements cut", "trained", ("completions/clipped_ratio",)),
                Line("drafts cut", "draft", ("refine/draft_truncated",)),
                Line("no answer", "bad", ("verifier/unparseable_frac",)),
            ),
            100,
        ),
        Panel(
            "clip_fraction",
            "Clip fraction",
            "% of tokens",
            "Tokens whose ratio was clipped. Always 0 with one optimizer step per rollout.",
            (
                Line("refinements", "trained", ("clip_ratio/region_mean",)),
                Line("drafts", "draft", ("draft/clip_ratio",)),
            ),
            100,
        ),
        Panel(
            "gradient_norm",
            "Gradient norm",
            "before clipping",
            "Spikes are single steps; a steady climb is a learning rate that is too high.",
            (Line("gradient", "trained", ("grad_norm",)),),
            limit="optimizer.max_grad_norm",
            cut=True,
        ),
        Panel(
            "logp_difference",
            "Sampler against trainer",
            "nats",
            "Mean difference of the log-probs of the same tokens: about 0.02 in bfloat16. Above that, sampler and "
            f"trainer are not the same policy. {OF_DRAFTS}",
            (
                Line("refinements", "trained", ("sampling/sampling_logp_difference/mean",)),
                Line("drafts", "draft", ("sampling/draft_logp_difference/mean",)),
            ),
        ),
        Panel(
            "logp_difference_max",
            "Sampler against trainer, largest",
            "nats",
            f"The largest difference of any token; below 1 in a healthy run. {OF_DRAFTS}",
            (
                Line("refinements", "trained", ("sampling/sampling_logp_difference/max",)),
                Line("drafts", "draft", ("sampling/draft_logp_difference/max",)),
            ),
        ),
        Panel(
            "nonfinite",
            "Skipped optimizer steps",
            "in the run so far",
            "Optimizer steps that changed nothing, because their loss or gradient was not finite.",
            (Line("skipped", "bad", ("nonfinite_steps",)),),
        ),
    ),
    VERIFIER: (
        Panel(
            "verifier",
            "Errors and time-outs",
            "% of samples",
            "Samples without a verdict, as after a grading that raised or was killed, are left out of their groups.",
            (
                Line("errors", "bad", ("verifier/error_frac",)),
                Line("time-outs", "best", ("verifier/timeout_frac",)),
                Line("no verdict", "muted", ("verifier/invalid_frac",)),
            ),
            100,
        ),
        Panel(
            "latency",
            "Time of a grading",
            "seconds",
            "In its worker, median and the time that 99 % do not exceed.",
            (
                Line("median", "good", ("verifier/latency_p50",)),
                Line("99 %", "best", ("verifier/latency_p99",)),
            ),
            limit="rewards.timeout",
        ),
    ),
    TIME: (
        Panel(
            "time",
            "Time of a step",
            "seconds",
            "Waiting is time in which there was nothing to sample and the verifier was not done.",
            (
                Line("sampling", "calm", ("perf/rollout_time",), ("perf/verify_wait_time",)),
                Line("waiting for verifier", "bad", ("perf/verify_wait_time",)),
                Line("update", "good", ("perf/update_time",)),
                Line("rest", "idle", ("perf/step_time",), ("perf/rollout_time", "perf/update_time")),
            ),
            stacked=True,
            compared=(Line("whole step", "good", ("perf/step_time",)),),
            cut=True,
        ),
        Panel(
            "slots",
            "Sampler's slots",
            "%",
            "In use: slots × decode steps that drew a token. Overlap: decode steps that drew drafts and refinements.",
            (
                Line("in use", "good", ("perf/slot_utilization",)),
                Line("stages overlap", "muted", ("perf/stage_overlap_frac",)),
            ),
            100,
        ),
        Panel(
            "tokens_per_second",
            "Throughput",
            "tokens per second",
            "Sampled tokens of both stages divided by the time of the step.",
            (Line("tokens/s", "good", ("perf/tokens_per_second",)),),
        ),
        Panel(
            "padding",
            "Wasted work of the update",
            "% of tokens",
            "Padding of what the update runs, and tokens of groups without a gradient, which it leaves out.",
            (
                Line("padding", "best", ("perf/padding_frac",)),
                Line("no gradient", "idle", ("perf/idle_frac",)),
            ),
            100,
        ),
        Panel(
            "memory",
            "Most memory so far",
            "GiB",
            "Of a device, where JAX counts it, and of the first process on its host.",
            (
                Line("device", "trained", ("perf/peak_device_memory",)),
                Line("host", "muted", ("perf/peak_host_memory",)),
            ),
        ),
    ),
    WARM_START: (
        Panel(
            "warm_start",
            "Loss of the warm start",
            "nats per token",
            "By steps of the warm start, which come before step 1.",
            (Line("loss", "single", ("warm_start/loss",)),),
        ),
    ),
}
