"""Model directories in tests: their tensors, tokenizers and JSON files, and the errors of those that are wrong."""

import collections
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tokenizers
import transformers
from tiny_models import random_params

from igrpo_jax.errors import InputError
from igrpo_jax.models import hf_tables
from igrpo_jax.models.config import from_hf

WORDS = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<pad>", "x", "answer"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(path, template, special=WORDS[:6]):
    """Writes a tokenizer of WORDS with a chat template; those in `special` are special tokens."""

    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    extra = [word for word in special if word not in ("<unk>", "</s>")]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", additional_special_tokens=extra
    )
    tokenizer.add_tokens([word for word in WORDS[2:6] if word not in special])  # added tokens, but not special ones
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)


HYBRID = {  # of save_byte_model
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-*",
    "mamba_num_heads": 2,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "ssm_state_size": 8,
    "conv_kernel": 4,
    "chunk_size": 8,
    "head_dim": 8,
    "layer_norm_epsilon": 1e-5,
}


def save_byte_model(path, max_positions=2048, **settings):
    """Writes a tiny random Llama with a tokenizer of one token per byte and a chat template; it needs no torch.

    Args:
        settings: replace those of config.json.
    """
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"</s>": len(letters)}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    tokenizer.save_pretrained(path)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    shape |= {"vocab_size": len(vocabulary), "max_position_embeddings": max_positions, "rms_norm_eps": 1e-5}
    settings = shape | {"model_type": "llama", "eos_token_id": len(letters)} | settings
    (path / "config.json").write_text(json.dumps(settings))
    cfg = from_hf(settings, "config.json")
    params, parts = random_params(cfg), collections.defaultdict(list)  # some parameters share a tensor
    for name, entry in hf_tables.table(settings["model_type"], cfg).items():
        parts[entry.name].append(entry.write(params[name]))
    tensors = {name: np.concatenate(values) for name, values in parts.items()}
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


def edit_json(file, **changes):
    """Rewrites a JSON file with `changes`; `...` removes a key."""
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def edit_tensors(path, change):
    """Rewrites the weights with `change` applied to the dict of tensors."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


def error_of(call, *args):
    """The message, one line, of the InputError that `call` raises."""
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def tensors_of(path):
    """Every tensor of a directory by name: its bytes in bfloat16, and what the file says its dtype is."""
    tensors = {}
    for file in path.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                tensors[name] = (tensor.shape, tensor.astype("bfloat16").tobytes(), opened.get_slice(name).get_dtype())
    return tensors


def is_gone(folder):
    """Whether neither the folder nor a temporary one of it is there."""
    return not folder.exists() and not list(folder.parent.glob(f".{folder.name}*"))
