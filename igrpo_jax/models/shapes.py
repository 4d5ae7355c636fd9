"""The shapes of public models, as their config.json gives them. They determine memory and speed without a download.

`aot` and the benchmarks build models of these shapes without weights. A run never uses this module: it reads the files
of config.model.path. Keys that concern only text (ids of special tokens, versions) are left out.
"""

_QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 131_072}
_QWEN3 = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 40_960}
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def dense(
    family: dict, hidden: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, tied: bool, **more
) -> dict:
    """Returns the config.json of a dense model with the keys in `family` and `more`."""
    return family | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        **more,
    }


_QWEN2_7B = dense(_QWEN2, 3584, 28, 28, 4, 18_944, 152_064, False)
_QWEN2_14B = dense(_QWEN2, 5120, 48, 40, 8, 13_824, 152_064, False, rms_norm_eps=1e-5)

# config.json by hub id.
SHAPES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": dense(_QWEN2, 1536, 28, 12, 2, 8960, 151_936, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN2_7B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _QWEN2_14B | {"rope_theta": 1_000_000.0},
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": dense(
        _LLAMA,
        *(4096, 32, 32, 8, 14_336, 128_256, False),
        rope_theta=500_000.0,
        rope_scaling=_LLAMA3,
        max_position_embeddings=131_072,
    ),
    "nvidia/OpenReasoning-Nemotron-7B": _QWEN2_7B | {"rope_theta": 1_000_000.0},
    "nvidia/OpenMath-Nemotron-7B": _QWEN2_7B | {"rope_theta": 500_000.0},
    "nvidia/OpenMath-Nemotron-14B": _QWEN2_14B | {"rope_theta": 500_000.0},
    "Qwen/Qwen2.5-0.5B-Instruct": dense(
        _QWEN2, 896, 24, 14, 2, 4864, 151_936, True, rope_theta=1_000_000.0, max_position_embeddings=32_768
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": dense(
        _QWEN2, 1536, 28, 12, 2, 8960, 151_936, True, rope_theta=1_000_000.0, max_position_embeddings=32_768
    ),
    "Qwen/Qwen2.5-Math-7B": _QWEN2_7B | {"max_position_embeddings": 4096},
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2_7B | {"rope_theta": 1_000_000.0, "max_position_embeddings": 32_768},
    "Qwen/Qwen3-8B": dense(_QWEN3, 4096, 36, 32, 8, 12_288, 151_936, False, head_dim=128),
    "HuggingFaceTB/SmolLM2-135M-Instruct": dense(_LLAMA, 576, 30, 9, 3, 1536, 49_152, True, rope_theta=100_000.0),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": dense(_LLAMA, 2048, 24, 32, 32, 8192, 49_152, True, rope_theta=130_000.0),
    "nvidia/Nemotron-H-8B-Base-8K": {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-",
        "hidden_size": 4096,
        "intermediate_size": 21_504,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attention_head_dim": 128,
        "vocab_size": 131_072,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "layer_norm_epsilon": 1e-5,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "chunk_size": 128,
    },
}
