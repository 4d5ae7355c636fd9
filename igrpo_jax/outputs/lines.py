"""The text of the lines that the console prints, from numbers and samples: pure functions."""

import math
import re
from collections.abc import Mapping, Sequence

from igrpo_jax.outputs.alerts import Row
from igrpo_jax.records import Completion, Group

# The parts of a text in order, each with its wording, metric and format. A part whose metric is missing is left out.
Parts = Sequence[tuple[str, str, str]]
_IN_BOTH: Parts = (
    ("verdicts right", "verify/accuracy", ".3f"),
    ("reward", "reward", ".3f"),
    ("loss", "sft/loss", ".4f"),
    ("with a draft", "sft/draft_frac", ".2f"),
    ("entropy", "entropy", ".3f"),
    ("length", "completions/mean_length", ".0f"),
)
STEP: Parts = (
    ("solved", "rewards/accuracy/mean", ".3f"),
    ("drafts solved", "draft/accuracy", ".3f"),
    *_IN_BOTH,
    ("draft length", "draft/mean_length", ".0f"),
)
SOLVED: Parts = (
    ("", "rewards/accuracy/mean", ".3f"),
    ("drafts", "draft/accuracy", ".3f"),
    ("fixed", "refine/fixed", ".3f"),
    ("broken", "refine/broken", ".3f"),
    ("copied", "refine/copy_ratio", ".2f"),
    *_IN_BOTH,
)
TIME: Parts = (
    ("rollout", "perf/rollout_time", ".1f"),
    ("update", "perf/update_time", ".1f"),
    ("waiting for the verifier", "perf/verify_wait_time", ".1f"),
    ("tokens/s", "perf/tokens_per_second", ",.0f"),
    ("MFU of updates", "perf/mfu", ".0%"),
    ("slots in use", "perf/slot_utilization", ".0%"),
)
MOST_SHOWN = 2000  # characters of a text that are printed


def values_text(row: Row, parts: Parts) -> str:
    """Returns those parts whose metric is in `row`, with two spaces between them."""
    texts = []
    for wording, name, form in parts:
        if name in row:
            value = "not finite" if row[name] is None else format(row[name], form)
            texts.append(f"{wording} {value}".strip())
    return "  ".join(texts)


def step_line(step: int, total: int, row: Row, left: float | None) -> str:
    """Returns the line of a step: the solve rate stands first, the seconds of the step and the time left stand last.

    Args:
        left: seconds to the end of the run; None if they are not known.
    """
    parts = [f"step {step:>{len(str(total))}}/{total}", values_text(row, STEP)]
    if row.get("perf/step_time") is not None:
        parts.append(f"{row['perf/step_time']:.1f} s/step")
    if left is not None:
        parts.append(f"left {hours(left)}")
    return "  ".join(part for part in parts if part)


def evaluation_lines(evaluations: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Returns one line for each benchmark: its newest single-shot pass@1, and the highest so far.

    Args:
        evaluations: scores (such as "eval/NAME/pass@1") by step. Of equal scores the latest counts as the highest.
    """
    names = {name for scores in evaluations.values() for name in scores if re.fullmatch(r"eval/[^/]+/pass@1", name)}
    lines = []
    for name in sorted(names):
        known = {step: scores[name] for step, scores in evaluations.items() if name in scores}
        best, newest = max(known, key=lambda step: (known[step], step)), max(known)
        earlier = [score for step, score in known.items() if step != newest]
        beside = f"best {known[best]:.3f} at step {best}"
        if best == newest:
            beside = "as good as the best so far" if known[newest] in earlier else "the best so far"
        lines.append(f"{name} {known[newest]:.3f} at step {newest}" + f", {beside}" * (len(known) > 1))
    return lines


def hours(seconds: float) -> str:
    """Returns a duration as h:mm:ss."""
    rounded = round(seconds)
    return f"{rounded // 3600}:{rounded // 60 % 60:02d}:{rounded % 60:02d}"


_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\Z)"  # OSC and other strings: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]"  # all other sequences
    # Control characters but tab and newline, characters that turn the writing direction, lone surrogates.
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
    re.DOTALL,
)


def plain_text(text: str) -> str:
    """Returns `text` without the characters that a terminal would act on.

    Escape sequences, control characters and characters that turn the writing direction are removed.
    """
    return _ESCAPES.sub("", text.replace("\r\n", "\n"))


def printable(text: str, encoding: str | None) -> str:
    """Returns `plain_text` in the characters that a stream of this encoding takes, with "?" for each other one."""
    encoding = encoding or "utf-8"
    return plain_text(text).encode(encoding, "replace").decode(encoding)


def sample_blocks(group: Group, advantage: float) -> list[tuple[str, str]]:
    """Returns (title, text) of a question, the draft in its prompt, its first completion and the right answer, if any.

    Args:
        advantage: the advantage of the first completion.
    """
    blocks = [("question", group.prompt.question)]
    if group.kept is not None:
        draft = group.drafts[group.kept]
        blocks.append((f"kept of {len(group.drafts)} drafts, {_score_text(draft)}", draft.text))
    first, count = group.completions[0], len(group.completions)
    stage = {"refine": "refinement", "verify": "verification"}[first.stage] if group.kept is not None else "completion"
    blocks.append((f"{stage} 1 of {count}, {_score_text(first)}, advantage {advantage:+.2f}", first.text))
    if answer := group.reference_answer(first):
        blocks.append(("right answer", answer))
    return [(title, _shorten(text)) for title, text in blocks]


def _shorten(text: str) -> str:
    """Returns a text, or only its head and tail if it has more than MOST_SHOWN characters; the answer is at the end."""
    if len(text) <= MOST_SHOWN:
        return text
    head = MOST_SHOWN // 4
    return f"{text[:head]}\n[... {len(text) - MOST_SHOWN} characters ...]\n{text[-(MOST_SHOWN - head) :]}"


def _score_text(completion: Completion) -> str:
    score = completion.score
    if score is None:
        return "not graded"
    if math.isnan(score.reward):
        return "no verdict"
    parts = [f"{name} {'none' if math.isnan(value) else f'{value:g}'}" for name, value in sorted(score.rewards.items())]
    return f"reward {score.reward:g} ({', '.join(parts)})" if parts else f"reward {score.reward:g}"
