"""Checkpoints as pieces: what is joined is what was split, and a piece that is missing or damaged is named.

What these tests catch: pieces larger than allowed, tensors of another name, shape or dtype, weights that were integers
and are not found again, an embedding of few bits, a damaged piece that is joined, and half a checkpoint.
"""

import importlib
import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
carry = importlib.import_module("carry")

ROWS = 40  # of the vocabulary


def tensors_of(model):
    """All tensors of a checkpoint by name."""
    tensors = {}
    for path in model.glob("*.safetensors"):
        with safetensors.safe_open(path, "numpy") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture
def model(tmp_path):
    """A checkpoint in two files, whose matrices are random, except `few`, whose blocks are integers times a step."""
    folder, random = tmp_path / "model", np.random.default_rng(0)
    folder.mkdir()
    normal = lambda *shape: random.normal(size=shape).astype(ml_dtypes.bfloat16)
    steps = np.repeat(2.0 ** random.integers(-9, -3, (6, 2)), 32, axis=1)
    few = (random.integers(-16, 16, (6, 64)) * steps).astype(ml_dtypes.bfloat16)
    first = {"embed": normal(ROWS, 32), "few": few, "norm": normal(32)}
    second = {"odd": normal(3, 7), "ids": np.arange(6).reshape(2, 3), "zeros": np.zeros((2, 32), np.float32)}
    safetensors.numpy.save_file(first, folder / "model-1.safetensors")
    safetensors.numpy.save_file(second, folder / "model-2.safetensors")
    (folder / "config.json").write_text(json.dumps({"vocab_size": ROWS}))
    (folder / "tokenizer.json").write_text("words " * 500)
    (folder / "pytorch_model.bin").write_text("the same weights in another format")
    return folder


@pytest.mark.parametrize("bits", [4, 5, 6, 8, 16])
def test_what_is_joined_is_what_was_split(model, tmp_path, bits):
    result = carry.split(model, tmp_path / "pieces", bits, 1000)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "pieces").glob("*.bin"))]
    assert len(sizes) == result["pieces"] > 4 and sizes[:-1] == [1000] * (len(sizes) - 1) and 0 < sizes[-1] <= 1000
    carry.join(tmp_path / "pieces", tmp_path / "joined")
    files = lambda folder: sorted(path.name for path in folder.iterdir())
    assert files(tmp_path / "joined") == [name for name in files(model) if name != "pytorch_model.bin"]
    assert (tmp_path / "joined" / "tokenizer.json").read_text() == "words " * 500
    before, after = tensors_of(model), tensors_of(tmp_path / "joined")
    assert {name: (x.shape, x.dtype) for name, x in after.items()} == {n: (x.shape, x.dtype) for n, x in before.items()}
    exact = set(before) if bits == 16 else {"norm", "ids", "zeros", *["few"] * (bits == 5)}
    for name in before:
        gap = np.abs(after[name].astype(np.float32) - before[name].astype(np.float32)).max()
        # Half of a step of at most 2**bits, over a range of at most 8 for 32 normal numbers, and bfloat16's rounding.
        allowed = 4 / (2 ** (8 if name == "embed" else bits) - 1) + 2**-6
        assert gap == 0 if name in exact else gap < allowed, name
    assert (
        result["largest_error"] == 0 if bits == 16 else 0 < result["error"] < result["largest_error"] < 2 ** (1 - bits)
    )


def test_pieces_that_are_missing_or_damaged_are_named(model, tmp_path):
    pieces, joined = tmp_path / "pieces", tmp_path / "joined"
    carry.split(model, pieces, 4, 1000)
    damaged = bytearray((pieces / "piece_001.bin").read_bytes())
    damaged[500] ^= 1
    (pieces / "piece_001.bin").write_bytes(damaged)
    (pieces / "piece_003.bin").unlink()
    with pytest.raises(SystemExit, match=r"piece_001\.bin is damaged, piece_003\.bin is missing; bring them again"):
        carry.join(pieces, joined)
    assert not joined.exists()
    (pieces / "manifest.json").unlink()
    with pytest.raises(SystemExit, match=r"has no manifest\.json"):
        carry.join(pieces, joined)


def test_a_join_that_is_cut_short_leaves_nothing(model, tmp_path, monkeypatch):
    carry.split(model, tmp_path / "pieces", 4, 1000)

    def unpack(source, target):
        target.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(carry, "unpack", unpack)
    with pytest.raises(OSError, match="no space"):
        carry.join(tmp_path / "pieces", tmp_path / "joined")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pieces"]


def test_folders_that_are_in_use_or_no_checkpoints_are_refused(model, tmp_path):
    with pytest.raises(SystemExit, match="is not empty"):
        carry.split(model, model, 16, 1000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"has no \*\.safetensors"):
        carry.split(tmp_path / "empty", tmp_path / "pieces", 16, 1000)
    carry.split(model, tmp_path / "pieces", 16, 1000)
    with pytest.raises(SystemExit, match="exists; give a new folder"):
        carry.join(tmp_path / "pieces", model)


def test_weights_that_float16_lacks_are_refused():
    with pytest.raises(SystemExit, match="use --bits 16"), np.errstate(over="ignore", invalid="ignore"):
        carry.quantize(np.full((1, 32), 1e6, np.float32), 8)
