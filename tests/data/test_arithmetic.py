"""The built-in task: disjoint problems, solutions that grade as they say, and a tokenizer that loses nothing."""

import re

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from igrpo_jax import config
from igrpo_jax.data import arithmetic
from igrpo_jax.data.arithmetic import Problem, problems, solution
from igrpo_jax.errors import InputError
from igrpo_jax.records import Candidate
from igrpo_jax.rewards import verifier

SETTINGS = config.ArithmeticConfig(
    min_terms=2, max_terms=4, max_operand=9, max_total=12, train_problems=300, test_problems=50
)
BOTH = verifier.Rules({"accuracy": 1.0, "format": 1.0})


def test_train_and_test_are_disjoint():
    train, test = problems(SETTINGS, seed=1)
    assert (len(train), len(test)) == (300, 50)
    assert len({problem.question for problem in (*train, *test)}) == 350


def test_problems_depend_on_the_seed_alone():
    assert problems(SETTINGS, seed=1) == problems(SETTINGS, seed=1)
    assert problems(SETTINGS, seed=1)[0] != problems(SETTINGS, seed=2)[0]


def test_the_test_problems_stay_when_more_are_asked_for():
    """So that evaluations of runs with larger training sets compare."""
    larger = config.ArithmeticConfig(**{**vars(SETTINGS), "train_problems": 400})
    assert problems(larger, seed=1)[1] == problems(SETTINGS, seed=1)[1]


def test_problems_are_of_the_stated_size():
    train, test = problems(SETTINGS, seed=3)
    for problem in (*train, *test):
        assert 2 <= len(problem.steps) + 1 <= 4
        assert re.fullmatch(r"\d([+-]\d)+", problem.question)
        assert problem.answer == eval(problem.question)
        total = problem.first
        for operator, operand in problem.steps:
            total += operand if operator == "+" else -operand
            assert 0 <= total <= 12 and 1 <= operand <= 9


def test_too_few_different_problems():
    settings = config.ArithmeticConfig(min_terms=2, max_terms=2, max_operand=2, train_problems=50, test_problems=5)
    with pytest.raises(InputError, match=r"config\.data\.arithmetic\.train_problems = 50: found only \d+ different"):
        problems(settings, seed=0)


def steps_right(problem, text):
    """Of each written step, whether it follows from the number before it; and that the answer is the last number."""
    thought, answer = re.fullmatch(r"<think>(.*)</think><answer>(-?\d+)</answer>", text).groups()
    numbers = [int(x) for x in re.findall(r"(?:^|=)(-?\d+)", thought)]
    assert len(numbers) == len(problem.steps) + 1 and numbers[0] == problem.first
    assert answer == str(numbers[-1])
    moves = [operand if operator == "+" else -operand for operator, operand in problem.steps]
    return [after == before + move for before, after, move in zip(numbers, numbers[1:], moves, strict=False)]


def test_a_teacher_without_errors_scores_full_marks():
    rng = np.random.default_rng(0)
    for problem in problems(SETTINGS, seed=0)[1]:
        text = solution(problem, 0.0, 12, rng)
        assert all(steps_right(problem, text))
        graded = verifier.score(Candidate(text, str(problem.answer)), BOTH)
        assert (graded.reward, graded.status) == (2.0, "ok")
        assert verifier.score(Candidate(text, str(problem.answer + 1)), BOTH).rewards == {
            "accuracy": 0.0,
            "format": 1.0,
        }


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_the_share_of_wrong_steps(rate):
    """An error is any of the 13 totals, the right one among them: at rate 1 a 13th is right by luck, not none."""
    rng, train = np.random.default_rng(0), problems(SETTINGS, seed=0)[0]
    texts = [(problem, solution(problem, rate, 12, rng)) for problem in train * 5]
    right = np.concatenate([steps_right(*pair) for pair in texts])
    assert len(right) > 2000
    assert right.mean() == pytest.approx(1 - rate + rate / 13, abs=0.03)  # some totals can't be right: a little less
    if rate == 1:
        assert right.mean() > 0.02
    for problem, text in texts[:60]:
        said = int(re.search(r"<answer>(-?\d+)", text).group(1))
        graded = verifier.score(Candidate(text, str(problem.answer)), BOTH)
        assert graded.rewards == {"accuracy": float(said == problem.answer), "format": 1.0}
        assert graded.extracted == str(said)


def test_a_problem_written_out():
    problem = Problem(7, (("+", 5), ("-", 3)))
    assert problem.question == "7+5-3"
    assert problem.answer == 9
    text = solution(problem, 0.0, 20, np.random.default_rng(0))
    assert steps_right(problem, text) == [True, True]
    assert [int(x) for x in re.findall(r"=(\d+)", text)] == [12, 9]


ASCII = "".join(map(chr, range(32, 127)))
TEXTS = (ASCII, "<think>7+5=12\n</think><answer> 12  </answer>", "  two  spaces, 'quotes' .\n\n", "")


@pytest.mark.parametrize("saved", [None, AutoTokenizer, PreTrainedTokenizerFast])
def test_the_tokenizer_loses_nothing(tmp_path, saved):
    """Every character is one token, each tag one, before and after a round trip through files."""
    tokenizer = arithmetic.tokenizer()
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = saved.from_pretrained(tmp_path)
    for text in TEXTS:
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(encoded) == text
        assert tokenizer.unk_token_id not in encoded
        tags = re.findall("</?(?:think|answer)>", text)
        assert len(encoded) == len(text) - sum(len(tag) - 1 for tag in tags)
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    assert tokenizer.pad_token_id == 0 and len(tokenizer) == 9 + 96
    message = [{"role": "user", "content": "1+1"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>1+1<|assistant|>"
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 5
    # Tags are words of an answer, not special: they survive skip_special_tokens.
    tagged = tokenizer("<think>1</think><|end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tagged, skip_special_tokens=True) == "<think>1</think>"
