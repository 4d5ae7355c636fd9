"""The panels of a report: one table of plots with their lines, and the choice of those that have data.

The role of a line says whose numbers it shows (drafts, best draft, trained completions, single shot). A role has the
same colour in all plots and pages.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from igrpo_jax.report.runs import Curve, RecordedRun

REWARD = re.compile(r"rewards/([^/]+)/mean")
AXES = ("warm_start/step", "perf/wall_time")  # metrics that are no curves: an axis, and the time of a row


@dataclass(frozen=True)
class Line:
    """A sum of metrics, drawn in the colour of its role."""

    label: str
    role: str  # a key of figures.COLOURS[theme]
    metrics: tuple[str, ...]
    less: tuple[str, ...] = ()  # metrics that are subtracted from the sum
    band: tuple[str, str] | None = None  # metrics of the lower and upper end of an interval

    @property
    def names(self) -> tuple[str, ...]:
        """Returns all metrics that the line needs."""
        return (*self.metrics, *self.less, *(self.band or ()))

    def of(self, run: RecordedRun) -> Curve:
        """Returns the values of the line in a run, empty where the run lacks a metric."""
        return run.curve(*self.metrics, less=self.less)


@dataclass(frozen=True)
class Panel:
    """One plot."""

    file: str  # name without .png
    title: str
    unit: str
    caption: str  # how to read it, on the page
    lines: tuple[Line, ...]
    scale: float = 1.0  # factor of the values: 100 for percent
    stacked: bool = False  # lines are parts of a whole, where one run is shown
    compared: tuple[Line, ...] = ()  # drawn instead of `lines` where there are several runs, or where a part is missing
    limit: str = ""  # a setting that is drawn as a dashed line where the only run comes near it
    drawn: bool = True  # whether it is a PNG too
    cut: bool = False  # whether the highest few values may leave the plot, which then names the peak


LEARNING, REFINING, HEALTH = "Is it learning?", "What refining does", "Health of the update"
VERIFIER, TIME, START, OTHER = "Verifier", "Time and memory", "Supervised start", "All other metrics"

PANELS: dict[str, tuple[Panel, ...]] = {
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
            "Of the policy at the sampled tokens. A fall to nothing means that samples no longer differ. Drafts "
            "that are not trained on are measured only at the steps whose samples are printed.",
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
            "trainer are not the same policy.",
            (
                Line("refinements", "trained", ("sampling/sampling_logp_difference/mean",)),
                Line("drafts", "draft", ("sampling/draft_logp_difference/mean",)),
            ),
        ),
        Panel(
            "logp_difference_max",
            "Sampler against trainer, largest",
            "nats",
            "The largest difference of any token; below 1 in a healthy run.",
            (
                Line("refinements", "trained", ("sampling/sampling_logp_difference/max",)),
                Line("drafts", "draft", ("sampling/draft_logp_difference/max",)),
            ),
        ),
        Panel(
            "nonfinite",
            "Skipped optimizer steps",
            "in the run so far",
            "Optimizer steps that changed nothing, since their loss or gradient was not finite.",
            (Line("skipped", "bad", ("nonfinite_steps",)),),
        ),
    ),
    VERIFIER: (
        Panel(
            "verifier",
            "Errors and time-outs",
            "% of samples",
            "Gradings that raised or were killed score 0. Samples without a verdict are left out of their groups.",
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
            "Padding, and tokens of groups without a gradient, for which the update only computes log-probs.",
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
    START: (
        Panel(
            "warm_start",
            "Loss of the supervised start",
            "nats per token",
            "By steps of the supervised start, which come before step 1.",
            (Line("loss", "single", ("warm_start/loss",)),),
        ),
    ),
}


def evaluation(name: str) -> Panel:
    """Returns the panel of a benchmark: single-shot pass@1, and pass@1 after a round of refining where measured."""
    lines = [
        _with_interval("single shot", "single", f"eval/{name}/pass@1"),
        _with_interval("after a round of refining", "trained", f"eval/{name}/refine_1/pass@1"),
    ]
    file = f"evaluation_{_file_name(name)}"
    caption = "Held-out problems, plain prompt, no draft: what was learned. Bands are 95 % intervals over problems."
    return Panel(file, f"Single shot: {name}", "pass@1, %", caption, tuple(lines), 100)


def _with_interval(label: str, role: str, metric: str) -> Line:
    return Line(label, role, (metric,), band=(f"{metric}_low", f"{metric}_high"))


def reward(name: str) -> Panel:
    """Returns the panel of one reward, before its weight."""
    line = Line("refinements", "trained", (f"rewards/{name}/mean",))
    caption = "Mean of this reward alone, before its weight."
    return Panel(f"reward_{_file_name(name)}", f"Reward: {name}", "mean", caption, (line,))


def other(metric: str) -> Panel:
    """Returns the panel of a metric that no other panel shows; the page draws it, and it has no PNG."""
    return Panel(f"other_{_file_name(metric)}", metric, "", "", (Line(metric, "trained", (metric,)),), drawn=False)


def _file_name(name: str) -> str:
    """Returns a name as a part of a file's name; two names that look alike after that are told apart by their hash."""
    plain = re.sub(r"[^A-Za-z0-9.-]", "_", name)
    return plain if plain == name else f"{plain[:80]}-{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"


def panels(runs: Sequence[RecordedRun]) -> dict[str, list[Panel]]:
    """Returns by section the panels that have data in at least one run. The solve rate comes first.

    Every metric of the runs is in a panel: the last section has those that no other panel shows.
    """
    benchmarks = sorted({name for run in runs for name in run.benchmarks})
    rewards = sorted({match[1] for run in runs for name in run.metrics if (match := REWARD.fullmatch(name))})
    extra = [*map(evaluation, benchmarks), *(reward(name) for name in rewards if name != "accuracy")]
    sections = {}
    for section, table in PANELS.items():
        candidates = [table[0], *extra, *table[1:]] if section == LEARNING else list(table)
        fitted = [_fitted(panel, runs) for panel in candidates]
        sections[section] = [panel for panel in fitted if panel.lines]
    shown = {name for table in sections.values() for panel in table for line in panel.lines for name in line.names}
    left = sorted({name for run in runs for name, values in run.metrics.items() if values and name not in shown})
    sections[OTHER] = [other(name) for name in left if name not in AXES]
    return {section: with_data for section, with_data in sections.items() if with_data}


def trained(runs: Sequence[RecordedRun]) -> str:
    """Returns the name of trained completions: "refinements", "completions", or "trained" where the runs have both."""
    refine = [bool(run.curve("refine/copy_ratio")) for run in runs]
    return "refinements" if all(refine) else "trained" if any(refine) else "completions"


def _fitted(panel: Panel, runs: Sequence[RecordedRun]) -> Panel:
    """Returns the panel with the lines for which these runs have data."""
    lines, stacked = panel.lines, panel.stacked and len(runs) == 1
    if panel.compared and (not stacked or not all(line.of(runs[0]) for line in lines)):
        lines, stacked = panel.compared, False
    lines = tuple(line for line in lines if any(line.of(run) for run in runs))
    lines = tuple(replace(line, label=line.label.replace("refinements", trained(runs))) for line in lines)
    return replace(panel, lines=lines, stacked=stacked)
