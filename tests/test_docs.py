"""Docs against the code: every setting, metric and alert has its line, the floors are those of the imports, links lead
somewhere, examples work, and the notebook runs from top to bottom."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import devices
import jax.numpy as jnp
import model_files
import numpy as np
import pytest
from test_structure import FILES, FLOORS

import igrpo_jax
from igrpo_jax import config
from igrpo_jax.data import catalog
from igrpo_jax.learning import objectives
from igrpo_jax.learning.loss import TokenValues
from igrpo_jax.learning.loss import loss as objective_loss
from igrpo_jax.loading import load_config
from igrpo_jax.models.config import READERS
from igrpo_jax.outputs import alerts
from igrpo_jax.records import Candidate
from igrpo_jax.rewards import functions
from igrpo_jax.rewards.functions import CustomReward, TrainerState
from igrpo_jax.schema import fields, rules

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "benchmarks" / "RESULTS.md",
        ROOT / "benchmarks" / "accelerator.md",
        *DOCS.rglob("*.md"),
    ]
)


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def module(name):
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


# The configuration reference.


def test_the_configuration_reference_is_what_config_py_says():
    assert page("configuration.md") == module("configuration").reference(), "run python docs/configuration.py"


def test_every_setting_has_a_line_with_a_meaning():
    rows = [line.strip("| ").split(" | ") for line in page("configuration.md").splitlines() if line.startswith("| `")]
    meanings = {cells[0].strip("`"): cells[-1] for cells in rows if len(cells) == 5}
    paths = fields.field_paths(config.Config)
    leaves = [path for path in paths if not any(other.startswith(path + ".") for other in paths)]
    assert sorted(meanings) == sorted(leaves)
    assert [name for name, meaning in meanings.items() if not re.fullmatch("[A-Z].*[.]", meaning)] == []


def test_a_meaning_can_be_read_without_the_row_above():
    """Words that point to another row, which a reader who looks up one setting does not see."""
    rows = [line.strip("| ").split(" | ") for line in page("configuration.md").splitlines() if line.startswith("| `")]
    pointing = re.compile(r"\b(of the (first|second)|this number|the same as|as above|the latter|likewise)\b")
    assert [cells[0] for cells in rows if pointing.search(cells[-1])] == []


# The metrics reference.

PATTERN = r"<\w+>"  # what stands for any part of a name, in the reference
NAMESPACES = (
    "rewards custom completions draft refine verify redraw unsolved clip_ratio ratio sampling verifier judge perf "
    "warm_start sft eval"
)


def documented():
    """Names of the metrics reference, as written there."""
    return re.findall(r"^\| `([^`]+)` \|", page("metrics.md"), re.MULTILINE)


def has_a_line(name, names):
    """Whether `name` is one of the reference's; parts of it that only a run decides are "<>"."""

    def same(written):
        pattern = "".join(
            r"[^/]+" if re.fullmatch(PATTERN, part) else re.escape(part)
            for part in re.split(f"({PATTERN})", written.replace("/<measure>", "/<any>"))
        )
        concrete = re.fullmatch(pattern, name)
        parts = re.split("<>", name)
        return concrete or (len(parts) > 1 and re.fullmatch(".*".join(map(re.escape, parts)), written))

    return any(same(written) for written in names)


def emitted(source):
    """Metric names that a module's source spells out: constants, and f-strings with "<>" where a value goes in."""
    tree, names = ast.parse(source), set()
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(getattr(node, "body", None), list) and node.body and isinstance(node.body[0], ast.Expr)
    }
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | inner:
            names.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            names.add("".join(part.value if isinstance(part, ast.Constant) else "<>" for part in node.values))
    shape = re.compile(rf"({'|'.join(NAMESPACES.split())})/[\w<>@/]+")
    return {name for name in names if shape.fullmatch(name)}


def spelt_out():
    found = set().union(*(emitted(path.read_text(encoding="utf-8")) for path in FILES.values()))
    return found - FILES.keys()


def test_every_metric_that_the_code_spells_out_has_a_line():
    names, found = documented(), spelt_out()
    assert len(found) > 50  # the search itself works
    assert sorted(name for name in found if not has_a_line(name, names)) == []


@pytest.mark.slow
def test_every_metric_of_a_run_has_a_line(whole):
    """All rows of a run: warm start, evaluations, steps with drafts."""
    workdir, _ = whole
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {name for row in rows for name in row} - {"step"}
    assert {"loss", "warm_start/loss", "eval/arithmetic/pass@1", "draft/accuracy", "refine/fixed"} <= found
    assert sorted(name for name in found if not has_a_line(name, documented())) == []


@pytest.mark.slow
def test_the_reference_has_no_line_twice_and_none_of_what_is_gone(whole):
    names = documented()
    assert len(names) == len(set(names))
    workdir, _ = whole
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = spelt_out() | {name for row in rows for name in row}
    sources = "".join(path.read_text(encoding="utf-8") for path in FILES.values())
    stale = [
        name
        for name in names
        if not any(has_a_line(one, [name]) for one in found)
        # What several f-strings put together: its last part must be somewhere.
        and f'"{re.sub(PATTERN, "", name).rpartition("/")[2]}' not in sources
    ]
    assert stale == []


def test_a_metric_without_a_line_is_seen():
    names = documented()
    assert emitted('m["perf/new_time"] = 1\nf"draft/{x}_new"\n"perf/in a sentence"') == {
        "perf/new_time",
        "draft/<>_new",
    }
    for known in (
        "perf/step_time",
        "rewards/my_function/mean",
        "eval/my_set/pass@16",
        "draft/<>",
        "eval/<>/refine_1/fixed",
    ):
        assert has_a_line(known, names), known
    for unknown in ("perf/new_time", "draft/<>_new", "rewards/a/b/mean", "eval/x/new", "new", "loss/new"):
        assert not has_a_line(unknown, names), unknown
    assert emitted('def f():\n    """perf/new_time"""') == set()


# The other pages.


def headings(text):
    """Anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        if not found.exists() or (anchor and anchor not in headings(found.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    (tmp_path / "a.md").write_text(
        "[a](b.md) [b](a.md#here) [c](a.md#there) [d](https://x.org/y)\n```\n[e](no)\n```\n## Here"
    )
    assert broken_links(tmp_path / "a.md") == ["b.md", "a.md#there"]


# The page on when drafts pay.


def test_the_page_and_the_figure_on_drafts_are_what_the_formulas_give(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    assert page("when_drafts_pay.md") == module("when_drafts_pay").page(), "run python docs/when_drafts_pay.py"
    figure = module("when_drafts_pay_figure").figure()
    assert page("when_drafts_pay.svg") == figure, "run python docs/when_drafts_pay_figure.py"


def test_the_words_on_drafts_hold_no_number_that_is_not_computed():
    """Numbers with a point are of settings that the words choose: p, k and r of an example; and of names of models."""
    words = re.sub(r"{.*?}|Qwen\S+", "", page("when_drafts_pay.txt"))
    assert set(re.findall(r"(?<![\w.])\d*\.\d+", words)) == {".5", ".01", ".7"}


@pytest.mark.parametrize("alpha, beta", [(0.3, 1.2), (2.0, 3.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_mean_over_beta_distributed_problems(alpha, beta):
    """Against E[p^k (1 - p)^j] = B(alpha + k, beta + j) / B(alpha, beta)."""
    p, weight = module("when_drafts_pay").beta_problems(alpha, beta)
    log_beta = lambda a, b: math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    for k, j in ((0, 0), (1, 0), (8, 0), (3, 5), (0, 12)):
        expected = math.exp(log_beta(alpha + k, beta + j) - log_beta(alpha, beta))
        assert weight @ (p**k * (1 - p) ** j) == pytest.approx(expected, rel=1e-9)


def test_the_example_of_a_data_set_in_simulated_groups():
    """Problems, drafts and refinements drawn one after another; advantages are the package's own."""
    script, rng = module("when_drafts_pay"), np.random.default_rng(0)
    p = rng.beta(script.ALPHA, script.BETA, 100_000)
    r, w = script.MODELS[script.REPAIRS](p)
    plain = (rng.random((len(p), 8)) < p[:, None]).astype(np.float32)
    kept = plain[:, :4].max(axis=1)
    refined = (rng.random((len(p), 4)) < np.where(kept, r, w)[:, None]).astype(np.float32)
    seen = {"grpo": objectives.has_signal(plain).mean(), "igrpo": objectives.has_signal(refined).mean()}
    seen |= {"r": refined[kept == 1].mean(), "w": refined[kept == 0].mean()}
    snr = []
    for rewards in (plain, refined):
        advantages = objectives.group_advantages(rewards, "group").astype(float)
        snr.append(rewards.shape[1] * np.mean(advantages * rewards) ** 2 / np.mean(advantages**2))
    expected = script.averaged(script.REPAIRS)
    assert seen == pytest.approx({name: expected[name] for name in seen}, abs=0.01)
    assert snr[1] / snr[0] == pytest.approx(expected["ratio"], rel=0.03)


# The page for users of TRL.


def trl_tables():
    """The tables of from_trl.md by heading, each as rows of (names there, names here, note)."""
    tables = {}
    for section in page("from_trl.md").split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("| `")]
        cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
        tables[section.splitlines()[0]] = [
            (re.findall("`([^`]+)`", a), re.findall("`([^`]+)`", b), c) for a, b, c in cells
        ]
    return tables


def test_what_users_of_trl_find_here_are_settings():
    """Each row has a setting, or says why there is none."""
    rows = [row for table in trl_tables().values() for row in table]
    assert len(rows) > 90
    for theirs, ours, note in rows:
        assert ours or note, theirs
        for name in ours:
            config.check_field(name)
        assert ours or re.match("not needed, because |not supported|always |the |a command |`--", note), note


@pytest.mark.slow
def test_every_field_of_trl_is_on_the_page():
    """TRL's own ones exactly; of transformers' arguments, which come and go with its versions, none is missing."""
    trl = pytest.importorskip("trl", reason="TRL is not installed; the extra parity brings it")
    from transformers import TrainingArguments

    tables = {heading: [name for row in table for name in row[0]] for heading, table in trl_tables().items()}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert sorted(tables["Fields of GRPOConfig"]) == sorted(fields - inherited)
    assert sorted(inherited & fields - set(tables["Fields of TrainingArguments"])) == []
    arguments = inspect.signature(trl.GRPOTrainer).parameters.keys() - {"args", "reward_processing_classes"}
    assert set(tables["The trainer's arguments"]) <= arguments
    assert arguments - set(tables["The trainer's arguments"]) <= {"quantization_config", "kwargs"}
    named = [name for names in tables.values() for name in names]
    assert len(named) == len(set(named))


def test_the_rewards_of_the_page_on_ones_own_work(tmp_path, monkeypatch):
    (text,) = re.findall(r"```python\n(# my_rewards\.py.*?)```", page("your_own.md"), re.DOTALL)
    (tmp_path / "rewards_of_the_page.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [Candidate(text, "4", question="2+2", tokens=np.arange(count)) for text, count in (("4", 1), ("or 5?", 3))]

    def call(name):
        return functions.call(CustomReward(f"rewards_of_the_page:{name}"), rows, TrainerState())

    assert call("short").values == [-0.001, pytest.approx(np.nan, nan_ok=True)]
    assert call("shorter_than_the_others").values == [0.5, -0.5]
    assert all(np.isnan(value) for value in call("changed").values)
    rows = [dataclasses.replace(row, stage="refine", draft=" 4\n") for row in rows]
    assert call("changed").values == [0.0, 1.0]
    judged = call("judged")
    assert (judged.values, judged.logged) == ([1.0, 1.0], {"words": [1.5]})
    assert judged.extra == [{"words": 1}, {"words": 2}]


def test_the_configuration_of_the_page_for_users_of_trl():
    (text,) = re.findall(r"```python\n(# mine\.py.*?)```", page("from_trl.md"), re.DOTALL)
    scope = {}
    exec(text, scope)
    made = config.freeze(scope["get_config"]())
    assert made.rewards.names == ("correct", "short") and made.trained_completions == 64


@pytest.mark.proof
@pytest.mark.slow(seconds=40)
def test_the_configuration_file_of_the_page_trains_and_evaluates(tmp_path, monkeypatch):
    """As it is written there, with the page's files beside it; only the model is another one, and there is one step."""
    text = page("your_own.md").partition("\n## Data\n")[0]
    (file,) = re.findall(r"```python\n(# mine\.py.*?)```", text, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)python -m", text, re.DOTALL)
    (rewards,) = re.findall(r"```python\n(# my_rewards\.py.*?)```", page("your_own.md"), re.DOTALL)
    (tmp_path / "mine.py").write_text(file)
    (tmp_path / "my_rewards.py").write_text(rewards)
    subprocess.run(["bash", "-c", commands], cwd=tmp_path, check=True)
    model_files.save_byte_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    changed = {"model.path": "model", "steps": 1, "log.trackers": (), "compilation_cache": "", "rollout.slots": 8}
    igrpo_jax.train_model(load_config("mine.py", changed), "runs/mine")
    rows = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert any({"rewards/accuracy/mean", "rewards/short/mean"} <= row.keys() for row in rows)
    assert "rewards/format/mean" not in {name for row in rows for name in row}
    for step in ("step_000000", "step_000001"):
        assert Path("runs/mine/evaluations", step, "mine_test.jsonl").exists()


def test_quick_start_lists_what_may_change_on_a_resume():
    section = page("quick_start.md").partition("\n## Stop and resume\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    listed = [name.removesuffix(".*") for row in rows for name in re.findall("`([^`]+)`", row)]
    assert sorted(listed) == sorted(config.MAY_CHANGE_ON_RESUME)
    sections = {setting.name for setting in fields.settings(config.Config) if setting.is_section}
    starred = {name for row in rows for name in re.findall(r"`([^`]+)\.\*`", row)}
    assert starred == sections & set(listed)


def test_every_page_is_reached_from_the_index():
    linked = re.findall(r"\]\(([^)#]+)", page("README.md"))
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} <= set(linked)


def test_every_alert_has_its_section():
    titles = re.findall(r"^### (.+)$", page("troubleshooting.md"), re.MULTILINE)
    assert titles == [limit.name for limit in (*alerts.LIMITS, *alerts.REWARD_LIMITS)]


def test_the_architecture_has_the_floors_of_the_imports():
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", page("architecture.md"), re.MULTILINE)
    written = [(int(floor), re.findall(r"`(\w+)", cell)) for floor, cell in rows]
    assert written == list(enumerate(FLOORS))


def test_the_architecture_names_files_and_tables_that_exist():
    """Files are written from the package's folder or from the root; tables as "`NAME` of `FILE`"."""
    text = page("architecture.md")
    find = lambda name: next((base / name for base in (ROOT / "igrpo_jax", ROOT) if (base / name).exists()), None)
    files = set(re.findall(r"`([\w/]+\.(?:py|sh))`", text))
    assert len(files) > 20 and sorted(name for name in files if find(name) is None) == []
    tables = re.findall(r"`(\w+)` (?:of|in) `([\w/]+\.(?:py|sh))`", text)
    assert len(tables) > 8
    assert [name for name, file in tables if not re.search(rf"\b{name}\b", find(file).read_text("utf-8"))] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_and_commands_in_pages_are_real(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"--config\.([\w.]+)=", text):
        config.check_field(name)
    sections = "|".join(sorted({name.partition(".")[0] for name in fields.field_paths(config.Config) if "." in name}))
    for name in re.findall(rf"`(?:config\.)?((?:{sections})(?:\.\w+)+)(?:=[^`]*)?`", text):
        if not name.endswith((".py", ".md", ".jsonl", ".json")):
            config.check_field(name)
    for name in re.findall(r"python -m igrpo_jax\.([\w.]+)", text):
        assert {name.replace(".", "/"), f"{name}/__main__"} & FILES.keys(), name


def test_the_program_in_quick_start_calls_the_public_functions_as_they_are():
    """The functions are only named here: each call must fit the signature of the real one."""
    (block,) = re.findall(r"```python\n(.*?)```", page("quick_start.md"), re.DOTALL)
    tree = ast.parse(block)
    imported = next(node for node in tree.body if isinstance(node, ast.ImportFrom))
    assert imported.module == "igrpo_jax" and {alias.name for alias in imported.names} == set(igrpo_jax.API)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in igrpo_jax.API]
    assert {ast.unparse(call.func) for call in calls} == set(igrpo_jax.API)
    for call in calls:
        signature = inspect.signature(getattr(igrpo_jax, call.func.id))
        signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
    for call in (call for call in calls if call.func.id == "load_config"):
        made = load_config(ROOT / ast.literal_eval(call.args[0]), ast.literal_eval(call.args[1]))
        assert made.evaluation.benchmarks == ("arithmetic",)


def test_the_objective_in_ten_lines_works(monkeypatch):
    """LUSPO as the page writes it, at the number derived by hand, and accepted by the configuration.

    Rows of 1 and 3 tokens with advantages 1 and -1, at a ratio of 1: each row's mean over its tokens is -A, times its
    length over the 2 rows: (-1 * 1 + 1 * 3) / 2 = 1. GSPO, which does not multiply, gives (-1 + 1) / 2 = 0.
    """
    (block,) = re.findall(r"```python\n(.*?)```", page("architecture.md"), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(objectives.OBJECTIVES))
    exec(block, vars(objectives))
    loss_type = Annotated[str, rules.Choice(*config.LOSS_TYPES, "luspo")]
    monkeypatch.setitem(config.AlgorithmConfig.__annotations__, "loss_type", loss_type)
    losses = {}
    for name in ("luspo", "gspo"):
        tree = config.default()
        tree.algorithm.loss_type = name
        chosen = objectives.resolve(config.freeze(tree).algorithm)
        lengths, mask = np.array([1, 3]), np.arange(3) < np.array([[1], [3]])
        weight = np.where(mask, objectives.row_weights(chosen, lengths, np.ones(2, bool), 8)[:, None], 0.0)
        logprob = jnp.full((2, 3), -0.5)
        advantage = jnp.broadcast_to(jnp.array([[1.0], [-1.0]]), mask.shape)
        values = TokenValues(logprob, logprob, None, advantage, weight, mask, jnp.asarray(mask, jnp.int32))
        losses[name] = objective_loss(chosen, values).loss
    assert losses["luspo"] == pytest.approx(1.0) and losses["gspo"] == pytest.approx(0.0, abs=1e-6)
    vars(objectives).pop("_sequence_sum")


def test_the_objectives_are_those_the_configuration_knows():
    assert tuple(objectives.OBJECTIVES) == config.LOSS_TYPES
    rows = re.findall(r"^\| `(\w+)` \|", page("igrpo.md"), re.MULTILINE)
    assert tuple(rows) == ("loss_type", *config.LOSS_TYPES)


def test_pages_list_the_benchmarks_and_the_families():
    lists = [page("evaluation.md").partition("**Benchmarks** are ")[2].partition("\n\n")[0]]
    lists += [line for line in page("configuration.md").splitlines() if line.startswith("| `evaluation.benchmarks` |")]
    for text in lists:
        assert [name for name in catalog.BENCHMARKS if name not in text] == []
    for path in (ROOT / "README.md", DOCS / "your_own.md", DOCS / "from_trl.md"):
        text = path.read_text(encoding="utf-8").lower().replace("-", "_")
        assert [kind for kind in READERS if kind not in text] == [], path


def test_the_readme_is_short_and_holds_the_test_command_once():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert lines.count('pip install -e ".[test,parity]" && pytest') == 1
    assert "docs/README.md" in "\n".join(lines)


# The notebook.


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The folder of the notebook's run, and what its cells put out; executed on a CPU, in an empty folder."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    folder = tmp_path_factory.mktemp("notebook")
    book = nbformat.read(ROOT / "notebooks" / "colab_tpu.ipynb", as_version=4)
    nbformat.validate(book)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in devices.environment(1, JAX_PLATFORMS="cpu").items():
            patch.setenv(name, value)
        client = nbclient.NotebookClient(
            book, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()  # a cell that fails raises, with what it said
    return folder / "runs" / "colab", {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}


@pytest.mark.proof
@pytest.mark.slow(seconds=35)
def test_the_notebook_runs_from_top_to_bottom(notebook):
    workdir, outputs = notebook
    printed = {name: "".join(one.get("text", "") for one in some) for name, some in outputs.items()}
    assert "(cpu)" in printed["device-code"]
    assert "step 3/3  solved" in printed["train-code"] and "programs to compile" in printed["train-code"]
    assert sum("image/png" in one.get("data", {}) for one in outputs["report-code"]) > 5
    assert (workdir / "report" / "index.html").exists() and "colab_report.zip" in printed["keep-code"]
    assert "draft 0 {'accuracy'" in printed["samples-code"]
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rewards = {row["step"]: round(row["reward"], 3) for row in steps if "reward" in row}
    assert list(rewards) == [1, 2, 3] and f"reward by step: {rewards}" in printed["train-code"]
    assert printed["ask-code"].count(" states ") == 2 and "pass@1" in printed["ask-code"]
    assert (workdir.parent / "colab_evaluation" / "summary.json").exists()
    exported = " ".join(printed["export-code"].split())  # the console breaks long lines
    assert "read back, it" in exported and "logits" in exported and "in a probe of 8 tokens" in exported
    assert (workdir.parent / "colab_hf" / "model.safetensors").exists()


def cell(name):
    """The source of a cell of the notebook."""
    book = json.loads((ROOT / "notebooks" / "colab_tpu.ipynb").read_text(encoding="utf-8"))
    return next("".join(cell["source"]) for cell in book["cells"] if cell["id"] == name)


def with_device(source, folder, name):
    """The source of a cell, which sees one device in `folder` in place of those of this machine."""
    (folder / name).parent.mkdir(parents=True)
    (folder / name).touch()
    assert "/dev/" in source
    return source.replace("/dev/", f"{folder}/")


DEVICES = {"accel0": True, "vfio/0": True, "vfio/vfio": False, "null": False}  # by whether they are a TPU


@pytest.mark.parametrize(
    ("kind", "device"), [*(("zip", name) for name in DEVICES), *((x, "null") for x in ("gztar", "folder", "nothing"))]
)
def test_the_notebook_installs_a_copy_of_the_repository(tmp_path, monkeypatch, kind, device):
    """From an archive with the repository's folder in it, or from the folder that the notebook is in."""
    copy = tmp_path / "source" / "igrpo-main"
    (copy / "igrpo_jax").mkdir(parents=True)
    (copy / "notebooks").mkdir()
    (copy / "setup.py").write_text("")
    (copy / "igrpo_jax" / "loading.py").write_text("")
    here = copy / "notebooks" if kind == "folder" else tmp_path / "content"
    here.mkdir(exist_ok=True)
    (here / "data.csv").write_text("a,b")
    if kind in ("zip", "gztar"):
        shutil.make_archive(str(here / "upload (1)"), kind, copy.parent)
    installed = []

    class Popen:
        stdout, returncode = (), 0
        __enter__, __exit__ = (lambda self: self), (lambda self, *_: None)

        def __init__(self, command, **_):
            installed.append(command[1:])

    monkeypatch.chdir(here)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(RuntimeError, match="upload the repository's archive") if kind == "nothing" else nullcontext():
        exec(with_device(cell("install-code"), tmp_path / "dev", device), {})
    if kind != "nothing":
        ((*pip, target),) = installed
        folder = Path(target.partition("[")[0])
        assert pip == ["-m", "pip", "install", "-q"] and f"[{'tpu,' * DEVICES[device]}report]" in target
        assert folder.name == "igrpo-main" and (folder / "setup.py").exists()


@pytest.mark.parametrize("device", DEVICES)
def test_the_settings_of_the_notebook_are_those_of_the_config_for_its_tpu(tmp_path, device):
    first, _, source = cell("settings-code").partition("\n")
    assert first == "%%writefile colab_run.py"
    (tmp_path / "colab_run.py").write_text(with_device(source, tmp_path / "dev", device))
    made = load_config(tmp_path / "colab_run.py")
    assert (made == load_config(ROOT / "configs" / "colab_tpu.py")) == DEVICES[device]


def test_the_notebook_is_kept_without_outputs_and_names_settings_that_exist():
    book = json.loads((ROOT / "notebooks" / "colab_tpu.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    text = "".join("".join(cell["source"]) for cell in book["cells"])
    for file in re.findall(r'"(configs/\w+\.py)"', text):
        assert (ROOT / file).exists(), file
    assert sys.version_info >= (3, 11)
