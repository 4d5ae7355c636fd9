"""The attention of a packed sequence of real size, compiled for TPUs by their own compiler; no chip is needed."""

import jax
import jax.numpy as jnp
import pytest

from igrpo_jax import config
from igrpo_jax.aot import __main__ as aot
from igrpo_jax.distributed import sharding
from igrpo_jax.models.segments import BLOCK, KV_AXES, Segments
from igrpo_jax.models.splash import packed_splash_attention

pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.proof
@pytest.mark.slow(seconds=30)
def test_attention_of_a_packed_sequence_compiles():
    """Of the heads of Qwen2-7B, with short and with full loops, in memory that grows with the tokens alone."""
    size, heads, kv_heads, head_dim = 16384, 28, 4, 128
    devices = aot.topology("v5p:2x2x2")
    mesh = sharding.make_mesh(config.MeshConfig(1, len(devices), 1), devices)

    def array(shape, dtype, *axes):
        put = jax.NamedSharding(mesh, sharding.spec(axes))
        return jax.ShapeDtypeStruct((len(devices), *shape), dtype, sharding=put)

    q = array((size, heads, head_dim), jnp.bfloat16, "batch", "time", "heads", "head_dim")
    k = array((kv_heads, size, head_dim), jnp.bfloat16, *KV_AXES)
    of_tokens = array((size,), jnp.int32, "batch", "time")
    blocks = array((size // BLOCK, size // BLOCK), jnp.bool_, "batch", None, None)
    segments = Segments(of_tokens, of_tokens, of_tokens, blocks, None)
    loss = lambda q, k, v, segments: packed_splash_attention(q, k, v, segments).astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, k, k, segments).compile()
    calls = [line for line in program.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert len(calls) == 6  # forward, and the gradients of queries and of keys, twice
    # Of queries alone there are 112 MiB; the scores of all heads would be 14 GiB.
    assert program.memory_analysis().temp_size_in_bytes < 10 * 2 * size * heads * head_dim
