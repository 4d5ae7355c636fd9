"""Every family against transformers, live, on tiny random models: forward, prefill and decode, gradients.

Tolerances are absolute, 1e-4 in float32, on logits and gradients of size 1 to 10.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import FAMILIES, LAYERS, family_model, rope, torch
from tiny_models import one_device

from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder, hf_files, hf_read, windows
from igrpo_jax.models.lane_scan import Lanes
from igrpo_jax.models.paged import page_layout
from igrpo_jax.models.ragged import Paged, Ragged

STEPS = 32


MORE = {"llama", "qwen3", "hybrid-one-group", "hybrid-wide-convolution", "hybrid-short-convolution"}
PARAMS = [pytest.param(name, marks=pytest.mark.proof if name in MORE else ()) for name in FAMILIES]


@pytest.fixture(scope="module", params=PARAMS)
def family(request, tmp_path_factory):
    """The model of transformers, and our config and parameters as read from what it saved."""
    model = family_model(*FAMILIES[request.param])
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    cfg = hf_files.load_config(str(path))
    return model, cfg, hf_read.load_params(str(path), cfg, one_device())


TOKENS = np.random.default_rng(0).integers(0, 96, (3, 80), np.int32)


def positions(tokens):
    return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, tokens):
    return decoder.logits(cfg, params, decoder.apply(cfg, params, tokens, positions(tokens))[0])


@pytest.mark.slow
def test_forward(family):
    """Of one chunk, of one position less or more, and of several chunks the last of which is not whole."""
    model, cfg, params = family
    chunk = cfg.mamba.chunk_size if cfg.mamba else 1
    for length in (1, chunk - 1, chunk, chunk + 1, 43) if cfg.mamba else (43,):
        with torch.no_grad():
            expected = model(torch.tensor(TOKENS[:, :length]).long()).logits.numpy()
        np.testing.assert_allclose(forward(cfg, params, TOKENS[:, :length]), expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1


@functools.partial(jax.jit, static_argnums=0)
def prefill(cfg, params, lengths):
    """Reads prompts of these lengths, one after another in a packed sequence of 64 tokens, into pages and lanes.

    Returns the logits after each, the pages of each, and the cache.
    """
    count, start = len(lengths), jnp.append(0, jnp.cumsum(lengths))
    sequence = jnp.minimum(jnp.searchsorted(start, jnp.arange(64), side="right") - 1, count - 1)
    position = jnp.arange(64) - start[sequence]
    table = jnp.arange(4 * count)[::-1].reshape(count, 4)
    ragged = Ragged(lengths, table, start, jnp.array([count]))
    pools, lanes = caches.empty(cfg, 4 * count, 16, 0, jnp.float32), caches.empty_lanes(cfg, count, jnp.float32)
    entries = tuple(
        Lanes(states, jnp.arange(count), ragged) if kind == "M" else Paged(pool, ragged) if kind == "*" else None
        for kind, pool, states in zip(cfg.pattern, pools, lanes, strict=True)
    )
    tokens = jnp.where(jnp.arange(64) < start[-1], jnp.asarray(TOKENS)[sequence, position], 90)
    hidden, cache = decoder.apply(cfg, params, tokens[None], position[None], entries)
    return decoder.logits(cfg, params, hidden[0, start[1:] - 1]), table, cache


@functools.partial(jax.jit, static_argnums=0)
def decode(cfg, params, token, position, cache):
    hidden, cache = decoder.apply(cfg, params, token[:, None], position[:, None], cache)
    return decoder.logits(cfg, params, hidden[:, 0]), cache


@pytest.mark.slow
def test_prefill_and_decode(family):
    """Three prompts of other lengths packed, and then side by side, against each alone in transformers."""
    model, cfg, params = family
    lengths = np.array([1, 16, 23], np.int32)
    logits, table, cache = prefill(cfg, params, lengths)
    ours, seen, cache = [logits], windows.of_pages(cache, table), windows.new_token_buffers(cache, 3, STEPS)
    for i in range(STEPS):
        entries = windows.entries(seen, cache, lengths, lengths > 0, i)
        logits, cache = decode(cfg, params, TOKENS[np.arange(3), lengths + i], lengths + i, entries)
        ours.append(logits)
    assert_decoded(model, lengths, ours)


def assert_decoded(model, lengths, ours):
    """Compares logits, first those after each prompt and then those after each further token, with transformers'."""
    for row, length in enumerate(lengths):
        past, read = None, torch.tensor(TOKENS[row : row + 1, :length]).long()
        for i, logits in enumerate(ours):
            with torch.no_grad():
                out = model(read, past_key_values=past, use_cache=True)
            np.testing.assert_allclose(logits[row], out.logits[0, -1].numpy(), atol=1e-4, rtol=0)
            past, read = out.past_key_values, torch.tensor(TOKENS[row : row + 1, length + i : length + i + 1]).long()


@pytest.mark.proof
@pytest.mark.slow
def test_decode_from_pages_in_place(tmp_path):
    """With heads that suit the TPU's kernel, which is emulated: some tokens, up to the next page of one prompt."""
    model = family_model("Qwen3", LAYERS | {"head_dim": 128} | rope(1e6))
    model.save_pretrained(tmp_path)
    cfg = dataclasses.replace(hf_files.load_config(str(tmp_path)), attention="splash_interpret")
    assert page_layout(cfg.attention, cfg.head_dim, cfg.num_kv_heads)
    params = hf_read.load_params(str(tmp_path), cfg, one_device())
    lengths = np.array([1, 15, 23], np.int32)
    logits, table, cache = prefill(cfg, params, lengths)
    ours = [logits]
    for i in range(3):
        ragged = Ragged(lengths + i + 1, table, np.arange(4, dtype=np.int32), np.array([3], np.int32))
        entries = tuple(None if pool is None else Paged(pool, ragged) for pool in cache)
        logits, cache = decode(cfg, params, TOKENS[np.arange(3), lengths + i], lengths + i, entries)
        ours.append(logits)
    assert_decoded(model, lengths, ours)


@pytest.mark.slow
def test_gradients(family, tmp_path):
    """Of a weighted mean of log-probs; transformers' gradients are saved as if they were weights, and read as those."""
    model, cfg, params = family
    tokens = TOKENS[:, :21]
    weight = np.random.default_rng(1).normal(size=(3, 20)).astype(np.float32)

    def loss(params):
        logp = jax.nn.log_softmax(forward(cfg, params, tokens)[:, :-1])
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
    theirs = hf_read.load_params(str(tmp_path), cfg, one_device())
    for path, expected in theirs.items():
        scale = np.abs(expected).max()
        assert scale > 1e-6, path
        np.testing.assert_allclose(ours[path], expected, atol=1e-4 * max(scale, 0.1), rtol=0, err_msg=path)
