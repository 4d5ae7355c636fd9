"""The lines that `aot` prints while it compiles."""

import sys
import threading
import time

import pytest
import whole_runs

from igrpo_jax.aot import __main__ as aot
from igrpo_jax.aot.progress import EVERY, Progress


def test_a_line_comes_again_and_again_and_names_what_is_under_way():
    lines = []
    with Progress(lines.append, every=0.02) as progress:
        progress.expect(3)
        with progress.doing("tracing apply"):
            worker = threading.Thread(target=_compile, args=(progress, lines))
            worker.start()
            worker.join()
        _wait(lines, "working; 1 of 3 programs compiled")
    assert any("tracing apply (0 s), compiling decode (0 s); 0 of 3 programs compiled" in line for line in lines)
    assert lines.count("decode: compiled") == 1
    count = len(lines)
    time.sleep(0.06)
    assert len(lines) == count  # the thread has ended


def _compile(progress, lines):
    with progress.doing("compiling decode"):
        _wait(lines, "compiling decode")
    progress.compiled("decode: compiled")


def _wait(lines, text):
    """Returns when a line that holds `text` is printed."""
    until = time.monotonic() + 10
    while not any(text in line for line in lines):
        assert time.monotonic() < until, lines
        time.sleep(0.005)


def test_the_time_between_two_lines():
    assert EVERY == 15


def test_what_failed_is_no_longer_under_way():
    progress = Progress(print)
    with pytest.raises(ValueError), progress.doing("compiling decode"):
        raise ValueError
    assert "decode" not in progress.line()


def test_the_first_line_is_printed_before_jax_is_loaded(tmp_path, monkeypatch, capsys):
    """jax and the compiler take many seconds to load on a cold machine; what comes before takes about one."""
    file = tmp_path / "config.py"
    file.write_text(whole_runs.CONFIG)

    def topology(name, slices):
        assert capsys.readouterr().out == f"compiling the programs of {file} for v5e:2x2; this takes minutes\n"
        sys.exit(9)

    monkeypatch.setattr(aot, "topology", topology)
    with pytest.raises(SystemExit, match="9"):
        aot.main(["aot", "--config", str(file), "--topology", "v5e:2x2"])
