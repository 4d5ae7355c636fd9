"""When programs are compiled: at the start, ahead in threads, or when they are called; never twice."""

import contextlib
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from igrpo_jax.distributed import compiling
from igrpo_jax.distributed.compiling import all_shapes, compile_all, compiling_ahead
from igrpo_jax.distributed.programs import Program, compilations


def make(shapes=(2, 3), gates=None):
    """The program power(n), x**n on [n] floats, and a list that gets each n when it is traced.

    Args:
        gates: by n, an event that its trace waits for.
    """
    traced = []

    def power(x):
        n = len(x)
        traced.append(n)
        if gates and n in gates:
            assert gates[n].wait(20)
        return x**n

    mesh = jax.sharding.Mesh(jax.devices()[:1], "x")
    arguments = lambda n: (jax.ShapeDtypeStruct((n,), jnp.float32),)
    program = Program("power", jax.jit(power), arguments, mesh, shapes=[(n,) for n in shapes])
    return program, traced


def phases(log):
    """A `phase` as the console has one, which writes its name and counts into `log`."""

    @contextlib.contextmanager
    def phase(name, total):
        log.append(f"{name} of {total}")
        yield log.append

    return phase


def test_each_shape_is_compiled_once():
    power, traced = make()
    reported = []
    power.compiled(2)
    compile_all(all_shapes([power]), reported.append)
    assert sorted(traced) == [2, 3] and reported == [1, 2]
    with compilations() as seen:
        compile_all(all_shapes([power]))
        assert power.compiled(3) is power.compiled(3)
        assert float(power(jnp.full(3, 2.0), shape=(3,))[0]) == 8
    assert sorted(traced) == [2, 3] and "power 3" not in seen


def test_on_one_cpu_a_program_is_compiled_when_it_is_due_and_no_other():
    """Threads compile the first dispatch's alone."""
    power, traced = make(shapes=(2, 3, 4, 5))
    log = []
    with compiling.compiling([(power, (4,))], all_shapes([power]), None, phases(log), lambda: log.append("all")):
        power(jnp.ones(3), shape=(3,))
        power(jnp.ones(4), shape=(4,))
    assert sorted(traced) == [3, 4] and not log


def test_on_one_cpu_all_are_compiled_during_a_warm_start():
    (own, _), (joint, _), log = make(shapes=(2, 3, 4)), make(shapes=(5,)), []
    wanted, until = all_shapes([own]), time.monotonic() + 30
    with compiling.compiling(
        wanted[:1], wanted, lambda: all_shapes([joint]), phases(log), lambda: log.append("all"), warms_up=True
    ):
        while not all(program.is_ready(*shape) for program, shape in [*wanted, *all_shapes([joint])]):
            assert time.monotonic() < until
            time.sleep(0.01)
    assert not log


def test_several_processes_compile_all_at_the_start_and_joint_programs_one_after_the_other(monkeypatch):
    """In the order that each process has, so that those of one compiler meet those of the others."""
    own, own_traced = make()
    joint, joint_traced = make(shapes=(7, 5, 6))
    log = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with compiling.compiling(
        [(own, (3,))], all_shapes([own]), lambda: all_shapes([joint]), phases(log), lambda: log.append("all")
    ):
        assert sorted(own_traced) == [2, 3] and joint_traced == [7, 5, 6]
        before = list(log)
    assert before == log == ["compiling the sampler of 2", 0, 1, 2, "compiling the update of None", "all"]


def test_on_an_accelerator_the_rest_is_compiled_meanwhile(monkeypatch):
    """The first dispatch's first. Nobody waits for the others, so they are not counted; `then` follows the last one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    gate, everything, at_the_end = threading.Event(), threading.Event(), []
    (power, traced), (joint, _) = make(shapes=(2, 3, 4)), make(shapes=(5, 6), gates={6: gate})
    wanted, more = all_shapes([power]), all_shapes([joint])

    def then():
        at_the_end.extend(program.is_ready(*shape) for program, shape in [*wanted, *more])
        everything.set()

    threading.Timer(0.1, gate.set).start()
    with compilations() as seen, compiling.compiling(wanted[2:], wanted, lambda: more, phases([]), then):
        assert everything.wait(30)
        assert at_the_end == [True] * 5
        assert float(power(jnp.full(4, 2.0), shape=(4,))[0]) == 16
    assert traced[0] == 4 and sorted(traced) == [2, 3, 4] and not [name for name in seen if name.startswith("power")]


def test_a_program_that_is_due_while_a_thread_compiles_it_is_waited_for():
    gate = threading.Event()
    power, traced = make(shapes=(2,), gates={2: gate})
    with compiling_ahead(all_shapes([power])):
        while not traced:
            pass
        threading.Timer(0.1, gate.set).start()
        assert float(power(jnp.full(2, 3.0), shape=(2,))[0]) == 9
    assert traced == [2]


def test_a_program_that_is_due_before_its_turn_is_compiled_by_the_caller(monkeypatch):
    """The threads hang in the trace of another one. At the end those that wait for their turn are left out."""
    gate = threading.Event()
    power, traced = make(shapes=(2, 3, 4, 5), gates={2: gate})
    done = []
    with compiling_ahead(all_shapes([power]), then=lambda: done.append(True)):
        while not traced:
            pass
        assert float(power(jnp.full(5, 2.0), shape=(5,))[0]) == 32
        assert traced == [2, 5] and power.is_ready(5) and not power.is_ready(2)
        threading.Timer(0.3, gate.set).start()
    assert power.is_ready(2) and traced.count(5) == 1 and not done


def test_an_error_of_a_thread_is_told_to_the_caller_that_needs_the_program():
    power, _ = make(shapes=(2, "x"))
    done = []
    with compiling_ahead(all_shapes([power]), then=lambda: done.append(True)):
        with pytest.raises(TypeError):
            power.compiled("x")
        assert float(power(jnp.full(2, 3.0), shape=(2,))[0]) == 9
    assert not done
