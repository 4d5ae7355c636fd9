"""What a report of several runs says of each against the first: the single shot, problem by problem, and the budget."""

from igrpo_jax.evaluation.comparison import Paired
from igrpo_jax.outputs.evaluation_settings import evaluation_folder
from igrpo_jax.report.runs import RecordedRun
from igrpo_jax.report.summary import Change, compared_folders, paired_text, step_times


def sentences(first: RecordedRun, run: RecordedRun) -> list[str]:
    """Returns by how much the last single shot of `run` is better than that of `first`, for each benchmark of both."""
    said, compared = [], {}
    for name in (name for name in first.benchmarks if name in run.benchmarks):
        steps = [int(each.curve(f"eval/{name}/pass@1").steps[-1]) for each in (first, run)]
        both = evaluation_folder(first.folder, steps[0]), evaluation_folder(run.folder, steps[1])
        if both not in compared:
            compared[both] = compared_folders(*both, "{name} is {first} in the first and {second} in the second")
        obstacle, pairs = compared[both]
        ends = f"{first.name} at step {steps[0]} and {run.name} at step {steps[1]}"
        said.append(f"Single-shot pass@1 on {name}, {ends}: {_difference(first, run, obstacle, pairs.get(name))}")
    return said


def totals(run: RecordedRun) -> list[Change]:
    """Returns what a run has taken so far, as rows of the table of several runs."""
    tokens = [run.curve(f"perf/{stage}_tokens").values.sum() for stage in ("draft", "completion")]
    texts = {"tokens sampled": f"{sum(tokens):,.0f}" if any(tokens) else ""}
    if times := step_times(run):
        texts |= dict(zip(("time of a step, median", "time of all steps"), times, strict=True))
    return [Change(name, "", "", text, "", "") for name, text in texts.items() if text]


def _difference(first: RecordedRun, run: RecordedRun, obstacle: str, pair: Paired | None) -> str:
    if pair is None:
        return "not compared, because the rows of an evaluation are missing, or no problem is in both"
    text = f"{pair.first:.1%} and {pair.second:.1%}, {run.name} - {first.name} = {paired_text(pair)}"
    return f"{text}; the evaluations differ in more than the model: {obstacle}" if obstacle else text
