"""What a person watching a run sees, on a terminal and off it."""

import io

import jax.numpy as jnp
import numpy as np
from builders import completion, group

from igrpo_jax import console


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


STEP = {"rewards/accuracy/mean": 0.625, "draft/accuracy": 0.5, "reward": 1.5, "loss": float("nan"), "perf/step_time": 2}


def test_plain_console_prints_one_unwrapped_line_a_step():
    out = io.StringIO()
    with console.Console(out) as shown:
        shown.start(total_steps=10, first_step=2, every=2)
        for step in range(3, 6):
            shown.step(step, {**STEP, "completions/mean_length": jnp.float32(100), "draft/mean_length": 90.0})
        with shown.phase("evaluation", total=8) as update:
            update(1, "no quarter")
            update(5, "half")
            update(5, "said")
        shown.step(10, STEP)
        shown.message("x" * 500)
    lines = out.getvalue().splitlines()
    assert lines[0] == (
        "step  4/10  solved 0.625  drafts solved 0.500  reward 1.500  length 100  draft length 90  loss not finite"
        "  2.0 s/step  left 0:00:12"
    )
    assert lines[1:3] == ["evaluation ...", "evaluation 5/8  half  left 0:00:00"]
    assert lines[3].startswith("step 10/10") and lines[4:] == ["x" * 500]
    assert "\x1b" not in out.getvalue()


def test_terminal_console_has_the_same_lines_and_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    with console.Console(out) as shown:
        shown.table("Run", [("prompts", 32)])
        shown.start(total_steps=10)
        with shown.phase("warm start", total=5) as update:
            update(5, "loss 0.1")
        shown.step(1, STEP)
    text = console.plain_text(out.getvalue())
    assert "step  1/10  solved 0.625  drafts solved 0.500" in text and "warm start: " in text and "prompts" in text


def test_model_text_reaches_the_terminal_as_plain_text():
    evil = (
        "\x1b]0;title\x07\x1b[2J[red]hi[/red] :smile: \x9b31m a\rb \u202ex\ttab\nline \x1bc\x1b]8;;http://x\x1b\\link"
    )
    drafts = [completion("draft", 0, [1], 1.0, 1.0, text=evil)]
    first = [completion("refine", 0, [1], 1.0, text="middle" * 1000 + "END"), completion("refine", 1, [1], 0.0)]
    out = Terminal()
    shown = console.Console(out)
    shown.sample(group(drafts, 0, first, question=evil, answer="\x1b[1m7"), np.array([0.707, -0.707]))
    text = out.getvalue()
    assert not set(text) & set("\x1b\x07\x9b\r\u202e")
    assert "[red]hi[/red] :smile: 31m ab x" in text and "line link" in text
    assert "kept of 1 drafts, reward 2 (accuracy 1, format 1)" in text
    assert "refinement 1 of 2, reward 1 (accuracy 1, format 0), advantage +0.71" in text
    assert "characters ...]" in text and "END" in text and text.count("\n") < 60
    assert "right answer\n7\n" in text


def test_a_terminal_that_cannot_show_a_character_is_no_crash():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    console.Console(out).message("∑ \ud800 done")
    out.flush()
    assert raw.getvalue().decode("ascii").strip() == "?  done"


def test_other_processes_say_nothing(monkeypatch):
    monkeypatch.setattr(console.jax, "process_index", lambda: 1)
    out = io.StringIO()
    console.Console(out).message("hello")
    assert out.getvalue() == ""
