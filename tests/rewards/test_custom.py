"""igrpo_jax.rewards.custom: a function of the user sees all completions of a request at once, in their order.

Workers import this file, so it must not import jax.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from absl import logging

from igrpo_jax import config
from igrpo_jax.errors import InputError
from igrpo_jax.records import Candidate, Score
from igrpo_jax.rewards import custom as custom_calls
from igrpo_jax.rewards.custom import Batch, rehearse
from igrpo_jax.rewards.functions import ON_REQUEST, CustomReward
from igrpo_jax.rewards.rules import total
from igrpo_jax.rewards.verifier import Verifier, check, custom_rewards

RIGHT = "<think>2+2</think><answer>4</answer>"


def by_length(prompts, completions, solution, level, completion_ids, **columns):
    """A reward function as users of TRL write it; it gives no value for the question "skip"."""
    assert len(prompts) == len(completions) == len(solution) == len(level) == len(completion_ids)
    assert set(columns) == set(ON_REQUEST)
    assert all(isinstance(ids, list) for ids in completion_ids)
    rows = zip(prompts, completions, solution, level, completion_ids, strict=True)
    return [
        None if prompt == "skip" else len(text) + row_level + len(answer) / 10 + sum(ids) / 1000
        for prompt, text, answer, row_level, ids in rows
    ]


def position(completions, completion_ids, **columns):
    """Tells each completion the batch's size, its place in it, and how many tokens the first one has."""
    return [100 * len(completions) + 10 * place + len(completion_ids[0]) for place in range(len(completions))]


def length(completions, **columns):
    return [len(text) for text in completions]


def above_mean(completions, **columns):
    """A reward relative to the group."""
    lengths = [len(text) for text in completions]
    return [length - sum(lengths) / len(lengths) for length in lengths]


def by_word(completions, **columns):
    """Does what the first word of a completion says; where all are well, gives 10 times the batch's size and more."""
    for text in completions:
        if text == "raise":
            raise ZeroDivisionError("broken")
        if text == "hang":
            time.sleep(1000)
        if text == "exit":
            os._exit(3)
    special = {"nan": math.nan, "inf": math.inf, "word": "many", "none": None}
    return [special.get(text, 10.0 * len(completions) + len(text)) for text in completions]


def count_of_good(completions, **columns):
    """Forgets the value of a bad row."""
    return [float(len(completions)) for text in completions if text != "bad"]


def first_only(completions, **columns):
    """Written for one completion per call."""
    return [float(len(completions[0]))]


def wrong_length(prompts, completions, **columns):
    return [1.0, 2.0]


def not_finite(prompts, completions, **columns):
    return [float("nan")]


def no_list(prompts, completions, **columns):
    return 1.0


def accuracy(prompts, completions, **columns):
    return [1.0]


number = 3


def custom(name):
    return f"{__name__}:{name}"


def settings(name, **changes):
    options = {"accuracy": 0.0, "format": 0.0, "workers": 1, "timeout": 5.0} | changes
    return config.RewardsConfig(custom=custom(name), **options)


def scores(verifier, texts: Sequence[str], order: Sequence[int] | None = None) -> list[Score]:
    """Returns the scores of the completions of one request, which arrive in this order."""
    batch = Batch(len(texts))
    futures = {}
    for sample_id in order or range(len(texts)):
        assert not any(future.done() for future in futures.values())
        tokens = np.zeros(len(texts[sample_id]), np.int32)
        candidate = Candidate(texts[sample_id], "4", tokens=tokens, sample_id=sample_id)
        futures[sample_id] = verifier.submit(candidate, batch)
    return [futures[sample_id].result(timeout=60) for sample_id in range(len(texts))]


def statuses(graded: Sequence[Score]) -> list[tuple[str, float | None]]:
    return [(each.status, None if math.isnan(each.reward) else each.reward) for each in graded]


@pytest.mark.slow
def test_a_reward_of_the_users_own():
    candidate = Candidate("abc", "42", "", "what?", {"level": 5}, np.array([7, 2], np.int32))
    both = settings("by_length", accuracy=1.0, custom_weight=2.0)
    with Verifier(both, answer_column="solution") as verifier:
        futures = [verifier.submit(c) for c in (candidate, dataclasses.replace(candidate, question="skip"))]
        full, skipped = (future.result(timeout=60) for future in futures)
    assert full.rewards == {"accuracy": 0.0, "by_length": pytest.approx(8.209)}
    assert full.reward == pytest.approx(2 * 8.209)
    assert full.status == "unparseable" and full.seconds > 0
    # None: the others decide.
    assert skipped.reward == 0.0 and skipped.status == "unparseable" and math.isnan(skipped.rewards["by_length"])


@pytest.mark.slow
def test_nothing_but_none_is_no_verdict():
    with Verifier(settings("by_length"), answer_column="solution") as verifier:
        graded = verifier.submit(Candidate("abc", "42", "", "skip", {"level": 5})).result(timeout=60)
    assert math.isnan(graded.reward) and graded.status == "invalid" and "None" in graded.detail


@pytest.mark.slow
def test_the_rows_of_a_batch_have_their_own_columns():
    rows = [
        Candidate("abc", "42", "", "what?", {"level": 5}, np.array([7, 2], np.int32), 1),
        Candidate("ab", "42", "", "what?", {"level": 5}, np.array([1], np.int32), 0),
    ]
    batch = Batch(2)
    with Verifier(settings("by_length"), answer_column="solution") as verifier:
        futures = [verifier.submit(row, batch) for row in rows]
        rewards = [future.result(timeout=60).reward for future in futures]
    assert rewards == [pytest.approx(8.209), pytest.approx(7.201)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (custom("missing"), "cannot be imported .*missing.*module:function"),
        ("no_such_module:f", "cannot be imported .*no_such_module.*module:function"),
        (custom("number"), "must be a function, not int"),
        (custom("accuracy"), "is a reward of the library; rename"),
    ],
)
def test_a_custom_reward_that_cannot_be_used(path, message):
    for refuse in (custom_rewards, check, Verifier):
        with pytest.raises(InputError, match=rf"config\.rewards\.custom = '{path}'.*{message}"):
            refuse(config.RewardsConfig(custom=path))
        with pytest.raises(InputError, match=rf"config\.rewards\.functions = '{path}'.*{message}"):
            refuse(config.RewardsConfig(functions=(custom("position"), path)))


@pytest.mark.slow
def test_a_custom_reward_of_weight_zero_is_computed_and_counts_for_nothing():
    """As in TRL. Alone it is no verdict."""
    with Verifier(settings("length", custom_weight=0.0, accuracy=1.0)) as verifier:
        graded = verifier.submit(Candidate(RIGHT, "4"), Batch(1)).result(timeout=60)
    assert graded.reward == 1.0 and graded.rewards == {"accuracy": 1.0, "length": len(RIGHT)}
    skipped = Score(0.0, {"accuracy": math.nan, "length": 3.0}, None, "ok")
    assert total(skipped, {"accuracy": 1.0, "length": 0.0}).status == "invalid"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "detail"),
    [
        (
            "wrong_length",
            "ValueError: must return a list with one number or None per completion: 2 values for 1 completion",
        ),
        ("not_finite", "returned nan; return None to skip a completion"),
        ("no_list", "TypeError: must return a list with one number or None per completion, not 1.0"),
    ],
)
def test_what_a_custom_reward_returns_is_checked(name, detail):
    with Verifier(settings(name, accuracy=1.0)) as verifier:
        graded = verifier.submit(Candidate(RIGHT, "4")).result(timeout=60)
    assert graded.status == "error" and graded.detail.startswith(f"{custom(name)}: {detail}")
    assert math.isnan(graded.reward) and graded.rewards == {"accuracy": math.nan, name: math.nan}


@pytest.mark.slow
def test_a_batch_is_seen_at_once_in_the_order_of_its_samples():
    texts = ["a", "bb", "ccc"]
    with Verifier(settings("position")) as verifier:
        for order in itertools.permutations(range(3)):
            assert [each.reward for each in scores(verifier, texts, order)] == [301.0, 311.0, 321.0]
        alone = verifier.submit(Candidate("bb", "4", tokens=np.zeros(2, np.int32))).result(timeout=60)
    assert alone.reward == 102.0


@pytest.mark.slow
def test_batches_that_arrive_mixed_stay_apart():
    first, second = Batch(2), Batch(3)
    with Verifier(settings("position", workers=2)) as verifier:
        arrivals = [(second, 7), (first, 1), (second, 5), (first, 0), (second, 6)]
        futures = {
            (batch.size, sample_id): verifier.submit(
                Candidate("x", "4", tokens=np.zeros(sample_id, np.int32), sample_id=sample_id), batch
            )
            for batch, sample_id in arrivals
        }
        rewards = {key: future.result(timeout=60).reward for key, future in futures.items()}
    assert rewards == {(2, 0): 200.0, (2, 1): 210.0, (3, 5): 305.0, (3, 6): 315.0, (3, 7): 325.0}


@pytest.mark.slow
def test_a_reward_relative_to_the_group_and_other_rewards():
    with Verifier(settings("above_mean", accuracy=1.0, format=0.5, custom_weight=2.0)) as verifier:
        graded = scores(verifier, [RIGHT, "no", RIGHT + "!!"], (2, 0, 1))
    lengths = [len(RIGHT), 2, len(RIGHT) + 2]
    relative = [length - sum(lengths) / 3 for length in lengths]
    assert [each.rewards for each in graded] == [
        {"accuracy": 1.0, "format": 1.0, "above_mean": pytest.approx(relative[0])},
        {"accuracy": 0.0, "format": 0.0, "above_mean": pytest.approx(relative[1])},
        {"accuracy": 1.0, "format": 0.0, "above_mean": pytest.approx(relative[2])},
    ]
    assert graded[0].reward == pytest.approx(1.5 + 2 * relative[0])
    assert [(each.status, each.extracted) for each in graded] == [("ok", "4"), ("unparseable", None), ("ok", "4")]
    assert all(each.seconds > 0 for each in graded)


@pytest.mark.slow
def test_none_and_values_that_are_wrong_concern_their_own_row():
    """The others keep the values of the batch of five."""
    with Verifier(settings("by_word")) as verifier:
        graded = scores(verifier, ["fine", "nan", "none", "word", "inf"])
    assert [each.status for each in graded] == ["ok", "error", "invalid", "error", "error"]
    assert graded[0].reward == 54.0 and math.isnan(graded[2].reward)
    assert graded[1].detail == f"{custom('by_word')}: returned nan; return None to skip a completion"
    assert graded[3].detail.startswith(f"{custom('by_word')}: returned 'many', which is not a number (ValueError")
    assert math.isnan(graded[4].reward) and "returned inf" in graded[4].detail


@pytest.mark.slow
def test_the_call_of_a_batch_that_fails_is_repeated_one_by_one_and_then_without_what_fails():
    with Verifier(settings("by_word", format=1.0, workers=2)) as verifier:
        raised = scores(verifier, ["fine", "raise", "good one"])
        died = scores(verifier, ["fine", "exit", "good one"], (2, 1, 0))
    assert statuses(raised) == statuses(died) == [("ok", 24.0), ("error", None), ("ok", 28.0)]
    assert raised[1].rewards == {"format": math.nan, "by_word": math.nan}
    assert raised[1].detail.startswith(f"{custom('by_word')}: ZeroDivisionError: broken (in by_word, {__file__}, line ")
    assert died[1].detail == f"{custom('by_word')}: the worker ended with code 3"


def below_zero(completions, **columns):
    """Its best value is 0, which is the distance of the right answer."""
    return [-abs(float(text) - 4) if text.isdigit() else "?" for text in completions]


@pytest.mark.slow
def test_a_failure_is_not_the_best_of_rewards_below_zero():
    with Verifier(settings("below_zero")) as verifier:
        graded = scores(verifier, ["1", "3", "2", "malformed"])
    assert statuses(graded) == [("ok", -3.0), ("ok", -1.0), ("ok", -2.0), ("error", None)]


@pytest.mark.slow
def test_a_wrong_number_of_values_is_repeated_one_by_one():
    with Verifier(settings("count_of_good")) as verifier:
        graded = scores(verifier, ["good", "bad", "good"])
    assert statuses(graded) == [("ok", 2.0), ("error", None), ("ok", 2.0)]
    expected = "must return a list with one number or None per completion: 0 values for 1 completion"
    assert graded[1].detail.startswith(f"{custom('count_of_good')}: ValueError: {expected} (in count_of_good, ")


@pytest.mark.slow
def test_a_function_written_for_one_completion_still_works(monkeypatch):
    """It is called again for each completion, and the log says why."""
    logged = []
    monkeypatch.setattr(logging, "log_every_n", lambda level, text, n, *args: logged.append(text % args))
    with Verifier(settings("first_only")) as verifier:
        assert statuses(scores(verifier, ["a", "bbb"])) == [("ok", 1.0), ("ok", 3.0)]
    (line,) = logged
    assert f"{custom('first_only')} failed on a batch of 2 completions" in line and "1 value for 2 completions" in line


@pytest.mark.slow
def test_one_row_that_hangs_times_out_alone():
    """The call of the batch is killed; then only the call of the row that hangs is. The others are called together."""
    with Verifier(settings("by_word", timeout=1.0, workers=2)) as verifier:
        graded = scores(verifier, ["fine", "hang", "good one"])
    assert statuses(graded) == [("ok", 24.0), ("timeout", None), ("ok", 28.0)]
    assert graded[1].detail == f"{custom('by_word')}: no result within 1.0 s" and graded[1].seconds == 1.0


def relative(completions, log_metric, log_extra, **columns):
    """Takes no "bad" completion, no two that are "odd" in one batch, and more than 2 s for a batch of "slow" ones."""
    if "bad" in completions or completions.count("odd") > 1:
        raise ValueError("broken")
    time.sleep(1.5 * (completions.count("slow") > 1) * len(completions))
    log_metric("calls", len(completions))
    log_extra("size", [len(completions)] * len(completions))
    return above_mean(completions)


@pytest.mark.slow
def test_values_relative_to_the_group_are_so_without_the_completions_that_fail():
    with Verifier(settings("relative", timeout=1.0)) as verifier:
        graded = scores(verifier, ["bad", "good", "better", "bad", "the best"], (4, 3, 2, 1, 0))
        both_fail = scores(verifier, ["bad", "odd", "odd"])
        too_slow = scores(verifier, ["slow", "slow"])
        one_left = scores(verifier, ["bad", "good"])
    assert statuses(graded) == [("error", None), ("ok", -2.0), ("ok", 0.0), ("error", None), ("ok", 2.0)]
    assert [each.logged for each in graded[1:3]] == [{"calls": [3.0]}] * 2 and graded[4].extra == {"size": 3}
    assert (graded[0].logged, graded[0].extra) == ({}, {})
    assert statuses(both_fail) == [("error", None), ("ok", 0.0), ("ok", 0.0)] and both_fail[1].extra == {"size": 1}
    assert statuses(too_slow) == [("ok", 0.0)] * 2 and too_slow[0].logged == {"calls": [1.0]}
    assert statuses(one_left) == [("error", None), ("ok", 0.0)]


def slow(completions, **columns):
    time.sleep(0.6 * len(completions))
    return [float(len(completions)) for _ in completions]


@pytest.mark.slow
def test_a_batch_has_as_much_time_as_its_completions_together():
    with Verifier(settings("slow", timeout=2.0)) as verifier:
        graded = scores(verifier, ["a"] * 5)  # 3 s, of 10 s
    assert statuses(graded) == [("ok", 5.0)] * 5
    assert all(0.6 <= each.seconds < 2.0 for each in graded)  # the part of each completion


@pytest.mark.slow
def test_a_grading_that_fails_takes_the_custom_reward_with_it():
    """A completion whose accuracy could not be computed has no reward at all."""
    with Verifier(settings("by_word", accuracy=1.0)) as verifier:
        batch = Batch(2)
        broken = Candidate("fine", "4", opening=None, sample_id=0)  # the grader raises; the custom reward does not
        futures = [verifier.submit(broken, batch), verifier.submit(Candidate("fine", "4", sample_id=1), batch)]
        graded = [future.result(timeout=60) for future in futures]
    assert graded[0].status == "error" and graded[0].rewards == {"accuracy": math.nan, "by_word": math.nan}
    assert math.isnan(graded[0].reward) and graded[1].reward == 24.0


@pytest.mark.slow
def test_nothing_waits_after_an_early_end(monkeypatch):
    warned = []
    monkeypatch.setattr(logging, "log_every_n", lambda level, text, n, *values: warned.append(text % values))
    monkeypatch.setattr(logging, "warning", lambda text, *values: warned.append(text % values))
    with Verifier(settings("by_word", accuracy=1.0, timeout=60.0)) as verifier:
        given_up, left, called = Batch(3), Batch(2), Batch(2)
        dropped = [verifier.submit(Candidate("fine", "4", sample_id=i), given_up) for i in range(2)]
        waiting = verifier.submit(Candidate("fine", "4"), left)
        given_up.close()
        assert [future.result(timeout=60).status for future in dropped] == ["error", "error"]
        assert "was closed before it was complete" in dropped[0].result().detail
        late = verifier.submit(Candidate("fine", "4", sample_id=2), given_up)
        assert late.result(timeout=60).status == "error"
        running = [verifier.submit(Candidate("hang", "4", sample_id=i), called) for i in range(2)]
        classes = verifier.classes(["hang", None, "hang", "x", None])
        assert not waiting.done()
    assert warned == [] and classes.result(timeout=1) == [0, -1, 0, 2, -1]
    assert [future.result(timeout=1).status for future in (waiting, *running)] == ["error"] * 3
    after = [verifier.submit(Candidate("fine", "4"), batch) for batch in (Batch(1), Batch(2))]
    assert [future.result(timeout=1).status for future in after] == ["error"] * 2


def skips_short(completions, log_metric, log_extra, **columns):
    log_metric("words", len(completions))
    log_extra("length", [len(text) for text in completions])
    return [None if len(text) < 3 else float(len(text)) for text in completions]


async def constant(completions, log_metric, **columns):
    log_metric("words", 5)
    return [None if text == "no" else 1.0 for text in completions]


def own_step(completions, trainer_state, **columns):
    return [100.0 * trainer_state.max_steps + trainer_state.global_step] * len(completions)


def several(*names, weights=(), **changes):
    options = {"accuracy": 0.0, "format": 0.0, "workers": 2, "timeout": 5.0} | changes
    return config.RewardsConfig(functions=tuple(map(custom, names)), function_weights=weights, **options)


@pytest.mark.slow
def test_several_functions_with_weights():
    """None is left out of the sum, as TRL's nansum does; where all gave None there is no reward."""
    with Verifier(several("skips_short", "constant", weights=(2.0, 0.5))) as verifier:
        graded = scores(verifier, ["four", "hi", "no"])
    assert [each.rewards for each in graded[:1]] == [{"skips_short": 4.0, "constant": 1.0}]
    assert statuses(graded[:2]) == [("ok", 2 * 4 + 0.5), ("ok", 0.5)]
    assert math.isnan(graded[1].rewards["skips_short"])
    assert graded[2].status == "invalid" and math.isnan(graded[2].reward)
    assert [each.extra for each in graded] == [{"length": 4}, {"length": 2}, {"length": 2}]
    assert all(each.logged == {"words": [3.0, 5.0]} for each in graded)


def late_size(completions, **columns):
    """Tells the batch's size, and takes so long for several completions that a single one would be answered first."""
    time.sleep(2.0 * (len(completions) > 1))
    return [float(len(completions))] * len(completions)


@pytest.mark.slow
def test_a_function_that_fails_is_repeated_alone_and_the_others_are_not():
    with Verifier(several("by_word", "late_size")) as verifier:
        graded = scores(verifier, ["fine", "raise"])
    assert graded[0].rewards == {"by_word": 14.0, "late_size": 2.0} and graded[0].status == "ok"
    assert graded[1].rewards == {"by_word": math.nan, "late_size": math.nan} and math.isnan(graded[1].reward)
    assert graded[1].status == "error" and graded[1].detail.startswith(f"{custom('by_word')}: ZeroDivisionError")


@pytest.mark.slow
def test_a_function_knows_the_step():
    with Verifier(settings("own_step"), max_steps=9) as verifier:
        rewards = []
        for step in (1, 4):
            verifier.start_step(step)
            rewards.append(scores(verifier, ["a", "b"])[1].reward)
    assert rewards == [900.0, 903.0]


def wants_reference(completions, reference, **columns):
    return [1.0] * len(completions)


def sleeps(completions, **columns):
    time.sleep(1000)


def large(completions, **columns):
    return [float(len(bytearray(3 << 30)))] * len(completions)


def many_threads(completions, **columns):
    """Starts threads whose stacks together are larger than the address space of a worker."""
    done = threading.Event()
    threading.stack_size(256 << 20)
    try:
        for _ in range(20):
            threading.Thread(target=done.wait, daemon=True).start()
    finally:
        done.set()
    return [1.0] * len(completions)


def nan_then_sleeps(prompts, completions, **columns):
    return sleeps(completions) if prompts[0] == "skip" else [math.nan] * len(completions)


MEMORY_FIX = r"; if a reward needs more memory than config\.rewards\.memory_gib, raise that"
PROBLEMS = [[Candidate(text, "4", "", question) for text in ("a", "bbb")] for question in ("What\nis it?", "skip")]


@pytest.mark.slow
def test_a_rehearsal_returns_the_values_by_function_problem_and_completion():
    rewards = custom_rewards(several("skips_short", "first_only", "position", "own_step"))
    lengths, alone, place, steps = rehearse(rewards, PROBLEMS, timeout=10.0, max_steps=7)
    assert [[str(value) for value in row] for row in lengths] == [["nan", "3.0"]] * 2
    assert alone == [[1.0, 3.0]] * 2  # written for one completion per call
    assert place == [[200.0, 210.0]] * 2
    assert steps == [[700.0, 700.0]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, timeout, words",
    [
        ("wants_reference", 10.0, r"TypeError: .*'reference' \(in wants_reference, .*, line \d+; .* columns answer\)$"),
        ("not_finite", 10.0, "returned nan; return None to skip a completion$"),
        ("sleeps", 0.5, r"no result within 0.5 s; raise config\.rewards\.timeout, or make it faster$"),
        ("large", 10.0, rf"MemoryError: .*{MEMORY_FIX}$"),
        ("many_threads", 10.0, rf"RuntimeError: can't start new thread .*{MEMORY_FIX}$"),
    ],
)
def test_a_rehearsal_refuses_a_function_that_fails(name, timeout, words):
    rewards = custom_rewards(several("position", name))
    path = custom(name).replace(".", r"\.")
    with pytest.raises(
        InputError, match=rf"^config\.rewards\.functions = '{path}': fails on .* 'What is it\?': {words}"
    ):
        rehearse(rewards, PROBLEMS, timeout, memory_gib=2.0)


def of_messages(completions, **columns):
    """Written for chat messages, as many of TRL's examples are."""
    return [float(len(completion[0]["content"])) for completion in completions]


def of_texts(completions, **columns):
    return [float(len(completion.strip())) for completion in completions]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "right", "expects"), [("of_messages", True, "chat messages"), ("of_texts", False, "texts")]
)
def test_a_function_for_the_other_form_of_completions_is_told_the_setting(name, right, expects):
    assert len(rehearse(custom_rewards(settings(name, conversational=right)), PROBLEMS, timeout=10.0)) == 1
    with pytest.raises(InputError, match=rf"; set config\.rewards\.conversational = {right} if it expects {expects}$"):
        rehearse(custom_rewards(settings(name, conversational=not right)), PROBLEMS, timeout=10.0)


@pytest.mark.slow
def test_a_rehearsal_that_ends_early_does_not_complain_of_what_was_under_way(monkeypatch):
    warned = []
    monkeypatch.setattr(logging, "log_every_n", lambda level, text, n, *values: warned.append(text % values))
    with pytest.raises(InputError, match="returned nan"):
        rehearse(custom_rewards(settings("nan_then_sleeps")), PROBLEMS, timeout=10.0)
    assert warned == []


@pytest.mark.slow
def test_the_import_of_a_function_does_not_count_against_its_deadline(tmp_path, monkeypatch):
    text = "import time\ntime.sleep(3)\ndef reward(completions, **columns):\n    return [1.0] * len(completions)\n"
    (tmp_path / "imports_slowly.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    settings = config.RewardsConfig(functions=("imports_slowly:reward",), accuracy=0.0, workers=1, timeout=0.5)
    assert rehearse(custom_rewards(settings), PROBLEMS, settings.timeout) == [[[1.0, 1.0]] * 2]
    with Verifier(settings) as verifier:
        assert statuses(scores(verifier, ["a", "b"])) == [("ok", 1.0)] * 2


def one_too_many(completions, **columns):
    return [1.0] * (len(completions) + 1)


def without_columns(completions):
    return [1.0] * len(completions)


def makes_rewards(longest, cache=8):
    return without_columns


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("makes_rewards", r"'.*'.*; it has no parameter completions: if it returns a reward function, give that one a"),
        ("one_too_many", r"one number or None per completion: 3 values for 2 completions \(in one_too_many, "),
        ("without_columns", r"got an unexpected keyword argument '.*'.*; end its parameters with \*\*columns$"),
        ("first_only", ""),
    ],
)
def test_a_rehearsal_says_once_what_fails(monkeypatch, name, words):
    """A function for one completion per call is warned about, and the error of another is that of the whole batch."""
    warned = []
    monkeypatch.setattr(logging, "log_every_n", lambda *arguments: warned.append("too early"))
    monkeypatch.setattr(logging, "warning", lambda text, *values: warned.append(text % values))
    with pytest.raises(InputError, match=words) if words else contextlib.nullcontext():
        rehearse(custom_rewards(settings(name)), PROBLEMS, timeout=10.0)
    assert len(warned) == (not words) and all("1 value for 2 completions" in text for text in warned)


def test_columns_with_the_name_of_an_argument_are_warned_about(caplog):
    candidate = Candidate("4", "4", columns={"prompts": 1, "level": 2})
    custom_calls._warn_of_hidden([], [[candidate]])
    assert not caplog.records
    reward = CustomReward("a:b", answer_column="log_extra")
    custom_calls._warn_of_hidden([reward], [[candidate]])
    said = [record.getMessage().partition(",")[0] for record in caplog.records]
    assert said == [f"custom rewards do not get the data's column {name}" for name in ("prompts", "log_extra")]
