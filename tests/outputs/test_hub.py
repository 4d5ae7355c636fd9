"""Exports in repositories of the hub, against a stand-in of its HTTP API: what is pushed, what is refused, the card."""

import dataclasses
import json

import hub_server
import pytest
import yaml

from igrpo_jax import __version__
from igrpo_jax.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    JudgeConfig,
    LoraConfig,
    ModelConfig,
    RefineConfig,
    RewardsConfig,
)
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.outputs import card, hub

CONFIG = Config(
    model=ModelConfig(path="Qwen/Qwen2.5-Math-1.5B", lora=LoraConfig(rank=8)),
    data=DataConfig(train="gsm8k"),
    algorithm=AlgorithmConfig(num_drafts=6),
)


@pytest.fixture
def server(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with hub_server.serving(monkeypatch) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """An export."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    return folder


def summary(folder, step, **values):
    shot = {"pass@1": 0.5, "pass@1_low": 0.25, "pass@1_high": 0.75} | values
    path = folder / "evaluations" / f"step_{step:06d}" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"benchmarks": {"gsm8k": {"problems": 4, "samples": 2, "single_shot": shot}}}))


def push(folder, workdir, config=CONFIG, name="org/name", place=None, **more):
    repository = hub.open_repository(name, "--push", config, **more)
    return hub.upload(repository, folder, config, workdir, 3, place)


def front_matter(text):
    _, yaml_text, _ = text.split("---\n", 2)
    return yaml.safe_load(yaml_text)


def test_an_export_is_put_into_a_private_repository_and_later_replaced(server, folder, tmp_path):
    assert push(folder, tmp_path) == f"step 3 is in {server.url}/org/name (private), commit aaaaaaaa"
    files = server.repositories["org/name"]["files"]
    assert set(files) == {".gitattributes", "config.json", "model.safetensors", "README.md", hub.MARKER}
    assert files["model.safetensors"] == b"\0" * 100 and json.loads(files[hub.MARKER])["step"] == 3
    assert all(token == "Bearer hf_secret_token" for _, path, token in server.requests if path.endswith("commit/main"))
    # The same run again: more shards than before, and what was there is gone.
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    push(folder, tmp_path, dataclasses.replace(CONFIG, steps=9))
    assert "model.safetensors" not in files and "model-00001-of-00002.safetensors" in files
    push(folder, tmp_path, name="org/open", private=False)
    assert not server.repositories["org/open"]["private"]


def test_what_is_in_the_repository_is_never_replaced_by_another_thing(server, folder, tmp_path):
    push(folder, tmp_path)
    other = dataclasses.replace(CONFIG, model=ModelConfig(path=CONFIG.model.path))
    with pytest.raises(
        InputError, match=r"--push org/name: .*another run \(model.lora.rank: 8 -> 0\); give an unused name"
    ):
        push(folder, tmp_path, other)
    server.repositories["org/mine"] = {"private": True, "files": {"notes.txt": b"x", ".gitattributes": b""}}
    with pytest.raises(
        InputError, match=r"--push org/mine: the repository exists and holds other files, such as 'notes"
    ):
        push(folder, tmp_path, name="org/mine")
    server.repositories["org/mine"]["files"][hub.MARKER] = b"[]"
    with pytest.raises(InputError, match=r"its igrpo_jax.json can't be read"):
        push(folder, tmp_path, name="org/mine")
    assert not any(path == "/api/models/org/mine/commit/main" for _, path, _ in server.requests)


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ({"repos/create": 401}, "does not accept the token .*use a token with write access to 'org'"),
        ({"repos/create": 403}, "the token may not write there .*use a token with write access to 'org'"),
        ({"commit/main": 403}, r"may not write there .*; the export in .*out is complete; use a token"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(server, folder, tmp_path, refused, says):
    server.refused = refused
    with pytest.raises(InputError, match=says) as error:
        push(folder, tmp_path, place=folder)
    assert "\n" not in str(error.value) and "hf_secret_token" not in str(error.value)
    assert (folder / "model.safetensors").exists()
    with pytest.raises(InputError) as error:
        push(folder, tmp_path)
    assert "is complete" not in str(error.value)  # a folder that is removed is not named


def test_without_a_token_or_a_network_nothing_is_asked(server, monkeypatch):
    server.refused = {"repos/create": 500}
    with pytest.raises(RunError, match=r"the hub can't be reached \(HfHubHTTPError: .*; run the same command again"):
        hub.open_repository("org/name", "--push", CONFIG)
    with pytest.raises(InputError, match=r"config.checkpoint.push = a b/c: not the name of a repository"):
        hub.open_repository("a b/c", hub.SETTING, CONFIG)
    monkeypatch.delenv("HF_TOKEN")
    asked = len(server.requests)
    with pytest.raises(InputError, match="there is no token for the hub; export HF_TOKEN"):
        hub.open_repository("org/name", "--push", CONFIG)
    assert len(server.requests) == asked


def test_the_card_says_what_was_done_and_what_was_measured(tmp_path):
    summary(tmp_path, 0)
    summary(tmp_path, 7, **{"pass@1": 0.625})
    text = card.model_card(CONFIG, tmp_path, 7, "org/name", adapter=False)
    about = front_matter(text)
    assert (about["base_model"], about["datasets"]) == ("Qwen/Qwen2.5-Math-1.5B", ["openai/gsm8k"])
    assert about["library_name"] == "transformers" and {"igrpo_jax", "igrpo"} <= set(about["tags"])
    assert about["model-index"][0]["results"][0]["metrics"][0]["value"] == 62.5
    assert "| <code>gsm8k</code> | 4 | 2 | 50.0 (25.0 to 75.0) | 62.5 (25.0 to 75.0) |" in text
    assert "6 drafts, and 4 refinements" in text and "LoRA of rank 8" in text and f"{__version__}" in text
    assert '"rank": 8' in text and "compilation_cache" not in text and "learning_rate" not in text
    verifying = dataclasses.replace(CONFIG, algorithm=dataclasses.replace(CONFIG.algorithm, second_stage="verify"))
    text = card.model_card(verifying, tmp_path, 7, "org/name", adapter=False)
    assert "6 solutions, and 4 verifications of one of them" in text and "igrpo" not in front_matter(text)["tags"]
    lookups = dataclasses.replace(Config().data, task="lookups")
    plain = card.model_card(Config(data=lookups), tmp_path, 3, "org/name", adapter=False)
    assert "The library's built-in task, <code>lookups</code>." in plain
    assert "made no evaluation after step 3" in plain and "model-index" not in front_matter(plain)
    assert front_matter(card.model_card(CONFIG, tmp_path, 7, "o/n", adapter=True))["library_name"] == "peft"
    (tmp_path / "sft.json").write_text("{}")
    tuned = card.model_card(CONFIG, tmp_path, 7, "o/n", adapter=False)
    assert "Supervised fine-tuning" in tuned and front_matter(tuned)["tags"] == ["igrpo_jax", "sft"]


def test_the_card_sets_only_evaluations_side_by_side_that_are_comparable(tmp_path):
    for step in (0, 7):
        summary(tmp_path, step)
        settings = {"model": "m", "step": step, "temperature": 1.0 - step / 10, "max_draft_length": step}
        (tmp_path / "evaluations" / f"step_{step:06d}" / "evaluation.json").write_text(json.dumps(settings))
    text = card.model_card(CONFIG, tmp_path, 7, "org/name", adapter=False)
    assert "| 4 | 2 | not comparable | 50.0 (25.0 to 75.0) |" in text and "max_draft_length" not in text
    assert "had other settings: <code>temperature</code> was <code>1.0</code> and then <code>0.3" in text
    (tmp_path / "evaluations" / "step_000000" / "evaluation.json").unlink()
    measured = "| 4 | 2 | {} | 50.0 (25.0 to 75.0) |"
    assert measured.format("50.0 (25.0 to 75.0)") in card.model_card(CONFIG, tmp_path, 7, "org/name", adapter=False)
    assert measured.format("not measured") in card.model_card(CONFIG, tmp_path, 0, "org/name", adapter=False)
    file = tmp_path / "evaluations" / "step_000000" / "summary.json"
    file.write_text(file.read_text().replace('"problems": 4', '"problems": 3'))
    assert measured.format("not comparable") in card.model_card(CONFIG, tmp_path, 7, "org/name", adapter=False)


def test_the_card_names_no_path_of_the_machine_and_escapes_all_text(tmp_path):
    """Names of files and settings are the user's: none may end the front matter, a block or a cell, or become HTML."""
    nasty = "x\n---\n```\n````\n<script>|"
    config = Config(
        model=ModelConfig(path="/secret/place/my|model"),
        data=DataConfig(train="/secret/place/<b>data.jsonl", instruction=nasty),
        refine=RefineConfig(instruction="{draft} `````"),
        rewards=RewardsConfig(judge=JudgeConfig(base_url="http://secret:8000")),
    )
    path = tmp_path / "evaluations" / "step_000001" / "summary.json"
    path.parent.mkdir(parents=True)
    shot = {"pass@1": 0.5, "pass@1_low": 0.25, "pass@1_high": 0.75}
    path.write_text(json.dumps({"benchmarks": {"a|<i>: 'b'\n---": {"problems": 4, "samples": 2, "single_shot": shot}}}))
    text = card.model_card(config, tmp_path, 1, "org/name", adapter=False)
    about = front_matter(text)
    assert "base_model" not in about and about["model-index"][0]["results"][0]["dataset"]["name"] == "a|<i>: 'b'\n---"
    assert "secret" not in text and "<code>my|model</code>" in text and "&lt;b&gt;data.jsonl" in text
    assert "| <code>a&#124;&lt;i&gt;: &#x27;b&#x27; ---</code> |" in text
    block = text.partition("``````json\n")[2].partition("\n``````")[0]  # one backtick more than any run in it
    assert json.loads(block)["data"]["instruction"] == nasty
    outside = text.partition("``````json\n")[0] + text.rpartition("\n``````")[2]
    assert "<script>" not in outside
