"""Mamba-2: chunks equal the recurrence, pieces and packing change nothing, and a cache of states obeys its verbs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import mixer, mixer_weights

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder, mamba2
from igrpo_jax.models.segments import PrefixGroup, pack, starts

B, N, G, H, P = 2, 4, 2, 3, 5


def data(time, seed=0, groups=G):
    rng = np.random.default_rng(seed)
    x, state = rng.normal(size=(B, time, N, H)), rng.normal(size=(B, N, H, P))
    dt = np.log1p(np.exp(rng.normal(-1, 2, (B, time, N))))
    b, c = rng.normal(size=(2, B, time, groups, P))
    return [np.asarray(y, np.float32) for y in (x, dt, -np.exp(rng.normal(size=N)), b, c, state)]


def recurrence(x, dt, a, b, c, state):
    """Token by token and head by head, in float64."""
    x, dt, a, b, c, state = (np.array(y, np.float64) for y in (x, dt, a, b, c, state))
    y = np.zeros(x.shape)
    for row, t, n in np.ndindex(x.shape[:3]):
        group = n // (x.shape[2] // b.shape[2])
        state[row, n] *= np.exp(dt[row, t, n] * a[n])
        state[row, n] += dt[row, t, n] * np.outer(x[row, t, n], b[row, t, group])
        y[row, t, n] = state[row, n] @ c[row, t, group]
    return y, state


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 3, 4, 5, 8, 11])
def test_chunks_equal_the_recurrence(time, groups):
    """From a state that is not empty; the last chunk of 4 is whole, has one position, or all but one."""
    inputs = data(time, groups=groups)
    for got, expected in zip(mamba2.scan(*inputs, chunk=4), recurrence(*inputs), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    if time == 1:
        for got, expected in zip(mamba2.step(*inputs), recurrence(*inputs), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_chunk():
    inputs = data(11)
    weight, last = np.random.default_rng(1).normal(size=(B, 11, N, H)), np.random.default_rng(2).normal(size=(N, H, P))

    def gradient(chunk):
        def loss(*inputs):
            y, state = mamba2.scan(*inputs, chunk=chunk)
            return jnp.sum(y * weight) + jnp.sum(state * last)

        return jax.jit(jax.grad(loss, argnums=range(6)))(*inputs)

    for one, whole in zip(gradient(1), gradient(11), strict=True):
        np.testing.assert_allclose(one, whole, atol=1e-5 * np.abs(whole).max(), rtol=0)
    for four, whole in zip(gradient(4), gradient(11), strict=True):
        np.testing.assert_allclose(four, whole, atol=1e-5 * np.abs(whole).max(), rtol=0)


@pytest.mark.slow
def test_strong_decay_gives_no_nan():
    """Between distant positions exp(difference) above the diagonal would be infinite."""
    inputs = data(8)
    inputs[1][:] = 50.0
    loss = lambda *x: jnp.sum(mamba2.scan(*x, chunk=8)[0] ** 2)
    assert all(np.isfinite(x).all() for x in jax.grad(loss, argnums=range(6))(*inputs))


def run(c, params, tokens):
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return jax.jit(lambda *x: decoder.apply(c, *x)[0])(params, tokens, places)


TOKENS = np.random.default_rng(0).integers(0, 64, (3, 21), np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2, 8, 13])
def test_two_pieces_equal_one(hybrid, cut):
    """Outputs and states, of rows that continue the states of others."""
    c, weights = hybrid[0], mixer_weights(hybrid[1])
    x = np.random.default_rng(5).normal(size=(3, 21, c.hidden_size)).astype(np.float32)
    read = jax.jit(lambda x, before: mixer(c, weights, x, before))
    empty = caches.empty_state(c, 3, jnp.float32)
    whole, state = read(x, empty)
    first, between = read(x[:, :cut], empty)
    later, after = read(x[:, cut:], between)
    got = np.concatenate([first, later], axis=1), after
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((whole, state)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


def noise(cache, seed):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), x.dtype), cache)


@pytest.mark.slow
def test_the_verbs_take_whole_states(hybrid):
    c = hybrid[0]
    cache = noise(caches.empty(c, 8, 4, 4, jnp.float32), 0)
    lanes = noise(caches.empty_lanes(c, 3, jnp.float32), 1)
    rows = caches.rows_of(cache, np.array([2, 0]))
    put = caches.put_rows(cache, jax.tree.map(lambda x: x + 1, rows), np.array([2, 4]))  # there are four slots
    nothing = np.array([8], np.int32)
    forked = caches.fork(cache, lanes, np.array([2, 0]), np.array([1, 4]), nothing, nothing)
    for i, kind in enumerate(c.pattern):
        if kind != "M":
            assert lanes[i] is None
            continue
        for old, lane, row, new, fork in zip(*(x[i] for x in (cache, lanes, rows, put, forked)), strict=True):
            np.testing.assert_array_equal(row, np.stack([old[2], old[0]]))
            np.testing.assert_array_equal(new, np.stack([old[0], old[1], old[2] + 1, old[3]]))
            np.testing.assert_array_equal(fork, np.stack([old[0], lane[2], old[2], old[3]]))


@pytest.mark.slow
def test_a_state_is_float32_in_bfloat16(hybrid):
    c, params = hybrid
    half = decoder.cast(params, "bfloat16")
    hidden = run(c, half, TOKENS)
    assert hidden.dtype == jnp.bfloat16
    assert np.abs(hidden.astype(jnp.float32) - run(c, params, TOKENS)).mean() < 0.03
    empty = caches.empty_state(c, 2, jnp.bfloat16)
    _, state = mixer(c, mixer_weights(half), jnp.ones((2, 9, c.hidden_size), jnp.bfloat16), empty)
    for entry in (empty, state):
        assert (entry.state.dtype, entry.x.dtype) == (jnp.float32, jnp.bfloat16)
    assert len(np.unique(state.state.astype(jnp.bfloat16))) < len(np.unique(state.state))


@pytest.mark.slow
def test_a_step_is_clipped_to_its_limit(hybrid):
    """With both limits alike every step is as long as that."""
    c, params = hybrid
    fixed = dataclasses.replace(c, mamba=dataclasses.replace(c.mamba, time_step_limit=(0.3, 0.3)))
    other = {path: x + (path.endswith("dt_bias") and 1.0) for path, x in params.items()}
    np.testing.assert_array_equal(run(fixed, params, TOKENS), run(fixed, other, TOKENS))
    assert np.abs(run(c, params, TOKENS) - run(c, other, TOKENS)).max() > 0.01


def test_the_count_of_parameters_is_that_of_the_arrays(hybrid):
    shapes = decoder.shapes(hybrid[0])
    assert hybrid[0].num_params == sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.slow
def test_a_new_model_starts_with_finite_gradients(hybrid):
    params = decoder.init(hybrid[0], jax.random.key(0), sharding.make_mesh(config.MeshConfig(), jax.devices()[:1]))
    loss = lambda params: jnp.mean(decoder.apply(hybrid[0], params, TOKENS, TOKENS * 0)[0] ** 4)
    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(x).all() for x in gradient.values())
    assert np.abs(gradient["blocks/0/mixer/o_proj"]).max() > 0  # zero itself, and what the rest is reached through


@pytest.mark.proof
@pytest.mark.slow
def test_a_mesh_changes_nothing(hybrid):
    """Heads and groups over `tensor`: values and gradients of rows."""
    c, params = hybrid

    def loss(params, tokens):
        hidden, _ = decoder.apply(c, params, tokens, jnp.broadcast_to(jnp.arange(21), tokens.shape), remat="full")
        return jnp.mean(hidden**2 * jnp.arange(c.hidden_size)), hidden

    def run_on(mesh):
        placed = {path: sharding.to_global(x, sharding.param_sharding(mesh, path)) for path, x in params.items()}
        batch = sharding.to_global(TOKENS[:2], sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            return sharding.to_host(jax.jit(jax.value_and_grad(loss, has_aux=True))(placed, batch))

    (_, expected), wanted = run_on(sharding.make_mesh(config.MeshConfig(), jax.devices()[:1]))
    mesh = sharding.make_mesh(config.MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    (_, hidden), gradients = run_on(mesh)
    assert sharding.param_sharding(mesh, "blocks/0/mixer/b_proj").shard_shape((32, 2, 8)) == (16, 1, 8)
    np.testing.assert_allclose(hidden, expected, atol=2e-5, rtol=0)
    for path, x in wanted.items():
        np.testing.assert_allclose(gradients[path], x, atol=2e-5 * np.abs(x).max(), rtol=0, err_msg=path)


# In packed sequences of 256 tokens. The convolution sees 4 tokens: some prefixes and completions are shorter than that.
GROUPS = [
    [
        PrefixGroup(0, [5, 1]),
        PrefixGroup(2, [3, 9, 1]),
        PrefixGroup(13, [8, 16, 0]),
        PrefixGroup(20, [11, 7]),
        PrefixGroup(3, []),
    ],
    [],  # padding alone
    [PrefixGroup(100, [156])],
]
SIZE = 256


def of_layer(hybrid):
    c, weights = hybrid[0], mixer_weights(hybrid[1])
    x, slope = np.random.default_rng(5).normal(size=(2, len(GROUPS), SIZE, c.hidden_size)).astype(np.float32)
    return c, weights, x, slope


def places():
    """Returns of each group where its prefix and its completions lie in the packed sequences, read as one: ranges."""
    for shard, groups in enumerate(GROUPS):
        for group, (start, own) in zip(groups, starts(groups), strict=True):
            ranges = [(at, n) for at, n in zip((start, *own), (group.prefix, *group.completions), strict=True)]
            yield [range(shard * SIZE + at, shard * SIZE + at + n) for at, n in ranges]


def rectangle(ranges):
    """Returns token numbers [rows, longest], padded on the right with 0, and the length of each row."""
    tokens = np.zeros((len(ranges), max(len(own) for own in ranges)), np.int32)
    for row, own in zip(tokens, ranges, strict=True):
        row[: len(own)] = own
    return tokens, np.array([len(own) for own in ranges], np.int32)


def in_sequences(rows, tokens, length):
    """Returns the results of the rows of `rectangle` at their places in the packed sequences, and zeros elsewhere."""
    real = np.arange(tokens.shape[1]) < length[:, None]
    flat = jnp.zeros((len(GROUPS) * SIZE, rows.shape[-1]), rows.dtype)
    return flat.at[tokens[real]].add(rows[real]).reshape(len(GROUPS), SIZE, -1)


def alone(c, weights, x):
    """Each prefix, and each [prefix | completion], as a row of its own."""
    flat = x.reshape(-1, x.shape[-1])
    groups = list(places())
    prefixes = rectangle([ranges[0] for ranges in groups])
    rows = rectangle([[*ranges[0], *own] for ranges in groups for own in ranges[1:]])
    of_prefixes, _ = mixer(c, weights, flat[prefixes[0]], None)
    of_rows, _ = mixer(c, weights, flat[rows[0]], None)
    before = np.array([len(ranges[0]) for ranges in groups for _ in ranges[1:]])
    own = np.arange(rows[0].shape[1]) >= before[:, None]
    return in_sequences(of_prefixes, *prefixes) + in_sequences(jnp.where(own[..., None], of_rows, 0), *rows)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [4, 32])
def test_packed_tokens_get_what_rows_get(hybrid, chunk):
    """Outputs and all gradients; chunks are shorter than most segments, or longer than them."""
    c, weights, x, slope = of_layer(hybrid)
    segments = pack(GROUPS, SIZE, chunk)
    slope *= segments.segment[..., None] > 0

    def gradients(run):
        def loss(weights, x):
            y = run(c, weights, x)
            return jnp.sum(y * slope), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(weights, x)
        return y, gradients[1], gradients[0]

    got = gradients(lambda c, weights, x: mixer(c, weights, x, segments)[0])
    wanted = gradients(alone)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)
    padding = segments.segment == 0
    assert padding.sum() > SIZE
    for y in got[:2]:
        assert not np.asarray(y)[padding].any()
    assert np.abs(got[1]).max(axis=-1)[~padding].min() > 0


def test_what_passes_between_chunks_is_float32_in_bfloat16(hybrid, monkeypatch):
    """The gradients of all completions of a prefix add up in it, and those of all chunks in the weights."""
    c, weights, x, _ = of_layer(hybrid)
    segments, seen, scan = pack(GROUPS, SIZE, 32), [], mamba2.tree_scan

    def watched(body, own, empty, *rest):
        seen.extend([*own.values(), *empty])
        return scan(body, own, empty, *rest)

    monkeypatch.setattr(mamba2, "tree_scan", watched)
    weights = {path: value.astype(jnp.bfloat16) for path, value in weights.items()}
    run = lambda weights, x: mixer(c, weights, x, segments)[0]
    assert jax.eval_shape(run, weights, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    assert [part.dtype for part in seen] == [jnp.float32] * (len(mamba2.MIXED) + 4)


@pytest.mark.slow
def test_a_completion_is_seen_by_itself_alone(hybrid):
    """Changing its tokens, or padding, leaves the outputs of all other tokens bit-equal."""
    c, weights, x, _ = of_layer(hybrid)
    segments = pack(GROUPS, SIZE, 8)
    run = jax.jit(lambda x: mixer(c, weights, x, segments)[0])
    before = np.asarray(run(x))
    numbers = segments.segment[0]
    for changed in (numbers[0], numbers[10], 0):
        other = x.copy()
        other[0, numbers == changed] += 1
        differs = (np.asarray(run(other)) != before).any(axis=-1)
        np.testing.assert_array_equal(differs[0], (numbers == changed) & (numbers > 0))
        assert not differs[1:].any()
    prefix = segments.parent[0] == segments.parent[0, 10]  # a prefix group: changing its prefix changes all of it
    other = x.copy()
    other[0, numbers == segments.parent[0, 10]] += 1
    np.testing.assert_array_equal((np.asarray(run(other)) != before).any(axis=-1)[0], prefix)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((8, 1, 1), marks=pytest.mark.proof)])
def test_a_mesh_changes_nothing_of_packed_axes(hybrid, sizes):
    """Shards over `data` and `fsdp`, heads and groups over `tensor`: outputs and gradients, under remat."""
    c, weights, _, _ = of_layer(hybrid)
    shards = [GROUPS[i % 2] for i in range(sizes[0] * sizes[1])]
    x, slope = np.random.default_rng(6).normal(size=(2, len(shards), 128, c.hidden_size)).astype(np.float32)
    segments = pack(shards, 128, 8)

    def loss(weights, x, slope, segments):
        y = jax.checkpoint(lambda *given: mixer(c, *given)[0])(weights, x, segments)
        return jnp.sum(y * slope), y

    def run_on(mesh):
        placed = {name: sharding.to_global(w, sharding.param_sharding(mesh, name)) for name, w in weights.items()}
        batch = sharding.to_global((x, slope, segments), sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            return sharding.to_host(run(placed, *batch))

    (_, expected), wanted = run_on(sharding.make_mesh(config.MeshConfig(), jax.devices()[:1]))
    (_, y), gradients = run_on(sharding.make_mesh(config.MeshConfig(*sizes)))
    np.testing.assert_allclose(y, expected, atol=2e-5, rtol=0)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), rtol=0)
