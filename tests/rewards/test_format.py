"""igrpo_jax.rewards.format: exactly one think block, then one answer block."""

import time
import timeit

import pytest

from igrpo_jax.rewards.format import format_reward, overlong_penalty

GOOD = [
    "<think>a</think><answer>b</answer>",
    " \n<think>\nlong\n\nthought\n</think>\n\n<answer>\n42\n</answer>\n",
    "<think></think><answer></answer>",
    "<think>1 < 2 and 3 > 2</think> <answer>$x<3$</answer>",
]
BAD = {
    "": "empty",
    "42": "no tags",
    "<think>a</think>": "no answer",
    "<answer>b</answer>": "no thought",
    "<think>a</think>b": "answer outside its tags",
    "a</think><answer>b</answer>": "think opened by the template, but the opening was forgotten",
    "<think>a<answer>b</answer>": "think never closed",
    "<think>a</think><answer>b": "cut off by the length limit",
    "<think>a</think><answer>b</answer>.": "text after the answer",
    "So: <think>a</think><answer>b</answer>": "text before",
    "<think>a</think> so <answer>b</answer>": "text between",
    "<think>a</think><think>a</think><answer>b</answer>": "two thoughts",
    "<think>a</think><answer>b</answer><answer>c</answer>": "two answers",
    "<think><answer>b</answer></think>": "answer inside the thought",
    "<think>a<answer></think>b</answer>": "blocks that overlap",
    "<answer>b</answer><think>a</think>": "wrong order",
    "</think>a<think><answer>b</answer>": "closed before it is opened",
    "<THINK>a</THINK><ANSWER>b</ANSWER>": "upper case",
    "<think>a</think></answer>b<answer>": "answer closed before it is opened",
    "<think>a</think><answer><answer>b</answer>": "answer opened twice",
    "<think>a</think><answer><think>b</answer>": "thought opened in the answer",
    "<think>a<think>b</think><answer>c</answer>": "the opening began the block and the model opened it again",
}


@pytest.mark.parametrize("text", GOOD)
def test_one_block_of_each(text):
    assert format_reward(text) == 1.0


@pytest.mark.parametrize("text", BAD, ids=BAD.values())
def test_anything_else(text):
    assert format_reward(text) == 0.0


def test_linear_time():
    # A pattern such as <think>.*</think>.*<answer>.*</answer> needs minutes on these.
    def score():
        for tag in ("<think>", "</think>", "<think></think>", "<answer>", "<"):
            assert format_reward(tag * 100_000) == 0.0
        assert format_reward("<think>" + "a\n " * 300_000 + "</think><answer>b</answer>") == 1.0

    assert timeit.timeit(score, timer=time.thread_time, number=1) < 2


def test_overlong_penalty():
    """L_max 100, L_cache 20 (2503.14476, Eq. 13): nothing up to 80, -1/20 for every token more."""
    lengths = [1, 80, 81, 90, 99, 100, 120]
    assert [overlong_penalty(n, 100, 20) for n in lengths] == pytest.approx([0, 0, -0.05, -0.5, -0.95, -1, -1])
    assert [overlong_penalty(n, 100, 100) for n in (1, 50, 100)] == pytest.approx([-0.01, -0.5, -1])


def test_overlong_penalty_equals_trl():
    trl = pytest.importorskip("trl.rewards", reason="TRL is not installed; the extra parity brings it")
    theirs = trl.get_soft_overlong_punishment(max_completion_len=50, soft_punish_cache=13)
    expected = theirs(completion_ids=[[0] * n for n in range(60)])
    assert [overlong_penalty(n, 50, 13) for n in range(60)] == pytest.approx(expected, abs=1e-12)
