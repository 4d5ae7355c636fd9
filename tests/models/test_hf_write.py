"""Exports: what was read comes back bit for bit, transformers loads it, and a bad one never gets its name."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hf_models import (
    DENSE,
    FAMILIES,
    TOKENS,
    dense_model,
    family_model,
    logits_of,
    logits_of_reference,
    torch,
    transformers,
    unclipped,
)
from model_files import CHATML, edit_json, edit_tensors, error_of, is_gone, save_byte_model, save_tokenizer, tensors_of
from tiny_models import hybrid_config, one_device

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.models import decoder, hf_files, hf_tables, hf_write, lora, policy


def open_policy(path):
    return policy.open_policy(config.ModelConfig(path=str(path)))


@pytest.fixture
def original(tmp_path):
    """A model directory with a tokenizer, in bfloat16."""
    path = tmp_path / "original"
    dense_model("qwen2", 4, 2).to(torch.bfloat16).save_pretrained(path)
    save_tokenizer(path, CHATML)
    return path


OTHER_FAMILIES = (
    *("llama3", "qwen3-tied", "hybrid"),
    *(pytest.param(name, marks=pytest.mark.proof) for name in ("qwen3", "hybrid-groups-of-one-head")),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*DENSE, *OTHER_FAMILIES])
def test_import_export_import_is_the_identity(tmp_path, case):
    """Of every family; in bfloat16, to which other dtypes are rounded as transformers would."""
    path, out = tmp_path / "original", tmp_path / "out"
    if case not in DENSE:
        model, shard = family_model(*FAMILIES[case]).to(torch.bfloat16), "20KB"
    else:
        arguments, dtype, shard = DENSE[case]
        model = dense_model(*arguments).to(dtype)
    model.save_pretrained(path, max_shard_size=shard)
    save_tokenizer(path, CHATML)
    opened, mesh = open_policy(path), one_device()
    seen = []
    opened.save(out, opened.load(mesh, 0), seen.append, "bfloat16")
    assert (
        seen[-1] == hf_write.model_bytes(opened.cfg, "bfloat16") == sum(len(x) for _, x, _ in tensors_of(out).values())
    )
    expected = tensors_of(path)
    if opened.cfg.tie_embeddings:
        expected.pop("lm_head.weight", None)
    assert {name: (*x[:2], "BF16") for name, x in expected.items()} == tensors_of(out)
    assert open_policy(out).cfg == opened.cfg
    again = open_policy(out).load(mesh, 0, "bfloat16")
    for name, x in opened.load(mesh, 0, "bfloat16").items():
        assert (np.asarray(x) == np.asarray(again[name])).all() and again[name].dtype == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    reread = unclipped(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).float())
    np.testing.assert_array_equal(
        logits_of_reference(model, TOKENS),
        logits_of_reference(reread, TOKENS),
    )


@pytest.mark.slow
def test_a_nemotron_h_is_written_as_backbone(tmp_path):
    """As in NVIDIA's files and code, and as transformers writes it, which reads model.* too; NVIDIA's code does not."""
    path, out, again = (tmp_path / name for name in ("original", "out", "again"))
    family_model(*FAMILIES["hybrid"]).to(torch.bfloat16).save_pretrained(path)
    save_tokenizer(path, None)
    theirs = tensors_of(path)
    assert "backbone.embeddings.weight" in theirs
    edit_tensors(path, lambda x: [x.update({k.replace("backbone.", "model."): x.pop(k)}) for k in list(x)])
    assert "model.embeddings.weight" in tensors_of(path)
    for source, target in ((path, out), (out, again)):
        opened = open_policy(source)
        opened.save(target, opened.load(one_device(), 0, "bfloat16"))
        assert tensors_of(target) == theirs
    logits = []
    for folder in (path, out):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        logits.append(logits_of_reference(unclipped(model.float()), TOKENS))
    np.testing.assert_array_equal(*logits)


@pytest.mark.slow
@pytest.mark.parametrize("least", [0.0, 0.01])
def test_transformers_clips_the_time_steps_of_an_export_as_training_does(tmp_path, least):
    """As it is, and not `unclipped`: it clips to time_step_min, which is 0.001 where nothing is written."""
    path, out = tmp_path / "original", tmp_path / "out"
    model = family_model(*FAMILIES["hybrid"])
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("dt_bias"):
                value.copy_(torch.linspace(-9, -4, len(value)))  # time steps of about 0.0001 to 0.02
    model.save_pretrained(path)
    edit_json(path / "config.json", time_step_limit=[least, float("inf")], mamba_dt_min=0.001)
    save_tokenizer(path, None)
    opened = open_policy(path)
    assert opened.cfg.mamba.time_step_limit[0] == least
    opened.save(out, opened.load(one_device(), 0), dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = logits_of(path, TOKENS)
    np.testing.assert_allclose(ours, logits_of_reference(theirs, TOKENS), atol=1e-4, rtol=0)
    assert open_policy(out).cfg == opened.cfg
    transformers.AutoModelForCausalLM.from_config(theirs.config)  # draws new weights


@pytest.mark.slow
def test_everything_beside_the_weights_is_the_originals(original, tmp_path):
    """But for the dtype, for code that is not copied, and for the ids at which the policy learned to stop."""
    out = tmp_path / "out"
    edit_json(original / "config.json", auto_map={"AutoConfig": "code.Config"}, torch_dtype="float32")
    (original / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "temperature": 0.6}))
    (original / "chat_template.jinja").write_text(CHATML)
    (original / "pytorch_model.bin.index.json").write_text("{}")
    (original / "additional_chat_templates").mkdir()
    (original / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}" + CHATML)
    opened = open_policy(original)
    opened.save(out, opened.load(one_device(), 0, "bfloat16"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (original / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (original, out))
    assert before.pop("auto_map")
    assert before | {"torch_dtype": "bfloat16"} == after
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [1, 3, 5], "temperature": 0.6}
    assert not list(out.glob("*.index.json"))
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    turns = [{"role": "user", "content": "x"}]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(path) for path in (original, out)]
    assert len({str(x.apply_chat_template(turns, add_generation_prompt=True)) for x in tokenizers}) == 1
    assert tokenizers[1].chat_template == {"default": CHATML, "tools": "{{ tools }}" + CHATML}


@pytest.mark.slow
def test_shards_and_their_index(original, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(hf_write, "SHARD", "20KB")
    opened = open_policy(original)
    opened.save(out, opened.load(one_device(), 0, "bfloat16"))
    files = sorted(out.glob("model-*.safetensors"))
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 1 + len(files))]
    assert [file.name for file in files] == names
    assert len(files) > 2 and all(file.stat().st_size < 24_000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(out).keys() == tensors_of(original).keys()
    assert index["metadata"]["total_size"] == hf_write.model_bytes(opened.cfg, "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert tensors_of(out) == tensors_of(original)


@pytest.mark.slow
def test_a_sharded_policy_is_exported_as_one(original, tmp_path):
    opened, mesh = open_policy(original), sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        opened.save(tmp_path / "out", opened.load(mesh, 0, "bfloat16"))
    assert tensors_of(tmp_path / "out") == tensors_of(original)


@pytest.mark.slow
def test_the_builtin_model_is_exported_as_a_llama(tmp_path):
    shape = config.BuiltinModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48)
    builtin, mesh, out = (
        policy.open_policy(config.ModelConfig(builtin=shape)),
        one_device(),
        tmp_path / "out",
    )
    draw = np.random.default_rng(0).normal
    sizes = decoder.shapes(builtin.cfg).items()
    params = {
        path: jax.device_put(
            draw(path.endswith("scale"), 0.3, size).astype("bfloat16"), sharding.param_sharding(mesh, path)
        )
        for path, size in sizes
    }
    builtin.save(out, params)
    again = open_policy(out)
    assert (again.cfg, again.eos_ids) == (builtin.cfg, builtin.eos_ids)
    theirs, auto = (
        transformers.AutoModelForCausalLM.from_pretrained(out),
        transformers.AutoTokenizer.from_pretrained(out),
    )
    text = "7+5-3"
    for tokenizer in (again.tokenizer, auto):
        for special in (True, False):
            assert tokenizer(text, add_special_tokens=special) == builtin.tokenizer(text, add_special_tokens=special)
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert ids == builtin.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    ours = logits_of(out, TOKENS)
    np.testing.assert_allclose(ours, logits_of_reference(theirs.float(), TOKENS), atol=1e-4, rtol=0)
    assert theirs.generation_config.eos_token_id == builtin.eos_ids[0]


@pytest.mark.slow
def test_a_change_that_bfloat16_would_lose_is_exported_in_float32(tmp_path):
    """Where none is asked for, by the change that survives. What is said of the logits is what they differ by."""
    shape = config.BuiltinModelConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=48)
    builtin, mesh = policy.open_policy(config.ModelConfig(builtin=shape)), one_device()
    base, key = builtin.load(mesh, 0, "bfloat16"), jax.random.key(0)
    settings = config.LoraConfig(rank=2, alpha=2.0, targets=("all-linear",))

    def tuned(size, dtype):
        adapters = {path: x + size for path, x in lora.init(settings, decoder.shapes(builtin.cfg), key, mesh).items()}
        return lora.attach(decoder.cast(base, dtype), adapters, settings.scaling)

    small, large = tuned(1e-4, "float32"), tuned(10.0, "float32")
    kept = builtin.save(tmp_path / "small", small)
    assert (kept.dtype, kept.lost, kept.difference) == ("float32", 0, 0)
    assert str(kept) == "it gives the trained policy's logits in a probe of 8 tokens"
    assert {dtype for *_, dtype in tensors_of(tmp_path / "small").values()} == {"F32"}
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "small" / "model.safetensors").stat().st_size > hf_write.model_bytes(builtin.cfg, "float32")
    lossy = builtin.save(tmp_path / "lossy", small, dtype="bfloat16")
    assert lossy.dtype == "bfloat16" and lossy.lost > policy.MOST_LOST and 0 < lossy.difference < lossy.largest
    assert str(lossy).startswith(f"bfloat16 lost {lossy.lost:.1%} of LoRA's change, and its logits differ from the tra")
    assert builtin.save(tmp_path / "large", large).dtype == "bfloat16"
    rounded = builtin.save(tmp_path / "rounded", tuned(1e-4, "bfloat16"))
    assert (rounded.dtype, rounded.lost, rounded.difference) == ("bfloat16", 0, 0)
    # Only the change of the weights counts, and not the dtype in which logits are computed.
    trained, exported = (policy._probe(builtin.cfg, x) for x in (small, policy.written(small, "bfloat16")))
    assert lossy.difference == pytest.approx(np.abs(trained - exported).max())


@pytest.mark.slow
def test_a_folder_that_can_not_be_used(original, tmp_path):
    opened = open_policy(original)
    params = opened.load(one_device(), 0)
    message = error_of(opened.save, original, params)
    assert message == f"{original}: already exists; give a new folder"
    (tmp_path / "file").write_text("")
    assert "already exists" in error_of(opened.save, tmp_path / "file", params)
    message = error_of(opened.save, tmp_path / "file" / "out", params)
    assert "can't be written (Not a directory)" in message
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()  # of an export that was killed
    (tmp_path / ".out.partial" / "old").write_text("")
    opened.save(tmp_path / "out", params)
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "old").exists()


@pytest.mark.parametrize("keys", [["dtype"], ["torch_dtype"], ["torch_dtype", "dtype"], []])
def test_every_dtype_of_a_config_is_that_of_the_export(tmp_path, keys):
    path = tmp_path / "model"
    path.mkdir()
    save_byte_model(path)
    edit_json(path / "config.json", **dict.fromkeys(keys, "float16"))
    raw = hf_write.exported_config(str(path), hf_files.load_config(str(path)), "float32")
    assert {key: raw[key] for key in raw if "dtype" in key} == dict.fromkeys(keys or ["dtype"], "float32")


def test_adapters_of_a_part_of_a_tensor_are_refused():
    """Mamba-2's projections are one tensor in the files, and so would be the adapters of all of them."""
    entries = hf_tables.table("nemotron_h", hybrid_config())
    for path, name in (("blocks/0/mixer/z_proj", "in_proj"), ("blocks/0/mixer/o_proj", "out_proj")):
        message = error_of(hf_write.adapter_entries, entries, {f"{path}/lora_a": None})
        assert f"peft takes no adapter for {path}, in the files backbone.layers.0.mixer.{name}.weight" in message


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """Nothing can be renamed to it, which an export would find out at its end."""
    (tmp_path / "mounted").mkdir()
    (tmp_path / "link").symlink_to("mounted")
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(tmp_path / "mounted"))
    for name in ("mounted", "link"):
        message = error_of(hf_write.check_free, tmp_path / name)
        assert message == f"{tmp_path / name}: is a mount point; give a folder below it"
        with pytest.raises(InputError), hf_write.new_folder(tmp_path / name):
            pass
    assert sorted(os.listdir(tmp_path)) == ["link", "mounted"] and not os.listdir(tmp_path / "mounted")
    hf_write.check_free(tmp_path / "mounted" / "below")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["transposed", "cut", "none"])
def test_what_does_not_read_back_is_no_export(original, tmp_path, monkeypatch, damage):
    out, write = tmp_path / "out", safetensors.numpy.save_file

    def damaged(tensors, file, metadata):
        if damage == "transposed":
            name = "model.layers.0.self_attn.q_proj.weight"
            tensors[name] = np.ascontiguousarray(tensors[name].T)
        write(tensors, file, metadata)
        if damage == "cut":
            os.truncate(file, 20_000)

    monkeypatch.setattr(safetensors.numpy, "save_file", damaged)
    opened = open_policy(original)
    params = opened.load(one_device(), 0)
    if damage == "none":
        params["norm/scale"] = params["norm/scale"] * np.nan
    kind, said = {
        "transposed": (RunError, "read back"),
        "cut": (InputError, "can't be read"),
        "none": (RunError, "not finite"),
    }[damage]
    with pytest.raises(kind, match=said):
        opened.save(out, params)
    assert is_gone(out)


@pytest.mark.skipif(
    "IGRPO_SMOLLM2" not in os.environ, reason="set IGRPO_SMOLLM2 to a directory with SmolLM2-135M-Instruct"
)
def test_smollm2_writes_the_same_text_after_an_export(tmp_path):
    path, out = os.environ["IGRPO_SMOLLM2"], tmp_path / "out"
    opened = open_policy(path)
    opened.save(out, opened.load(one_device(), 0, "bfloat16"))
    texts = []
    for folder in (path, out):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        turns = [
            {"role": "user", "content": "Natalia sold 48 clips in April and half as many in May. How many in all?"}
        ]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        texts.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
    assert texts[0] == texts[1] and len(texts[0]) > 50
    assert hf_files.load_config(str(out)) == dataclasses.replace(hf_files.load_config(path))
