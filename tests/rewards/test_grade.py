"""`python -m igrpo_jax.rewards.grade IN.jsonl OUT.jsonl`: rows in, rows with verdicts out; wrong input, one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igrpo_jax.rewards import grade, verifier
from igrpo_jax.rewards.mathematics import grader
from igrpo_jax.rewards.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"gold": "4", "prediction": "<think>2+2</think><answer>4</answer>", "id": "a", "extra": [1, {"b": "π"}]},
    {"gold": r"\frac{1}{2}", "prediction": r"So it is \boxed{0.5}."},
    {"gold": "8", "prediction": "The answer is 9."},
    {"gold": "8", "prediction": "I count 8 of them"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "igrpo_jax.rewards.grade", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_command(tmp_path):
    source, target = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    source.write_text(source.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")  # blank lines are no rows
    target.write_text("what was there before")
    done = command(source, target, "--workers", 2)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    rows = read(target)
    assert [row["score"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    assert [row["extracted"] for row in rows] == ["4", "0.5", "9", None]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "unparseable"]
    assert all(0 <= row.pop("seconds") < 5 for row in rows)
    assert [{k: v for k, v in row.items() if k not in ("score", "extracted", "status")} for row in rows] == ROWS
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def call_or_hang(function, candidate, rules):
    """Stands in for the grading function in a worker."""
    while candidate.text == "hang":
        pass
    return function(candidate, rules)


@pytest.mark.slow
def test_rows_that_time_out_are_results(tmp_path, monkeypatch):
    monkeypatch.setattr(verifier, "Pool", lambda function, *args, **options: Pool(call_or_hang, *args, **options))
    rows = [ROWS[0], {"gold": "4", "prediction": "hang"}, ROWS[1]]
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    target.write_text("before")
    with target.open() as reader:
        assert grade.main([str(source), str(target), "--workers", "1", "--timeout", "1"]) == 0
        assert reader.read() == "before"  # replaced by a rename: who reads the old file keeps it whole
    assert [row["status"] for row in read(target)] == ["ok", "timeout", "ok"]
    assert [row["score"] for row in read(target)] == [1.0, 0.0, 1.0]
    assert read(target)[1]["seconds"] == 1  # those of --timeout


BAD = {
    "in.jsonl: cannot be read": None,
    "in.jsonl: is empty": "\n",
    "row 1: not valid JSON": '{"gold": \n',
    "row 1: must be an object, not list": "[1, 2]\n",
    'row 2: has no column "gold"': '\n{"answer": "1", "prediction": "1"}\n',
    'row 1: has no column "prediction"': '{"gold": "1"}\n',
    'row 1: "gold" = {}: must be a string': '{"gold": {}, "prediction": "1"}\n',
    'row 1: "gold" = [[0, 1]]: must be a string, a number, or a list of these': (
        '{"gold": [[0, 1]], "prediction": "1"}\n'
    ),
    'row 1: "prediction" = 1: must be a string': '{"gold": "1", "prediction": 1}\n',
    "row 1: not valid JSON (Expecting": b"\xff\xfe{}\n",
    "row 2: not valid JSON (Expecting value: line 1 column 1 (char 0)) (and 1 more of 3 rows)": (
        '{"gold": "1", "prediction": "1"}\n?\n?\n'
    ),
    "row 1: not valid JSON (maximum recursion": "[" * 100_000 + "\n",
}


@pytest.mark.parametrize(("message", "content"), BAD.items(), ids=range(len(BAD)))
def test_wrong_input_is_one_line_and_nothing_is_written(tmp_path, capsys, message, content):
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert grade.main([str(source), str(tmp_path / "out.jsonl")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "out.jsonl" not in os.listdir(tmp_path)


def test_a_broken_line_costs_its_own_row_alone(tmp_path, capsys):
    lines = [json.dumps(ROWS[0]), '{"gold": "4", "predic', json.dumps({"gold": 4, "prediction": "The answer is 4"})]
    lines += ['{"id": 7, "prediction": "x"}', json.dumps(ROWS[1]), json.dumps(ROWS[2])]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    assert grade.main([str(source), str(target), "--workers", "1"]) == 0
    rows = read(target)
    assert [row["score"] for row in rows] == [1, 0, 1, 0, 1, 0]
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "error", "ok", "ok"]
    assert rows[3]["id"] == 7 and rows[3]["detail"].startswith('has no column "gold"')
    assert "2 of 6 rows cannot be graded" in (warned := capsys.readouterr().err)
    assert "row 2: not valid JSON" in warned and 'row 4: has no column "gold"' in warned
    source.write_text("\n".join(lines[:2]))  # half of the lines, and no more
    assert len(grade.read_rows(source)) == 2


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_marks_line_ends_and_lone_surrogates_cost_nothing(tmp_path, end):
    lines = [
        rb'{"gold": "5", "prediction": "It is \\boxed{5} \ud83d"}',
        '{"gold": "é", "prediction": "<answer>é</answer>"}'.encode(),
        rb'{"gold": "6", "prediction": "\ud83d\ude00 \\boxed{6}"}',
        b'{"gold": "7", "prediction": "\xff \\\\boxed{7}"}',
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + end.join(lines) + end + b"\xef\xbb\xbf" + lines[0])
    assert grade.main([str(source), str(target), "--workers", "1"]) == 0
    rows = read(target)
    assert [(row["score"], row["status"]) for row in rows] == [(1, "ok")] * 5
    assert rows[0]["prediction"] == rows[4]["prediction"] == "It is \\boxed{5} \ud83d"  # unchanged
    assert "é" in target.read_text("utf-8").splitlines()[1]


def test_golds_that_are_numbers_or_several(tmp_path):
    rows = [(3.0, "3"), (3, "3.0"), (0.5, "1/2"), (["1/2", "2"], "2"), (["1/2", 2], "0.5"), (["1/2", "2"], "3")]
    rows += [([7], "7"), (["1", "2"], "1, 2"), ("['1', '2']", "1, 2"), ("['1', '2']", "1"), (1e-7, "0.0000001")]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [{"gold": gold, "prediction": f"\\boxed{{{answer}}}"} for gold, answer in rows])
    assert grade.main([str(source), str(target), "--workers", "1"]) == 0
    assert [row["score"] for row in read(target)] == [1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 1]
    assert [row["gold"] for row in read(target)] == [gold for gold, _ in rows]
    write(source, [{"gold": gold, "prediction": r"\boxed{4}"} for gold in (" ", None, [])])  # nothing is right
    assert grade.main([str(source), str(target), "--workers", "1"]) == 0
    assert [(row["score"], row["status"] == "error") for row in read(target)] == [(0, False)] * 3


def test_wrong_input_at_the_command_line(tmp_path):
    done = command(tmp_path / "missing.jsonl", tmp_path / "out.jsonl")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ROWS)
    assert grade.main([str(source), str(tmp_path / "no_such_folder" / "out.jsonl")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert grade.main([str(source), str(tmp_path / "out.jsonl"), "--workers", "0"]) == 2
    assert "--workers" in capsys.readouterr().err
    assert grade.main([str(source), str(tmp_path / "out.jsonl"), "--timeout", "0"]) == 2
    assert "--timeout above 0" in capsys.readouterr().err


def test_a_pipe_is_written_to_and_a_link_is_followed(tmp_path):
    """Neither is replaced: /dev/stdout would become a file, and the link too."""
    source, pipe, link, target = write(tmp_path / "in.jsonl", ROWS[:1]), *(tmp_path / name for name in "pld")
    os.mkfifo(pipe)
    link.symlink_to(target)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert grade.main([str(source), str(pipe), "--workers", "1"]) == 0
    with os.fdopen(reader) as received:
        assert [json.loads(line)["score"] for line in received] == [1.0] and pipe.is_fifo()
    assert grade.main([str(source), str(link), "--workers", "1"]) == 0
    assert link.is_symlink() and [row["score"] for row in read(target)] == [1.0]
    with (tmp_path / "log").open("a") as log:  # as a shell opens it for >>
        log.write("first\n")
        log.flush()
        done = [sys.executable, "-m", "igrpo_jax.rewards.grade", source, "/dev/stdout", "--workers", "1"]
        subprocess.run(done, cwd=ROOT, stdout=log, stderr=subprocess.DEVNULL, check=True, timeout=120)
        log.write("last\n")
    lines = (tmp_path / "log").read_text().splitlines()
    assert (lines[0], json.loads(lines[1])["score"], lines[2]) == ("first", 1.0, "last")
    assert sorted(os.listdir(tmp_path)) == sorted(["in.jsonl", "log", *"pld"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.proof)]
)
def test_a_command_that_is_stopped_leaves_nothing_behind(tmp_path, sent, code):
    source = write(tmp_path / "in.jsonl", ROWS[:1] * 50_000)
    arguments = [sys.executable, "-m", "igrpo_jax.rewards.grade", str(source), str(tmp_path / "out.jsonl")]
    running = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not [file for file in tmp_path.glob(".out.jsonl.*.tmp") if file.stat().st_size]:
        assert running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, sent)  # as a terminal does: to the workers too
    said = running.communicate(timeout=60)[1]
    assert running.returncode == code and os.listdir(tmp_path) == ["in.jsonl"]
    assert "Traceback" not in said and "warning" not in said.lower() and "closed" not in said
    assert (f"interrupted before {tmp_path / 'out.jsonl'} was complete" in said) == (sent == signal.SIGINT)


def test_nothing_half_written(tmp_path, monkeypatch):
    # Interrupted after the first row: what stood in the output before still stands, and no temporary file is left.
    source, target = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    target.write_text("before")

    def interrupted(rows, workers, timeout):
        yield grade.Score(1.0, {}, "4", "ok")
        raise KeyboardInterrupt

    monkeypatch.setattr(grade, "grade_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grade.run(source, target, workers=1, timeout=1.0)
    assert target.read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_the_command_grades_as_the_grader():
    rows = [grade.Row(row, grade.Candidate(row["prediction"], row["gold"])) for row in ROWS]
    scores = grade.grade_rows(rows, workers=1, timeout=5.0)
    assert [score.reward for score in scores] == [grader.grade(r["prediction"], r["gold"])[0] for r in ROWS]
