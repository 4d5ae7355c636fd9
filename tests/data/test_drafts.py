"""Drafts of SFT from what a run, an evaluation and a probe have written."""

import dataclasses
import json

import pytest
from builders import completion, group, run_config
from model_files import error_of

from igrpo_jax.data import drafts
from igrpo_jax.data.drafts import Draft
from igrpo_jax.evaluation import evaluator
from igrpo_jax.evaluation.evaluator import RoundPrompt
from igrpo_jax.outputs.files import write_rows
from igrpo_jax.outputs.writer import Writer
from igrpo_jax.probe import answers as probe_answers

RIGHT = completion("draft", 0, [5, 9], 1.0, text="It is 7")
WRONG = completion("draft", 1, [4, 9], 0.0, text="It is 8")
REFINED = completion("refine", 0, [5, 9], 1.0, text="It is 7 indeed")
UNGRADED = [
    dataclasses.replace(WRONG, score=dataclasses.replace(WRONG.score, status=status, reward=float("nan")))
    for status in ("invalid", "timeout", "error")
]


def read(place):
    return drafts.answers_of(str(place), f"config.sft.drafts_from = {str(place)!r}")


def test_drafts_of_a_run_and_its_completions_without_a_draft(tmp_path):
    """Refinements are no drafts, since their prompt showed one; rows of metrics are no answers."""
    stages = group([RIGHT, WRONG], 0, [REFINED])
    plain = group([], None, [dataclasses.replace(REFINED, text="7.")], question="1 + 6")
    with Writer(tmp_path, run_config()) as writer:
        writer.write(1, {"loss": 1.0})
        writer.samples(1, [stages, plain], [[0.5], [0.5]])
        writer.samples(2, [group(UNGRADED, 0, [REFINED])], [[0.5]])
    first = (Draft("It is 7", True), Draft("It is 8", False))
    assert read(tmp_path) == {"3 + 4": (*first, *[Draft("It is 8", None)] * 3), "1 + 6": (Draft("7.", True),)}
    assert read(tmp_path / "samples" / "step_000001.jsonl")["3 + 4"] == first


def test_single_shot_answers_of_an_evaluation_and_of_a_probe(tmp_path, bucket):
    prompt = group([], None, []).prompt
    asked = [RoundPrompt(prompt, path, prompt.tokens) for path in ((), (0,))]
    rows = [evaluator._row(asked[0], RIGHT, False), evaluator._row(asked[1], REFINED, False)]
    write_rows(tmp_path / "gsm8k_test.jsonl", rows)
    assert read(tmp_path) == {"3 + 4": (Draft("It is 7", True),)}
    bucket.put(tmp_path)
    assert read(bucket.address) == read(tmp_path)
    write_rows(tmp_path / "answers.jsonl", [probe_answers._row(prompt, path, WRONG) for path in ((), (0,))])
    assert read(tmp_path / "answers.jsonl") == {"3 + 4": (Draft("It is 8", False),)}


@pytest.mark.parametrize(
    ("name", "says"), [("nowhere", "no such file or folder"), ("empty", "holds no answers"), ("a.jsonl", "holds no")]
)
def test_what_holds_no_answers(tmp_path, name, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "1 + 1", "answer": "2"}))
    message = error_of(read, tmp_path / name)
    assert message.startswith("config.sft.drafts_from = ") and says in message
