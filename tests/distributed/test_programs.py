"""Programs by key: compiled once, ahead or when asked for; what is compiled in a step is named; kept on disk."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from igrpo_jax.distributed.programs import Programs, compilations, program_bytes, tree_bytes


def make(lowered=None):
    """Programs ("power", n) and ("sum",) on [4] floats; `lowered` collects the keys that were traced."""

    def lower(key):
        if lowered is not None:
            lowered.append(key)
        work = {"power": lambda x: x ** key[1], "sum": jnp.sum}[key[0]]
        return jax.jit(work).lower(jax.ShapeDtypeStruct((4,), jnp.float32))

    return Programs(lower)


def test_each_is_compiled_once():
    lowered, reported = [], []
    programs = make(lowered)
    programs["power", 2]
    keys = [("power", 2), ("power", 3), ("sum",)]
    programs.compile(keys, reported.append)
    assert sorted(lowered) == sorted(keys) and reported == [1, 2, 3]
    with compilations() as seen:
        programs.compile(keys)
        assert float(programs["power", 3](jnp.full(4, 2.0))[0]) == 8
    assert lowered.count(("power", 3)) == 1 and "power 3" not in seen


def test_what_is_compiled_meanwhile_is_named():
    programs = make()
    with compilations() as seen:
        programs["power", 5]
        jax.jit(jnp.cos, static_argnums=()).lower(jax.ShapeDtypeStruct((7,), jnp.float32)).compile()
    programs["power", 6]
    assert seen == ["power 5", "jit(cos)"]


def test_an_unknown_kind_is_an_error():
    with pytest.raises(KeyError):
        make()[("cube",)]


def test_bytes():
    programs = make()
    programs.compile([("power", 2), ("sum",)])
    assert programs.peak_bytes({"power"}) == program_bytes(programs["power", 2]) >= 32
    assert programs.peak_bytes({"sum"}) >= 16 and programs.peak_bytes({"other"}) == 0
    assert tree_bytes({"a": jnp.zeros((3, 2)), "b": jnp.zeros((), jnp.bfloat16)}) == 26


CODE = """
import sys, jax, jax.numpy as jnp
from igrpo_jax.distributed.programs import use_disk_cache
use_disk_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
jax.jit(lambda x: jnp.sin(x) @ x).lower(jax.ShapeDtypeStruct((9, 9), jnp.float32)).compile()
print(sum(hits))
"""


def test_programs_are_kept_on_disk(tmp_path):
    """Between processes; nowhere for an empty name; where the environment names a folder, that one."""

    def hits(folder, **environment):
        env = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | environment
        done = subprocess.run([sys.executable, "-c", CODE, folder], env=env, capture_output=True, text=True, check=True)
        return int(done.stdout)

    mine, other = tmp_path / "mine", tmp_path / "other"
    assert hits(str(mine)) == 0 and any(mine.iterdir())
    assert hits(str(mine)) == 1
    assert hits("") == 0
    assert hits(str(mine), JAX_COMPILATION_CACHE_DIR=str(other)) == 0 and any(other.iterdir())
