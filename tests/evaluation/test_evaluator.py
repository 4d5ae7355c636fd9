"""Evaluation in small: the same numbers after a kill, rounds of drafts, and that a sample depends on itself alone."""

import contextlib
import json
import re
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from engines import make_engine

from igrpo_jax import config, evaluate
from igrpo_jax.data.problems import Row
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import cluster, sharding
from igrpo_jax.distributed.teams import Team
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import evaluator as module
from igrpo_jax.evaluation import inference, planning, results, summaries
from igrpo_jax.evaluation.evaluator import Evaluator, RoundPrompt
from igrpo_jax.models.policy import open_policy
from igrpo_jax.outputs.console import Console
from igrpo_jax.records import Prompt, Score
from igrpo_jax.rewards.failures import VerifierError
from igrpo_jax.rewards.mathematics import grader
from igrpo_jax.sampling.scheduler import Scheduler

QUESTIONS = ("1+2", "7+5-3", "9", "4-4+8-1", "2+2")
SAMPLES, LENGTH = 5, 8
ROWS = {"small": [Row(f"row {i}", 3 * i, question, "y", {}) for i, question in enumerate(QUESTIONS)]}


def settings(**changes):
    tree = config.default()
    tree.update_from_flattened_dict(
        {
            "seed": 5,
            "model.dtype": "float32",
            "model.builtin.hidden_size": 32,
            "model.builtin.num_layers": 1,
            "model.builtin.num_heads": 4,
            "model.builtin.intermediate_size": 48,
            "data.instruction": "",
            "refine.instruction": "[{draft}]",
            "refine.max_draft_length": 4,
            "rollout.max_completion_length": LENGTH,
            "evaluation.temperature": 1.5,
            "evaluation.top_p": 1.0,
            "evaluation.samples": SAMPLES,
            "evaluation.drafts": 3,
        }
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config.freeze(tree)


class StubVerifier:
    """The answer is the first character that is drawn; letters are right answers, capitals of them equal to them."""

    def __init__(self, stop_after=None):
        self.left = stop_after

    def check_answer(self, candidate, batch) -> Future:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        found, done = (candidate.text[:1].strip() or None), Future()
        right = float(found is not None and found.isalpha())
        done.set_result(Score(right, {"accuracy": right}, found, "unparseable" if found is None else "ok"))
        return done

    def classes(self, found) -> Future:
        done = Future()
        texts = [None if one is None else one.casefold() for one in found]
        done.set_result([-1 if one is None else texts.index(one) for one in texts])
        return done


@pytest.fixture(scope="module")
def policy():
    return open_policy(settings().model)


@pytest.fixture(scope="module")
def schedulers(policy):
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    sizes = {"longest_prompt": 32, "max_completion": LENGTH, "dtype": "float32", "steps_per_dispatch": 4}
    return {n: Scheduler(make_engine(policy.cfg, mesh, policy.eos_ids, slots=n, **sizes)) for n in (8, 3)}


@pytest.fixture(scope="module")
def params(policy, schedulers):
    params = policy.load(schedulers[8].engine.mesh, 0)
    return params | {"embedding": params["embedding"].at[policy.eos_ids[0]].mul(2)}


@pytest.fixture
def evaluator(policy, schedulers):
    def make(slots=8, stop_after=None, rows=None, max_positions=100, **changes):
        c = settings(**changes)
        scheduler = Scheduler(schedulers[slots].engine)
        renderer = Renderer(policy.tokenizer, c.data, c.refine, c.draft_limit, policy.eos_ids)
        plan = planning.make_plan(c, rows or ROWS, renderer, max_positions)
        return Evaluator(c, plan, scheduler, renderer, StubVerifier(stop_after), Console())

    return make


def lines(folder):
    return (folder / "small.jsonl").read_text().splitlines()


def answers(rows):
    return {results.key_of(row): row["text"] for row in rows.values()}


@pytest.mark.slow
def test_rows_summary_and_metrics(evaluator, params, tmp_path):
    written = evaluator().run(params, tmp_path, {"step": 3})
    rows = [json.loads(line) for line in lines(tmp_path)]
    assert [(row["index"], row["sample_id"]) for row in rows] == [(3 * i, k) for i in range(5) for k in range(SAMPLES)]
    right = np.array([row["accuracy"] for row in rows]).reshape(5, SAMPLES)
    assert 0 < right.mean() < 1 and len({row["text"] for row in rows}) > 10
    one = written["small"]
    assert (one["problems"], one["samples"], one["rounds"]) == (5, SAMPLES, [])
    assert one["single_shot"]["pass@1"] == right.mean()
    assert one["single_shot"]["pass@5"] == right.max(axis=1).mean()
    assert {f"{x}@{k}" for x in ("pass", "maj") for k in (2, 4, 5)} <= one["single_shot"].keys()
    assert json.loads((tmp_path / "summary.json").read_text()) == {"step": 3, "benchmarks": written}
    assert f"| small | 5 | {SAMPLES} | {100 * right.mean():.2f} |" in (tmp_path / "summary.md").read_text()
    assert summaries.flat(written)["eval/small/pass@1"] == right.mean()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"evaluation__rounds": 2}, {"evaluation__pass_at": (3, 9)}])
def test_the_names_of_the_metrics_are_known_before_an_evaluation(evaluator, params, changes):
    """A best_metric is checked against these names; a name that is missing here would refuse a run that is right."""
    made, other = evaluator(**changes), {"other": ROWS["small"][:2]}
    written = summaries.flat(made.run(params))
    assert planning.metric_names(settings(**changes), made.plan) == list(written)
    both = evaluator(rows=ROWS | other, **changes).plan
    assert len(planning.metric_names(settings(**changes), both)) == 2 * len(written)


def test_a_k_above_the_samples_is_named_where_the_user_asks_for_it(policy):
    c = settings(evaluation__pass_at=(3, 9, 7))
    renderer = Renderer(policy.tokenizer, c.data, c.refine, c.draft_limit, policy.eos_ids)
    plan = planning.make_plan(c, ROWS, renderer, 100)
    for quiet in (settings(), settings(evaluation__pass_at=(1, 5))):
        assert planning.left_out(quiet, plan) == []
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    said = "no pass@7, pass@9 of small, which has 5 samples per problem; evaluation.samples = 9 gives all"
    inputs = inference.EvaluationInputs(c, policy, renderer, plan, mesh, None, None, "m", "")
    assert ("note", said) in evaluate.overview(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 30, *(pytest.param(each, marks=pytest.mark.proof) for each in (0, 13, 60))])
def test_a_killed_evaluation_resumes_to_the_same_files(evaluator, params, tmp_path, stop_after):
    """Stopped in the single shot or in a round, and the last line torn: red if a sample knew what ran before it."""
    whole = evaluator(evaluation__rounds=2).run(params, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluator(stop_after=stop_after, evaluation__rounds=2).run(params, tmp_path / "cut")
    written = lines(tmp_path / "cut")
    assert len(written) <= stop_after < len(lines(tmp_path / "whole"))
    if written:
        (tmp_path / "cut" / "small.jsonl").write_text("\n".join([*written[:-1], written[-1][:40]]))
    resumed = evaluator(slots=3, evaluation__rounds=2).run(params, tmp_path / "cut")
    assert resumed == whole
    for name in ("small.jsonl", "summary.json", "summary.md"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


class FailingVerifier(StubVerifier):
    """Its workers die from the grading after the first `sound` ones on, until `dead` have died."""

    def __init__(self, sound, dead=1000):
        super().__init__()
        self.sound, self.dead = sound, dead

    def check_answer(self, candidate, batch) -> Future:
        self.sound -= 1
        if not -self.dead <= self.sound < 0:
            return super().check_answer(candidate, batch)
        done = Future()
        done.set_result(Score(0.0, {"accuracy": 0.0}, None, "error", detail="the worker died"))
        return done


@pytest.mark.slow
@pytest.mark.parametrize("sound", [20, 30])
def test_what_a_verifier_failed_on_too_often_is_graded_anew(evaluator, params, tmp_path, sound):
    """In the single shot and in a round: red if rows of dead workers count as wrong answers at the next launch."""
    changes = {"evaluation__rounds": 1, "rewards__max_error_fraction": 0.1}
    whole = evaluator(**changes).run(params, tmp_path / "whole")
    failing = evaluator(**changes)
    for _ in range(2):  # and what no start mends is refused again
        failing._verifier = FailingVerifier(sound)
        with pytest.raises(VerifierError, match=r"max_error_fraction. The first: the worker died"):
            failing.run(params, tmp_path / "failed")
        sound = 0
    assert evaluator(**changes).run(params, tmp_path / "failed") == whole
    assert lines(tmp_path / "failed") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_failed_gradings_are_counted_over_all_processes(evaluator, params, monkeypatch):
    """Red if each process judges its own: one would end alone, and the others would wait for it."""
    gathered = []

    def with_another(data):
        other = [["ok", ""]] * 300 if mostly_sound else [["error", "no memory"]] * 300
        gathered.append(json.loads(data))
        return [data, json.dumps(other).encode()]

    failing = evaluator(rewards__max_error_fraction=0.3)
    monkeypatch.setattr(cluster, "gather", with_another)
    monkeypatch.setattr(cluster, "any_of", bool)
    name = next(iter(failing.plan.prompts))
    asked = [RoundPrompt(prompt, (), prompt.tokens) for prompt in failing.plan.prompts[name]]
    for mostly_sound in (True, False):
        failing._verifier = FailingVerifier(0) if mostly_sound else StubVerifier()
        expected = contextlib.nullcontext() if mostly_sound else pytest.raises(VerifierError, match="first: no memory")
        with expected:
            failing._sample(params, name, asked, results.Rows(None, name, None), 0)
    statuses = [{status for status, _ in mine} for mine in gathered]
    assert statuses[0] == {"error"} and "error" not in statuses[1]


@pytest.mark.slow
def test_a_few_failed_gradings_stay_results(evaluator, params, tmp_path):
    """Red if the same command changes the scores of an evaluation that is complete."""
    failing = evaluator(rewards__max_error_fraction=0.2)
    failing._verifier = FailingVerifier(20, dead=2)
    few = failing.run(params, tmp_path)
    kept = lines(tmp_path)
    assert sum('"status": "error"' in line for line in kept) == 2
    assert evaluator(rewards__max_error_fraction=0.2).run(params, tmp_path) == few
    assert lines(tmp_path) == kept
    # All of what is drawn later may fail, as long as it is few of all.
    (tmp_path / "small.jsonl").write_text("\n".join(kept[:-1]) + "\n")
    failing._verifier = FailingVerifier(0, dead=1)
    failing.run(params, tmp_path)
    assert sum('"status": "error"' in line for line in lines(tmp_path)) == 3


@pytest.mark.slow
def test_a_sample_depends_on_seed_benchmark_problem_and_number_alone(evaluator, params):
    """Not on slots, on the other problems, on how many samples there are, or on which of them are there already."""
    whole = answers(evaluator().sampled(params, "small"))
    fewer = {"small": ROWS["small"][3:1:-1]}
    some = answers(evaluator(slots=3, rows=fewer, evaluation__samples=3).sampled(params, "small"))
    assert len(some) == 6 and some.items() <= whole.items()
    for other in (evaluator(seed=6), evaluator(rows={"other": ROWS["small"]})):
        (name,) = other.plan.prompts
        assert answers(other.sampled(params, name)) != whole


@pytest.mark.slow
def test_samples_are_drawn_with_the_temperature_and_the_top_p_of_evaluation(evaluator, params):
    """Without either, and with those of training, the five samples of a problem would differ."""
    greedy = answers(evaluator(evaluation__temperature=0.0).sampled(params, "small"))
    nucleus = answers(evaluator(evaluation__top_p=1e-6).sampled(params, "small"))
    assert nucleus == greedy and all(text == greedy[(*key[:2], 0)] for key, text in greedy.items())


@pytest.mark.slow
def test_where_the_context_ends_a_sample_depends_on_its_own_prompt_alone(evaluator, params, policy):
    """A limit that all prompts share would cut the short ones where the longest ends, and by what is asked beside."""
    max_positions = len(evaluator().plan.prompts["small"][3].tokens) + 3
    whole = evaluator(max_positions=max_positions).sampled(params, "small")
    assert max(row["token_count"] for row in whole.of(9)) == 3 < max(row["token_count"] for row in whole.of(6)) <= 8
    alone = answers(evaluator(max_positions=max_positions, rows={"small": ROWS["small"][:1]}).sampled(params, "small"))
    assert alone.items() <= answers(whole).items()


@pytest.mark.slow
def test_all_processes_compute_as_many_keys(evaluator, params, monkeypatch):
    """One for each benchmark and round, whatever a process lacks: a key is a program on the devices of all of them."""
    keys, key = [], module.stage_key
    monkeypatch.setattr(module, "stage_key", lambda *numbers: keys.append(numbers[2]) or key(*numbers))
    evaluator(evaluation__rounds=1).run(params)
    assert sorted(keys) == [0, 1]


@pytest.mark.slow
def test_more_samples_keep_the_first_ones(evaluator, params, tmp_path):
    whole = evaluator().run(params, tmp_path / "whole")
    evaluator(evaluation__samples=2).run(params, tmp_path / "more")
    kept = lines(tmp_path / "more")
    file = tmp_path / "more" / "small.jsonl"
    file.write_text("".join(f"{line}\n" for i, line in enumerate(kept) if i != 2))  # a gap at a first sample
    assert evaluator().run(params, tmp_path / "more") == whole
    assert lines(tmp_path / "more") == lines(tmp_path / "whole")
    fewer = evaluator(evaluation__samples=2).run(params, tmp_path / "more")
    assert fewer == evaluator(evaluation__samples=2).run(params) != whole  # of the five that are there


@pytest.mark.slow
def test_rounds_choose_a_draft_without_and_with_the_answer(evaluator, params, policy, tmp_path):
    made = evaluator(evaluation__rounds=2)
    one = made.run(params, tmp_path)["small"]
    rows = {results.key_of(row): row for row in map(json.loads, lines(tmp_path))}
    votes, oracles = [], []
    for row in ROWS["small"]:
        drafts = [rows[row.index, (), i] for i in range(3)]
        found = [draft["extracted"] and draft["extracted"].casefold() for draft in drafts]
        counted = [x for x in found if x is not None]
        votes.append(found.index(max(counted, key=lambda x: (counted.count(x), -counted.index(x)))) if counted else 0)
        oracles.append(next((i for i in range(3) if drafts[i]["accuracy"]), 0))
    assert votes != oracles  # so the two can be told apart
    first = one["rounds"][0]
    for chain, chosen in (("vote", votes), ("oracle", oracles)):
        right = [rows[row.index, (), d]["accuracy"] for row, d in zip(ROWS["small"], chosen, strict=True)]
        after = [
            [rows[row.index, (d,), k]["accuracy"] for k in range(SAMPLES)]
            for row, d in zip(ROWS["small"], chosen, strict=True)
        ]
        assert first[chain]["draft_accuracy"] == np.mean(right)
        assert first[chain]["pass@1"] == np.mean(after)
        assert first[chain]["fixed"] == pytest.approx(
            np.mean([[(1 - r) * a for a in some] for r, some in zip(right, after, strict=True)])
        )
        assert sum(first[chain][x] for x in ("fixed", "broken", "kept_right", "kept_wrong")) == pytest.approx(1)
    assert first["oracle"]["draft_accuracy"] > first["vote"]["draft_accuracy"]
    # Where both choose the same draft its samples are drawn once, and nothing else is drawn.
    assert {key[:2] for key in rows if len(key[1]) == 1} == {
        (row.index, (d,)) for chosen in (votes, oracles) for row, d in zip(ROWS["small"], chosen, strict=True)
    }
    assert len(one["rounds"]) == 2 and {len(key[1]) for key in rows} == {0, 1, 2}
    # The single shot is what it is without rounds.
    assert evaluator().run(params, tmp_path / "plain")["small"]["single_shot"] == one["single_shot"]
    text = (tmp_path / "summary.md").read_text()
    assert "| small | 1 | vote | " in text and "| small | 2 | oracle | " in text
    assert "eval/small/refine_1/fixed" in summaries.flat({"small": one})
    assert "eval/small/refine_2_oracle/pass@1" in summaries.flat({"small": one})


class TextVerifier:
    """Compares answers by their text alone, as where a comparison takes too long."""

    def classes(self, found) -> Future:
        done = Future()
        done.set_result([found.index(one) for one in found])
        return done


@pytest.mark.parametrize(("right", "oracle"), [(2, 2), (1, 1), (None, 0)])
def test_a_summary_follows_the_draft_that_was_shown(right, oracle):
    """Answers a, b and B: by what they mean b has two votes and was shown, by their text a.

    The oracle has a prompt of its own, the same one, or shows a, where nothing is right.
    """
    c = settings(evaluation__samples=3, evaluation__rounds=2)
    (prompt,) = [Prompt("p", 4, "q", "y", np.zeros(1, np.int32))]
    rows = results.Rows(None, "small")
    paths = {(), (1,), (oracle,), (1, 1), (oracle, oracle)}
    for drafts in paths:
        for i, answer in enumerate("abB"):
            row = {
                "index": 4,
                "drafts": list(drafts),
                "sample_id": i,
                "extracted": answer,
                "accuracy": float(i == right),
            }
            status = ("ok", "timeout", "error")[i]
            rows.add(row | {"token_count": 10 * sum(drafts) + len(drafts), "finished": True, "status": status})
    plan = SimpleNamespace(prompts={"small": [prompt]})
    found = summaries.Summaries(c, plan, TextVerifier())
    first, second = found.summary("small", rows)["rounds"]
    assert (first["vote"]["mean_length"], first["oracle"]["mean_length"]) == (11, 10 * oracle + 1)
    assert (second["vote"]["mean_length"], second["oracle"]["mean_length"]) == (22, 20 * oracle + 2)
    assert first["vote"]["error_frac"] == 2 / 3
    assert found.chosen([prompt], rows, "vote", 1) == [(0,)]  # what is still to be sampled


def test_a_summary_does_not_follow_what_an_evaluation_with_fewer_drafts_showed():
    """Of drafts a and b the first was shown; of a, b, r, r the vote is r, and so is the oracle's."""
    c = settings(evaluation__samples=1, evaluation__rounds=1, evaluation__drafts=4)
    prompt = Prompt("p", 4, "q", "r", np.zeros(1, np.int32))
    rows = results.Rows(None, "small")
    row = {"index": 4, "token_count": 1, "finished": True, "status": "ok"}
    for path in ((), (0,), (2,)):
        for i, answer in enumerate("abrr"[: 4 if not path else 1]):
            answered = {"drafts": list(path), "sample_id": i, "extracted": answer, "accuracy": float(answer == "r")}
            rows.add(row | answered)
    found = summaries.Summaries(c, SimpleNamespace(prompts={"small": [prompt]}), TextVerifier())
    assert found.chosen([prompt], rows, "vote", 1) == [(2,)]
    assert found.chosen([prompt], rows, "vote", 1, sampled=1) == [(2,)]


def test_a_summary_does_not_follow_what_an_evaluation_with_fewer_samples_showed():
    """By what they mean b and B were shown, B with both samples; by their text the vote is a, as is the oracle's."""
    c = settings(evaluation__samples=2, evaluation__rounds=1)
    prompt = Prompt("p", 4, "q", "y", np.zeros(1, np.int32))
    rows = results.Rows(None, "small")
    for path, texts in (((), "abB"), ((1,), "b"), ((2,), "bb")):
        for i, answer in enumerate(texts):
            rows.add({"index": 4, "drafts": list(path), "sample_id": i, "extracted": answer, "accuracy": 0.0})
    found = summaries.Summaries(c, SimpleNamespace(prompts={"small": [prompt]}), TextVerifier())
    assert found.chosen([prompt], rows, "vote", 1, sampled=2) == [(2,)]


@pytest.mark.slow
def test_the_draft_is_in_the_prompt_as_it_was_sampled(evaluator, params, monkeypatch):
    made = evaluator(evaluation__rounds=1)
    asked = []
    submit = Scheduler.submit
    monkeypatch.setattr(Scheduler, "submit", lambda self, request: (asked.append(request), submit(self, request))[1])
    rows = made.sampled(params, "small", chains=("vote",))
    plain, refined = asked[: len(QUESTIONS)], asked[len(QUESTIONS) :]
    assert len(refined) == len(QUESTIONS)
    for one, other in zip(plain, refined, strict=True):
        (path,) = {key[1] for key in map(results.key_of, rows.values()) if key[0] == other.index and key[1]}
        draft = rows.of(one.index)[path[0]]
        expected = made._renderer.with_draft(one.prompt.question, np.array(draft["tokens"], np.int32))
        np.testing.assert_array_equal(other.tokens, expected)
        assert one.index == other.index and (one.key != other.key).any()


def become(part, number, monkeypatch):
    """Makes `part` the evaluator of process `number` of two, each of which samples by itself."""
    part._process, part._processes = number, 2
    monkeypatch.setattr(part._scheduler.engine, "team", Team(number, 2))


@pytest.mark.slow
def test_processes_split_the_problems(evaluator, params, tmp_path, monkeypatch):
    """In turn, here; `test_evaluate` has two that run side by side."""
    whole = evaluator(evaluation__rounds=1).run(params, tmp_path / "whole")
    parts = [evaluator(evaluation__rounds=1) for _ in range(2)]
    become(parts[1], 1, monkeypatch)
    parts[1].sampled(params, "small", tmp_path / "parts")
    assert {json.loads(line)["index"] for line in (tmp_path / "parts" / "small.process-1.jsonl").open()} == {3, 9}
    become(parts[0], 0, monkeypatch)
    assert parts[0].run(params, tmp_path / "parts") == whole
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["small.jsonl", "summary.json", "summary.md"]


@pytest.mark.slow
def test_without_a_folder_processes_send_each_other_their_rows(evaluator, params, monkeypatch):
    """As `generate` needs them: the first one prints all answers."""
    whole = evaluator(evaluation__rounds=1).sampled(params, "small", chains=("vote",))
    parts = [evaluator(evaluation__rounds=1) for _ in range(2)]
    sent = []
    send = lambda data: (sent.append(data), sent)[1] if b"sample_id" in data else [data]  # not their statuses
    monkeypatch.setattr(cluster, "gather", send)
    monkeypatch.setattr(cluster, "any_of", bool)
    become(parts[1], 1, monkeypatch)
    assert len(list(parts[1].sampled(params, "small", chains=("vote",)).values())) < len(list(whole.values()))
    become(parts[0], 0, monkeypatch)
    assert answers(parts[0].sampled(params, "small", chains=("vote",))) == answers(whole)


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["3", ""])
def test_an_accuracy_is_told_only_where_there_are_reference_answers(evaluator, params, monkeypatch, answer):
    """The questions of `generate` have none: of "accuracy 0.000" nothing is true."""
    notes = []

    @contextlib.contextmanager
    def phase(self, *_):
        yield lambda done, note="": notes.append(note)

    monkeypatch.setattr(Console, "phase", phase)
    questions = {"small": [replace(row, answer=answer) for row in ROWS["small"][:1]]}
    evaluator(rows=questions).sampled(params, "small")
    assert len(notes) == SAMPLES
    assert all(note.startswith("accuracy ") for note in notes) if answer else set(notes) == {""}


@pytest.mark.slow
def test_rows_of_other_problems_or_without_tokens_are_refused(evaluator, params, tmp_path):
    evaluator().run(params, tmp_path)
    other = {"small": [replace(row, question=row.question + "+1") for row in ROWS["small"]]}
    first, said = ROWS["small"][0], rf"^--workdir {re.escape(str(tmp_path))}: its small\.jsonl "
    with pytest.raises(InputError, match=rf"{said}answers different questions .* \(the first is in row {first.id}\)"):
        evaluator(rows=other).run(params, tmp_path)
    other = {"small": [replace(row, answer="x" * 99) for row in ROWS["small"]]}
    values = rf"row {first.id}: '{first.answer}' there, '{'x' * 60}\.\.\.' now"
    words = rf"was graded against different reference answers .* {values}\)"
    with pytest.raises(InputError, match=f"{said}{words}; give another --workdir, or the old small"):
        evaluator(rows=other).run(params, tmp_path)
    with pytest.raises(InputError, match=r"config\.evaluation\.rounds = 1: .*written without rounds"):
        evaluator(evaluation__rounds=1).run(params, tmp_path)


def test_the_plan_fits_the_models_context(policy):
    c = settings()
    renderer = Renderer(policy.tokenizer, c.data, c.refine, c.draft_limit, policy.eos_ids)
    longest = max(len(renderer.plain(question)) for question in QUESTIONS)
    plan = planning.make_plan(c, ROWS, renderer, longest + LENGTH)
    assert (plan.longest_prompt, plan.max_completion, plan.notes) == (longest, LENGTH, [])
    own = planning.make_plan(settings(evaluation__max_completion_length=5), ROWS, renderer, 100)
    assert own.max_completion == own.max_new_tokens == 5  # not that of training
    cut = planning.make_plan(c, ROWS, renderer, longest + 3)
    assert (cut.max_completion, cut.length) == (LENGTH, longest + 3)
    assert f"context of {longest + 3} tokens, 3 tokens after the longest prompt, not at {LENGTH}" in cut.notes[0]
    assert [cut.limit(prompt.tokens) for prompt in cut.prompts["small"]] == [7, 5, 8, 3, 7]
    with pytest.raises(InputError, match=f"problem row 3 of small has {longest} tokens, and the model's context"):
        planning.make_plan(c, ROWS, renderer, longest)
    refining = settings(evaluation__rounds=1)
    short = planning.make_plan(refining, ROWS, renderer, 500).longest_prompt
    assert short == longest + renderer.draft_overhead(4)
    keeps_all = Renderer(policy.tokenizer, c.data, c.refine, 400, policy.eos_ids)
    assert planning.make_plan(refining, ROWS, keeps_all, 500).longest_prompt == short - 4 + LENGTH  # of a draft
    assert planning.make_plan(c, {}, renderer, 10).max_completion == 0  # makes no cache larger


def test_samples_are_the_papers_where_none_are_given():
    c = config.Config()
    assert [planning.samples_per_problem(c, name) for name in ("aime24", "aime25", "math500", "mine")] == [64, 64, 8, 1]
    assert planning.samples_per_problem(settings(), "aime24") == SAMPLES


def test_classes_of_answers():
    """By what they mean: 1/2 is 0.5 and \\frac12; a string comparison would make four classes of the first four."""
    found = ["1/2", "0.5", None, "\\frac{1}{2}", "50\\%", "2", "2.0", "x", None]
    assert grader.classes(found) == [0, 0, -1, 0, 0, 1, 1, 2, -1]
