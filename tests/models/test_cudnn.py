"""cuDNN's kernels as JAX binds them: what it takes and gives in the installed version. They run on a GPU alone."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
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


@pytest.fixture
def bound(monkeypatch):
    """What the kernels are called with: the arguments of each call, and its settings."""
    calls = []

    def bind(*arguments, **settings):
        calls.append(([*map(np.asarray, arguments)], settings))
        return [jnp.asarray(arguments[0])] * (2 if "is_training" in settings else 3)

    for name in ("fwd", "bwd"):
        kernel = f"_dot_product_attention_{name}_p_wrapper"
        monkeypatch.setattr(cudnn.kernels, kernel, SimpleNamespace(bind=bind))
    return calls


def numbers(like, first):
    """An array of a shape and dtype with a number for each entry, counted from `first`."""
    return (first + np.arange(np.prod(like.shape))).reshape(like.shape).astype(like.dtype)


def check_settings(settings, mask):
    assert settings["scale"] == H**-0.5 and settings["mask_type"] == mask and settings["dropout_rate"] == 0
    assert settings["layout"] == cudnn.kernels.AttentionLayout.BTNH.value
    assert settings["sliding_window_length"] is None and not any(settings["variadic_args"])


def test_what_the_kernel_for_pages_gets(bound):
    """One query of each row, and as many keys as the row has positions."""
    q, pages = numbers(array(5, N, H), 0), numbers(array(9, 16, K, H), 0)
    k_table, v_table = (numbers(array(5, 3, dtype=jnp.int32), first) for first in (100, 200))
    length = np.arange(1, 6, dtype=np.int32)
    cudnn.read_pages(q, pages, k_table, v_table, length)
    ((arguments, settings),) = bound
    none = np.zeros(0)
    wide = [table[:, None, :, None] for table in (k_table, v_table)]
    expected = [q[:, None], pages, pages, none, np.ones(5), length, none, none, *wide]
    for one, other in zip(arguments, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    check_settings(settings, cudnn.MaskType.PADDING)
    assert not settings["is_training"]


@pytest.mark.parametrize("mask", MASKS)
def test_what_the_kernels_for_ranges_get(bound, mask):
    """Lengths and then starts, of queries and then of keys; the gradient also gets the statistics that it is given."""
    q, k, v = (numbers(like, first) for first, like in enumerate((Q, KEYS, KEYS)))
    queries, keys = (Ranges(*(numbers(x, first) for x in RANGES)) for first in (0, 50))
    stats, out, gradient = (numbers(like, first) for first, like in enumerate((STATS, Q, Q), 3))
    cudnn.read_ranges(q, k, v, queries, keys, mask)
    cudnn.read_ranges_gradient(q, k, v, queries, keys, mask, stats, out, gradient)
    none, ranges = np.zeros(0), (queries.length, keys.length, queries.start, keys.start)
    expected = [[q, k, v, none, *ranges, none, none], [q, k, v, none, *ranges, none, none, stats, out, gradient]]
    for (arguments, settings), given in zip(bound, expected, strict=True):
        for one, other in zip(arguments, given, strict=True):
            np.testing.assert_array_equal(one, other)
        check_settings(settings, mask)
    assert bound[0][1]["is_training"]
