"""cuDNN's kernels as JAX binds them: what it takes and gives in the installed version. They run on a GPU alone."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny_models

from igrpo_jax.models import cudnn, spans
from igrpo_jax.models.segments import Ranges

F, N, K, H, M = 256, 6, 2, 64, 8


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


Q, KEYS = array(1, F, N, H), array(1, F, K, H)
RANGES = Ranges(array(1, M + 1, dtype=jnp.int32), array(1, M, dtype=jnp.int32))
STATS = array(M, N, F, dtype=jnp.float32)
MASKS = [cudnn.MaskType.PADDING, cudnn.MaskType.PADDING_CAUSAL]


def test_pages():
    """More pages than the tables name, and tables that together are longer than the pages."""
    for pages, of_row in ((100, 3), (10, 40)):
        table = array(5, of_row, dtype=jnp.int32)
        out = jax.eval_shape(
            cudnn.read_pages, array(5, N, H), array(pages, 16, K, H), table, table, array(5, dtype=jnp.int32)
        )
        assert out.shape == (5, N, H) and out.dtype == jnp.bfloat16


@pytest.mark.parametrize(("capability", "takes"), [("8.0", False), ("8.9", False), ("9.0", True), ("10.3", True)])
def test_from_hopper_on(capability, takes, monkeypatch):
    cfg, amd = dataclasses.replace(tiny_models.tiny_config(), attention="cudnn"), SimpleNamespace()
    amd.compute_capability = "gfx942"
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert spans.width(cfg, 2) == (cfg.num_heads * cfg.head_dim // 2 if takes else None)
    assert spans.width(dataclasses.replace(cfg, attention="chunked"), 2) is None
    assert not cudnn.takes_ranges(SimpleNamespace()) and not cudnn.takes_ranges(amd)


@pytest.mark.parametrize("mask", MASKS)
def test_ranges(mask):
    out, stats = jax.eval_shape(lambda *x: cudnn.read_ranges(*x, mask), Q, KEYS, KEYS, RANGES, RANGES)
    assert (out.shape, out.dtype) == (Q.shape, Q.dtype) and (stats.shape, stats.dtype) == (STATS.shape, STATS.dtype)
    gradients = jax.eval_shape(
        lambda q, k, v, queries, keys, *x: cudnn.read_ranges_gradient(q, k, v, queries, keys, mask, *x),
        *(Q, KEYS, KEYS, RANGES, RANGES, STATS, Q, Q),
    )
    assert [x.shape for x in gradients] == [Q.shape, KEYS.shape, KEYS.shape]
