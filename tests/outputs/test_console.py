"""What a person watching a run sees, on a terminal and off it."""

import io
import time

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from builders import completion, group

from igrpo_jax.outputs import console, lines


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


STEP = {"rewards/accuracy/mean": 0.625, "draft/accuracy": 0.5, "reward": float("nan"), "perf/step_time": 2}


class Clock:
    """Seconds that a test lets pass."""

    now = 100.0

    def __call__(self):
        return self.now


def on_terminal(monkeypatch, width=200):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.delenv("NO_COLOR", raising=False)
    clock = Clock()
    return console.Console(Terminal(), clock), clock


def drawn(shown):
    """Lines of the live display as it stands."""
    out = io.StringIO()
    rich.console.Console(file=out, width=shown._out.width).print(shown._display())
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_pipe_that_is_closed_is_an_error_of_its_own():
    """rich would end the process, without a word."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with console.Console(Closed()) as shown:
        with pytest.raises(BrokenPipeError):
            shown.message("one")
        shown.message("two")


def test_plain_console_prints_one_unwrapped_line_a_step():
    out, clock = io.StringIO(), Clock()
    with console.Console(out, clock) as shown:
        shown.start(total_steps=10, resumed_after=2, every=2)
        for step, length in ((3, 100), (4, jnp.float32(100))):
            clock.now += 3
            shown.step(step, {**STEP, "completions/mean_length": length, "draft/mean_length": 90.0})
        with shown.phase("evaluation", total=8) as update:
            update(2, "too soon")
            clock.now += 10
            update(3, "no quarter")
            update(5, "half")
            update(5, "said")
        shown.step(10, STEP)
        shown.message("x" * 500)
    lines = out.getvalue().splitlines()
    # Two seconds in the step, three from one step to the next.
    assert lines[0] == (
        "step  4/10  solved 0.625  drafts solved 0.500  reward not finite  length 100  draft length 90"
        "  2.0 s/step  left 0:00:18"
    )
    assert lines[1:3] == ["evaluation ...", "evaluation 5/8  half  left 0:00:10"]  # 3 in 10 s
    assert lines[3].startswith("step 10/10") and lines[4:] == ["x" * 500]
    assert "\x1b" not in out.getvalue()


def test_a_phase_with_a_unit_says_how_much_it_is(monkeypatch):
    out, clock = io.StringIO(), Clock()
    with console.Console(out, clock) as shown:
        with shown.phase("reading weights", total=2000, unit="MiB") as update:
            clock.now += 10
            update(1000)
        with shown.phase("reading weights", total=0, unit="MiB"):  # less than one
            pass
    assert out.getvalue().splitlines() == [
        "reading weights, 2,000 MiB ...",
        "reading weights 1000/2000 MiB    left 0:00:10",
        "reading weights ...",
    ]
    shown, _ = on_terminal(monkeypatch)
    with shown, shown.phase("reading weights", total=2000, unit="MiB") as update:
        update(1000)
        assert any("1,000/2,000 MiB" in line for line in drawn(shown))
    assert "reading weights, 2,000 MiB: " in lines.plain_text(shown._out.file.getvalue())


def test_the_time_left_of_a_phase_counts_no_compiling():
    out, clock = io.StringIO(), Clock()
    with console.Console(out, clock) as shown, shown.phase("warm start", total=100) as update:
        for step in range(1, 51):
            clock.now += 60 if step == 1 else 2
            update(step)
    assert [line.rpartition("left ")[2] for line in out.getvalue().splitlines()[1:]] == ["0:02:30", "0:01:40"]


def test_a_stream_that_only_wants_colours_is_no_terminal(monkeypatch):
    """Jupyter and CI services set FORCE_COLOR: a display would be drawn again and again into their logs."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with console.Console(out) as shown:
        shown.start(total_steps=2)
        with shown.phase("evaluation", total=2) as update:
            update(2)
        shown.step(1, STEP)
        shown.table("Done", [("steps", 1)])
    assert "\x1b" not in out.getvalue() and len(out.getvalue().splitlines()) == 4


def test_the_time_left_holds_what_is_between_steps_and_no_compiling():
    """The first step takes 60 s, as compiling does; then 2 s each and an evaluation of 8 s after every second one."""
    out, clock = io.StringIO(), Clock()
    with console.Console(out, clock) as shown:
        shown.start(total_steps=9)
        clock.now += 60
        shown.step(1, STEP | {"perf/step_time": 60.0})
        for step in range(2, 6):
            clock.now += 2
            shown.step(step, STEP)
            clock.now += 8 * (step % 2 == 0)
    first, *_, last = out.getvalue().splitlines()
    assert "left" not in first  # nothing is known of the steps to come
    assert last.endswith("left 0:00:24")  # 4 steps of (2 + 10 + 2 + 10) / 4 s; the steps alone would give 8 s


def test_terminal_console_has_the_same_lines_and_a_display(monkeypatch):
    shown, _ = on_terminal(monkeypatch)
    out = shown._out.file
    with shown:
        shown.table("Run", [("prompts", 32)])
        shown.start(total_steps=10)
        with shown.phase("warm start", total=5) as update:
            update(5, "loss 0.1")
            assert any("warm start  loss 0.1" in line and "5/5" in line for line in drawn(shown))
        shown.step(1, STEP)
    text = lines.plain_text(out.getvalue())
    assert "step  1/10  solved 0.625  drafts solved 0.500" in text and "warm start: " in text and "prompts" in text


def test_the_display_shows_solve_rate_phases_best_evaluation_and_alerts(monkeypatch):
    shown, clock = on_terminal(monkeypatch, width=100)
    times = {"perf/rollout_time": 1.2, "perf/update_time": 0.7, "perf/verify_wait_time": 0.0}
    with shown:
        shown.start(total_steps=240, resumed_after=20, evaluations={0: {"eval/a/pass@1": 0.5, "eval/a/maj@2": 0.9}})
        assert [line.split()[0] for line in drawn(shown)] == ["step", "eval"]  # nothing else is known yet
        shown.evaluation(20, {"eval/a/pass@1": 0.7, "eval/a/refine_1/pass@1": 0.8})
        shown.evaluation(40, {"eval/a/pass@1": 0.6})
        clock.now += 3721
        shown.step(40, STEP)
        clock.now += 2
        shown.step(41, STEP | times | {"completions/clipped_ratio": 0.9, "refine/fixed": 0.125})
        lines = drawn(shown)
    assert [line.split()[0] for line in lines] == ["solved", "step", "time", "eval", "alert"]
    assert lines[0].split(maxsplit=1)[1] == "0.625  drafts 0.500  fixed 0.125  reward not finite"
    assert "41/240" in lines[1] and "left 0:06:38, 2.0 s/step, 1:02:03 so far" in lines[1]
    assert lines[2].split(maxsplit=1)[1] == "rollout 1.2  update 0.7  waiting for the verifier 0.0"
    assert lines[3].split(maxsplit=1)[1] == "a/pass@1 0.600 at step 40, best 0.700 at step 20"
    assert "truncation: 90% of completions are cut" in lines[4] and max(map(len, lines)) <= 100


def test_the_display_of_sft_shows_its_loss(monkeypatch):
    shown, _ = on_terminal(monkeypatch, width=100)
    with shown:
        shown.start(total_steps=9)
        shown.step(1, {"sft/loss": 1.5, "sft/draft_frac": 0.25, "entropy": 0.75})
        assert drawn(shown)[0].split() == ["loss", "1.5000", "with", "a", "draft", "0.25", "entropy", "0.750"]


def test_a_narrow_terminal_cuts_lines_and_never_wraps_them(monkeypatch):
    shown, _ = on_terminal(monkeypatch, width=40)
    with shown:
        shown.start(total_steps=240, evaluations={0: {"eval/a_very_long_name_of_a_benchmark/pass@1": 0.5}})
        shown.step(1, STEP | {"completions/clipped_ratio": 0.9})
        lines = drawn(shown)
    assert len(lines) == 4 and max(map(len, lines)) <= 40


def test_alerts_are_printed_when_they_begin_and_when_they_come_back():
    """At the log cadence, every second step; the history of a resumed run counts."""
    cut = STEP | {"completions/clipped_ratio": 1.0}
    whole = STEP | {"completions/clipped_ratio": 0.0}
    out = io.StringIO()
    with console.Console(out) as shown:
        shown.start(total_steps=40, every=2, history=[{"completions/clipped_ratio": 0.0, "loss": 1.0}] * 9)
        for step in range(1, 25):
            shown.step(step, whole if 9 <= step <= 16 else cut)
    said = [line for line in out.getvalue().splitlines() if "alert" in line]
    # Three of five steps are cut at step 3; from 9 on the share falls, and it is back at 19.
    assert [line.partition(":")[0] for line in said] == ["step 4", "step 20"]
    assert said[0].startswith("step 4: alert: truncation: ")


def test_evaluations_are_printed_beside_the_best_so_far():
    out = io.StringIO()
    with console.Console(out) as shown:
        for step, score in ((0, 0.5), (20, 0.7), (40, 0.7), (60, 0.6)):
            shown.evaluation(step, {"eval/a/pass@1": score, "eval/b/pass@1": score / 2, "eval/a/mean_length": 9.0})
    lines = out.getvalue().splitlines()
    assert lines[0] == "eval/a/pass@1 0.500 at step 0"
    assert lines[2] == "eval/a/pass@1 0.700 at step 20, the best so far"
    assert lines[4:] == [
        "eval/a/pass@1 0.700 at step 40, as good as the best so far",
        "eval/b/pass@1 0.350 at step 40, as good as the best so far",
        "eval/a/pass@1 0.600 at step 60, best 0.700 at step 40",
        "eval/b/pass@1 0.300 at step 60, best 0.350 at step 40",
    ]


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


def test_names_of_a_users_files_are_plain_text_in_the_display(monkeypatch):
    shown, _ = on_terminal(monkeypatch)
    with shown:
        shown.start(total_steps=2)
        shown.evaluation(0, {"eval/[red]\x1b]0;title\x07a\x1b[2J/pass@1": 0.5})
        with shown.phase("\x1b[2J[b]evil", total=2) as update:
            update(1, "\x1b]8;;http://x\x1b\\note")
            lines = drawn(shown)
    assert not set("".join(lines)) & set("\x1b\x07")
    assert "[red]a/pass@1 0.500" in lines[1] and lines[2].startswith("[b]evil  note")


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


def test_a_program_that_is_waited_for_is_named_once_of_its_kind(monkeypatch):
    """Off a terminal, and only where it takes long; on a terminal while it lasts."""
    monkeypatch.setattr(console, "NOTICED", 0.02)
    out = io.StringIO()
    with console.Console(out) as plain:
        with plain.waiting("harvest"):
            pass
        for program in ("decode 16 x 128", "prefill 64", "decode 16 x 256"):
            with plain.waiting(program):
                time.sleep(0.3)
    assert out.getvalue().splitlines() == ["compiling decode 16 x 128 ...", "compiling prefill 64 ..."]
    shown, _ = on_terminal(monkeypatch, width=100)
    with shown:
        with shown.waiting("decode 16 x 128"):
            (line,) = drawn(shown)
        assert line.startswith("compiling decode 16 x 128") and drawn(shown) in ([], [""])
