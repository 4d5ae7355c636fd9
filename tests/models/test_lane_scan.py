"""Packed sequences that continue the states in their lanes: sums by hand, and Mamba-2 against single tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_models import mixer, mixer_weights

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import MambaState
from igrpo_jax.models.lane_scan import Lanes, lane_scan
from igrpo_jax.models.ragged import Ragged

# The convolution sees 4 tokens, and chunks of the hybrid model have 8.
PROMPTS = (21, 1, 2, 3, 8, 16, 4, 1, 30)
WIDTH, LANES = 4, 6


def calls(size):
    """Reads PROMPTS in their order, at most `size` tokens at a time; the last call reads nothing.

    Returns for each call its Lanes without states, the places of its tokens in the text of all prompts, and the numbers
    of its prompts. A prompt that does not fit goes on in the next call.
    """
    ends, read, prompt, count = np.cumsum(PROMPTS), 0, 0, 1
    while count:
        lane, length, start = np.full(WIDTH, LANES, np.int32), np.zeros(WIDTH, np.int32), np.zeros(WIDTH + 1, np.int32)
        first, count, prompts = read, 0, []
        while count < WIDTH and prompt < len(PROMPTS) and read - first < size:
            piece = min(ends[prompt] - read, size - (read - first))
            read += piece
            lane[count] = 5 * prompt % LANES
            length[count] = read - (ends[prompt] - PROMPTS[prompt])
            count += 1
            start[count:] = read - first
            prompts.append(prompt)
            prompt += read == ends[prompt]
        ragged = Ragged(length, np.zeros((WIDTH, 1), np.int32), start, np.array([count], np.int32))
        yield Lanes(None, lane, ragged), np.arange(first, read), prompts


def packed(text, tokens, size):
    """Returns those tokens of the text [tokens, ...] in a packed sequence of `size`, with large numbers as padding."""
    return np.concatenate([text[tokens], np.full((size - len(tokens), *text.shape[1:]), 99, text.dtype)])


def running_sums(before, tokens, count):
    """The state counts the tokens too, so that their number is known."""
    total, length = before
    return (total + tokens.sum(axis=0), length + count), total[0] + jnp.cumsum(tokens, axis=0) + 1000 * length[0]


@pytest.mark.parametrize(("size", "chunk"), [(32, 4), (7, 8), (16, 5), (100, 1)])
def test_sums_along_each_sequence(size, chunk):
    """Whole numbers, and so exact. The lanes of finished prompts stay as they are until another prompt begins there."""
    text = np.random.default_rng(0).integers(-9, 9, (sum(PROMPTS), 2)).astype(np.float32)
    states = jnp.full((LANES, 2), 7.0), jnp.full((LANES,), 5, jnp.int32)
    totals, lengths = (np.array(x) for x in states)
    run = jax.jit(lambda inputs, lanes: lane_scan(running_sums, inputs, lanes, chunk))
    for lanes, tokens, _ in calls(size):
        states, results = run(packed(text, tokens, size), lanes._replace(states=states))
        assert not np.asarray(results)[len(tokens) :].any()
        for w in range(lanes.ragged.count[0]):
            new = tokens[lanes.ragged.start[w] : lanes.ragged.start[w + 1]]
            own = np.arange(new[-1] + 1 - lanes.ragged.length[w], new[-1] + 1)
            totals[lanes.lane[w]], lengths[lanes.lane[w]] = text[own].sum(axis=0), len(own)
            # The first chunk of each call begins with the first token of the sequence in its packed sequence.
            before = len(own) - len(new) + np.arange(len(new)) // min(chunk, size) * min(chunk, size)
            wanted = np.cumsum(text[own], axis=0)[-len(new) :] + 1000 * before[:, None]
            np.testing.assert_array_equal(results[lanes.ragged.start[w] : lanes.ragged.start[w + 1]], wanted)
        np.testing.assert_array_equal(states[0], totals)
        np.testing.assert_array_equal(states[1], lengths)


def test_no_turn_copies_the_lanes():
    """Given lanes that are not used otherwise, the compiled program writes them in place."""
    lanes = next(calls(32))[0]._replace(states=(jnp.zeros((LANES, 2)), jnp.zeros((LANES,), jnp.int32)))
    inputs = np.zeros((32, 2), np.float32)
    run = lambda states, inputs, lanes: lane_scan(running_sums, inputs, lanes._replace(states=states), 4)
    program = jax.jit(run, donate_argnums=0).lower(lanes.states, inputs, lanes._replace(states=None))
    instructions = program.compile().as_text().splitlines()
    of_lanes = [line for line in instructions if f" = f32[{LANES},2]" in line]
    assert len(of_lanes) > 2
    assert not [line for line in of_lanes if " copy(" in line]


def noise(cfg, lanes, dtype):
    """States of lanes that have been in use."""
    draw = np.random.default_rng(3).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), x.dtype), caches.empty_state(cfg, lanes, dtype))


def rows_of(states, index):
    return jax.tree.map(lambda x: x[index], states)


def assert_same(got, expected, atol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def read_prompts(cfg, weights, text, size):
    """Reads `text` through lanes that hold noise: returns the outputs of all tokens, and each prompt's last state."""
    states = noise(cfg, LANES, text.dtype)
    outputs, last = [], [None] * len(PROMPTS)
    run = jax.jit(lambda x, lanes: mixer(cfg, weights, x[None], lanes))
    for lanes, tokens, prompts in calls(size):
        y, after = run(packed(text, tokens, size), lanes._replace(states=states))
        assert y.dtype == text.dtype
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), states)
        untouched = np.setdiff1d(np.arange(LANES), lanes.lane)
        assert len(untouched) > 0
        assert_same(rows_of(after, untouched), rows_of(states, untouched), atol=0)
        assert np.isfinite(y.astype(jnp.float32)).all()
        outputs.append(y[0, : len(tokens)])
        states = after
        for w, prompt in enumerate(prompts):
            last[prompt] = rows_of(states, lanes.lane[w])
    return np.concatenate(outputs), last


def read_singly(cfg, weights, prompts):
    """Reads prompts side by side, one token of each at a time; returns what `read_prompts` returns."""
    step = jax.jit(lambda x, state: mixer(cfg, weights, x, state))
    state = caches.empty_state(cfg, len(prompts), prompts[0].dtype)
    outputs, last = [[] for _ in prompts], [None] * len(prompts)
    for t in range(max(map(len, prompts))):
        y, state = step(np.stack([prompt[min(t, len(prompt) - 1)] for prompt in prompts])[:, None], state)
        for i, prompt in enumerate(prompts):
            if t < len(prompt):
                outputs[i].append(np.asarray(y[i, 0]))
                last[i] = rows_of(state, i)
    return np.concatenate([np.stack(own) for own in outputs]), last


def text_of(cfg, dtype=np.float32):
    return np.random.default_rng(5).normal(size=(sum(PROMPTS), cfg.hidden_size)).astype(dtype)


def prompts_of(text):
    return np.split(text, np.cumsum(PROMPTS)[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 24, *(pytest.param(each, marks=pytest.mark.proof) for each in (13, 100))])
def test_prompts_in_lanes_equal_one_token_at_a_time(hybrid, size):
    """Cut at many places, or not at all; outputs of all tokens and last states."""
    cfg, weights = hybrid[0], mixer_weights(hybrid[1])
    text = text_of(cfg)
    got, wanted = read_prompts(cfg, weights, text, size), read_singly(cfg, weights, prompts_of(text))
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-5 * np.abs(wanted[0]).max(), rtol=0)
    assert_same(got[1], wanted[1])


@pytest.mark.slow
def test_states_in_lanes_are_float32_in_bfloat16(hybrid):
    """Where a prompt is cut, nothing is rounded that is not rounded in a step too."""
    cfg = hybrid[0]
    weights = {name: jnp.asarray(x, jnp.bfloat16) for name, x in mixer_weights(hybrid[1]).items()}
    text = text_of(cfg, jnp.bfloat16)
    got, wanted = read_prompts(cfg, weights, text, 13), read_singly(cfg, weights, prompts_of(text))
    difference = np.abs(got[0].astype(np.float32) - wanted[0].astype(np.float32))
    assert difference.max() < 0.02 * np.abs(wanted[0].astype(np.float32)).max()
    for own, row in zip(got[1], wanted[1], strict=True):
        assert (own.state.dtype, own.x.dtype) == (jnp.float32, jnp.bfloat16)
        assert_same(own[:3], row[:3], atol=0)
        np.testing.assert_allclose(own.state, row.state, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_decode_continues_from_a_lane(hybrid):
    """One token at a time after each prompt gives what one row of all tokens gives."""
    cfg, weights = hybrid[0], mixer_weights(hybrid[1])
    text = text_of(cfg)
    more = np.random.default_rng(6).normal(size=(len(PROMPTS), 5, cfg.hidden_size)).astype(np.float32)
    state = jax.tree.map(lambda *x: jnp.stack(x), *read_prompts(cfg, weights, text, 13)[1])
    step = jax.jit(lambda x, state: mixer(cfg, weights, x, state))
    outputs = []
    for t in range(5):
        y, state = step(more[:, t : t + 1], state)
        outputs.append(y)
    rows = [np.concatenate(pair) for pair in zip(prompts_of(text), more, strict=True)]
    wanted = np.split(read_singly(cfg, weights, rows)[0], np.cumsum([len(row) for row in rows])[:-1])
    for own, row in zip(np.concatenate(outputs, axis=1), wanted, strict=True):
        np.testing.assert_allclose(own, row[-5:], atol=1e-5 * np.abs(row).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)])
def test_a_mesh_changes_nothing_of_lanes(hybrid, sizes):
    """Each shard of the batch has a packed sequence and lanes of its own; heads and groups are split over `tensor`.

    The parts of the heads are summed at the end of the sublayer, and there is no other communication.
    """
    cfg, weights = hybrid[0], mixer_weights(hybrid[1])
    shards, size = sizes[0] * sizes[1], 24
    text = text_of(cfg)
    inputs = [(packed(text, tokens, size), lanes) for lanes, tokens, _ in list(calls(size))[:shards]]
    inputs = [inputs[i % len(inputs)] for i in range(shards)]
    x, lanes = jax.tree.map(lambda *x: np.concatenate(x), *inputs)
    lanes = lanes._replace(states=noise(cfg, LANES * shards, jnp.float32))

    def run(weights, x, lanes):
        y, states = mixer(cfg, weights, x[None], lanes)
        return y[0], states

    mesh = sharding.make_mesh(config.MeshConfig(*sizes))
    split = PartitionSpec(sharding.RULES["batch"])
    program = jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(PartitionSpec(), split, split),
            out_specs=split,
            axis_names=set(sharding.RULES["batch"]),
            check_vma=False,
        )
    )
    placed = {name: sharding.to_global(w, sharding.param_sharding(mesh, name, True)) for name, w in weights.items()}
    states = [sharding.to_global(s, at) for s, at in zip(lanes.states, caches.shardings(cfg, mesh)[0], strict=True)]
    batch = sharding.to_global((x, lanes._replace(states=None)), sharding.batch_sharding(mesh))
    arguments = placed, batch[0], batch[1]._replace(states=MambaState(*states))
    compiled = program.lower(*arguments).compile()
    y, states = sharding.to_host(compiled(*arguments))
    alone = jax.jit(run)
    for i, (tokens, own) in enumerate(inputs):
        rows = slice(i * LANES, (i + 1) * LANES)
        expected = alone(weights, tokens, own._replace(states=rows_of(lanes.states, rows)))
        assert_same((y[i * size : (i + 1) * size], rows_of(states, rows)), expected, atol=2e-5)
    words = compiled.as_text()
    assert not any(name in words for name in ("all-gather", "all-to-all", "collective-permute"))
    assert ("all-reduce" in words) == (sizes[2] > 1)
