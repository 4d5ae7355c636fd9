"""Checkpoints come back bit for bit, on any mesh; a killed save is no checkpoint; a folder belongs to one run."""

import contextlib
import errno
import gc
import os
import shutil
import signal
import threading
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import run_config
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint._src.checkpointers import async_checkpointer

from igrpo_jax import config as config_lib
from igrpo_jax.errors import InputError, RunError
from igrpo_jax.models.policy import open_policy
from igrpo_jax.outputs import checkpoint, checkpoint_reading, checksums, weights


class State(NamedTuple):
    params: dict[str, jax.Array]
    opt_state: Any
    step: jax.Array


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.1, 0.0, 10)))
SPECS = {"embed": PartitionSpec("tensor", "fsdp"), "blocks.0.q": PartitionSpec("fsdp", "tensor")}


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def shardings(mesh):
    """Moments lie like their parameter, everything else is replicated."""

    def of(path, leaf):
        name = next((key.key for key in path if isinstance(key, jax.tree_util.DictKey)), None)
        return NamedSharding(mesh, SPECS.get(name, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(of, jax.eval_shape(initial))


def initial():
    keys = jax.random.split(jax.random.key(1), 2)
    params = {"embed": jax.random.normal(keys[0], (16, 8)), "blocks.0.q": jax.random.normal(keys[1], (8, 4))}
    params["norm"] = jnp.ones(8)
    return State(params, OPTIMIZER.init(params), jnp.int32(0))


def updated(state):
    gradients = jax.tree.map(lambda p: jnp.sin(p * 3 + state.step), state.params)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1)


def state_on(mesh, steps=2):
    state = jax.jit(initial, out_shardings=shardings(mesh))()
    for _ in range(steps):
        state = jax.jit(updated, out_shardings=shardings(mesh))(state)
    return state


def abstract_on(mesh):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(initial),
        shardings(mesh),
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A checkpoint that can't be read is read again without a pause."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)


@pytest.fixture(scope="module", autouse=True)
def optimised():
    """Optimised machine code: without it the last bits of an update depend on the shapes that a mesh gives a device."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")


def test_rows_are_brought_to_safety_where_a_checkpoint_counts_on_them(tmp_path):
    """Before a save that is due, and at no other step: in a bucket that would upload all rows with each step."""
    store, events = checkpoint.Checkpointer(tmp_path, config_lib.CheckpointConfig(every=2)), []
    saved = {"x": jax.device_put(jnp.zeros(2), NamedSharding(mesh_of(1, 1, 1), PartitionSpec()))}
    with store:
        for step in (1, 2, 3, 4, 4):
            before = lambda step=step: events.append((step, store.latest_step()))
            store.save(step, saved, {}, force=step == 3, before=before)
    assert events == [(2, None), (3, 2), (4, 3)]


needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
EVERY_STEP = config_lib.CheckpointConfig(every=1, keep=2)


@pytest.mark.slow
@needs_8
def test_state_and_meta_come_back_bit_for_bit_on_any_mesh(tmp_path):
    mesh, meta = mesh_of(2, 2, 2), {"seed": 7, "data": {"epoch": 1, "index": 96}, "rows": 12}
    state = state_on(mesh)
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.save(2, state, meta)
    for other in (mesh, mesh_of(1, 8, 1), mesh_of(4, 1, 2)):
        with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
            assert checkpointer.latest_step() == 2
            step, restored, restored_meta = checkpointer.restore(abstract_on(other))
        assert step == 2 and isinstance(restored, State) and restored_meta == meta
        assert_same_bits(restored, state)
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings(other)
    # And it goes on from there as if nothing had happened.
    assert_same_bits(state_on(mesh, 3), jax.jit(updated, out_shardings=shardings(other))(restored))


@pytest.mark.slow
@needs_8
def test_a_save_holds_the_state_of_its_call_though_the_arrays_are_donated(tmp_path):
    mesh = mesh_of(2, 2, 2)
    state, expected = state_on(mesh), state_on(mesh)
    step = jax.jit(updated, out_shardings=shardings(mesh), donate_argnums=0)
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        checkpointer.save(2, state, {})
        for _ in range(3):
            state = step(state)
        _, restored, _ = checkpointer.restore(abstract_on(mesh))
    assert_same_bits(restored, expected)


@pytest.mark.slow
def test_cadence_force_and_the_newest_k(tmp_path):
    mesh = mesh_of(1, jax.device_count(), 1)
    state = state_on(mesh, 0)
    with checkpoint.Checkpointer(tmp_path, config_lib.CheckpointConfig(every=2, keep=2)) as checkpointer:
        assert [checkpointer.save(step, state, {"step": step}) for step in range(1, 7)] == [False, True] * 3
        assert checkpointer.save(7, state, {"step": 7}, force=True)
        assert not checkpointer.save(7, state, {"step": 70}, force=True)  # the last step is also a forced one
        checkpointer.wait()
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "7"]
        assert checkpointer.restore(abstract_on(mesh))[2] == {"step": 7}
    with checkpoint.Checkpointer(tmp_path / "last", config_lib.CheckpointConfig(every=0)) as checkpointer:
        assert not checkpointer.save(50, state, {}) and checkpointer.save(51, state, {}, force=True)


def test_a_killed_save_is_ignored_and_its_step_can_be_saved_again(tmp_path):
    mesh = mesh_of(1, jax.device_count(), 1)
    state = state_on(mesh, 0)
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        checkpointer.save(1, state, {"step": 1})
    # What SIGKILL leaves in the middle of a save: the step and its items under temporary names.
    folder = tmp_path / "checkpoints"
    killed = folder / "2.orbax-checkpoint-tmp"
    shutil.copytree(folder / "1", killed)
    (killed / "commit_success.txt").unlink(missing_ok=True)
    (killed / "state").rename(killed / "state.orbax-checkpoint-tmp")
    for path in (killed / "state.orbax-checkpoint-tmp" / "d").iterdir():
        path.write_bytes(b"")
    shutil.copytree(killed, folder / "5.orbax-checkpoint-tmp")
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert checkpointer.restore(abstract_on(mesh))[2] == {"step": 1}
        assert checkpointer.save(2, state, {"step": 2})
        checkpointer.wait()
        assert checkpointer.restore(abstract_on(mesh))[2] == {"step": 2}
    # Orbax removes leftovers in a thread and waits for it before the first save.
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_no_checkpoint_and_a_wrong_shape_are_errors(tmp_path):
    mesh = mesh_of(1, jax.device_count(), 1)
    abstract = abstract_on(mesh)
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as checkpointer:
        with pytest.raises(InputError, match=r"checkpoints: holds no checkpoint; start"):
            checkpointer.restore(abstract)
        checkpointer.save(1, state_on(mesh, 0), {})
        norm = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=abstract.params["norm"].sharding)
        with pytest.raises(RunError, match=r"no checkpoint can be read; step 1: ValueError.*\(4,\).*\(8,\)"):
            checkpointer.restore(abstract._replace(params=abstract.params | {"norm": norm}))


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    """A step without a score is never best. That of step 2 comes after a restart, when the step is saved already."""
    state = state_on(mesh_of(1, 8, 1), 0)
    scores = {0: {}, 1: {1: 0.3}, 2: {1: 0.3}, 3: {1: 0.3, 2: 0.9}, 4: {1: 0.3, 2: 0.9, 4: 0.2}, 5: {2: 0.9, 5: 0.5}}
    for steps in (range(3), range(3, 6)):
        with checkpoint.Checkpointer(tmp_path, config_lib.CheckpointConfig(every=1, keep=2)) as store:
            for step in steps:
                at = state._replace(step=jax.device_put(jnp.int32(step), state.step.sharding))
                store.save(step, at, {}, scores=scores[step])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]
    assert checkpoint_reading.saved_step(tmp_path) == 5 and checkpoint_reading.saved_step(tmp_path, 2) == 2
    with pytest.raises(InputError, match="holds no checkpoint of it; it has steps 2, 4, 5"):
        checkpoint_reading.saved_step(tmp_path, 3)
    with pytest.raises(InputError, match="is not the folder of a run"):
        checkpoint_reading.saved_step(tmp_path / "none")


def test_a_step_that_is_better_than_those_that_are_saved_is_saved(tmp_path):
    """A better step than it, 1, was never saved, and the others are no multiples of `every`."""
    scores, state = {0: 0.2, 1: 0.9, 2: 0.5, 3: 0.4}, state_on(mesh_of(1, 8, 1))
    with checkpoint.Checkpointer(tmp_path, config_lib.CheckpointConfig(every=0, keep=1)) as store:
        store.save(0, state, {}, force=True, scores={0: 0.2})
        saved = [store.save(step, state, {}, scores={at: scores[at] for at in range(step + 1)}) for step in (2, 3)]
    assert saved == [True, False]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]  # 0 was the best one before


@pytest.mark.parametrize(
    ("at_once", "parts"),
    [
        (2**31, [["blocks.0.q", "embed", "norm"]]),
        (640, [["blocks.0.q", "embed"], ["norm"]]),
        (1, [["blocks.0.q"], ["embed"], ["norm"]]),
    ],
)
def test_parameters_alone_are_read_onto_another_mesh(tmp_path, monkeypatch, at_once, parts):
    """A part at a time: of 128, 512 and 32 bytes."""
    read, check = [], checkpoint_reading.check
    monkeypatch.setattr(checkpoint_reading, "_READ_AT_ONCE", at_once)
    monkeypatch.setattr(checkpoint_reading, "check", lambda part, *rest: (read.append([*part]), check(part, *rest)))
    state = state_on(mesh_of(1, 8, 1))
    with checkpoint.Checkpointer(tmp_path, config_lib.CheckpointConfig()) as store:
        store.save(7, state, {}, force=True)
    mesh = mesh_of(2, 2, 2)
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state.params, shardings(mesh).params
    )
    params = checkpoint_reading.read_params(tmp_path, 7, abstract)
    assert read == parts and params.keys() == state.params.keys()
    for name, value in state.params.items():
        np.testing.assert_array_equal(params[name], value)
        assert params[name].sharding == abstract[name].sharding


def test_a_step_that_the_run_removes_while_it_is_read(tmp_path, monkeypatch):
    """Without a step the newest is taken then; the step that was asked for is said to be gone."""
    where = NamedSharding(mesh_of(1, 1, 1), PartitionSpec())
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as store:
        store.save(1, State({"x": jax.device_put(jnp.ones(8), where)}, (), jax.device_put(jnp.int32(1), where)), {})
    read, folder = checkpoint_reading._read, tmp_path / "checkpoints"

    def replaced(of, step, abstract):
        """The run writes a newer step, and removes this one; the first time alone."""
        monkeypatch.setattr(checkpoint_reading, "_read", read)
        (folder / str(step)).rename(folder / str(step + 1))
        return read(of, step, abstract)

    abstract = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=where)}
    monkeypatch.setattr(checkpoint_reading, "_read", replaced)
    params, step = weights._read(tmp_path, None, abstract)
    assert step == 2 and (np.asarray(params["x"]) == 1).all()
    monkeypatch.setattr(checkpoint_reading, "_read", replaced)
    with pytest.raises(InputError, match=r"step 2 was removed in the meantime .checkpoint.keep.; give a newer --step"):
        weights._read(tmp_path, 2, abstract)


def test_adapters_begin_as_the_seed_says():
    """Runs of several seeds begin differently."""
    mesh = mesh_of(1, 1, 1)

    def begun(seed):
        config = run_config(**{"seed": seed, "model.lora.rank": 2})
        return weights.adapters(config, SimpleNamespace(cfg=open_policy(config.model).cfg), mesh)

    first, again, other = (begun(seed) for seed in (3, 3, 4))
    assert_same_bits(first, again)
    assert any((np.asarray(first[name]) != np.asarray(other[name])).any() for name in first)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def data_of(folder):
    """The file that holds the arrays."""
    return max((folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)


def swapped(folder):
    """Whole files, with the numbers of another step: only checksums tell."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.with_name("1") / "state", folder / "state")


DAMAGE = {
    "other numbers": swapped,
    "one bit": lambda folder: flipped(data_of(folder)),
    "a file cut short": lambda folder: os.truncate(data_of(folder), data_of(folder).stat().st_size // 2),
    "a file is gone": lambda folder: data_of(folder).unlink(),
    "half a meta": lambda folder: (folder / "meta" / "metadata").write_text('{"step":'),
    "empty": lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, damage, caplog):
    mesh = mesh_of(1, jax.device_count(), 1)
    states = {step: state_on(mesh, step) for step in (1, 2)}
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as store:
        for step, state in states.items():
            store.save(step, state, {"step": step})
    damage(tmp_path / "checkpoints" / "2")
    with pytest.raises(InputError, match="its checkpoint of step 2 can't be used"):
        checkpoint_reading.read_params(tmp_path, 2, abstract_on(mesh).params)
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as store:
        step, state, meta = store.restore(abstract_on(mesh))
        assert (step, meta) == (1, {"step": 1})
        assert_same_bits(state, states[1])
        assert "checkpoint of step 2 skipped, moved to damaged_checkpoints" in caplog.text
        assert os.listdir(tmp_path / "damaged_checkpoints") == ["2.1"]
        assert store.latest_step() == 1 and store.save(2, states[2], {"step": 2})
        assert store.restore(abstract_on(mesh))[0] == 2


def wrapped(error):
    """As orbax wraps an error of tensorstore."""
    outer = Exception("Encountered error while reading array index: x. See full TensorStore details: y.")
    outer.__cause__ = error
    return outer


PASSING = {
    "disk": OSError(errno.EIO, "Input/output error"),
    "files": OSError(errno.EMFILE, "Too many open files"),
    "nfs": ValueError('UNKNOWN: Error opening "zarr" driver: x [OS error 116: ESTALE Stale file handle]'),
    "gs": ValueError('UNAVAILABLE: Error reading "x": HTTP response code: 503'),
    "in orbax": wrapped(ValueError('UNAVAILABLE: Error reading "x": HTTP response code: 503')),
}


@pytest.mark.parametrize("error", PASSING.values(), ids=PASSING.keys())
@pytest.mark.parametrize("times", [1, 2, "then damage"])
def test_an_error_of_the_disk_sets_no_checkpoint_aside(tmp_path, monkeypatch, error, times, caplog):
    """The first read that fails is made again; red where it moves a sound checkpoint away."""
    mesh = mesh_of(1, jax.device_count(), 1)
    state = {"x": jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec()))}
    abstract = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))}
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as store:
        for step in (1, 2):
            store.save(step, state, {"step": step})
    second = {1: [], 2: [error], "then damage": [checksums.Damaged("x is not as it was saved")]}[times]
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as store:
        handler, left = checkpoint.ocp.CompositeCheckpointHandler, [error, *second]
        read = handler.restore

        def failing(*given, **named):
            if left:
                raise left.pop(0)
            return read(*given, **named)

        monkeypatch.setattr(handler, "restore", failing)
        if times == 1:
            assert store.restore(abstract)[0] == 2 and "reading it again in 0 s" in caplog.text
        else:
            with pytest.raises(
                RunError, match=r"checkpoints/2: can't be read .*need not be damage; nothing was changed"
            ):
                store.restore(abstract)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    assert not (tmp_path / "damaged_checkpoints").exists()


@pytest.mark.parametrize("may_pass", [False, True])
def test_what_another_process_cannot_read_fails_in_all(tmp_path, monkeypatch, caplog, may_pass):
    """Here process 1, in both of its reads of step 2; `test_multiprocess` has one that really cannot."""
    mesh = mesh_of(1, jax.device_count(), 1)
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as store:
        for step in (1, 2):
            store.save(step, state_on(mesh, 0), {"step": step})
        theirs = [[may_pass, "ValueError: x"], [False, "ValueError: x"]]
        monkeypatch.setattr(checkpoint.cluster, "share", lambda mine: [mine, theirs.pop(0) if theirs else None])
        if may_pass:
            with pytest.raises(
                RunError, match=r"/2: can't be read \(Damaged: process 1: ValueError: x\), which need not"
            ):
                store.restore(abstract_on(mesh))
        else:
            assert store.restore(abstract_on(mesh))[0] == 1
            assert "step 2 skipped, moved to damaged_checkpoints: Damaged: process 1: ValueError: x" in caplog.text
    assert (tmp_path / "damaged_checkpoints").exists() != may_pass


def test_a_read_that_fails_leaves_no_state_behind(tmp_path, monkeypatch):
    """Its traceback holds one, and on an accelerator there may be no room for a second."""
    states, alive = [], []

    def read(step, abstract_state):
        alive.append(sum(state() is not None for state in states))
        state = State({}, None, jnp.ones(1))
        states.append(weakref.ref(state.step))
        raise checksums.Damaged("x is not as it was saved")

    mesh = mesh_of(1, jax.device_count(), 1)
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as store:
        for step in (1, 2):
            store.save(step, state_on(mesh, 0), {})
        monkeypatch.setattr(store, "_read", read)
        gc.disable()
        try:
            with pytest.raises(RunError, match="no checkpoint can be read"):
                store.restore(abstract_on(mesh))
        finally:
            gc.enable()
    assert alive == [0, 0, 0, 0]


def test_damage_that_tensorstore_reports_is_none_of_the_disk():
    missing = ValueError("NOT_FOUND: Error reading [OS error 2: ENOENT No such file or directory]")
    short = ValueError("OUT_OF_RANGE: Requested byte range [0, 204) is not valid for value of size 50")
    damage = [missing, short, FileNotFoundError("x"), NotADirectoryError(errno.ENOTDIR, "x"), KeyError("x")]
    assert not any(map(checksums.is_of_storage, damage + [wrapped(error) for error in damage]))


def test_where_none_can_be_used_all_stay(tmp_path):
    mesh = mesh_of(1, jax.device_count(), 1)
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as store:
        for step in (1, 2):
            store.save(step, state_on(mesh, 0), {})
    for step in ("1", "2"):
        flipped(data_of(tmp_path / "checkpoints" / step))
    store = checkpoint.Checkpointer(tmp_path, EVERY_STEP)
    with store, pytest.raises(RunError, match="no checkpoint can be read; step 2: "):
        store.restore(abstract_on(mesh))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_checksums_see_every_change_and_no_sharding():
    meshes = mesh_of(2, 2, 2), mesh_of(1, 8, 1)
    state = state_on(meshes[0])
    sums, bad = checksums.fingerprint(state)
    assert bad == [] and checksums.fingerprint(jax.device_put(state, shardings(meshes[1])))[0] == sums
    values = np.asarray(state.params["embed"])
    for change in (
        values.T.reshape(values.shape),
        values[::-1],
        np.nextafter(values, 9),
        np.where(values == values.max(), 0, values),
    ):
        params = state.params | {"embed": jax.device_put(np.ascontiguousarray(change), state.params["embed"].sharding)}
        other = checksums.fingerprint(state._replace(params=params))[0]
        assert [name for name in sums if sums[name] != other[name]] == ["params.embed"]


def test_checksums_see_the_sign_of_every_element():
    """The highest bit alone: times an even number it would be lost modulo 2**32."""
    where = NamedSharding(mesh_of(1, 1, 1), PartitionSpec())
    values = np.full((9, 8), 1.5, np.float32)
    values[np.arange(8), np.arange(8)] *= -1
    *changed, whole = (checksums.fingerprint({"x": jax.device_put(row, where)})[0]["x"] for row in values)
    assert whole not in changed


def test_what_is_not_finite_is_not_saved(tmp_path):
    mesh = mesh_of(1, jax.device_count(), 1)
    state = state_on(mesh, 1)
    spoilt = state.params | {"norm": state.params["norm"].at[3].set(np.nan)}
    with checkpoint.Checkpointer(tmp_path, EVERY_STEP) as store:
        store.save(1, state, {})
        with pytest.raises(
            RunError, match=r"step 2: not saved, params\.norm of the training state is not finite.*step 1"
        ):
            store.save(2, state._replace(params=spoilt), {})
        assert store.restore(abstract_on(mesh))[0] == 1


def test_a_save_that_was_not_written_whole_is_an_error(tmp_path, monkeypatch):
    """Names, shapes and dtypes of what is in the files are compared with those of the state."""
    mesh = mesh_of(1, jax.device_count(), 1)
    state = state_on(mesh, 1)
    store = checkpoint.Checkpointer(tmp_path, EVERY_STEP)
    store.save(1, state, {})
    store.wait()
    store.save(2, state, {})
    store._writing[1]["params.more"] = ((3,), np.dtype("float32"))
    with pytest.raises(
        RunError,
        match=r"step 2 could not be written .params\.more is None in the files, not .*resumes from step 1",
    ):
        store.wait()
    store.close()


def test_the_reason_at_the_end_of_a_long_error_is_told(tmp_path, monkeypatch):
    store = checkpoint.Checkpointer(tmp_path, EVERY_STEP)

    def full(*_, **__):
        raise ValueError(f"Error writing {'a/' * 500}: File too large")

    with monkeypatch.context() as patch:
        patch.setattr(store._manager, "save", full)
        with pytest.raises(RunError, match=r"could not be written .Error writing a/.* \.\.\. .*/: File too large.; "):
            store.save(1, state_on(mesh_of(1, jax.device_count(), 1), 1), {})
    store.close()


@pytest.mark.parametrize("failure", [None, OSError("no space")], ids=["written", "failed"])
def test_ctrl_c_while_a_checkpoint_is_written_does_not_fail_it(tmp_path, monkeypatch, failure):
    """When it is closed the step is complete, and a failure is still one."""
    gate, finish = threading.Event(), async_checkpointer._background_wait_for_commit_futures

    def held(*arguments, **options):
        gate.wait(60)
        if failure:
            raise failure
        finish(*arguments, **options)

    monkeypatch.setattr(async_checkpointer, "_background_wait_for_commit_futures", held)
    store = checkpoint.Checkpointer(tmp_path, EVERY_STEP)
    store.save(1, state_on(mesh_of(1, jax.device_count(), 1), 1), {})
    wait = store._manager.wait_until_finished

    def waits():  # the signal comes during the wait, however busy the machine is
        threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        threading.Timer(0.5, gate.set).start()
        monkeypatch.setattr(store._manager, "wait_until_finished", wait)
        wait()

    monkeypatch.setattr(store._manager, "wait_until_finished", waits)
    with pytest.raises(KeyboardInterrupt):
        store.wait()
    expected = pytest.raises(RunError, match=r"step 1 could not be written .no space.; no step was saved before")
    with expected if failure else contextlib.nullcontext():
        store.close()
    assert (tmp_path / "checkpoints" / "1").is_dir() == (not failure)


def test_where_the_folder_is_removed_no_step_that_is_gone_is_promised(tmp_path):
    """Orbax remembers the steps that it has saved."""
    mesh = mesh_of(1, jax.device_count(), 1)
    store = checkpoint.Checkpointer(tmp_path, EVERY_STEP)
    store.save(1, state_on(mesh, 1), {})
    store.wait()
    store.save(2, state_on(mesh, 2), {})
    store._manager.wait_until_finished()
    shutil.rmtree(tmp_path / "checkpoints")
    gone = r"step 2 could not be written .*\b2\b.*; the steps that were saved before are not in .*checkpoints any more"
    with pytest.raises(RunError, match=gone):
        store.wait()
    store.close()
