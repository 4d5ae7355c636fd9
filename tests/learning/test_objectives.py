"""The objectives against numbers derived by hand, each beside the number that a plausible bug would give.

One example serves all: two rows with advantages +1 and -2, and ratios

    row 0, A = +1:  1.5  0.5            (2 tokens)
    row 1, A = -2:  1.5  0.5  1.1       (3 tokens, L_max = 4)
"""

import collections
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igrpo_jax import config
from igrpo_jax.errors import InputError
from igrpo_jax.learning import objectives
from igrpo_jax.learning.loss import LossSettings, MicroBatchSums, TokenValues, microbatch_loss
from igrpo_jax.learning.loss import loss as objective_loss
from igrpo_jax.learning.update_metrics import optimizer_step_metrics
from igrpo_jax.models.logprobs import token_logprobs
from igrpo_jax.models.segments import PrefixGroup, pack, starts

RATIOS = ((1.5, 0.5), (1.5, 0.5, 1.1))
ADVANTAGE = np.array([1.0, -2.0], np.float32)
LENGTHS = np.array([2, 3])
L_MAX = 4


def resolved(loss_type, **settings):
    return objectives.resolve(config.AlgorithmConfig(loss_type=loss_type, **settings))


def example(width=3, garbage=0.0):
    """Log-probs, old log-probs and mask [2, width]; `garbage` stands off the completions."""
    old, logprob = np.full((2, 2, width), garbage, np.float32)
    logprob += np.float32(garbage)
    for row, ratios in enumerate(RATIOS):
        old[row, : len(ratios)] = -1.0 - row
        logprob[row, : len(ratios)] = np.log(ratios) - 1.0 - row
    return logprob, old, np.arange(width) < LENGTHS[:, None]


def token_weights(r, mask, finished):
    """Of tokens, [2, T]: a row's own at each of its tokens."""
    return objectives.row_weights(r, mask.sum(axis=1), finished, L_MAX)[:, None] * mask


def in_sequences(logprob, old, reference, advantage, weight, mask, correction=None, entropy=None, entropy_weight=None):
    """Rows [R, T] as R packed sequences of one completion each. Advantages, weights of entropies: of rows, [R]."""
    per_token = lambda x: None if x is None else jnp.broadcast_to(jnp.asarray(x)[:, None], mask.shape)
    row = jnp.asarray(mask, jnp.int32)
    rest = correction, entropy, per_token(entropy_weight)
    return TokenValues(logprob, old, reference, per_token(advantage), weight, mask, row, *rest)


def evaluate(r, width=3, garbage=0.0, reference=None, finished=(True, True)):
    """Loss record, and the loss's gradient with respect to the log-probs [2, width]."""
    logprob, old, mask = example(width, garbage)
    weight = token_weights(r, mask, np.array(finished))
    if reference is not None:
        reference = logprob + np.pad(np.log(reference), ((0, 0), (0, width - 3)))

    def loss(logprob):
        record = objective_loss(r, in_sequences(logprob, old, reference, ADVANTAGE, weight, mask))
        return record.loss, record

    (_, record), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logprob))
    return record, np.asarray(gradient)


# Clip at 0.8 and 1.2. min(r A, clip(r) A):   row 0: 1.2, 0.5      row 1: -3, -1.6, -2.2
# (the clip binds where it lowers the value: at 1.5 for A > 0, at 0.5 for A < 0, nowhere else.)
# Without the min, row 0: 1.2, 0.8 and row 1: -2.4, -1.6, -2.2.
LOSSES = {
    # 1/2 of each row's mean: -(1.7 / 4 - 6.8 / 6). One mean over the tokens would be 1.02, no min 0.5333.
    "grpo": -(1.7 / 4 - 6.8 / 6),
    # Over 2 rows x L_max 4: -(1.7 - 6.8) / 8 = 0.6375. Over the longest row, 3, it would be 0.85.
    "dr_grpo": 5.1 / 8,
    # 1.28 in the place of 1.2, over 5 tokens: -(1.78 - 6.8) / 5 = 1.004. With 1.2: 1.02.
    "dapo": 5.02 / 5,
    # s = sqrt(.75) = .8660 and .825^(1/3) = .9379, clip at .9997: -(.8660 - 2 x .9997) / 2 = 0.5667, each row's tokens
    # together weighing 1/2. The product of ratios without the mean, .75 and .825, would give 0.6247.
    "gspo": -(math.sqrt(0.75) - 2 * 0.9997) / 2,
}
LOSSES["gspo_token"] = LOSSES["gspo"]  # with one advantage for all tokens of a row they are the same

# Eq. 29: d loss / d logprob = -w I A r, with w = 1/4 and 1/6 for GRPO; I = 0 at 1.5 in row 0 and at 0.5 in row 1.
GRADIENTS = {
    "grpo": [[0, -0.5 / 4, 0], [3 / 6, 0, 2.2 / 6]],
    "dr_grpo": [[0, -0.5 / 8, 0], [3 / 8, 0, 2.2 / 8]],
    "dapo": [[0, -0.5 / 5, 0], [3 / 5, 0, 2.2 / 5]],
    # d s / d logprob = s / |o|: -(1/2) x .8660 x (1/2) at both tokens of row 0. Row 1 is clipped as a whole.
    "gspo": [[-math.sqrt(0.75) / 4] * 2 + [0], [0, 0, 0]],
}
GRADIENTS["gspo_token"] = GRADIENTS["gspo"]
CLIPPED = {"grpo": 2, "dr_grpo": 2, "dapo": 2, "gspo": 0.5, "gspo_token": 0.5}  # tokens, or the fraction of rows


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradient(loss_type):
    record, gradient = evaluate(resolved(loss_type))
    assert float(record.loss) == pytest.approx(LOSSES[loss_type], abs=1e-6)
    np.testing.assert_allclose(gradient, GRADIENTS[loss_type], atol=1e-6)
    assert float(record.clipped) == pytest.approx(CLIPPED[loss_type])
    assert float(record.tokens) == 5
    assert float(record.kl) == 0


@pytest.mark.parametrize("loss_type", LOSSES)
def test_padding_changes_nothing(loss_type):
    """Also where the places past a completion hold something; the mean of GSPO must not see it."""
    near, gradient = evaluate(resolved(loss_type))
    far, wider = evaluate(resolved(loss_type), width=9, garbage=-3.0)
    for a, b in zip(near, far, strict=True):
        assert float(a) == pytest.approx(float(b), abs=1e-6)
    np.testing.assert_allclose(wider[:, :3], gradient, atol=1e-6)
    np.testing.assert_array_equal(wider[:, 3:], 0)


def test_dapo_clips_the_two_sides_apart():
    """1 - 0.2 and 1 + 0.28: a ratio of 1.25 keeps its gradient for A > 0, under the symmetric 1.2 it would not."""
    old = jnp.zeros((1, 4))
    logprob = jnp.log(jnp.array([[1.25, 1.3, 0.85, 0.75]]))
    ones = jnp.ones((1, 4))

    def gradient(loss_type, advantage):
        r = resolved(loss_type)
        call = lambda x: objective_loss(r, in_sequences(x, old, None, jnp.array([advantage]), ones, ones > 0)).loss
        return np.asarray(jax.grad(call)(logprob))[0]

    np.testing.assert_allclose(gradient("dapo", 1.0), [-1.25, 0, -0.85, -0.75], atol=1e-6)
    np.testing.assert_allclose(gradient("grpo", 1.0), [0, 0, -0.85, -0.75], atol=1e-6)
    np.testing.assert_allclose(gradient("dapo", -1.0), [1.25, 1.3, 0.85, 0], atol=1e-6)


RHO = np.array([[2.0, 0.5, 1.0], [1.0, 0.25, 3.0]])  # pi_ref / pi; what stands off row 0 does not count
# k3 = u - log u - 1:  2 -> .306853, .5 -> .193147, 1 -> 0, .25 -> .636294, 3 -> .901388
K3 = np.array([[0.306853, 0.193147, 0], [0, 0.636294, 0.901388]])


def test_kl_adds_k3_and_eq_29():
    """The gradient per token is -w (I A r + beta (u - 1)); the estimator -log u would give -beta in its place."""
    beta = 0.1
    plain, before = evaluate(resolved("grpo"))
    record, gradient = evaluate(resolved("grpo", beta=beta), reference=RHO)
    assert float(record.kl) == pytest.approx(K3.sum(), abs=1e-5)
    weight = np.array([[1 / 4, 1 / 4, 0], [1 / 6, 1 / 6, 1 / 6]])
    assert float(record.loss) == pytest.approx(float(plain.loss) + beta * (weight * K3).sum(), abs=1e-6)
    # By hand, row 0: -(1/4)(0 + .1), -(1/4)(.5 - .05); row 1: -(1/6)(-3 + 0), -(1/6)(0 - .075), -(1/6)(-2.2 + .2).
    by_hand = [[-0.025, -0.1125, 0], [0.5, 0.0125, 1 / 3]]
    np.testing.assert_allclose(gradient, by_hand, atol=1e-6)
    np.testing.assert_allclose(gradient, before - weight * beta * (RHO - 1), atol=1e-6)


def test_a_correction_weighs_the_objective_and_not_the_kl():
    """Of tokens as drawn from another sampler, by 2 and 0.5: row 0 is 1/4 of 2 x 1.2 + 0.5 x 0.5, row 1 stays."""
    r = resolved("grpo", beta=0.1)
    logprob, old, mask = example()
    reference, weight = logprob + np.log(RHO).astype(np.float32), token_weights(r, mask, np.ones(2, bool))
    correction = np.array([[2.0, 0.5, 7.0], [1.0, 1.0, 1.0]], np.float32)

    def loss(x):
        return objective_loss(r, in_sequences(x, old, reference, ADVANTAGE, weight, mask, correction)).loss

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logprob))
    assert float(value) == pytest.approx(-((2.4 + 0.25) / 4 - 6.8 / 6) + 0.1 * (weight * K3).sum(), abs=1e-6)
    # Row 0: -(1/4)(0 + .1), -(1/4)(.5 x .5 - .05).
    np.testing.assert_allclose(gradient, [[-0.025, -0.05, 0], [0.5, 0.0125, 1 / 3]], atol=1e-6)


def test_tokens_of_another_context_are_shaped_and_not_clipped():
    """Row 0 is shaped, A = 1: probabilities 1.5/e and .5/e, each p / (p + .1) with the gradient .1 p / (p + .1)^2.

    Row 1 is as before. The mistakes: a clip at 1.2 on the first token, p itself, or a detached weight on log pi.
    """
    logprob, old, mask = example()
    r = resolved("grpo", refine_credit="plain")
    assert r.credit_gamma == 0.1 and resolved("grpo").credit_gamma == 0
    weight = token_weights(r, mask, np.array([True, True]))
    shaped = np.array([[True], [False]]) & mask

    def loss(logprob):
        record = objective_loss(r, in_sequences(logprob, old, None, ADVANTAGE, weight, mask)._replace(shaped=shaped))
        return record.loss, record

    (_, record), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logprob))
    p = np.array(RATIOS[0]) / math.e
    assert float(record.loss) == pytest.approx(-np.sum(p / (p + 0.1)) / 4 + 6.8 / 6, abs=1e-6)
    expected = np.array([[*(-0.1 * p / (p + 0.1) ** 2 / 4), 0], GRADIENTS["grpo"][1]])
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert float(record.clipped) == 1  # the other one of the two is in row 0


@pytest.mark.parametrize("loss_type", LOSSES)
def test_on_policy_the_ratio_is_1_and_the_gradient_is_that_of_reinforce(loss_type):
    """min(r A, clip(r) A) has a tie at r = 1: its gradient must be A there, not A / 2."""
    r = resolved(loss_type)
    logprob, _, mask = example()
    weight = token_weights(r, mask, np.ones(2, bool))

    def loss(x):
        record = objective_loss(r, in_sequences(x, jax.lax.stop_gradient(x), None, ADVANTAGE, weight, mask))
        return record.loss, record

    (_, record), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.where(mask, logprob, 0.0))
    assert float(record.ratio) == 5.0
    assert float(record.clipped) == 0
    np.testing.assert_allclose(gradient, -weight * ADVANTAGE[:, None], atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_ratios_beyond_float32_stay_finite(loss_type):
    r = resolved(loss_type, beta=0.1)
    logprob, mask = jnp.array([[-1.0, -500.0], [-300.0, -1.0]]), jnp.ones((2, 2), bool)
    old = reference = logprob[::-1]

    def loss(x):
        return objective_loss(r, in_sequences(x, old, reference, ADVANTAGE, jnp.full((2, 2), 0.25), mask)).loss

    value, gradient = jax.value_and_grad(loss)(logprob)
    assert np.isfinite(float(value)) and np.isfinite(gradient).all()


def test_gspo_token_leaves_the_weights_of_tokens_with_their_tokens():
    """By 2 and 0.5 in row 0, s = sqrt(.75), 1/4 a token: -s / 4 x (2, .5). GSPO gives both the mean, -s / 4 x 1.25."""
    logprob, old, mask = example()
    correction = np.array([[2.0, 0.5, 7.0], [1.0, 1.0, 1.0]], np.float32)
    gradients = {}
    for loss_type in ("gspo", "gspo_token"):
        r = resolved(loss_type)
        weight = token_weights(r, mask, np.ones(2, bool))
        loss = lambda x: objective_loss(r, in_sequences(x, old, None, ADVANTAGE, weight, mask, correction)).loss  # noqa: B023
        gradients[loss_type] = jax.grad(loss)(jnp.asarray(logprob))
    s = math.sqrt(0.75)
    np.testing.assert_allclose(gradients["gspo_token"], [[-s / 2, -s / 8, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(gradients["gspo"], [[-s * 1.25 / 4] * 2 + [0], [0, 0, 0]], atol=1e-6)


def test_dual_clip_bounds_the_ratio_of_bad_completions():
    """delta = 1.3: in row 1 -2 x 1.3 in the place of -2 x 1.5, without gradient: -(1.7 / 4 - 6.4 / 6).

    Row 0 keeps its 1.2 at the ratio 1.5; a clip of both sides at 1.2 would give row 1 -2.4 and 6.2 / 6.
    """
    record, gradient = evaluate(resolved("grpo", delta=1.3))
    assert float(record.loss) == pytest.approx(-(1.7 / 4 - 6.4 / 6), abs=1e-6)
    np.testing.assert_allclose(gradient, [[0, -0.5 / 4, 0], [0, 0, 2.2 / 6]], atol=1e-6)
    assert float(record.clipped) == 2  # the clip region's, as in TRL


def test_dual_clip_stands_above_the_clip():
    """Of DAPO 1.28: below it the bound would cut what A > 0 gains."""
    assert resolved("dapo", delta=1.29).delta == 1.29 and resolved("dapo").delta == math.inf
    for settings in ({"delta": 1.28}, {"delta": 1.5, "epsilon_high": 0.5}):
        with pytest.raises(InputError, match=r"algorithm.delta = [\d.]+: must be above 1 \+ epsilon_high"):
            resolved("dapo", **settings)


def test_without_dual_clip_there_need_be_no_clip():
    assert resolved("grpo", epsilon=math.inf).delta == resolved("grpo", epsilon=math.inf).epsilon_high == math.inf


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("cut", [False, True])
def test_the_entropy_bonus_is_a_mean_over_tokens(loss_type, cut):
    """0.1 x (1 + 2 + 3 + 4 + 6) / 5 off any objective's loss; 0.1 x (1 + 2) / 2 where the second row was cut.

    What stands off row 0, 50, does not count. By GRPO's own weights it would be (1.5 + 13 / 3) / 2.
    """
    r = resolved(loss_type, entropy_coef=0.1, mask_truncated_completions=True)
    logprob, old, mask = example()
    finished = np.array([True, not cut])
    weight = token_weights(r, mask, finished)
    entropy = jnp.array([[1.0, 2.0, 50.0], [3.0, 4.0, 6.0]])
    per_row = objectives.entropy_weights(r, LENGTHS, finished)
    assert per_row.dtype == np.float32

    def loss(entropy):
        return objective_loss(r, in_sequences(logprob, old, None, ADVANTAGE, weight, mask, None, entropy, per_row)).loss

    value, gradient = jax.value_and_grad(loss)(entropy)
    plain, _ = evaluate(r, finished=finished)
    assert float(value - plain.loss) == pytest.approx(-0.1 * (1.5 if cut else 16 / 5), abs=1e-6)
    expected = [[-0.05, -0.05, 0], [0, 0, 0]] if cut else [[-0.02, -0.02, 0], [-0.02] * 3]
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    np.testing.assert_array_equal(objectives.entropy_weights(r, LENGTHS, np.zeros(2, bool)), 0)


def test_what_has_a_gradient_without_an_advantage():
    assert resolved("grpo").needs_advantage and resolved("dapo", delta=3.0).needs_advantage
    assert not resolved("grpo", beta=1e-4).needs_advantage and not resolved("grpo", entropy_coef=1e-4).needs_advantage


# Many completions in one packed sequence.

PACKED = [
    [PrefixGroup(5, [4, 1, 7]), PrefixGroup(0, [3, 2])],
    [PrefixGroup(11, [6])],
    [],
]
SIZE = 64


def packed_values(r):
    """TokenValues of `PACKED`, with other numbers off the completions, and where each completion stands."""
    rng = np.random.default_rng(1)
    segment = pack(PACKED, SIZE).segment
    places = [
        (shard, slice(start, start + length))
        for shard, groups in enumerate(PACKED)
        for group, (_, own) in zip(groups, starts(groups), strict=True)
        for start, length in zip(own, group.completions, strict=True)
    ]
    lengths = np.array([place.stop - place.start for _, place in places])
    finished = rng.random(len(places)) < 0.7
    draw = lambda scale: rng.normal(0, scale, segment.shape).astype(np.float32)
    old = draw(1.0)
    mask, of_rows = np.zeros(segment.shape, bool), np.zeros((3, *segment.shape), np.float32)
    per_row = (
        rng.normal(size=len(places)),
        objectives.row_weights(r, lengths, finished, L_MAX),
        objectives.entropy_weights(r, lengths, finished),
    )
    for i, place in enumerate(places):
        mask[place] = True
        for x, row in zip(of_rows, per_row, strict=True):
            x[place] = row[i]
    advantage, weight, entropy_weight = of_rows
    near = 4e-3 if r.epsilon < 0.01 else 0.4  # for the clips of sequences
    values = TokenValues(
        logprob=jnp.asarray(old + draw(near)),
        old=old,
        reference=old + draw(0.4) if r.beta else None,
        advantage=advantage,
        weight=weight,
        mask=mask,
        row=segment,
        correction=np.exp(draw(0.3)),
        entropy=np.exp(draw(1.0)) if r.entropy_coef else None,
        entropy_weight=entropy_weight if r.entropy_coef else None,
    )
    return values, places


@pytest.mark.parametrize("clips", [{"epsilon": 0.0}, {"epsilon_high": 0.0}, {"epsilon": 0.0, "epsilon_high": 0.2}])
@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_clips_of_zero_leave_the_gradient_on_policy(loss_type, clips):
    """At a ratio of 1 the two products of the min are equal, and JAX would take half of each gradient."""
    r = resolved(loss_type, **clips)
    ones = jnp.ones((1, 4), jnp.float32)
    advantage = jnp.array([[1.0, 1.0, -2.0, -2.0]])
    row = jnp.array([[0, 0, 1, 1]], jnp.int32)
    values = TokenValues(-ones, -ones, None, advantage, ones / 4, ones > 0, row)
    gradient = jax.grad(lambda logprob: objective_loss(r, values._replace(logprob=logprob)).loss)(values.logprob)
    np.testing.assert_allclose(gradient, -advantage / 4, rtol=1e-6)


def by_completion(r, loss_type, values, places):
    """The sums of LossSums over completions, in float64: each alone, by the formulas of the papers."""
    sums = collections.Counter()
    for place in places:
        logprob, old, advantage, weight, correction = (
            np.asarray(x, np.float64)[place]
            for x in (values.logprob, values.old, values.advantage, values.weight, values.correction)
        )
        log_ratio = logprob - old
        if loss_type.startswith("gspo"):
            log_ratio = np.full_like(log_ratio, log_ratio.mean())
        ratio = np.exp(log_ratio)
        clipped = np.clip(ratio, 1 - r.epsilon, 1 + r.epsilon_high)
        value = np.minimum(np.minimum(ratio, r.delta) * advantage, clipped * advantage) * correction
        k3 = np.zeros_like(ratio)
        if r.beta:
            u = np.exp(np.asarray(values.reference, np.float64)[place] - logprob)
            k3 = u - np.log(u) - 1
        counted = weight > 0
        sums["loss"] -= np.sum(weight * (value - r.beta * k3))
        if r.entropy_coef:
            sums["loss"] -= np.sum(values.entropy_weight[place] * values.entropy[place])
        outside = np.where(advantage > 0, ratio > 1 + r.epsilon_high, ratio < 1 - r.epsilon)
        sums["clipped"] += np.sum((outside & counted) * (weight if loss_type.startswith("gspo") else 1))
        sums["kl"] += np.sum(k3[counted])
        sums["ratio"] += np.sum(ratio[counted])
        sums["tokens"] += np.sum(counted)
    return sums


PACKED_SETTINGS = {
    "plain": {},
    "all": {"beta": 0.1, "entropy_coef": 0.2, "delta": 1.4, "mask_truncated_completions": True},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [pytest.param(name, marks=() if name == "all" else pytest.mark.proof) for name in PACKED_SETTINGS]
)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_completions_in_one_packed_sequence_are_apart(loss_type, settings):
    """Sums are those of each completion alone, and so is the gradient; a mean of GSPO over others too is off."""
    r = resolved(loss_type, **PACKED_SETTINGS[settings])
    values, places = packed_values(r)
    assert len(places) == 6 and len({shard for shard, _ in places}) == 2

    def loss(logprob):
        record = objective_loss(r, values._replace(logprob=logprob))
        return record.loss, record

    (_, record), gradient = jax.value_and_grad(loss, has_aux=True)(values.logprob)
    expected = by_completion(r, loss_type, values, places)
    assert expected["clipped"] > 0 and expected["tokens"] > expected["clipped"]
    for name, x in record._asdict().items():
        assert float(x) == pytest.approx(expected[name], abs=2e-5), name
    alone = np.zeros(gradient.shape, np.float32)
    for place in places:
        own = jax.tree.map(lambda x, place=place: jnp.asarray(x)[place][None], values)
        own = own._replace(row=jnp.ones_like(own.row))
        alone[place] = jax.grad(lambda x, own=own: objective_loss(r, own._replace(logprob=x)).loss)(own.logprob)[0]
    np.testing.assert_allclose(gradient, alone, atol=1e-6)
    assert np.abs(alone).max() > 0.01


@pytest.mark.parametrize("loss_type", ["gspo", "gspo_token"])
def test_a_completion_changes_no_other_ones_ratio(loss_type):
    """Bit for bit, and so do tokens of prefixes and padding, whatever they hold."""
    r = resolved(loss_type)
    values, places = packed_values(r)
    log_ratio = lambda difference: np.asarray(r.functions.log_ratio(difference, values.mask, values.row))
    difference = np.asarray(values.logprob - values.old)
    before = log_ratio(difference)
    changed = np.where(values.mask, difference, 99.0)
    changed[places[0]] += 1
    after = log_ratio(changed)
    for place in places[1:]:
        np.testing.assert_array_equal(after[place], before[place])
    np.testing.assert_allclose(after[places[0]], before[places[0]] + 1, rtol=1e-6)


@pytest.mark.parametrize("loss_type", ["gspo", "gspo_token"])
def test_a_packed_sequence_of_as_many_completions_as_there_can_be(loss_type):
    """Each of one token, after an empty prefix: their numbers go up to twice the tokens of the packed sequence."""
    row = pack([[PrefixGroup(0, [1])] * SIZE], SIZE).segment
    assert row.max() == 2 * SIZE
    difference = np.random.default_rng(0).normal(size=(1, SIZE)).astype(np.float32)
    ratio = resolved(loss_type).functions.log_ratio(jnp.asarray(difference), jnp.ones((1, SIZE), bool), row)
    np.testing.assert_array_equal(ratio, difference)


# TRL, on the same tensors.

TRL_CASES = {
    "grpo": ({"loss_type": "grpo"}, {"loss_type": "grpo"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "dapo": ({"loss_type": "dapo"}, {"loss_type": "dapo"}),
    "gspo": ({"loss_type": "gspo"}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "kl": ({"loss_type": "grpo", "beta": 0.1}, {"loss_type": "grpo"}),
    "dual clip": ({"loss_type": "dapo", "delta": 1.4}, {"loss_type": "dapo"}),
    "entropy": ({"loss_type": "dr_grpo", "entropy_coef": 0.3}, {"loss_type": "dr_grpo"}),
    "cut": ({"loss_type": "dapo", "mask_truncated_completions": True, "entropy_coef": 0.3}, {"loss_type": "dapo"}),
    "cut rows": ({"loss_type": "grpo", "mask_truncated_completions": True}, {"loss_type": "grpo"}),
    "cut gspo": (
        {"loss_type": "gspo", "mask_truncated_completions": True},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "all": (
        {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5, "beta": 0.05, "entropy_coef": 0.01},
        {"loss_type": "dapo"},
    ),
    "corrected": ({"loss_type": "grpo", "beta": 0.1}, {"loss_type": "grpo", "use_vllm": True}),
}
TRL_L_MAX, TRL_LENGTHS = 8, np.array([7, 1, 4, 7, 3, 6])


def trl_tensors():
    """Logits [R, T, V], targets, log-probs of the other policies [R, T], advantages [R], corrections [R, T]."""
    rng = np.random.default_rng(4)
    shape = (len(TRL_LENGTHS), 7)
    logits = rng.normal(size=(*shape, 11)).astype(np.float32)
    targets = rng.integers(0, 11, shape, np.int32)
    logprob = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0]
    old, reference = (logprob + rng.normal(0, 0.4, shape).astype(np.float32) for _ in range(2))
    near = logprob + rng.normal(0, 1e-3, shape).astype(np.float32)  # for the clips of sequences
    correction = rng.uniform(0.5, 2, shape).astype(np.float32)
    return (
        logits,
        targets,
        {"token": old, "sequence": near},
        reference,
        rng.normal(size=6).astype(np.float32),
        correction,
    )


def loss_by_trl(settings, theirs, finished):
    """TRL's own `_compute_loss` with a trainer that hands it tensors: loss, gradient of the logits, its metrics."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; the extra parity brings it")
    from trl.trainer.grpo_trainer import GRPOTrainer

    r = objectives.resolve(config.AlgorithmConfig(**settings))
    logits, targets, old, reference, advantage, correction = trl_tensors()
    mask = (np.arange(7) < TRL_LENGTHS[:, None]) & (finished | (not r.mask_truncated))[:, None]
    leaf = torch.tensor(logits, requires_grad=True)
    logp = torch.log_softmax(leaf, -1)
    picked = logp.gather(-1, torch.tensor(targets, dtype=torch.int64)[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    level = theirs.get("importance_sampling_level", "token")
    accelerator = types.SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x)
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (picked, entropy, None),
        **{"loss_type": theirs["loss_type"], "importance_sampling_level": level, "max_completion_length": TRL_L_MAX},
        **{"beta": r.beta, "epsilon_low": r.epsilon, "epsilon_high": r.epsilon_high},
        **{"entropy_coef": r.entropy_coef, "_entropy_bonus_enabled": r.entropy_coef > 0, "use_adaptive_entropy": False},
        **{"use_vllm": theirs.get("use_vllm", False), "vllm_importance_sampling_correction": True},
        **{"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None},
        args=types.SimpleNamespace(delta=settings.get("delta"), use_bias_correction_kl=False, steps_per_generation=1),
        **{"model": types.SimpleNamespace(training=True), "accelerator": accelerator},
        **{"current_gradient_accumulation_steps": 1, "_metrics": {"train": collections.defaultdict(list)}},
    )
    trainer.accelerator.sync_gradients = True
    ones = torch.ones((len(targets), 1), dtype=torch.int64)
    inputs = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": torch.tensor(targets)}
    inputs |= {"completion_mask": torch.tensor(mask).int(), "num_items_in_batch": torch.tensor(mask.sum())}
    inputs |= {"advantages": torch.tensor(advantage), "old_per_token_logps": torch.tensor(old[level])}
    inputs |= {"ref_per_token_logps": torch.tensor(reference), "importance_sampling_ratio": torch.tensor(correction)}
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), leaf.grad.numpy(), {name: x[0] for name, x in trainer._metrics["train"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", TRL_CASES)
def test_equal_to_trl(case):
    """Through our log-probs too: with the identity as head, the gradient of the hidden states is that of the logits.

    The metrics are those of an update. TRL's sampler mismatch, outside of its `_compute_loss`, is over the same mask.
    """
    ours, theirs = TRL_CASES[case]
    finished = np.array([True, True, True, False, True, False])
    expected, gradient, metrics = loss_by_trl(ours, theirs, finished)
    r = objectives.resolve(config.AlgorithmConfig(**ours))
    logits, targets, old, reference, advantage, correction = trl_tensors()
    old = old[theirs.get("importance_sampling_level", "token")]
    mask = np.arange(7) < TRL_LENGTHS[:, None]
    weight = objectives.row_weights(r, TRL_LENGTHS, finished, TRL_L_MAX)[:, None] * mask
    entropy_weight = objectives.entropy_weights(r, TRL_LENGTHS, finished)

    def rows_of(logits):
        logprob, entropy = token_logprobs(logits, jnp.eye(11), targets, 1.0, 9, entropy_gradient=True)
        rows = in_sequences(
            logprob=logprob,
            old=old,
            reference=reference if r.beta else None,
            advantage=advantage,
            weight=weight,
            mask=mask,
            correction=correction if theirs.get("use_vllm") else None,
            entropy=entropy if r.entropy_coef else None,
            entropy_weight=entropy_weight,
        )
        return rows, entropy

    value, got = jax.value_and_grad(lambda logits: objective_loss(r, rows_of(logits)[0]).loss)(jnp.asarray(logits))
    assert float(value) == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(got, gradient, atol=1e-5, rtol=0)
    assert np.abs(gradient).max() > 0.01
    gap = np.random.default_rng(5).normal(size=mask.shape).astype(np.float32)
    measured = metrics_of_rows(r, *rows_of(jnp.asarray(logits)), gap)
    assert metrics["clip_ratio/region_mean"] > 0.1
    for name in ("clip_ratio/region_mean", "entropy", "kl"):
        assert measured[name] == pytest.approx(metrics.get(name, 0), abs=1e-5), name
    sampled = np.abs(gap)[mask & (finished | (not r.mask_truncated))[:, None]]
    expected = {"mean": sampled.mean(), "max": sampled.max()}
    for name, value in expected.items():
        assert measured[f"sampling/sampling_logp_difference/{name}"] == pytest.approx(value, rel=1e-5), name


def metrics_of_rows(r, rows, entropy, gap):
    """The metrics of an optimizer step with these rows, whose sampler is off log pi_old by `gap` [R, T]."""
    names = ("mask", "advantage", "weight", "entropy_weight")
    batch = types.SimpleNamespace(
        **{name: getattr(rows, name) for name in names},
        **{"old_logprob": rows.old, "sampler_logprob": rows.old - gap, "reference_logprob": rows.reference},
        **{"segments": types.SimpleNamespace(segment=rows.row), "shaped": None},
    )
    policy = lambda params, batch, frozen, entropy_gradient: (rows.logprob, entropy)
    settings = LossSettings(r, policy, on_policy=False, correction_cap=0.0)
    sums = jax.tree.map(float, microbatch_loss(settings, {}, batch, {})[1])
    return optimizer_step_metrics({"refine": sums}, [types.SimpleNamespace(stage="refine")], [], r, "refine")


def test_idle_rows_that_were_cut_count_as_idle_alone():
    """Three tokens with 2 nats each ended, two with 4 nats were cut: together they would have 14 / 5."""
    rows = [types.SimpleNamespace(tokens=np.zeros(n), entropy=sum_) for n, sum_ in ((3, 6.0), (2, 8.0))]
    idle = types.SimpleNamespace(stage="refine", completions=rows, weight=np.array([0.5, 0.0]))
    sums = jax.tree.map(float, MicroBatchSums.zeros())
    measured = optimizer_step_metrics({"refine": sums}, [idle], [idle], resolved("grpo"), "refine")
    assert measured["entropy"] == 2.0 and measured["perf/idle_frac"] == 1.0


@pytest.mark.parametrize(("trained", "entropy"), [(4.0, {"entropy": 1.5}), (0.0, {})])
def test_with_credit_to_the_plain_prompt_idle_rows_have_another_entropy(trained, entropy):
    """They were sampled with the draft in the prompt; without any other row there is no entropy to write."""
    row = types.SimpleNamespace(tokens=np.zeros(3), entropy=9.0)
    idle = types.SimpleNamespace(stage="refine", completions=[row], weight=np.array([0.5]))
    zero = jax.tree.map(float, MicroBatchSums.zeros())
    sums = zero._replace(loss_sums=zero.loss_sums._replace(tokens=trained), entropy=1.5 * trained, tokens=trained)
    settings = resolved("grpo", refine_credit="plain")
    measured = optimizer_step_metrics({"refine": sums}, [idle], [idle], settings, "refine")
    assert {name: value for name, value in measured.items() if name == "entropy"} == entropy
    assert measured["perf/idle_frac"] == 3 / (3 + trained) and measured["kl"] == 0


def test_clipped_rows_are_a_fraction_of_those_of_their_stage():
    """Of three units of refinements and one of drafts a quarter of all rows is clipped in each stage."""
    units = [types.SimpleNamespace(stage=stage) for stage in ("refine", "refine", "refine", "draft")]
    zero = jax.tree.map(float, MicroBatchSums.zeros())
    sums = zero._replace(loss_sums=zero.loss_sums._replace(clipped=0.25, tokens=8.0))
    measured = optimizer_step_metrics({"refine": sums, "draft": sums}, units, [], resolved("gspo"), "refine")
    assert measured["clip_ratio/region_mean"] == pytest.approx(1 / 3) and measured["draft/clip_ratio"] == 1.0


def test_advantages_divide_by_the_sample_deviation():
    """Of 1 0 0 0: mean .25, std .5 with ddof = 1: .75 / .5001 = 1.49970. With ddof = 0 (.4330) it would be 1.7317."""
    rewards = np.array([[1, 0, 0, 0]], np.float32)
    expected = np.array([[0.75, -0.25, -0.25, -0.25]]) / (0.5 + 1e-4)
    np.testing.assert_allclose(objectives.group_advantages(rewards, "group"), expected, rtol=1e-5)


def test_the_baseline_of_the_others():
    """RLOO: 1 - 0 and 0 - 1/3; of three with a verdict 0 - 1/2. Over the std it is 4/3 times the mean's."""
    nan = np.nan
    rewards = np.array([[1, 0, 0, 0], [1, nan, 0, 0], [nan, nan, 1, nan], [2, 2, 2, nan]], np.float32)
    expected = [[1, -1 / 3, -1 / 3, -1 / 3], [1, 0, -0.5, -0.5], [0] * 4, [0] * 4]
    np.testing.assert_allclose(objectives.group_advantages(rewards, "none", "leave_one_out"), expected, atol=1e-7)
    scaled = objectives.group_advantages(rewards[:1], "group", "leave_one_out")
    np.testing.assert_allclose(scaled, objectives.group_advantages(rewards[:1], "group") * 4 / 3, rtol=1e-6)
    assert objectives.has_signal(rewards).tolist() == [True, True, False, False]


def test_scales_of_advantages():
    """Over both groups: 3 ones among 8, std sqrt(8 x .375 x .625 / 7) = .517549; with ddof = 0 .484123."""
    rewards = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], np.float32)
    centred = np.array([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]])
    np.testing.assert_allclose(objectives.group_advantages(rewards, "none"), centred, rtol=1e-6)
    np.testing.assert_allclose(objectives.group_advantages(rewards, "batch"), centred / 0.517649, rtol=1e-5)
    group = centred / np.array([[0.5001], [0.577450]])  # the second: sqrt(4 x .25 / 3) + 1e-4
    np.testing.assert_allclose(objectives.group_advantages(rewards, "group"), group, rtol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage(scale):
    """Exactly: the mean of seven times 0.7 is not 0.7 in float32, and that rest over 1e-4 would be a signal."""
    rewards = np.stack([np.full(7, 0.7, np.float32), np.arange(7, dtype=np.float32)])
    assert (rewards[0] - rewards[0].mean() != 0).all()  # the trap is there
    result = objectives.group_advantages(rewards, scale)
    np.testing.assert_array_equal(result[0], 0.0)
    assert result.dtype == np.float32 and (result[1, :3] < 0).all() and (result[1, 4:] > 0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_completion_without_a_verdict_takes_no_part(scale):
    """The others of its group are compared as if it were not there; one verdict alone compares with nothing."""
    nan = np.nan
    rewards = np.array([[1, nan, 0, 0], [nan, nan, 1, nan], [nan] * 4], np.float32)
    result = objectives.group_advantages(rewards, scale)
    alone = objectives.group_advantages(np.array([[1, 0, 0]], np.float32), scale)
    assert result[0, 1] == 0 and (result[1:] == 0).all() and result.dtype == np.float32
    if scale != "batch":
        np.testing.assert_allclose(result[0, [0, 2, 3]], alone[0], rtol=1e-6)
    assert np.sign(result[0]).tolist() == [1, 0, -1, -1]


# By loss type: weights of a token in rows of 2 and 4 tokens, L_max 4, where both count, and where the second was cut.
WEIGHTS = {
    "grpo": ((1 / 4, 1 / 8), (1 / 4, 0)),  # of 2 rows either way: masking a row must not raise the weight of others
    "dr_grpo": ((1 / 8, 1 / 8), (1 / 8, 0)),
    "dapo": ((1 / 6, 1 / 6), (1 / 2, 0)),  # the mean is over the tokens that count
    "gspo": ((1 / 4, 1 / 8), (1 / 4, 0)),
    "gspo_token": ((1 / 4, 1 / 8), (1 / 4, 0)),
}


@pytest.mark.parametrize("loss_type", WEIGHTS)
def test_token_weights_and_cut_completions(loss_type):
    lengths, finished = np.array([2, 4]), np.array([True, False])
    for masks, expected in zip((False, True), WEIGHTS[loss_type], strict=True):
        r = resolved(loss_type, mask_truncated_completions=masks)
        got = objectives.row_weights(r, lengths, finished, 4)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    nothing = objectives.row_weights(r, lengths, np.zeros(2, bool), 4)
    np.testing.assert_array_equal(nothing, 0)  # all cut: no tokens to divide by


def test_a_masked_row_has_no_gradient():
    for loss_type in LOSSES:
        r = resolved(loss_type, mask_truncated_completions=True)
        record, gradient = evaluate(r, finished=(True, False))
        np.testing.assert_array_equal(gradient[1], 0)
        assert float(record.tokens) == 2
        assert np.abs(gradient[0]).sum() > 0


@pytest.mark.parametrize(
    ("settings", "low", "high", "scale"),
    [
        ({"loss_type": "grpo"}, 0.2, 0.2, "group"),
        ({"loss_type": "dr_grpo"}, 0.2, 0.2, "none"),
        ({"loss_type": "dr_grpo", "scale_rewards": "group"}, 0.2, 0.2, "group"),
        ({"loss_type": "dapo"}, 0.2, 0.28, "group"),
        ({"loss_type": "dapo", "epsilon": 0.1}, 0.1, 0.1, "group"),
        ({"loss_type": "dapo", "epsilon_high": 0.4}, 0.2, 0.4, "group"),
        ({"loss_type": "gspo"}, 3e-4, 4e-4, "group"),
        ({"loss_type": "grpo", "epsilon": 0.0, "scale_rewards": "none"}, 0.0, 0.0, "none"),
    ],
)
def test_the_configuration_overrides_the_objectives_own(settings, low, high, scale):
    r = objectives.resolve(config.AlgorithmConfig(**settings))
    assert (r.epsilon, r.epsilon_high, r.scale_rewards) == (low, high, scale)
