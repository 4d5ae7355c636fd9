"""Whole runs with LoRA and their exports: exact on resume, and what is exported is the policy of the checkpoint."""

import json
import os
import re
import shutil
from pathlib import Path

import hub_server
import jax
import numpy as np
import pytest
import transformers
from model_files import edit_tensors, error_of, is_gone, tensors_of
from tiny_models import one_device
from whole_runs import check_same_rows, faulty, final_state, rewind, rows, run, samples

from igrpo_jax import config, export
from igrpo_jax.data import arithmetic
from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder, lora
from igrpo_jax.models.policy import open_policy
from igrpo_jax.outputs import weights
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.workdir import read_config

LORA = ("model.lora.rank=2", "model.lora.targets=('q_proj','o_proj','up_proj')", "algorithm.beta=0.05")
CONSTANT = (
    "optimizer.warmup_ratio=0",
    "optimizer.min_lr_ratio=1",
    "evaluation.every=0",
    "checkpoint.best_metric=",
    "checkpoint.every=1",
)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A LoRA run of the built-in model after its warm start, one optimizer step a rollout, exported at its end."""
    path = tmp_path_factory.mktemp("adapted")
    run(
        path,
        path / "run",
        *LORA,
        *CONSTANT,
        "steps=3",
        "checkpoint.export=True",
        "checkpoint.keep=9",
        "learner.minibatches=1",
    )
    return path / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of all weights, exported at its end: a model directory too, for runs with model.path."""
    path = tmp_path_factory.mktemp("trained")
    run(path, path / "run", *CONSTANT, "steps=2", "checkpoint.export=True")
    return path / "run"


def state_of(workdir):
    return final_state(workdir, read_config(workdir))


@pytest.mark.slow(seconds=9)
def test_only_adapters_are_trained_and_saved(adapted):
    state = state_of(adapted)
    params = {name for name in state if name.startswith(".params")}
    assert len(params) == 2 * 3 and all("lora_" in name for name in params)  # three weights of the one layer
    assert all("lora_" in name for name, x in state.items() if x.ndim)
    b = [x for name, x in state.items() if name.startswith(".params") and "lora_b" in name]
    assert all(np.abs(x).max() > 0 for x in b)
    lines = [row for row in rows(adapted) if "loss" in row]
    assert len(lines) == 3 and lines[0]["kl"] == 0 < lines[-1]["kl"]
    assert all(np.isfinite(row["reward"]) and np.isfinite(row["loss"]) for row in lines)


@pytest.mark.proof
@pytest.mark.slow
def test_a_resumed_lora_run_equals_an_uninterrupted_one(adapted, tmp_path):
    """Base, reference and adapters are what they were; red where the base of the resume is not the warm start's."""
    more = (*LORA, *CONSTANT, "checkpoint.keep=9", "learner.minibatches=1")
    rewind(adapted, tmp_path / "run", 2)
    assert "resumed after 2" in run(tmp_path, tmp_path / "run", *more, "steps=3", "checkpoint.export=True")
    assert samples(tmp_path / "run") == samples(adapted)
    check_same_rows(rows(tmp_path / "run"), rows(adapted))
    a, b = state_of(tmp_path / "run"), state_of(adapted)
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.slow
def test_the_command_writes_what_the_end_of_the_run_wrote(adapted, trained, tmp_path, capsys):
    for workdir in (adapted, trained):
        out = tmp_path / workdir.parent.name
        export.main(["export", f"--workdir={workdir}", f"--out={out}"])
        dtype = json.loads((out / "config.json").read_text())["dtype"]
        assert f"is in {out}, {dtype}; read back, " in capsys.readouterr().out
        assert tensors_of(out) == tensors_of(workdir / "export")
        for file in (workdir / "export").glob("*.json"):
            assert (out / file.name).read_bytes() == file.read_bytes()
    # The adapters are in it, and another step is another policy.
    export.main(["export", f"--workdir={adapted}", f"--out={tmp_path / 'start'}", "--step=0"])
    start, end = tensors_of(tmp_path / "start"), tensors_of(adapted / "export")
    changed = {name.split(".")[-2] for name in end if start[name][:2] != end[name][:2]}  # bytes in bfloat16
    assert changed == {"q_proj", "o_proj", "up_proj"}


@pytest.mark.slow
def test_the_export_is_the_policy_of_the_checkpoint(trained):
    """Bit for bit, in the dtype in which the run samples: bfloat16 would lose changes below its resolution."""
    state = state_of(trained)
    one = open_policy(config.ModelConfig(path=str(trained / "export")))
    for path, x in one.load(one_device(), 0).items():
        assert (np.asarray(x) == state[f".params['{path}']"]).all(), path
    assert {dtype for *_, dtype in tensors_of(trained / "export").values()} == {"F32"}
    pytest.importorskip("torch", reason="PyTorch is not installed; the extra parity brings it")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "export")
    assert model.generation_config.eos_token_id == one.eos_ids[0]


@pytest.mark.slow
def test_adapters_that_nobody_could_use_are_refused(adapted, trained, tmp_path):
    for workdir, why in ((trained, "trained all weights"), (adapted, "adapts the built-in model")):
        message = error_of(export.export, workdir, tmp_path / "none", None, True)
        assert message.startswith(f"--adapter: the run in {workdir} {why}") and is_gone(tmp_path / "none")
    message = error_of(export.export, adapted, tmp_path / "none", None, True, "bfloat16")
    assert message == "--dtype bfloat16: adapters are always written in float32; leave it out"


@pytest.mark.proof
@pytest.mark.slow(seconds=9)
def test_lora_on_a_model_of_files(trained, tmp_path):
    """The base is read from the files, sharded, in model.dtype, and is not in the checkpoint. The adapters name it."""
    more = (*LORA, *CONSTANT, f"model.path={trained / 'export'}", "warm_start.steps=0", "steps=2")
    run(tmp_path, tmp_path / "run", *more)
    assert all("lora_" in name for name, x in state_of(tmp_path / "run").items() if x.ndim)
    assert [path.name for path in (tmp_path / "run" / "reference").iterdir()] == ["weights.json"]
    c = read_config(tmp_path / "run")
    policy, mesh = open_policy(c.model), one_device()
    params, step = weights.saved(c, policy, tmp_path / "run", mesh, Console())
    assert step == 2 and sum(isinstance(x, lora.Adapted) for x in params.values()) == 3
    base = policy.load(mesh, 0, c.model.dtype)
    for path, x in params.items():
        assert (np.asarray(getattr(x, "weight", x)) == np.asarray(base[path])).all()
    export.export(tmp_path / "run", tmp_path / "out")
    ours = jax.jit(lambda x: decoder.cast(lora.merge(x), "bfloat16"))(params)
    for path, x in open_policy(config.ModelConfig(path=str(tmp_path / "out"))).load(mesh, 0, "bfloat16").items():
        assert (np.asarray(x) == np.asarray(ours[path])).all()
    export.main(["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'peft'}", "--adapter"])
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(trained / "export") and len(tensors_of(tmp_path / "peft")) == 6
    assert told["target_modules"] == ["o_proj", "q_proj", "up_proj"] and (told["r"], told["lora_alpha"]) == (2, 32.0)
    changed = Path(shutil.copytree(trained / "export", tmp_path / "changed"))
    edit_tensors(changed, lambda tensors: tensors.update({name: -x for name, x in tensors.items()}))
    settings = tmp_path / "run" / "config.json"
    settings.write_text(settings.read_text().replace(str(trained / "export"), str(changed)))
    message = error_of(export.export, tmp_path / "run", tmp_path / "other")
    assert f"config.model.path = '{changed}': the weights differ" in message
    message = error_of(open_policy, config.ModelConfig(path=str(tmp_path / "peft")))
    assert f"is a LoRA adapter (of {str(trained / 'export')!r}), not a whole model; write one with `python" in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out=x"], "--workdir: missing"),
        (["--workdir=x"], "--out: missing"),
        (["--workdir=none-such", "--out=x"], "--workdir none-such: holds no run"),
        (["--workdri=x"], "workdri"),
        (["--step=last"], "step"),
        (["--dtype=float16"], "dtype"),
        (["--workdir=w", "--out=x", "--public"], "--public: applies to the repository of --push"),
        (["run", "--out=x"], "run: not understood; the folder of a run is given as --workdir=run"),
        (["--workdir=run", "x"], "x: not understood; settings are given as --out=HF_DIR"),
    ],
)
def test_flags_that_can_not_be_followed(flags, said):
    assert said in error_of(export.main, ["export", *flags])


def test_a_repository_is_private_unless_public_is_given(monkeypatch):
    calls = []
    monkeypatch.setattr(export, "export", lambda *given: calls.append(given))
    for flags in ([], ["--public"]):
        export.main(["export", "--workdir=w", "--push=o/n", "--step=2", "--dtype=float32", *flags])
    assert calls == [("w", None, 2, False, "float32", "o/n", private) for private in (True, False)]


@pytest.mark.slow(seconds=9)
def test_a_run_and_an_export_are_put_into_a_repository(trained, tmp_path, monkeypatch, capsys):
    """A finished run that is asked to push goes on; an earlier step then replaces it, from no folder that stays."""
    shutil.copytree(trained, tmp_path / "run")
    with hub_server.serving(monkeypatch) as hub:
        there = f"from huggingface_hub import constants as c; c.ENDPOINT, c.HF_HUB_OFFLINE = {hub.url!r}, False"
        done = faulty(there, tmp_path, tmp_path / "run", *CONSTANT, "steps=2", "checkpoint.push=org/name")
        assert done.returncode == 0, done.stderr
        files = hub.repositories["org/name"]["files"]
        token = os.environ["HF_TOKEN"]
        assert token not in done.stdout + done.stderr and not any(token.encode() in data for data in files.values())
        assert files["model.safetensors"] == (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
        assert json.loads(files["igrpo_jax.json"])["step"] == 2 and b"built-in model" in files["README.md"]
        capsys.readouterr()
        export.main(["export", f"--workdir={tmp_path / 'run'}", "--push=org/name", "--step=1"])
        (written, pushed) = capsys.readouterr().out.strip().splitlines()[-2:]
        assert re.match("step 1, float32; read back, ", written) and pushed.startswith(
            f"step 1 is in {hub.url}/org/name"
        )
        assert json.loads(files["igrpo_jax.json"])["step"] == 1
        assert files["model.safetensors"] != (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
        message = error_of(export.main, ["export", f"--workdir={tmp_path / 'run'}", "--push=bad/a/b"])
        assert message.startswith("--push bad/a/b: not the name of a repository")


@pytest.mark.slow
def test_checkpoints_and_folders_that_can_not_be_used(trained, tmp_path, monkeypatch):
    message = error_of(export.export, trained, tmp_path / "new" / "out", 7)
    assert message == f"--step 7: {trained} holds no checkpoint of it; it has steps 1, 2"
    assert not (tmp_path / "new").exists()  # where the export has tried to make its folder
    message = error_of(export.export, trained, trained / "samples")
    assert message == f"--out {trained / 'samples'}: already exists; give a new folder"
    monkeypatch.setattr(weights, "saved", None)  # refused before the checkpoint is read
    message = error_of(export.export, trained, trained / "metrics.jsonl" / "out")
    assert "can't be written (" in message and message.endswith("; give a folder that can")
    monkeypatch.undo()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((trained / "config.json").read_bytes())
    assert "has no checkpoints" in error_of(export.export, tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(InputError, match="holds no run"):
        read_config(tmp_path)


LETTERS = """
def letters(prompts, completions, **columns):
    return [len(set(completions[0])) / 100]
"""
SHORT = (
    *CONSTANT,
    "steps=2",
    "warm_start.steps=0",
    "prompts_per_step=2",
    "rollout.max_completion_length=16",
    "learner.minibatches=1",
    "data.max_prompt_length=96",
    "rewards.custom=of_letters:letters",
)


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A reward that differs within a group, of answers of a model that solves nothing: there is something to learn."""
    (tmp_path / "of_letters.py").write_text(LETTERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)


def check_steps(workdir):
    """Both stages ran, everything measured is a number, and there was a gradient in every step."""
    lines = [row for row in rows(workdir) if "loss" in row]
    assert [row["step"] for row in lines] == [1, 2]
    for row in lines:
        assert all(
            np.isfinite(row[name]) for name in ("reward", "loss", "entropy", "draft/reward", "refine/copy_ratio")
        )
        assert row["grad_norm"] > 0 and row["reward"] > 0
    for name, text in samples(workdir).items():
        stages = {json.loads(line)["stage"] for line in text.splitlines()}
        assert len(stages) == 2, name
    return lines


@pytest.mark.skipif(
    "IGRPO_SMOLLM2" not in os.environ, reason="set IGRPO_SMOLLM2 to a directory with SmolLM2-135M-Instruct"
)
def test_lora_on_smollm2(tmp_path, letters):
    run(tmp_path, tmp_path / "run", *LORA, *SHORT, f"model.path={os.environ['IGRPO_SMOLLM2']}")
    lines = check_steps(tmp_path / "run")
    assert lines[0]["kl"] == 0 < lines[1]["kl"]
    assert all("lora_" in name for name, x in state_of(tmp_path / "run").items() if x.ndim)
    export.export(tmp_path / "run", tmp_path / "out")
    before, after = tensors_of(Path(os.environ["IGRPO_SMOLLM2"])), tensors_of(tmp_path / "out")
    changed = {name.split(".")[-2] for name in after if after[name][1] != before[name][1]}
    assert changed == {"q_proj", "o_proj", "up_proj"}


@pytest.fixture(scope="module")
def hybrid_files(tmp_path_factory):
    """A random Nemotron-H of all three kinds of sublayers, whose tokenizer has no chat template."""
    import hf_models

    path = tmp_path_factory.mktemp("hybrid") / "model"
    kind, sizes = hf_models.hybrid("M*-")
    tokenizer = arithmetic.tokenizer()
    sizes |= {"vocab_size": -(-len(tokenizer) // 16) * 16, "eos_token_id": tokenizer.eos_token_id}
    sizes |= {"max_position_embeddings": 512}
    hf_models.family_model(kind, sizes).to(hf_models.torch.bfloat16).save_pretrained(path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.proof
@pytest.mark.slow(seconds=16)
def test_steps_of_a_nemotron_h(hybrid_files, tmp_path, letters):
    """All weights of a base model: drafts, refinements, update, export; every tensor of it has learned."""
    run(tmp_path, tmp_path / "run", *SHORT, f"model.path={hybrid_files}", "checkpoint.export=True")
    check_steps(tmp_path / "run")
    first = json.loads(samples(tmp_path / "run")["step_000001.jsonl"].splitlines()[0])
    assert "<|" not in first["prompt"]  # no turns
    before, after = tensors_of(hybrid_files), tensors_of(tmp_path / "run" / "export")
    assert before.keys() == after.keys()
    # Their bytes in bfloat16: some steps are too small for a parameter, not for all of a tensor.
    same = {name for name in after if after[name][1] == before[name][1]}
    assert not same, same


@pytest.mark.proof
@pytest.mark.slow(seconds=16)
def test_lora_on_a_nemotron_h(hybrid_files, tmp_path, letters):
    """Adapters of all its linear layers; in the files those of Mamba's z, x, B, C and dt are one tensor."""
    more = ("model.lora.rank=2", "algorithm.beta=0.05", f"model.path={hybrid_files}")
    run(tmp_path, tmp_path / "run", *SHORT, *more)
    lines = check_steps(tmp_path / "run")
    assert lines[0]["kl"] == 0 < lines[1]["kl"]
    assert all("lora_" in name for name, x in state_of(tmp_path / "run").items() if x.ndim)
    export.export(tmp_path / "run", tmp_path / "out")
    before, after = tensors_of(hybrid_files), tensors_of(tmp_path / "out")
    changed = {name.split(".")[-2] for name in after if after[name][1] != before[name][1]}
    assert changed == {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    message = error_of(export.export, tmp_path / "run", tmp_path / "peft", None, True)
    assert "in the files backbone.layers.0.mixer.in_proj.weight or a part of it" in message and is_gone(
        tmp_path / "peft"
    )
