"""What docs/architecture.md says about adding an objective, a model family and a benchmark, done in a copy.

The files that a row names are edited, no others; then the tests that guard the lists run in the copy, and what was
added is used.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITTEN = "docs/configuration.md"  # what `python docs/configuration.py` writes

# By what is added: for each file a line that is there, and what to put in its place, with {} for the line itself.
OBJECTIVE = {
    "igrpo_jax/learning/objectives.py": (
        "OBJECTIVES = {\n",
        "def _sequence_sum(lengths: np.ndarray, max_completion: int) -> np.ndarray:\n"
        '    """1 / rows: a sequence weighs its length."""\n'
        "    return np.full(len(lengths), 1.0 / len(lengths))\n\n\n"
        '{}    "luspo": Objective(_sequence_sum, _sequence_log_ratio, epsilon=3e-4, epsilon_high=4e-4),\n',
    ),
    "igrpo_jax/config.py": ('LOSS_TYPES = ("grpo"', 'LOSS_TYPES = ("luspo", "grpo"'),
    "docs/igrpo.md": ("| `grpo` |", "| `luspo` | 1 / rows | of the sequence | 3e-4, 4e-4 | the group's std |\n{}"),
}
FAMILY = {
    "igrpo_jax/models/config.py": ('READERS = {"llama": _dense', '{}, "mistral": _dense'),
    "igrpo_jax/models/hf_tables.py": ('FAMILIES = {"llama": _DENSE', '{}, "mistral": _DENSE'),
    "igrpo_jax/models/shapes.py": (
        "SHAPES = {\n",
        '{}    "toy/mistral": _LLAMA | dense({{"model_type": "mistral"}}, 64, 2, 4, 2, 96, 257, True),\n',
    ),
    "README.md": ("of the Llama, ", "{}Mistral, "),
    "docs/your_own.md": ("of the Llama, ", "{}Mistral, "),
    "docs/from_trl.md": ("| Llama, ", "{}Mistral, "),
}
BENCHMARK = {
    "igrpo_jax/data/catalog.py": (
        "BENCHMARKS = {\n",
        '{}    "toy24": Benchmark(2, 8, Hub("toy/toy24", "problem", "answer"), ("toy_2024",)),\n',
    ),
    "igrpo_jax/config.py": ("# Names of benchmarks: ", "{}toy24, "),
    "docs/evaluation.md": ("**Benchmarks** are ", "{}`toy24`, "),
}
ADDITIONS = {"an objective": OBJECTIVE, "a model family": FAMILY, "a benchmark or training set": BENCHMARK}
# Edited for a training set only.
NOT_FOR_A_BENCHMARK = {"docs/your_own.md"}

GUARDS = (
    "tests/test_docs.py::test_the_objectives_are_those_the_configuration_knows",
    "tests/test_docs.py::test_the_configuration_reference_is_what_config_py_says",
    "tests/test_docs.py::test_pages_list_the_benchmarks_and_the_families",
)
USE = """
import json, sys
from pathlib import Path
import jax
import numpy as np
import igrpo_jax
from igrpo_jax.loading import load_config
assert Path(igrpo_jax.__file__).is_relative_to(Path.cwd()), igrpo_jax.__file__

from igrpo_jax.learning import objectives
chosen = objectives.resolve(load_config(overrides={"algorithm.loss_type": "luspo"}).algorithm)
weights = objectives.row_weights(chosen, np.array([1, 3]), np.ones(2, bool), 8)
assert weights.tolist() == [0.5, 0.5], weights

import model_files, tiny_models
from igrpo_jax.models import hf_files, hf_read
from igrpo_jax.models.shapes import SHAPES
folder = Path("model")
model_files.save_byte_model(folder)
before = hf_read.load_params(str(folder), hf_files.load_config(str(folder)), tiny_models.one_device())
model_files.edit_json(folder / "config.json", model_type="mistral")
after = hf_read.load_params(str(folder), hf_files.load_config(str(folder)), tiny_models.one_device())
jax.tree.map(np.testing.assert_array_equal, before, after)
assert SHAPES["toy/mistral"]["model_type"] == "mistral"

from igrpo_jax.data import problems
rows = [json.dumps({"problem": f"{i}+1", "answer": str(i + 1)}) for i in range(2)]
Path("toy_2024.jsonl").write_text("\\n".join(rows))
made = load_config(overrides={"evaluation.benchmarks": ("toy24",), "evaluation.data_dir": "."})
assert len(problems.benchmark_rows("toy24", made.evaluation)) == 2
from igrpo_jax.evaluation import planning
assert planning.samples_per_problem(made, "toy24") == 8
"""


def named(row):
    """The files that a row of the table "Where things go" names, from the root of the repository."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (cells,) = re.findall(rf"^\| {re.escape(row)} \| (.*?) \| (?:.*) \|$", text, re.MULTILINE)
    files = {f"igrpo_jax/{name}" for name in re.findall(r"`([\w/]+\.py)`", cells)}
    files |= {(Path("docs") / link).as_posix() for link in re.findall(r"\]\(([\w./]+\.md)\)", cells)}
    files = {os.path.normpath(name) for name in files}
    return files | ({WRITTEN} if "`python docs/configuration.py`" in cells else set())


@pytest.mark.parametrize("row", ADDITIONS)
def test_the_files_that_an_addition_touches_are_those_of_its_row(row):
    written = {WRITTEN} if "igrpo_jax/config.py" in ADDITIONS[row] else set()
    ignored = NOT_FOR_A_BENCHMARK if ADDITIONS[row] is BENCHMARK else set()
    assert named(row) - ignored == ADDITIONS[row].keys() | written


@pytest.mark.slow(seconds=40)
def test_what_is_added_to_these_files_alone_works(tmp_path):
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info", "build", "dist")
    for name in ("igrpo_jax", "tests", "docs", "benchmarks", "configs", "notebooks"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, copy)
    for edits in ADDITIONS.values():
        for name, (line, new) in edits.items():
            edit(copy / name, line, new)
    environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests'}"}
    for command in (
        ["docs/configuration.py"],
        ["-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *GUARDS],
        ["-c", USE],
    ):
        done = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def edit(path, line, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(line) == 1, (path, line)
    path.write_text(text.replace(line, new.format(line)), encoding="utf-8")
