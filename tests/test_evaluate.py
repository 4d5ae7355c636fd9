"""The commands `evaluate` and `generate`: what they print and write, and one line for what is wrong."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import chat_templates
import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from model_files import save_byte_model
from processes import Started, ended, free_port

import igrpo_jax
from igrpo_jax import config, evaluate, export, generate
from igrpo_jax.cli import exits, parsing
from igrpo_jax.data import arithmetic
from igrpo_jax.data.problems import Row
from igrpo_jax.distributed import chips, sharding
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import inference
from igrpo_jax.models import hf_paths
from igrpo_jax.models.policy import open_model, open_policy
from igrpo_jax.outputs import weights
from igrpo_jax.outputs.checkpoint import Checkpointer
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.workdir import LOCK, locked, prepare_workdir
from igrpo_jax.probe import __main__ as probe
from igrpo_jax.rewards.verifier import Verifier
from igrpo_jax.sampling import layout

HF = {
    "model_type": "llama",
    "vocab_size": 112,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
TINY = {
    "compilation_cache": "",
    "model.dtype": "float32",
    "data.instruction": "",
    "refine.instruction": "{draft}",
    "refine.max_draft_length": 4,
    "rewards.workers": 1,  # each takes a second to start
    "rollout.slots": 8,
    "evaluation.max_completion_length": 6,
}


class State(NamedTuple):
    params: dict
    step: jax.Array


def configured(**changes):
    tree = config.default()
    tree.update_from_flattened_dict(TINY | changes)
    return config.freeze(tree)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama in bfloat16 with the built-in tokenizer, as a Hugging Face directory."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; the extra parity brings it")
    import transformers

    path = tmp_path_factory.mktemp("model") / "llama"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF)).to(torch.bfloat16).save_pretrained(path)
    arithmetic.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """The folder of a run with the model's weights in the checkpoint of step 3, and others in that of step 1."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    c = configured(**{"model.path": str(model)})
    workdir.mkdir()
    prepare_workdir(workdir, c)
    mesh = sharding.make_mesh(c.mesh)
    params = open_policy(c.model).load(mesh, 0)
    count = jax.device_put(jnp.int32(0), sharding.replicated(mesh))
    with Checkpointer(workdir, c.checkpoint) as store:
        store.save(1, State(params | {"lm_head": -params["lm_head"]}, count), {}, force=True)
        store.save(3, State(params, count), {}, force=True)
    return workdir


@pytest.fixture
def folder(tmp_path):
    """A folder with one benchmark of three problems."""
    path = tmp_path / "data"
    path.mkdir()
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(3)]
    (path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command and returns what it printed; `code` is what it must end with."""

    def call(command, *arguments, code=0):
        overrides = [f"--config.{name}={value}" for name, value in TINY.items()]
        monkeypatch.setattr(sys, "argv", ["command", *overrides, *map(str, arguments)])
        if code:
            with pytest.raises(SystemExit) as stop:
                exits.run(command.main)
            assert stop.value.code == code
            said = capsys.readouterr().err
            assert said.startswith("igrpo_jax: preempted" if code == 75 else "igrpo_jax: error: ")
            assert said.count("\n") == 1 and "Traceback" not in said
            return said
        exits.run(command.main)
        return capsys.readouterr().out

    return call


def test_what_a_comparison_prints_of_data_is_text(call, tmp_path):
    """Two lines, half a character and an escape that does not end in an answer; a bar in the name of a benchmark."""
    for name, answer in (("a", "1\n| x |\ud800\x1b]0;title"), ("b", "2")):
        row = {"prompt_id": "p", "index": 0, "drafts": [], "sample_id": 0, "prompt": "q", "answer": answer}
        (tmp_path / name).mkdir()
        (tmp_path / name / "m|n.jsonl").write_text(json.dumps(row | {"accuracy": 1.0}) + "\n")
    said = call(evaluate, "--compare", f"{tmp_path / 'a'},{tmp_path / 'b'}").splitlines()
    assert "| m\\|n: first reference answer that differs | p: 1 \\| x \\| | p: 2 |" in said
    assert any(line.startswith("| m\\|n | 1 | 100.00 |") for line in said)


def texts(out: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (out / "mine.jsonl").open()]


@pytest.mark.proof
@pytest.mark.slow(seconds=10)
def test_a_run_and_its_weights_elsewhere_answer_alike(call, model, run, folder, tmp_path):
    """Greedy answers of a checkpoint and of the Hugging Face directory with the same weights."""
    given = ("--benchmarks", "mine", f"--config.evaluation.data_dir={folder}", "--config.evaluation.temperature=0")
    said = call(evaluate, "--model", model, "--workdir", tmp_path / "a", "--samples", 2, *given)
    assert "| mine | 3 | 2 | " in said and f"written to {tmp_path / 'a'}" in said
    call(evaluate, "--model", run, "--workdir", tmp_path / "b", "--samples=2", *given)
    call(evaluate, "--model", run, "--step", 1, "--workdir", tmp_path / "c", "--samples=2", *given)
    one, other, older = (texts(tmp_path / name) for name in "abc")
    assert one == other != older and len(one) == 6
    made = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert (made["model"], made["step"], made["temperature"]) == (str(run), 3, 0.0)
    assert "| mine | 3 | " in call(evaluate, "--compare", f"{tmp_path / 'a'}, {tmp_path / 'b'}")
    said = call(evaluate, "--model", model, "--workdir", tmp_path / "b", *given, code=2)
    assert "holds an evaluation with other settings (model: " in said
    copy = shutil.copytree(model, tmp_path / "copy")
    call(evaluate, "--model", copy, "--workdir", tmp_path / "e", "--samples=2", *given)
    os.utime(copy / "model.safetensors")  # as other weights would, written to the same place
    said = call(evaluate, "--model", copy, "--workdir", tmp_path / "e", "--samples=2", *given, code=2)
    assert "holds an evaluation with other settings (weights_written: '" in said
    said = call(evaluate, "--model", run, "--step", 2, "--workdir", tmp_path / "d", *given, code=2)
    assert "holds no checkpoint of it; it has steps 1, 3" in said


def test_a_model_of_the_hub_is_the_same_on_another_machine(tmp_path, monkeypatch):
    """Its files have the time of their download there."""
    machines = [tmp_path / machine / "models--owner--name" / "snapshots" / "c0ffee" for machine in "ab"]
    for number, folder in enumerate(machines):
        folder.mkdir(parents=True)
        safetensors.numpy.save_file({"x": np.zeros(1)}, folder / "model.safetensors")
        os.utime(folder / "model.safetensors", (number, number))
    found = []
    for folder in machines:
        hf_paths._download.cache_clear()
        monkeypatch.setattr(hf_paths.huggingface_hub, "snapshot_download", lambda name, folder=folder, **_: str(folder))
        found.append(inference.identity("owner/name", None, None))
    hf_paths._download.cache_clear()
    assert found == [("owner/name", "c0ffee")] * 2
    assert inference.identity(str(machines[1]), None, None)[1].startswith("1970-01-01 00:00:01")


@pytest.mark.proof
@pytest.mark.slow(seconds=8)
def test_a_model_in_a_bucket_answers_as_on_a_disk(call, model, folder, bucket, tmp_path):
    """The model, the problems and the answers lie in a bucket."""
    bucket.put(folder.parent)
    for file in model.iterdir():
        bucket.write(f"model/{file.name}", file.read_bytes())
    given = ("--benchmarks=mine", "--config.evaluation.temperature=0", "--samples=2")
    remote = (
        "--model",
        bucket / "model",
        "--workdir",
        bucket / "out",
        f"--config.evaluation.data_dir={bucket / 'data'}",
    )
    said = call(evaluate, *remote, *given)
    assert "| mine | 3 | 2 | " in said and f"written to {bucket / 'out'}" in said
    assert {"evaluation.json", "mine.jsonl", "summary.json", "summary.md"} == {
        name.removeprefix("out/") for name in bucket.names() if name.startswith("out/")
    }
    before = bucket.read("out/mine.jsonl")
    local = ("--model", model, "--workdir", tmp_path / "a", f"--config.evaluation.data_dir={folder}")
    call(evaluate, *local, *given)
    with locked(tmp_path / "a"):
        assert "a run is under way there (process " in call(evaluate, *local, *given, code=2)
    assert before == (tmp_path / "a" / "mine.jsonl").read_text() and before.count("\n") == 6
    # A kill leaves half of the answers: the same command draws those that are missing.
    bucket.write("out/mine.jsonl", "".join(before.splitlines(keepends=True)[:3]))
    call(evaluate, *remote, *given)
    assert bucket.read("out/mine.jsonl") == before
    compared = call(evaluate, "--compare", f"{tmp_path / 'a'},{bucket / 'out'}")
    assert "| mine | 3 | " in compared


@pytest.mark.slow(seconds=60)
@pytest.mark.skipif(
    "IGRPO_SMOLLM2" not in os.environ, reason="set IGRPO_SMOLLM2 to a directory with SmolLM2-135M-Instruct"
)
def test_smollm2_is_evaluated_from_a_bucket(call, folder, bucket):
    for file in Path(os.environ["IGRPO_SMOLLM2"]).iterdir():
        if file.suffix in (".json", ".safetensors", ".jinja", ".txt"):
            bucket.write(f"smollm2/{file.name}", file.read_bytes())
    bucket.put(folder.parent)
    given = ("--benchmarks=mine", "--samples=1", f"--config.evaluation.data_dir={bucket / 'data'}")
    said = call(evaluate, "--model", bucket / "smollm2", "--workdir", bucket / "out", *given)
    assert "| mine | 3 | 1 | " in said and bucket.read("out/mine.jsonl").count("\n") == 3


@pytest.mark.slow(seconds=12)
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.proof), 4])
def test_a_run_and_its_export_answer_alike(call, model, rank, tmp_path):
    """A checkpoint of all weights, or of LoRA's, and the directory made of it (float32, or bfloat16 with LoRA), at
    temperature 0 and at 1: red where others than the exported weights are asked, which answers drawn at random tell.
    """
    c = configured(**{"model.path": str(model), "model.lora.rank": rank})
    (tmp_path / "run").mkdir()
    prepare_workdir(tmp_path / "run", c)
    policy, mesh = open_policy(c.model), sharding.make_mesh(c.mesh)
    trained = weights.adapters(c, policy, mesh) if rank else policy.load(mesh, 0)
    trained = {path: x + 0.1 * jax.random.normal(jax.random.key(0), x.shape) for path, x in trained.items()}
    count = jax.device_put(jnp.int32(0), sharding.replicated(mesh))
    with Checkpointer(tmp_path / "run", c.checkpoint) as store:
        store.save(1, State(trained, count), {}, force=True)
    export.export(tmp_path / "run", tmp_path / "export")
    rows = [{"prompt": f"{i}+{j}", "answer": "1"} for i in range(5) for j in range(5)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--benchmarks=mine", f"--config.evaluation.data_dir={tmp_path}"]
    for degrees in (0, 1):
        more = ["--config.evaluation.max_completion_length=20", f"--config.evaluation.temperature={degrees}"]
        for name in ("run", "export"):
            call(evaluate, "--model", tmp_path / name, "--workdir", tmp_path / f"{name} {degrees}", *given, *more)
        assert texts(tmp_path / f"run {degrees}") == texts(tmp_path / f"export {degrees}")
    assert len(set(texts(tmp_path / "run 1"))) > 20


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_answers_and_is_exported_with_the_weights_that_it_samples(model, dtype, tmp_path):
    """All weights of a bfloat16 model, changed by less than bfloat16 resolves; red where all runs are rounded to it."""
    c = configured(**{"model.path": str(model), "model.dtype": dtype})
    (tmp_path / "run").mkdir()
    prepare_workdir(tmp_path / "run", c)
    policy, mesh = open_policy(c.model), sharding.make_mesh(c.mesh)
    trained = {path: x * (1 + 1e-4) for path, x in policy.load(mesh, 0).items()}
    count = jax.device_put(jnp.int32(0), sharding.replicated(mesh))
    with Checkpointer(tmp_path / "run", c.checkpoint) as store:
        store.save(1, State(trained, count), {}, force=True)
    rows = {"mine": [Row("0", 0, "1+2", "3", {})]}
    for computed in ("float32", "bfloat16"):
        asked = configured(**{"model.path": str(model), "model.dtype": computed})
        task = inference.open_evaluation(asked, str(tmp_path / "run"), None, rows)
        for path, x in inference._weights(task, Console()).items():
            sampled = trained[path].astype(dtype).astype(computed)
            assert (np.asarray(x.astype(computed)) == np.asarray(sampled)).all(), path
    for given in (None, "float32", "bfloat16"):
        export.export(tmp_path / "run", out := tmp_path / f"{given}", dtype=given)
        assert json.loads((out / "config.json").read_text())["dtype"] == (given or dtype)
        exported = open_policy(config.ModelConfig(path=str(out))).load(mesh, 0)
        for path, x in exported.items():
            assert (np.asarray(x) == np.asarray(trained[path].astype(given or dtype))).all(), path


@pytest.mark.parametrize(("changes", "is_kept"), [({}, False), ({"mesh.fsdp": 1, "mesh.data": -1}, True)])
@pytest.mark.parametrize(("tensor", "output_major"), [(1, False), (1, True), (2, False)])
def test_weights_that_stay_beside_the_copy_to_sample_with_leave_less_for_pages(
    model, monkeypatch, changes, is_kept, tensor, output_major
):
    """Where the copy is output-major, as on CPUs, it is another one on every mesh."""
    asked = configured(**{"model.path": str(model), "rollout.mesh.tensor": tensor} | changes)
    rows = {"mine": [Row("0", 0, "1+2", "3", {})]}
    inputs = inference.open_evaluation(asked, str(model), None, rows)
    seen = []
    monkeypatch.setattr(chips, "known_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(layout, "uses_output_major", lambda mesh: output_major)
    programs = lambda c, model, mesh, eos_ids, memory, **sizes: seen.append(memory)
    monkeypatch.setattr(inference, "open_programs", programs)
    inference._programs(inputs.config, inputs.policy, inputs.mesh, inputs.plan)
    read = 4 * inputs.policy.cfg.num_params / inputs.mesh.shape["fsdp"]
    held = 0 if is_kept and tensor == 1 and not output_major else read
    assert (1 << 30) - seen[0] == pytest.approx(held, rel=0.1)


def test_answers_are_graded_with_the_time_and_the_memory_that_are_set(model, monkeypatch):
    """In as many workers; what training rewards beside does not matter."""
    limits = {"rewards.workers": 3, "rewards.timeout": 33.0, "rewards.memory_gib": 9.0}
    asked = configured(**{"model.path": str(model), "rewards.custom": "mine:own"} | limits)
    inputs = inference.open_evaluation(asked, str(model), None, {"mine": [Row("0", 0, "1+2", "3", {})]})

    def start(settings):
        given = {f"rewards.{name}": value for name, value in vars(settings).items()}
        raise InputError(f"{[given[name] == value for name, value in limits.items()]} {settings.names}")

    monkeypatch.setattr(inference, "Verifier", start)
    with contextlib.ExitStack() as stack, pytest.raises(InputError, match=r"\[True, True, True\] \('accuracy',\)"):
        inference.load(inputs, Console(), stack)


PROCESS = """
import sys
import jax
from igrpo_jax import evaluate
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
evaluate.main(["evaluate", *sys.argv[3:]])
"""


@pytest.mark.proof
@pytest.mark.slow(seconds=18)
@pytest.mark.parametrize("tensor", [1, 4])
def test_two_processes_split_the_problems_and_end_with_the_files_of_one(call, model, folder, tmp_path, tensor):
    """Rounds included: each refines its own problems, and the summary is of all. Killed rows of both are taken up.

    With groups of four devices, two of each process, they sample in lockstep, and process 0 has all problems.
    """
    given = ["--model", model, "--benchmarks=mine", "--samples=2", "--rounds=1", "--config.evaluation.drafts=2"]
    given += [f"--config.evaluation.data_dir={folder}", f"--config.rollout.mesh.tensor={tensor}"]
    call(evaluate, *given, "--workdir", tmp_path / "one")
    names = ("evaluation.json", "mine.jsonl", "summary.json", "summary.md")
    whole = {name: (tmp_path / "one" / name).read_text() for name in names}
    lines, out = whole["mine.jsonl"].splitlines(keepends=True), tmp_path / "two"
    out.mkdir()
    (out / "evaluation.json").write_text(whole["evaluation.json"])
    (out / "mine.process-1.jsonl").write_text(lines[0] + lines[-1][:30])  # of a problem that process 0 has now
    address = f"localhost:{free_port()}"
    given += [f"--config.{name}={value}" for name, value in TINY.items()]
    env = devices.environment(2, JAX_PLATFORMS="cpu")
    running = [Started(PROCESS, ["process", address, rank, *given, "--workdir", out], env) for rank in (0, 1)]
    done = ended(running)
    assert [process.returncode for process in done] == [0, 0], done
    said = [process.stdout + process.stderr for process in done]
    assert "| mine | 3 | 2 | " in said[0] and "mine" not in said[1]
    assert {path.name: path.read_text() for path in out.iterdir() if path.name != LOCK} == whole


@pytest.mark.slow
def test_sigterm_leaves_an_evaluation_that_the_same_command_continues(call, model, folder, tmp_path, monkeypatch):
    given = ["--model", model, "--benchmarks=mine", "--samples=8", f"--config.evaluation.data_dir={folder}"]
    call(evaluate, *given, "--workdir", tmp_path / "whole")
    check, graded = Verifier.check_answer, []

    def told(self, candidate, batch=None):
        graded.append(candidate)
        if len(graded) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(self, candidate, batch)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # else it would end the tests where nothing takes it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Verifier, "check_answer", told)
            said = call(evaluate, *given, "--workdir", tmp_path / "cut", code=75)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"preempted: the answers so far are in {tmp_path / 'cut'}; the same command resumes from there" in said
    assert len(texts(tmp_path / "cut")) < 24
    call(evaluate, *given, "--workdir", tmp_path / "cut")
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")


TOLD = """
import os, signal, sys
import jax
from igrpo_jax import evaluate
from igrpo_jax.cli import exits
from igrpo_jax.rewards.verifier import Verifier
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
check, told = Verifier.check_answer, sys.argv[2] == "1"
def graded(self, candidate, batch=None):
    if told:
        os.kill(os.getpid(), signal.SIGTERM)
    return check(self, candidate, batch)
Verifier.check_answer = graded
sys.argv = ["evaluate", *sys.argv[3:]]
exits.run(evaluate.main)
"""


@pytest.mark.proof
@pytest.mark.slow(seconds=18)
def test_sigterm_to_one_of_two_processes_ends_both(call, model, folder, tmp_path):
    given = ["--model", model, "--benchmarks=mine", "--samples=8", f"--config.evaluation.data_dir={folder}"]
    call(evaluate, *given, "--workdir", tmp_path / "one")
    given += [f"--config.{name}={value}" for name, value in TINY.items()] + ["--workdir", tmp_path / "two"]
    env = devices.environment(2, JAX_PLATFORMS="cpu")

    def both(program):
        address = f"localhost:{free_port()}"
        return ended([Started(program, ["process", address, rank, *given], env) for rank in (0, 1)])

    for process in both(TOLD):
        assert process.returncode == 75, process
        assert "preempted: the answers so far are in" in process.stderr
    assert not (tmp_path / "two" / "summary.json").exists()
    assert [process.returncode for process in both(PROCESS)] == [0, 0]
    assert texts(tmp_path / "two") == texts(tmp_path / "one")


@pytest.mark.slow
def test_generate_answers_and_refines(call, model, tmp_path):
    said = call(generate, "--model", model, "--prompt", "1+2", "--rounds", 1, "--config.evaluation.drafts=2")
    assert said.count("=== 1+2") == 1
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("---")] == [
        "--- answer 1",
        "--- answer 2",
        "--- round 1, from draft 1, answer 1",
        "--- round 1, from draft 1, answer 2",
    ]
    asked = igrpo_jax.load_config(None, TINY | {"evaluation.samples": 2}, model=model)
    ((first, second),) = igrpo_jax.generate_answers(asked, model, ["1+2"])
    assert first.keys() == {"text", "extracted", "token_count", "finished", "sample_id", "drafts"}  # nothing is graded
    assert (first["sample_id"], second["sample_id"]) == (0, 1)
    (tmp_path / "questions.txt").write_text("1+2\n\n3+4\n")
    said = call(generate, "--model", model, "--prompts", tmp_path / "questions.txt")
    assert said.count("--- answer 1: ") == 2 and "=== 3+4" in said


def test_questions_of_a_file(tmp_path, caplog):
    (tmp_path / "x.jsonl").write_text('{"problem": "1+2"}\n{"problem": "3+4"}\n')
    assert generate.read(str(tmp_path / "x.jsonl"), "") == ["1+2", "3+4"]
    for text in ("", "\n"):
        (tmp_path / "x.txt").write_text(text)
        with pytest.raises(InputError, match="is empty"):
            generate.read(str(tmp_path / "x.txt"), "")
    for name, words in (("none.txt", "no such file; give one with a question"), ("none.jsonl", "no such file")):
        with pytest.raises(InputError, match=words):
            generate.read(str(tmp_path / name), "")
    (tmp_path / "x.md").write_text("1+2")
    with pytest.raises(InputError, match=r"x\.md: can't be read; give a file that ends in \.txt, \.jsonl, \.csv"):
        generate.read(str(tmp_path / "x.md"), "")
    (tmp_path / "x.txt").write_bytes(b"1+\xff")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        generate.read(str(tmp_path / "x.txt"), "")
    for row in ({"prompt": 5}, {"prompt": [{"role": "assistant", "content": "2"}]}):
        (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "1+2"}) + "\n" + json.dumps(row))
        caplog.clear()
        assert generate.read(str(tmp_path / "x.jsonl"), "") == ["1+2"]
        assert re.search(r"1 of 2 rows has no readable 'prompt' \(.*\): row 2; left out", caplog.text)


def test_questions_that_would_be_left_out_are_named(tmp_path, caplog):
    file, rows = tmp_path / "x.jsonl", [{"prompt": "1+2"}, {"prompt": " "}, {"prompt": None}, {"text": "1"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"3 of 4 rows have a blank 'prompt': rows 2, 3, 4; fill them in or take"):
        generate.read(str(file), "")
    for flags in (["--prompt=1+2", "--prompt", "3+4"], ["--prompts=a.txt", "--prompts=b.txt"]):
        with pytest.raises(InputError, match="--prompt: given 2 times; put several questions into a file"):
            generate.main(["generate", "--model=m", *flags])


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line(call, model, run, folder, tmp_path):
    out = ("--workdir", tmp_path / "out")
    data = f"--config.evaluation.data_dir={folder}"
    assert "--model: missing" in call(evaluate, "--benchmarks", "mine", *out, code=2)
    assert "--workdir: missing" in call(evaluate, "--model", model, "--benchmarks=mine", code=2)
    assert "config.evaluation.benchmarks = (): name at least one" in call(evaluate, "--model", model, *out, code=2)
    assert "the nearest is 'mine'" in call(evaluate, "--model", model, "--benchmarks", "mien", data, *out, code=2)
    said = call(evaluate, "--model", model, "--benchmarks", "aime24", data, *out, code=2)
    assert "without the hub, give its folder" in said and "aime24.jsonl" in said
    (folder / "mine.jsonl").write_text("")
    assert "is empty" in call(evaluate, "--model", model, "--benchmarks", "mine", data, *out, code=2)
    (folder / "mine.jsonl").write_text('{"text": "1+1", "answer": "2"}\n')
    said = call(evaluate, "--model", model, "--benchmarks", "mine", data, *out, code=2)
    assert "has no column 'prompt'" in said and "text, answer" in said
    assert "config.evaluation.prompt_column names another" in said
    said = call(
        evaluate, "--model", model, "--benchmarks", "mine", data, "--config.evaluation.prompt_column=tex", *out, code=2
    )
    assert "has no column 'tex'" in said and "the nearest is 'text'" in said
    (folder / "mine.jsonl").write_text(json.dumps({"prompt": "1+" * 40, "answer": "2"}))
    said = call(evaluate, "--model", model, "--benchmarks", "mine", data, *out, code=2)
    assert "problem 1 of mine has" in said and "model's context of 64 leaves no room" in said
    (folder / "long.txt").write_text("1+1\n" + "1+" * 40)
    assert "problem 2 of prompts has" in call(generate, "--model", model, "--prompts", folder / "long.txt", code=2)
    said = call(evaluate, "--model", model, "--benchmarks=arithmetic", "--samples", "0", *out, code=2)
    assert "config.evaluation.samples = 0" in said
    said = call(evaluate, "--model", tmp_path / "no", "--benchmarks=arithmetic", *out, code=2)
    assert "config.model.path = " in said and "no such directory" in said
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.json", tmp_path / "begun")
    assert "wait for the first one" in call(generate, "--model", tmp_path / "begun", "--prompt=1+1", code=2)
    (tmp_path / "begun" / "checkpoints").rmdir()
    for command, flag in ((generate, "--prompt=1+1"), (evaluate, "--benchmarks=arithmetic")):
        said = call(command, "--model", tmp_path / "begun", flag, *(out if command is evaluate else ()), code=2)
        assert "has no checkpoint yet; wait for the first one (of step 0)" in said
    said = call(evaluate, "--model", model, "--step=3", "--benchmarks=arithmetic", *out, code=2)
    assert "only the folder of a run has steps" in said
    said = call(evaluate, "--model", run, "--step=x", "--benchmarks=arithmetic", *out, code=2)
    assert "--step x: must be a whole number" in said
    assert "give two folders" in call(evaluate, "--compare", "a", code=2)
    assert "is not a folder" in call(evaluate, "--compare", "a,b", code=2)
    assert "--benchmark: no such flag; the nearest is --benchmarks" in call(evaluate, "--benchmark", "mine", code=2)
    assert "--benchmarks: no such flag" in call(generate, "--benchmarks", "mine", code=2)
    assert "config.evaluation.sample: no such field" in call(evaluate, "--config.evaluation.sample=1", code=2)
    assert "--prompt: give either" in call(generate, "--model", model, code=2)
    (run / "config.json").write_text('{"seed": "x"}')
    assert "config.json can't be used" in call(evaluate, "--model", run, "--benchmarks=arithmetic", *out, code=2)
    assert not (tmp_path / "out").exists()


def test_help_names_the_flags_that_stand_for_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        parsing.parse_model(["evaluate", "--help"], evaluate.USAGE, evaluate.FLAGS)
    said = capsys.readouterr().out
    assert stop.value.code == 0 and len(said.splitlines()) < 20
    for flag in ("benchmarks", "samples", "rounds", "model", "workdir", "compare"):
        assert f"  --{flag} " in said


def test_the_chat_template_of_a_run_has_the_runs_values(tmp_path):
    """Also with another --config, unless it sets them itself."""
    own = {"template_kwargs": {"enable_thinking": False}, "template_date": "2026-11-26"}
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"data": own, "model": {"dtype": "float32"}}))
    (tmp_path / "other.py").write_text("from igrpo_jax.config import default as get_config\n")
    other = ["x", "--model", str(run), "--config", str(tmp_path / "other.py")]
    for command in (["x", "--model", str(run)], other):
        c, _ = parsing.parse_model(command, "", {})
        assert (c.data.template_kwargs, c.data.template_date) == tuple(own.values())
        given = ["--config.data.template_kwargs={'enable_thinking': True}", "--config.data.template_date=2026-11-27"]
        c, _ = parsing.parse_model([*command, *given], "", {})
        assert (c.data.template_kwargs, c.data.template_date) == ({"enable_thinking": True}, "2026-11-27")


def test_an_evaluation_asks_no_problem_that_the_run_was_trained_on(tmp_path, monkeypatch):
    """The first 20 are the run's own test problems."""
    own = {"data.arithmetic.train_problems": 300, "data.arithmetic.test_problems": 20}
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config.to_dict(igrpo_jax.load_config(None, own))))
    asked = own | {"data.arithmetic.test_problems": 1024, "evaluation.benchmarks": ("arithmetic",)}
    with pytest.raises(InputError, match=r"own data\.arithmetic\.test_problems = 20"):
        igrpo_jax.evaluate_model(igrpo_jax.load_config(None, asked, model=run), run, tmp_path / "out")

    def opened(settings, model, step, rows, date):
        raise LookupError(f"{len(rows['arithmetic'])} problems")

    monkeypatch.setattr(inference, "open_evaluation", opened)
    limited = igrpo_jax.load_config(None, asked | {"evaluation.limit": 20}, model=run)
    with pytest.raises(LookupError, match=r"^20 problems"):
        igrpo_jax.evaluate_model(limited, run, tmp_path / "out")


def test_the_line_above_an_answer_names_the_draft_that_it_was_shown():
    row = {"sample_id": 1, "extracted": "7", "token_count": 9, "finished": True, "drafts": []}
    assert generate.title(row) == "answer 2: 7 (9 tokens)"
    refined = row | {"drafts": [0, 2], "extracted": None, "finished": False}
    assert generate.title(refined) == "round 2, from draft 3, answer 2: states none (9 tokens, cut at the limit)"


@pytest.fixture
def dated_model(model, tmp_path):
    """The tiny Llama with a template that writes the day, and a mark that can be set."""
    path = shutil.copytree(model, tmp_path / "dated")
    template = "{{ strftime_now('%d') }}{{ mark }}" + arithmetic.CHAT_TEMPLATE
    (path / "chat_template.jinja").write_text(template)
    return path


@pytest.fixture
def byte_model(tmp_path):
    """A tiny Llama with a tokenizer of bytes, whose files a test may change."""
    path = tmp_path / "bytes"
    path.mkdir()
    save_byte_model(path)
    return path


def other_template(path):
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}: ")


def other_tokenizer(path):
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + "\n")


CHANGES = {"chat template": other_template, "tokenizer": other_tokenizer}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_an_evaluation_is_not_resumed_with_other_prompts(call, byte_model, folder, tmp_path, monkeypatch, what):
    """Questions and weights are the same. Each command ends where it would read the weights."""

    def load(*_):
        raise InputError("this far")

    monkeypatch.setattr(inference, "load", load)
    given = ["--model", byte_model, "--benchmarks=mine", f"--config.evaluation.data_dir={folder}"]
    given += ["--workdir", tmp_path / "out"]
    for _ in range(2):
        assert "this far" in call(evaluate, *given, code=2)
    CHANGES[what](byte_model)
    said = call(evaluate, *given, code=2)
    told = f"{what.replace(' ', '_')}: the {what} of the model differs from that of the earlier evaluation"
    assert f"holds an evaluation with other settings ({told}); give another --workdir, or the old values" in said
    head = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    head.pop("chat_template"), head.pop("tokenizer")  # as an older version wrote it
    (tmp_path / "out" / "evaluation.json").write_text(json.dumps(head))
    assert "this far" in call(evaluate, *given, code=2)
    assert "tokenizer" in json.loads((tmp_path / "out" / "evaluation.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_not_exported_or_asked_with_other_prompts(call, byte_model, folder, tmp_path, monkeypatch, what):
    """The tokenizer and its template are read from the model's own files again. A run of before goes on."""
    c = configured(**{"model.path": str(byte_model)})
    workdir, mesh = tmp_path / "run", sharding.make_mesh(c.mesh)
    workdir.mkdir()
    prepare_workdir(workdir, c)
    policy = open_policy(c.model)
    weights.record_first(policy, workdir)
    with Checkpointer(workdir, c.checkpoint) as store:
        count = jax.device_put(jnp.int32(0), sharding.replicated(mesh))
        store.save(1, State(policy.load(mesh, 0), count), {}, force=True)
    export.export(workdir, tmp_path / "before")
    CHANGES[what](byte_model)
    told = f"config.model.path = '{byte_model}': the {what} differs from the one that the run in {workdir} started with"
    with pytest.raises(InputError, match=re.escape(told)):
        export.export(workdir, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    asked = ["--benchmarks=mine", f"--config.evaluation.data_dir={folder}", "--workdir", tmp_path / "out"]
    assert told in call(evaluate, "--model", workdir, *asked, code=2) and not (tmp_path / "out").exists()
    assert told in call(generate, "--model", workdir, "--prompt=1+2", code=2)
    asked = [f"--data={folder / 'mine.jsonl'}", "--workdir", tmp_path / "probe"]
    sizes = {"prompts_per_step": 3, "rollout.max_completion_length": 64, "refine.max_draft_length": 64}
    asked += [f"--config.{name}={value}" for name, value in sizes.items()]
    assert told in call(probe, "--model", workdir, *asked, code=2) and not (tmp_path / "probe").exists()
    record = json.loads((workdir / weights.FIRST).read_text())
    (workdir / weights.FIRST).write_text(json.dumps({name: record[name] for name in ("path", "fingerprint")}))
    export.export(workdir, tmp_path / "after")


@pytest.mark.slow
def test_an_evaluation_keeps_the_day_of_its_chat_template(call, dated_model, folder, tmp_path, monkeypatch):
    """It was continued on the next day with other prompts. Here each command ends where it would read the weights."""
    opened = []

    def load(inputs, *_):
        opened.append(inputs)
        raise InputError("this far")

    def begin(model, out, *more, says="this far"):
        given = ["--model", model, "--benchmarks=mine", f"--config.evaluation.data_dir={folder}"]
        said = call(evaluate, *given, "--workdir", tmp_path / out, *more, code=2)
        assert says in said
        return json.loads((tmp_path / out / "evaluation.json").read_text())

    def prompt():
        return opened[-1].policy.tokenizer.decode(opened[-1].plan.prompts["mine"][0].tokens)

    monkeypatch.setattr(inference, "load", load)
    chat_templates.set_today(monkeypatch, "2026-11-26")
    assert begin(dated_model, "a")["template_date"] == "2026-11-26" and prompt() == "26<|user|>0+1<|assistant|>"
    chat_templates.set_today(monkeypatch, "2026-11-27")
    assert begin(dated_model, "b")["template_date"] == "2026-11-27" and prompt() == "27<|user|>0+1<|assistant|>"
    head = begin(dated_model, "a")
    assert head["template_date"] == "2026-11-26" and prompt() == "26<|user|>0+1<|assistant|>"
    other = "other settings (template_date: '2026-11-26' -> '2026-11-27'); give another --workdir, or the old values"
    begin(dated_model, "a", "--config.data.template_date=2026-11-27", says=other)
    del head["template_date"]  # as an older version wrote it
    (tmp_path / "a" / "evaluation.json").write_text(json.dumps(head))
    begin(dated_model, "a", says="config.data.template_date = '': the chat template of the model writes the date")
    assert begin(dated_model, "a", "--config.data.template_date=2026-11-26")["template_date"] == "2026-11-26"


@pytest.mark.slow
def test_a_run_and_its_export_have_the_same_prompts_on_any_day(call, dated_model, tmp_path, monkeypatch):
    """With the day and the variables of the run, also where transformers renders the template of the export."""
    prompts = []

    def load(inputs, *_):
        prompts.append(inputs.policy.tokenizer.decode(inputs.plan.prompts["prompts"][0].tokens))
        raise InputError("this far")

    monkeypatch.setattr(inference, "load", load)
    chat_templates.set_today(monkeypatch, "2026-11-26")
    begun = configured(**{"model.path": str(dated_model), "data.template_kwargs": {"mark": "x"}})
    run_config, policy, _ = open_model(begun)
    workdir, mesh = tmp_path / "run", sharding.make_mesh(run_config.mesh)
    workdir.mkdir()
    prepare_workdir(workdir, run_config)
    with Checkpointer(workdir, run_config.checkpoint) as store:
        count = jax.device_put(jnp.int32(0), sharding.replicated(mesh))
        store.save(1, State(policy.load(mesh, 0), count), {}, force=True)
    chat_templates.set_today(monkeypatch, "2026-11-27")
    export.export(workdir, tmp_path / "export")
    for path, want in ((workdir, "26x"), (tmp_path / "export", "26x"), (dated_model, "27")):
        call(generate, "--model", path, "--prompt=1+2", code=2)
        assert prompts[-1] == f"{want}<|user|>1+2<|assistant|>"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    turns = [{"role": "user", "content": "1+2"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "26x<|user|>1+2"
    assert tokenizer.apply_chat_template(turns, tokenize=False, mark="y") == "26y<|user|>1+2"


@pytest.mark.slow
def test_the_model_of_a_run_is_the_runs_own(run, tmp_path):
    (run / "config.json").write_text(json.dumps({"seed": 4, "model": {"dtype": "float32"}, "gone": 1}))
    with pytest.raises(InputError, match=r"config\.gone: no such field"):
        parsing.parse_model(["x", "--model", str(run)], "", {})
    (run / "config.json").write_text(json.dumps({"seed": 4, "model": {"dtype": "float32"}}))
    c, _ = parsing.parse_model(["x", "--model", str(run), "--config.evaluation.samples=3"], "", {})
    assert (c.seed, c.model.dtype, c.evaluation.samples) == (4, "float32", 3)
    (tmp_path / "other.py").write_text("from igrpo_jax.config import default as get_config\n")
    c, _ = parsing.parse_model(["x", "--model", str(run), "--config", str(tmp_path / "other.py")], "", {})
    assert (c.seed, c.model.dtype) == (0, "float32")
    c, _ = parsing.parse_model(["x", "--model=owner/name", "--benchmarks", "a, b", "--rounds=2"], "", evaluate.FLAGS)
    assert (c.model.path, c.evaluation.benchmarks, c.evaluation.rounds) == ("owner/name", ("a", "b"), 2)


def test_the_table_counts_one_answer_as_one():
    for samples, said in ((1, "2 problems, 1 answer each"), (2, "2 problems, 2 answers each")):
        settings = config.Config(evaluation=config.EvaluationConfig(samples=samples))
        policy = SimpleNamespace(cfg=SimpleNamespace(num_params=1))
        plan = SimpleNamespace(prompts={"mine": [1, 2]}, max_new_tokens=8, notes=[])
        inputs = SimpleNamespace(config=settings, plan=plan, step=None, policy=policy, name="m")
        assert ("mine", said) in evaluate.overview(inputs)


def test_no_benchmark_is_refused_by_the_function_too(tmp_path):
    settings = igrpo_jax.load_config(None, {"model.path": "m"})
    with pytest.raises(InputError, match=r"config\.evaluation\.benchmarks = \(\): name at least one, such as aime24"):
        igrpo_jax.evaluate_model(settings, "m", tmp_path / "out")
