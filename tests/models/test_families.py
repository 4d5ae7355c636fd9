"""Every family against transformers, live, on tiny random models: forward, prefill and decode, gradients.

Tolerances are absolute, 1e-4 in float32, on logits and gradients of size 1 to 10.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder, hf_read

pytestmark = pytest.mark.usefixtures("compile_fast")

V, STEPS = 96, 32
SIZES = {"vocab_size": V, "hidden_size": 32, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 5}
DENSE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
DENSE |= {"max_position_embeddings": 128}
# Of the 8 frequencies of a head of 16 at base 500, over a context of 64: one is kept, three are divided by 8 whole.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


def default_rope(theta):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def hybrid(pattern, chunk=8, heads=4, groups=2, state=16, conv=4, **more):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
    mamba = {"mamba_num_heads": heads, "mamba_head_dim": 8, "n_groups": groups, "ssm_state_size": state}
    mamba |= {"conv_kernel": conv, "chunk_size": chunk, "hybrid_override_pattern": pattern}
    return "NemotronH", sizes | mamba | {"max_position_embeddings": 128} | more


CASES = {
    "llama": ("Llama", DENSE | default_rope(10_000.0)),
    "llama3": ("Llama", DENSE | {"head_dim": 16, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", DENSE | default_rope(1e6)),
    "qwen3": ("Qwen3", DENSE | {"head_dim": 16, "rms_norm_eps": 1e-3} | default_rope(1e6)),
    "qwen3-tied": ("Qwen3", DENSE | {"head_dim": 8, "tie_word_embeddings": True} | default_rope(1e4)),
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


def reference(kind, settings):
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


def one_device():
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """The model of transformers, and our config and parameters as read from what it saved."""
    model = reference(*CASES[request.param])
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    c = hf_read.load_config(str(path))
    return model, c, hf_read.load_params(str(path), c, one_device())


TOKENS = np.random.default_rng(0).integers(0, V, (3, 80), np.int32)


def positions(tokens):
    return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


@functools.partial(jax.jit, static_argnums=0)
def forward(c, params, tokens, length=None):
    hidden, cache = decoder.apply(c, params, tokens, positions(tokens), length=length)
    return decoder.logits(c, params, hidden), cache


def test_forward(family):
    """Of one chunk, of one position less or more, and of several chunks the last of which is not whole."""
    model, c, params = family
    chunk = c.mamba.chunk_size if c.mamba else 1
    for length in (1, chunk - 1, chunk, chunk + 1, 43) if c.mamba else (43,):
        with torch.no_grad():
            expected = model(torch.tensor(TOKENS[:, :length]).long()).logits.numpy()
        np.testing.assert_allclose(forward(c, params, TOKENS[:, :length])[0], expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1


@functools.partial(jax.jit, static_argnums=0)
def decode(c, params, token, position, cache):
    hidden, cache = decoder.apply(c, params, token[:, None], position[:, None], cache)
    return decoder.logits(c, params, hidden[:, 0]), cache


def test_prefill_and_decode(family):
    """Three prompts of other lengths side by side, padded on the right, against each alone in transformers."""
    model, c, params = family
    lengths = np.array([1, 16, 23], np.int32)
    prompts = np.where(np.arange(24) < lengths[:, None], TOKENS[:, :24], 90)
    logits, rows = forward(c, params, prompts, lengths)
    cache = caches.insert(caches.empty(c, 3, 64, jnp.float32), rows, np.arange(3))
    ours = [np.asarray(logits)[np.arange(3), lengths - 1]]
    for i in range(STEPS):
        logits, cache = decode(c, params, TOKENS[np.arange(3), lengths + i], lengths + i, cache)
        ours.append(np.asarray(logits))
    for row, length in enumerate(lengths):
        past, read = None, torch.tensor(TOKENS[row : row + 1, :length]).long()
        for i in range(STEPS + 1):
            with torch.no_grad():
                out = model(read, past_key_values=past, use_cache=True)
            np.testing.assert_allclose(ours[i][row], out.logits[0, -1].numpy(), atol=1e-4, rtol=0)
            past, read = out.past_key_values, torch.tensor(TOKENS[row : row + 1, length + i : length + i + 1]).long()


def test_gradients(family, tmp_path):
    """Of a weighted mean of log-probs; transformers' gradients are saved as if they were weights, and read as those."""
    model, c, params = family
    tokens = TOKENS[:, :21]
    weight = np.random.default_rng(1).normal(size=(3, 20)).astype(np.float32)

    def loss(params):
        logp = jax.nn.log_softmax(forward(c, params, tokens)[0][:, :-1])
        return jnp.mean(weight * jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0])

    ours = jax.jit(jax.grad(loss))(params)
    logits = model(torch.tensor(tokens).long()).logits[:, :-1]
    targets = torch.tensor(tokens[:, 1:, None]).long()
    picked = torch.gather(torch.log_softmax(logits, -1), -1, targets)[..., 0]
    model.zero_grad()
    (torch.tensor(weight) * picked).mean().backward()
    saved = type(model)(model.config)
    with torch.no_grad():
        for target, source in zip(saved.parameters(), model.parameters(), strict=True):
            target.copy_(source.grad)
    saved.save_pretrained(tmp_path)
    theirs = hf_read.load_params(str(tmp_path), c, one_device())
    for path, expected in theirs.items():
        scale = np.abs(expected).max()
        assert scale > 1e-6, path
        np.testing.assert_allclose(ours[path], expected, atol=1e-4 * max(scale, 0.1), rtol=0, err_msg=path)
