"""Hugging Face directories: the same logits as transformers, and one clear line for every directory that is wrong."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
from hf_models import BASE, DENSE, TOKENS, dense_model, logits_of, logits_of_reference, rope, torch, transformers
from model_files import CHATML, WORDS, edit_json, edit_tensors, error_of, save_byte_model, save_tokenizer
from tiny_models import one_device, tiny_config

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import decoder, hf_files, hf_paths, hf_read, hf_tables, hf_tensors, hf_write
from igrpo_jax.models.config import RopeScaling, from_hf
from igrpo_jax.models.policy import open_policy

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("case", DENSE)
def test_logits_equal_transformers(tmp_path, case):
    """With eps, theta, head ratio and head size that differ from case to case, none can be a constant of ours."""
    arguments, dtype, shard = DENSE[case]
    more = {"head_dim": 16} if "wide" in case else {}
    model = dense_model(*arguments, **more).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    # Read back, for `to(dtype)` also rounded buffers that are in no file.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or "sharded" in case
    assert (tmp_path / "model.safetensors.index.json").exists() == ("sharded" in case)
    np.testing.assert_allclose(logits_of(tmp_path, TOKENS), logits_of_reference(model, TOKENS), atol=1e-4, rtol=0)


@pytest.mark.skipif(
    "IGRPO_SMOLLM2" not in os.environ, reason="set IGRPO_SMOLLM2 to a directory with SmolLM2-135M-Instruct"
)
def test_logits_of_smollm2_equal_transformers():
    path = os.environ["IGRPO_SMOLLM2"]
    tokenizer = hf_files.load_tokenizer(path)
    turns = [{"role": "user", "content": "Natalia sold 48 clips in April and half as many in May. How many in all?"}]
    tokens = np.array([tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]], np.int32)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    difference = np.abs(logits_of(path, tokens) - logits_of_reference(model, tokens)).max()
    assert difference < 1e-3
    assert hf_files.eos_ids(path, tokenizer) == (2,)


def test_a_fingerprint_tells_newer_weights_from_older_ones(saved, tmp_path):
    """Wherever the files lie; by any of their values, where the files are small, and by some of them in larger ones."""
    copy = shutil.copytree(saved, tmp_path / "copy")
    before = hf_read.weights_fingerprint(str(saved))
    assert hf_read.weights_fingerprint(str(copy)) == before
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")  # the last value has another sign or exponent
    assert hf_read.weights_fingerprint(str(copy)) != before


def test_a_fingerprint_reads_of_every_part_of_a_large_file(tmp_path):
    found, third = set(), 1 << 20
    for number in range(4):  # as it was, and with another first, second and last third
        file, content = tmp_path / f"{number}.safetensors", np.zeros(3 * third, np.uint8)
        content[third * (number - 1) : third * number] = 1
        content.tofile(file)
        found.add(hf_read._parts(file, content.size, 0))
    assert len(found) == 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen2")
    dense_model("qwen2", 4, 2).save_pretrained(path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def load_error(path):
    def load():
        hf_read.load_params(str(path), hf_files.load_config(str(path)), one_device())

    message = error_of(load)
    assert message.startswith(f"config.model.path = {str(path)!r}: ")
    return message


def test_weights_are_float32_in_the_shardings_of_the_table(saved):
    mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))
    cfg = hf_files.load_config(str(saved))
    params = hf_read.load_params(str(saved), cfg, mesh)
    assert {path: value.shape for path, value in params.items()} == decoder.shapes(cfg)
    for path, value in params.items():
        assert value.dtype == np.float32
        assert value.sharding == sharding.param_sharding(mesh, path)
    assert params["blocks/0/mixer/q_proj"].addressable_shards[0].data.shape == (16, 2, 8)  # of [D, N, H] = (32, 4, 8)
    sharded = logits_of(saved, TOKENS, mesh)
    np.testing.assert_allclose(sharded, logits_of(saved, TOKENS), atol=1e-4, rtol=0)


class Recorder:
    """A tensor that notes how much of it is read."""

    def __init__(self, array):
        self.array, self.read = array, 0

    def __getitem__(self, index):
        self.read += self.array[index].size
        return self.array[index]


@pytest.mark.parametrize(
    ("stored", "ours", "shape"), [("(NH)D", "DNH", (6, 4, 8)), ("D(NH)", "NHD", (4, 8, 6)), ("FD", "DF", (6, 10))]
)
@pytest.mark.parametrize("piece", [1, 11, 1000])
def test_only_the_slice_asked_for_is_read(monkeypatch, piece, stored, ours, shape):
    """In one piece, row by row, or in pieces the last of which is not whole."""
    monkeypatch.setattr(hf_tables, "PIECE", piece)
    entry = hf_tables.Entry("x", stored, ours)
    stored_shape = entry.stored_shape(shape)
    tensor = Recorder(np.arange(np.prod(stored_shape), dtype=np.float16).reshape(stored_shape))
    whole = entry.read(tensor, shape, (slice(None),) * len(shape))
    assert whole.shape == shape
    # What a person would write by hand.
    hand = {"(NH)D": lambda a: a.T.reshape(6, 4, 8), "D(NH)": lambda a: a.T.reshape(4, 8, 6), "FD": lambda a: a.T}
    np.testing.assert_array_equal(whole, hand[stored](tensor.array))
    part = (slice(2, 4), *(slice(0, size // 2) for size in shape[1:]))
    if ours == "DNH":
        part = (slice(2, 4), slice(2, 4), slice(None))  # as a mesh cuts it: embed and heads, never a head
    tensor.read = 0
    np.testing.assert_array_equal(entry.read(tensor, shape, part), whole[part])
    inside = (slice(2, 4), slice(2, 4), slice(3, 5))[: len(shape)]
    if ours != "NHD":
        assert tensor.read == whole[part].size
    np.testing.assert_array_equal(entry.read(tensor, shape, inside), whole[inside])


@pytest.mark.parametrize("piece", [25, 1000])
def test_parameters_that_share_a_tensor_lie_one_after_the_other(monkeypatch, piece):
    """Of Nemotron-H's projection: 4 heads of 3 (z, then x), 2 groups of 5 (B, then C), and 4 steps, by 8 inputs."""
    monkeypatch.setattr(hf_tables, "PIECE", piece)
    rows = {"z_proj": (0, 12), "x_proj": (12, 24), "b_proj": (24, 34), "c_proj": (34, 44), "dt_proj": (44, 48)}
    shapes = {"z_proj": (8, 4, 3), "x_proj": (8, 4, 3), "b_proj": (8, 2, 5), "c_proj": (8, 2, 5), "dt_proj": (8, 4)}
    tensor = Recorder(np.random.default_rng(0).normal(size=(48, 8)).astype(np.float32))
    for name, (start, stop) in rows.items():
        entry = dataclasses.replace(hf_tables.FAMILIES["nemotron_h"].entries[f"M/mixer/{name}"], start=start)
        tensor.read = 0
        got = entry.read(tensor, shapes[name], (slice(None),) * len(shapes[name]))
        np.testing.assert_array_equal(got, tensor.array[start:stop].T.reshape(shapes[name]))
        assert tensor.read == got.size
        part = (slice(4, 8), slice(0, 2), *[slice(None)] * (got.ndim - 2))
        np.testing.assert_array_equal(entry.read(tensor, shapes[name], part), got[part])
    kernel = Recorder(np.random.default_rng(1).normal(size=(32, 1, 4)).astype(np.float32))
    entry = dataclasses.replace(hf_tables.FAMILIES["nemotron_h"].entries["M/mixer/b_conv"], start=12)
    got = entry.read(kernel, (4, 2, 5), (slice(None), slice(1, 2), slice(None)))
    np.testing.assert_array_equal(got, kernel.array[17:22, 0].T[:, None])


@pytest.fixture
def nemotron(tmp_path):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 4, "n_groups": 2}
    sizes |= {"mamba_head_dim": 8, "ssm_state_size": 16, "chunk_size": 8, "hybrid_override_pattern": "M-*"}
    shape = {name: value for name, value in BASE.items() if name != "num_hidden_layers"}
    model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**shape, **sizes))
    model.save_pretrained(tmp_path / "nemotron")
    return tmp_path / "nemotron"


def test_nemotron_h_of_older_and_newer_files(nemotron):
    """NVIDIA's config.json has a pattern, that of transformers a list; tensors are called backbone.* or model.*."""
    new = hf_files.load_config(str(nemotron))
    params = hf_read.load_params(str(nemotron), new, one_device())
    assert (new.pattern, new.mamba.time_step_limit, new.rope_theta) == ("M-*", (0.0, float("inf")), None)
    old = {"layers_block_type": ..., "layer_types": ..., "hybrid_override_pattern": "M-*", "time_step_limit": ...}
    edit_json(nemotron / "config.json", **old, head_dim=..., attention_head_dim=16)
    assert hf_files.load_config(str(nemotron)) == new
    for low in (0.001, "0.001"):
        # The first is written as Infinity.
        for high in (float("inf"), "inf", "Infinity", {"__float__": "inf"}, {"__float__": "Infinity"}):
            edit_json(nemotron / "config.json", time_step_limit=[low, high])
            assert hf_files.load_config(str(nemotron)).mamba.time_step_limit == (0.001, float("inf"))
    edit_json(nemotron / "config.json", time_step_limit=[], hybrid_override_pattern=[*"M-*"])
    assert hf_files.load_config(str(nemotron)) == new
    tensors = safetensors.numpy.load_file(nemotron / "model.safetensors")
    prefixes = ("backbone.", "model.") if "model.norm_f.weight" not in tensors else ("model.", "backbone.")
    edit_tensors(nemotron, lambda x: [x.update({k.replace(*prefixes): x.pop(k)}) for k in list(x)])
    for path, value in hf_read.load_params(str(nemotron), new, one_device()).items():
        np.testing.assert_array_equal(value, params[path])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hybrid_override_pattern": "ME*"}, "kind of layer = 'E' is not supported; use M (Mamba-2), *"),
        ({"layers_block_type": ["mamba", "moe", "attention"]}, "kind of layer = 'moe'"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu'"),
        ({"use_conv_bias": False}, "use_conv_bias = False"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias = False"),
        ({"mamba_dt_limit": [0.0, 1.0]}, "mamba_dt_limit = [0.0, 1.0]"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias = True"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"hidden_dropout": 0.1}, "hidden_dropout = 0.1"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1"),
        ({"n_groups": 3}, "n_groups = 3"),
        ({"ssm_state_size": ...}, "has no 'ssm_state_size'; is it the config.json of a nemotron_h model?"),
        ({"ssm_state_size": 8.5}, "ssm_state_size = 8.5 is not supported; use a whole number above 0"),
        ({"layers_block_type": [["mamba"]]}, "layers_block_type = [['mamba']] is not supported; use a list of names"),
        ({"hybrid_override_pattern": 3}, "hybrid_override_pattern = 3 is not supported; use a text"),
        ({"time_step_limit": [0.0, "wide"]}, "time_step_limit = [0.0, 'wide'] is not supported; use a list of two num"),
        ({"time_step_limit": "01"}, "time_step_limit = '01' is not supported; use a list of two numbers"),
        ({"time_step_limit": [0.0, "nan"]}, "time_step_limit = [0.0, 'nan'] is not supported; use a list of two numb"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon = None is not supported; use a number above 0"),
        ({"ssm_state_size": 8}, "backbone.layers.0.mixer.in_proj.weight is (132, 32), not (100, 32)"),
    ],
)
def test_a_nemotron_h_that_the_decoder_does_not_have(nemotron, changes, expected):
    edit_json(nemotron / "config.json", layers_block_type=..., layer_types=..., hybrid_override_pattern="M-*")
    edit_json(nemotron / "config.json", **changes)
    assert expected in load_error(nemotron)


def test_a_missing_part_of_a_hybrid_is_named(nemotron):
    edit_tensors(nemotron, lambda tensors: tensors.pop("backbone.layers.0.mixer.A_log"))
    assert "missing from the files: backbone.layers.0.mixer.A_log" in load_error(nemotron)


def test_both_spellings_of_rope_are_read(copy):
    edit_json(copy / "config.json", **rope(1234.0))
    new = hf_files.load_config(str(copy))
    edit_json(copy / "config.json", rope_parameters=..., rope_theta=1234.0, rope_scaling=None)
    old = hf_files.load_config(str(copy))
    assert new == old
    assert new.rope_theta == 1234.0


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def test_both_spellings_of_llama3_scaling_are_read(copy):
    edit_json(copy / "config.json", rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    new = hf_files.load_config(str(copy))
    edit_json(copy / "config.json", rope_parameters=..., rope_theta=5e5, rope_scaling=LLAMA3)
    assert hf_files.load_config(str(copy)) == new
    assert new.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    edit_json(copy / "config.json", rope_scaling={**LLAMA3, "high_freq_factor": 1.0})
    assert "high_freq_factor = 1.0 is not supported" in load_error(copy)
    edit_json(copy / "config.json", rope_scaling={"rope_type": "llama3", "factor": 8.0})
    assert "has no 'original_max_position_embeddings'" in load_error(copy)
    for key in ("rope_type", "type"):  # the older name of the same
        edit_json(copy / "config.json", rope_scaling={key: "yarn", "factor": 4.0})
        assert "rope type = 'yarn' is not supported; use default or llama3" in load_error(copy)


SMALL_LLAMA3 = LLAMA3 | {"original_max_position_embeddings": 32}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": SMALL_LLAMA3},  # the base in rope_parameters counts no more
        {"rope_scaling": SMALL_LLAMA3 | {"rope_theta": 300.0}},
        {"rope_scaling": SMALL_LLAMA3, "rope_theta": 700.0},
        {"rope_scaling": SMALL_LLAMA3, "original_max_position_embeddings": 16},
        {"rope_scaling": {}, "rope_theta": 700.0},  # takes no place
    ],
)
def test_a_scaling_that_was_added_to_newer_files_counts_as_in_transformers(copy, changes):
    """By hand, as model cards describe it: beside the rope_parameters that transformers 5 writes."""
    edit_json(copy / "config.json", **rope(1234.0))
    before = logits_of(copy, TOKENS)
    edit_json(copy / "config.json", **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    ours = logits_of(copy, TOKENS)
    np.testing.assert_allclose(ours, logits_of_reference(model, TOKENS), atol=1e-4, rtol=0)
    assert (np.abs(ours - before).max() > 1e-2) == bool(changes["rope_scaling"])


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_a_scaling_that_was_added_to_newer_files_is_refused_by_name(copy, kind):
    edit_json(copy / "config.json", **rope(1234.0))
    edit_json(copy / "config.json", rope_scaling={"rope_type": kind, "factor": 4.0})
    assert f"rope type = '{kind}' is not supported; use default or llama3" in load_error(copy)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not supported; supported are llama, qwen2, qwen3, nemotron_h"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, 'rope_parameters = "full_attention: {'),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = 'sliding_attention'"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types = 'chunked_attention'"),
        ({"model_type": "llama", "sliding_window": 4096}, "sliding_window = 4096"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias = True"),
        ({"is_causal": False}, "is_causal = False"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config of method = 'fp8'"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"intermediate_size": ...}, "has no 'intermediate_size'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias = True"),
        ({"model_type": ["llama"]}, "model_type = ['llama'] is not supported; supported are llama"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' is not supported; use an object"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor = '8' is not supported; use a number above 0"),
        ({"quantization_config": "awq"}, "quantization_config of method = 'awq' is not supported; use weights in"),
        ({"layer_types": 2}, "layer_types = 2 is not supported; use a list of names"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None is not supported; use a whole number above 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5 is not supported; use a whole number above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is not supported; use a whole number above 0"),
        ({"head_dim": 0, "num_attention_heads": 64}, "num_attention_heads = 64 is not supported; use at most hidden_s"),
        ({"num_key_value_heads": True}, "num_key_value_heads = True is not supported; use a whole number above 0"),
        ({"vocab_size": "300"}, "vocab_size = '300' is not supported; use a whole number above 0"),
        ({"max_position_embeddings": None}, "max_position_embeddings = None is not supported; use a whole number abo"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None is not supported; use a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' is not supported; use true or false"),
    ],
)
def test_a_model_that_the_decoder_does_not_have(copy, changes, expected):
    edit_json(copy / "config.json", **changes)
    message = load_error(copy)
    assert "config.json" in message
    assert expected in message


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({"head_dim": 0, "num_key_value_heads": 0, "tie_word_embeddings": 0}, ...),  # as if they were missing
        ({"vocab_size": float(BASE["vocab_size"]), "tie_word_embeddings": 1}, True),
    ],
)
def test_zeros_whole_floats_and_flags_of_0_and_1_are_read(copy, changes, without):
    edit_json(copy / "config.json", **changes)
    read = hf_files.load_config(str(copy))
    edit_json(copy / "config.json", **{name: ... for name in changes if name != "vocab_size"})
    edit_json(copy / "config.json", vocab_size=BASE["vocab_size"], tie_word_embeddings=without)
    assert read == hf_files.load_config(str(copy))
    assert type(read.vocab_size) is int and type(read.tie_embeddings) is bool


def test_what_older_files_leave_out_is_as_in_transformers():
    """Those of the first Llamas name neither the base of rope nor key and value heads."""
    raw = {"model_type": "llama", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "rms_norm_eps": 1e-6}
    raw |= {"num_attention_heads": 6, "num_hidden_layers": 2, "max_position_embeddings": 64}
    expected = transformers.AutoConfig.for_model(**raw)
    read = from_hf(raw, "config.json")
    assert read.rope_theta == expected.rope_parameters["rope_theta"] and read.rope_scaling is None
    assert (read.num_kv_heads, read.head_dim) == (expected.num_key_value_heads, expected.head_dim) == (6, 8)
    assert read.tie_embeddings is expected.tie_word_embeddings is False


def test_a_part_of_the_head_that_is_null_is_not_named(copy):
    before = hf_files.load_config(str(copy))
    own = json.loads((copy / "config.json").read_text())["rope_parameters"]
    edit_json(copy / "config.json", partial_rotary_factor=None, rope_parameters=own | {"partial_rotary_factor": None})
    assert hf_files.load_config(str(copy)) == before


def test_a_window_that_is_not_in_use_is_no_window(copy):
    """Qwen's own files name one, and switch it off."""
    before = hf_files.load_config(str(copy))
    edit_json(copy / "config.json", sliding_window=4096, max_window_layers=1, use_sliding_window=False)
    assert hf_files.load_config(str(copy)) == before


def test_the_base_of_rope_is_read_beside_a_scaling_that_lacks_it(copy):
    edit_json(copy / "config.json", rope_parameters={"rope_type": "default"}, rope_theta=1234.0)
    assert hf_files.load_config(str(copy)).rope_theta == 1234.0


def test_a_tied_model_may_carry_its_head(copy):
    before = logits_of(copy, TOKENS)
    edit_json(copy / "config.json", tie_word_embeddings=True)
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}))
    edit_tensors(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
    tied = logits_of(copy, TOKENS)
    assert hf_files.load_config(str(copy)).tie_embeddings
    assert np.abs(tied - before).max() > 0.1  # the head is the embedding now
    edit_tensors(copy, lambda tensors: tensors.pop("lm_head.weight"))
    np.testing.assert_array_equal(logits_of(copy, TOKENS), tied)


def test_a_directory_that_is_not_there_or_empty(tmp_path):
    missing = str(tmp_path / "none")
    assert error_of(hf_files.load_config, missing).startswith(f"config.model.path = {missing!r}: no such directory")
    assert "no config.json" in error_of(hf_files.load_config, str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in error_of(hf_files.load_config, str(tmp_path))


def test_a_hub_id_that_can_not_be_had(monkeypatch):
    def offline(name, allow_patterns, **_):
        assert "*.safetensors" in allow_patterns
        assert not any("bin" in pattern for pattern in allow_patterns)
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot reach the hub\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = error_of(hf_paths.resolve, "nobody/none-such")
    assert message.startswith("config.model.path = 'nobody/none-such': no such directory, and the hub")
    assert "give a local directory" in message


def test_a_hub_id_becomes_its_snapshot_of_the_files_at_its_top(monkeypatch, saved):
    files = ["config.json", "model.safetensors", "merges.txt", "tokenizer.model", "README.md"]
    files += ["checkpoint-500/model.safetensors", "original/tokenizer.model", "onnx/a/config.json", "a/b.jinja"]
    files += ["additional_chat_templates/tools.jinja"]
    taken = []

    def download(name, **patterns):
        taken.extend(huggingface_hub.utils.filter_repo_objects(files, **patterns))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf_files.load_config("somebody/qwen2-tiny") == hf_files.load_config(str(saved))
    assert taken == [*files[:4], files[-1]]


def test_of_a_bucket_the_files_at_its_top_are_wanted(monkeypatch, tmp_path):
    """Not those of checkpoints in it, nor weights in another format."""
    asked = []
    monkeypatch.setattr(hf_paths.reading, "local", lambda *given: asked.append(given) or tmp_path)
    assert hf_paths.resolve("gs://bucket/a model") == tmp_path
    ((setting, address, wanted),) = asked
    assert (setting, address) == ("config.model.path = 'gs://bucket/a model'", "gs://bucket/a model")
    assert all(map(wanted, ["config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja"]))
    assert wanted("additional_chat_templates/tools.jinja") and not wanted("a/tools.jinja")
    assert not any(map(wanted, ["checkpoint-5/model.safetensors", "pytorch_model.bin", "onnx/config.json"]))


def test_no_weights(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "only weights in the safetensors format" in load_error(copy)


@pytest.mark.parametrize("keep", [0, 4, 500, 20_000])
def test_weights_cut_short(copy, keep):
    whole = (copy / "model.safetensors").read_bytes()
    assert keep < len(whole)
    (copy / "model.safetensors").write_bytes(whole[:keep])
    message = load_error(copy)
    assert "model.safetensors can't be read" in message
    assert "cut short" in message


def test_an_index_that_names_a_file_that_is_not_there(tmp_path):
    dense_model("llama", 4, 2).save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"names {gone.name}, which is not there" in load_error(tmp_path)
    for index in ({}, {"weight_map": []}, {"weight_map": {"x": 1}}):
        (tmp_path / hf_tensors.INDEX).write_text(json.dumps(index))
        assert "has no weight_map from tensors to files" in load_error(tmp_path)


def test_one_tensor_in_two_files(tmp_path):
    dense_model("llama", 4, 2).save_pretrained(tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    assert "is in two files" in load_error(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_named(copy):
    spare = copy.with_name("spare")
    shutil.copytree(copy, spare)
    # Without the embeddings the head of an untied model does not stand in for them.
    for name in ("model.layers.1.self_attn.k_proj.bias", "model.embed_tokens.weight"):
        edit_tensors(copy, lambda tensors, name=name: tensors.pop(name))
        assert re.search(rf"\d of 27 tensors missing from the files: .*{name}", load_error(copy))
    edit_json(spare / "config.json", intermediate_size=40)
    message = load_error(spare)
    assert "6 of 27 tensors of another shape than config.json says" in message
    assert "model.layers.0.mlp.gate_proj.weight is (48, 32), not (40, 32)" in message
    assert message.count("mlp.") == 5
    assert "and 1 more" in message
    edit_json(spare / "config.json", intermediate_size=48, num_hidden_layers=1)
    message = load_error(spare)
    assert "12 of 15 tensors in the files that the model has no place for: model.layers.1." in message
    edit_json(spare / "config.json", num_hidden_layers=2, model_type="llama")
    assert "6 of 21 tensors in the files that the model has no place for" in load_error(spare)


def test_a_dtype_that_is_not_read(copy):
    edit_tensors(copy, lambda tensors: tensors.update({"model.norm.weight": np.ones(32, np.int8)}))
    assert "model.norm.weight is I8; save the model in F32, BF16, F16" in load_error(copy)


def test_a_mesh_that_does_not_divide_the_heads(copy):
    mesh = sharding.make_mesh(config.MeshConfig(data=1, fsdp=1, tensor=-1))
    message = error_of(hf_read.load_params, str(copy), hf_files.load_config(str(copy)), mesh)
    assert message.startswith("config.mesh.tensor = 8")
    assert "heads" in message


def test_a_fast_tokenizer_and_its_stops(copy):
    save_tokenizer(copy, CHATML)
    tokenizer = hf_files.load_tokenizer(str(copy))
    assert tokenizer("x answer")["input_ids"] == [6, 7]
    # The tokenizer says </s> = 1, the template <|im_end|> = 3.
    edit_json(copy / "config.json", eos_token_id=2)
    for named, found in (([4, 5], (1, 3, 4, 5)), (4, (1, 3, 4)), (None, (1, 2, 3)), (..., (1, 2, 3))):
        edit_json(copy / "generation_config.json", eos_token_id=named)
        assert hf_files.eos_ids(str(copy), tokenizer) == found
        theirs = transformers.AutoModelForCausalLM.from_pretrained(copy).generation_config.eos_token_id
        assert theirs is None or {*np.atleast_1d(theirs).tolist()} <= {*found}


@pytest.mark.parametrize(
    ("template", "special", "found"),
    [
        (None, WORDS[:6], (1, 5)),
        (CHATML.replace("im_end", "eot_id"), WORDS[:6], (1, 4, 5)),
        (CHATML, WORDS[:3], (1, 5)),  # <|im_end|> is no special token here: a model may write it in its answer
        (CHATML.replace("<|im_end|>", ""), WORDS[:6], (1, 5)),
        ("Give an answer<|eot_id|>" + CHATML, WORDS[:6], (1, 3, 5)),  # of the turn, not of other words before it
    ],
)
def test_the_end_of_turn_is_the_special_token_after_an_answer(copy, template, special, found):
    (copy / "generation_config.json").unlink()
    save_tokenizer(copy, template, special)
    assert hf_files.eos_ids(str(copy), hf_files.load_tokenizer(str(copy))) == found


OLDER = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.model", "vocab.json", "vocab.txt")


def test_a_fingerprint_tells_a_tokenizer_from_another(tmp_path):
    """Every file that decides ids counts, with its name; beside a tokenizer.json no other one is read or counts."""
    changed = lambda name, text: (tmp_path / name).write_text(text) and hf_files.tokenizer_fingerprint(str(tmp_path))
    before = [changed(name, "a") for name in OLDER][-1]
    assert hf_files.tokenizer_fingerprint(str(tmp_path)) == before == changed("README.md", "b")
    found = [before]
    for name in OLDER:
        found.append(changed(name, "b"))
        assert changed(name, "a") == before
    (tmp_path / "vocab.txt").rename(tmp_path / "tekken.json")
    found += [hf_files.tokenizer_fingerprint(str(tmp_path)), changed("tokenizer.json", "a")]
    assert all(changed(name, "b") == found[-1] for name in OLDER)
    assert len({*found, changed("tokenizer.json", "b")}) == len(found) + 1


def test_tokenizers_that_can_not_be_used(copy):
    assert "no tokenizer in it" in error_of(hf_files.load_tokenizer, str(copy))
    (copy / "tokenizer.json").write_text("{}")
    assert "the tokenizer can't be read" in error_of(hf_files.load_tokenizer, str(copy))
    save_tokenizer(copy, "{{ raise_exception('no such role') }}")
    message = error_of(hf_files.eos_ids, str(copy), hf_files.load_tokenizer(str(copy)))
    assert "the chat template fails (no such role)" in message
    for wrong in ("</s>", ["1"], 2.0):
        edit_json(copy / "generation_config.json", eos_token_id=wrong)
        message = error_of(hf_files.named_eos_ids, str(copy))
        assert "generation_config.json: eos_token_id" in message and "use a token id or a list of them" in message
    tokenizer = hf_files.load_tokenizer(str(copy))
    tokenizer.eos_token = tokenizer.chat_template = None
    for name in ("config.json", "generation_config.json"):
        edit_json(copy / name, eos_token_id=...)
    assert "no end-of-sequence token" in error_of(hf_files.eos_ids, str(copy), tokenizer)


def test_a_completion_ends_with_an_end_that_the_model_has(tmp_path):
    """Where the tokenizer has no EOS token, that of generation_config.json, and of several the first."""
    path = tmp_path / "model"
    path.mkdir()
    save_byte_model(path)
    own = open_policy(config.ModelConfig(path=str(path)))
    assert own.encode_completion("ab").tolist() == [*own.tokenizer("ab")["input_ids"], own.tokenizer.eos_token_id]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).exists():
            edit_json(path / name, eos_token=...)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3]}))
    lacking = open_policy(config.ModelConfig(path=str(path)))
    assert lacking.tokenizer.eos_token_id is None and lacking.eos_ids == (3, 7)
    assert lacking.encode_completion("ab").tolist() == [*own.tokenizer("ab")["input_ids"], 7]
    (path / "generation_config.json").unlink()
    edit_json(path / "config.json", eos_token_id=...)
    assert "no end-of-sequence token; set eos_token_id" in error_of(
        dataclasses.replace(lacking, eos_ids=()).encode_completion, "ab"
    )


def test_a_tokenizer_with_ids_that_the_weights_lack(tmp_path):
    save_byte_model(tmp_path)
    assert open_policy(config.ModelConfig(path=str(tmp_path))).cfg.vocab_size == 257  # all that the tokenizer has
    save_byte_model(tmp_path, vocab_size=256)
    message = error_of(open_policy, config.ModelConfig(path=str(tmp_path)))
    assert "its tokenizer has ids up to 256, its weights a vocabulary of 256" in message


def test_a_sentencepiece_tokenizer(copy, tmp_path):
    import sentencepiece

    lines = [f"the sum of {a} and {b} is {a + b}" for a in range(12) for b in range(12)]
    (tmp_path / "text").write_text("\n".join(lines))
    options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}  # as Llama's
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(copy / "tokenizer"), vocab_size=300, minloglevel=2, **options
    )
    edit_json(copy / "config.json", model_type="llama")
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (copy / "tokenizer.vocab").unlink()
    tokenizer = hf_files.load_tokenizer(str(copy))
    ids = tokenizer("the sum of 3 and 4", add_special_tokens=False)["input_ids"]
    assert ids == sentencepiece.SentencePieceProcessor(str(copy / "tokenizer.model")).encode("the sum of 3 and 4")
    assert tokenizer.decode(ids) == "the sum of 3 and 4"


MEMORY = """
import re, sys
import jax
import numpy as np
from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import hf_files, hf_read, hf_tables

def kib(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1])

path, fsdp = sys.argv[1], int(sys.argv[2])
mesh = sharding.make_mesh(config.MeshConfig(data=1, fsdp=fsdp, tensor=1), jax.devices()[:fsdp])
jax.block_until_ready(jax.device_put(np.ones((64, 64)), jax.devices()[0]))
cfg = hf_files.load_config(path)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM, the most so far, starts anew
before = kib("VmRSS")
params = jax.block_until_ready(hf_read.load_params(path, cfg, mesh, sys.argv[3]))
copy = sum(shard.data.nbytes for x in params.values() for shard in x.addressable_shards)
print((kib("VmHWM") - before) * 1024 - copy)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.proof)])
@pytest.mark.parametrize("fsdp", [pytest.param(1, marks=pytest.mark.proof), 4])
def test_host_memory_of_an_import_is_bounded(tmp_path, monkeypatch, fsdp, dtype):
    """Beyond the parameters themselves (on a CPU they are host memory too) less than 1.5 times one of three files.

    A tensor is about a fifth of a file, as in a 7B. Red where all files stay open. Here tensors are small enough for
    malloc to keep some 60 MB of what is freed; those of a 7B are not, and nor are these with its threshold fixed.
    """
    cfg = tiny_config(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=4096,
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
        pattern="*-" * 4,
        rope_theta=1e4,
        qkv_bias=False,
        tie_embeddings=True,
        max_position_embeddings=64,
    )
    mesh = one_device()
    (tmp_path / "config.json").write_text(json.dumps(hf_write.exported_config("", cfg, "bfloat16")))
    monkeypatch.setattr(hf_write, "SHARD", "48MB")
    ones = {
        path: jax.numpy.ones(shape, "bfloat16", device=sharding.param_sharding(mesh, path))
        for path, shape in decoder.shapes(cfg).items()
    }
    hf_write.write_tensors(tmp_path, ones, hf_tables.table("llama", cfg), dtype="bfloat16")
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) >= 3
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(fsdp), dtype]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1.5 * max(sizes)


def test_what_several_devices_hold_is_read_once(saved, monkeypatch):
    reads, read = [], hf_tables.Entry.read

    def counted(entry, tensor, shape, index, dtype="float32"):
        block = read(entry, tensor, shape, index, dtype)
        reads.append(block.size)
        return block

    monkeypatch.setattr(hf_tables.Entry, "read", counted)
    cfg, mesh = hf_files.load_config(str(saved)), sharding.make_mesh(config.MeshConfig(data=2, fsdp=4, tensor=1))
    seen = []
    params = hf_read.load_params(str(saved), cfg, mesh, report=seen.append)
    assert sum(reads) == cfg.num_params
    assert seen == sorted(seen) and seen[-1] == hf_read.check_weights(str(saved), cfg) == 4 * cfg.num_params
    # Devices that were given the same memory: what is done to one copy must not show in another.
    name = "blocks/0/mixer/q_proj"
    before = np.asarray(params[name])
    spare = hf_read.load_params(str(saved), cfg, mesh)[name]
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(spare)
    for piece in doubled.addressable_shards:
        np.testing.assert_array_equal(np.asarray(piece.data), 2 * before[piece.index])


def test_weights_in_bfloat16(saved):
    cfg = hf_files.load_config(str(saved))
    wide, narrow = (hf_read.load_params(str(saved), cfg, one_device(), dtype) for dtype in ("float32", "bfloat16"))
    for path, x in narrow.items():
        assert x.dtype == "bfloat16"
        np.testing.assert_array_equal(np.asarray(x), np.asarray(wide[path]).astype("bfloat16"))
