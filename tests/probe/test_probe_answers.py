"""What is drawn, kept and counted: which drafts are refined, and the figures of texts."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from builders import completion

from igrpo_jax import config
from igrpo_jax.learning.stages import STAGES
from igrpo_jax.outputs.console import Console
from igrpo_jax.probe import answers, measure
from igrpo_jax.probe.answers import Answered, Refined, completion_of, kept_drafts
from igrpo_jax.probe.estimates import NONE
from igrpo_jax.records import Prompt, Score
from igrpo_jax.rewards.failures import VerifierError
from igrpo_jax.sampling.scoring import stage_key
from igrpo_jax.storage.writing import Lines


def answered(plain, refined, kept, index=0):
    prompt = Prompt(f"p{index}", index, "1 + 2", "3", np.array([1, 2], np.int32))
    return Answered(prompt, tuple(plain), np.array(kept), tuple(refined))


def test_every_set_of_drafts_keeps_what_stage_one_would():
    """Rewards 0, 2, 1, 2: pairs from each answer on, in a circle, are 01, 12, 23 and 30; the first best one is kept."""
    plain = [completion("draft", i, [5], float(reward > 1), float(reward)) for i, reward in enumerate((0, 1, 1, 1))]
    plain[1] = completion("draft", 1, [5], 1.0, 1.0)
    plain[3] = completion("draft", 3, [5], 1.0, 1.0)
    assert kept_drafts(plain, 2, "best", "reward", [0]) == [1, 1, 3, 3]
    assert kept_drafts(plain, 2, "first", "reward", [0]) == [0, 1, 2, 3]
    assert kept_drafts(plain, 2, "worst", "reward", [0]) == [0, 2, 2, 0]
    drawn = kept_drafts(plain, 2, "random", "reward", [0])
    assert drawn == kept_drafts(plain, 2, "random", "reward", [0]) and all(
        i in (s, (s + 1) % 4) for s, i in enumerate(drawn)
    )


def test_drafts_without_a_verdict_are_not_kept():
    score = Score(float("nan"), {"accuracy": 0.0}, None, "invalid")
    plain = [completion("draft", i, [5], 1.0) for i in range(4)]
    plain[1:3] = [plain[1].__class__(**{**vars(x), "score": score}) for x in plain[1:3]]
    assert kept_drafts(plain, 2, "best", "reward", [0]) == [0, 3, 3]  # the set of answers 1 and 2 has none
    assert answered(plain, [], [True] * 4).lacks == "a verdict on an answer"


def test_a_problem_with_a_set_without_the_metric_is_left_out():
    """Two neighbours lack the reward that chooses drafts, and have verdicts. Counts of three sets fit none of four."""

    def problem(index, near):
        drafts = [completion("draft", i, [5], float(i == 0)) for i in range(4)]
        plain = [
            replace(draft, score=replace(draft.score, rewards=draft.score.rewards | {"near": value}))
            for draft, value in zip(drafts, near, strict=True)
        ]
        numbers = kept_drafts(plain, 2, "best", "near", [0])
        refined = Refined(plain[3], None, (completion("refine", 0, [7], 1.0), completion("refine", 1, [7], 0.0)))
        return answered(plain, [refined], [plain[number].score.is_right for number in numbers], index)

    nan = float("nan")
    cases = [problem(0, [0.5] * 4), problem(1, [0.5, nan, nan, 0.5]), problem(2, [nan, 0.5, nan, 0.5])]
    assert [len(case.kept) for case in cases] == [4, 3, 4]
    chosen = [case for case in cases if not case.lacks]
    assert chosen == [cases[0], cases[2]] and answers.counts(chosen, 2).kept.shape == (2, 4)
    expected = "1 without a draft in each set that has config.algorithm.draft_metric (p1)"
    assert measure.left_out(cases) == expected
    assert measure.left_out([problem(i, [nan] * 4) for i in range(9)]).endswith("(p0, p1, p2, p3, p4, ...)")


class Queue:
    """Stands in for the scheduler: notes what is asked for, and after how many answers."""

    def __init__(self, failing=""):
        self.asked, self.answers, self.log = [], 0, []
        self.failing = failing  # the stage whose gradings fail

    def start(self, params, sampling):
        self.sampling = sampling

    def finish(self): ...

    def submit(self, request):
        self.asked.append(request)
        self.log.append((request.index, request.stage, request.tokens.tolist(), self.answers))

    def answer(self):
        """Answers in the order of the requests, the first of each one right; requests may come meanwhile."""
        for request in self.asked:
            for i in range(request.samples):
                self.answers += 1
                answer = completion(request.stage, request.first + i, [request.index, i], float(i == 0), 2.0 * (i == 2))
                status = "error" if request.stage == self.failing else "ok"
                request.scored(replace(answer, score=replace(answer.score, status=status)))


def drawing(folder, queue):
    """Returns what draws four plain answers to a problem, and two refinements of two drafts, with stubs of all else."""
    rollout = config.RolloutConfig(temperature=0.75, top_p=0.5, top_k=5, max_completion_length=33)
    algorithm = config.AlgorithmConfig(num_drafts=2, num_generations=2, draft_metric="accuracy")
    settings = config.Config(algorithm=algorithm, rollout=rollout, seed=3)
    renderer = SimpleNamespace(with_draft=lambda question, draft, is_right: np.concatenate([[8 + is_right], draft]))
    verifier = SimpleNamespace(submit=None, start_step=lambda step: None)
    return answers.Answers(settings, renderer, queue, verifier, Console(io.StringIO()), folder, 4)


PROMPTS = [Prompt(f"p{i}", i, "1 + 2", "3", np.array([i], np.int32)) for i in range(2)]


def test_the_file_of_answers_is_closed_where_drawing_fails(tmp_path, monkeypatch):
    """Only then has a bucket the last answers."""

    def stop(queue, submit, renderer):
        queue.answer()
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "sample_and_score", stop)
    closed = []
    monkeypatch.setattr(Lines, "close", lambda lines: closed.append(lines.path.name))
    with pytest.raises(KeyboardInterrupt):
        drawing(tmp_path, Queue()).collect({}, PROMPTS)
    assert closed == ["answers.jsonl"]


def test_a_problem_is_refined_before_others_have_their_plain_answers(tmp_path, monkeypatch):
    """Of four plain answers the first is right, and pairs of them are drafts: 01 is right, and 12 keeps the wrong 1.

    By the reward 12 would keep 2, the only one with the format.
    """
    monkeypatch.setattr(answers, "sample_and_score", lambda queue, submit, renderer: queue.answer())
    queue = Queue()
    problems = drawing(tmp_path, queue).collect({}, PROMPTS)
    assert queue.log == [
        *((0, "draft", [0], 0), (1, "draft", [1], 0)),
        *((0, "refine", [9, 0, 0], 4), (0, "refine", [8, 0, 1], 4)),  # problem 1 has no answer by then
        *((1, "refine", [9, 1, 0], 8), (1, "refine", [8, 1, 1], 8)),
    ]
    assert queue.answers == 16 and [[part.is_right for part in problem.refined] for problem in problems] == [
        [True, False],
        [True, False],
    ]


def test_answers_are_drawn_as_training_draws_them(tmp_path, monkeypatch):
    """With its temperature and lengths, and with the keys of a step before its first."""
    monkeypatch.setattr(answers, "sample_and_score", lambda queue, submit, renderer: queue.answer())
    queue = Queue()
    drawing(tmp_path, queue).collect({}, PROMPTS)
    assert queue.sampling == (0.75, 0.5, 5) and {request.limit for request in queue.asked} == {33}
    keys = {stage: stage_key(3, 0, STAGES[stage]) for stage in ("draft", "refine")}
    assert all((request.key == keys[request.stage]).all() for request in queue.asked)
    assert (keys["draft"] != keys["refine"]).any()


@pytest.mark.parametrize("stage", ["draft", "refine"])
def test_a_probe_ends_where_too_many_gradings_of_a_stage_fail(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "sample_and_score", lambda queue, submit, renderer: queue.answer())
    with pytest.raises(VerifierError, match="of 8 gradings 0 timed out, 8 failed"):
        drawing(tmp_path, Queue(failing=stage)).collect({}, PROMPTS)


@pytest.mark.parametrize(
    ("failed", "asked"),
    [
        (lambda row: not row["drafts"], ["draft"] * 2 + ["refine"] * 4),
        (lambda row: row["drafts"], ["refine"] * 4),
        (lambda row: row["index"] == 0, ["draft"] + ["refine"] * 2),
    ],
)
def test_what_could_not_be_graded_is_drawn_again(failed, asked, tmp_path, monkeypatch):
    """And the refinements of it, which were shown it as a wrong draft."""
    monkeypatch.setattr(answers, "sample_and_score", lambda queue, submit, renderer: queue.answer())
    drawing(tmp_path, Queue()).collect({}, PROMPTS)
    file, queue = tmp_path / "answers.jsonl", Queue()
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    before = [row | {"status": "error"} if failed(row) else row for row in whole]
    file.write_text("".join(json.dumps(row) + "\n" for row in before))
    drawing(tmp_path, queue).collect({}, PROMPTS)
    assert [request.stage for request in queue.asked] == asked
    assert [json.loads(line) for line in file.read_text().splitlines()] == whole


def test_counts_by_hand():
    right, wrong = (completion("draft", 0, [5, 6], accuracy) for accuracy in (1.0, 0.0))
    of = lambda *accuracies: tuple(completion("refine", i, [7], x) for i, x in enumerate(accuracies))
    both = answered(
        [right, wrong, wrong, wrong], [Refined(wrong, None, of(0, 1)), Refined(right, None, of(1, 1))], [1, 0, 0, 1]
    )
    none = answered([wrong] * 4, [Refined(wrong, None, of(0, 0))], [0, 0, 0, 0])
    counts = answers.counts([both, none], drafts=2)
    np.testing.assert_array_equal(counts.plain, [[1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(counts.weight, [0.5, 0.0])
    np.testing.assert_array_equal(counts.after_right, [2, NONE])
    np.testing.assert_array_equal(counts.after_wrong, [1, 0])
    assert (counts.refinements, counts.active_plain, counts.active_refined) == (2, 1, 1)


def test_figures_of_texts():
    """A right draft is kept in three of four sets: refinements of it weigh 3/4, those of the wrong one 1/4."""
    draft = lambda accuracy: completion("draft", 0, [5, 6, 7, 8, 9], accuracy)
    copy = completion("refine", 0, [5, 6, 7, 8, 9], 1.0)
    other = completion("refine", 1, [1, 2], 0.0, finished=False)
    parts = [Refined(draft(1.0), None, (copy, copy)), Refined(draft(0.0), None, (copy, other))]
    case = answered([draft(1.0), draft(0.0)], parts, [1, 1, 1, 0])
    figures = {name: values[0] for name, values in answers.texts([case], draft_limit=4).items()}
    assert figures["copy"] == pytest.approx(0.75 + 0.25 / 2)
    assert figures["length_refined"] == pytest.approx(0.75 * 5 + 0.25 * 3.5) and figures["length_plain"] == 5
    assert figures["cut_refined"] == pytest.approx(0.125) and figures["cut_plain"] == 0
    assert figures["same_answer"] == figures["same_wrong"] == figures["same_right"] == 1  # "7", as the builder says
    assert figures["draft_cut"] == 0  # four tokens without the EOS
    assert answers.texts([case], draft_limit=3)["draft_cut"][0] == 1
    alone = answers.texts([answered([draft(0.0)], parts[1:], [0])], draft_limit=4)
    assert np.isnan(alone["same_right"][0])


def test_a_row_is_read_as_it_was_written():
    prompt = Prompt("p", 3, "q", "a", np.array([1], np.int32))
    drawn = completion("refine", 2, [4, 5], 1.0, 0.5, finished=False, text="x")
    row = answers._row(prompt, (6,), drawn)
    back = completion_of(row, "refine")
    assert (back.sample_id, back.finished, back.text, back.score.rewards) == (2, False, "x", drawn.score.rewards)
    np.testing.assert_array_equal(back.tokens, drawn.tokens)
    assert (row["index"], row["drafts"]) == (3, [6])
