"""Attention to pages as the sampler runs it on TPUs, compiled by their own compiler; no chip is needed."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from igrpo_jax import config
from igrpo_jax.aot import __main__ as aot
from igrpo_jax.distributed import sharding
from igrpo_jax.models import paged
from igrpo_jax.models.ragged import Paged, Ragged

pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
pytestmark = pytest.mark.usefixtures("environment")

PAGE, MIB = 64, 2**20
BATCH = sharding.RULES["batch"]


def steps(count, q, k, v, entry):
    """Returns the outputs and the pages after `count` steps of one shard, each of which writes one position further."""

    def step(_, carry):
        q, (pages, ragged) = carry
        mixed, pages = paged.paged_attention("splash", q, k, v, Paged(pages, ragged))
        return mixed, Paged(pages, ragged._replace(length=ragged.length + 1))

    q, k, v, entry = jax.tree.map(lambda x: x[0], (q, k, v, entry))
    mixed, entry = jax.lax.fori_loop(0, count, step, (q, entry))
    return mixed[None], entry.pages[None]


def compiled(topology, tensor, heads, kv_heads, size, sequences, positions, count):
    """Returns the program of `steps` on every shard, with the pool donated, and the shape of a device's pool."""
    devices = aot.topology(topology)
    mesh = sharding.make_mesh(config.MeshConfig(1, -1, tensor), devices)
    shards = sharding.batch_shards(mesh)

    def array(dtype, shape, *axes):
        put = jax.NamedSharding(mesh, sharding.spec(("batch", *axes)))
        return jax.ShapeDtypeStruct((shards, *shape), dtype, sharding=put)

    of_tokens = lambda name, count: array(jnp.bfloat16, (size, count, 128), "time", name, "head_dim")
    ints = lambda *shape: array(jnp.int32, shape)
    count_pages = 32 * positions // PAGE
    pool = (count_pages, PAGE, 2 * kv_heads, 128)
    pages = array(jnp.bfloat16, pool, None, "time", "kv_heads", "head_dim")
    ragged = Ragged(ints(sequences), ints(sequences, positions // PAGE), ints(sequences + 1), ints(1))
    run = jax.shard_map(
        functools.partial(steps, count),
        mesh=mesh,
        in_specs=PartitionSpec(BATCH),
        out_specs=PartitionSpec(BATCH),
        axis_names=set(BATCH),
        check_vma=False,
    )
    program = jax.jit(lambda q, k, v, pages, ragged: run(q, k, v, Paged(pages, ragged)), donate_argnums=3)
    k = of_tokens("kv_heads", kv_heads)
    with jax.set_mesh(mesh):
        made = program.lower(of_tokens("heads", heads), k, k, pages, ragged).compile()
    return made, (*pool[:2], pool[2] // tensor, pool[3])


def check(program, pool):
    """One kernel, no communication, and the pool neither copied nor held twice."""
    text, memory, size = program.as_text(), program.memory_analysis(), 2 * math.prod(pool)
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert not re.search(r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)[\w-]*\(", text)
    assert len(re.findall(r" scatter\(", text)) == 1
    copies = re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose|convert|gather)\(", text)
    assert copies and max(math.prod(map(int, dims.split(","))) for dims in copies) < math.prod(pool) / 8
    assert memory.alias_size_in_bytes >= size > 4 * 64 * MIB > 4 * memory.temp_size_in_bytes


@pytest.mark.slow(seconds=5)
def test_decoding():
    """Sixteen steps of 128 rows, of the heads of Qwen2-7B and up to 7,680 positions each."""
    check(*compiled("v5p:2x2x2", 1, heads=28, kv_heads=4, size=128, sequences=128, positions=7680, count=16))


@pytest.mark.slow(seconds=5)
def test_decoding_with_heads_on_two_chips():
    """Of R1-Distill-Qwen-1.5B, each of whose kv heads is on another chip, with twice the positions."""
    check(*compiled("v5e:2x2", 2, heads=12, kv_heads=2, size=128, sequences=128, positions=32768, count=16))


@pytest.mark.proof
@pytest.mark.slow(seconds=25)
def test_a_chunk_of_prompts():
    """2,048 tokens of up to eight prompts, as `test_decoding`."""
    check(*compiled("v5p:2x2x2", 1, heads=28, kv_heads=4, size=2048, sequences=8, positions=7680, count=1))
