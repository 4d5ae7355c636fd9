"""Tiny random models of transformers to compare with, saved as files that we read; what needs torch."""

import jax
import numpy as np
import pytest
from tiny_models import one_device

from igrpo_jax.models import decoder, hf_files, hf_read

torch = pytest.importorskip("torch", reason="PyTorch is not installed; the extra parity brings it")
transformers = pytest.importorskip("transformers")

BASE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
BASE |= {"max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 5}


def rope(theta):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def dense_model(kind, heads, kv_heads, tied=False, eps=1e-5, theta=10_000.0, **more):
    """A random transformers model in which no parameter has a value that hides a mistake (biases 0, scales 1)."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    settings = BASE | shape | {"rms_norm_eps": eps} | rope(theta) | more
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    torch.manual_seed(0)
    model = classes[kind][1](classes[kind][0](**settings)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(0, 0.3)
            if "norm" in name:
                value.add_(1)
    return model


def logits_of(path, tokens, mesh=None):
    """Logits of the directory `path` as we read it, on one device unless a mesh is given."""
    mesh = mesh or one_device()
    cfg = hf_files.load_config(str(path))
    params = hf_read.load_params(str(path), cfg, mesh)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    def forward(params, tokens, positions):
        return decoder.logits(cfg, params, decoder.apply(cfg, params, tokens, positions)[0])

    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(forward)(params, tokens, positions))


def logits_of_reference(model, tokens):
    """Logits of a model of transformers."""
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


TOKENS = np.random.default_rng(0).integers(0, 96, (4, 13), np.int32)
DENSE = {
    "llama": (("llama", 4, 2), torch.float32, "5GB"),
    "llama-tied-mqa-wide-heads": (("llama", 8, 1, True, 1e-6, 500_000.0), torch.bfloat16, "5GB"),
    "llama-sharded": (("llama", 4, 4, False, 1e-3, 100_000.0), torch.bfloat16, "20KB"),
    "qwen2": (("qwen2", 8, 2, False, 1e-6, 1_000_000.0), torch.float16, "5GB"),
    "qwen2-tied-sharded": (("qwen2", 4, 1, True, 1e-6, 500.0), torch.float32, "20KB"),
}

SIZES = {"vocab_size": 96, "hidden_size": 32, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 5}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LAYERS |= {"max_position_embeddings": 128}
# Of the 8 frequencies of a head of 16 at base 500, over a context of 64: one is kept, three are divided by 8 whole.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


def hybrid(pattern, chunk=8, heads=4, groups=2, state=16, conv=4, **more):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
    mamba = {"mamba_num_heads": heads, "mamba_head_dim": 8, "n_groups": groups, "ssm_state_size": state}
    mamba |= {"conv_kernel": conv, "chunk_size": chunk, "hybrid_override_pattern": pattern}
    return "NemotronH", sizes | mamba | {"max_position_embeddings": 128} | more


FAMILIES = {
    "llama": ("Llama", LAYERS | rope(10_000.0)),
    "llama3": ("Llama", LAYERS | {"head_dim": 16, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", LAYERS | rope(1e6)),
    "qwen3": ("Qwen3", LAYERS | {"head_dim": 16, "rms_norm_eps": 1e-3} | rope(1e6)),
    "qwen3-tied": ("Qwen3", LAYERS | {"head_dim": 8, "tie_word_embeddings": True} | rope(1e4)),
    "hybrid": hybrid("M-M*-M-"),
    "hybrid-one-group": hybrid("M*-", groups=1, chunk=5, layer_norm_epsilon=1e-3),
    "hybrid-groups-of-one-head": hybrid("*M-M", groups=4, state=8, chunk=16),
    "hybrid-wide-convolution": hybrid("MM*", heads=6, groups=3, conv=6, chunk=32),
    "hybrid-short-convolution": hybrid("-M*", conv=2),
}


def unclipped(model):
    """transformers 5.23 clips dt to time_step_min when it reads a prompt, but not when it decodes; NVIDIA does not."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


def family_model(kind, settings):
    """A random model in which no parameter has a value that hides a mistake (biases 0, scales 1)."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    model = unclipped(getattr(transformers, f"{kind}ForCausalLM")(settings).eval())
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(0, 0.3)
            if "norm" in name or name.endswith(".D"):
                value.add_(1)
            if name.endswith("A_log"):
                value.add_(torch.linspace(-3, 1, len(value)))
    return model
