"""The benchmark of the update: ours and torch make the same update of the same rows, and its figures are right.

What these tests catch: rows that differ between the two, a loss that counts padding, wrong weights of rows of
unequal length, padding and tokens that are counted wrongly, groups that are not idle, and programs that are
compiled while steps are timed.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import one_device

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
models = importlib.import_module("models")
update = importlib.import_module("update")
update_rows = importlib.import_module("update_rows")
update_torch = importlib.import_module("update_torch")

RAGGED = ("--groups=4", "--group=4", "--prefix=9", "--completion=24", "--lengths=lognormal", "--mean-length=8")


@pytest.fixture
def quick(monkeypatch):
    """One device, and no large matmul that is timed."""
    monkeypatch.setattr(models, "make_mesh", one_device)
    monkeypatch.setattr(models, "matmul_peak", lambda dtype: 1e9)


def arguments(*flags):
    return update.parse(["--shape=qwen2-tiny", "--steps=1", *flags])


def test_the_rows_are_those_that_were_asked_for():
    fixed = update_rows.make_rows(arguments("--groups=2", "--group=3", "--prefix=5", "--completion=7"), 96)
    assert fixed.contexts.shape == (2, 5) and (fixed.lengths == np.full((2, 3), 7)).all() and not fixed.idle.any()
    rates = fixed.rates(2.0)
    assert rates == {"tokens_per_second": 21, "real_tokens": 52, "seconds_per_token": 0.03846}
    ragged, again = (update_rows.make_rows(arguments(*RAGGED, "--idle=0.75"), 96) for _ in range(2))
    assert len(set(ragged.lengths.ravel())) > 4 and ragged.lengths.max() <= 24
    assert ragged.idle.sum() == 3 and (ragged.advantages[~ragged.idle] != 0).all()
    for i, group in enumerate(ragged.groups()):
        assert (group.context == ragged.contexts[i]).all()
        for completion, tokens in zip(group.completions, again.completions[i], strict=True):
            assert (completion.tokens == tokens).all()
    with pytest.raises(SystemExit):
        arguments("--idle=1.5")


def test_rows_are_padded_to_the_longest_of_their_micro_batch():
    rows = update_rows.make_rows(arguments(*RAGGED), 96)
    longest = rows.lengths.max()
    batches = list(update_torch.micro_batches(rows, 3 * (9 + longest)))
    lengths, flat = rows.lengths.ravel(), [tokens for of_prompt in rows.completions for tokens in of_prompt]
    assert [len(batch.tokens) for batch in batches] == [3, 3, 3, 3, 3, 1]
    for i, batch in enumerate(batches):
        own = lengths[3 * i : 3 * i + 3]
        assert batch.tokens.shape == batch.mask.shape == (len(own), 9 + own.max())
        for j, length in enumerate(own):
            row, context = 3 * i + j, rows.contexts[(3 * i + j) // 4]
            assert (batch.tokens[j, : 9 + length] == np.concatenate([context, flat[row]])).all()
            assert batch.mask[j, : 9 + length].all() and not batch.mask[j, 9 + length :].any()
            assert batch.weights[j].sum() == pytest.approx(1 / 16) and not batch.weights[j, length:].any()
            assert batch.advantages[j] == rows.advantages[row // 4, row % 4]
    assert [len(batch.tokens) for batch in update_torch.micro_batches(rows, 1)] == [1] * 16


@pytest.mark.slow(seconds=8)
def test_torch_makes_the_same_update_of_the_same_rows(tmp_path, quick):
    hf_models = pytest.importorskip("hf_models")
    hf_models.dense_model("qwen2", 4, 2).save_pretrained(tmp_path)
    flags = ("--model", str(tmp_path), "--steps=1", *RAGGED, "--idle=0.25", "--tokens-per-microbatch=100")
    args = update.parse([*flags, "--peer=eager"])
    measured, peer = update.ours(args), update_torch.peer(args)
    assert measured["loss"] == pytest.approx(peer["loss"], rel=1e-4)
    assert measured["grad_norm"] == pytest.approx(peer["grad_norm"], rel=1e-4) and peer["grad_norm"] > 0.01

    rows = update_rows.make_rows(args, 96)
    total, longest = int(rows.lengths.sum()), rows.lengths.max()
    for figures in (measured, peer):
        assert figures["real_tokens"] == 4 * 9 + total
        assert figures["tokens_per_second"] == pytest.approx(total / figures["update_seconds"], abs=0.5, rel=0.01)
        assert figures["seconds_per_token"] == pytest.approx(figures["update_seconds"] / (36 + total), rel=0.01)
    at_once, flat = 100 // (9 + longest), rows.lengths.ravel()
    parts = [flat[i : i + at_once] for i in range(0, 16, at_once)]
    run = sum(len(part) * (9 + part.max()) for part in parts)
    assert peer["padding_fraction"] == pytest.approx(1 - (16 * 9 + total) / run, abs=1e-4)
    assert measured["idle_fraction"] == 0.25 and 0 < measured["padding_fraction"] < 1


@pytest.mark.slow(seconds=5)
def test_all_programs_are_compiled_before_the_first_update(quick, monkeypatch):
    benches, step = [], update.Bench.step

    def checked(bench):
        benches.append(bench)
        assert all(program.is_ready(*shape) for program, shape in bench.learner.programs.program_shapes)
        return step(bench)

    monkeypatch.setattr(update.Bench, "step", checked)
    figures = update.ours(arguments(*RAGGED, "--tokens-per-microbatch=64", "--remat=auto"))
    sizes = benches[0].learner.packer.shapes.sizes
    assert figures["programs"] == len(sizes) and figures["compile_seconds"] > 0 and figures["recompiles"] == 0
    assert figures["recomputed"] == "logits"
    assert len(benches) == 3  # two that do not count
