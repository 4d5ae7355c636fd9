"""Programs: compiled once for each shape, ahead or when called; what is compiled in a step is named; kept on disk."""

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest

from igrpo_jax.distributed.programs import (
    Program,
    compilations,
    peak_memory,
    program_bytes,
    showing_waits,
    tree_bytes,
)

FLOATS = jax.ShapeDtypeStruct((4,), jnp.float32)


def make(traced=None):
    """Programs power(n), x**n on [n] floats, and total() on [4]; `traced` collects what was traced."""
    traced = [] if traced is None else traced
    mesh = jax.sharding.Mesh(jax.devices()[:1], "x")

    def power(x):
        traced.append(("power", len(x)))
        return x ** len(x)

    def total(x):
        traced.append(("total",))
        return jnp.sum(x)

    arguments = lambda n: (jax.ShapeDtypeStruct((n,), jnp.float32),)
    return (
        Program("power", jax.jit(power), arguments, mesh, shapes=[(2,), (3,)]),
        Program("total", jax.jit(total), lambda: (FLOATS,), mesh),
    )


def test_an_operation_names_its_scopes_and_no_line_of_python():
    """With lines XLA for TPUs may compile for ever."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], "x")
    scoped = jax.named_scope("within")(lambda x: jnp.sin(x))
    text = Program("scoped", jax.jit(scoped), lambda: (FLOATS,), mesh).lower().as_text(debug_info=True)
    assert "within/sin" in text and ".py" not in text


def test_a_program_is_called_as_its_function():
    """Each shape has its own result; a shape that was not listed is compiled when it is first asked for."""
    traced = []
    power, total = make(traced)
    assert [float(power(jnp.full(n, 2.0), shape=(n,))[1]) for n in (2, 5, 2, 5)] == [4, 32, 4, 32]
    assert float(total(jnp.array([1.0, 2.0, 3.0, 4.0]))) == 10
    assert traced == [("power", 2), ("power", 5), ("total",)]


def test_the_largest_shape_is_the_last_unless_others_are_named():
    power, total = make()
    assert power.largest == [(3,)] and total.largest == [()] and power.title(3) == "power 3"


def test_what_is_compiled_meanwhile_is_named():
    power, _ = make()
    with compilations() as seen:
        power.compiled(5)
        jax.jit(jnp.cos, static_argnums=()).lower(jax.ShapeDtypeStruct((7,), jnp.float32)).compile()
    power.compiled(6)
    assert seen == ["power 5", "jit(cos)"]


def test_a_shape_of_another_program_is_an_error():
    power, total = make()
    with pytest.raises(TypeError):
        total.compiled(3)
    with pytest.raises(TypeError):
        power.compiled()


def test_bytes():
    power, total = programs = make()
    assert power.peak_bytes == total.peak_bytes == 0
    for program in programs:
        for shape in program.shapes:
            program.compile(*shape)
    assert power.peak_bytes == program_bytes(power.compiled(3)) >= 24
    assert total.peak_bytes >= 16
    assert tree_bytes({"a": jnp.zeros((3, 2)), "b": jnp.zeros((), jnp.bfloat16)}) == 26


def test_many_threads_that_ask_at_once_compile_once():
    """All get the same program. Without the lock of `compile` the slow trace below is made by each of them."""
    traced, threads = [], 8
    barrier = threading.Barrier(threads)
    mesh = jax.sharding.Mesh(jax.devices()[:1], "x")

    def slow(x):
        traced.append(x)
        time.sleep(0.2)
        return x + 1

    program = Program("slow", jax.jit(slow), lambda: (FLOATS,), mesh)

    def ask(_):
        barrier.wait()
        return program.compiled()

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(ask, range(threads)))
    assert len(traced) == 1 and all(result is results[0] for result in results)


def test_an_error_of_compiling_reaches_who_asks_and_the_next_one_tries_again():
    broken = [True]
    mesh = jax.sharding.Mesh(jax.devices()[:1], "x")

    def arguments():
        if broken:
            raise MemoryError("no room")
        return (FLOATS,)

    program = Program("fragile", jax.jit(jnp.cos), arguments, mesh)
    with pytest.raises(MemoryError, match="no room"):
        program.compiled()
    assert not program.is_ready() and program.peak_bytes == 0
    broken.clear()
    assert float(program(jnp.zeros(4))[0]) == 1 and program.is_ready()


def test_a_wait_for_a_program_is_shown_by_its_title():
    """Once for each shape, and not for what is compiled already."""
    power, total = make()
    shown = []

    @contextlib.contextmanager
    def show(title):
        shown.append(title)
        yield
        shown.append("done")

    total.compile()
    with showing_waits(show):
        power(jnp.ones(2), shape=(2,))
        power(jnp.ones(2), shape=(2,))
        total(jnp.ones(4))
    power(jnp.ones(3), shape=(3,))
    assert shown == ["power 2", "done"]


CODE = """
import sys, jax, jax.numpy as jnp
from igrpo_jax.distributed.disk_cache import use_disk_cache
use_disk_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
jax.jit(lambda x: jnp.sin(x) @ x).lower(jax.ShapeDtypeStruct((9, 9), jnp.float32)).compile()
print(sum(hits))
"""


@pytest.mark.slow
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


def test_peak_memory_is_that_of_the_fullest_device_and_of_this_process(monkeypatch):
    def device(**stats):
        return types.SimpleNamespace(memory_stats=lambda: stats or None)

    assert set(peak_memory()) == {"perf/peak_host_memory"}  # a CPU counts none
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("VmHWM")]
    assert peak_memory()["perf/peak_host_memory"] == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)
    devices = [device(peak_bytes_in_use=2**30), device(peak_bytes_in_use=3 * 2**30), device()]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory()["perf/peak_device_memory"] == 3
