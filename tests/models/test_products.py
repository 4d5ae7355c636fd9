"""Weights that lie by outputs: products equal those of weights as they are trained, and nothing is turned round."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from tiny_models import one_device, random_params, tiny_config

from igrpo_jax.config import MeshConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.models import products
from igrpo_jax.models.products import ByOutputs
from igrpo_jax.sampling.weights import WeightSync

Q_PROJ, O_PROJ = "blocks/0/mixer/q_proj", "blocks/0/mixer/o_proj"
# The product of each path, and the shapes of what it multiplies for 16 model dimensions and 4 heads of 8.
CASES = {
    Q_PROJ: ("BTD,DNH->BTNH", (16,), (16, 4, 8)),
    O_PROJ: ("BTNH,NHD->BTD", (4, 8), (4, 8, 16)),
    "blocks/1/mixer/up_proj": ("BTD,DF->BTF", (16,), (16, 24)),
}


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rows", [(1, 1), (2, products.FEW_ROWS // 2), (products.FEW_ROWS + 1, 1)])
@pytest.mark.parametrize("path", CASES)
def test_a_product_equals_that_of_the_weight_as_it_is_trained(path, rows):
    subscripts, inputs, shape = CASES[path]
    x, weight = random((*rows, *inputs)), jnp.asarray(random(shape, 1))
    stored = products.by_outputs(path, weight)
    assert stored.stored.shape == products.shape_by_outputs(path, shape)
    results = [products.product(subscripts, x, nnx.Param(value)) for value in (weight, stored)]
    assert results[0].shape == results[1].shape
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(results[0], np.einsum(subscripts, x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends choose the order of factors themselves")
@pytest.mark.parametrize("path", CASES)
def test_the_weight_of_a_product_of_few_rows_is_the_left_factor_and_is_not_copied(path):
    subscripts, inputs, shape = CASES[path]
    run = lambda x, weight: products.product(subscripts, x, nnx.Param(ByOutputs(weight)))
    weight = jnp.asarray(random(products.shape_by_outputs(path, shape)))
    text = jax.jit(run).lower(random((3, 1, *inputs)), weight).compile().as_text()
    rows, size = 3, int(np.prod(inputs))
    outputs = weight.size // size
    assert re.search(rf"f32\[{outputs},{rows}\]\S* (dot|fusion|custom-call)\(", text), text
    copies = [line for line in text.splitlines() if re.search(rf"= f32\[({size},{outputs}|{outputs},{size})\]", line)]
    assert all(re.search(r" (bitcast|parameter)\(", line) for line in copies), copies


def test_what_is_no_weight_of_a_sublayer_stays_as_it_is():
    for path in ("embedding", "lm_head", "norm/scale", "blocks/0/mixer/q_bias", "blocks/0/mixer/x_conv"):
        x = object()
        assert products.by_outputs(path, x) is x and products.shape_by_outputs(path, (3, 4)) == (3, 4)


def test_axes_of_the_mesh_go_with_the_axes_of_a_weight():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    plain, turned = [], []
    for path in (Q_PROJ, O_PROJ):
        where = sharding.param_sharding(mesh, path, gathered=True)
        plain.append(where.spec)
        turned.append(products.sharding_by_outputs(path, where).stored.spec)
    assert plain == [PartitionSpec(None, "tensor", None), PartitionSpec("tensor", None, None)]
    assert turned == [PartitionSpec("tensor", None, None), PartitionSpec(None, "tensor", None)]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="weights lie by outputs on CPUs alone")
def test_weights_are_turned_once_and_all_others_are_those_of_the_training():
    cfg, mesh = tiny_config(), one_device()
    params = {path: jax.device_put(x, sharding.param_sharding(mesh, path)) for path, x in random_params(cfg).items()}
    sync = WeightSync(cfg, mesh, mesh, "float32")
    synced = sync(params)
    for path, x in params.items():
        if sharding.is_linear(path):
            cut = sharding.input_axes(path)
            axes = [*range(cut, x.ndim), *range(cut)]
            np.testing.assert_array_equal(synced[path].stored, np.asarray(x).transpose(axes), err_msg=path)
        elif path in ("embedding", "lm_head"):
            assert synced[path] is x
    again = sync(synced)
    assert all(again[path] is x for path, x in synced.items())
