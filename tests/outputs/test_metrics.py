"""Metrics of a rollout, the files a run writes, and what a resume does to them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from builders import completion, group

from igrpo_jax import config as config_lib
from igrpo_jax.errors import RunError
from igrpo_jax.outputs import metrics


@pytest.fixture
def two_groups():
    right_best = group(
        [completion("draft", 0, [5, 6, 9], 1.0, 1.0), completion("draft", 1, [5, 9], 0.0, 1.0)],
        0,
        [completion("refine", 0, [5, 6, 9], 1.0, 1.0), completion("refine", 1, [5, 7, 8], 0.0, 0.0, finished=False)],
    )
    wrong_best = group(
        [completion("draft", 0, [4, 4, 4, 4], 0.0, 1.0, finished=False), completion("draft", 1, [4, 9], 0.0, 0.0)],
        0,
        [completion("refine", 0, [3, 9], 1.0, 0.0), completion("refine", 1, [9], 0.0, 1.0)],
        prompt_id="p1",
    )
    return [right_best, wrong_best]


def tiny(**overrides):
    tree = config_lib.default()
    tree.log.trackers = ()
    tree.update_from_flattened_dict(overrides)
    return config_lib.freeze(tree)


def test_rollout_metrics_against_numbers_derived_by_hand(two_groups):
    got = metrics.rollout_metrics(two_groups, tiny())
    # Rewards [2, 0] and [1, 1]: the mean is 1; std with ddof = 1 is sqrt(2) and 0 (ddof = 0 would give 1 and 0).
    assert got["reward"] == 1.0
    assert got["reward_std"] == pytest.approx(np.sqrt(2) / 2)
    assert got["frac_reward_zero_std"] == 0.5
    assert got["rewards/accuracy/mean"] == 0.5 and got["rewards/format/mean"] == 0.5
    assert got["completions/mean_length"] == (3 + 3 + 2 + 1) / 4
    assert got["completions/min_length"] == 1 and got["completions/max_length"] == 3
    assert got["completions/clipped_ratio"] == 0.25
    # Draft rewards [2, 1] and [1, 0].
    assert got["draft/reward"] == 1.0 and got["draft/best_reward"] == 1.5 and got["draft/accuracy"] == 0.25
    assert (got["draft/solved_none"], got["draft/solved_some"], got["draft/solved_all"]) == (0.5, 0.5, 0.0)
    assert got["draft/mean_length"] == (3 + 2 + 4 + 2) / 4
    assert got["draft/kept_reward"] == 1.5
    # Right best draft: one refinement right, one wrong. Wrong best draft: one right, one wrong.
    assert [got[f"refine/{key}"] for key in ("fixed", "broken", "kept_right", "kept_wrong")] == [0.25] * 4
    # Refinements [2, 0] against the draft's 2, [1, 1] against its 1. The mean of all drafts would give +0.5.
    assert got["refine/gain_vs_best_draft"] == -0.5
    # [5 6] copies [5 6]; [5 7 8] shares its first of 3; [3] shares nothing; an empty one is no copy.
    assert got["refine/copy_ratio"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert got["refine/draft_truncated"] == 0.0
    assert all(type(value) is float for value in got.values())


def test_an_answer_may_be_the_drafts_though_its_words_are_not(two_groups):
    """Shown 7: one of two says so too. Shown no answer: one that states none either is no copy."""
    stated = lambda c, answer: dataclasses.replace(c, score=dataclasses.replace(c.score, extracted=answer))
    first, second = two_groups
    first = dataclasses.replace(first, completions=(first.completions[0], stated(first.completions[1], "8")))
    second = dataclasses.replace(
        second,
        drafts=(stated(second.drafts[0], None), second.drafts[1]),
        completions=(stated(second.completions[0], None), second.completions[1]),
    )
    assert metrics.rollout_metrics([first, second], tiny())["refine/same_answer"] == 0.25


def test_a_kept_draft_need_not_be_the_best(two_groups):
    """Shown their second drafts, of rewards 1 and 0, both wrong: all is fixed or kept wrong, the gain as before."""
    got = metrics.rollout_metrics([dataclasses.replace(group, best=1) for group in two_groups], tiny())
    assert (got["draft/kept_reward"], got["draft/best_reward"]) == (0.5, 1.5)
    assert got["refine/gain_vs_best_draft"] == -0.5  # against the kept ones it would be +0.5
    assert [got[f"refine/{key}"] for key in ("fixed", "broken", "kept_right", "kept_wrong")] == [0.5, 0, 0, 0.5]


def test_completions_without_a_verdict_are_left_out_of_means(two_groups):
    def unknown(one):
        score = dataclasses.replace(one.score, reward=np.nan, rewards=one.score.rewards | {"judge": np.nan})
        return dataclasses.replace(one, score=score)

    right, wrong = two_groups
    groups = [
        group([unknown(right.drafts[0]), right.drafts[1]], 1, [right.completions[0], unknown(right.completions[1])]),
        group([unknown(one) for one in wrong.drafts], None, wrong.completions),
    ]
    got = metrics.rollout_metrics(groups, tiny())
    assert got["reward"] == pytest.approx((2 + 1 + 1) / 3) and got["reward_std"] == 0.0
    assert got["frac_reward_zero_std"] == 1.0  # one verdict alone compares with nothing
    assert np.isnan(got["rewards/judge/mean"])  # written as null
    assert got["draft/reward"] == got["draft/best_reward"] == 1.0
    assert got["refine/gain_vs_best_draft"] == 1.0


def test_kept_drafts_cut_to_the_limit_are_counted_without_their_eos(two_groups):
    # Kept drafts: [5 6 EOS] has 2 tokens in q', [4 4 4 4] has 4.
    for limit, share in ((1, 1.0), (2, 0.5), (3, 0.5), (4, 0.0)):
        got = metrics.rollout_metrics(two_groups, tiny(**{"refine.max_draft_length": limit}))
        assert got["refine/draft_truncated"] == share


def test_stages_that_did_not_run_have_no_keys(two_groups):
    base = [group([], None, g.completions) for g in two_groups]
    got = metrics.rollout_metrics(base, tiny())
    assert got["reward"] == 1.0
    assert not [name for name in got if name.startswith(("draft/", "refine/"))]
    # Draft dropout: drafts were drawn, but one group saw the plain prompt.
    dropped = [two_groups[0], group(two_groups[1].drafts, None, two_groups[1].completions)]
    got = metrics.rollout_metrics(dropped, tiny())
    assert got["draft/solved_none"] == 0.5
    assert (got["refine/kept_right"], got["refine/broken"], got["refine/fixed"]) == (0.5, 0.5, 0.0)
    assert metrics.rollout_metrics([], tiny()) == {}


def test_no_accuracy_reward_is_no_error():
    drafts = [completion("draft", 0, [1, 9], form=1.0)]
    groups = [group(drafts, 0, [completion("refine", i, [1, 9], form=float(i)) for i in range(2)])]
    got = metrics.rollout_metrics(groups, tiny(**{"rewards.accuracy": 0.0}))
    assert got["rewards/format/mean"] == 0.5 and got["refine/copy_ratio"] == 1.0
    assert "rewards/accuracy/mean" not in got and "refine/fixed" not in got and "draft/solved_none" not in got


@pytest.mark.parametrize(
    "draft, refinement, ratio",
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [3, 4], 1.0),  # the tail alone
        ([1, 2, 3, 4], [1, 4], 1.0),  # one piece cut out
        ([1, 2, 3, 4], [1, 2, 8, 4], 0.75),  # one token corrected
        ([1, 2], [1, 2, 1, 2], 0.5),  # no token of the draft counts twice
        ([1, 1], [1, 1, 1], 2 / 3),
        ([1, 2], [3, 4], 0.0),
        ([], [3], 0.0),
        ([], [], 1.0),
    ],
)
def test_copy_ratio(draft, refinement, ratio):
    assert metrics.copy_ratio(np.array(draft), np.array(refinement)) == pytest.approx(ratio)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_writer_takes_any_scalar_and_writes_null_for_what_is_not_finite(tmp_path):
    with metrics.Writer(tmp_path, tiny()) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "kl": np.float32(0.25), "reward": 1, "entropy": jnp.bfloat16(2.0)})
        assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "kl": 0.25, "reward": 1, "entropy": 2}]
        writer.write(np.int32(2), {"loss": float("nan"), "kl": jnp.inf, "perf/recompiles": np.array([3])})
        assert writer.rows == 2
    second = (tmp_path / "metrics.jsonl").read_text().splitlines()[1]
    assert second == '{"step": 2, "loss": null, "kl": null, "perf/recompiles": 3.0}'


def test_sample_rows(tmp_path, two_groups):
    odd = completion("refine", 0, [3, 9], 1.0, text="\ud800 ∑ \x1b[31m\n</answer>")
    groups = [two_groups[0], group([], None, [odd, completion("refine", 1, [9], 0.0)])]
    with metrics.Writer(tmp_path, tiny()) as writer:
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
    assert rows[2]["rewards"] == {"accuracy": 1.0, "format": 1.0} and rows[2]["token_count"] == 3
    assert [row["reward"] for row in rows] == [2.0, 1.0, 2.0, 0.0, 1.0, 0.0] and rows[0]["status"] == "ok"
    assert rows[3]["finished"] is False and rows[0]["answer"] == "7" and rows[0]["prompt"] == "3 + 4"
    assert rows[4]["text"] == odd.text


def test_resume_drops_what_the_resumed_run_writes_again(tmp_path, two_groups):
    advantages = np.zeros((2, 2), np.float32)
    with metrics.Writer(tmp_path, tiny()) as writer:
        writer.write(0, {"eval/arithmetic/pass@1": 0.5})
        for step in range(1, 6):
            writer.write(step, {"loss": step})
            writer.samples(step, two_groups, advantages)
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')  # a row that a kill tore
    (tmp_path / "samples" / "step_000002.jsonl.tmp").write_text("half a file")
    with metrics.Writer(tmp_path, tiny(), resume_step=3) as writer:
        assert writer.rows == 4
        assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"step_00000{i}.jsonl" for i in (1, 2, 3)]
        writer.write(4, {"loss": 40})
    assert [(row["step"], row.get("loss")) for row in rows_of(path)] == [(0, None), (1, 1), (2, 2), (3, 3), (4, 40)]
    with metrics.Writer(tmp_path, tiny()) as writer:  # died before its first checkpoint: everything again
        assert writer.rows == 0
    assert path.read_text() == "" and not list((tmp_path / "samples").iterdir())


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    with metrics.Writer(tmp_path, tiny(), resume_step=2) as writer:
        writer.write(3, {"loss": 3.0})
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_tensorboard_scalars_and_purge_on_resume(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c

    config = tiny(**{"log.trackers": ("tensorboard",)})
    with metrics.Writer(tmp_path, config) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "kl": float("nan")})

    def events(path):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]

    (first,) = (tmp_path / "tensorboard").iterdir()
    assert [(e.step, v.tag, v.simple_value) for e in events(first) for v in e.summary.value] == [(1, "loss", 0.5)]
    with metrics.Writer(tmp_path, config, resume_step=7):
        pass
    (second,) = set((tmp_path / "tensorboard").iterdir()) - {first}
    assert [e.step for e in events(second) if e.session_log.status == SessionLog.START] == [8]


def test_a_batch_that_cannot_be_kept_is_one_line(tmp_path, two_groups):
    with metrics.Writer(tmp_path, tiny()) as writer:
        (tmp_path / "nonfinite").write_text("in the way")
        with pytest.raises(RunError, match=r"nonfinite: cannot be written \(File exists\)"):
            writer.nonfinite(1, two_groups, np.zeros((2, 2), np.float32))


def test_other_processes_write_nothing(tmp_path, monkeypatch, two_groups):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with metrics.Writer(tmp_path, tiny()) as writer:
        writer.write(1, {"loss": 1.0})
        writer.samples(1, two_groups, np.zeros((2, 2)))
    assert not list(tmp_path.iterdir())
