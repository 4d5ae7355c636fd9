"""The summary of a run in a report: whether it is learning, what changed, and what should worry.

The conclusion rests only on single-shot evaluations of held-out problems, which are compared problem by problem. The
solve rate of training is shown first but proves less: refinements see a draft, and each step has other prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import comparison
from igrpo_jax.outputs.alerts import alerts, is_watched
from igrpo_jax.outputs.evaluation_settings import changed, evaluation_folder, read_settings
from igrpo_jax.report.runs import LOSS, Curve, RecordedRun, counted

CHANCE = 0.05  # p-value of the sign test below which a change counts as real
ENDS = 0.1  # fraction of a run's steps at either end whose means are compared


@dataclass(frozen=True)
class Conclusion:
    """The answer to "is it learning?", with its reasons."""

    answer: str  # one word or two
    tone: str  # "good", "bad" or "open"
    reasons: list[str]


@dataclass(frozen=True)
class Change:
    """A number at the beginning and at the end of a run, as text."""

    name: str
    role: str  # the role whose colour it has: "single", "draft", "best", "trained", or "" for none
    first: str
    last: str
    difference: str
    tone: str  # "good", "bad", or "" if neither direction is better


@dataclass(frozen=True)
class Summary:
    """All that a report states about a run in words."""

    facts: list[str]
    conclusion: Conclusion
    changes: list[Change]
    over: str  # says over which steps the first and the last numbers are averaged
    alerts: list[str]


def summary(run: RecordedRun, trained: str) -> Summary:
    """Returns the summary of a run; `trained` is the name of its trained completions."""
    width = ends(run.steps)
    over = f"means of the first and of the last {counted(width, 'step')}; single shot: first and last evaluation"
    spans = _spans(run)
    return Summary(_facts(run), _conclusion(run, spans), _changes(run, trained, spans), over, worries(run))


def ends(steps: Sequence[int]) -> int:
    """Returns over how many steps the means at the beginning and at the end of a run are taken."""
    return max(1, math.ceil(ENDS * len(steps)))


@dataclass(frozen=True)
class Span:
    """The first and the last single-shot evaluation of a benchmark."""

    first: int  # step
    last: int
    pair: comparison.Paired | None  # None where the rows of an evaluation are missing or torn, or no problem is in both
    obstacle: str  # why the two are not comparable, "" where they are


def _spans(run: RecordedRun) -> dict[str, Span]:
    """Returns the first and the last evaluation of each benchmark, compared problem by problem where they can be."""
    curves = {name: run.curve(f"eval/{name}/pass@1").steps.tolist() for name in run.benchmarks}
    ends = {name: (steps[0], steps[-1]) for name, steps in curves.items()}
    compared: dict[tuple[int, int], tuple[str, dict[str, comparison.Paired | None]]] = {}
    for first, last in set(ends.values()):
        before, after = (evaluation_folder(run.folder, step) for step in (first, last))
        words = "{name} was {first} and then {second}"
        compared[first, last] = compared_folders(before, after, words) if first != last else ("", {})
    spans = {}
    for name, (first, last) in ends.items():
        obstacle, pairs = compared[first, last]
        if not obstacle and name in pairs and pairs[name] is None:
            obstacle = "no problem is in both"
        spans[name] = Span(first, last, pairs.get(name), obstacle)
    return spans


def compared_folders(first: Path, second: Path, words: str) -> tuple[str, dict[str, comparison.Paired | None]]:
    """Returns the settings by which two evaluations differ, as text, and their paired comparison by benchmark.

    Args:
        words: what the text says of a setting, with places for `name`, `first` and `second`.
    """
    other = changed(read_settings(first), read_settings(second))
    obstacle = "; ".join(words.format(name=name, first=values[0], second=values[1]) for name, values in other.items())
    try:
        return obstacle, comparison.paired(first, second)
    except (InputError, KeyError, TypeError, OSError):
        return obstacle, {}


def paired_text(pair: comparison.Paired) -> str:
    """Returns a change with its interval, on how many problems it rests, and the p-value of an exact sign test."""
    interval = f"95 % interval {100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
    counts = f"{counted(pair.problems, 'problem')} in pairs, {pair.better:,} better and {pair.worse:,} worse"
    if pair.left_out:
        counts += f"; {pair.left_out:,} in one evaluation only are left out"
    return f"{100 * pair.change:+.1f} points, {interval}, p = {pair.p_value:.2g} by an exact sign test, {counts}"


def _conclusion(run: RecordedRun, spans: dict[str, Span]) -> Conclusion:
    """Says whether the first and the last single-shot evaluation of each benchmark show learning."""
    tones, reasons = [], []
    for name, span in spans.items():
        if span.first == span.last:
            reasons.append(f"There is one evaluation of {name} only, at step {span.first}; a second one will tell")
            continue
        tone, reason = _compared(run, name, span)
        tones.append(tone)
        reasons.append(reason)
    if not spans:
        why = "its evaluation.every is 0" if run.setting("evaluation.every") == 0 else "no evaluation is finished yet"
        if run.is_sft:
            why = "SFT has no evaluations; python -m igrpo_jax.evaluate measures what it has trained"
        reasons.append(f"Single-shot answers to held-out problems were not measured ({why})")
    if not tones:
        return Conclusion("Not known", "open", reasons)
    if {"good", "bad"} <= set(tones):
        return Conclusion("Mixed", "open", reasons)
    tone = max(tones, key=("open", "good", "bad").index)
    return Conclusion({"good": "Learning", "bad": "Getting worse", "open": "Not shown"}[tone], tone, reasons)


def _compared(run: RecordedRun, name: str, span: Span) -> tuple[str, str]:
    """Returns the tone of a benchmark's change between two evaluations, and a sentence about it.

    Problems are compared in pairs where the rows of both evaluations can be read, else by the intervals of the means.
    """
    first, last, pair = span.first, span.last, span.pair

    def at(step: int, measure: str) -> float:
        return run.metrics.get(f"eval/{name}/{measure}", {}).get(step, math.nan)

    before, after = (at(first, "pass@1"), at(last, "pass@1")) if pair is None else (pair.first, pair.second)
    change = f"Single-shot pass@1 on {name} went from {before:.1%} (step {first}) to {after:.1%} (step {last})"
    if span.obstacle:
        return "open", f"{change}, but these two evaluations are not comparable: {span.obstacle}"
    if pair is not None:
        change += f": {paired_text(pair)}"
        sure = pair.p_value < CHANCE  # the bootstrap alone is too sure where few problems changed
        risen, fallen = sure and pair.low > 0, sure and pair.high < 0
        doubt = "the sign test leaves that open"
        if pair.low <= 0 <= pair.high:
            doubt = "the interval includes no change"
    else:
        risen = at(last, "pass@1_low") > at(first, "pass@1_high")
        fallen = at(last, "pass@1_high") < at(first, "pass@1_low")
        doubt = "their 95 % intervals overlap, or are missing"
    if risen or fallen:
        return ("good" if risen else "bad"), change
    return "open", f"{change}; {doubt}"


def worries(run: RecordedRun) -> list[str]:
    """Returns the alerts of the last step, the same as those of the console, and the metrics that were not finite."""
    rows: dict[int, dict[str, float | None]] = {step: {} for step in run.steps}
    for name in filter(is_watched, {**run.metrics, **run.nulls}):
        values = dict.fromkeys(run.nulls.get(name, ())) | run.metrics.get(name, {})
        for step in values.keys() & rows.keys():  # a row has only the metrics that its step has
            rows[step][name] = values[step]
    *before, last = rows.values() or [{}]
    messages = alerts(last, before)
    for name in ("loss", "grad_norm", "reward", "entropy"):
        if steps := run.nulls.get(name):
            messages.append(f"{name}: not finite at {counted(len(steps), 'step')}, first at step {steps[0]}")
    return messages


def _ends(curve: Curve, steps: Sequence[int], width: int) -> tuple[float, float]:
    """Returns the means over the first and over the last `width` of the run's steps; NaN where these have no value."""
    mean = lambda part: float(part.mean()) if len(part) else math.nan
    early, late = (curve.values[np.isin(curve.steps, some)] for some in (steps[:width], steps[-width:]))
    return mean(early), mean(late)


def _changes(run: RecordedRun, trained: str, spans: dict[str, Span]) -> list[Change]:
    """Returns the changes of the run's most important numbers."""
    width = ends(run.steps)
    shots = {f"single shot, {name}": name for name in run.benchmarks}
    rows = [(title, "single", run.curve(f"eval/{name}/pass@1"), "%") for title, name in shots.items()]
    rows += [
        (f"solve rate, {trained}", "trained", run.curve("rewards/accuracy/mean"), "%"),
        ("solve rate, best draft", "best", run.curve("draft/solved_some", "draft/solved_all"), "%"),
        ("solve rate, drafts", "draft", run.curve("draft/accuracy"), "%"),
        (f"reward, {trained}", "trained", run.curve("reward"), ".2f"),
        (f"length, {trained}", "", run.curve("completions/mean_length"), ",.1f"),
        ("loss, nats/token", "", run.curve(LOSS), ".3f"),
        ("entropy, nats/token", "", run.curve("entropy"), ".3f"),
    ]
    changes = []
    for name, role, curve, form in rows:
        if not curve:
            continue
        is_shot = name in shots  # its ends are single evaluations
        first, last = _ends(curve, curve.steps.tolist(), 1) if is_shot else _ends(curve, run.steps, width)
        if math.isnan(first + last):
            continue
        if is_shot and (pair := spans[shots[name]].pair) is not None:
            first, last = pair.first, pair.second
        tone = "" if not role or first == last else "good" if last > first else "bad"
        if is_shot and spans[shots[name]].obstacle:
            tone = ""
        if form == "%":
            texts = f"{first:.1%}", f"{last:.1%}", f"{100 * (last - first):+.1f}"
        else:
            texts = format(first, form), format(last, form), format(last - first, f"+{form}")
        changes.append(Change(name, role, *texts, tone))
    return changes


def _facts(run: RecordedRun) -> list[str]:
    """Returns short texts about the model, the algorithm, the steps and the time of a run."""
    planned, done = run.setting("steps"), run.steps[-1] if run.steps else 0
    facts = [f"step {done:,} of {planned:,}" if planned else f"step {done:,}"]
    if run.config:
        model = run.setting("model.path") or "built-in model"
        facts.insert(0, f"{model}, {run.setting('model.dtype')}")
        drafts, refined = run.setting("algorithm.num_drafts"), run.setting("algorithm.num_generations")
        counts = f"{drafts} drafts, {refined} refinements" if drafts else f"{refined} completions, no drafts"
        if run.setting("algorithm.second_stage") == "verify":
            counts = f"{drafts} solutions, {refined} verifications"
        kind = "supervised fine-tuning" if run.is_sft else f"{run.setting('algorithm.loss_type')}, {counts}"
        unit = "examples" if run.is_sft else "prompts"
        facts += [kind, f"{run.setting('prompts_per_step')} {unit} a step"]
    if times := step_times(run):
        facts.append(f"{times[0]} a step, {times[1]} of steps in all")
    if ends := run.curve("perf/wall_time"):
        facts.append(f"last row {datetime.fromtimestamp(ends.values[-1]):%Y-%m-%d %H:%M}")
    return facts


def step_times(run: RecordedRun) -> tuple[str, str] | None:
    """Returns the median time of a step and the time of all steps, as text; None if no step has a time."""
    seconds = run.curve("perf/step_time").values
    return (f"{np.median(seconds):.3g} s", _duration(seconds.sum())) if len(seconds) else None


def _duration(seconds: float) -> str:
    """Returns a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
