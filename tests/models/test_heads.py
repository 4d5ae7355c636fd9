"""Copied and dealt heads give the model's own result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from igrpo_jax.models import decoder, heads
from igrpo_jax.models.config import from_hf
from igrpo_jax.models.shapes import SHAPES

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(12, dtype=np.int32), TOKENS.shape)


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params):
    return decoder.logits(cfg, params, decoder.apply(cfg, params, TOKENS, POSITIONS)[0])


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "tensor", "expected"),
    [
        (6, 2, 4, (8, 4)),
        (6, 2, 8, (8, 8)),
        (12, 4, 8, (16, 8)),
        (7, 1, 2, (8, 2)),
        (9, 3, 2, (12, 6)),
        (4, 2, 2, (4, 2)),
    ],
)
def test_the_result_is_that_of_the_model(query_heads, kv_heads, tensor, expected):
    cfg = tiny_models.tiny_config(num_heads=query_heads, num_kv_heads=kv_heads, qk_norm=kv_heads == 4)
    params = {path: jnp.asarray(x) for path, x in tiny_models.random_params(cfg).items()}
    more = heads.spread_config(cfg, tensor)
    assert (more.num_heads, more.num_kv_heads) == expected
    spread = {path: heads.spread(cfg, tensor, path, x) for path, x in params.items()}
    assert {path: x.shape for path, x in spread.items()} == decoder.shapes(more)
    np.testing.assert_allclose(logits(more, spread), logits(cfg, params), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("tensor", "changes", "parts"),
    [
        (8, {}, 4),
        (4, {}, 2),
        (2, {}, 1),  # no head is copied
        (8, {"num_kv_heads": 4, "num_heads": 8}, 2),
        (4, {"num_kv_heads": 6, "num_heads": 6}, 1),  # a device has copies of two heads
        (8, {"head_dim": 64}, 1),  # the kernel reads heads of 128
        (8, {"attention": "xla"}, 1),
        (8, {"attention": "cudnn"}, 1),
    ],
)
def test_copies_of_a_head_split_sequences_where_the_kernel_of_tpus_reads_pages(tensor, changes, parts):
    cfg = tiny_models.tiny_config(**{"num_kv_heads": 2, "head_dim": 128, "attention": "splash"} | changes)
    assert heads.spread_config(cfg, tensor).row_parts == parts
    hybrid = dataclasses.replace(tiny_models.hybrid_config(), head_dim=128, attention="splash")
    assert heads.spread_config(hybrid, 8).row_parts == 1


def test_mamba_keeps_its_heads():
    """Its output projection has the name of that of attention."""
    cfg = dataclasses.replace(tiny_models.hybrid_config(), num_heads=6)
    params = tiny_models.random_params(cfg)
    spread = {path: heads.spread(cfg, 4, path, x) for path, x in params.items()}
    assert spread["blocks/0/mixer/o_proj"] is params["blocks/0/mixer/o_proj"]
    assert {path: x.shape for path, x in spread.items()} == decoder.shapes(heads.spread_config(cfg, 4))


@pytest.mark.parametrize("name", SHAPES)
def test_public_models_can_be_split_in_8(name):
    cfg = from_hf(SHAPES[name], name)
    for tensor in (2, 4, 8):
        more = heads.spread_config(cfg, tensor)
        assert more.num_kv_heads % tensor == 0 and more.num_heads % more.num_kv_heads == 0
        assert more.num_heads >= cfg.num_heads and (more.num_kv_heads == cfg.num_kv_heads) == (
            cfg.num_kv_heads % tensor == 0
        )
