"""The update: equal to a plain GRPO step on full logits, whatever is shared, packed, padded, recomputed or sharded.

The padding id 0 is also the EOS of every finished completion, and stands inside prompts; one context is a single token,
so that its completions have no prefix. A gradient is read off Adam's first moment after one update from a fresh state,
so that it has been through all of `update`.
"""

import dataclasses
import math
import re
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learner_cases import (
    ADVANTAGES,
    CONTEXTS,
    MAX_COMPLETION,
    ROW,
    TEMPERATURE,
    WHOLE,
    G,
    P,
    assert_close,
    gradient_of,
    make_groups,
    make_learner,
    one_batch,
    put,
    updated,
)

from igrpo_jax import config, train
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.compiling import compile_all
from igrpo_jax.learning import diagnostics, objectives
from igrpo_jax.learning.learner import Learner
from igrpo_jax.learning.optimizer import make_optimizer
from igrpo_jax.learning.packing import Unit
from igrpo_jax.learning.update_metrics import mean_over_steps
from igrpo_jax.models import decoder
from igrpo_jax.records import Completion, Score

SEVERAL = {"learner__minibatches": 2, "algorithm__num_iterations": 2, "algorithm__beta": 0.1}
IDLE = ADVANTAGES * np.array([1, 0, 1, 1, 0, 1, 0, 1], np.float32)[:, None]  # three groups without a signal


def rows_of(groups):
    return [(group.context, one) for group in groups for one in group.completions]


@pytest.fixture(scope="module")
def build(tiny):
    """Learners by their settings, each made once. Compiling is what costs: what is compiled alike is shared."""
    made, shared = {}, defaultdict(dict)

    def call(mesh=None, **changes):
        key = repr((mesh, sorted(changes.items())))
        if key not in made:
            reference = tiny[1] if changes.get("algorithm__beta") else None
            learner, mesh = made[key] = make_learner(tiny[0], mesh, reference=reference, **changes)
            programs = learner.programs
            loss = programs.loss_settings(programs.remat)
            update = programs.config.optimizer, learner.optimizer_steps_per_update, programs.stages
            with jax.set_mesh(mesh):
                programs.accumulate._compiled = shared["accumulate", mesh, loss]
                programs.rescore._compiled = shared["rescore", mesh, loss.policy]
                programs.apply._compiled = shared["apply", mesh, update]
                programs.apply.compiled()
        return made[key]

    return call


def accumulated(built, params, batch):
    """Gradient and sums of the arrays of one micro-batch."""
    learner, mesh = built
    with jax.set_mesh(mesh):
        programs = learner.programs
        grads, sums = programs.zeros()
        arrays = (put(params, mesh), grads, sums["refine"], programs.to_devices(batch), {})
        return sharding.to_host(programs.accumulate(*arrays, shape=batch.tokens.shape[1:]))


def weighted_units(learner, advantages=ADVANTAGES):
    units = learner.packer.units(make_groups(), advantages)
    learner.packer.set_weights(units)
    return units


def assert_same_metrics(got, expected, *but):
    """All but what says how the work was cut."""
    for name in expected.keys() - {"perf/padding_frac", "perf/update_flops", *but}:
        assert got[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def layout(rows=None):
    """Rows by hand: tokens [R, ROW], and the mask [R, ROW - 1] of the positions whose next token is a completion's."""
    tokens, mask = np.zeros((P * G, ROW), np.int32), np.zeros((P * G, ROW - 1), bool)
    for i, (context, one) in enumerate(rows or rows_of(make_groups())):
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
def score_in_full(tiny):
    """Log-probs and entropies [R, ROW - 1] of the rows of `layout`, or of other tokens, for any parameters."""
    run, usual = jax.jit(lambda params, tokens: full_logprobs(tiny[0], params, tokens)), layout()[0]
    return lambda params, tokens=usual: [np.asarray(x) for x in run(params, tokens)]


@pytest.fixture(scope="module")
def reference_gradient(tiny):
    """Of GRPO on policy, for any mask [R, ROW - 1], advantages [R], and factors of the tokens [R, ROW - 1].

    The tokens of the rows `shaped` [R] stand in it as p / (p + 0.1), with p the policy's probability.
    """

    @jax.jit
    def run(tokens, mask, advantage, factor=1.0, shaped=False):
        def loss(params):
            logprob, _ = full_logprobs(tiny[0], params, tokens)
            ratio = jnp.exp(logprob - jax.lax.stop_gradient(logprob))
            a = advantage[:, None]
            probability = jnp.exp(logprob)
            clipped = jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)
            credited = jnp.asarray(shaped).reshape(-1, 1)
            value = jnp.where(credited, probability / (probability + 0.1) * a, clipped) * factor
            return -jnp.mean(jnp.sum(value * mask, axis=1) / jnp.sum(mask, axis=1))

        return jax.value_and_grad(loss)(tiny[1])

    return run


@pytest.fixture(scope="module")
def base(build, tiny):
    """All rows as one micro-batch on one device."""
    return updated(build(), tiny[1])


# The algorithm.


@pytest.mark.slow
def test_the_base_algorithm_is_a_plain_grpo_step(build, tiny, reference_gradient):
    """num_drafts = 0, from rewards to new parameters, against GRPO, a norm clip and AdamW written out."""
    groups, (tokens, mask) = make_groups(), layout()
    rewards = np.stack([group.rewards for group in groups])
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    loss, gradient = reference_gradient(tokens, mask, advantages.reshape(-1))
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient.values()))
    settings = {"optimizer__max_grad_norm": 0.5, "optimizer__weight_decay": 0.1}
    state, metrics = updated(build(**settings), tiny[1], groups, advantages)
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


@pytest.mark.slow
def test_only_completions_carry_loss(base, reference_gradient):
    """Prompt tokens not, the EOS yes, though it is the padding id. The two plausible mistakes are far away."""
    tokens, mask = layout()
    _, expected = reference_gradient(tokens, mask, ADVANTAGES.reshape(-1))
    got = gradient_of(base[0])
    assert_close(got, expected, 1e-5)
    with_prompt = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] > 0
    single = mask.sum(axis=1, keepdims=True) == 1  # one token, which is the EOS
    without_eos = mask & ((tokens[:, 1:] != 0) | single)
    for wrong in (with_prompt, without_eos):
        _, far = reference_gradient(tokens, wrong, ADVANTAGES.reshape(-1))
        assert max(np.abs(got[path] - far[path]).max() / np.abs(far[path]).max() for path in got) > 0.05


@pytest.mark.slow
def test_metrics_of_an_update_on_policy_are_those_of_the_full_logits(base, score_in_full, tiny):
    mask = layout()[1]
    logprob, entropy = score_in_full(tiny[1])
    sampler = np.concatenate([one.logprobs for _, one in rows_of(make_groups())])
    gap = np.abs(logprob[mask] - sampler)
    metrics = base[1]
    assert metrics["entropy"] == pytest.approx(entropy[mask].mean(), rel=1e-5)  # a mean over tokens
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(gap.mean(), rel=1e-5)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(gap.max(), rel=1e-5)
    assert metrics["ratio/mean"] == 1.0  # exactly: with one update per rollout pi_old is the policy
    assert metrics["clip_ratio/region_mean"] == metrics["kl"] == metrics["nonfinite_steps"] == 0
    assert metrics["learning_rate"] == pytest.approx(1e-3)
    # Contexts without their last tokens, and completions.
    tokens = sum(CONTEXTS) - P + sum(len(one.tokens) for _, one in rows_of(make_groups()))
    assert metrics["perf/padding_frac"] == pytest.approx(1 - tokens / (384 + 128))  # the cheapest sizes that hold them
    assert metrics["perf/idle_frac"] == 0


# Shared prefixes.


def test_a_group_runs_its_context_once(build):
    """Its tokens are those of the context and of its completions; where nothing is shared, each has its own context."""
    completions = sum(len(one.tokens) for _, one in rows_of(make_groups()))
    for share, contexts in ((True, 1), (False, G)):
        packer = build(learner__shared_prefix=share)[0].packer
        batches = packer.micro_batches(packer.units(make_groups(), ADVANTAGES))
        tokens = sum((packer.fill(batch).segments.segment > 0).sum() for batch in batches)
        assert tokens == completions + contexts * (sum(CONTEXTS) - P)


@pytest.mark.slow
def test_shared_equals_unshared(build, tiny, base):
    state, metrics = updated(build(learner__shared_prefix=False), tiny[1])
    assert_close(gradient_of(state), gradient_of(base[0]), 1e-5)
    assert_same_metrics(metrics, base[1])


@pytest.mark.proof
@pytest.mark.slow
def test_a_hybrid_shared_equals_unshared(hybrid):
    """The states after a context are those that all its completions start from."""
    make = lambda share: make_learner(hybrid[0], learner__shared_prefix=share, learner__remat="full")
    (shared, metrics), (unshared, expected) = (updated(make(share), hybrid[1]) for share in (True, False))
    assert_close(gradient_of(shared), gradient_of(unshared), 2e-5)
    assert_same_metrics(metrics, expected)
    assert all(np.abs(x).max() > 1e-7 for x in gradient_of(shared).values())


@pytest.mark.slow
def test_what_does_not_decay(hybrid):
    """With a gradient of zero, the only update is the decay."""
    optimizer, _ = make_optimizer(config.OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0, weight_decay=0.1), 10)
    params = {path: np.ones_like(x) for path, x in hybrid[1].items()}
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    kept = {path.rpartition("/")[2] for path, x in updates.items() if not np.asarray(x).any()}
    assert kept == {"scale", "gated_scale", "x_conv_bias", "b_conv_bias", "c_conv_bias", "dt_bias", "a_log", "skip"}


# With the clips of one, GRPO, Dr. GRPO and DAPO differ in the weights of tokens alone.
OBJECTIVES = {
    **{name: {"algorithm__loss_type": name, "algorithm__epsilon_high": 0.28} for name in ("grpo", "dr_grpo", "dapo")},
    "gspo": {"algorithm__loss_type": "gspo"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [pytest.param(name, marks=() if name in ("grpo", "gspo") else pytest.mark.proof) for name in OBJECTIVES],
)
def test_shared_equals_unshared_off_policy(build, tiny, score_in_full, objective):
    """With a log pi_old that is a little off the policy's, so that tokens are clipped on both sides."""
    rng, mask = np.random.default_rng(3), layout()[1]
    near = 1e-3 if objective == "gspo" else 0.5
    old = [row[real] + near * rng.normal() for row, real in zip(score_in_full(tiny[1])[0], mask, strict=True)]
    results = []
    for share in (True, False):
        built = build(learner__shared_prefix=share, algorithm__num_iterations=2, **OBJECTIVES[objective])
        packer = built[0].packer
        units = weighted_units(built[0])
        for i, unit in enumerate(units):
            size = packer.shapes.completions_per_unit
            unit.old = old[i * size : (i + 1) * size]
        results.append(accumulated(built, tiny[1], one_batch(packer, units, WHOLE if share else 2 * WHOLE)))
    (shared, sums), (alone, others) = results
    assert_close(shared, alone, 1e-5)
    assert 0.1 < sums.loss_sums.clipped / (1 if objective == "gspo" else sums.loss_sums.tokens) < 0.9
    for got, expected in zip(jax.tree.leaves(sums), jax.tree.leaves(others), strict=True):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


# Cutting into micro-batches.


ONE = 19 + G * 18  # tokens of the longest unit


@pytest.mark.slow
def test_micro_batches_add_up(build, tiny, base):
    """Of one unit or two, of all sizes. A mean per micro-batch would weigh the rows of each differently."""
    learner, _ = built = build(learner__tokens_per_microbatch=2 * ONE)
    batches = learner.packer.micro_batches(learner.packer.units(make_groups(), ADVANTAGES))
    assert len(batches) > 2 and len({batch.size for batch in batches}) > 1
    state, metrics = updated(built, tiny[1])
    assert_close(gradient_of(state), gradient_of(base[0]), 5e-6)
    assert_same_metrics(metrics, base[1])


@pytest.mark.slow
def test_padding_of_any_kind_changes_nothing(build, tiny, base):
    """A longer packed sequence, and garbage wherever no token stands."""
    learner, _ = build()
    padded = one_batch(learner.packer, weighted_units(learner), WHOLE + 128)
    padding, off = padded.segments.segment == 0, ~padded.mask
    assert padding.sum() > 128
    garbage = lambda x, where, value: np.where(where, x.dtype.type(value), x)
    padded = padded._replace(
        tokens=garbage(padded.tokens, padding, 63),
        targets=garbage(padded.targets, off, 59),
        advantage=garbage(padded.advantage, off, 5.0),
        entropy_weight=garbage(padded.entropy_weight, off, 5.0),
        old_logprob=garbage(padded.old_logprob, off, -7.0),
        reference_logprob=garbage(padded.reference_logprob, off, -7.0),
        sampler_logprob=garbage(padded.sampler_logprob, off, -7.0),
    )
    gradient, sums = accumulated(build(), tiny[1], padded)
    assert_close(gradient, gradient_of(base[0]), 5e-6)
    tokens = sum(len(one.tokens) for _, one in rows_of(make_groups()))
    assert sums.tokens == sums.loss_sums.tokens == tokens
    assert float(sums.loss_sums.loss) == pytest.approx(base[1]["loss"], abs=1e-6)
    assert float(sums.entropy) / tokens == pytest.approx(base[1]["entropy"], rel=1e-5)
    name = "sampling/sampling_logp_difference"
    assert float(sums.mismatch) / tokens == pytest.approx(base[1][f"{name}/mean"], rel=1e-5)
    assert float(sums.largest_mismatch) == pytest.approx(base[1][f"{name}/max"], rel=1e-5)


@pytest.mark.slow
def test_lengths_that_vary_compile_nothing(build, tiny):
    """All sizes are known before the first step, and nothing else is compiled after it."""
    learner, mesh = built = build(learner__tokens_per_microbatch=2 * ONE)
    steps = [make_groups(seed, longest=5 + seed) for seed in range(8)]
    batches = [learner.packer.micro_batches(learner.packer.units(groups, IDLE)) for groups in steps]
    sizes = {batch.size for of_step in batches for batch in of_step}
    assert 1 < len(sizes) <= 3 and sizes <= set(learner.packer.shapes.sizes)
    with jax.set_mesh(mesh):
        state = learner.init(put(tiny[1], mesh))
    compile_all(learner.programs.program_shapes)
    state, _ = updated(built, tiny[1], make_groups(), ADVANTAGES, state)
    with train.compilations() as compiled:
        for groups in steps:
            state, _ = updated(built, tiny[1], groups, IDLE, state)
    assert compiled == []


@pytest.mark.slow
def test_no_completion_sees_another(build, tiny):
    """With other tokens in one completion, the log-probs of all others are equal to the last bit."""
    learner, mesh = build(learner__tokens_per_microbatch=2 * ONE)
    units = learner.packer.units(make_groups(), ADVANTAGES)
    changed = dataclasses.replace(units[2].completions[1], tokens=(units[2].completions[1].tokens + 7) % 64)
    others = list(units)
    others[2] = dataclasses.replace(units[2], completions=(units[2].completions[0], changed, *units[2].completions[2:]))
    with jax.set_mesh(mesh):
        params = put(tiny[1], mesh)
        before, after = (learner.rescored(params, of) for of in (units, others))
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        for j, (x, y) in enumerate(zip(old, new, strict=True)):
            assert np.array_equal(x, y) == ((i, j) != (2, 1))


# Meshes.

MESHES = {"2x2x2": config.MeshConfig(2, 2, 2), "1x4x2": config.MeshConfig(1, 4, 2), "8x1x1": config.MeshConfig(8, 1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [pytest.param(name, marks=() if name == "2x2x2" else pytest.mark.proof) for name in MESHES]
)
def test_a_mesh_equals_one_device(build, tiny, base, mesh):
    """Whole groups on each shard of the batch: one or two."""
    learner, _ = built = build(MESHES[mesh])
    assert learner.packer.shapes.completions_per_unit == G
    state, metrics = updated(built, tiny[1])
    assert_close(gradient_of(state), gradient_of(base[0]), 1e-5)
    assert_same_metrics(metrics, base[1])
    kept = state.params["blocks/0/mixer/q_proj"]  # still in its place: [D, N, H] = (32, 4, 8) over fsdp and tensor
    local = {"2x2x2": (16, 2, 8), "1x4x2": (8, 2, 8), "8x1x1": (32, 4, 8)}[mesh]
    assert kept.addressable_shards[0].data.shape == local


@pytest.mark.slow
def test_a_loop_over_sublayers_on_a_mesh(tiny, base, monkeypatch):
    """The stacked weights and their gradients lie over fsdp and tensor as each of them does. Not only in bfloat16."""
    monkeypatch.setattr(decoder, "_repeats", lambda kinds, dtype, remat: decoder.stretches(kinds))
    state, metrics = updated(make_learner(tiny[0], MESHES["2x2x2"], learner__remat="full"), tiny[1])
    assert_close(gradient_of(state), gradient_of(base[0]), 1e-5)
    assert_same_metrics(metrics, base[1])


@pytest.mark.slow
def test_groups_are_split_where_shards_would_have_none(build, tiny, reference_gradient):
    """4 groups of 4 on 8 shards: each runs half a group."""
    learner, _ = built = build(MESHES["8x1x1"], prompts_per_step=4)
    (batch,) = learner.packer.micro_batches(learner.packer.units(make_groups()[:4], ADVANTAGES[:4]))
    assert [[piece.prefix_group.completions for piece in pieces] for pieces in batch.shards if len(pieces) != 1] == []
    state, metrics = updated(built, tiny[1], make_groups()[:4], ADVANTAGES[:4])
    tokens, mask = layout()
    advantages = np.where(np.arange(P)[:, None] < 4, ADVANTAGES, 0).reshape(-1)
    loss, expected = reference_gradient(tokens, mask, 2 * advantages)  # a mean over 16 rows and not 32
    assert_close(gradient_of(state), expected, 1e-5)
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-6)


def gathered(text):
    """Shapes that collectives put together of their parts, each with its sizes sorted, without those of 1."""
    lines = [line for line in text.splitlines() if re.search(r" all-(gather|to-all)(-start)?\(", line)]
    shapes = [shape for line in lines for shape in re.findall(r"\w\d+\[([\d,]*)\]", line.split("(")[0])]
    return {tuple(sorted(int(x) for x in shape.split(",") if x and x != "1")) for shape in shapes}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full", pytest.param("logits", marks=pytest.mark.proof)])
def test_only_weights_are_gathered(tiny, remat):
    """The constraints hold on virtual devices too: weights travel over fsdp, and of activations only sums.

    On CPUs the sums over the two parts of the vocabulary are gathered and then added, elsewhere they are reduced.
    Sizes of which none is another: 112 words (56 a shard), 192 tokens, chunks of 42.
    """
    cfg, size = dataclasses.replace(tiny[0], vocab_size=112, attention="chunked"), 192
    changes = {"learner__logprob_chunk": 42, "learner__remat": remat}
    changes |= {"model__dtype": "bfloat16"} if remat == "full" else {}  # sublayers as a loop
    learner, mesh = make_learner(cfg, MESHES["2x2x2"], **changes)
    with jax.set_mesh(mesh):
        text = learner.programs.accumulate.compiled(size).as_text()
    weights = set()
    for path, shape in decoder.shapes(cfg).items():
        local = sharding.param_sharding(mesh, path, gathered=True).shard_shape(shape)
        weights.add(tuple(sorted(x for x in local if x != 1)))
    sums = {(2, 42)} if jax.default_backend() == "cpu" else set()
    assert gathered(text) - sums and gathered(text) <= weights | sums
    # Each device has the logits of its own tokens and words only, of a chunk unless all are kept, and keys of its own
    # heads.
    logits = re.findall(r"f32\[((?:\d+,)+)56\]|f32\[56,((?:\d+,)*\d+)\]", text)
    positions = {np.prod([int(n) for n in (first or last).split(",") if n]) for first, last in logits}
    assert max(positions) == (5 * 42 if remat == "none" else 42)
    assert not re.search(r"\[(\d+,)+112\]|\[112,(\d+,)+", text.replace("[32,112]", "").replace("[112,32]", ""))
    assert re.search(r"\[1,192,2,8\]", text) and not re.search(r"\[(\d+,)*192,4,8\]", text)


# What the backward pass recomputes.


@pytest.mark.slow
def test_remat(build, tiny):
    """The compiler may undo a recomputation that was asked for: hence its memory."""
    memory, gradient, sums = {}, {}, {}
    cfg = dataclasses.replace(tiny[0], attention="chunked")
    for remat in ("none", "logits", "dots", "full"):
        learner, _ = built = make_learner(cfg, learner__remat=remat)
        batch = one_batch(learner.packer, weighted_units(learner))
        gradient[remat], sums[remat] = accumulated(built, tiny[1], batch)
        memory[remat] = learner.programs.accumulate.compiled(WHOLE).memory_analysis().temp_size_in_bytes
    for remat in ("logits", "dots", "full"):
        assert_close(gradient[remat], gradient["none"], 5e-6)
        assert float(sums[remat].loss_sums.loss) == pytest.approx(float(sums["none"].loss_sums.loss), abs=1e-6)
    assert all(np.abs(g).max() > 0 for g in gradient["none"].values())
    assert memory["full"] < memory["dots"] < memory["logits"] < memory["none"], memory
    assert memory["full"] < 0.6 * memory["none"], memory


# Groups without a signal.

MISMATCH = [f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max")]


@pytest.fixture(scope="module")
def sampled_groups(score_in_full, tiny):
    """The groups of `make_groups`, each completion with the entropy that its sampler had: that of the full logits."""
    entropy, mask = score_in_full(tiny[1])[1], layout()[1]
    sums = iter((entropy * mask).sum(axis=1).tolist())
    with_entropy = lambda one: dataclasses.replace(one, entropy=next(sums))
    return [
        dataclasses.replace(group, completions=tuple(map(with_entropy, group.completions))) for group in make_groups()
    ]


@pytest.mark.slow
def test_groups_without_a_signal_cost_nothing(build, tiny, sampled_groups, monkeypatch):
    """Three of eight. A gain of 1e-30 has no gradient either, but is run."""
    learner, _ = built = build()
    monkeypatch.setattr(learner.programs, "rescore", None)
    state, metrics = updated(built, tiny[1], sampled_groups, advantages=IDLE)
    tiny_gains = np.where(IDLE == 0, np.float32(1e-30), IDLE)
    expected, others = updated(build(), tiny[1], sampled_groups, advantages=tiny_gains)
    assert_close(gradient_of(state), gradient_of(expected), 5e-6)
    assert_same_metrics(metrics, others, "perf/idle_frac", *MISMATCH)
    size = lambda unit: sum(len(one.tokens) for one in unit.completions)
    idle = [not gain.any() for gain in IDLE]
    units = build()[0].packer.units(make_groups(), IDLE)
    share = sum(size(unit) for unit, skip in zip(units, idle, strict=True) if skip) / sum(map(size, units))
    assert metrics["perf/idle_frac"] == pytest.approx(share) and others["perf/idle_frac"] == 0
    flops = build()[0].programs.costs.model.useful_flops
    work = [flops(len(unit.context), [len(one.tokens) for one in unit.completions], 1) for unit in units]
    assert others["perf/update_flops"] == pytest.approx(3 * sum(work))
    assert metrics["perf/update_flops"] == pytest.approx(np.dot(np.where(idle, 0, 3), work))
    run = sum(unit.tokens for unit, skip in zip(units, idle, strict=True) if not skip)
    batches = build()[0].packer.micro_batches([unit for unit, skip in zip(units, idle, strict=True) if not skip])
    assert metrics["perf/padding_frac"] == pytest.approx(1 - run / sum(batch.padded_tokens for batch in batches))


@pytest.mark.slow
def test_the_sampler_is_compared_with_groups_that_have_a_signal(build, tiny, score_in_full):
    mask, logprob = layout()[1], score_in_full(tiny[1])[0]
    _, metrics = updated(build(), tiny[1], advantages=IDLE)
    gaps = [
        np.abs(logprob[row][mask[row]] - one.logprobs)
        for row, (_, one) in enumerate(rows_of(make_groups()))
        if IDLE[row // G].any()
    ]
    assert metrics[MISMATCH[0]] == pytest.approx(np.concatenate(gaps).mean(), rel=1e-5)
    assert metrics[MISMATCH[1]] == pytest.approx(np.concatenate(gaps).max(), rel=1e-5)


def test_metrics_of_minibatches_leave_out_what_was_not_compared_and_nothing_else():
    mean, largest = MISMATCH[0], MISMATCH[1]
    steps = [
        {"learning_rate": 1.0, "nonfinite_steps": 0, "loss": 1.0, mean: 0.25, largest: 2.0, "draft/kl": 3.0},
        {"learning_rate": 2.0, "nonfinite_steps": 1, "loss": math.nan, mean: math.nan, largest: math.nan},
    ]
    merged = mean_over_steps(steps)
    assert (merged[mean], merged[largest], merged["draft/kl"]) == (0.25, 2.0, 3.0)
    assert (merged["learning_rate"], merged["nonfinite_steps"]) == (2.0, 1.0) and math.isnan(merged["loss"])
    assert math.isnan(mean_over_steps(steps[1:])[largest])


@pytest.mark.slow
def test_groups_without_a_signal_off_policy(build, tiny, sampled_groups, monkeypatch):
    """Log pi_old is computed for the others alone.

    The two runs are a rounding apart, which Adam's second step magnifies; the entropy of groups without a signal is
    that of their sampler in the second pass too.
    """
    learner, _ = built = build(algorithm__num_iterations=2, **OBJECTIVES["dapo"])
    rescored, rescore = [], learner.rescored
    with monkeypatch.context() as patched:
        patched.setattr(learner, "rescored", lambda params, units: rescored.extend(units) or rescore(params, units))
        _, metrics = updated(built, tiny[1], sampled_groups, advantages=IDLE)
    assert len(rescored) == IDLE.any(axis=1).sum() < len(IDLE)
    tiny_gains = np.where(IDLE == 0, np.float32(1e-30), IDLE)
    _, others = updated(built, tiny[1], sampled_groups, advantages=tiny_gains)
    # Log pi_old, then forward and backward twice.
    once = updated(build(), tiny[1])[1]["perf/update_flops"] / 3
    assert others["perf/update_flops"] == pytest.approx(7 * once)
    trained = updated(build(), tiny[1], advantages=IDLE)[1]["perf/update_flops"] / 3
    assert metrics["perf/update_flops"] == pytest.approx(7 * trained) and trained < once
    assert metrics["entropy"] == pytest.approx(others["entropy"], rel=1e-3)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(others["clip_ratio/region_mean"], abs=0.02)


@pytest.mark.slow
def test_a_step_without_any_signal_goes_on(build, tiny, base):
    """Adam's momentum moves the parameters: 0.9 m / (1 - 0.9^2) over the root of 0.999 v / (1 - 0.999^2)."""
    state, _ = updated(build(), tiny[1])
    before = jax.tree.map(np.array, state)
    state, metrics = updated(build(), tiny[1], advantages=np.zeros_like(ADVANTAGES), state=state)
    assert {name for name, value in metrics.items() if not np.isfinite(value)} == set(MISMATCH)  # no row to compare
    assert metrics["loss"] == metrics["grad_norm"] == metrics["nonfinite_steps"] == metrics["perf/padding_frac"] == 0
    assert metrics["perf/idle_frac"] == metrics["ratio/mean"] == 1
    assert (int(state.step), int(state.skipped)) == (2, 0)
    mu, nu = (optax.tree_utils.tree_get(before.opt_state, name)["lm_head"] for name in ("mu", "nu"))
    step = (0.9 * mu / (1 - 0.9**2)) / (np.sqrt(0.999 * nu / (1 - 0.999**2)) + 1e-8)
    expected = before.params["lm_head"] - metrics["learning_rate"] * step
    np.testing.assert_allclose(state.params["lm_head"], expected, atol=1e-6, rtol=0)
    assert np.abs(step).max() > 0.5


def test_drafts_are_compared_to_their_sampler(build, tiny, score_in_full):
    """The first that a micro-batch holds. Here they are refinements."""
    groups, mask = make_groups(), layout()[1]
    drafted = [dataclasses.replace(group, drafts=(*group.completions, *group.completions[:2])) for group in groups]
    (logprob, _), first, tokens = score_in_full(tiny[1]), [], 0
    for i, group in enumerate(drafted):
        for j, one in enumerate(group.drafts):
            row, tokens = i * G + j % G, tokens + len(group.prompt.tokens) - 1 + len(one.tokens)
            if tokens <= WHOLE:
                first.append(np.abs(logprob[row][mask[row]] - one.logprobs))
    assert 20 < len(first) < P * (G + 2)
    learner, mesh = build()
    with jax.set_mesh(mesh):
        found = diagnostics.draft_mismatch(learner, put(tiny[1], mesh), drafted)
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.delattr(learner, "_frozen")  # without drafts nothing is run
        undrafted = [dataclasses.replace(groups[0], drafts=())]
        assert diagnostics.draft_mismatch(learner, put(tiny[1], mesh), undrafted) == {}
    first = np.concatenate(first)
    assert found["sampling/draft_logp_difference/mean"] == pytest.approx(first.mean(), rel=1e-5)
    assert found["sampling/draft_logp_difference/max"] == pytest.approx(first.max(), rel=1e-5)


# The entropy bonus.


@pytest.mark.slow
def test_the_entropy_bonus(build, tiny):
    """Loss and gradient against full logits, of groups without an advantage as well: they are not skipped."""
    tokens, mask = layout()
    advantages, coefficient = IDLE.reshape(-1, 1), 0.7

    def loss(params):
        logprob, entropy = full_logprobs(tiny[0], params, tokens)
        policy = jnp.mean(
            jnp.sum(jnp.exp(logprob - jax.lax.stop_gradient(logprob)) * advantages * mask, 1) / mask.sum(1)
        )
        return -policy - coefficient * jnp.sum(entropy * mask) / mask.sum()

    expected, gradient = jax.jit(jax.value_and_grad(loss))(tiny[1])
    for changes in ({}, {"learner__tokens_per_microbatch": ONE}):
        state, metrics = updated(build(algorithm__entropy_coef=coefficient, **changes), tiny[1], advantages=IDLE)
        assert metrics["loss"] == pytest.approx(float(expected), abs=1e-5)
        assert_close(gradient_of(state), gradient, 1e-5)
        assert metrics["perf/idle_frac"] == 0
    plain, _ = updated(build(), tiny[1], advantages=IDLE)
    apart = [np.abs(x - gradient_of(state)[path]).max() / np.abs(x).max() for path, x in gradient_of(plain).items()]
    assert max(apart) > 0.05


# Drafts that are trained on.

N = 2


def with_drafts(groups, left_out=()):
    """Two drafts each, on plain prompts that are not the contexts; the second group has equal rewards."""
    rng = np.random.default_rng(9)
    rewards = np.array([[1, 0], [1, 1], [0, 2], [3, 1], [1, 0], [0, 1], [2, 0], [0, 1]], np.float32)
    result = []
    for group, own in zip(groups, rewards, strict=True):
        prompt = dataclasses.replace(group.prompt, tokens=rng.integers(0, 64, rng.integers(1, 12), np.int32))
        drafts = []
        for i, reward in enumerate(own):
            tokens = rng.integers(1, 64, rng.integers(1, MAX_COMPLETION), np.int32)
            logprobs = np.full(len(tokens), -3, np.float32)
            drafts.append(Completion("draft", i, tokens, logprobs, True, score=Score(float(reward), {}, None, "ok")))
        drafts = () if group.prompt.index in left_out else tuple(drafts)
        result.append(dataclasses.replace(group, prompt=prompt, drafts=drafts))
    return result


def rows_with_drafts(groups):
    """Tokens [R, ROW] and mask [R, ROW - 1] of refinements, then drafts; advantages of the drafts by hand."""
    tokens, mask = layout()
    drafts = [(group.prompt.tokens, one) for group in groups for one in group.drafts]
    more, marked = np.zeros((len(drafts), ROW), np.int32), np.zeros((len(drafts), ROW - 1), bool)
    for i, (context, one) in enumerate(drafts):
        end = len(context) + len(one.tokens)
        more[i, :end], marked[i, len(context) - 1 : end - 1] = [*context, *one.tokens], True
    rewards = np.array([[one.score.reward for one in group.drafts] for group in groups if group.drafts])
    spread = rewards.std(1, ddof=1, keepdims=True)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (spread + 1e-4)  # equal ones give 0 / 1e-4 = 0
    return np.concatenate([tokens, more]), np.concatenate([mask, marked]), advantages.reshape(-1).astype(np.float32)


def test_how_much_right_refinements_rely_on_their_draft(build, tiny):
    """log pi(o | q') - log pi(o | q) over full logits, of the right refinements that a micro-batch holds."""
    groups, right = [], {"accuracy": 1.0}
    for group in with_drafts(make_groups()):  # the context of one of them is shorter than its prompt
        is_right = [i != 2 and len(group.context) > 1 for i in range(G)]
        scores = [
            dataclasses.replace(x.score, rewards=right if y else {})
            for x, y in zip(group.completions, is_right, strict=True)
        ]
        marked = [dataclasses.replace(x, score=y) for x, y in zip(group.completions, scores, strict=True)]
        groups.append(dataclasses.replace(group, completions=tuple(marked)))
    groups[3] = dataclasses.replace(groups[3], kept=None)  # the plain prompt was refined
    groups *= 3  # more than a micro-batch holds
    rows = [
        (group.context, group.prompt.tokens, x.tokens)
        for i, group in enumerate(groups)
        for j, x in enumerate(group.completions)
        if i % P not in (1, 3) and j != 2
    ]
    held = np.cumsum([len(context) - 1 + len(answer) for context, _, answer in rows]) <= WHOLE
    assert 10 < sum(held) < len(rows)
    rows = [row for row, is_held in zip(rows, held, strict=True) if is_held]
    tokens, mask = np.zeros((2, len(rows), ROW), np.int32), np.zeros((2, len(rows), ROW - 1), bool)
    for i, (*contexts, answer) in enumerate(rows):
        for k, context in enumerate(contexts):
            end = len(context) + len(answer)
            tokens[k, i, :end], mask[k, i, len(context) - 1 : end - 1] = [*context, *answer], True
    logprob = full_logprobs(tiny[0], tiny[1], tokens.reshape(-1, ROW))[0].reshape(mask.shape)
    after, before = np.sum(np.where(mask, logprob, 0.0), axis=2)
    learner, mesh = build()
    with jax.set_mesh(mesh):
        found = diagnostics.reliance(learner, put(tiny[1], mesh), groups)
        assert diagnostics.reliance(learner, put(tiny[1], mesh), make_groups()) == {}  # none is right
    assert found == {"refine/reliance": pytest.approx(np.mean(after - before), abs=1e-3)}
    assert np.abs(after - before).max() > 0.1


DRAFTED = {"algorithm__train_drafts": True, "algorithm__num_drafts": N}
VERIFYING = {
    "algorithm__second_stage": "verify",
    "algorithm__draft_selection": "random",
    "refine__instruction": "{draft} is right:",
}


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [(), (0, 5)])
def test_drafts_can_be_rows_too(build, tiny, base, reference_gradient, left_out):
    """8 x 4 refinements and 8 x 2 drafts in one mean over 48 rows; TRL's names stay those of the refinements.

    The mistakes: a baseline over the six of a prompt, or drafts on q', which both have another gradient.
    """
    groups = with_drafts(make_groups(), left_out=left_out)
    tokens, mask, advantages = rows_with_drafts(groups)
    assert len(tokens) == P * G + (P - len(left_out)) * N
    loss, expected = reference_gradient(tokens, mask, np.concatenate([ADVANTAGES.reshape(-1), advantages]))
    learner, _ = built = build(**DRAFTED)
    assert learner.packer.shapes.completions_per_unit == 2
    state, metrics = updated(built, tiny[1], groups)
    assert_close(gradient_of(state), expected, 1e-5)
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-6)
    assert_same_metrics(metrics, base[1], "loss", "grad_norm")
    assert metrics["draft/kl"] == metrics["draft/clip_ratio"] == 0


@pytest.mark.slow
def test_verifications_and_solutions_are_rows_alike(build, tiny):
    """The update is that of drafts and refinements with these tokens; TRL's names are those of the solutions."""
    groups = with_drafts(make_groups())
    groups[2] = dataclasses.replace(groups[2], kept=None, completions=())  # all its solutions are alike
    advantages = [own[: len(group.completions)] for own, group in zip(ADVANTAGES, groups, strict=True)]
    refined, measured = updated(build(**DRAFTED), tiny[1], groups, advantages)
    renamed = [
        dataclasses.replace(group, completions=tuple(dataclasses.replace(x, stage="verify") for x in group.completions))
        for group in groups
    ]
    state, metrics = updated(build(**DRAFTED, **VERIFYING), tiny[1], renamed, advantages)
    assert_close(gradient_of(state), gradient_of(refined), 1e-5)
    assert metrics["loss"] == pytest.approx(measured["loss"], abs=1e-6)
    *_, weights = rows_with_drafts(groups)
    alone = build(algorithm__num_drafts=0, algorithm__num_generations=N)
    solved = [
        dataclasses.replace(
            group.of_drafts, completions=tuple(dataclasses.replace(x, stage="refine") for x in group.drafts)
        )
        for group in groups
    ]
    _, of_solutions = updated(alone, tiny[1], solved, weights.reshape(P, N))
    names = [name for name in of_solutions if name not in ("loss", "grad_norm") and not name.startswith("perf/")]
    assert {"entropy", "kl", "ratio/mean", MISMATCH[0]} <= set(names)
    for name in names:
        assert metrics[name] == pytest.approx(of_solutions[name], rel=1e-5, abs=1e-6), name
    assert metrics["entropy"] != pytest.approx(measured["entropy"], rel=1e-3)
    assert metrics["verify/kl"] == metrics["verify/clip_ratio"] == 0 and "draft/kl" not in metrics
    learner, mesh = build(**DRAFTED, **VERIFYING)
    is_right = {"accuracy": 1.0}
    for group in renamed:
        for x in group.completions:
            x.score.rewards.update(is_right)
    with jax.set_mesh(mesh):
        # A verdict is no answer to the plain prompt.
        assert diagnostics.reliance(learner, put(tiny[1], mesh), renamed) == {}


@pytest.mark.slow
def test_without_drafts_there_are_none_to_train_on(build, tiny, base):
    state, metrics = updated(
        build(algorithm__train_drafts=True), tiny[1], [dataclasses.replace(group, drafts=()) for group in make_groups()]
    )
    assert_close(gradient_of(state), gradient_of(base[0]), 5e-6)
    assert_same_metrics(metrics, base[1])
    assert not [name for name in metrics if name.startswith("draft/")]


@pytest.mark.slow
def test_every_minibatch_has_its_share_of_drafts(build, tiny, monkeypatch):
    """2 minibatches x 2 passes: 8 of the 16 units of refinements and 4 of the 8 of drafts each, every one once a pass.

    The groups are dealt out as without drafts.
    """
    learner, _ = built = build(**DRAFTED, **SEVERAL, optimizer__learning_rate=1e-2)
    seen, update = [], learner._optimizer_step

    def spy(state, units):
        seen.append(list(units))
        return update(state, units)

    monkeypatch.setattr(learner, "_optimizer_step", spy)
    _, metrics = updated(built, tiny[1], with_drafts(make_groups()))
    assert len(seen) == 4
    for units in seen:
        assert [unit.stage for unit in units] == ["refine"] * 8 + ["draft"] * 4
        assert sum(unit.weight.sum() for unit in units) > 0
    for first, second in (seen[:2], seen[2:]):
        assert len({id(unit) for unit in (*first, *second)}) == 24
    assert metrics["draft/kl"] > 0 and np.isfinite(metrics["loss"])


# Steps that go wrong.


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(build, tiny, base, bad):
    advantages = ADVANTAGES.copy()
    advantages[1, 0] = bad
    state, _ = updated(build(), tiny[1])
    before = jax.tree.map(np.array, state)
    state, metrics = updated(build(), tiny[1], advantages=advantages, state=state)
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


@pytest.mark.slow
def test_a_batch_that_was_cut_whole_changes_nothing(build, tiny):
    """No completion ended, and those that did not carry no loss: a new optimizer has nothing to go on with."""
    cut = [
        dataclasses.replace(
            group, completions=tuple(dataclasses.replace(one, finished=False) for one in group.completions)
        )
        for group in make_groups()
    ]
    state, metrics = updated(build(algorithm__mask_truncated_completions=True), tiny[1], cut)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["nonfinite_steps"] == metrics["entropy"] == 0
    assert {name for name, value in metrics.items() if not np.isfinite(value)} == set(MISMATCH)  # no row to compare
    for path, value in tiny[1].items():
        np.testing.assert_array_equal(state.params[path], value)


@pytest.mark.slow
def test_completions_without_a_token_and_groups_without_a_verdict_change_nothing(build, tiny):
    """Their gradient is none, and the rest of the batch learns what it learned, but for its share of all rows."""
    groups, advantages = make_groups(), ADVANTAGES.copy()
    empty = Completion(
        "refine", 0, np.zeros(0, np.int32), np.zeros(0, np.float32), True, score=Score(1.0, {}, None, "ok")
    )
    groups[2] = dataclasses.replace(groups[2], completions=(empty,) * G)
    groups[3] = dataclasses.replace(
        groups[3],
        completions=tuple(
            dataclasses.replace(one, score=Score(np.nan, {}, None, "invalid")) for one in groups[3].completions
        ),
    )
    advantages[3] = objectives.group_advantages(groups[3].rewards[None], "group")[0]
    built = build(**OBJECTIVES["dr_grpo"])
    state, metrics = updated(built, tiny[1], groups, advantages=advantages)
    assert all(np.isfinite(value) for value in metrics.values())
    advantages[2] = 0
    assert (advantages[3] == 0).all()
    other, _ = updated(built, tiny[1], make_groups(), advantages=advantages)
    for path in tiny[1]:
        np.testing.assert_allclose(state.params[path], other.params[path], atol=1e-6, rtol=0)


# Several updates of one rollout.


@pytest.mark.slow
def test_several_updates_of_one_rollout(build, tiny, score_in_full, monkeypatch):
    """2 minibatches x 2 passes with beta > 0: old log-probs and the reference are those of the first parameters.

    Groups without a signal have a KL term, so they are run.
    """
    params, mask = tiny[1], layout()[1]
    learner, _ = built = build(**SEVERAL, optimizer__learning_rate=1e-2)
    assert learner.packer.shapes.completions_per_unit == G
    seen, update = [], learner._optimizer_step

    def spy(state, units):
        before = {path: np.array(x) for path, x in state.params.items()}
        state, metrics = update(state, units)
        seen.append((before, list(units), metrics))
        return state, metrics

    monkeypatch.setattr(learner, "_optimizer_step", spy)
    _, means = updated(built, params, advantages=IDLE)
    assert len(seen) == 4 == learner.optimizer_steps_per_update
    assert means["perf/idle_frac"] == 0

    first = seen[0][2]
    assert first["ratio/mean"] == pytest.approx(1, abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    contexts = [group.context.tolist() for group in make_groups()]
    starting = score_in_full(params)[0]
    orders = []
    for number, (before, units, metrics) in enumerate(seen):
        current, terms, k3s, ratios, outside = score_in_full(before)[0], [], [], [], []
        order = [contexts.index(unit.context.tolist()) for unit in units]
        orders += order
        for index, unit in zip(order, units, strict=True):
            for i, gain in enumerate(unit.advantage):
                row = index * G + i
                assert gain == IDLE[index, i]
                old, now = starting[row][mask[row]], current[row][mask[row]]
                np.testing.assert_allclose(unit.old[i], old, atol=1e-5, rtol=0)
                np.testing.assert_allclose(unit.reference[i], old, atol=1e-5, rtol=0)
                ratio, u = np.exp(now - old), np.exp(old - now)
                k3 = u - np.log(u) - 1
                terms.append(np.mean(np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain) - 0.1 * k3))
                k3s, ratios = [*k3s, *k3], [*ratios, *ratio]
                outside += list((ratio > 1.2) & (gain > 0) | (ratio < 0.8) & (gain < 0))
        assert metrics["loss"] == pytest.approx(-np.mean(terms), abs=2e-5)  # over the rows of the minibatch
        assert metrics["kl"] == pytest.approx(np.mean(k3s), rel=1e-3, abs=1e-7)
        assert metrics["ratio/mean"] == pytest.approx(np.mean(ratios), rel=1e-5)
        assert metrics["clip_ratio/region_mean"] == pytest.approx(np.mean(outside), abs=1e-6)
        if number:
            assert np.abs(np.array(ratios) - 1).max() > 0.01 and metrics["kl"] > 1e-5
    assert means["kl"] == pytest.approx(np.mean([metrics["kl"] for *_, metrics in seen]), rel=1e-6)
    # Every group once a pass, in an order of the pass's own.
    assert sorted(orders[:P]) == sorted(orders[P:]) == list(range(P)) and orders[:P] != orders[P:]


def test_which_units_share_a_minibatch_follows_from_seed_step_and_pass():
    """Every unit is in one of them, and without minibatches the order is that of the prompts."""

    def dealt(seed=0, step=1, iteration=0, count=3):
        fields = SimpleNamespace(_seed=seed, _minibatch_count=count)
        return list(Learner._minibatches(fields, [list(range(24)), list(range(24, 30))], step, iteration))

    usual = dealt()
    assert sorted(x for part in usual for x in part) == list(range(30))
    assert [sum(x < 24 for x in part) for part in usual] == [8] * 3
    assert usual == dealt() and usual not in (dealt(seed=1), dealt(step=2), dealt(iteration=1))
    assert dealt(count=1) == [list(range(30))]


def test_a_unit_has_a_gradient_where_any_completion_has_an_advantage():
    """Where wrong refinements have no credit, a unit holds zeros and others."""
    unit = lambda *advantages: Unit(np.zeros(1, np.int32), (), np.float32(advantages))
    for needs_advantage in (True, False):
        learner = SimpleNamespace(objective=SimpleNamespace(needs_advantage=needs_advantage))
        assert Learner._has_gradient(learner, unit(0.0, -0.5))
        assert Learner._has_gradient(learner, unit(0.0, 0.0)) != needs_advantage


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 3),
        ({"algorithm__beta": 0.1}, 4),
        (SEVERAL, 8),  # log pi_old, log pi_ref, and twice three
        ({"model__lora__rank": 2}, 2),  # no gradient of the weights
    ],
)
def test_the_passes_that_flops_count(tiny, changes, passes):
    learner, _ = make_learner(tiny[0], **changes)
    units = learner.packer.units(make_groups(), ADVANTAGES)
    once = sum(
        learner.programs.costs.model.useful_flops(len(unit.context), [len(one.tokens) for one in unit.completions], 1)
        for unit in units
    )
    assert learner._model_flops(units) == pytest.approx(passes * once)


@pytest.mark.slow
def test_without_a_learning_rate_nothing_happens(build, tiny):
    """4 updates by one policy: the ratio tells whether what scores and what trains agree."""
    state, metrics = updated(build(**SEVERAL, optimizer__learning_rate=0.0), tiny[1])
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["grad_norm"] > 0.1
    for path, x in tiny[1].items():
        np.testing.assert_array_equal(state.params[path], x)


@pytest.mark.slow
def test_the_reference_can_wait_in_host_memory(build, tiny):
    settings = SEVERAL | {"optimizer__learning_rate": 1e-2}
    learner, _ = built = build(**settings, learner__offload_reference=True)
    kinds = {x.sharding.memory_kind for x in learner._reference.values()}
    assert kinds == {"pinned_host"}
    assert updated(built, tiny[1])[1] == updated(build(**settings), tiny[1])[1]


@pytest.mark.slow
def test_tokens_can_be_weighed_against_their_sampler(build, tiny, score_in_full, reference_gradient):
    """By min(pi / sampler, cap), which binds for many tokens and not for all."""
    tokens, mask = layout()
    sampler = np.zeros(mask.shape, np.float32)
    sampler[mask] = np.concatenate([one.logprobs for _, one in rows_of(make_groups())])
    apart = np.exp(np.where(mask, score_in_full(tiny[1])[0] - sampler, 0))
    assert 0.1 < (apart[mask] > 0.3).mean() < 0.9
    loss, expected = reference_gradient(tokens, mask, ADVANTAGES.reshape(-1), np.minimum(apart, 0.3))
    state, metrics = updated(build(algorithm__importance_sampling_cap=0.3), tiny[1])
    assert_close(gradient_of(state), expected, 1e-5)
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-6)


# Credit to the plain prompt.

PLAIN = {"algorithm__refine_credit": "plain", "algorithm__credit_completions": "all"}


def credited_groups():
    """Groups that saw a draft behind a shorter plain prompt; the last two saw none."""
    groups = make_groups()
    for i, group in enumerate(groups[:-2]):
        plain = dataclasses.replace(group.prompt, tokens=group.context[: 1 + len(group.context) // 2])
        groups[i] = dataclasses.replace(group, prompt=plain)
    return groups[:-2] + [dataclasses.replace(group, drafts=(), kept=None) for group in groups[-2:]]


def credited_layout():
    return layout([(group.prompt.tokens, one) for group in credited_groups() for one in group.completions])


@pytest.mark.slow(seconds=15)
def test_plain_credit_against_a_loss_written_out(build, tiny, reference_gradient, score_in_full):
    """After the plain prompt, shaped where there was a draft. Far away: all rows shaped, none, and after q'."""
    (tokens, mask), shaped = credited_layout(), np.arange(P * G) < (P - 2) * G
    loss, expected = reference_gradient(tokens, mask, ADVANTAGES.reshape(-1), 1.0, shaped)
    state, metrics = updated(build(**PLAIN), tiny[1], credited_groups())
    got = gradient_of(state)
    assert_close(got, expected, 1e-5)
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-6)
    for rows, marked in ((credited_layout(), shaped | True), (credited_layout(), shaped & False), (layout(), shaped)):
        _, far = reference_gradient(*rows, ADVANTAGES.reshape(-1), 1.0, marked)
        assert max(np.abs(got[path] - far[path]).max() / np.abs(far[path]).max() for path in got) > 0.05
    # How far the plain prompt is from what was sampled with the draft says nothing of the sampler.
    sampler = np.concatenate([one.logprobs for _, one in rows_of(make_groups())])
    gap = np.abs(score_in_full(tiny[1], tokens)[0][mask] - sampler)
    assert metrics["refine/plain_logp_difference"] == pytest.approx(gap.mean(), rel=1e-5)
    assert not any(name.startswith("sampling/sampling_logp_difference") for name in metrics)


@pytest.mark.slow(seconds=10)
def test_plain_credit_can_be_weighed_against_the_sampler_that_saw_the_draft(
    build, tiny, reference_gradient, score_in_full
):
    """With credit_gamma = 0: by min(pi(o | q) / sampler, 0.3), which binds for many tokens and not for all."""
    tokens, mask = credited_layout()
    sampler = np.zeros(mask.shape, np.float32)
    sampler[mask] = np.concatenate([one.logprobs for _, one in rows_of(make_groups())])
    apart = np.exp(np.where(mask, score_in_full(tiny[1], tokens)[0] - sampler, 0))
    assert 0.1 < (apart[mask] > 0.3).mean() < 0.9
    loss, expected = reference_gradient(tokens, mask, ADVANTAGES.reshape(-1), np.minimum(apart, 0.3))
    weighed = {"algorithm__credit_gamma": 0.0, "algorithm__importance_sampling_cap": 0.3}
    state, metrics = updated(build(**PLAIN, **weighed), tiny[1], credited_groups())
    assert_close(gradient_of(state), expected, 1e-5)
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-6)


@pytest.mark.slow(seconds=5)
def test_settings_of_variants_that_are_off_leave_the_program_of_the_paper_as_it_is(tiny):
    """As lowered text. Read where refine_credit is "context", credit_gamma would bring its branch into the program."""

    def text(**changes):
        changes = {f"algorithm__{name}": value for name, value in {"num_drafts": 4, **changes}.items()}
        return make_learner(tiny[0], **changes)[0].programs.accumulate.lower(WHOLE).as_text()

    of_paper = text()
    others = {"credit_gamma": 0.7, "credit_completions": "all", "solved_fraction": 0.5, "draft_metric": "accuracy"}
    assert text(**others) == of_paper
    assert text(refine_credit="plain") != of_paper


# The optimizer.


@pytest.mark.slow
def test_the_first_moment_in_bfloat16(build, tiny):
    """Two updates: the second one reads the rounded moment, whose 8 bits are 1 in 256."""
    states = {}
    for dtype in ("float32", "bfloat16"):
        built = build(optimizer__mu_dtype=dtype)
        states[dtype], _ = updated(built, tiny[1], advantages=-ADVANTAGES, state=updated(built, tiny[1])[0])
        mu, nu = (optax.tree_utils.tree_get(states[dtype].opt_state, name) for name in ("mu", "nu"))
        assert {x.dtype for x in mu.values()} == {jnp.dtype(dtype)} and {x.dtype for x in nu.values()} == {
            jnp.dtype(jnp.float32)
        }
    apart = [np.abs(x - states["bfloat16"].params[path]).max() for path, x in states["float32"].params.items()]
    assert 0 < max(apart) < 0.02 * 1e-3


@pytest.mark.slow
def test_predicted_bytes(build, tiny):
    """Weights, two moments and the gradient at the least; more with larger micro-batches, less on more devices."""
    params = sum(x.size for x in tiny[1].values())
    whole = build()[0].programs.predicted_bytes()
    assert whole > 16 * params
    assert 16 * params < build(learner__tokens_per_microbatch=ONE)[0].programs.predicted_bytes() < whole
    learner, mesh = build(MESHES["2x2x2"])
    with jax.set_mesh(mesh):
        assert 16 * params / 4 < learner.programs.predicted_bytes() < whole / 4


@pytest.mark.parametrize(
    ("changes", "rescored"),
    [
        ({"algorithm__num_drafts": 4, "log__samples_every": 0}, 0),
        ({"algorithm__num_drafts": 4, "log__samples_every": 2}, 1),  # a full micro-batch for `diagnostics`
        ({"algorithm__num_drafts": 0, "log__samples_every": 2}, 0),
        ({"algorithm__beta": 0.1}, 3),
        ({"learner__minibatches": 2}, 3),
    ],
)
def test_which_programs_are_compiled_before_the_first_update(tiny, changes, rescored):
    programs = make_learner(tiny[0], **changes)[0].programs
    sizes = [(size,) for size in programs.packer.shapes.sizes]
    expected = [*((programs.accumulate, size) for size in sizes), *((programs.rescore, x) for x in sizes[:rescored])]
    assert len(sizes) == 3 and programs.program_shapes == [*expected, (programs.apply, ())]


@pytest.mark.slow
def test_a_larger_vocabulary_adds_chunks_of_logits_only(tiny):
    """A word more costs the gradient of the head, [D], and three times a chunk's 128 of 768 positions."""
    used = []
    for size in (2000, 6000):
        cfg = dataclasses.replace(tiny[0], vocab_size=size, pattern="*", attention="chunked")
        learner, mesh = make_learner(cfg, learner__logprob_chunk=128, learner__remat="logits")
        with jax.set_mesh(mesh):
            used.append(learner.programs.accumulate.compiled(WHOLE).memory_analysis().temp_size_in_bytes)
    assert 0 < used[1] - used[0] < 4000 * 4 * (4 * 128 + 2 * 32)
    assert 4 * 128 + 2 * 32 < 768


def test_the_schedule_counts_every_optimizer_step(build):
    """10 rollouts of 2 x 2 updates: the floor is reached at 40 and not at 10."""
    learner, _ = build(**SEVERAL, optimizer__learning_rate=1e-2)
    assert float(learner.programs.schedule(jnp.int32(10))) > 8e-3
    assert float(learner.programs.schedule(jnp.int32(40))) == pytest.approx(1e-3, rel=1e-5)
