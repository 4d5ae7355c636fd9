"""Sampling on a mesh of its own: token ids whatever the mesh, what the decode step exchanges, and what is refused."""

import dataclasses
import runpy
import types

import jax
import numpy as np
import pytest
import tiny_models
from engines import make_engine
from processes import ROOT
from tiny_models import one_device

from igrpo_jax import config
from igrpo_jax.aot.collectives import collectives
from igrpo_jax.distributed import sharding, teams
from igrpo_jax.errors import InputError
from igrpo_jax.models.config import from_hf
from igrpo_jax.models.costs import ModelCosts
from igrpo_jax.models.products import as_trained
from igrpo_jax.models.shapes import SHAPES
from igrpo_jax.sampling import layout
from igrpo_jax.sampling.requests import Request
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.scoring import stage_key
from igrpo_jax.sampling.state import Sampling
from igrpo_jax.session import overview

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="divides eight devices")

EOS = (0, 17)
KEY = stage_key(0, 1, 1)
SIZES = {"slots": 8, "longest_prompt": 24, "max_completion": 8, "dtype": "float32", "steps_per_dispatch": 4}
SAMPLINGS = (Sampling(0.8), Sampling(0.8, top_p=0.9, top_k=20), Sampling(0.0))
HYBRID = tiny_models.hybrid_config()
MAMBA = dataclasses.replace(HYBRID.mamba, num_heads=16, num_groups=8)
MODELS = {
    "2 kv heads": tiny_models.tiny_config(num_heads=6, intermediate_size=64),
    "4 kv heads": tiny_models.tiny_config(num_heads=12, num_kv_heads=4, intermediate_size=64, qk_norm=True),
    "hybrid": dataclasses.replace(HYBRID, intermediate_size=64, mamba=MAMBA),
}


# The devices with copies of a head split sequences.
SPLIT = tiny_models.tiny_config(head_dim=128, num_heads=6, intermediate_size=64, attention="splash_interpret")


def training_mesh():
    return sharding.make_mesh(config.MeshConfig(fsdp=8))


def put(params, mesh):
    return {path: sharding.to_global(x, sharding.param_sharding(mesh, path)) for path, x in params.items()}


def sample(engine, params, sampling, lengths=(5, 24), scheduler=None):
    scheduler, samples = scheduler or Scheduler(engine, 0), {}
    scheduler.start(params, sampling)
    assert scheduler.weight_seconds > 0
    for length in lengths:
        tokens = np.random.default_rng(length).integers(1, 64, length).astype(np.int32)
        scheduler.submit(Request(tokens, length, 4, KEY, 8))
    for one in scheduler.drain():
        samples[one.request.index, one.sample_id] = one
    scheduler.finish()
    return samples


@pytest.mark.slow(seconds=25)
@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("2 kv heads", (2, 8)),
        pytest.param("2 kv heads", (1, 4), marks=pytest.mark.proof),
        pytest.param("4 kv heads", (1, 2, 4, 8), marks=pytest.mark.proof),
        pytest.param("hybrid", (1, 2, 4, 8), marks=pytest.mark.proof),
    ],
)
def test_tokens_do_not_depend_on_the_layout(name, tensors):
    """With filters, without, and greedily; also where heads are copied and dealt."""
    cfg = MODELS[name]
    host = tiny_models.random_params(cfg)
    # Two slots of a shard: there is one program of decoding for each number of them.
    alone, params = make_engine(cfg, one_device(), EOS, **SIZES | {"slots": 2}), put(host, one_device())
    expected = [sample(alone, params, sampling) for sampling in SAMPLINGS]
    assert len({tuple(one.tokens) for samples in expected for one in samples.values()}) > 12
    for tensor in tensors:
        sizes = SIZES | {"slots": 2 * 8 // tensor}
        engine, params = make_engine(cfg, training_mesh(), EOS, tensor=tensor, **sizes), put(host, training_mesh())
        assert (engine.mesh.shape["tensor"], engine.shard_slots) == (tensor, 2)
        for sampling, samples in zip(SAMPLINGS, expected, strict=True):
            ours = sample(engine, params, sampling)
            assert ours.keys() == samples.keys()
            for key, one in samples.items():
                np.testing.assert_array_equal(ours[key].tokens, one.tokens, err_msg=f"{tensor} {key}")
                np.testing.assert_allclose(ours[key].logprobs, one.logprobs, atol=2e-5, rtol=0)
                np.testing.assert_allclose(ours[key].entropy, one.entropy, atol=1e-3, rtol=0)


@pytest.mark.proof
@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize(("tensor", "parts"), [(4, 2), (8, 4)])
def test_tokens_do_not_depend_on_which_device_holds_a_sequence(tensor, parts):
    """Pages are so few that sequences are preempted and begun anew; prompts end within a page, which is copied."""
    host, lengths = tiny_models.random_params(SPLIT), (5, 23)  # of both parts of a group
    plain = make_engine(dataclasses.replace(SPLIT, attention="xla"), one_device(), EOS, **SIZES)
    expected = sample(plain, put(host, one_device()), SAMPLINGS[0], lengths)
    sizes = SIZES | {"slots": 16, "pages": 10, "page_size": 4}
    engine = make_engine(SPLIT, training_mesh(), EOS, tensor=tensor, **sizes)
    assert (engine.sizes.parts, engine.shards, engine.shard_slots) == (parts, 8 // tensor * parts, 4)
    pool = engine.programs.state.cache[0]
    assert pool.sharding.shard_shape(pool.shape) == (10, 4, 2, 128)  # keys and values of one head
    with jax.set_mesh(engine.mesh):
        scheduler = Scheduler(engine, 0)
        ours = sample(engine, put(host, training_mesh()), SAMPLINGS[0], lengths, scheduler)
    assert scheduler.usage.preempted > 0 and all(shard.pool.free == 10 for shard in scheduler.shards)
    assert ours.keys() == expected.keys()
    for key, one in expected.items():
        np.testing.assert_array_equal(ours[key].tokens, one.tokens, err_msg=str(key))
        np.testing.assert_allclose(ours[key].logprobs, one.logprobs, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_where_sequences_are_split_a_sublayer_has_two_exchanges_of_query_heads():
    engine = make_engine(SPLIT, training_mesh(), EOS, tensor=4, **SIZES)
    program = engine.programs.decode
    sent = collectives(program.compiled(*program.shapes[-1]).as_text(), 8)
    layers = SPLIT.pattern.count("*")
    assert (sent["all-gather"].count, sent["reduce-scatter"].count) == (1 + layers, layers), sent
    assert sent["all-reduce"].count == len(SPLIT.pattern) + 1 + 1 + 2


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_has_one_reduction_of_each_sublayer(name):
    """And one of the embedding, two small exchanges of the draw, and one that says whether any group goes on, before
    the loop too."""
    cfg = MODELS[name]
    engine = make_engine(cfg, training_mesh(), EOS, tensor=4, **SIZES)
    program = engine.programs.decode
    sent = collectives(program.compiled(*program.shapes[-1]).as_text(), 8)
    assert sent.keys() == {"all-reduce", "all-gather"}, sent
    assert sent["all-reduce"].count == len(cfg.pattern) + 1 + 1 + 2
    # Three numbers of each of 4 parts for each of 4 rows: neither weights nor cache nor logits.
    assert (sent["all-gather"].count, sent["all-gather"].bytes) == (1, 3 / 4 * 4 * (3 * 4) * 4)


@pytest.mark.slow
def test_weights_go_to_the_samplers_mesh():
    cfg = MODELS["2 kv heads"]
    engine = make_engine(cfg, training_mesh(), EOS, tensor=8, **SIZES | {"dtype": "bfloat16"})
    host = tiny_models.random_params(cfg)
    weights = engine.weights(put(host, training_mesh()))
    assert {x.dtype for x in jax.tree.leaves(weights)} == {jax.numpy.dtype("bfloat16")}
    paths = [f"blocks/0/mixer/{name}" for name in ("q_proj", "k_proj")]
    queries, keys = (as_trained(path, weights[path]) for path in paths)
    assert queries.shape == keys.shape == (32, 8, 8)  # 3 query heads of a kv head, dealt to its 4 copies: 1, 1, 1, 0
    assert queries.addressable_shards[0].data.shape == (32, 1, 8)
    whole = np.asarray(queries, np.float32)
    np.testing.assert_array_equal(whole[:, [0, 1, 2, 4, 5, 6]], host["blocks/0/mixer/q_proj"].astype("bfloat16"))
    assert not whole[:, [3, 7]].any()
    np.testing.assert_array_equal(keys[:, 0], keys[:, 3])


def test_what_cannot_be_divided_is_refused():
    make = lambda cfg, **changes: make_engine(cfg, training_mesh(), EOS, **SIZES | changes)
    with pytest.raises(InputError, match=r"config\.rollout\.mesh\.tensor = 3: does not divide the 8 devices"):
        make(MODELS["hybrid"], tensor=3)
    with pytest.raises(InputError, match=r"config\.rollout\.mesh\.tensor = 8: does not divide the model's ffn dim"):
        make(dataclasses.replace(MODELS["2 kv heads"], intermediate_size=36), tensor=8)
    with pytest.raises(InputError, match=r"config\.rollout\.slots = 6: must be a multiple of 8 devices / 2 .* = 4"):
        make(MODELS["2 kv heads"], tensor=2, slots=6)
    with pytest.raises(InputError, match=r"slots = 6: .* = 2 times 2 devices .* value head = 4,"):
        make(SPLIT, tensor=4, slots=6)


def test_a_group_of_two_slices_is_refused(monkeypatch):
    monkeypatch.setattr(sharding, "_slice", lambda device: device.id // 4)
    make_engine(MODELS["2 kv heads"], training_mesh(), EOS, tensor=4, **SIZES)
    with pytest.raises(InputError, match=r"mesh\.tensor = 8: .* within a slice .*; set it to 1 or 2 or 4"):
        make_engine(MODELS["2 kv heads"], training_mesh(), EOS, tensor=8, **SIZES)


def test_on_a_cpu_sampling_has_the_mesh_of_the_training():
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))
    engine = make_engine(MODELS["2 kv heads"], mesh, EOS, **SIZES)
    assert engine.mesh is mesh and (engine.tensor, engine.groups) == (2, 4)


def devices_of(kind, count, per_process):
    """A mesh of devices that are not there, as far as the choice looks at them."""
    platform = "tpu" if "TPU" in kind else "gpu"
    devices = [
        types.SimpleNamespace(device_kind=kind, process_index=i // per_process, platform=platform) for i in range(count)
    ]
    grid = np.array(devices, object).reshape(1, count, 1)
    return types.SimpleNamespace(devices=grid, size=count, shape={"data": 1, "fsdp": count, "tensor": 1})


CHOICES = {"slots": 128, "length": 7000, "lanes": 8, "page_size": 64}


def chosen(name, mesh, memory=None, **changes):
    cfg = from_hf(SHAPES[f"deepseek-ai/DeepSeek-R1-Distill-{name}"], name)
    return layout.choose_tensor(
        dataclasses.replace(cfg, attention="splash"), mesh, "bfloat16", memory=memory, **CHOICES | changes
    )


@pytest.mark.parametrize(
    ("name", "kind", "count", "per_process", "expected"),
    [
        ("Qwen-7B", "TPU v5", 8, 8, 4),  # 8 would be 3 % faster, with two exchanges more in each layer
        ("Qwen-7B", "TPU v6 lite", 16, 8, 8),  # slower memory: 14 % faster than 4
        ("Qwen-7B", "TPU v5", 8, 4, 4),
        ("Qwen-7B", "TPU v5", 8, 2, 4),  # two processes then sample in lockstep
        ("Qwen-14B", "TPU v5", 8, 8, 8),  # 8 kv heads
        ("Qwen-1.5B", "TPU v5 lite", 8, 8, 8),  # 2 kv heads, each on 4 devices with a quarter of the sequences
        ("Qwen-7B", "NVIDIA H100 80GB HBM3", 8, 8, 4),
        ("Qwen-7B", "NVIDIA H100 80GB HBM3", 8, 2, 2),  # a group of GPUs lies within a node
        ("Qwen-7B", "a new chip", 8, 8, 1),
    ],
)
def test_the_choice_is_the_least_time_of_a_token(name, kind, count, per_process, expected):
    assert chosen(name, devices_of(kind, count, per_process)) == expected


@pytest.mark.parametrize(
    ("name", "expected", "in_words"),
    [
        *((name, 4, "Four") for name in ("gpu_h100", "r1_distill_qwen_7b", "qwen2_5_7b", "openmath_nemotron_7b")),
        *((name, 8, "Eight") for name in ("qwen3_8b", "r1_distill_llama_8b")),
        *((name, 8, "Eight") for name in ("r1_distill_qwen_14b", "openmath_nemotron_14b")),
    ],
)
def test_configurations_say_what_is_chosen_on_a_node_of_gpus(name, expected, in_words):
    """And what it takes of each, with JAX's share of a card and with all that JAX can be given."""
    path = ROOT / "configs" / f"{name}.py"
    settings = config.freeze(runpy.run_path(str(path))["get_config"]())
    cfg = dataclasses.replace(from_hf(SHAPES[settings.model.path], name), attention="cudnn")
    mesh, length = devices_of("NVIDIA H100 80GB HBM3", 8, 8), 9296
    mesh.shape["tensor"] = settings.mesh.tensor
    for fraction in (0.75, 0.92):
        memory = fraction * 79.1 * 2**30 - 12 * cfg.num_params / 8  # weights and moments
        sizes = CHOICES | {"slots": settings.rollout.slots, "length": length}
        assert layout.choose_tensor(cfg, mesh, "bfloat16", memory=memory, **sizes) == expected
    said = " ".join(path.read_text().split())
    slot = ModelCosts(cfg, "bfloat16", expected).token_bytes * length / 1e9
    weights = 2 * cfg.num_params / expected / 1e9
    assert f"{in_words} H100s share a copy" in said and f"{weights:.1f} GB on each, and at most {slot:.2f} GB" in said


def test_the_choice_fits_memory_and_slots():
    few = devices_of("TPU v5", 8, 8)
    assert (chosen("Qwen-7B", few), chosen("Qwen-7B", few, slots=130)) == (4, 4)
    assert chosen("Llama-8B", few, slots=129) == 8  # no multiple of 2
    small = devices_of("TPU v5 lite", 8, 8)
    assert chosen("Qwen-14B", small, memory=15.75 * 2**30) == 8
    assert chosen("Qwen-14B", small, memory=2**30) == 1  # nothing fits: that of the training


def test_the_choice_for_a_hybrid():
    cfg = from_hf(SHAPES[name := "nvidia/Nemotron-H-8B-Base-8K"], name)
    cfg = dataclasses.replace(cfg, attention="splash")
    assert layout.choose_tensor(cfg, devices_of("TPU v5", 8, 4), "bfloat16", memory=None, **CHOICES) == 8
    costs = ModelCosts(cfg, "bfloat16", 8)
    none, some = (layout.pages_in(2**35, costs, states, 64) for states in (0, 128))
    assert none - some == pytest.approx(128 * costs.state_bytes / (64 * costs.token_bytes), abs=1)
    assert some < none - 100  # the states of Mamba-2 leave room for fewer pages


def test_what_the_table_of_a_run_says_of_the_layout():
    engine = make_engine(MODELS["2 kv heads"], training_mesh(), EOS, tensor=4, **SIZES)
    assert overview.sampling_layout(engine) == "2 groups of 4 devices (rollout.mesh.tensor), 4 slots each"
    engine.team = teams.Team(processes=(0, 1))
    assert overview.sampling_layout(engine).endswith(
        "; 2 processes sample in lockstep, because a group has devices of several"
    )
