"""The optimizers beside optax alone, where their state lies, and the learning rate by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from learner_cases import make_learner

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.learning import train_state
from igrpo_jax.learning.loss import MicroBatchSums
from igrpo_jax.learning.optimizer import make_optimizer, state_shardings
from igrpo_jax.outputs.checkpoint import Checkpointer


def test_the_learning_rate():
    """Peak 1e-3, 10 steps, of which 2 rise: half, all, then a cosine to a tenth: at step 6 halfway, 5.5e-4."""
    settings = config.OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.2, min_lr_ratio=0.1)
    _, schedule = make_optimizer(settings, 10)
    expected = {0: 5e-4, 1: 1e-3, 2: 1e-3, 4: 1e-4 + 9e-4 * (2 + np.sqrt(2)) / 4, 6: 5.5e-4, 10: 1e-4, 99: 1e-4}
    for step, rate in expected.items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(rate, rel=1e-5), step
    flat = make_optimizer(config.OptimizerConfig(learning_rate=2e-3, warmup_ratio=0.0, min_lr_ratio=1.0), 10)[1]
    assert {float(flat(jnp.int32(step))) for step in range(12)} == {np.float32(2e-3)}
    one = make_optimizer(config.OptimizerConfig(learning_rate=2e-3, warmup_ratio=1.0), 1)[1]
    assert float(one(jnp.int32(0))) == pytest.approx(2e-3)  # a run of one step learns at the peak


def test_the_schedule_is_what_the_optimizer_uses():
    """Adam moves a lone parameter by the learning rate while its gradient stays the same."""
    settings = config.OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.5, min_lr_ratio=0.1, weight_decay=0.0)
    optimizer, schedule = make_optimizer(settings, 4)
    params = {"q_proj": jnp.ones((1,))}
    state = optimizer.init(params)
    for step in range(5):
        updates, state = optimizer.update({"q_proj": jnp.full((1,), 0.3)}, state, params)
        assert float(updates["q_proj"][0]) == pytest.approx(-float(schedule(jnp.int32(step))), rel=1e-4)


# A sublayer of each kind, an adapter, and what is no matrix; large enough for Adafactor to keep means of some.
SHAPES = {
    "lm_head": (128, 160),
    "blocks/0/mixer/q_proj": (128, 4, 32),
    "blocks/0/mixer/o_proj": (4, 32, 128),
    "blocks/0/mixer/q_bias": (4, 32),
    "blocks/0/norm/scale": (128,),
    "blocks/1/mixer/x_conv": (4, 4, 32),
    "blocks/1/mixer/a_log": (4,),
    "blocks/2/mixer/o_proj/lora_a": (4, 32, 8),
    "blocks/2/mixer/o_proj/lora_b": (8, 128),
}
MATRICES = ("q_proj", "o_proj", "lora_a", "lora_b")
NAMES = ("adamw", "muon", "adafactor")


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}


def settings_of(name, **more):
    given = {"learning_rate": 1e-2, "warmup_ratio": 0.0, "min_lr_ratio": 1.0, "max_grad_norm": 100.0} | more
    return config.OptimizerConfig(name=name, **given)


@functools.cache
def compiled(name, **more):
    """The optimizer's `init` and its step, compiled."""
    optimizer, _ = make_optimizer(settings_of(name, **more), 10)

    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return {path: x + updates[path] for path, x in params.items()}, state

    return jax.jit(optimizer.init), jax.jit(step)


def stepped(name, steps, **more):
    """Parameters and state after some steps from tree(0), with the gradients tree(1), tree(2) and so on."""
    init, step = compiled(name, **more)
    params, state = tree(0), init(tree(0))
    for number in range(1, steps + 1):
        params, state = step(tree(number), state, params)
    return params, state


def beside(alone, lift, steps):
    """Parameters after the same steps with an optimizer of optax alone, on trees that `lift` has changed."""
    params = lift(tree(0))
    state, update = jax.jit(alone.init)(params), jax.jit(alone.update)
    for number in range(1, steps + 1):
        updates, state = update(lift(tree(number)), state, params)
        params = {path: x + updates[path] for path, x in params.items()}
    return params


def flat(params):
    """Matrices with two axes, as a Hugging Face file has them; all else as it is."""
    cuts = {"o_proj": 2, "lora_a": 2}
    result = {}
    for path, x in params.items():
        name = path.rpartition("/")[2]
        cut = cuts.get(name, 1)
        result[path] = x.reshape(int(np.prod(x.shape[:cut])), -1) if name in MATRICES else x
    return result


def test_muon_is_optax_muon_on_the_matrices_and_adam_on_the_rest():
    """Optax alone gets the matrices as two axes and decides by their number; the head gets a third, as no matrix."""

    def lift(params):
        is_other = lambda path, x: x.ndim == 2 and path.rpartition("/")[2] not in MATRICES
        return {path: x[None] if is_other(path, x) else x for path, x in flat(params).items()}

    expected = beside(optax.contrib.muon(1e-2, beta=0.9, consistent_rms=0.2), lift, 2)
    for path, x in stepped("muon", 2, max_grad_norm=1e9)[0].items():
        np.testing.assert_allclose(x.ravel(), expected[path].ravel(), atol=2e-6, err_msg=path)


def test_adafactor_is_optax_adafactor_on_the_matrices():
    alone = optax.chain(optax.clip_by_global_norm(100.0), optax.adafactor(1e-2, multiply_by_parameter_scale=False))
    expected, (params, state) = beside(alone, flat, 2), stepped("adafactor", 2)
    for path, x in params.items():
        np.testing.assert_allclose(x.ravel(), expected[path].ravel(), atol=2e-6, err_msg=path)
    assert sum(x.size for x in jax.tree.leaves(state)) < 0.1 * sum(x.size for x in params.values())


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    """Its root mean square is about 0.2 of the learning rate, whatever the matrix's shape."""
    after = stepped("muon", 1)[0]
    for path in ("blocks/0/mixer/q_proj", "blocks/0/mixer/o_proj", "blocks/2/mixer/o_proj/lora_b"):
        assert 0.1e-2 < float(jnp.sqrt(jnp.mean((after[path] - tree(0)[path]) ** 2))) < 0.3e-2, path


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_decoupled_and_spares_biases_and_norms(name):
    """A step with decay 0.1 differs from one without by learning rate x decay x parameter, and is zero on a bias."""
    (plain, _), (decayed, _) = stepped(name, 1), stepped(name, 1, weight_decay=0.1)
    for path, x in tree(0).items():
        factor = 0.0 if path.endswith(("scale", "_bias", "a_log")) else 1e-2 * 0.1
        np.testing.assert_allclose(plain[path] - decayed[path], factor * x, atol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_state_lies_beside_its_parameters_and_a_sharded_step_is_the_single_one(name, tmp_path):
    """Moments have their parameter's sharding, means of rows and columns that of the axis that is left. A checkpoint
    of the sharded state, read back, makes the same next step."""
    mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer, _ = make_optimizer(settings_of(name), 10)
    places = {path: sharding.param_sharding(mesh, path) for path in SHAPES}
    where = state_shardings(mesh, jax.eval_shape(optimizer.init, tree(0)), SHAPES)
    put = lambda number: {path: jax.device_put(x, places[path]) for path, x in tree(number).items()}
    params, state = put(0), jax.device_put(compiled(name)[0](tree(0)), where)
    step = jax.jit(compiled(name)[1], out_shardings=(places, where))
    params, state = step(put(1), state, params)
    for path, x in stepped(name, 1)[0].items():
        np.testing.assert_allclose(params[path], x, atol=2e-5, err_msg=path)
    kept = {jax.tree_util.keystr(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(state)}
    assert max(x.size for x in kept.values() if not any(x.sharding.spec)) <= 128  # scales, numbers, empty places
    rows = [x.sharding.spec for path, x in kept.items() if "v_row" in path and "o_proj']" in path]
    assert rows == [jax.sharding.PartitionSpec("tensor")] * (name == "adafactor")
    with Checkpointer(tmp_path, config.CheckpointConfig()) as store:
        store.save(1, state, {}, force=True)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        _, read, _ = store.restore(abstract)
    for mine, theirs in zip(*(jax.tree.leaves(step(put(2), each, params)) for each in (read, state)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_zero_and_of_any_size_make_finite_steps(name):
    init, step = compiled(name, max_grad_norm=1e3)
    params, state = tree(0), init(tree(0))
    for scale in (0.0, 1e-30, 1e6):
        grads = {path: scale * (jnp.arange(x.size).reshape(x.shape) % 5 == 0) for path, x in tree(7).items()}
        params, state = step(grads, state, params)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state))), scale


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_leaves_all_as_it_was_on_any_device(name):
    """A CPU branches and other devices select: both give the step itself, or what was there before, bit for bit."""
    init, step = compiled(name)
    old = tree(0), init(tree(0))
    after = step(tree(1), old[1], old[0])
    for keep in (train_state._branch, train_state._select):
        for finite, expected in ((True, after), (False, old)):
            kept = keep(jnp.bool_(finite), lambda params, state: step(tree(1), state, params), old)
            for mine, theirs in zip(*map(jax.tree.leaves, (kept, expected)), strict=True):
                np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["gradient", "refine", "draft"])
def test_one_number_that_is_not_finite_is_enough_to_change_nothing(where, bad):
    """A norm may overflow where the loss is finite, and the loss of either stage where the gradient is."""
    optimizer, schedule = make_optimizer(settings_of("adamw"), 10)
    grads, params = ({"norm/scale": jnp.float32([value, 1.0])} for value in (bad if where == "gradient" else 2.0, 1.0))
    finite = MicroBatchSums.zeros()
    sums = dict.fromkeys(("refine", "draft"), finite)
    if where in sums:
        sums[where] = finite._replace(loss_sums=finite.loss_sums._replace(loss=jnp.float32(bad)))
    old = train_state.TrainState(params, optimizer.init(params), jnp.int32(3), jnp.int32(1))
    new, metrics = train_state.apply(optimizer, schedule, old, grads, sums)
    for mine, theirs in zip(*map(jax.tree.leaves, (new[:2], old[:2])), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert (int(new.step), int(new.skipped), int(metrics["nonfinite_steps"])) == (4, 2, 2)


def test_the_step_makes_no_copy_of_moments(tiny):
    """Beside the state there is room for one gradient, the clipped one, and a little more."""
    learner, _ = make_learner(dataclasses.replace(tiny[0], vocab_size=1024))
    params = sum(4 * x.size for x in jax.tree.leaves(learner.programs.state.params))
    assert learner.programs.apply.compiled().memory_analysis().temp_size_in_bytes < 1.1 * params


def test_bfloat16_is_for_the_first_moment_alone():
    for name, fields in (("adamw", {"mu": "bfloat16", "nu": "float32"}), ("muon", {"mu": "bfloat16", "nu": "float32"})):
        state = jax.eval_shape(make_optimizer(settings_of(name, mu_dtype="bfloat16"), 10)[0].init, tree(0))
        for field, dtype in fields.items():
            kept = [
                x.dtype
                for keys, x in jax.tree_util.tree_leaves_with_path(state)
                if any(getattr(key, "name", "") == field for key in keys)
            ]
            assert kept and {str(x) for x in kept} == {dtype}


def test_the_predicted_memory_counts_each_optimizers_own_state(tiny):
    """AdamW keeps two numbers for each parameter, Muon one for each of a matrix; what the learner says is that sum."""
    kept = {}
    for name in NAMES:
        learner, _ = make_learner(tiny[0], optimizer__name=name, optimizer__max_grad_norm=1.0)
        state, params = learner.programs.state.opt_state, learner.programs.state.params
        kept[name] = learner.programs.waiting_bytes.accumulate
        assert kept[name] == sum(4 * x.size for x in jax.tree.leaves(state))
    whole = sum(4 * x.size for x in params.values())
    matrices = sum(4 * x.size for path, x in params.items() if sharding.matrix_inputs(path) is not None)
    assert kept["adamw"] == pytest.approx(2 * whole, abs=16) and kept["adafactor"] < kept["muon"]
    assert kept["muon"] == pytest.approx(2 * whole - matrices, abs=128)  # and its coefficients
