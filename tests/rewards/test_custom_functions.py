"""igrpo_jax.rewards.functions: what a function of the user receives and may return, and where it failed."""

import asyncio
import dataclasses
import inspect
import math
import sys

import numpy as np
import pytest

from igrpo_jax.errors import InputError
from igrpo_jax.records import Candidate
from igrpo_jax.rewards import functions
from igrpo_jax.rewards.functions import CustomReward, TrainerState

ROWS = [
    Candidate("<answer>4</answer>", "4", question="2+2?", columns={"level": 5}, tokens=np.array([7, 2], np.int32)),
    Candidate("no idea", "4", question="2+2?", columns={"level": 5}, tokens=np.array([1], np.int32), sample_id=1),
]
received = {}
START = TrainerState()


def call(function, state=START, **changes):
    return functions.call(CustomReward(f"{__name__}:{function.__name__}", **changes), ROWS, state)


def everything(**arguments):
    received.clear()
    received.update(arguments)
    return [0, 1]


def named(completions, log_metric, **_):
    log_metric("length", len(completions))
    return [0.0] * len(completions)


def strict(prompts, completions, completion_ids, answer, level):
    return [float(row) for row in level]


def test_what_a_function_receives_has_trls_names():
    call(everything, TrainerState(3, 9), answer_column="solution")
    assert received.pop("log_metric") and received.pop("log_extra")
    state = received.pop("trainer_state")
    assert (state.global_step, state.max_steps) == (3, 9)
    assert (received.pop("stage"), received.pop("drafts")) == ("", [None, None])
    assert received == {
        "prompts": ["2+2?", "2+2?"],
        "completions": ["<answer>4</answer>", "no idea"],
        "completion_ids": [[7, 2], [1]],
        "level": [5, 5],
        "solution": ["4", "4"],
    }


def of_refinements(completions, stage, drafts, **_):
    received.clear()
    received.update(stage=stage, drafts=drafts)
    return [float(text != draft) for text, draft in zip(completions, drafts, strict=True)]


@pytest.mark.parametrize("conversational", [False, True])
def test_a_function_that_asks_for_them_receives_the_stage_and_the_drafts(monkeypatch, conversational):
    of = lambda row, draft: dataclasses.replace(row, stage="refine", draft=draft)
    monkeypatch.setattr(sys.modules[__name__], "ROWS", [of(ROWS[0], None), of(ROWS[1], "no idea"), of(ROWS[1], "5")])
    assert call(of_refinements, conversational=conversational).values == [1.0, 0.0, 1.0]
    shown = [[{"role": "assistant", "content": text}] if conversational else text for text in ("no idea", "5")]
    assert received == {"stage": "refine", "drafts": [None, *shown]}


def test_without_a_reference_answer_a_function_receives_no_column_of_it(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROWS", [dataclasses.replace(row, answer="") for row in ROWS])
    call(everything, answer_column="solution")
    assert received["level"] == [5, 5] and "solution" not in received
    with pytest.raises(TypeError) as missing:
        call(strict)
    assert missing.value.__notes__[0].endswith("prompts, completions, completion_ids and the columns level)")
    monkeypatch.setattr(sys.modules[__name__], "ROWS", [dataclasses.replace(row, columns={}) for row in ROWS])
    with pytest.raises(TypeError) as missing:
        call(strict)
    assert missing.value.__notes__[0].endswith("prompts, completions, completion_ids and no column)")


def test_a_conversational_function_receives_messages():
    call(everything, conversational=True)
    assert received["prompts"] == [[{"role": "user", "content": "2+2?"}]] * 2
    assert received["completions"][1] == [{"role": "assistant", "content": "no idea"}]
    assert received["completion_ids"] == [[7, 2], [1]]


def test_a_function_without_keyword_arguments_receives_what_it_names():
    assert call(strict).values == [5.0, 5.0]
    assert call(named).logged == {"length": [2.0]}


loops = []


async def waits(completions, **_):
    loops.append(asyncio.get_running_loop())
    await asyncio.sleep(0)
    return [len(text) for text in completions]


class Judge:
    async def __call__(self, completions, **_):
        return [1] * len(completions)


asks = Judge()
asks.__name__ = "asks"


def test_an_async_function_is_awaited_in_one_loop_that_lasts():
    """The user's client keeps its connections, which belong to a loop."""
    assert call(waits).values == call(waits).values == [18.0, 7.0]
    assert loops[0] is loops[1] and not loops[0].is_closed()
    assert call(asks).values == [1.0, 1.0]


def arrays(completions, **_):
    return np.array([0.5, 2], np.float32)


def bad_values(completions, **_):
    return [None, "many"]


def test_values_are_numbers_or_none_in_any_collection():
    assert call(arrays).values == [0.5, 2.0]
    none, wrong = call(bad_values).values
    assert math.isnan(none) and wrong.startswith("returned 'many', which is not a number (ValueError")


def unordered(completions, **_):
    return {0.25, 0.5}


def by_number(completions, **_):
    return {0: 0.25, 1: 0.5}


def digits(completions, **_):
    return "01"


@pytest.mark.parametrize(
    ("function", "given"), [(unordered, r"\{0\."), (by_number, r"\{0: 0\.25, 1: 0\.5\}"), (digits, "'01'")]
)
def test_collections_that_are_no_list_of_values_are_refused(function, given):
    """Without an order they would reach the wrong completions; a dictionary would give its keys, a text its digits."""
    with pytest.raises(TypeError, match=rf"must return a list with one number or None per completion, not {given}"):
        call(function)


def reads_answer(answer, **_):
    return [float(text) for text in answer]


def test_the_reference_answer_is_given_and_not_the_cell_that_it_was_read_from():
    cells = [dataclasses.replace(row, columns={"answer": "2 + 2 = 4 #### 4"}) for row in ROWS]
    reward = CustomReward(f"{__name__}:reads_answer")
    assert functions.call(reward, cells, START).values == [4.0, 4.0]


def huge(completions, **_):
    return [-1e200, np.float64(1e18)]


def endless(completions, **_):
    return [math.inf, -math.inf]


def test_a_value_whose_square_leaves_float32_is_an_error_of_its_completion():
    """All advantages of its group would be 0."""
    assert call(huge).values == [
        "returned -1e+200, which is beyond what training can square; return at most 1e+18",
        1e18,
    ]
    assert all("return None to skip a completion" in value for value in call(endless).values)


def logs(completions, log_metric, log_extra, **_):
    log_metric("length", np.float32(18))
    log_metric("length", 7)
    log_metric("odd \ud800 name", True)
    log_extra("words", [len(text.split()) for text in completions])
    log_extra("odd", [math.inf, {"a": 1}])
    log_extra("right", [True, np.bool_(False)])
    log_extra("large", [2**70, 2**62])
    return [0.0] * len(completions)


def too_few(log_extra, **_):
    log_extra("words", [1])


def no_metric(log_metric, **_):
    log_metric("words", "many")


def test_what_a_function_logs():
    """Only what JSON and MessagePack hold travels on: other objects as their text, what is not finite as None."""
    reply = call(logs)
    assert reply.logged == {"length": [18.0, 7.0], "odd ? name": [1.0]}
    assert reply.extra == [
        {"words": 1, "odd": None, "right": True, "large": str(2**70)},
        {"words": 2, "odd": "{'a': 1}", "right": "False", "large": 2**62},
    ]
    assert reply.extra[0]["right"] is True
    with pytest.raises(ValueError, match=r"log_extra\('words'\): 1 value for 2 completions"):
        call(too_few)
    with pytest.raises(ValueError, match="many"):
        call(no_metric)


def wants_reference(completions, **columns):
    return _compared(completions, columns)


def _compared(completions, columns):
    return [text == gold for text, gold in zip(completions, columns["reference"], strict=True)]


def misses(completions, reference, **_):
    return [0.0] * len(completions)


async def breaks_late(completions, **_):
    await asyncio.sleep(0)
    raise RuntimeError("late")


def returns_one(**_):
    return [1.0]


@pytest.mark.parametrize(
    "function, error, place, line",
    [
        (wants_reference, KeyError, "_compared", inspect.getsourcelines(_compared)[1] + 1),
        (misses, TypeError, "misses", inspect.getsourcelines(misses)[1]),
        (breaks_late, RuntimeError, "breaks_late", inspect.getsourcelines(breaks_late)[1] + 2),
        (returns_one, ValueError, "returns_one", inspect.getsourcelines(returns_one)[1]),
    ],
)
def test_an_error_says_where_and_which_columns_there_are(function, error, place, line):
    with pytest.raises(error) as caught:
        call(function, answer_column="gold")
    (note,) = caught.value.__notes__
    given = "it was given prompts, completions, completion_ids and the columns level, gold"
    assert note == f"(in {place}, {__file__}, line {line}; {given})"


def test_a_function_of_a_notebook_is_refused_at_once(monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(
        InputError, match=r"^config\.rewards\.custom = '__main__:rew': the verifier's .* into a file and"
    ):
        functions.load("__main__:rew")
