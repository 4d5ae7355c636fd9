"""FLOPs and bytes by formula, against counts by hand and against what XLA counts of programs without loops."""

import dataclasses
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ROOT

from igrpo_jax import config
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.chips import CHIPS
from igrpo_jax.distributed.programs import Cost, tree_bytes
from igrpo_jax.models import cache as caches
from igrpo_jax.models import decoder
from igrpo_jax.models.config import from_hf
from igrpo_jax.models.costs import ModelCosts, TrainingCosts
from igrpo_jax.models.shapes import SHAPES

# Parameters in billions as the models' authors count them.
PUBLISHED = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.62,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14.77,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8.03,
    "nvidia/OpenReasoning-Nemotron-7B": 7.62,
    "nvidia/OpenMath-Nemotron-7B": 7.62,
    "nvidia/OpenMath-Nemotron-14B": 14.77,
    "Qwen/Qwen2.5-0.5B-Instruct": 0.49,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen/Qwen2.5-Math-7B": 7.62,
    "Qwen/Qwen2.5-7B-Instruct": 7.62,
    "Qwen/Qwen3-8B": 8.19,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.135,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1.71,
    "nvidia/Nemotron-H-8B-Base-8K": 8.10,
}


def test_public_models_have_as_many_parameters_as_published():
    found = {name: from_hf(raw, name).num_params / 1e9 for name, raw in SHAPES.items()}
    assert found == pytest.approx(PUBLISHED, rel=0.01)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda file: file.stem)
def test_the_model_of_every_configuration_is_known(file):
    scope = runpy.run_path(str(file))
    path = scope["get_config"]().model.path
    assert not path or path in SHAPES


def settings(**changes):
    tree = config.default()
    tree.model.dtype = "float32"
    for name, value in changes.items():
        section, _, field = name.partition("__")
        setattr(getattr(tree, section), field, value)
    return config.freeze(tree)


UNIT = (16, 3, 32)  # a prefix of 16 tokens, and 3 completions of 32
TOKENS = 16 + 3 * 32


def training(cfg, mesh=None, **changes):
    return TrainingCosts(settings(**changes), cfg, mesh or one_device(), UNIT)


def one_device():
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])


def test_a_decode_step_by_hand(tiny):
    """3 rows that read 10 positions. A layer: q 32x32, k, v 32x16, o 32x32, three of 32x48; two layers; head 32x64."""
    costs = ModelCosts(tiny[0], "float32", 1)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 64
    attention = 2 * (32 + 32) * 10 * 2  # scores and sums over 4 heads of 8, two layers, multiply-adds
    logits, cache = 3 * 4 * 3 * 64, 3 * 10 * 2 * 2 * 2 * 8 * 4
    assert costs.decode(3, 10) == Cost(3 * (2 * weights + attention), 4 * weights + logits + cache)


def test_a_hybrid_by_hand(hybrid):
    """Two sublayers of Mamba-2, one of attention and an MLP without a gate, each product with what goes in and out."""
    costs = ModelCosts(hybrid[0], "float32", 1)
    mamba = 32 * (3 * 32 + 2 * 16 + 4)  # x, z and o; B and C of two groups; dt
    weights, head = 2 * mamba + (2 * 32 * 32 + 2 * 32 * 16) + 2 * 32 * 48, 32 * 64
    numbers = 2 * (3 * 64 + 2 * 48 + 36) + (2 * 64 + 2 * 48) + 2 * 80
    # In a chunk of 8 each token is weighed with 8 others, by B and C and for each channel, and it writes and reads the
    # state of 8 numbers of each channel.
    recurrence = 2 * 2 * (8 * (16 + 32) + 2 * 32 * 8)
    state, position = 2 * (3 * (32 + 16 + 16) * 4 + 32 * 8 * 4), 2 * 2 * 8 * 4
    assert (costs.state_bytes, costs.token_bytes) == (state, position)
    flops = 64 * (2 * weights + recurrence) + 4 * 32 * 64**2 / 2 + 2 * head
    assert costs.prefill(64) == Cost(flops, 4 * (weights + 64 * numbers + head) + 64 * position + state)
    # A decode step multiplies and adds to each number of the state once, and once to what it reads, and 3 slots take
    # their states in and out.
    flops = 3 * (2 * (weights + head) + 4 * 32 * 10 + 2 * 4 * 32 * 8)
    moved = 4 * (weights + head) + 3 * 4 * 3 * 64 + 3 * 10 * position + 2 * 3 * state
    assert costs.decode(3, 10) == Cost(flops, moved)


def test_a_token_waits_for_memory_or_products_and_for_reductions(tiny):
    """4 devices, 4 sublayers with one reduction each, the embedding and the draw; 6 rows of 32 numbers are summed."""
    chip, alone = CHIPS["TPU v5"], ModelCosts(tiny[0], "float32", 1)
    cost = alone.decode(6, 10)
    assert alone.decode_seconds(chip, 6, 10) == cost.bytes / chip.bandwidth > cost.flops / chip.flops
    slow = dataclasses.replace(chip, flops=1e6)
    assert alone.decode_seconds(slow, 6, 10) == cost.flops / 1e6
    four = ModelCosts(tiny[0], "float32", 4)
    summed = 2 * 3 / 4 * 6 * 32 * 4  # bytes of an all-reduce: of each of the others a quarter, and then their sums
    waits = (4 + 1 + 2) * 8e-6 + (4 + 1) * summed / chip.links
    assert four.decode_seconds(chip, 6, 10) == pytest.approx(four.decode(6, 10).bytes / chip.bandwidth + waits)


def test_devices_that_split_sequences_read_a_part_of_the_cache_and_exchange_query_heads(tiny):
    """4 devices with a kv head and a query head of 8 each, in pairs; 6 rows read 10 positions in 2 layers."""
    cfg, chip = dataclasses.replace(tiny[0], num_kv_heads=4), CHIPS["TPU v5"]
    together = ModelCosts(cfg, "float32", 4)
    split = ModelCosts(dataclasses.replace(cfg, row_parts=2), "float32", 4)
    cache = 2 * 2 * 8 * 4 * 10  # keys and values of a row on a device
    assert split.token_bytes * 10 == cache
    assert together.decode(6, 10).bytes - split.decode(6, 10).bytes == 3 * cache
    exchanged = 2 * 2 * (8e-6 + 6 * 8 * 4 / chip.links)  # of 6 rows a query head, there, and back what it reads
    seconds = together.decode_seconds(chip, 6, 10) + exchanged - 3 * cache / chip.bandwidth
    assert split.decode_seconds(chip, 6, 10) == pytest.approx(seconds, rel=1e-9)


def test_a_forward_pass_is_what_xla_counts(tiny):
    """But for norms, rotations and softmax, which the formula leaves out, and half of the scores, which are masked."""
    c, params = dataclasses.replace(tiny[0], intermediate_size=512, hidden_size=128, num_heads=16), None
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in decoder.shapes(c).items()}
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    run = jax.jit(lambda params, tokens: decoder.apply(c, params, tokens, jnp.arange(64)[None])[0])
    counted = run.lower(shapes, tokens).compile().cost_analysis()["flops"]
    costs = ModelCosts(c, "float32", 1)
    masked = 2 * 2 * 16 * 8 * 64**2 / 2 * 2
    found = costs.prefill(64).flops - 2 * 64 * 128 + masked  # the head runs at one position
    assert params is None and 0.9 < found / counted < 1.02


def test_an_update_is_forward_and_backward_and_with_remat_forward_again(tiny):
    size = 2 * TOKENS
    costs = training(tiny[0])
    head = 2 * 32 * 64 * 2 * 3 * 32
    forward = costs.rescore(size).flops - head
    for remat, passes, heads in (("none", 3, 3), ("logits", 3, 4), ("dots", 3, 4), ("full", 4, 4)):
        assert costs.accumulate(size, remat).flops == pytest.approx(passes * forward + heads * head)


def test_bytes_of_an_update_by_hand(tiny):
    """The head in two chunks of 48 positions: it is read for each, and its gradient is added to for each."""
    costs, every = training(tiny[0], learner__logprob_chunk=48), tiny[0].num_params
    weights, head = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 32 * 64
    numbers = 2 * (2 * 64 + 2 * 48 + 3 * 80)
    forward = 4 * (weights + TOKENS * numbers)
    logits = 2 * 4 * head + 8 * 64 * 96
    assert costs.rescore(TOKENS).bytes == forward + logits
    added = 8 * (weights + every) + 2 * 8 * head
    assert costs.accumulate(TOKENS, "none").bytes == 3 * (forward + logits) + added
    assert costs.accumulate(TOKENS, "full").bytes == 4 * (forward + logits) + added
    # Of a quarter of a micro-batch the positions fill no chunk, but the head is read once.
    assert costs.rescore(TOKENS / 4).bytes == 4 * (weights + TOKENS / 4 * numbers) + 4 * head + 8 * 64 * 24
    assert costs.apply(100) == Cost(15 * every, 12 * every + 200)


def test_a_micro_batch_is_as_many_units_as_its_tokens_make(tiny):
    """By hand: a prefix of 16 once, three completions of 32 that see it and half of themselves, logits of these."""
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    pairs = 16 * 8 + 3 * 32 * (16 + 16)
    unit = 2 * weights * TOKENS + 4 * 2 * 4 * 8 * pairs + 2 * 32 * 64 * 3 * 32
    costs = training(tiny[0])
    gradient = lambda size: costs.accumulate(size, "none")
    for units in (0.5, 1, 7):
        assert costs.rescore(units * TOKENS).flops == pytest.approx(units * unit)
        assert gradient(units * TOKENS).flops == pytest.approx(units * gradient(TOKENS).flops)
    # The gradient is added once, however few tokens there are.
    assert gradient(TOKENS).bytes < gradient(2 * TOKENS).bytes < 2 * gradient(TOKENS).bytes


def test_a_narrow_head_is_read_narrow(tiny):
    """Once for each chunk, as `logprobs` does, which casts it before: 3 chunks of 64 positions."""
    chunked = {"learner__logprob_chunk": 64}
    wide, narrow = training(tiny[0], **chunked), training(tiny[0], model__dtype="bfloat16", **chunked)
    logits = 8 * 64 * 192  # of both in float32
    read = [costs._logits(192).bytes - logits for costs in (wide, narrow)]
    assert read == [3 * 32 * 64 * 4, 3 * 32 * 64 * 2]


def test_useful_work_by_hand(tiny):
    """A prefix of 16 tokens once, and completions of 32 and 8, which see it and half of themselves."""
    costs = ModelCosts(tiny[0], "float32", 1)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    pairs = 16 * 8 + 32 * (16 + 16) + 8 * (16 + 4)
    assert costs.useful_flops(17, [32, 8], 1) == 2 * weights * 56 + 4 * 2 * 4 * 8 * pairs + 2 * 32 * 64 * 40
    assert costs.useful_flops(17, [32, 8], 3) == 3 * costs.useful_flops(17, [32, 8], 1)


@pytest.mark.parametrize("name", ["tiny", "hybrid"])
def test_useful_work_is_that_of_programs_without_padding(name, request):
    c = request.getfixturevalue(name)[0]
    one = training(c)
    four = training(c, sharding.make_mesh(config.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]))
    assert one.model.useful_flops(17, [32] * 3, 1) == pytest.approx(one.rescore(TOKENS).flops)
    assert four.model.useful_flops(17, [32] * 3, 1) == pytest.approx(one.rescore(TOKENS).flops)  # of all devices
    useful, head = one.model.useful_flops(17, [32] * 3, 3), 2 * c.hidden_size * c.vocab_size * 3 * 32
    assert useful == pytest.approx(one.accumulate(TOKENS, "none").flops)
    assert useful == pytest.approx(one.accumulate(TOKENS, "logits").flops - head)  # without what is recomputed
    # Padding costs the program as much as tokens do, and is of no use.
    assert (
        one.model.useful_flops(17, [32, 5, 1], 1)
        < one.model.useful_flops(17, [32, 32, 1], 1)
        < one.rescore(TOKENS).flops
    )


def test_a_mesh_splits_work_and_bytes(tiny):
    one = training(tiny[0])
    eight = training(tiny[0], sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2)))
    # The size is that of a packed sequence, and each of 4 shards of the batch has one.
    assert eight.accumulate(TOKENS, "none").flops == pytest.approx(one.accumulate(4 * TOKENS, "none").flops / 8)
    assert eight.apply(100).bytes == one.apply(400).bytes / 4  # replicas over data make the same step
    assert eight.model.decode(4, 16).flops == one.model.decode(4, 16).flops / 2
    assert eight.model.token_bytes == one.model.token_bytes / 2


@pytest.mark.parametrize("name", ["tiny", "hybrid"])
def test_bytes_of_a_slot_are_those_of_the_cache(name, request):
    c = request.getfixturevalue(name)[0]
    costs = ModelCosts(c, "float32", 1)
    places = caches.shardings(c, one_device())
    cache = jax.eval_shape(lambda: caches.empty(c, pages=15, page_size=8, slots=5, dtype=jnp.float32))
    put = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), cache, places)
    assert tree_bytes(put) == 5 * (24 * costs.token_bytes + costs.state_bytes)


def test_muon_multiplies_its_matrices(hybrid):
    """Five steps with a matrix [a, b], a <= b, are two products a a b and one a a a each, of 2 FLOPs a number."""
    tree = config.default()
    tree.optimizer.name = "muon"
    muon = TrainingCosts(config.freeze(tree), hybrid[0], one_device(), UNIT)
    expected = 0
    for path, shape in decoder.shapes(hybrid[0]).items():
        if path.rpartition("/")[2].endswith("_proj"):
            cut = 1 if not path.endswith(("o_proj", "down_proj")) else len(shape) - 1
            small, large = sorted((np.prod(shape[:cut]), np.prod(shape[cut:])))
            expected += 5 * (2 * 2 * small * small * large + 2 * small**3)
    assert muon.apply(0).flops - training(hybrid[0]).apply(0).flops == expected > 0
    four = sharding.make_mesh(config.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    assert TrainingCosts(config.freeze(tree), hybrid[0], four, UNIT).apply(0).flops == muon.apply(0).flops / 4


def test_lora_moves_less_in_the_optimizer(tiny):
    tree = config.default()
    tree.model.lora.rank = 4
    lora = TrainingCosts(config.freeze(tree), tiny[0], one_device(), UNIT)
    whole = training(tiny[0])
    assert 0 < lora.apply(0).bytes < whole.apply(0).bytes / 2
    assert lora.accumulate(TOKENS, "none").flops == whole.accumulate(TOKENS, "none").flops


@pytest.mark.slow
def test_less_is_kept_than_the_compiler_counts(tiny):
    """Of wide sublayers, what their products give; nothing where all is computed again. A mesh splits it by tensor."""
    c = dataclasses.replace(tiny[0], hidden_size=64, intermediate_size=512, pattern="*-" * 4)
    costs = training(c)
    by_hand = 4 * (32 + 2 * 16 + 64 + 2 * 512 + 64)  # q, k and v, o, gate and up, down; in 4 layers
    assert costs.least_kept_bytes(256, "dots") == 4 * 256 * by_hand
    assert costs.least_kept_bytes(256, "logits") == 1.5 * 4 * 256 * by_hand and costs.least_kept_bytes(256, "full") == 0
    completions = 256 / TOKENS * 3 * 32
    logits = 4 * completions * c.vocab_size
    assert costs.least_kept_bytes(256, "none") == pytest.approx(costs.least_kept_bytes(256, "logits") + logits)
    four = training(c, sharding.make_mesh(config.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]))
    assert four.least_kept_bytes(256, "dots") == costs.least_kept_bytes(256, "dots") / 2
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in decoder.shapes(c).items()}
    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def temporaries(remat):
        of_sublayers = "none" if remat == "logits" else remat
        run = lambda params, tokens: decoder.apply(c, params, tokens, jnp.arange(256)[None], remat=of_sublayers)
        loss = lambda params, tokens: run(params, tokens)[0].sum()
        program = jax.jit(jax.grad(loss)).lower(shapes, tokens)
        return program.compile(decoder.barrier_options("cpu")).memory_analysis()

    for remat in ("dots", "logits"):
        assert costs.least_kept_bytes(256, remat) < temporaries(remat).temp_size_in_bytes
