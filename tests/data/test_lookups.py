"""The second built-in task: disjoint problems, teachers whose mistakes are as frequent as they say, and the table."""

import re

import numpy as np
import pytest

from igrpo_jax import config
from igrpo_jax.data import arithmetic, builtin, lookups
from igrpo_jax.data.lookups import TABLE, Problem, checked, problems, solution
from igrpo_jax.data.problems import evaluation_rows, training_set
from igrpo_jax.errors import InputError
from igrpo_jax.records import Candidate
from igrpo_jax.rewards import verifier

SETTINGS = config.LookupsConfig(items=12, train_problems=300, test_problems=50)
ACCURACY = verifier.Rules({"accuracy": 1.0})


def digits_of(text):
    return np.array(list(map(int, re.fullmatch(r"<answer>(\d+)</answer>", text).group(1))))


def test_train_and_test_are_disjoint_and_depend_on_the_seed_alone():
    train, test = problems(SETTINGS, seed=1)
    assert (len(train), len(test)) == (300, 50)
    assert len({problem.question for problem in (*train, *test)}) == 350
    assert problems(SETTINGS, seed=1) == (train, test)
    assert problems(SETTINGS, seed=2)[0] != train
    larger = config.LookupsConfig(items=12, train_problems=400, test_problems=50)
    assert problems(larger, seed=1)[1] == test  # evaluations of runs with larger training sets compare
    for problem in (*train, *test):
        assert re.fullmatch(r"[a-zA-Z]{12}", problem.question)
        assert re.fullmatch(r"[1-9]\d{11}", problem.answer)


def test_too_few_different_problems():
    """47 of the 52 letters have another digit than 0, which a first digit may not be."""
    with pytest.raises(InputError, match=r"config\.data\.lookups\.train_problems = 47: found only 47 different"):
        problems(config.LookupsConfig(items=1, train_problems=47, test_problems=1), seed=0)
    assert len(problems(config.LookupsConfig(items=1, train_problems=46, test_problems=1), seed=0)[0]) == 46


def test_the_table_and_a_problem_written_out():
    """Cubes modulo 53 by hand: 10^3 = 46 + 18 x 53, 26^3 = 33 + 331 x 53, 3^3 = 27, 52^3 = (-1)^3 = 52 - 53."""
    problem = Problem("jzcZ")
    assert (problem.question, problem.answer) == ("jzcZ", "6372")
    counts = np.bincount(TABLE)
    assert counts.sum() == 52 and set(counts) == {5, 6}  # one guess for all letters is right for a tenth of them


def test_a_teacher_without_errors_scores_and_one_wrong_look_up_does_not():
    for problem in problems(SETTINGS, seed=0)[1]:
        text = solution(problem, 0.0, np.random.default_rng(0))
        graded = verifier.score(Candidate(text, problem.answer), ACCURACY)
        assert (graded.reward, graded.extracted) == (1.0, problem.answer)
        other = text.replace(problem.answer, problem.answer[:-1] + str((int(problem.answer[-1]) + 1) % 10))
        assert verifier.score(Candidate(other, problem.answer), ACCURACY).reward == 0.0
        assert (digits_of(solution(problem, 1.0, np.random.default_rng(0))) != problem.digits).all()


@pytest.mark.parametrize(("error", "draft_error", "right"), [(0.3, 0.3, 0.84), (0.5, 0.5, 0.6111), (0.5, 0.2, 0.6944)])
def test_a_teacher_that_checks_is_right_more_often_than_one_that_does_not(error, draft_error, right):
    """By hand for .5 and .5: both right .25; both wrong and alike .5 x .5 / 9 = .0278; else, .7222, half of it right.

    A teacher that trusted the draft where they differ, or copied it, would be as good as the draft. 18,000 digits: std
    .0037.
    """
    rng, train = np.random.default_rng(0), problems(SETTINGS, seed=0)[0]
    truth = np.stack([problem.digits for problem in train * 5])
    shown = [solution(problem, draft_error, rng) for problem in train * 5]
    texts = [checked(problem, error, draft, rng) for problem, draft in zip(train * 5, shown, strict=True)]
    drafts, refined = (np.stack([digits_of(text) for text in column]) for column in (shown, texts))
    assert (drafts == truth).mean() == pytest.approx(1 - draft_error, abs=0.01)
    assert (refined == truth).mean() == pytest.approx(right, abs=0.01)
    alone = np.stack([digits_of(solution(problem, error, rng)) for problem in train * 5])
    assert (alone == truth).mean() == pytest.approx(1 - error, abs=0.01)
    # A wrong digit of the draft is repaired as often as it is solved alone, and seldom kept.
    wrong = drafts != truth
    assert (refined == truth)[wrong].mean() == pytest.approx((1 - error / 9) * (1 - error), abs=0.02)


def test_examples_of_the_warm_start():
    """Arithmetic draws a draft and then the solution. A teacher of look-ups may check the draft or ignore it."""
    settings = config.WarmStartConfig(error_rate=0.2, draft_error_rate=0.7)
    sums = config.Config(warm_start=settings)
    (problem, *_), _ = builtin.TASKS["arithmetic"].problems(sums)
    rng, twin = np.random.default_rng(4), np.random.default_rng(4)
    example = builtin.TASKS["arithmetic"].example
    by_hand = arithmetic.solution(problem, 0.7, 20, twin), arithmetic.solution(problem, 0.2, 20, twin)
    assert example(sums, problem, True, rng) == by_hand
    assert example(sums, problem, False, rng) == (None, arithmetic.solution(problem, 0.2, 20, twin))

    chosen = lambda **teacher: config.Config(
        data=config.DataConfig(task="lookups", lookups=SETTINGS), warm_start=config.WarmStartConfig(**teacher)
    )
    task = builtin.TASKS["lookups"]
    problem = task.problems(chosen())[0][0]
    draft, completion = task.example(chosen(error_rate=0.0, draft_error_rate=1.0), problem, True, rng)
    assert (digits_of(draft) != problem.digits).all() and (digits_of(completion) == problem.digits).all()
    assert task.example(chosen(error_rate=0.0), problem, False, rng) == (None, completion)
    # One that checks and is always wrong keeps a wrong digit only where it comes upon the same one; else looks again.
    wrong = chosen(error_rate=1.0, draft_error_rate=0.0, refinements="checked")
    draft, completion = task.example(wrong, problem, True, rng)
    assert (digits_of(draft) == problem.digits).all() and (digits_of(completion) != problem.digits).all()
    checking = chosen(error_rate=0.4, draft_error_rate=0.3, refinements="checked")
    seeded, twin = (lambda: np.random.default_rng(9)), np.random.default_rng(9)
    draft = solution(problem, 0.3, again := seeded())
    assert task.example(checking, problem, True, seeded()) == (draft, checked(problem, 0.4, draft, again))
    apart = solution(problem, 0.3, twin), solution(problem, 0.4, twin)
    assert task.example(chosen(error_rate=0.4, draft_error_rate=0.3), problem, True, seeded()) == apart


@pytest.mark.parametrize(("task", "draft_error_rate"), [("arithmetic", 0.1), ("arithmetic", 1.0), ("lookups", 0.9)])
def test_the_teacher_of_verdicts_says_whether_the_draft_is_right(task, draft_error_rate):
    """Half of the drafts are right, how often a teacher with this error rate may be right; and no verdict errs."""
    teacher = config.WarmStartConfig(refinements="verdicts", draft_error_rate=draft_error_rate, error_rate=1.0)
    settings = config.Config(data=config.DataConfig(task=task, lookups=SETTINGS), warm_start=teacher)
    chosen, rng = builtin.TASKS[task], np.random.default_rng(3)
    verdicts = []
    for problem in chosen.problems(settings)[0][:400]:
        draft, completion = chosen.example(settings, problem, True, rng)
        stated = draft[draft.index("<answer>") + 8 : draft.index("</answer>")]
        assert completion == f"<answer>{int(stated == str(problem.answer))}</answer>"
        verdicts.append(completion)
        draft, completion = chosen.example(settings, problem, False, rng)
        assert draft is None and completion not in ("<answer>0</answer>", "<answer>1</answer>")
    right = np.mean([verdict == "<answer>1</answer>" for verdict in verdicts])
    assert 0.42 < right < 0.58  # std .025


def test_a_teacher_that_hears_the_critique_repeats_right_drafts_and_checks_wrong_ones():
    """With no errors of its own it mends every wrong draft; always wrong, it still repeats the right ones."""
    for error_rate in (0.0, 1.0):
        teacher = config.WarmStartConfig(refinements="critiqued", draft_error_rate=0.5, error_rate=error_rate)
        settings = config.Config(data=config.DataConfig(task="lookups", lookups=SETTINGS), warm_start=teacher)
        chosen, rng = builtin.TASKS["lookups"], np.random.default_rng(3)
        right = []
        for problem in chosen.problems(settings)[0][:200]:
            draft, completion = chosen.example(settings, problem, True, rng)
            right.append(builtin.is_right(problem, draft))
            assert builtin.is_right(problem, completion) == (right[-1] or error_rate == 0.0)
            assert not right[-1] or completion == draft
        assert 0.4 < np.mean(right) < 0.6  # std .035


def test_a_teacher_that_hears_the_critique_needs_it_in_the_prompt():
    tree = config.default()
    tree.data.task, tree.warm_start.refinements = "lookups", "critiqued"
    with pytest.raises(InputError, match=r"warm_start\.refinements = 'critiqued': only \{verdict\} tells the model"):
        config.freeze(tree)
    tree.refine.instruction = "{verdict} {draft}"
    config.freeze(tree)


@pytest.mark.parametrize("refinements", ["verdicts", "critiqued"])
def test_a_teacher_of_verdicts_has_wrong_drafts(refinements):
    tree = config.default()
    tree.data.task, tree.refine.instruction = "lookups", "{verdict} {draft}"
    tree.warm_start.refinements, tree.warm_start.draft_error_rate = refinements, 0.0
    with pytest.raises(InputError, match=r"warm_start\.draft_error_rate = 0\.0: half of the drafts are wrong"):
        config.freeze(tree)


def test_a_run_trains_and_evaluates_on_the_task_that_is_named():
    data = config.DataConfig(task="lookups", lookups=SETTINGS)
    both = config.EvaluationConfig(benchmarks=("lookups", "arithmetic"))
    settings = config.Config(data=data, evaluation=both)
    train, test = lookups.problems(SETTINGS, 0)
    assert [row.question for row in training_set(settings, {}).rows] == [problem.question for problem in train]
    rows = evaluation_rows(settings)
    assert [(row.question, row.answer) for row in rows["lookups"]] == [(each.question, each.answer) for each in test]
    assert re.fullmatch(r"\d+([+-]\d+)+", rows["arithmetic"][0].question)
    # The built-in tokenizer has a token for every character: 12 letters, and 12 digits in tags.
    tokenizer = arithmetic.tokenizer()
    counts = [
        len(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (train[0].question, solution(train[0], 0.5, np.random.default_rng(0)))
    ]
    assert counts == [12, 14]


@pytest.mark.parametrize("refinements", ["checked", "critiqued"])
def test_only_look_ups_can_be_checked(refinements):
    tree = config.default()
    tree.warm_start.refinements, tree.refine.instruction = refinements, "{verdict} {draft}"
    with pytest.raises(InputError, match=rf"warm_start\.refinements = '{refinements}': .* set data.task to lookups"):
        config.freeze(tree)
    tree.data.task = "lookups"
    config.freeze(tree)
