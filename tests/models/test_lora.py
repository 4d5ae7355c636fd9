"""LoRA: only adapters are trained, by the gradient that the chain rule gives, and sampler and trainer use one sum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import make_engine
from learner_cases import ADVANTAGES, assert_close, gradient_of, make_groups, make_learner, put, updated
from model_files import CHATML, save_tokenizer
from tiny_models import one_device

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.programs import tree_bytes
from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder, lora
from igrpo_jax.models.products import as_trained

MESHES = {"one": None, "sharded": config.MeshConfig(data=2, fsdp=2, tensor=2)}
ON = {"model__lora__rank": 3, "model__lora__alpha": 6.0}


def adapters_like(settings, c, seed=1):
    """Random on both sides: with B = 0 half of the mistakes don't show."""
    draw = np.random.default_rng(seed).normal
    return {path: draw(0, 0.2, x).astype(np.float32) for path, x in lora.shapes(settings, decoder.shapes(c)).items()}


def by_hand(base, adapters, scaling):
    """W + scaling A B in numpy, for the tiny model's names."""
    merged = dict(base)
    for path in {path.rpartition("/")[0] for path in adapters}:
        a, b = adapters[f"{path}/lora_a"], adapters[f"{path}/lora_b"]
        merged[path] = base[path] + scaling * np.tensordot(a, b, axes=1)
    return merged


def test_shapes_by_hand(tiny):
    c = tiny[0]
    found = lora.shapes(config.LoraConfig(rank=3, targets=("q_proj", "o_proj", "down_proj")), decoder.shapes(c))
    assert found["blocks/2/mixer/q_proj/lora_a"] == (32, 3)
    assert found["blocks/2/mixer/q_proj/lora_b"] == (3, 4, 8)
    assert found["blocks/2/mixer/o_proj/lora_a"] == (4, 8, 3)
    assert found["blocks/2/mixer/o_proj/lora_b"] == (3, 32)
    assert found["blocks/3/mixer/down_proj/lora_a"] == (48, 3)
    assert len(found) == 2 * 3 * 2
    every = lora.adapted(config.LoraConfig(rank=3), decoder.shapes(c))
    names = {path.rpartition("/")[2] for path in every}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def change_of(weights, changes, dtype="float32"):
    """An Adapted of a diagonal weight whose sum is `weights` + `changes`."""
    put = lambda x: jax.device_put(jnp.asarray(x, jnp.float32), sharding.replicated(one_device()))
    rank = len(weights)
    return lora.Adapted(put(np.diag(weights)).astype(dtype), put(np.eye(rank)), put(np.diag(changes)), 1.0)


@pytest.mark.parametrize(
    ("weights", "changes", "lost"),
    [
        ([1.0], [2**-10], 1.0),  # bfloat16 has steps of 2^-7 from 1 to 2: the sum is rounded to 1
        ([1.0], [2**-7], 0.0),
        ([1.0], [3 * 2**-9], 1 / 3),  # to 1 + 2^-7, 2^-9 above
        ([1.0, 1.0], [2**-10, 2**-7], 65**-0.5),  # 2^-10 of the square root of 2^-20 + 2^-14
        ([1.0], [0.0], 0.0),
    ],
)
def test_what_rounding_loses_of_a_change(weights, changes, lost):
    base = {"x": jnp.ones(3), "y": change_of(weights, changes)}
    assert lora.lost_by(base, "bfloat16") == pytest.approx(lost) and lora.lost_by(base, "float32") == 0
    # With a base in bfloat16 the sum is trained as it is rounded, so that nothing is lost later.
    assert lora.lost_by({"y": change_of(weights, changes, "bfloat16")}, "bfloat16") == 0
    assert lora.lost_by({"x": jnp.ones(3)}, "bfloat16") == 0


def test_what_rounding_loses_of_a_matrix():
    """XLA makes other programs of matrices than of a few numbers, and may leave out conversions there."""
    rng, put = np.random.default_rng(0), lambda x: jax.device_put(x, sharding.replicated(one_device()))
    weight, a, b = (
        rng.normal(0, scale, shape) for scale, shape in ((0.02, (96, 256)), (0.1, (96, 4)), (1e-4, (4, 256)))
    )
    base = lora.Adapted(*(put(x.astype(np.float32)) for x in (weight, a, b)), 8.0)
    merged = np.asarray(base.merged())
    error = merged.astype(jnp.bfloat16).astype(np.float32) - merged
    expected = np.linalg.norm(error) / np.linalg.norm(merged - np.asarray(base.weight))
    assert 0.1 < expected == pytest.approx(lora.lost_by({"w": base}, "bfloat16"), rel=1e-4)


@pytest.mark.parametrize("target", ["q_porj", "embedding", "lm_head", "q_bias", "scale", "self_attn.q_proj"])
def test_a_target_that_matches_nothing(tiny, target):
    with pytest.raises(InputError) as caught:
        lora.shapes(config.LoraConfig(rank=3, targets=("v_proj", target)), decoder.shapes(tiny[0]))
    message = str(caught.value)
    assert message.startswith("config.model.lora.targets = ('v_proj', ") and "\n" not in message
    assert f"{target!r} matches no weight of the model; give some of down_proj, gate_proj, k_proj, o_proj" in message


@pytest.mark.parametrize("changes", [{"rank": -1}, {"alpha": 0.0}, {"targets": ()}])
def test_settings_that_no_run_can_use(changes):
    tree = config.default()
    tree.model.lora.update({"rank": 4} | changes)
    with pytest.raises(InputError, match=rf"config\.model\.lora\.{next(iter(changes))}"):
        config.freeze(tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_policy_is_the_base_bit_for_bit(tiny, dtype):
    c, base = tiny
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    frozen = decoder.cast(put(base, mesh), dtype)
    fresh = lora.init(config.LoraConfig(rank=3), decoder.shapes(c), jax.random.key(0), mesh)
    merged = jax.jit(lora.merge)(lora.attach(frozen, fresh, 2.0))
    assert merged.keys() == frozen.keys()
    for path, x in merged.items():
        assert x.dtype == dtype and (np.asarray(x) == np.asarray(frozen[path])).all(), path
    a = np.asarray(fresh["blocks/0/mixer/o_proj/lora_a"])
    for largest in (a.max(), -a.min()):  # o_proj has 4 heads of 8 as inputs
        assert 0.9 * 32**-0.5 < largest <= 32**-0.5
    assert not (a == np.asarray(fresh["blocks/2/mixer/o_proj/lora_a"])).any()


def lora_learner(tiny, mesh=None, **changes):
    frozen = decoder.cast(tiny[1], changes.get("model__dtype", "float32"))
    return make_learner(tiny[0], mesh, frozen, **ON, **changes)


@pytest.fixture(scope="module")
def chain_rule(tiny):
    """Adapters, and their gradient from that of the whole weights W', by a learner that trains those:
    dA = scaling dW' B^T and dB = scaling A^T dW'.
    """
    settings = config.LoraConfig(rank=3, alpha=6.0)
    adapters = adapters_like(settings, tiny[0])
    state, metrics = updated(make_learner(tiny[0]), by_hand(tiny[1], adapters, 2.0))
    whole = gradient_of(state)
    expected = {}
    for path in lora.adapted(settings, decoder.shapes(tiny[0])):
        a, b, w = adapters[f"{path}/lora_a"], adapters[f"{path}/lora_b"], whole[path]
        cut = a.ndim - 1
        expected[f"{path}/lora_a"] = 2.0 * np.tensordot(w, b, axes=(range(cut, w.ndim), range(1, b.ndim)))
        expected[f"{path}/lora_b"] = 2.0 * np.tensordot(a, w, axes=(range(cut), range(cut)))
    return adapters, expected, metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        *({"learner__remat": "full"}, {"mesh": MESHES["sharded"]}),
        *(pytest.param(each, marks=pytest.mark.proof) for each in ({}, {"learner__remat": "dots"})),
    ],
)
def test_adapters_get_the_gradient_of_the_chain_rule(tiny, chain_rule, changes):
    adapters, expected, metrics = chain_rule
    built = lora_learner(tiny, **changes)
    state, measured = updated(built, adapters)
    assert state.params.keys() == expected.keys()
    assert_close(gradient_of(state), expected, 2e-4)
    assert measured["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    assert measured["entropy"] == pytest.approx(metrics["entropy"], rel=1e-4)
    for path, x in built[0]._frozen.items():
        assert (np.asarray(x) == tiny[1][path]).all(), path  # neither donated nor changed
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(expected)


@pytest.mark.slow
def test_a_loop_over_adapted_sublayers(tiny, chain_rule, monkeypatch):
    """On a mesh. Not only in bfloat16, where it is used."""
    adapters, expected, _ = chain_rule
    monkeypatch.setattr(decoder, "_repeats", lambda kinds, dtype, remat: decoder.stretches(kinds))
    state, _ = updated(lora_learner(tiny, mesh=MESHES["sharded"], learner__remat="full"), adapters)
    assert_close(gradient_of(state), expected, 2e-4)


@pytest.mark.proof
@pytest.mark.slow
def test_a_base_in_bfloat16_is_adapted_too(tiny, chain_rule):
    """Its head and embedding are narrow as well, and get no gradient; the adapters' has the direction it should."""
    adapters, expected, _ = chain_rule
    state, measured = updated(lora_learner(tiny, model__dtype="bfloat16"), adapters)
    found = gradient_of(state)
    assert found.keys() == expected.keys() and measured["grad_norm"] > 0
    assert all(x.dtype == jnp.float32 for x in state.params.values())
    flat = lambda tree: np.concatenate([tree[path].ravel() for path in sorted(expected)])
    a, b = flat(found), flat(expected)
    assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.slow
def test_the_reference_is_the_base(tiny):
    """With B = 0 the policy is its own reference: kl is 0 until the adapters have learned."""
    settings, one_device = (
        config.LoraConfig(rank=3, alpha=6.0),
        sharding.make_mesh(config.MeshConfig(), jax.devices()[:1]),
    )
    fresh = lambda: lora.init(settings, decoder.shapes(tiny[0]), jax.random.key(0), one_device)
    learner, mesh = lora_learner(tiny, reference=fresh(), algorithm__beta=0.1, optimizer__learning_rate=1e-2)
    with jax.set_mesh(mesh):
        state, first = learner.update(learner.init(fresh()), make_groups(), ADVANTAGES, 1)
        state, second = learner.update(state, make_groups(), ADVANTAGES, 2)
    assert first["kl"] == 0 and second["kl"] > 1e-6
    assert tree_bytes(learner._reference) < 0.6 * tree_bytes(learner._frozen)  # tiny is not much wider than rank 3


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_sampler_draws_from_the_trainers_sum(tiny, mesh):
    """In bfloat16 both round the same sum: the weights are equal bit for bit, and log-probs but for the programs."""
    learner, mesh = lora_learner(tiny, MESHES[mesh], model__dtype="bfloat16")
    engine = make_engine(
        tiny[0], mesh, (0,), slots=8, longest_prompt=20, max_completion=18, dtype="bfloat16", steps_per_dispatch=4
    )
    adapters = adapters_like(config.LoraConfig(rank=3, alpha=6.0), tiny[0])
    with jax.set_mesh(mesh):
        weights = engine.weights(learner.rollout_params(put(adapters, mesh)))
    base = {path: np.asarray(jnp.asarray(x, "bfloat16"), np.float32) for path, x in tiny[1].items()}
    for path, x in by_hand(base, adapters, 2.0).items():
        summed = as_trained(path, weights[path])
        assert summed.dtype == "bfloat16" and summed.shape == x.shape
        assert summed.sharding.is_equivalent_to(sharding.param_sharding(mesh, path, gathered=True), x.ndim)
        # Half a unit in the last place of bfloat16, and what float32 leaves open between two of them.
        np.testing.assert_allclose(np.asarray(summed, np.float32), x, rtol=2**-8, atol=1e-6, err_msg=path)
        inside = jax.jit(lora.merge)(learner.rollout_params(put(adapters, mesh))[path])
        assert (np.asarray(inside) == np.asarray(summed)).mean() > 0.999


def test_factors_lie_as_their_weight_does():
    mesh = sharding.make_mesh(MESHES["sharded"])
    spec = lambda path: tuple(sharding.param_sharding(mesh, path).spec)
    assert spec("blocks/0/mixer/q_proj/lora_a") == ("fsdp", None)
    assert spec("blocks/0/mixer/q_proj/lora_b") == (None, "tensor", None)
    assert spec("blocks/0/mixer/o_proj/lora_a") == ("tensor", None, None)
    assert spec("blocks/1/mixer/down_proj/lora_b") == (None, "fsdp")


@pytest.mark.proof
@pytest.mark.slow(seconds=15)
def test_memory_is_that_of_adapters_and_one_sublayer(tiny):
    """Of wider layers, so that weights are what counts: moments, gradients and master weights of adapters only, and
    with remat one sublayer's sum at a time. Red where all are summed first, or where "dots" keeps the product A B.
    """
    c = dataclasses.replace(tiny[0], hidden_size=256, intermediate_size=1024, head_dim=64, pattern="*-" * 6)
    weights = sum(4 * np.prod(shape) for shape in decoder.shapes(c).values())  # 24 MB, and 3 MB in a sublayer at most
    for remat in ("full", "dots"):
        learner, mesh = make_learner(
            c, prompts_per_step=8, learner__tokens_per_microbatch=64, learner__remat=remat, **ON
        )
        with jax.set_mesh(mesh):
            program = learner.programs.accumulate.compiled(learner.packer.shapes.largest)
            needs, temporary = learner.programs.predicted_bytes(), program.memory_analysis().temp_size_in_bytes
        assert temporary < 0.6 * weights, remat
        moments = tree_bytes(learner.programs.state.opt_state)
        assert moments < 0.1 * weights < weights < needs - temporary - moments < 1.1 * weights


# Of a Nemotron-H what peft takes: no part of Mamba-2's in_proj, nor its out_proj, which is an o_proj here.
WHOLE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "targets"), [("qwen2", ("all-linear",)), pytest.param("nemotron_h", WHOLE, marks=pytest.mark.proof)]
)
def test_peft_loads_the_adapters_and_gives_our_logits(tmp_path, family, targets):
    peft = pytest.importorskip("peft")
    import hf_models

    from igrpo_jax.models import policy

    path, out = tmp_path / "model", tmp_path / "adapter"
    if family == "qwen2":
        hf_models.dense_model("qwen2", 4, 2).save_pretrained(path)
    else:
        hf_models.family_model(*hf_models.FAMILIES["hybrid"]).save_pretrained(path)
    save_tokenizer(path, CHATML)
    opened, mesh = policy.open_policy(config.ModelConfig(path=str(path), dtype="float32")), one_device()
    settings = config.LoraConfig(rank=3, alpha=6.0, targets=targets)
    adapters = put(adapters_like(settings, opened.cfg), mesh)
    params = lora.attach(opened.load(mesh, 0), adapters, settings.scaling)
    opened.save_adapter(out, settings, params)
    if family == "nemotron_h":
        both = config.LoraConfig(rank=3, targets=("o_proj",))
        params_of_both = lora.attach(opened.load(mesh, 0), put(adapters_like(both, opened.cfg), mesh), both.scaling)
        with pytest.raises(InputError, match=r"peft takes no adapter for blocks/0/mixer/o_proj, .*out_proj\.weight"):
            opened.save_adapter(tmp_path / "refused", both, params_of_both)
    assert sorted(file.name for file in out.glob("adapter*")) == ["adapter_config.json", "adapter_model.safetensors"]
    base = hf_models.unclipped(hf_models.transformers.AutoModelForCausalLM.from_pretrained(path))
    model = peft.PeftModel.from_pretrained(base, out).eval()
    theirs = hf_models.logits_of_reference(model, hf_models.TOKENS)
    places = np.broadcast_to(np.arange(hf_models.TOKENS.shape[1], dtype=np.int32), hf_models.TOKENS.shape)

    def logits(params):
        return decoder.logits(opened.cfg, params, decoder.apply(opened.cfg, params, hf_models.TOKENS, places)[0])

    ours = np.asarray(jax.jit(logits)(params))
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert np.abs(ours - hf_models.logits_of(path, hf_models.TOKENS)).max() > 0.1
    # What is merged is what transformers runs without peft.
    opened.save(tmp_path / "merged", params)
    merged = hf_models.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").float()
    unloaded = model.merge_and_unload()
    for (name, x), (other, y) in zip(
        sorted(merged.state_dict().items()), sorted(unloaded.state_dict().items()), strict=True
    ):
        assert name == other
        np.testing.assert_allclose(x.numpy(), y.numpy(), rtol=2**-7, atol=1e-5, err_msg=name)
