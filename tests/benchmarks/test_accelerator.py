"""The accelerator command: its plan, what a kill leaves, parts that fail or hang, its page, and all of it at --tiny.

What these tests catch: a part that is measured again or never, figures that a kill takes with it, a part that outlives
its limit or its parent, a failed check that ends with exit code 0, a trace whose loops are counted twice, and a part
that no longer runs.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import devices
import jax
import numpy as np
import pytest
from processes import Started

from benchmarks.accelerator import __main__ as command
from benchmarks.accelerator import plan, reference, sizes, table, tracing
from benchmarks.accelerator.correctness import CLOSE, errors
from benchmarks.accelerator.results import Results
from benchmarks.accelerator.stepping import SolutionRenderer
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.rewards.mathematics import grader

ROOT = Path(__file__).parents[2]
DEVICE = {
    "platform": "gpu", "device_kind": "Card", "devices": 1, "memory_bytes": 80e9, "bf16_tflops": 700.0,
    "fp32_tflops": 300.0, "bandwidth_gb": 3000.0, "versions": {"jax": "0.11"},
}  # fmt: skip


def names(parts):
    return [part.name for part in parts]


# The plan.


def test_the_most_important_parts_come_first_and_peers_only_when_asked_for():
    assert names(plan.chosen([], False, [])) == [name for name in plan.NAMES if name != "peers"]
    assert plan.NAMES[:3] == ("device", "correctness", "decode")
    assert names(plan.chosen([], True, []))[6] == "peers"


def test_the_device_is_measured_once_for_any_part():
    assert names(plan.chosen(["update"], False, [])) == ["device", "update"]
    assert names(plan.chosen(["step", "update"], False, ["device"])) == ["update", "step"]
    assert names(plan.chosen(["update", "peers"], False, ["device", "update"])) == ["peers"]
    with pytest.raises(InputError, match="--only upadte: no such part; parts are device, correctness"):
        plan.chosen(["upadte"], False, [])


def test_a_part_gets_more_than_it_is_expected_to_take_but_not_more_than_is_left():
    decode = next(part for part in plan.PARTS if part.name == "decode")
    assert plan.limit(decode, "full", 1000) == 2.5 * decode.seconds["full"]
    assert plan.limit(decode, "full", decode.seconds["full"] + 1) == decode.seconds["full"] + 1
    assert plan.limit(decode, "full", decode.seconds["full"] - 1) is None
    assert plan.limit(decode, "tiny", 1000) == plan.LEAST


def test_nine_minutes_hold_the_important_parts():
    left, inside = 9 * 60, []
    for part in plan.chosen([], False, []):
        if part.seconds["full"] <= left:
            left -= part.seconds["full"]
            inside.append(part.name)
    assert inside == ["device", "correctness", "decode", "update", "profile"]


# Results.


def test_a_torn_line_costs_itself_alone(tmp_path):
    results = Results(tmp_path)
    results.add({"part": "decode", "case": "a", "figures": {"x": 1}})
    with open(results.path, "ab") as file:
        file.write(b'{"part": "decode", "case": "b", "figu')
    assert list(results.cases("decode")) == ["a"]
    results.add({"part": "decode", "case": "c", "figures": {"x": np.float32(0.5)}})
    assert results.cases("decode") == {"a": {"x": 1}, "c": {"x": 0.5}}


def test_a_folder_holds_results_of_one_kind(tmp_path):
    Results(tmp_path).open({"tiny": True})
    Results(tmp_path).open({"tiny": True})
    with pytest.raises(InputError, match="holds results of tiny True, and this is tiny False; give another folder"):
        Results(tmp_path).open({"tiny": False})


# Parts in processes of their own.


@pytest.mark.parametrize(
    "code, end, why",
    [
        ("print('x')", "done", ""),
        ("import sys; print('y'); sys.exit('no \\n memory')", "failed", "exit code 1: y / no / memory"),
        ("import os; os.kill(os.getpid(), 9)", "failed", "exit code -9: "),
    ],
)
def test_how_a_part_ended(tmp_path, code, end, why):
    assert command.run_limited([sys.executable, "-c", code], tmp_path / "log", 30) == (end, why)


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path):
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    end, why = command.run_limited([sys.executable, "-c", code], tmp_path / "log", 1.5)
    assert end == "late" and why.startswith("stopped after 2 s")
    wait_until(lambda: not alive(int((tmp_path / "log").read_text())))


def test_a_part_ends_with_its_parent():
    code = "import time; from benchmarks.accelerator import part; part.end_with_parent(); print(1, flush=True); "
    code += "time.sleep(60)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True, **pipes) as process:
        assert process.stdout.readline() == b"1\n" and process.poll() is None
        process.stdin.close()  # as the kernel does for a parent that is killed
        assert process.wait(30) == -signal.SIGKILL


def alive(pid):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds, seconds=30):
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)


def run_faked(monkeypatch, tmp_path, ends, *flags):
    """Runs the command with parts that write one case each and end as `ends` says; returns exit code and parts run."""
    ran = []

    def run_limited(arguments, log, seconds, flags):
        name, folder = arguments[3], Path(arguments[4])
        ran.append(name)
        figures = DEVICE if name == "device" else {"passed": ends.get(name) != "wrong", "tolerances": {}}
        Results(folder).add({"part": name, "case": "device" if name == "device" else "case", "figures": figures})
        end = ends.get(name, "done")
        return ("done", "") if end == "wrong" else (end, "because" * (end != "done"))

    monkeypatch.setattr(command, "run_limited", run_limited)
    with pytest.raises(SystemExit) as exit_code:
        command.main(["x", "--out", str(tmp_path / "out"), *flags])
    return exit_code.value.code, ran


def test_a_failing_part_is_named_and_passed_over_and_tried_again(monkeypatch, tmp_path, capsys):
    code, ran = run_faked(monkeypatch, tmp_path, {"decode": "failed"})
    assert code == 1 and ran[2:4] == ["decode", "update"]
    assert "failed, 1 new results\n    because" in capsys.readouterr().out
    assert "| decode | failed |" in (tmp_path / "out" / "results.md").read_text()
    assert run_faked(monkeypatch, tmp_path, {}) == (0, ["decode"])
    assert run_faked(monkeypatch, tmp_path, {}, "--only", "update") == (0, [])


def test_a_failed_check_is_an_exit_code_of_1(monkeypatch, tmp_path, capsys):
    code, _ = run_faked(monkeypatch, tmp_path, {"correctness": "wrong"}, "--only", "correctness")
    assert code == 1 and "FAILED check of correctness: case" in capsys.readouterr().out
    assert "1 of 1 checks FAILED" in (tmp_path / "out" / "results.md").read_text()


def test_float32_has_library_matmuls_on_a_gpu_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
    flags = next(part for part in plan.PARTS if part.name == "float32").gpu_flags
    assert command.environment(flags)["XLA_FLAGS"] == "--xla_mine=1 --xla_gpu_enable_triton_gemm=false"
    assert command.environment()["XLA_FLAGS"] == "--xla_mine=1"
    assert [part.name for part in plan.PARTS if part.gpu_flags] == ["float32"]


def test_what_does_not_fit_into_the_time_is_named(monkeypatch, tmp_path, capsys):
    code, ran = run_faked(monkeypatch, tmp_path, {}, "--minutes", "1")
    assert code == 0 and ran == ["device", "profile"]
    assert "no time was left for correctness, decode, update, float32, step, decode7b" in capsys.readouterr().out


def test_a_cpu_measures_the_real_sizes_only_when_told_so(monkeypatch, tmp_path):
    monkeypatch.setitem(DEVICE, "platform", "cpu")
    with pytest.raises(InputError, match="on a CPU the real shapes take hours"):
        run_faked(monkeypatch, tmp_path, {})
    other = ("--shape", "smollm2-135m", "--out", str(tmp_path / "other"), "--minutes", "60")
    assert run_faked(monkeypatch, tmp_path, {}, *other)[0] == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--shape", "gpt"], "--shape gpt: no such shape; shapes are qwen2-tiny"),
        (["--shape", "qwen2-7b", "--tiny"], "--shape qwen2-7b: goes without --tiny"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        command.parse(["--out", str(tmp_path), *flags])


def test_nothing_is_measured_without_a_device(monkeypatch, tmp_path):
    with pytest.raises(RunError, match="device: could not be measured"):
        run_faked(monkeypatch, tmp_path, {"device": "failed"})


# Sizes.


def test_sizes_come_down_where_the_memory_is_too_small(monkeypatch):
    monkeypatch.setattr(sizes.gc, "collect", lambda: 0)  # takes seconds in a process that has run many tests
    assert sizes.trainable("qwen2-1.5b", 80e9, 1) == ("qwen2-1.5b", "")
    assert sizes.trainable("qwen2-1.5b", 24e9, 1) == (
        "qwen2-0.5b",
        "qwen2-1.5b does not fit 24 GB on each of 1 devices",
    )
    assert sizes.trainable("qwen2-1.5b", 24e9, 8)[0] == "qwen2-1.5b"
    tried = []

    def run(size):
        tried.append(size)
        if size > 64:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return size

    assert sizes.halved(256, 8, run) == 64 and tried == [256, 128, 64]
    assert sizes.smaller(256, 64, "rows") == {"reduced": "256 -> 64 rows: the memory does not suffice"}
    with pytest.raises(RuntimeError):
        sizes.halved(256, 128, run)
    with pytest.raises(ZeroDivisionError):
        sizes.halved(256, 8, lambda size: 1 / 0)


# The page.


def test_the_page_compares_the_same_work_alone(tmp_path):
    results = Results(tmp_path)
    results.add({"part": "device", "case": "device", "figures": DEVICE})
    ours = {"shape": "a", "tokens_per_second": 3000, "roofline_fraction": 0.41, "decode_step_seconds": 0.0123}
    for case, peer in (("64 rows, fixed", {}), ("256 rows, fixed", {"reduced": "256 -> 128 | rows"})):
        results.add({"part": "decode", "case": case, "figures": ours})
        results.add({"part": "peers", "case": case, "figures": {"shape": "a", "tokens_per_second": 1200} | peer})
    page = table.page(results)
    assert "- 1 x Card (gpu)" in page and "- 80.0 GB each" in page
    assert "| 64 rows, fixed | a | 3,000 | 12.3 | 41.0% | - | - | - |  |" in page
    assert "| 64 rows, fixed | - | a | 1,200 | - | 2.5 | - |  |" in page
    assert "| 256 rows, fixed | - | a | 1,200 | - | - | - | 256 -> 128 \\| rows |" in page


# The trace.

TRACE = """
planes { id: 1 name: "/host:CPU" lines { id: 1 name: "python" timestamp_ns: 0
  events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } } event_metadata { key: 1 value { id: 1 name: "host" } } }
planes { id: 2 name: "/device:GPU:0"
  lines { id: 1 name: "Stream #1" timestamp_ns: 0
    events { metadata_id: 1 offset_ps: 1000000 duration_ps: 6000000 }
    events { metadata_id: 2 offset_ps: 2000000 duration_ps: 1000000 }
    events { metadata_id: 2 offset_ps: 4000000 duration_ps: 2000000 }
    events { metadata_id: 3 offset_ps: 9000000 duration_ps: 1000000 } }
  lines { id: 2 name: "Stream #2" timestamp_ns: 0 events { metadata_id: 3 offset_ps: 6500000 duration_ps: 1500000 } }
  lines { id: 3 name: "XLA Modules" timestamp_ns: 0 events { metadata_id: 1 offset_ps: 0 duration_ps: 10000000 } }
  event_metadata { key: 1 value { id: 1 name: "while" } }
  event_metadata { key: 2 value { id: 2 name: "dot" } }
  event_metadata { key: 3 value { id: 3 name: "copy" } } }
"""
GRAPH = """
planes { name: "/device:GPU:0"
  lines { id: 1 name: "Stream #1" timestamp_ns: 0
    events { metadata_id: 1 offset_ps: 0 duration_ps: 3000000 stats { metadata_id: 1 str_value: "command_buffer_7" } }
    events { metadata_id: 2 offset_ps: 3000000 duration_ps: 1000000 stats { metadata_id: 1 str_value: "dot.4" } } }
  event_metadata { key: 1 value { id: 1 name: "gemm_fusion_dot_1" } }
  event_metadata { key: 2 value { id: 2 name: "nvjet" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } }
"""


def test_a_trace_is_reduced_to_own_times_and_gaps():
    data = jax.profiler.ProfileData
    summary = tracing.summary(data.from_serialized_xspace(data.text_proto_to_serialized_xspace(TRACE)))
    # Streams run from 1 to 8 and from 9 to 10 microseconds. The loop has 6, of which its body takes 3.
    assert (summary["span_ms"], summary["busy_ms"], summary["gaps_ms"]) == (0.009, 0.008, 0.001)
    assert summary["longest_gaps_ms"] == [0.001] and summary["operations"] == 5
    assert {row["name"]: (row["ms"], row["runs"]) for row in summary["top"]} == {
        "while": (0.003, 1),
        "dot": (0.003, 2),
        "copy": (0.0025, 2),
    }


def test_kernels_of_a_graph_have_their_own_names_in_a_trace():
    data = jax.profiler.ProfileData
    summary = tracing.summary(data.from_serialized_xspace(data.text_proto_to_serialized_xspace(GRAPH)))
    assert [row["name"] for row in summary["top"]] == ["gemm_fusion_dot_1", "dot.4"]


# Correctness.


def test_errors_are_relative_to_what_they_are_errors_of():
    expected = {"logits": np.array([0.0, 4.0]), "logprob": np.ones((2, 2)), "entropy": np.ones(3)}
    expected |= {"slices": np.ones((2, 4)), "norms": np.array([1.0, 2.0])}
    assert errors(expected, expected) == dict.fromkeys(CLOSE, 0.0)
    changed = {"logits": [0.0, 4.0 + 8**0.5], "logprob": [[1.0, 1.4]] * 2, "slices": np.full((2, 4), 1.5)}
    changed["norms"] = [0.8, 2.0]
    wrong = errors(expected | {name: np.array(value) for name, value in changed.items()}, expected)
    assert wrong == pytest.approx(
        {"logits": 1.0, "logprob": 0.2, "largest": 0.4, "entropy": 0.0, "gradient": 0.5, "norms": 0.1}
    )
    assert not errors(expected | {"entropy": np.array([np.nan])}, expected)["entropy"] <= 1


def test_the_reference_is_small_and_of_these_weights():
    from igrpo_jax.models.config import from_hf

    assert reference.PATH.stat().st_size < 200_000
    cfg = from_hf(sizes.models.SHAPES["qwen2-tiny"], "qwen2-tiny")
    expected = reference.read("qwen2-tiny")
    weights, data = reference.params(cfg), reference.batch(cfg.vocab_size)
    assert reference.checksum(weights, data) == expected["checksum"]
    weights["norm/scale"][0] += 1e-3
    assert reference.checksum(weights, data) != expected["checksum"]
    assert set(reference.read("smollm2-135m")) == set(expected)


def test_texts_for_the_verifier_look_like_solutions():
    renderer = SolutionRenderer(sizes.stepped(sizes.TINY, "qwen2-tiny"), [])
    texts = [renderer.text(np.arange(i, i + 240, dtype=np.int32)) for i in range(40)]
    right = [grader.grade(text, renderer.answer)[0] == 1.0 for text in texts]
    assert 10 < sum(right) < 30
    assert texts[0] == renderer.text(np.arange(240, dtype=np.int32)) and len(set(texts)) == 40
    assert all(text.count("\n") == 12 and len(text) > 500 for text in texts)


# All of it.

FIGURES = {
    "device": {"bf16_tflops", "bandwidth_gb", "versions", "platform", "device_kind", "memory_bytes"},
    "correctness": {"passed", "tolerances"},
    "float32": {"passed", "tolerances"},
    "decode": {"tokens_per_second", "decode_step_seconds", "roofline_fraction", "peak_memory_bytes"},
    "decode7b": {"tokens_per_second", "roofline_fraction"},
    "update": {"mfu", "update_seconds", "predicted_memory_bytes", "attention", "padding_fraction"},
    "step": {"step_seconds", "rollout_seconds", "update_seconds", "verify_wait_seconds", "solved"},
    "profile": {"top", "span_ms", "gap_fraction", "longest_gaps_ms"},
}
CASES = {
    "device": ["device"],
    "correctness": ["bfloat16 against the CPU", "chunked attention, bfloat16", "greedy sampling, bfloat16"],
    "float32": [
        *("float32, full precision against the CPU", "chunked attention, float32, full precision"),
        *("greedy sampling, float32", "one step twice"),
    ],
    "decode": ["8 rows, fixed", "8 rows, lognormal"],
    "decode7b": ["8 rows, fixed", "8 rows, lognormal"],
    "update": ["rows of 32", "lognormal up to 32"],
    "step": ["iGRPO (4 + 4)", "GRPO (8)"],
    "profile": ["decode dispatch", "update"],
}


PART = """
import sys
from benchmarks.accelerator import part
sys.stdin = None  # its end would be that of the parent
part.main(*sys.argv[1:])
"""


def run_forked(arguments, log, seconds, flags):
    """Runs a part as `run_limited` does, but in a fork, which has imported the package already, and without a limit."""
    assert arguments[:3] == [sys.executable, "-m", "benchmarks.accelerator.part"]
    env = devices.environment(1)
    done = Started(PART, arguments[2:], env | {"XLA_FLAGS": f"{env['XLA_FLAGS']} {flags}"}).ended()
    return ("failed", done.stdout + done.stderr) if done.returncode else ("done", "")


@pytest.mark.proof
@pytest.mark.slow(seconds=50)
def test_everything_at_tiny_after_a_kill(tmp_path, monkeypatch, capsys):
    """The command that is killed starts its parts as users do; those that follow are forks, which is sooner."""
    results = Results(tmp_path)
    flags = ["--out", str(tmp_path), "--tiny"]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.accelerator", *flags, "--only", "decode"],
        cwd=ROOT, env=devices.environment(1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_until(lambda: results.cases("decode") or process.poll() is not None, 200)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(children) == 1
    wait_until(lambda: not alive(children[0]))
    before = results.rows()
    assert results.device() and "decode" not in results.ends()

    monkeypatch.setattr(command, "run_limited", run_forked)
    with pytest.raises(SystemExit) as stop:
        command.main(["x", *flags, "--minutes", "60"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0, printed + (tmp_path / "results.md").read_text()
    rows = results.rows()
    assert rows[: len(before)] == before
    assert "already in" in printed and "device" in printed.splitlines()[0]
    for part, wanted in CASES.items():
        written = [row["case"] for row in rows if row.get("part") == part and "case" in row]
        assert written == wanted  # each once
        for case, figures in results.cases(part).items():
            assert FIGURES[part] <= figures.keys(), (part, case)
            assert "skipped" not in figures and "reduced" not in figures
    numbers = [
        value for case in results.cases("decode").values() for value in case.values() if isinstance(value, float)
    ]
    assert numbers and all(value > 0 for value in numbers)
    assert "all 7 checks passed" in (tmp_path / "results.md").read_text()
    assert results.cases("profile")["update"]["top"][0]["ms"] > 0
    assert json.loads(results.path.read_text().splitlines()[0]) == {"settings": {"tiny": True, "shape": "default"}}
