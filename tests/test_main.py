"""The command line on bad input: one line that names the field, the value and the fix, exit code 2, nothing written."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import igrpo_jax
from igrpo_jax import __main__ as commands
from igrpo_jax import config, evaluate, export, generate, main, sft
from igrpo_jax.aot import __main__ as aot
from igrpo_jax.cli import exits, parsing
from igrpo_jax.data import arithmetic
from igrpo_jax.errors import InputError
from igrpo_jax.probe import __main__ as probe
from igrpo_jax.report import __main__ as report
from igrpo_jax.schema import fields

ROOT = Path(__file__).parents[1]
TINY = """
from igrpo_jax.config import default

def get_config():
    c = default()
    c.steps, c.prompts_per_step = 1, 2
    c.model.dtype = "float32"
    c.data.max_prompt_length = 256
    c.rollout.max_completion_length, c.rollout.slots, c.rollout.steps_per_dispatch = 8, 8, 4
    c.refine.instruction = "{draft}"
    return c
"""
HF = {
    "model_type": "llama",
    "vocab_size": 112,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama with the built-in tokenizer, as a Hugging Face directory."""
    pytest.importorskip("torch", reason="PyTorch is not installed; the extra parity brings it")
    import transformers

    path = tmp_path_factory.mktemp("model") / "llama"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF)).save_pretrained(path)
    arithmetic.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(4)))
    return path


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the command with these overrides and returns the one line it says; checks all that bad input must not do."""
    (tmp_path / "tiny.py").write_text(TINY)

    def run(*overrides: str, workdir=None) -> str:
        where = workdir or tmp_path / "run"
        before = sorted(tmp_path.rglob("*"))
        argv = ["main", "--config", str(tmp_path / "tiny.py"), "--workdir", str(where)]
        monkeypatch.setattr(sys, "argv", argv + [f"--config.{x}" if x[0] != "-" else x for x in overrides])
        with pytest.raises(SystemExit) as stop:
            exits.run(main.main)
        out = capsys.readouterr()
        assert stop.value.code == 2
        assert out.err.startswith("igrpo_jax: error: ") and out.err.count("\n") == 1 and "Traceback" not in out.err
        assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before
        return out.err

    return run


def test_a_flag_that_takes_the_place_of_a_value(refused):
    said = refused("--config.data.instruction", "--config.steps=3")
    assert said.endswith("--config.data.instruction: has no value; give it as --config.data.instruction=VALUE\n")


def test_unknown_fields_and_flags(refused):
    assert "config.rollout.slot: no such field; the nearest is config.rollout.slots" in refused("rollout.slot=3")
    assert "--wrkdir: no such flag; the nearest is --workdir\n" in refused("--wrkdir=x")
    assert "--workdir: has no value; give it as --workdir=VALUE\n" in refused("--workdir")
    assert "config.algorithm.loss_type = 'ppo': must be one of grpo" in refused("algorithm.loss_type=ppo")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=many", "config.steps = 'many': must be a whole number"),
        ("seed=1.5", "config.seed = '1.5': must be a whole number"),
        ("algorithm.epsilon=low", "config.algorithm.epsilon = 'low': must be a number or None"),
        ("rollout.streamed=3", "config.rollout.streamed = '3': must be True or False"),
        ("data.template_date=today", "config.data.template_date = 'today': must be a day such as 2026-01-31, or empty"),
        (
            'data.template_kwargs={"enable_thinking": false}',
            "config.data.template_kwargs = '{\"enable_thinking\": false}': must be a mapping as Python writes it, such "
            "as {'enable_thinking': False}",
        ),
    ],
)
def test_values_of_another_type(refused, override, words):
    assert refused(override) == f"igrpo_jax: error: {words}\n"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("evaluation.samples=None", "evaluation.samples", None),
        ("evaluation.samples=3", "evaluation.samples", 3),
        ("model.lora.targets=q_proj,k_proj", "model.lora.targets", ("q_proj", "k_proj")),
        ("model.lora.targets=('q_proj', 'k_proj')", "model.lora.targets", ("q_proj", "k_proj")),
        ("model.lora.targets=q_proj", "model.lora.targets", ("q_proj",)),
        ("log.trackers=", "log.trackers", ()),
        ("log.trackers='wandb'", "log.trackers", ("wandb",)),
        ("log.profile_steps=2,3", "log.profile_steps", (2, 3)),
        ("log.profile_steps=[2]", "log.profile_steps", (2,)),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("rollout.streamed=false", "rollout.streamed", False),
        ("data.template_kwargs={'x': 1}", "data.template_kwargs", {"x": 1}),
        ("data.instruction=a=b\nc", "data.instruction", "a=b\nc"),
        ("data.instruction=--- a", "data.instruction", "--- a"),
        ("steps=3 --config.steps=5", "steps", 5),  # the last one counts
        ("algorithm.epsilon_high 0.28", "algorithm.epsilon_high", 0.28),
    ],
)
def test_values_of_flags(tmp_path, override, path, value):
    (tmp_path / "tiny.py").write_text(TINY)
    flags = f"--config.{override}"
    flags = flags.split() if "--config.steps=5" in flags or " 0.28" in flags else [flags]
    made, _ = parsing.parse(["main", *flags, "--config", str(tmp_path / "tiny.py")])
    assert fields.value_at(made, path) == value and type(fields.value_at(made, path)) is type(value)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--num_generations=4", "--num_generations: no such flag; did you mean --config.algorithm.num_generations"),
        ("--num-generations=4", "--num-generations: no such flag; did you mean --config.algorithm.num_generations"),
        ("--num_generation=4", "--num_generation: no such flag; the nearest is --config.algorithm.num_generations"),
        (
            "--temperature=1",
            "--temperature: no such flag; did you mean --config.rollout.temperature or "
            "--config.rewards.judge.temperature or --config.evaluation.temperature",
        ),
        ("--lr=1", "--lr: no such flag; did you mean --config.optimizer.learning_rate or --config.warm_start."),
        ("--learning_rate=1", "--learning_rate: no such flag; did you mean --config.optimizer.learning_rate or --"),
        ("--max-steps=8", "--max-steps: no such flag; did you mean --config.steps\n"),
        ("--output_dir=x", "--output_dir: no such flag; did you mean --workdir\n"),
        ("--optimiser=adamw", "--optimiser: no such flag; the command has --config, "),
        (
            "--config.optimizer.lr=1",
            "config.optimizer.lr: no such field; the nearest is config.optimizer.learning_rate",
        ),
        ("--rollout.slots=8", "--rollout.slots: no such flag; did you mean --config.rollout.slots"),
        ("-num_drafts=4", "--num_drafts: no such flag; did you mean --config.algorithm.num_drafts"),
        ("--config.steps", "--config.steps: has no value; give it as --config.steps=VALUE"),
        (
            "--config.rollout=8",
            "config.rollout = '8': is a group of settings; give one of them, such as --config.rollout.",
        ),
        ("--config.log.profile_steps=1.5", "config.log.profile_steps = '1.5': each entry must be a whole number"),
        ("--config.log.profile_steps=(1.5,)", "config.log.profile_steps = (1.5,): each entry must be a whole number"),
        (
            "--config.log.trackers=(a",
            "config.log.trackers = '(a': must be values separated by commas, such as a,b",
        ),
        ("--config.evaluation.samples=2.5", "config.evaluation.samples = '2.5': must be a whole number or None"),
    ],
)
def test_flags_that_are_not_understood(refused, flag, words):
    assert f"igrpo_jax: error: {words}" in refused(flag)


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("num_drafts=4", "did you mean --config.algorithm.num_drafts=4"),
        ("lr=4", "did you mean --config.optimizer.learning_rate=4"),
        ("output_dir=x", "did you mean --workdir=x"),
        ("configs/tiny_cpu.py", "a configuration file is given as --config configs/tiny_cpu.py"),
        ("train", "settings are given as --config.field=value"),
    ],
)
def test_arguments_that_are_no_flags(argument, meant):
    with pytest.raises(InputError) as error:
        parsing.parse(["main", "--config", "configs/tiny_cpu.py", argument])
    assert str(error.value) == f"{argument}: not understood; {meant}"


def test_a_question_without_its_flag():
    with pytest.raises(InputError, match=r'^What is 2\+2\?: not understood; a question is given as --prompt "What is'):
        generate.main(["generate", "--model", "M", "What is 2+2?"])


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (export, ["--model=x"], "--model: no such flag; did you mean --workdir"),
        (main, ["--out=x"], "--out: no such flag; did you mean --workdir"),
        (generate, ["--out=x"], "--out: no such flag; the command has --config, --model, --prompt, "),
        (evaluate, ["--compare", "a", "b"], "b: not understood; two evaluations are given as --compare a,b"),
        (evaluate, ["--compare", "a,", "b"], "b: not understood; two evaluations are given as --compare a,b"),
    ],
)
def test_what_is_known_of_another_command_is_put_right(command, flags, said):
    with pytest.raises(InputError) as error:
        command.main(["command", *flags])
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("command", "flags", "empty"),
    [
        (main, ["--config=configs/tiny_cpu.py", "--workdir", ""], "workdir"),
        (main, ["--config=", "--workdir=x"], "config"),
        (sft, ["--config=configs/tiny_cpu.py", "--workdir="], "workdir"),
        (evaluate, ["--model=", "--workdir=x", "--benchmarks=arithmetic"], "model"),
        (probe, ["--model=x", "--data=x", "--workdir="], "workdir"),
        (export, ["--workdir=x", "--out="], "out"),
        (export, ["--workdir=", "--out=x"], "workdir"),
        (report, ["--workdir=x", "--workdir="], "workdir"),
    ],
)
def test_an_empty_flag_is_no_flag_that_is_left_out(command, flags, empty, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f'^--{empty} "": is empty'):
        command.main(["command", *flags])


def test_a_question_that_is_no_text_is_named():
    """Bytes of the command line that are no utf-8 are lone surrogates in Python."""
    with pytest.raises(InputError, match=r"^--prompt '\\udcbd\+1': is not UTF-8 text"):
        generate.main(["generate", "--model", "M", "--prompt", "\udcbd+1"])


@pytest.mark.parametrize("argv", [[], ["--config.steps=3"], ["--workdir=x"]])
@pytest.mark.parametrize("folder", [ROOT, None])
def test_a_forgotten_config_names_an_example(monkeypatch, tmp_path, argv, folder):
    monkeypatch.chdir(folder or tmp_path)
    with pytest.raises(InputError, match=r"^--config: missing; .* for example --config (.*)$") as error:
        parsing.parse(["main", *argv])
    assert str(error.value).endswith("configs/tiny_cpu.py" if folder else "my_config.py")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("c.prompts_per_step = 2.0", "config.prompts_per_step = 2.0: must be a whole number; write 2"),
        (
            'c.optimizer.learning_rate = "1e-5"',
            "config.optimizer.learning_rate = '1e-5': must be a number; write 1e-5 without quotation marks",
        ),
        (
            'c.model.lora.targets = "q_proj"',
            "config.model.lora.targets = 'q_proj': must be a tuple, each entry a text; write ('q_proj',)",
        ),
        ("c.steps = -1", "config.steps = -1: must be 0"),
        ("c.learner.minibatches = 3", "config.learner.minibatches = 3: must divide the 8 trained completions"),
        ("c.stesp = 3", "config.stesp: no such field; the nearest is config.steps"),
        ("c.rolout.slots = 3", "config.rolout: no such field; the nearest is config.rollout"),
        ("c.algorithm.los_type = 3", "config.algorithm.los_type: no such field; the nearest is config.algorithm.loss_"),
        ("c.rollout = 3", "config.rollout = 3: is a group of settings; set its fields one by one"),
        ("c.steps = dd", "NameError: name 'dd' is not defined; it reads `c.steps = dd`"),
        ("c.steps = = 3", "SyntaxError: invalid syntax; it reads `c.steps = = 3`"),
        ("raise SystemExit(3)", "SystemExit: 3; it reads `raise SystemExit(3)`"),
        (f"raise ValueError('{'long ' * 99}end')", "long end; it reads `raise ValueError("),
    ],
)
def test_an_error_in_a_config_file_names_its_line(refused, tmp_path, line, words):
    text = TINY.replace("return c", f"{line}\n    return c")
    (tmp_path / "tiny.py").write_text(text)
    place = f"{tmp_path / 'tiny.py'}, line {text[: text.index(line)].count(chr(10)) + 1}: "
    said = refused()
    assert said.startswith(f"igrpo_jax: error: {place}") and words in said


def test_the_line_of_a_value_that_a_flag_replaced_is_not_named(refused, tmp_path):
    (tmp_path / "tiny.py").write_text(TINY.replace("return c", "c.learner.minibatches = 1\n    return c"))
    assert refused("learner.minibatches=3").startswith("igrpo_jax: error: config.learner.minibatches = 3: must divide")


def test_the_line_of_a_value_is_that_of_the_file_that_it_comes_from(refused, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "base_of_tiny.py").write_text(TINY.replace("return c", "c.steps = 1.5\n    return c"))
    (tmp_path / "tiny.py").write_text("from base_of_tiny import get_config")
    line = TINY[: TINY.index("return c")].count("\n") + 1
    assert refused().startswith(f"igrpo_jax: error: {tmp_path / 'base_of_tiny.py'}, line {line}: config.steps = 1.5: ")


def test_a_config_file_that_is_wrong(refused, tmp_path):
    assert "--config configs/tiny_cp.py: no such file; the nearest is configs/tiny_cpu.py\n" in refused(
        "--config=configs/tiny_cp.py"
    )
    file = tmp_path / "tiny.py"
    file.write_text(TINY.replace("return c", "pass"))
    assert f"{file}: get_config() must return a ConfigDict, not None; end it with `return config`" in refused()
    file.write_text("def config(): pass")
    assert f"{file}: has no get_config(); start it as " in refused()
    file.write_text("def get_config(x): pass")
    assert f"{file}: TypeError: get_config() missing 1 required positional argument: 'x'" in refused()


def test_model_directories(refused, model, tmp_path):
    assert "config.model.path = '/nowhere/at/all': no such directory" in refused("model.path=/nowhere/at/all")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(f"model.path={tmp_path / 'empty'}")
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"model_type": "mamba"}))
    assert "model_type = 'mamba' is not supported; supported are llama, qwen2" in refused(f"model.path={other}")
    (other / "config.json").write_text(json.dumps(config.to_dict(config.Config())))
    said = refused(f"model.path={other}")
    assert "is the folder of a run" in said and f"igrpo_jax.export --workdir {other} --out DIR" in said
    (other / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 2}))
    said = refused(f"model.path={other}")
    assert "missing from the files" in said and "model.layers.1." in said


def test_data_files(refused, model, problems, tmp_path):
    def says(text: str, *more: str) -> str:
        problems.write_text(text)
        return refused(f"model.path={model}", f"data.train={problems}", *more)

    assert "no such file" in refused(f"model.path={model}", f"data.train={tmp_path / 'nowhere.jsonl'}")
    assert "is empty" in says("")
    row = {"prompt": "1+1", "answer": "2"}
    assert "'question'" in says(json.dumps(row), "data.prompt_column=question")
    rows = [row, row | {"answer": " "}, row, row | {"answer": None}]
    said = says("\n".join(map(json.dumps, rows)))
    assert "2 of 4 rows" in said and "2, 4" in said
    said = says(json.dumps(row | {"prompt": "1+1" * 100}))
    assert "config.data.max_prompt_length = 256: all 1 prompts are longer" in said


def test_lengths_beyond_the_models_context(refused, model, problems):
    said = refused(f"model.path={model}", f"data.train={problems}", "rollout.max_completion_length=600")
    assert "config.rollout.max_completion_length" in said and "the model's context is 512" in said


def test_a_step_of_more_prompts_than_there_are_problems(refused):
    assert refused("prompts_per_step=5", "data.arithmetic.train_problems=4") == (
        "igrpo_jax: error: config.prompts_per_step = 5: there are 4 training problems, so a step would hold some of "
        "them more than once; set it to 4 or less, or give more problems\n"
    )


@pytest.mark.parametrize(
    ("command", "flags", "named"),
    [
        (main, ("--config=configs/tiny_cpu.py", "--workdir=az://b/x"), "--workdir az://b/x: "),
        (export, ("--workdir=az://b/x", "--out=y"), "--workdir az://b/x: "),
        (export, ("--workdir=x", "--out=az://b/y"), "--out az://b/y: "),
        (report, ("--workdir=az://b/x",), "--workdir az://b/x: "),
        (report, ("--workdir=x", "--out=az://b/y"), "--out az://b/y: "),
        (evaluate, ("--model=x", "--benchmarks=arithmetic", "--workdir=az://b/x"), "--workdir az://b/x: "),
        (evaluate, ("--model=az://b/x", "--benchmarks=arithmetic", "--workdir=x"), "--model az://b/x: "),
    ],
)
def test_a_bucket_that_nothing_reaches_is_no_folder(command, flags, named, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(Path("configs").absolute())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(SystemExit) as stop:
        exits.run(command.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"igrpo_jax: error: {named}az:// is not supported; give a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


@pytest.mark.slow
def test_meshes_that_do_not_fit(refused, model, problems):
    assert "3 does not divide the 8 devices" in refused("mesh.tensor=3")
    assert "uses 2 of 8 devices" in refused("mesh.data=2", "mesh.fsdp=1")
    real = (f"model.path={model}", f"data.train={problems}")
    assert "config.mesh.tensor = 8" in refused(*real, "mesh.tensor=8")  # 4 heads
    assert "config.rollout.slots = 6: must be a multiple" in refused(*real, "rollout.slots=6")


@pytest.mark.slow
def test_settings_that_the_objective_and_lora_can_not_follow(refused):
    assert "must be above 1 + epsilon_high" in refused("algorithm.delta=1.1")
    assert "'q_prj' matches no weight" in refused("model.lora.rank=2", "model.lora.targets=('q_prj',)")


@pytest.mark.slow
def test_workdirs_that_cannot_be_used(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refused(workdir=tmp_path / "file" / "run")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    assert "no config.json of a run" in refused(workdir=tmp_path / "photos")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (main, {"config", "workdir", "coordinator", "processes", "process"}),
        (aot, {"config", "slices", "topology"}),
        (
            evaluate,
            {"config", "model", "benchmarks", "samples", "rounds", "workdir", "step", "compare", *parsing.CLUSTER},
        ),
        (generate, {"config", "model", "prompt", "prompts", "samples", "rounds", "step", *parsing.CLUSTER}),
        (export, {"workdir", "out", "step", "push", "public", "adapter", "help"}),
        (sft, {"config", "workdir", *parsing.CLUSTER}),
        (report, {"workdir", "out", "help"}),
    ],
)
def test_help_lists_the_commands_own_flags(monkeypatch, capsys, command, flags):
    """A line each, neither those of absl nor those that mean nothing here, and no path of this machine."""
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as stop:
        exits.run(command.main)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and str(ROOT) not in out
    assert set(re.findall(r"^  --(\w+) +\w", out, re.MULTILINE)) == flags


def test_the_commands_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["igrpo-jax"])
    assert commands.main() == 0
    out = capsys.readouterr().out
    for name in commands.COMMANDS:
        assert f"python -m igrpo_jax.{name} " in out
        spec = importlib.util.find_spec(f"igrpo_jax.{name}")
        assert spec.submodule_search_locations is None or importlib.util.find_spec(f"igrpo_jax.{name}.__main__")


def test_a_command_that_does_not_exist_names_the_nearest(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["igrpo-jax", "evalute", "--model=x"])
    assert commands.main() == 2
    assert capsys.readouterr().err == "igrpo_jax: error: evalute: no such command; the nearest is evaluate\n"


@pytest.mark.slow
def test_the_module_of_training_names_the_command_that_trains():
    start = [sys.executable, "-m", "igrpo_jax.train", "--config", "configs/tiny_cpu.py"]
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is not a command; to train, run python -m igrpo_jax.main --config FILE" in done.stderr


def test_the_console_script_runs_a_command_as_python_m_does(tmp_path):
    """The script that setup.py declares, with a config file whose module lies in the current folder."""
    (entry,) = re.findall(r'"console_scripts": \["igrpo-jax=([\w.]+:\w+)"\]', (ROOT / "setup.py").read_text())
    module, function = entry.split(":")
    script = tmp_path / "bin" / "igrpo-jax"
    script.parent.mkdir()
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    (tmp_path / "mine.py").write_text(TINY)
    (tmp_path / "tiny.py").write_text("from mine import get_config")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = []
    for start in ([str(script), "main"], ["-m", "igrpo_jax", "main"], ["-m", "igrpo_jax.main"]):
        argv = [sys.executable, *start, "--config", "tiny.py", "--config.steps=-1"]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        said.append((done.returncode, done.stderr))
    assert said[0] == said[1] == said[2] and said[0][0] == 2
    assert said[0][1].startswith("igrpo_jax: error: config.steps = -1: must be 0")


def test_a_configuration_from_python(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    made = igrpo_jax.load_config(tmp_path / "tiny.py", {"algorithm.num_drafts": 2, "evaluation.samples": None})
    assert (made.algorithm.num_drafts, made.steps, made.evaluation.samples) == (2, 1, None)
    assert igrpo_jax.load_config() == config.Config()
    tree = config.default()
    tree.steps = 7
    assert igrpo_jax.load_config(tree, {"algorithm.num_drafts": 2}).steps == 7 and tree.algorithm.num_drafts == 4
    assert igrpo_jax.load_config(model="owner/name").model.path == "owner/name"
    again = igrpo_jax.load_config(made, {"steps": 7})
    assert again == dataclasses.replace(made, steps=7) and again != made
    for wrong, words in (
        ({"num_drafts": 2}, "the nearest is config.algorithm.num_drafts"),
        ({"steps": "2"}, "write 2"),
        ({"algorithm": {"num_drafts": 0}}, r"dotted names, as in {'algorithm.loss_type': VALUE}"),
    ):
        with pytest.raises(InputError, match=words):
            igrpo_jax.load_config(tmp_path / "tiny.py", wrong)
    with pytest.raises(InputError, match=r"settings are the second argument, as in load_config\(None, {'steps': 3}\)"):
        igrpo_jax.load_config({"steps": 3})
    fields_to_values = "must be a mapping from names of fields to values, such as {'steps': 3}"
    for arguments, words in (
        ((None, ["steps=3"]), f"overrides = ['steps=3']: {fields_to_values}"),
        ((None, "steps=3"), f"overrides = 'steps=3': {fields_to_values}"),
        ((None, []), f"overrides = []: {fields_to_values}"),
        ((None, {3: 3}), "overrides = {3: 3}: 3 is not a field name; give a mapping from names to values"),
        ((3,), "source = 3: is not a config file; give its path, or igrpo_jax.config.default() with"),
        ((None, None, 3), "--model 3: is not a path; give a text or a pathlib.Path"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(words)}"):
            igrpo_jax.load_config(*arguments)
    with pytest.raises(InputError, match=r"^--config nope.py: no such file; (the nearest is|give a Python file)"):
        igrpo_jax.load_config("nope.py")


@pytest.mark.parametrize("call", [igrpo_jax.train_model, igrpo_jax.evaluate_model, igrpo_jax.generate_answers])
@pytest.mark.parametrize("given", ["own.py", config.default()], ids=["a file", "a tree"])
def test_a_configuration_that_nobody_has_checked_is_refused(call, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {igrpo_jax.train_model: ["run"], igrpo_jax.evaluate_model: ["m", "out"]}.get(call, ["m", ["1"]])
    with pytest.raises(InputError, match=r"^config = .*: is not a checked configuration; give what load") as error:
        call(given, *arguments)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_function_of_steps_that_is_none_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="on_step = 5: must be a function"):
        igrpo_jax.train_model(config.Config(), tmp_path / "run", on_step=5)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_config_file_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(config.Config())))
    (tmp_path / "model.json").write_text("{}")
    for name in ("a.yaml", "a.txt"):
        (tmp_path / name).write_text(TINY)
    for name, words in (
        ("", "is a folder; a config file is a Python file that has get_config()"),
        ("config.json", "was written by a run; a run's settings come from its --config file; give that file"),
        ("model.json", "ends in .json; a config file is a Python file that has get_config()"),
        ("a.yaml", "ends in .yaml; a config file is a Python file"),
        ("a.txt", "ends in .txt; a config file is a Python file"),
    ):
        with pytest.raises(InputError, match=f"^--config {re.escape(f'{tmp_path / name}: {words}')}"):
            igrpo_jax.load_config(tmp_path / name)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^--workdir None: is not a path; give a text or a pathlib.Path, such as '"):
        igrpo_jax.train_model(config.Config(), None)


def test_questions_that_are_none_are_refused():
    for wrong, words in (
        ([], "at least one"),
        ("7-3", "give a list"),
        (["1", None], "None is not a question"),
        ([" "], "' ' is not a question"),
        (["1", "\udcbd"], r"'\\udcbd' is not a question"),
    ):
        with pytest.raises(InputError, match=words):
            generate.generate(config.Config(), "m", wrong)


@pytest.mark.parametrize(
    "call", [lambda c: evaluate.evaluate(c, "m", "out"), lambda c: generate.generate(c, "m", ["1"])]
)
def test_a_configuration_of_another_model_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"config\.model: is not that of m; use what load_config\(..., model='m'\)"):
        call(igrpo_jax.load_config(model="another"))
    assert list(tmp_path.iterdir()) == []
