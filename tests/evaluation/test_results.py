"""The folder of an evaluation: rows that survive a kill, one kind of evaluation a folder."""

import json
import os

import pytest
from builders import run_config

from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import results, summary_tables
from igrpo_jax.evaluation.results import Rows


def row(index, sample, accuracy=1.0, drafts=(), **more):
    base = {"prompt_id": f"p{index}", "index": index, "drafts": list(drafts), "sample_id": sample, "prompt": "q"}
    return base | {"accuracy": accuracy, "text": "∑\u2028\ud800"} | more


def test_rows_are_written_as_they_come_and_ordered_at_the_end(tmp_path):
    rows = Rows(tmp_path, "b")
    for key in ((2, 0), (0, 1), (0, 0)):
        rows.add(row(*key))
        assert json.loads((tmp_path / "b.jsonl").read_text().split("\n")[-2])["index"] == key[0]
    rows.add(row(0, 0, drafts=(1,)))
    rows.join()
    order = [results.key_of(json.loads(line)) for line in (tmp_path / "b.jsonl").read_text().split("\n")[:-1]]
    assert order == [(0, (), 0), (0, (), 1), (0, (1,), 0), (2, (), 0)]
    assert [one["sample_id"] for one in rows.of(0)] == [0, 1] and rows.of(0, (1,)) and not rows.of(2, (1,))


def test_a_torn_line_does_not_take_the_next_one_with_it(tmp_path):
    rows = Rows(tmp_path, "b")
    rows.add(row(0, 0))
    rows.close()
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"index": 1, "drafts": [], "sam')
    rows = Rows(tmp_path, "b")
    rows.add(row(2, 0))
    rows.close()
    again = Rows(tmp_path, "b")
    assert [one["index"] for one in again.values()] == [0, 2]


def test_a_name_is_no_pattern(tmp_path):
    for name in ("aime24", "aime24x"):
        rows = Rows(tmp_path, name, process=0)
        rows.add(row(0, 0) | {"status": "error"})
        rows.close()
    results.drop_failed(tmp_path, "aime24", 0.5)
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_size] == ["aime24x.process-0.jsonl"]


def test_what_follows_failed_drafts_is_dropped_with_them(tmp_path):
    rows = Rows(tmp_path, "b")
    for number, status in enumerate(("ok", "error", "error")):
        rows.add(row(0, number, status=status))
    for drafts in ((0,), (1,), (0, 1), (1, 0)):
        rows.add(row(0, 0, drafts=drafts, status="ok"))
    rows.add(row(7, 1, status="ok"))  # another problem
    rows.add(row(7, 0, drafts=(1,), status="ok"))
    rows.close()
    before = (tmp_path / "b.jsonl").read_text()
    results.drop_failed(tmp_path, "b", 0.5)
    assert (tmp_path / "b.jsonl").read_text() == before
    results.drop_failed(tmp_path, "b", 0.4)
    kept = [results.key_of(one) for one in results.read_rows(tmp_path / "b.jsonl")]
    assert kept == [(0, (), 0), (0, (0,), 0), (0, (0, 1), 0), (7, (), 1), (7, (1,), 0)]


def test_a_folder_is_of_one_kind_of_evaluation(tmp_path):
    results.claim(tmp_path / "out", {"model": "a", "seed": 0})
    results.claim(tmp_path / "out", {"model": "a", "seed": 0})
    with pytest.raises(InputError, match="holds an evaluation with other settings \\(model: 'a' -> 'b'\\)"):
        results.claim(tmp_path / "out", {"model": "b", "seed": 0})
    probed = {"data.train": "x.jsonl", "data": "1615ed05"}
    results.claim(tmp_path / "probe", probed)
    with pytest.raises(InputError, match=r"\(data: the prompts or answers of x\.jsonl differ from .*\); give"):
        results.claim(tmp_path / "probe", probed | {"data": "782810f8"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds notes.txt but no evaluation\.json"):
        results.claim(tmp_path / "other", {})
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").write_text("process 1")
    results.claim(tmp_path / "locked", {"model": "a"})
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be used"):
        results.claim(tmp_path / "file", {})


def test_an_evaluation_that_recorded_a_download_is_told_the_revision(tmp_path):
    settings = {"model": "owner/name", "weights_written": "2026-11-26 10:00:00"}
    results.claim(tmp_path, settings)
    for written, told in (("c0ffee", ", the hub's revision, where .*evaluation.json"), ("2026-11-27 10:00:00", "")):
        with pytest.raises(InputError, match=rf"\(weights_written: '2026-11-26 10:00:00' -> '{written}'{told}\); give"):
            results.claim(tmp_path, settings | {"weights_written": written})


def test_an_evaluation_keeps_the_day_and_the_variables_of_its_template(tmp_path):
    """Of an older version, which wrote neither, it goes on with the defaults, and with the day that is given."""
    assert results.recorded_date(tmp_path / "out") is None
    settings = {"model": "a", "system_prompt": "", "template_kwargs": {}, "template_date": "2026-11-26"}
    results.claim(tmp_path / "out", {"model": "a"})
    assert results.recorded_date(tmp_path / "out") == ""
    results.claim(tmp_path / "out", settings)
    assert results.recorded_date(tmp_path / "out") == "2026-11-26"
    for name, value in (("template_date", "2026-11-27"), ("template_kwargs", {"x": 1}), ("system_prompt", "Hi")):
        with pytest.raises(
            InputError, match=rf"other settings \({name}: .* -> .*\); give another --workdir, or the old"
        ):
            results.claim(tmp_path / "out", settings | {name: value})


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("model.dtype", "float32", "dtype"),
        ("seed", 7, "seed"),
        ("evaluation.temperature", 0.5, "temperature"),
        ("evaluation.top_p", 0.5, "top_p"),
        ("data.instruction", "Think.", "instruction"),
        ("data.system_prompt", "Be brief.", "system_prompt"),
        ("data.template_kwargs", {"thinking": True}, "template_kwargs"),
        ("data.template_date", "2026-11-26", "template_date"),
        ("refine.instruction", "{draft} Improve.", "refine_instruction"),
        ("refine.max_draft_length", 9, "max_draft_length"),
        ("", 49, "max_completion_length"),
    ],
)
def test_answers_drawn_with_other_settings_are_another_evaluation(tmp_path, field, value, name):
    """A resume does not mix them with those that are there."""
    first = results.settings(run_config(), 48)
    other = results.settings(run_config(**{field: value} if field else {}), 48 if field else value)
    assert [each for each in first if first[each] != other[each]] == [name]
    results.claim(tmp_path, first)
    with pytest.raises(InputError, match=rf"holds an evaluation with other settings \({name}: "):
        results.claim(tmp_path, other)


def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match=r"cannot be used .*Read-only file system.*; give another folder"):
        results.claim(tmp_path / "out", {"model": "a"})


def test_the_summary_keeps_other_benchmarks_of_the_folder(tmp_path):
    shot = {"pass@1": 0.5, "pass@1_low": 0.25, "pass@1_high": 0.75, "mean_length": 9.4, "clipped_ratio": 0.0}
    shot |= {
        "unparseable_frac": 0.125,
        "pass@2": 0.6,
        "pass@4": 0.7,
        "maj@2": 0.5,
        "maj@4": 0.55,
        "unsolved_length": 9.6,
    }
    one = {"problems": 4, "samples": 4, "single_shot": shot, "rounds": []}
    results.write_summary(tmp_path, {"seed": 0}, {"b": one})
    results.write_summary(tmp_path, {"seed": 0}, {"a": one | {"problems": 3}})
    results.write_summary(tmp_path, {"seed": 0}, {"a": one})  # of more problems, in place of the first
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found == {"seed": 0, "benchmarks": {"a": one, "b": one}}
    line = "| a | 4 | 4 | 50.00 | 25.00 to 75.00 | 70.00 (k = 4) | 55.00 (k = 4) | 9 (-, 10) | 0.00 | 12.50 |"
    assert line in (tmp_path / "summary.md").read_text()


def test_the_table_of_the_rounds_has_each_measure_below_its_name():
    names = ("draft_accuracy", "pass@1", "pass@1_low", "pass@1_high", "fixed", "broken", "kept_right", "kept_wrong")
    values = {name: number / 100 for number, name in enumerate(names, 1)}
    shot = dict.fromkeys(("pass@1", "pass@1_low", "pass@1_high", "mean_length", "clipped_ratio", "unparseable_frac"), 0)
    summary = {"problems": 4, "samples": 4, "single_shot": shot, "rounds": [{"vote": values}]}
    head, _, row = summary_tables.markdown({"b": summary}).splitlines()[-3:]
    assert head.endswith("| draft by | right | pass@1 | interval | fixed | broken | kept right | kept wrong |")
    assert row == "| b | 1 | vote | 1.00 | 2.00 | 3.00 to 4.00 | 5.00 | 6.00 | 7.00 | 8.00 |"
