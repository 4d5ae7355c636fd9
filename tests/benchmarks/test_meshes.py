"""The table of docs/scaling.md that names a mesh for each model and slice, against what `aot` counts now."""

import importlib
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
meshes = importlib.import_module("meshes")

MODELS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("configs/tpu_v5p.py", ["v5e:2x4", "v6e:4x4", "v5p:2x2x2"]),
    "nvidia/Nemotron-H-8B-Base-8K": ("configs/nemotron_h_8b.py", ["v5e:4x4"]),
}


def cells_of_the_page():
    """The cells by (model, slice)."""
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").partition("\n## Which mesh\n")[2]
    head, _, *rows = re.search(r"\| model \| v5e.*?\n\n", text, re.DOTALL)[0].strip().splitlines()
    split = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    names = split(head)[1:]
    return {(split(row)[0], name): cell for row in rows for name, cell in zip(names, split(row)[1:], strict=True)}


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_page_has_the_figures_of_today(environment, model):
    config, slices = MODELS[model]
    page = cells_of_the_page()
    for name in slices:
        found = meshes.measured(str(ROOT / config), model, name, slots=8)
        assert page[model.rpartition("/")[2], name] == meshes.cell(found, 0.55), name


def test_the_first_mesh_that_is_small_enough_is_named():
    figures = lambda share, tensor: {"share": share, "sampling_tensor": tensor}
    found = {"1x8x1": figures(0.7, 4), "1x4x2": figures(0.5, 2), "1x2x4": figures(0.4, 4)}
    assert meshes.cell(found, 0.55) == "1x4x2 / 2: 50%"
    assert meshes.cell(found, 0.3) == "1x2x4 / 4: 40%, tight"
    assert meshes.cell({"1x8x1": figures(1.2, 1), "1x4x2": figures(1.1, 2)}, 0.5) == "too small"
