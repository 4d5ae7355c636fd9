"""Checkpoints that users have: embeddings that config.json ties beside a head of their own in the files."""

import json
import shutil

import numpy as np
import pytest
from hf_models import TOKENS, dense_model, logits_of, logits_of_reference, torch, transformers
from model_files import CHATML, edit_json, error_of, save_tokenizer
from tiny_models import one_device

from igrpo_jax import config
from igrpo_jax.models import hf_files, hf_read, hf_tensors
from igrpo_jax.models.policy import open_policy

tensor_files = pytest.importorskip("safetensors.torch", reason="PyTorch is not installed; the extra parity brings it")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied")
    dense_model("llama", 4, 2, tied=True).save_pretrained(path)
    return path


@pytest.fixture
def tied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit(path, change):
    tensors = tensor_files.load_file(path / "model.safetensors")
    change(tensors)
    tensor_files.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def check_like_transformers(path):
    """Compares logits in float32; returns the config of ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path).to(torch.float32)
    np.testing.assert_allclose(logits_of(path, TOKENS), logits_of_reference(model, TOKENS), atol=1e-4, rtol=0)
    return hf_files.load_config(str(path))


def other_head():
    torch.manual_seed(1)
    return torch.randn(96, 32) * 0.1


def one_number(tensors):
    head = tensors[EMBEDDING].clone()
    head[95, 31] += 0.5
    return head


HEADS = {
    "another": (lambda tensors: other_head(), "float32", False),
    "another dtype": (lambda tensors: other_head().bfloat16(), "float32", False),
    "one number": (one_number, "float32", False),
    "the same": (lambda tensors: tensors[EMBEDDING].clone(), "float32", True),
    "rounded": (lambda tensors: tensors[EMBEDDING].bfloat16(), "float32", False),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_beside_tied_embeddings_is_read_as_transformers_reads_it(tied, caplog, case):
    head, dtype, is_tied = HEADS[case]
    edit_json(tied / "config.json", dtype=dtype)
    edit(tied, lambda tensors: tensors.update({HEAD: head(tensors)}))
    assert check_like_transformers(tied).tie_embeddings is is_tied
    warnings = [record.getMessage() for record in caplog.records if "tie_word_embeddings = true" in record.getMessage()]
    assert bool(warnings) is not is_tied
    assert all(repr(str(tied)) in warning and "\n" not in warning for warning in warnings)


@pytest.mark.parametrize("piece", [1, 32 * 40, 32 * 96])
def test_the_last_number_is_compared_however_the_files_are_cut(tied, monkeypatch, piece):
    monkeypatch.setattr(hf_tensors, "PIECE", piece)
    edit(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert hf_files.load_config(str(tied)).tie_embeddings
    edit(tied, lambda tensors: tensors.update({HEAD: one_number(tensors)}))
    assert not hf_files.load_config(str(tied)).tie_embeddings


def test_a_head_that_is_the_embeddings_in_the_models_dtype_is_tied(tied):
    """transformers loads both in config.json's dtype and compares them then."""
    edit_json(tied / "config.json", dtype="bfloat16")
    edit(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].bfloat16()}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert hf_files.load_config(str(tied)).tie_embeddings


def test_tied_embeddings_may_be_saved_as_the_head_alone(tied):
    before = logits_of(tied, TOKENS)
    edit(tied, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    assert check_like_transformers(tied).tie_embeddings
    np.testing.assert_array_equal(logits_of(tied, TOKENS), before)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (torch.zeros(95, 32), "lm_head.weight is (95, 32), not (96, 32)"),
        (torch.zeros(96, 32, dtype=torch.int8), "lm_head.weight is I8"),
        (torch.zeros(()), "lm_head.weight is (), not (96, 32)"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(tied, head, expected):
    edit(tied, lambda tensors: tensors.update({HEAD: head}))
    load = lambda: hf_read.load_params(str(tied), hf_files.load_config(str(tied)), one_device())
    assert expected in error_of(load)
    if head.shape != (96, 32):
        with pytest.raises(RuntimeError):
            transformers.AutoModelForCausalLM.from_pretrained(tied)


def test_the_head_may_be_in_another_file(tied):
    edit(tied, lambda tensors: tensors.update({HEAD: other_head()}))
    tensors = tensor_files.load_file(tied / "model.safetensors")
    files = {name: "b.safetensors" if name == HEAD else "a.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        tensor_files.save_file(part, tied / file, metadata={"format": "pt"})
    (tied / "model.safetensors").unlink()
    (tied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert not check_like_transformers(tied).tie_embeddings


@pytest.mark.slow
def test_an_export_has_the_head_and_says_so(tied, tmp_path, caplog):
    edit(tied, lambda tensors: tensors.update({HEAD: other_head()}))
    save_tokenizer(tied, CHATML)
    policy = open_policy(config.ModelConfig(path=str(tied)))
    assert not policy.cfg.tie_embeddings
    mesh = one_device()
    policy.save(tmp_path / "out", policy.load(mesh, 0))
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    caplog.clear()
    again = check_like_transformers(tmp_path / "out")
    assert not again.tie_embeddings and not caplog.records
    np.testing.assert_allclose(logits_of(tmp_path / "out", TOKENS), logits_of(tied, TOKENS), atol=0.1)


def test_a_directory_without_weights_is_as_config_json_says(tied):
    (tied / "model.safetensors").unlink()
    assert hf_files.load_config(str(tied)).tie_embeddings
