"""`python -m igrpo_jax.rewards.grade IN.jsonl OUT.jsonl`: rows in, rows with verdicts out; wrong input, one line."""

import json
import os
import subprocess
import sys
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


BAD = {
    "in.jsonl: cannot be read": None,
    "row 2: not valid JSON": '{"gold": "1", "prediction": "1"}\n{"gold": \n',
    "row 1: must be an object, not list": "[1, 2]\n",
    'row 3: has no column "gold"': '{"gold": "1", "prediction": "1"}\n\n{"answer": "1", "prediction": "1"}\n',
    'row 1: has no column "prediction"': '{"gold": "1"}\n',
    'row 1: "gold" = 1: must be a string': '{"gold": 1, "prediction": "1"}\n',
    "in.jsonl: cannot be read: 'utf-8'": b"\xff\xfe{}\n",
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
    scores = grade.grade_rows(ROWS, workers=1, timeout=5.0)
    assert [score.reward for score in scores] == [grader.grade(r["prediction"], r["gold"])[0] for r in ROWS]
