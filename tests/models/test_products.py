"""Output-major weights: products equal those of weights as they are trained, and nothing is turned round."""

import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from tiny_models import one_device, random_params, tiny_config

from igrpo_jax.config import MeshConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.models import products
from igrpo_jax.models.layers import MLP
from igrpo_jax.models.products import OutputMajor
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
    stored = products.output_major(path, weight)
    assert stored.stored.shape == products.output_major_shape(path, shape)
    results = [products.product(subscripts, x, nnx.Param(value)) for value in (weight, stored)]
    assert results[0].shape == results[1].shape
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(results[0], np.einsum(subscripts, x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends choose the order of factors themselves")
@pytest.mark.parametrize("path", CASES)
def test_the_weight_of_a_product_of_few_rows_is_the_left_factor_and_is_not_copied(path):
    subscripts, inputs, shape = CASES[path]
    run = lambda x, weight: products.product(subscripts, x, nnx.Param(OutputMajor(weight)))
    weight = jnp.asarray(random(products.output_major_shape(path, shape)))
    text = jax.jit(run).lower(random((3, 1, *inputs)), weight).compile().as_text()
    rows, size = 3, int(np.prod(inputs))
    outputs = weight.size // size
    assert re.search(rf"f32\[{outputs},{rows}\]\S* (dot|fusion|custom-call)\(", text), text
    copies = [line for line in text.splitlines() if re.search(rf"= f32\[({size},{outputs}|{outputs},{size})\]", line)]
    assert all(re.search(r" (bitcast|parameter)\(", line) for line in copies), copies


def test_what_is_no_weight_of_a_sublayer_stays_as_it_is():
    for path in ("embedding", "lm_head", "norm/scale", "blocks/0/mixer/q_bias", "blocks/0/mixer/x_conv"):
        x = object()
        assert products.output_major(path, x) is x and products.output_major_shape(path, (3, 4)) == (3, 4)


def test_axes_of_the_mesh_go_with_the_axes_of_a_weight():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    plain, turned = [], []
    for path in (Q_PROJ, O_PROJ):
        where = sharding.param_sharding(mesh, path, gathered=True)
        plain.append(where.spec)
        turned.append(products.output_major_sharding(path, where).stored.spec)
    assert plain == [PartitionSpec(None, "tensor", None), PartitionSpec("tensor", None, None)]
    assert turned == [PartitionSpec("tensor", None, None), PartitionSpec(None, "tensor", None)]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="weights are output-major on CPUs alone")
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


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other compilers choose what they copy themselves")
def test_gradients_of_an_mlp_make_no_transposed_copy_of_its_wide_activations():
    """Such a copy [F, T] would be computed element by element together with the derivative of silu."""
    cfg = tiny_config(hidden_size=16, intermediate_size=56)
    graph, state = nnx.split(nnx.eval_shape(lambda: MLP(cfg, nnx.Rngs(0))))
    weights = {path[0]: random(leaf.get_value().shape, i) for i, (path, leaf) in enumerate(nnx.to_flat_state(state))}

    def loss(weights, x):
        values = nnx.map_state(lambda path, leaf: leaf.replace(weights[path[0]]), state)
        return jnp.sum(nnx.merge(graph, values)(x, None, None)[0] ** 2)

    x = random((1, 40, 16))
    text = jax.jit(jax.grad(loss, (0, 1))).lower(weights, x).compile().as_text()
    assert "f32[40,56]" in text and "f32[56,40]" not in text
    numeric = jax.test_util.check_grads
    numeric(lambda w: loss(weights | {"down_proj": w}, x), (weights["down_proj"],), 1, modes=["rev"], rtol=0.05)
    numeric(lambda w: loss(weights | {"up_proj": w}, x), (weights["up_proj"],), 1, modes=["rev"], rtol=0.05)
