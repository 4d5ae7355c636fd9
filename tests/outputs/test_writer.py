"""The files that a run writes step by step, and what a resume does to them."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from builders import completion, group, run_config

from igrpo_jax.errors import RunError
from igrpo_jax.outputs import lines
from igrpo_jax.outputs import writer as writers
from igrpo_jax.records import Score


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_writer_takes_any_scalar_and_writes_null_for_what_is_not_finite(tmp_path):
    with writers.Writer(tmp_path, run_config()) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "kl": np.float32(0.25), "reward": 1, "entropy": jnp.bfloat16(2.0)})
        assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "kl": 0.25, "reward": 1, "entropy": 2}]
        writer.write(np.int32(2), {"loss": float("nan"), "kl": jnp.inf, "perf/recompiles": np.array([3])})
        assert writer.rows == 2
    second = (tmp_path / "metrics.jsonl").read_text().splitlines()[1]
    assert second == '{"step": 2, "loss": null, "kl": null, "perf/recompiles": 3.0}'


def test_the_scores_of_evaluations_are_read_again(tmp_path):
    with writers.Writer(tmp_path, run_config()) as writer:
        for step, metrics in ((0, {"eval/a/pass@1": 0.5}), (1, {"loss": 1.0}), (1, {"eval/a/pass@1": np.nan})):
            writer.write(step, metrics | {"perf/wall_time": 1.0})
        writer.write(2, {"eval/a/pass@1": 0.75, "eval/a/maj@2": 1.0})
        writer.write(3, {"eval/a/pass@1": 0.25})
    with writers.Writer(tmp_path, run_config(), 2) as writer:
        assert writer.scores == {0: {"eval/a/pass@1": 0.5}, 2: {"eval/a/pass@1": 0.75, "eval/a/maj@2": 1.0}}


def test_a_metric_without_a_value_is_mentioned_once(tmp_path, caplog):
    with writers.Writer(tmp_path, run_config()) as writer:
        for step, metrics in enumerate(({"kl": np.nan}, {"kl": np.nan}, {"kl": np.nan, "loss": np.inf}), 1):
            writer.write(step, metrics)
    said = [record.getMessage().partition(", written")[0] for record in caplog.records]
    assert said == ["step 1: no finite value of kl", "step 3: no finite value of loss"]


def test_a_metric_that_may_be_without_a_value_is_not_mentioned(tmp_path, caplog):
    with writers.Writer(tmp_path, run_config(), nullable=("kl",)) as writer:
        writer.write(1, {"kl": np.nan})
    assert not caplog.records and rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "kl": None}]


def test_sample_rows(tmp_path, two_groups):
    odd = completion("refine", 0, [3, 9], 1.0, text="\ud800 ∑ \x1b[31m\n</answer>")
    groups = [two_groups[0], group([], None, [odd, completion("refine", 1, [9], 0.0)])]
    with writers.Writer(tmp_path, run_config()) as writer:
        writer.samples(123, groups, np.array([[0.5, -0.5], [1.0, -1.0]], np.float32))
    rows = rows_of(tmp_path / "samples" / "step_000123.jsonl")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_000123.jsonl"]
    columns = (
        "prompt_id stage sample_id parent_draft_id prompt text token_count finished rewards reward status extracted "
        "answer advantage"
    )
    assert all(list(row) == columns.split() for row in rows)
    assert [row["stage"] for row in rows] == ["draft", "draft", "refine", "refine", "refine", "refine"]
    assert [row["parent_draft_id"] for row in rows] == [None, None, 0, 0, None, None]
    assert [row["advantage"] for row in rows] == [None, None, 0.5, -0.5, 1.0, -1.0]
    with writers.Writer(tmp_path, run_config()) as writer:
        writer.samples(124, groups, [np.array([0.5, -0.5])] * 2, [np.array([0.25, -0.25]), np.zeros(0)])
    trained = rows_of(tmp_path / "samples" / "step_000124.jsonl")
    assert [row["advantage"] for row in trained] == [0.25, -0.25, 0.5, -0.5, 0.5, -0.5]
    assert rows[2]["rewards"] == {"accuracy": 1.0, "format": 1.0} and rows[2]["token_count"] == 3
    assert [row["reward"] for row in rows] == [2.0, 1.0, 2.0, 0.0, 1.0, 0.0] and rows[0]["status"] == "ok"
    assert rows[3]["finished"] is False and rows[0]["answer"] == "7" and rows[0]["prompt"] == "3 + 4"
    assert rows[4]["text"] == odd.text


def test_rows_of_verifications_name_the_verdict_that_they_should_give(tmp_path, two_groups):
    """The first draft of the first prompt is right, that of the second wrong; the problems' answer is 7."""
    verified = [replace(each, completions=(completion("verify", 0, [9], 1.0),)) for each in two_groups]
    advantages = np.zeros((2, 1), np.float32)
    with writers.Writer(tmp_path, run_config()) as writer:
        writer.samples(1, verified, advantages)
    rows = rows_of(tmp_path / "samples" / "step_000001.jsonl")
    assert [(row["stage"], row["answer"], row["parent_draft_id"]) for row in rows] == [
        *[("draft", "7", None), ("draft", "7", None), ("verify", "1", 0)],
        *[("draft", "7", None), ("draft", "7", None), ("verify", "0", 0)],
    ]
    titles, texts = zip(*lines.sample_blocks(verified[1], 0.5), strict=True)
    assert titles[2].startswith("verification 1 of 1, reward 1") and texts[-1] == "0"


def test_a_problem_without_an_answer_shows_none_on_the_console(two_groups):
    prompt = two_groups[0].prompt
    titles = lambda answer: [title for title, _ in lines.sample_blocks(replace(two_groups[0], prompt=answer), 0.0)]
    assert titles(prompt)[-1] == "right answer" and titles(replace(prompt, answer="")) == titles(prompt)[:-1]


def test_the_draft_of_a_refinement_is_the_kept_one(tmp_path, two_groups):
    """The second one, which need not be the best."""
    kept = replace(two_groups[0], kept=1)
    with writers.Writer(tmp_path, run_config()) as writer:
        writer.samples(1, [kept], np.zeros((1, 2), np.float32))
    rows = rows_of(tmp_path / "samples" / "step_000001.jsonl")
    assert [row["parent_draft_id"] for row in rows] == [None, None, 1, 1]
    assert lines.sample_blocks(kept, 0.0)[1][0] == "kept of 2 drafts, reward 1 (accuracy 0, format 1)"


def test_a_grading_that_failed_has_no_reward_in_the_rows_and_on_the_console(tmp_path, two_groups):
    failed = Score(math.nan, {"accuracy": math.nan}, None, "timeout")
    first = replace(two_groups[0].completions[0], score=failed)
    changed = replace(two_groups[0], completions=(first, two_groups[0].completions[1]))
    with writers.Writer(tmp_path, run_config()) as writer:
        writer.samples(1, [changed], np.zeros((1, 2), np.float32))
    row = rows_of(tmp_path / "samples" / "step_000001.jsonl")[2]
    assert (row["reward"], row["rewards"], row["status"]) == (None, {"accuracy": None}, "timeout")
    assert lines.sample_blocks(changed, 0.0)[2][0] == "refinement 1 of 2, no verdict, advantage +0.00"


def test_a_reward_without_a_value_is_none_on_the_console(two_groups):
    """Custom rewards give None for a completion that they say nothing about."""
    first = replace(two_groups[0].completions[0], score=Score(1.0, {"accuracy": 1.0, "mine": math.nan}, "7", "ok"))
    changed = replace(two_groups[0], completions=(first, two_groups[0].completions[1]))
    assert lines.sample_blocks(changed, 0.0)[2][0].startswith("refinement 1 of 2, reward 1 (accuracy 1, mine none)")


def test_resume_drops_what_the_resumed_run_writes_again(tmp_path, two_groups):
    advantages = np.zeros((2, 2), np.float32)
    with writers.Writer(tmp_path, run_config()) as writer:
        writer.write(0, {"eval/arithmetic/pass@1": 0.5})
        for step in range(1, 6):
            writer.write(step, {"loss": step})
            writer.samples(step, two_groups, advantages)
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')  # a row that a kill tore
    (tmp_path / "samples" / "step_000002.jsonl.tmp").write_text("half a file")
    with writers.Writer(tmp_path, run_config(), resume_step=3) as writer:
        assert writer.rows == 4
        assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"step_00000{i}.jsonl" for i in (1, 2, 3)]
        writer.write(4, {"loss": 40})
    assert [(row["step"], row.get("loss")) for row in rows_of(path)] == [(0, None), (1, 1), (2, 2), (3, 3), (4, 40)]
    with writers.Writer(tmp_path, run_config()) as writer:  # died before its first checkpoint: everything again
        assert writer.rows == 0
    assert path.read_text() == "" and not list((tmp_path / "samples").iterdir())


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    with writers.Writer(tmp_path, run_config(), resume_step=2) as writer:
        writer.write(3, {"loss": 3.0})
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_batch_that_is_kept_has_what_each_sample_followed(tmp_path, two_groups):
    """A draft follows the question and a refinement q', with the draft in it; a log-prob that is not finite is null."""
    drafts = [replace(draft, logprobs=np.array([-1, np.nan, -np.inf])) for draft in two_groups[0].drafts[:1]]
    kept = replace(two_groups[0], drafts=tuple(drafts), context=np.array([1, 2, 5, 6], np.int32))
    with writers.Writer(tmp_path, run_config()) as writer:
        rows = rows_of(writer.nonfinite(7, [kept], np.zeros((1, 2), np.float32)))
    assert [row["context"] for row in rows] == [[1, 2], [1, 2, 5, 6], [1, 2, 5, 6]]
    assert rows[0]["logprobs"] == [-1, None, None] and rows[2]["tokens"] == [5, 7, 8]


@pytest.mark.parametrize("name", ["loss", "sft/loss"])
def test_a_resume_reads_the_rows_of_steps_again(tmp_path, name):
    with writers.Writer(tmp_path, run_config()) as writer:
        for step, metrics in ((0, {"eval/a/pass@1": 0.5}), (1, {name: 1.0}), (1, {"eval/a/pass@1": 0.5})):
            writer.write(step, metrics)
    with writers.Writer(tmp_path, run_config(), 1) as writer:
        assert writer.history == [{"step": 1, name: 1.0}] and writer.rows == 3


def test_trackers_get_the_first_prompt_that_was_refined_with_its_own_advantage(tmp_path, two_groups, monkeypatch):
    seen = []
    tracker = SimpleNamespace(sample=lambda step, blocks: seen.append((step, blocks)), close=lambda: None)
    monkeypatch.setattr(writers.trackers, "open_trackers", lambda *_: [tracker])
    solved = replace(two_groups[0], completions=(), kept=None)
    with writers.Writer(tmp_path, run_config()) as writer:
        writer.samples(3, [solved, two_groups[1]], [np.zeros(0), np.array([0.75, -0.75])])
    assert seen == [(3, lines.sample_blocks(two_groups[1], 0.75))]


def test_a_batch_that_cannot_be_kept_is_one_line(tmp_path, two_groups):
    with writers.Writer(tmp_path, run_config()) as writer:
        (tmp_path / "nonfinite").write_text("in the way")
        with pytest.raises(RunError, match=r"nonfinite: cannot be written \(File exists\)"):
            writer.nonfinite(1, two_groups, np.zeros((2, 2), np.float32))


def test_other_processes_write_nothing(tmp_path, monkeypatch, two_groups):
    monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
    with writers.Writer(tmp_path, run_config()) as writer:
        writer.write(1, {"loss": 1.0})
        writer.samples(1, two_groups, np.zeros((2, 2)))
    assert not list(tmp_path.iterdir())
