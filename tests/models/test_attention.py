"""Attention of rows to themselves against a plain one; which implementation a run takes."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import plain_attention
import pytest

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError
from igrpo_jax.models import attention, decoder
from igrpo_jax.models.segments import PrefixGroup, pack

CASES = {"one token": (2, 1, 2, 1), "groups of heads": (2, 130, 2, 3), "a head for each key": (1, 20, 3, 1)}


def inputs(rows, time, kv_heads, groups, head_dim=8, dtype="float32"):
    """q, k and v, and a weight for each output."""
    draw = np.random.default_rng(0).normal
    keys, queries = (rows, time, kv_heads, head_dim), (rows, time, kv_heads * groups, head_dim)
    return [draw(size=shape).astype(dtype) for shape in (queries, keys, keys, queries)]


def plain(q, k, v, weight):
    """Row by row and head by head in float64: the output, and gradients of its sum weighted by `weight`."""
    results = [np.zeros(x.shape) for x in (q, q, k, v)]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        own, of = (b, slice(None), n), (b, slice(None), n // (q.shape[2] // k.shape[2]))
        attended = plain_attention.attend(q[own], k[of], v[of], weight[own])
        for result, at, x in zip(results, (own, own, of, of), attended, strict=True):
            result[at] += x
    return results


def value_and_grads(q, k, v, weight):
    """What `plain` gives, of `row_attention`; as float32 on the host."""

    def loss(q, k, v):
        mixed = attention.row_attention(q, k, v)
        assert mixed.dtype == q.dtype and mixed.shape == q.shape
        return jnp.sum(mixed.astype(jnp.float32) * weight), mixed

    (_, mixed), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (mixed, *grads)]


def assert_close(results, expected, atol):
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=atol)


@pytest.mark.parametrize("case", CASES)
def test_rows_equal_the_plain_one(case):
    # Rounding alone is about 1e-5; a mask that is off by one key, or a scale left out, is off by more than 1e-2.
    arrays = inputs(*CASES[case])
    assert_close(value_and_grads(*arrays), plain(*arrays), 5e-5)


def test_rows_in_bfloat16():
    arrays = inputs(2, 40, 1, 2, dtype=jnp.bfloat16)
    for x, y in zip(value_and_grads(*arrays), plain(*arrays), strict=True):
        assert np.abs(x - y).max() <= 0.02 * np.abs(y).max()  # 8 bits: 0.004 each, over a few roundings


def on(device):
    """A mesh of one device, "gpu" or such, or "gpu CAPABILITY"."""
    platform, _, capability = device.partition(" ")
    described = SimpleNamespace(platform=platform, compute_capability=capability or "9.0")
    return SimpleNamespace(devices=np.array([[described]], object))


@pytest.mark.parametrize(
    "platform, requested, dtype, head_dim, expected",
    [
        ("tpu", "auto", "bfloat16", 128, "splash"),
        ("tpu", "auto", "float32", 12, "splash"),
        ("tpu", "chunked", "bfloat16", 128, "chunked"),
        ("gpu", "auto", "bfloat16", 64, "cudnn"),
        ("gpu 8.0", "auto", "bfloat16", 64, "cudnn"),
        ("gpu 7.5", "auto", "bfloat16", 64, "chunked"),
        ("gpu gfx942", "auto", "bfloat16", 64, "chunked"),
        ("gpu", "auto", "float32", 64, "chunked"),
        ("gpu", "auto", "bfloat16", 12, "chunked"),
        ("gpu", "auto", "bfloat16", 128, "cudnn"),
        ("gpu", "auto", "bfloat16", 256, "chunked"),
        ("gpu", "xla", "bfloat16", 64, "xla"),
        ("cpu", "auto", "bfloat16", 64, "chunked"),
        ("cpu", "xla", "float32", 64, "xla"),
    ],
)
def test_the_choice(platform, requested, dtype, head_dim, expected, caplog):
    caplog.set_level("INFO")
    assert attention.choose(requested, on(platform), dtype, head_dim) == expected
    assert f"attention: {expected}" in caplog.text
    assert expected in attention.PACKED


@pytest.mark.parametrize(
    "platform, requested, dtype, head_dim, message",
    [
        ("cpu", "splash", "float32", 64, "config.learner.attention = splash: is for TPUs, but the mesh has cpu"),
        ("gpu", "splash", "bfloat16", 64, "config.learner.attention = splash: is for TPUs"),
        ("tpu", "cudnn", "bfloat16", 64, "config.learner.attention = cudnn: is for GPUs, but the mesh has tpu devices"),
        ("gpu", "cudnn", "float32", 64, "needs config.model.dtype = bfloat16, which is float32; set it to auto"),
        ("gpu gfx942", "cudnn", "bfloat16", 64, "needs NVIDIA's GPUs, from Ampere on (compute capability 8.0); set it"),
        ("gpu", "cudnn", "bfloat16", 12, "needs a head_dim that is a multiple of 8 up to 128, the model's is 12"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(platform, requested, dtype, head_dim, message):
    with pytest.raises(InputError) as error:
        attention.choose(requested, on(platform), dtype, head_dim)
    assert message in str(error.value) and "set it to auto" in str(error.value)


@pytest.mark.parametrize("name", attention.PACKED)
def test_a_packed_sequence_that_is_too_long_is_refused(name):
    """A TPU's kernel takes 65,536 tokens, and the others any number."""
    attention.check_tokens(name, 65536, "config.learner.tokens_per_microbatch = 9")
    if not name.startswith("splash"):
        return attention.check_tokens(name, 65537, "config.learner.tokens_per_microbatch = 9")
    message = (
        "config.learner.tokens_per_microbatch = 9: needs a packed sequence of 65,537 tokens.* at most 65,536; lower"
    )
    with pytest.raises(InputError, match=message):
        attention.check_tokens(name, 65537, "config.learner.tokens_per_microbatch = 9")


def logits_and_grads(cfg, params):
    """Two packed sequences of completions that read prefixes; each sublayer is run again in the backward pass."""
    segments = pack([[PrefixGroup(70, [50, 1]), PrefixGroup(0, [9])], [PrefixGroup(20, [3, 64])]], 192)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, segments.segment.shape, np.int32)
    is_real = (segments.segment > 0)[..., None]

    def loss(params):
        hidden, _ = decoder.apply(cfg, params, tokens, segments.position, segments, remat="full")
        logits = jnp.where(is_real, decoder.logits(cfg, params, hidden), 0)
        return jnp.sum(jax.nn.log_softmax(logits)[..., 0]), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return [np.asarray(logits), *(np.asarray(grads[path]) for path in sorted(grads))]


@pytest.mark.slow
def test_the_decoder_gives_the_same_with_any(tiny):
    """And splash on a mesh, where a sublayer that is run again goes through shard_map twice."""
    cfg = dataclasses.replace(tiny[0], pattern="*")  # the rest of it has nothing to do with the choice
    params = {path: tiny[1][path] for path in decoder.shapes(cfg)}
    with pytest.raises(KeyError, match="none such"):  # so it is read at all
        logits_and_grads(dataclasses.replace(cfg, attention="none such"), params)
    expected = logits_and_grads(cfg, params)
    assert_close(logits_and_grads(dataclasses.replace(cfg, attention="chunked"), params), expected, 1e-4)
    mesh = sharding.make_mesh(config.MeshConfig(1, 2, 2), jax.devices()[:4])
    placed = {path: sharding.to_global(x, sharding.param_sharding(mesh, path)) for path, x in params.items()}
    with jax.set_mesh(mesh):
        on_mesh = logits_and_grads(dataclasses.replace(cfg, attention="splash_interpret"), placed)
    assert_close(on_mesh, expected, 1e-4)
