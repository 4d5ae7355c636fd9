"""The update: equal to a plain GRPO step on full logits, whatever the micro-batches, padding, mesh and remat.

The padding id 0 is also the EOS of every finished completion, and stands inside prompts. A gradient is read off Adam's
first moment after one update from a fresh state, so that it has been through all of `update`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from igrpo_jax import config, sharding
from igrpo_jax.batch import Completion, Group, Prompt, Score
from igrpo_jax.learner import Learner, make_optimizer
from igrpo_jax.models import decoder

TEMPERATURE, MAX_CONTEXT, MAX_COMPLETION = 0.9, 20, 16
ROW = MAX_CONTEXT + MAX_COMPLETION  # the only length bucket
GAINS = np.array([[1.0, -0.5], [-2.0, 0.7], [0.3, -1.1]], np.float32)
DEFAULTS = {
    "prompts_per_step": 3,
    "model.dtype": "float32",
    "algorithm.num_drafts": 0,
    "algorithm.num_generations": 2,
    "rollout.temperature": TEMPERATURE,
    "rollout.max_completion_length": MAX_COMPLETION,
    "learner.remat": "none",
    "learner.logprob_chunk": 6,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_ratio": 0.0,
    "optimizer.max_grad_norm": 1e9,
}


def make_groups():
    rng = np.random.default_rng(0)
    groups = []
    for index, (length, sizes) in enumerate({5: (4, 1), 9: (16, 7), 20: (3, 9)}.items()):
        context = rng.integers(0, 64, length, np.int32)
        context[2] = 0
        completions = []
        for i, size in enumerate(sizes):
            finished = size < MAX_COMPLETION
            tokens = rng.integers(1, 64, size, np.int32)
            tokens[-1] = 0 if finished else tokens[-1]
            logprobs = rng.normal(-3, 1, size).astype(np.float32)
            score = Score(float(GAINS[index, i]), {}, None, "ok")
            completions.append(Completion("refine", i, tokens, logprobs, finished, score=score))
        prompt = Prompt(f"{index}", index, "question", "answer", context)
        draft = Completion("draft", 0, context[1:4], np.zeros(3, np.float32), True, score=Score(1.0, {}, None, "ok"))
        groups.append(Group(prompt, (draft,), 0, context, tuple(completions)))  # drafts are no rows
    return groups


def rows_of(groups):
    return [(group.context, one) for group in groups for one in group.completions]


@pytest.fixture(scope="module")
def build(tiny):
    """Learners by their settings, each compiled once."""
    made = {}

    def call(mesh=None, **changes):
        key = repr((mesh, sorted(changes.items())))
        if key not in made:
            tree = config.default()
            tree.update_from_flattened_dict(DEFAULTS | {name.replace("__", "."): x for name, x in changes.items()})
            mesh = sharding.make_mesh(mesh or config.Mesh(), None if mesh else jax.devices()[:1])
            sizes = {"max_context": MAX_CONTEXT, "total_steps": 10}
            reference = put(tiny[1], mesh) if tree.algorithm.beta else None
            made[key] = Learner(config.freeze(tree), tiny[0], mesh, **sizes, reference=reference), mesh
        return made[key]

    return call


def put(params, mesh):
    return {path: jax.device_put(x, sharding.param_sharding(mesh, path)) for path, x in params.items()}


def updated(built, params, groups=None, gains=GAINS, state=None):
    """State and metrics after one rollout's updates, from a fresh state unless one is given."""
    learner, mesh = built
    with jax.set_mesh(mesh):
        state = learner.init(put(params, mesh)) if state is None else state
        return learner.update(state, groups or make_groups(), gains, 1)


def gradient_of(state):
    first_moment = optax.tree_utils.tree_get(state.opt_state, "mu")  # (1 - b1) g
    return {path: np.asarray(x) / np.float32(1 - 0.9) for path, x in first_moment.items()}


def assert_close(got, expected, relative):
    for path, x in expected.items():
        scale = np.abs(x).max()
        np.testing.assert_allclose(got[path], x, atol=relative * scale, rtol=0, err_msg=path)


def layout():
    """Rows by hand: tokens [6, ROW], and the mask [6, ROW - 1] of the positions whose next token is a completion's."""
    tokens, mask = np.zeros((6, ROW), np.int32), np.zeros((6, ROW - 1), bool)
    for i, (context, one) in enumerate(rows_of(make_groups())):
        tokens[i, : len(context)] = context
        tokens[i, len(context) : len(context) + len(one.tokens)] = one.tokens
        mask[i, len(context) - 1 : len(context) + len(one.tokens) - 1] = True
    return tokens, mask


def full_logprobs(c, params, tokens):
    """Log-probs of tokens 1.. [R, S - 1], and entropies, over full logits [R, S, V]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = decoder.logits(c, params, decoder.apply(c, params, tokens, positions)[0])[:, :-1] / TEMPERATURE
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, -1)


@pytest.fixture(scope="module")
def reference_gradient(tiny):
    """Of GRPO on policy, for any mask [6, ROW - 1] and advantages [6]."""

    @jax.jit
    def run(tokens, mask, advantage):
        def loss(params):
            logprob, _ = full_logprobs(tiny[0], params, tokens)
            ratio = jnp.exp(logprob - jax.lax.stop_gradient(logprob))
            a = advantage[:, None]
            value = jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)
            return -jnp.mean(jnp.sum(value * mask, axis=1) / jnp.sum(mask, axis=1))

        return jax.value_and_grad(loss)(tiny[1])

    return run


@pytest.fixture(scope="module")
def base(build, tiny):
    """All rows as one micro-batch on one device."""
    return updated(build(), tiny[1])


def test_the_base_algorithm_is_a_plain_grpo_step(build, tiny, reference_gradient):
    """num_drafts = 0, from rewards to new parameters, against GRPO, a norm clip and AdamW written out."""
    groups, (tokens, mask) = make_groups(), layout()
    rewards = np.stack([group.rewards for group in groups])
    gains = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    loss, gradient = reference_gradient(tokens, mask, gains.reshape(-1))
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient.values()))
    settings = {"optimizer__max_grad_norm": 0.5, "optimizer__weight_decay": 0.1}
    state, metrics = updated(build(**settings), tiny[1], groups, gains)
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.6  # so that the clip is seen below
    clipped = {path: np.asarray(g) * 0.5 / norm for path, g in gradient.items()}
    assert_close(gradient_of(state), clipped, 1e-5)
    for path, old in tiny[1].items():
        g = clipped[path]
        decay = 0.0 if path.endswith(("scale", "bias")) else 0.1
        new = old - 1e-3 * (g / (np.abs(g) + 1e-8) + decay * old)
        # Adam's first step is the sign of the gradient: where that is rounding, any step within the rate is right.
        sure = (np.abs(g) > 1e-4 * np.abs(g).max()) | (g == 0)
        assert sure.mean() > 0.95
        np.testing.assert_allclose(np.asarray(state.params[path])[sure], new[sure], atol=2e-6, rtol=0, err_msg=path)
        assert np.abs(np.asarray(state.params[path]) - new).max() < 2.1e-3


def test_only_completions_carry_loss(base, reference_gradient):
    """Prompt tokens not, the EOS yes, though it is the padding id. The two plausible mistakes are far away."""
    tokens, mask = layout()
    _, expected = reference_gradient(tokens, mask, GAINS.reshape(-1))
    got = gradient_of(base[0])
    assert_close(got, expected, 1e-5)
    with_prompt = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] > 0
    without_eos = mask & (tokens[:, 1:] != 0)
    without_eos[1] = mask[1]  # one token, which is the EOS
    for wrong in (with_prompt, without_eos):
        _, far = reference_gradient(tokens, wrong, GAINS.reshape(-1))
        assert max(np.abs(got[path] - far[path]).max() / np.abs(far[path]).max() for path in got) > 0.05


def test_a_packed_row(build):
    """[context | completion | padding], and a weight of 1 / (6 |o|) at each token of the completion, EOS included."""
    batch = build()[0].pack(rows_of(make_groups()), GAINS.reshape(-1))
    tokens, mask = layout()
    np.testing.assert_array_equal(batch.tokens, tokens[None])
    np.testing.assert_array_equal(batch.context_length, [[5, 5, 9, 9, 20, 20]])
    np.testing.assert_array_equal(batch.completion_length, [[4, 1, 16, 7, 3, 9]])
    np.testing.assert_array_equal(batch.advantage, GAINS.reshape(1, -1))
    lengths = mask.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(batch.weight[0], (np.arange(16) < lengths) / (6 * lengths), rtol=1e-6)
    for row, (_, one) in zip(batch.sampler_logprob[0], rows_of(make_groups()), strict=True):
        np.testing.assert_array_equal(row, np.pad(one.logprobs, (0, 16 - len(one.tokens))))


def test_a_cut_completion_can_be_masked(build):
    batch = build(algorithm__mask_truncated_completions=True)[0].pack(rows_of(make_groups()), GAINS.reshape(-1))
    np.testing.assert_array_equal((batch.weight[0] > 0).sum(axis=1), [4, 1, 0, 7, 3, 9])
    np.testing.assert_array_equal(batch.completion_length, [[4, 1, 16, 7, 3, 9]])  # entropy still covers it


@pytest.mark.parametrize(("rows", "shape"), [(4, (2, 4)), (1, (6, 1))])
def test_micro_batches_add_up(build, tiny, base, rows, shape):
    """4 rows at a time leave two rows of padding; a mean per micro-batch would weigh the rows differently."""
    built = build(learner__tokens_per_microbatch=rows * ROW)
    assert built[0].pack(rows_of(make_groups()), GAINS.reshape(-1)).advantage.shape == shape
    state, metrics = updated(built, tiny[1])
    assert_close(gradient_of(state), gradient_of(base[0]), 5e-6)
    for name, value in base[1].items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_mesh_of_2_2_2_equals_one_device(build, tiny, base):
    """Six rows over four shards of the batch: two are padding."""
    built = build(config.Mesh(data=2, fsdp=2, tensor=2))
    assert built[0].pack(rows_of(make_groups()), GAINS.reshape(-1)).advantage.shape == (1, 8)
    state, metrics = updated(built, tiny[1])
    assert_close(gradient_of(state), gradient_of(base[0]), 1e-5)
    for name, value in base[1].items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    kept = state.params["blocks/0/mixer/q_proj"]  # still in its place: [D, N, H] = (32, 4, 8) over fsdp and tensor
    assert kept.addressable_shards[0].data.shape == (16, 2, 8)


def test_remat_changes_no_gradient(build, tiny, base):
    state, metrics = updated(build(learner__remat="full"), tiny[1])
    assert_close(gradient_of(state), gradient_of(base[0]), 5e-6)
    assert metrics["loss"] == pytest.approx(base[1]["loss"], abs=1e-6)


def test_padding_of_any_kind_changes_nothing(build, tiny, base):
    """Longer rows, wider completions and more rows, and garbage wherever no token of a row stands."""
    learner, mesh = build()
    batch = learner.pack(rows_of(make_groups()), GAINS.reshape(-1))
    real = np.arange(ROW) < (batch.context_length + batch.completion_length)[..., None]
    rest = lambda x: np.pad(x, ((0, 0), (0, 2)))  # noqa: E731
    wide = lambda x, value: np.pad(x, ((0, 0), (0, 2), (0, 3)), constant_values=value)  # noqa: E731
    off = np.arange(19) >= rest(batch.completion_length)[..., None]
    padded = batch._replace(
        tokens=np.pad(np.where(real, batch.tokens, 63), ((0, 0), (0, 2), (0, 9)), constant_values=62),
        context_length=rest(batch.context_length),
        completion_length=rest(batch.completion_length),
        advantage=np.pad(batch.advantage, ((0, 0), (0, 2)), constant_values=5.0),
        weight=wide(batch.weight, 0),
        old_logprob=wide(batch.old_logprob, -7.0),
        sampler_logprob=np.where(off, -7.0, wide(batch.sampler_logprob, 0)),
    )
    with jax.set_mesh(mesh):
        gradient, sums = jax.jit(learner.gradient)(put(tiny[1], mesh), padded, None)
    assert_close(gradient, gradient_of(base[0]), 5e-6)
    tokens = float(sums.tokens)
    assert tokens == sums.loss.tokens == 4 + 1 + 16 + 7 + 3 + 9
    assert float(sums.loss.loss) == pytest.approx(base[1]["loss"], abs=1e-6)
    assert float(sums.entropy) / tokens == pytest.approx(base[1]["entropy"], rel=1e-5)
    name = "sampling/sampling_logp_difference"
    assert float(sums.mismatch) / tokens == pytest.approx(base[1][f"{name}/mean"], rel=1e-5)
    assert float(sums.worst_mismatch) == pytest.approx(base[1][f"{name}/max"], rel=1e-5)


def test_metrics(base, tiny):
    tokens, mask = layout()
    logprob, entropy = jax.jit(lambda params: full_logprobs(tiny[0], params, tokens))(tiny[1])
    sampler = np.concatenate([one.logprobs for _, one in rows_of(make_groups())])
    gap = np.abs(np.asarray(logprob)[mask] - sampler)
    metrics = base[1]
    assert metrics["entropy"] == pytest.approx(np.asarray(entropy)[mask].mean(), rel=1e-5)  # a mean over tokens
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(gap.mean(), rel=1e-5)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(gap.max(), rel=1e-5)
    assert metrics["ratio/mean"] == 1.0  # exactly: with one update per rollout pi_old is the policy
    assert metrics["clip_ratio/region_mean"] == metrics["kl"] == metrics["nonfinite_steps"] == 0
    assert metrics["learning_rate"] == pytest.approx(1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(build, tiny, base, bad):
    gains = GAINS.copy()
    gains[1, 0] = bad
    state, _ = updated(build(), tiny[1])
    before = jax.tree.map(np.array, state)
    state, metrics = updated(build(), tiny[1], gains=gains, state=state)
    for old, new in zip(*map(jax.tree.leaves, (before[:2], state[:2])), strict=True):
        np.testing.assert_array_equal(old, new)  # parameters and both moments, bit for bit
    assert (int(state.step), int(state.skipped), metrics["nonfinite_steps"]) == (2, 1, 1)
    # The next one goes on as if it had not been, its learning rate too.
    state, metrics = updated(build(), tiny[1], state=state)
    straight, expected = updated(build(), tiny[1], state=updated(build(), tiny[1])[0])
    for path, x in straight.params.items():
        np.testing.assert_array_equal(state.params[path], x)
    assert metrics["learning_rate"] == expected["learning_rate"] < 1e-3
    assert (int(state.step), int(state.skipped), metrics["nonfinite_steps"]) == (3, 1, 1)


def test_several_updates_of_one_rollout(build, tiny, monkeypatch):
    """2 minibatches x 2 passes with beta > 0: old log-probs and the reference are those of the first parameters."""
    c, params = tiny
    settings = {"learner__minibatches": 2, "algorithm__num_iterations": 2, "algorithm__beta": 0.1}
    learner, _ = built = build(**settings, optimizer__learning_rate=1e-2)
    seen, update = [], learner._update

    def spy(state, batch, reference):
        before = {path: np.array(x) for path, x in state.params.items()}
        state, metrics = update(state, batch, reference)
        seen.append((before, jax.tree.map(np.asarray, batch), {k: float(v) for k, v in metrics.items()}))
        return state, metrics

    monkeypatch.setattr(learner, "_update", spy)
    _, means = updated(built, params)
    assert len(seen) == 4 == learner.updates_per_step

    first = seen[0][2]
    assert first["ratio/mean"] == pytest.approx(1, abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    score = jax.jit(lambda params, tokens: full_logprobs(c, params, tokens)[0])
    for number, (before, batch, metrics) in enumerate(seen):
        batch = type(batch)(*(x[0] for x in batch))
        lengths, width = batch.completion_length, batch.weight.shape[1]
        mask = np.arange(width) < lengths[:, None]
        at = np.minimum(batch.context_length[:, None] - 1 + np.arange(width), ROW - 2)
        old, now = (np.take_along_axis(np.asarray(score(p, batch.tokens)), at, 1) for p in (params, before))
        np.testing.assert_allclose(batch.old_logprob[mask], old[mask], atol=1e-5, rtol=0)
        assert np.abs(batch.sampler_logprob - old)[mask].min() > 1e-4  # the sampler's own are another thing
        ratio, gain, rho = np.exp(now - old), batch.advantage[:, None], np.exp(old - now)
        k3 = rho - np.log(rho) - 1
        value = np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain) - 0.1 * k3
        loss = -np.mean((value * mask).sum(axis=1) / lengths)  # over the 3 rows of the minibatch
        assert metrics["loss"] == pytest.approx(loss, abs=2e-5)
        assert metrics["kl"] == pytest.approx(k3[mask].mean(), rel=1e-3, abs=1e-7)
        assert metrics["ratio/mean"] == pytest.approx(ratio[mask].mean(), rel=1e-5)
        outside = np.where(gain > 0, ratio > 1.2, ratio < 0.8)[mask]
        assert metrics["clip_ratio/region_mean"] == pytest.approx(outside.mean(), abs=1e-6)
        if number:
            assert np.abs(ratio[mask] - 1).max() > 0.01 and metrics["kl"] > 1e-5
    assert means["kl"] == pytest.approx(np.mean([metrics["kl"] for *_, metrics in seen]), rel=1e-6)

    # Every row once a pass, in an order of the pass's own.
    own = sorted(tuple(row) for row in layout()[0])
    orders = []
    for half in (seen[:2], seen[2:]):
        order = [tuple(row) for _, batch, _ in half for row in batch.tokens[0]]
        assert sorted(order) == own
        orders.append(order)
    assert orders[0] != orders[1]


def test_the_learning_rate():
    """Peak 1e-3, 10 steps, of which 2 rise: half, all, then a cosine to a tenth: at step 6 halfway, 5.5e-4."""
    settings = config.Optimizer(learning_rate=1e-3, warmup_ratio=0.2, min_lr_ratio=0.1)
    _, schedule = make_optimizer(settings, 10)
    expected = {0: 5e-4, 1: 1e-3, 2: 1e-3, 4: 1e-4 + 9e-4 * (2 + np.sqrt(2)) / 4, 6: 5.5e-4, 10: 1e-4, 99: 1e-4}
    for step, rate in expected.items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(rate, rel=1e-5), step
    flat = make_optimizer(config.Optimizer(learning_rate=2e-3, warmup_ratio=0.0, min_lr_ratio=1.0), 10)[1]
    assert {float(flat(jnp.int32(step))) for step in range(12)} == {np.float32(2e-3)}
    one = make_optimizer(config.Optimizer(learning_rate=2e-3, warmup_ratio=1.0), 1)[1]
    assert float(one(jnp.int32(0))) == pytest.approx(2e-3)  # a run of one step learns at the peak


def test_the_schedule_is_what_the_optimizer_uses():
    """Adam moves a lone parameter by the learning rate while its gradient stays the same."""
    settings = config.Optimizer(learning_rate=1e-3, warmup_ratio=0.5, min_lr_ratio=0.1, weight_decay=0.0)
    optimizer, schedule = make_optimizer(settings, 4)
    params = {"q_proj": jnp.ones((1,))}
    state = optimizer.init(params)
    for step in range(5):
        updates, state = optimizer.update({"q_proj": jnp.full((1,), 0.3)}, state, params)
        assert float(updates["q_proj"][0]) == pytest.approx(-float(schedule(jnp.int32(step))), rel=1e-4)


def test_the_schedule_counts_every_optimizer_step(build):
    """10 rollouts of 2 x 2 updates: the floor is reached at 40 and not at 10."""
    learner, _ = build(learner__minibatches=2, algorithm__num_iterations=2, algorithm__beta=0.1)
    assert float(learner._schedule(jnp.int32(10))) > 8e-4
    assert float(learner._schedule(jnp.int32(40))) == pytest.approx(1e-4, rel=1e-5)
