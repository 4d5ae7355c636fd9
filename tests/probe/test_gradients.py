"""The cosine of two gradients: of made-up ones, of sketches, and of a tiny model; and the reliance on drafts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import completion, run_config
from learner_cases import DEFAULTS, LONGEST_PROMPT, TEMPERATURE, make_learner, put

from igrpo_jax.config import AlgorithmConfig, Config, LearnerConfig, MeshConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.learning import diagnostics
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.models import decoder
from igrpo_jax.outputs.console import Console
from igrpo_jax.probe import gradients
from igrpo_jax.probe.answers import Answered, Refined
from igrpo_jax.probe.gradients import KINDS, WIDTH, Gradients, Measured, cosine, learner_config, of_kinds, sketch
from igrpo_jax.records import Group, Prompt

G = 4


def noisy(rng, mean, problems, noise):
    return (mean + noise * rng.normal(size=(problems, len(mean)))).astype(np.float32)


def test_the_cosine_of_means_is_not_pulled_to_zero_by_their_noise():
    """Noise of 16 times the mean's length; the means have the cosine 0.8. A plain cosine of averages is far below."""
    rng, size = np.random.default_rng(0), 4000
    first, other = np.linalg.qr(rng.normal(size=(size, 2)))[0].T
    drawn = [noisy(rng, mean, 64, 16 / np.sqrt(size)) for mean in (first, 0.8 * first + 0.6 * other)]
    figure = cosine(*drawn)
    assert figure.low < 0.8 < figure.high and abs(figure.value - 0.8) < 0.1 and figure.high - figure.low < 0.5
    averages = [x.mean(axis=0) / np.linalg.norm(x.mean(axis=0)) for x in drawn]
    assert averages[0] @ averages[1] < 0.3


def test_the_noise_that_problems_share_is_left_out():
    """Drafts are answers to the plain prompt, so both gradients of a problem have noise in common; the means have 0."""
    rng, size = np.random.default_rng(1), 2000
    first, other = np.linalg.qr(rng.normal(size=(size, 2)))[0].T
    common = rng.normal(size=(64, size)) * 3 / np.sqrt(size)
    figure = cosine((first + common).astype(np.float32), (other + common).astype(np.float32))
    assert abs(figure.value) < 0.1 and figure.low < 0 < figure.high


def test_cosines_by_hand():
    rng = np.random.default_rng(2)
    mean = rng.normal(size=50)
    same, left = noisy(rng, mean, 20, 0.01), np.where(np.arange(50) < 25, mean, 0)
    assert cosine(same, same).value == pytest.approx(1)
    assert cosine(same, -same).value == pytest.approx(-1)
    orthogonal = cosine(noisy(rng, left, 20, 0.001), noisy(rng, mean - left, 20, 0.001))
    assert orthogonal.value == pytest.approx(0, abs=1e-3)
    few = np.where(np.arange(20)[:, None] < 4, same, 0)
    assert not cosine(few, same).is_known  # four problems have a gradient
    noise = rng.normal(size=(20, 50)).astype(np.float32)
    figure = cosine(noise, same)
    assert not figure.is_known or (figure.low, figure.high) == (-1, 1)  # its mean is lost


def test_a_sketch_keeps_products():
    """Of gradients with the cosines 1, 0.6 and 0, over parameters of several shapes."""
    rng = np.random.default_rng(3)
    shapes = {"a": (300, 400), "b": (7,), "c": (3, 50, 500)}
    draw = lambda: {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    first, other = draw(), draw()
    mixed = {path: 0.6 * x + 0.8 * other[path] for path, x in first.items()}
    sketches = [sketch({path: jnp.asarray(x) for path, x in grads.items()}) for grads in (first, mixed, other)]
    assert sketches[0].shape == (WIDTH,) and sketches[0].dtype == np.float32
    norms = [np.linalg.norm(x) for x in sketches]
    products = [sketches[0] @ x / norms[0] / norm for x, norm in zip(sketches, norms, strict=True)]
    np.testing.assert_allclose(products, [1, 0.6, 0], atol=6 / np.sqrt(WIDTH))
    expected = np.sqrt(sum(np.sum(x**2) for x in first.values()))
    assert norms[0] == pytest.approx(expected, rel=6 / np.sqrt(WIDTH))
    # Values of one sign, as those of a bias may be, do not add up.
    assert np.linalg.norm(sketch({"a": jnp.ones(2 * WIDTH)})) == pytest.approx(np.sqrt(2 * WIDTH), rel=0.03)
    both = sketch({"a": jnp.ones(WIDTH), "b": jnp.ones(WIDTH)})  # nor do those of two weights
    assert np.linalg.norm(both) == pytest.approx(np.sqrt(2 * WIDTH), rel=0.03)


def test_a_gradient_is_that_of_the_objective_alone():
    """Without the terms and departures that a run may add, which would be in one of the gradients only."""
    added = {"beta": 0.01, "entropy_coef": 0.1, "num_iterations": 2, "importance_sampling_cap": 2.0}
    added |= {"train_drafts": True, "draft_when": "unsolved", "group": "prompt", "improvement_bonus": 0.5}
    added |= {"repeat_penalty": 0.5, "alternate": 3, "refine_credit": "context"}
    own = {"loss_type": "dapo", "epsilon_high": 0.4, "scale_rewards": "none", "num_drafts": 2}
    asked = Config(algorithm=AlgorithmConfig(**added | own), learner=LearnerConfig(minibatches=2), prompts_per_step=8)
    made = learner_config(asked)
    assert made.algorithm == AlgorithmConfig(**own, refine_credit="plain")
    assert (made.learner.minibatches, made.prompts_per_step) == (1, 1)


def problem(index, contexts, kept=(True, False, True, True), answers=2):
    """A problem with G plain answers, and G refinements for each of `contexts`, by whether their draft is right."""
    rng = np.random.default_rng(index)
    draw = lambda count: rng.integers(1, 64, count).astype(np.int32)
    plain = tuple(completion("draft", i, draw(4 + i), float(i < answers)) for i in range(G))
    q = draw(6)
    refined = tuple(
        Refined(
            completion("draft", 0, draw(3), float(is_right)),
            q if context is None else context,
            tuple(completion("refine", x.sample_id, x.tokens, x.score.rewards["accuracy"]) for x in plain),
        )
        for is_right, context in contexts.items()
    )
    return Answered(Prompt(f"{index}", index, "q", "a", q), plain, np.array(kept), refined)


@pytest.fixture(scope="module")
def learner(tiny):
    built, mesh = make_learner(tiny[0], prompts_per_step=1)
    with jax.set_mesh(mesh):
        yield built, put(tiny[1], mesh)


def gradients_of(learner, folder):
    built, params = learner
    return Gradients(built.programs, params, {}, Console(), folder)


def test_units_by_hand(learner):
    """Two of four are right: advantages +- 0.5 / 0.577. The wrong draft is kept in one of four sets."""
    longer = np.arange(1, 9, dtype=np.int32)
    case = problem(0, {True: longer, False: longer[1:]})
    units = of_kinds(case, learner[0].objective, 18)
    (plain,), size = units["plain"], 0.5 / (np.sqrt(1 / 3) + 1e-4)
    np.testing.assert_allclose(plain.advantage, size * np.array([1, 1, -1, -1]), rtol=1e-5)
    np.testing.assert_allclose(plain.weight, [1 / (4 * length) for length in (4, 5, 6, 7)], rtol=1e-6)
    for unit, context, weight in zip(units["refine"], (longer, longer[1:]), (0.75, 0.25), strict=True):
        np.testing.assert_array_equal(unit.context, context)
        np.testing.assert_allclose(unit.advantage, weight * plain.advantage, rtol=1e-5)
    for unit, weight in zip(units["credited"], (0.75, 0.25), strict=True):
        np.testing.assert_array_equal(unit.context, case.prompt.tokens)
        assert len(unit.completions) == 2  # the right ones, with the weights that they have in their group
        np.testing.assert_allclose(unit.advantage, weight * plain.advantage[:2], rtol=1e-5)
        np.testing.assert_allclose(unit.weight, plain.weight[:2])
    for scale in ("none", "batch"):  # one divisor for all groups changes no direction
        undivided = dataclasses.replace(learner[0].objective, scale_rewards=scale)
        (unit,) = of_kinds(case, undivided, 18)["plain"]
        np.testing.assert_allclose(unit.advantage, [0.5, 0.5, -0.5, -0.5])
    equal = problem(0, {True: longer}, answers=4)
    assert of_kinds(equal, learner[0].objective, 18) == {kind: [] for kind in KINDS}


@pytest.mark.slow
def test_the_same_objective_has_the_cosine_one_and_no_reliance(learner, tmp_path):
    """q' is q, and refinements are the plain answers. A second start reads what is there."""
    cases = [problem(index, {True: None}, kept=[True] * G) for index in range(gradients.FEW + 1)]
    measured = gradients_of(learner, tmp_path).measure(cases, gradients.FEW)
    assert [len(each.sketches) for each in measured] == [3] * gradients.FEW + [0]
    kinds = {kind: np.stack([each.sketches[kind] for each in measured[:-1]]) for kind in KINDS}
    assert np.all(np.linalg.norm(kinds["plain"], axis=1) > 0)
    np.testing.assert_allclose(kinds["plain"], kinds["refine"], atol=1e-6)
    assert np.abs(kinds["credited"] - kinds["refine"]).max() > 1e-3  # the wrong ones are not credited
    assert cosine(kinds["plain"], kinds["refine"]).value == pytest.approx(1, abs=1e-3)
    for each in measured:
        np.testing.assert_allclose(each.reliance["right"], np.zeros(2), atol=1e-5)
        assert len(each.reliance["wrong"]) == 0

    class Never:
        """Programs that compute nothing."""

    again = Gradients(Never(), {}, {}, Console(), tmp_path).measure(cases, gradients.FEW)
    for first, second in zip(measured, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, first._asdict(), second._asdict())
    (more,) = gradients_of(learner, tmp_path).measure(cases[-1:], 1)  # it had reliance alone
    assert set(more.sketches) == set(KINDS)


@pytest.mark.proof
@pytest.mark.slow(seconds=12)
def test_credited_refinements_are_shaped_as_they_are_trained_on(tiny, tmp_path):
    """Against losses written out: the plain answers by A log p, the right refinements by A p / (p + 0.1) of a token.

    Unshaped, as plain credit with credit_gamma = 0, the second gradient has another direction.
    """
    settings = run_config(**DEFAULTS | {"algorithm.num_drafts": G, "algorithm.refine_credit": "context"})
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    case = problem(0, {False: np.arange(1, 9, dtype=np.int32)}, kept=[False] * G)
    with jax.set_mesh(mesh):
        sizes = {"longest_prompt": LONGEST_PROMPT, "total_steps": 1}
        programs = LearnerPrograms(learner_config(settings), tiny[0], mesh, **sizes)
        (each,) = Gradients(programs, put(tiny[1], mesh), {}, Console(), tmp_path).measure([case], 1)
    size, gamma = 0.5 / (np.sqrt(1 / 3) + 1e-4), settings.algorithm.credit_gamma
    assert gamma == 0.1

    def loss(value, completions, params):
        total = 0.0
        for one in completions:
            tokens = np.concatenate([case.prompt.tokens, one.tokens])[None]
            hidden = decoder.apply(tiny[0], params, tokens, np.arange(tokens.size)[None])[0]
            logp = jax.nn.log_softmax(decoder.logits(tiny[0], params, hidden)[0, :-1] / TEMPERATURE)
            own = logp[np.arange(len(logp)), tokens[0, 1:]][-len(one.tokens) :]
            total -= (size if one.score.is_right else -size) * jnp.mean(value(own)) / G
        return total

    shaped = lambda logp: jnp.exp(logp) / (jnp.exp(logp) + gamma)
    expected = lambda *chosen: np.asarray(sketch(jax.jit(jax.grad(functools.partial(loss, *chosen)))(tiny[1])))
    near = lambda got, other: np.abs(got - other).max() < 1e-4 * np.abs(other).max()
    right = case.refined[0].completions[:2]
    assert near(each.sketches["plain"], expected(lambda logp: logp, case.plain))
    assert near(each.sketches["credited"], expected(shaped, right))
    credited, unshaped = each.sketches["credited"], expected(lambda logp: logp, right)
    assert credited @ unshaped < 0.99 * np.linalg.norm(credited) * np.linalg.norm(unshaped)


def test_reliance_by_hand(learner, tmp_path):
    """A draft in the context changes the log-probs, by what a training step would measure of the same group."""
    longer = np.arange(1, 12, dtype=np.int32)
    case = problem(0, {False: longer}, kept=[False] * G)
    (each,) = gradients_of(learner, tmp_path).measure([case], 0)
    built, params = learner
    (part,) = case.refined
    group = Group(case.prompt, (part.draft,), 0, part.context, part.completions)
    expected = diagnostics.reliance(built, params, [group])["refine/reliance"]
    assert np.mean(each.reliance["wrong"]) == pytest.approx(expected, abs=1e-4)
    assert np.abs(each.reliance["wrong"]).max() > 0.01


def test_reliance_of_several_problems_together_is_that_of_each_alone(learner, tmp_path):
    """Also of one without right refinements; of each draft it is what a training step would measure."""
    context = lambda start: np.arange(start, start + 11, dtype=np.int32)
    cases = [problem(index, {True: context(1 + index), False: context(20 + index)}) for index in range(5)]
    cases.insert(2, problem(5, {False: context(40)}, answers=0))
    together = gradients_of(learner, tmp_path / "together").measure(cases, 0)
    built, params = learner
    for number, case in enumerate(cases):
        (alone,) = gradients_of(learner, tmp_path / f"{number}").measure([case], 0)
        for draft in ("right", "wrong"):
            np.testing.assert_allclose(together[number].reliance[draft], alone.reliance[draft], atol=1e-5)
        for part in case.refined:
            group = Group(case.prompt, (part.draft,), 0, part.context, part.completions)
            values = together[number].reliance["right" if part.is_right else "wrong"]
            for expected in diagnostics.reliance(built, params, [group]).values():
                assert np.mean(values) == pytest.approx(expected, abs=1e-4)
    assert [len(each.reliance["right"]) for each in together] == [2, 2, 0, 2, 2, 2]
    values = np.concatenate([each.reliance[draft] for each in together for draft in ("right", "wrong")])
    assert len(np.unique(values.round(4))) == len(values)  # so that none can stand for another


def test_reliance_weighs_a_draft_by_how_often_it_is_kept():
    """Three of four sets keep the right draft. Its refinements have 1 and 3 nats, those of the wrong one 10."""
    cases = [problem(index, {True: None, False: None}) for index in range(6)]
    values = {"right": np.array([1.0, 3.0]), "wrong": np.array([10.0])}
    figures = gradients.reliance(cases, [Measured({}, values)] * 6)
    assert figures["reliance"].value == pytest.approx((0.75 * 4 + 0.25 * 10) / (0.75 * 2 + 0.25))
    assert figures["reliance_right"].value == 2 and figures["reliance_wrong"].value == 10
    assert not gradients.reliance(cases[:4], [Measured({}, values)] * 4)["reliance"].is_known
