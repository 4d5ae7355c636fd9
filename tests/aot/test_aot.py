"""What a run needs of a slice of TPUs, by their own compiler: no chip is here, nor needed.

A small model on four chips, two of which share the weights: its programs are compiled once for all tests, and one that
cannot fit again.
"""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import whole_runs
from jax.sharding import NamedSharding, PartitionSpec

from igrpo_jax import config
from igrpo_jax.aot import __main__ as aot
from igrpo_jax.aot import building, footprint
from igrpo_jax.aot.collectives import Traffic, collectives
from igrpo_jax.aot.progress import Progress
from igrpo_jax.distributed import sharding, teams
from igrpo_jax.distributed.chips import Chip
from igrpo_jax.distributed.programs import Cost, Program, tree_bytes
from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder
from igrpo_jax.sampling import page_count
from igrpo_jax.sampling.row_sync import SyncProgram

pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
pytestmark = pytest.mark.usefixtures("environment")

START = "--config.warm_start.steps=0"
SETTINGS = {
    "model.dtype": "bfloat16",
    "model.builtin.num_layers": 1,
    "model.builtin.hidden_size": 256,
    "model.builtin.num_heads": 2,
    "model.builtin.num_kv_heads": 2,
    "model.builtin.intermediate_size": 512,
    "mesh.tensor": 2,
    "rollout.mesh.tensor": 2,
    "rollout.slots": 32,
    "learner.minibatches": 1,
    "evaluation.every": 0,
    "checkpoint.best_metric": "",
}
COMMAND = [f"--config.{name}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "config.py"
    path.write_text(whole_runs.CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def printed():
    """The lines that were printed while the programs of `found` were compiled."""
    return []


@pytest.fixture(scope="module")
def found(printed):
    described = footprint.describe(whole_runs.settings(**SETTINGS).model)
    with pytest.MonkeyPatch.context() as patch:  # logits are larger than what is drawn from them
        patch.setattr(footprint, "describe", lambda settings: dataclasses.replace(described, vocab_size=4096))
        made = footprint.prepare(whole_runs.settings(**SETTINGS), aot.topology("v5e:2x2"))
    building.build(made, Progress(printed.append))
    return made


def one(found, kind):
    return max((one for one in found.programs if one.kind == kind), key=lambda one: one.total)


@pytest.mark.slow
def test_every_kind_of_program_is_built(found):
    kinds = [one.kind for one in found.programs]
    assert set(kinds) == {
        "accumulate",
        "rescore",
        "apply",
        "weights",
        *(program.name for program in found.engine.programs),
    }
    assert all(one.seconds > 0 and not one.refused and one.code > 0 for one in found.programs)
    assert found.cfg.attention == "splash" and found.fits


@pytest.mark.slow
def test_each_program_has_a_line_as_soon_as_it_is_compiled(found, printed):
    assert sorted(line.partition(": compiled in ")[0].strip() for line in printed) == sorted(
        part.name for part in found.programs
    )


@pytest.mark.slow
def test_the_time_of_gradients_is_that_of_choosing_remat(found):
    """They are compiled then, and not again: that would seem to take no time."""
    assert found.learner.remat == "none"
    assert one(found, "accumulate").seconds > 1


@pytest.mark.slow
def test_arguments_are_what_the_parts_say(found):
    """The compiler's bytes, which pad to whole tiles, against shapes and shardings."""
    state, engine = found.learner.state, found.engine
    params, moments = tree_bytes(state.params), tree_bytes(state.opt_state)
    expected = {
        "apply": 2 * params + moments,  # the gradient too
        "prefill": engine.programs.weight_bytes + engine.state_bytes,
        "decode": engine.programs.weight_bytes + engine.state_bytes,
    }
    assert {kind: one(found, kind).arguments for kind in expected} == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
def test_what_waits_beside_a_program(found):
    """The training state while completions are sampled, the moments during a backward pass, and never twice."""
    state = found.learner.state
    params, moments = tree_bytes(state.params), tree_bytes(state.opt_state)
    assert one(found, "accumulate").beside == moments
    assert one(found, "rescore").beside == moments  # no reference: the policy, which is scored, is an argument
    assert one(found, "apply").beside == 0
    for kind in ("prefill", "decode"):  # the state of the sampler and the weights to sample with are arguments
        assert one(found, kind).beside == params + moments
    for kind in ("empty", "fork", "harvest"):
        assert one(found, kind).beside == params + moments + found.engine.programs.weight_bytes


def test_a_reference_waits_too():
    devices = jax.devices()[:1]
    mesh = sharding.make_mesh(config.MeshConfig(), devices)
    waiting = {}
    for beta, offload in ((0.0, False), (0.1, True), (0.1, False)):
        fields = {"mesh.tensor": 1, "algorithm.beta": beta, "learner.offload_reference": offload}
        c = whole_runs.settings(**SETTINGS | fields)
        cfg = footprint.describe(c.model)
        programs = footprint.LearnerPrograms(c, cfg, mesh, longest_prompt=64, total_steps=1)
        waiting[beta, offload] = programs.waiting_bytes
    size = tree_bytes(programs.state.params)
    alone = np.array(waiting[0.0, False])
    np.testing.assert_array_equal(waiting[0.1, False], alone + size)
    # In host memory it waits unless it is scored, when the policy waits.
    np.testing.assert_array_equal(waiting[0.1, True], alone + np.array([0, size, 0]))


@pytest.mark.slow
def test_weights_are_gathered_once_for_sampling_and_neither_cache_nor_logits_in_decoding(found):
    engine, decode = found.engine, one(found, "decode")
    syncs = {sync.program: sync for sync in found.syncs}
    synced = [(part, syncs[part.program].calls) for part in found.programs if part.kind == "weights"]
    assert sum(part.received * calls for part, calls in synced) > 0.99 * engine.programs.weight_bytes / 2
    # Each call for the embedding takes it whole and fills a piece of its copy.
    in_pieces = [part for part, _ in synced if part.name == "weights embedding"]
    held = sum((part.arguments + part.output) * (1 if part in in_pieces else calls) for part, calls in synced)
    expected = tree_bytes(found.learner.state.params) + engine.programs.weight_bytes
    assert held == pytest.approx(expected, rel=0.15)
    assert [calls for part, calls in synced if part in in_pieces] == [8]
    state = sum(map(tree_bytes, (found.learner.state.params, found.learner.state.opt_state)))
    for part, _ in synced:  # its arguments are part of the state, and it holds no copy beside the result
        copy = engine.sync.copy_bytes("embedding") / 4 if part in in_pieces else part.output
        assert "/" not in part.name and (part.name == "weights final_norm" or part.temporaries <= 1.1 * copy)
        assert part.beside + part.arguments + part.output == pytest.approx(
            state + engine.programs.weight_bytes, rel=0.15
        )
    cache = engine.state_bytes / engine.shard_slots  # of one slot
    logits = 4 * engine.shard_slots * found.cfg.vocab_size
    # Partial sums of the two chips that share the weights, of two sublayers and the embedding; an exchange of the draw;
    # and twice whether a group goes on.
    assert decode.sent.pop("all-reduce").count == 2 + 1 + 1 + 2
    assert all(traffic.bytes < min(cache, logits) / 4 for traffic in decode.sent.values()), decode.sent


@pytest.mark.slow
def test_the_command(found, file, monkeypatch, capsys):
    monkeypatch.setattr(footprint, "prepare", lambda c, devices: found)
    monkeypatch.setattr(building, "build", lambda made, progress: None)
    aot.main(["aot", "--config", file, "--topology", "v5e:2x2", *COMMAND])
    said = capsys.readouterr().out.splitlines()
    figures = json.loads(said[-1])
    assert figures["fits"] and figures["devices"] == 4 and figures["topology"] == "v5e:2x2"
    assert said[-2].startswith("fits: ") and f"in {figures['fullest']}" in said[-2]
    assert len(figures["programs"]) == len(found.programs)
    calls, received = sum(sync.calls for sync in found.syncs), found.weights_received / 1e9
    assert f"weights to sample with: {calls} calls of their programs, {received:.3g} GB to each chip in a step" in said


@pytest.mark.slow
def test_a_chip_that_is_too_small(found):
    """What to change depends on which program is the fullest."""
    small = dataclasses.replace(found, chip=dataclasses.replace(found.chip, hbm_bytes=1 << 20))
    assert not small.fits
    said = aot.conclusion(small)
    assert said[0].startswith(f"does not fit: {small.fullest.name} needs") and len(said) > 3
    for kind, field in (("accumulate", "learner.tokens_per_microbatch"), ("decode", "rollout.slots")):
        fullest = dataclasses.replace(small, programs=[one(found, kind)])
        assert any(field in line for line in aot.advice(fullest))
        named = [line.partition(" ")[0] for line in aot.advice(fullest)]
        for name in filter(lambda name: "." in name, named):
            config.check_field(name)


@pytest.mark.proof
@pytest.mark.slow
def test_a_cache_that_is_too_large(file, monkeypatch, capsys):
    """Too many pages for a chip, by the compiler itself; of the programs only those that need little to compile."""
    prepare = footprint.prepare

    def prepare_cheap(c, devices):
        run = prepare(c, devices)
        sampler, training = run.engine.programs, run.learner
        sampler.harvest.largest = sampler.fork.largest = sampler.decode.largest = []
        training.accumulate.lower = training.rescore.lower = lambda shape: training.apply.lower()
        return run

    monkeypatch.setattr(footprint, "prepare", prepare_cheap)
    with pytest.raises(SystemExit) as ended:
        aot.main(["aot", "--config", file, "--topology", "v5e:2x2", *COMMAND, "--config.rollout.pages=1048576"])
    said = capsys.readouterr().out.splitlines()
    assert ended.value.code == aot.DOES_NOT_FIT == 3
    assert not json.loads(said[-1])["fits"]
    assert any(line.startswith("does not fit: empty") for line in said)
    assert any("rollout.pages = 1048576: " in line for line in said)


def hand_made(**fields):
    """A footprint whose programs and costs are few numbers: a call of each takes some FLOPs, or bytes over links."""
    settings = {"prompts_per_step": 6, "rollout.max_completion_length": 64, "algorithm.num_generations": 4}
    settings |= {"algorithm.num_iterations": 2, "algorithm.beta": 0.1}
    made = lambda name, flops: Program(name, None, None, None, cost=lambda *shape: Cost(sum(shape, flops), 0))
    programs = {name: made(name, flops) for name, flops in (("accumulate", 0), ("rescore", 44), ("apply", 700))}
    weights, prefill, decode = (made(name, 0) for name in ("weights", "prefill", "decode"))
    shapes = SimpleNamespace(largest=355, shards=3, completions_per_unit=4)
    costs = SimpleNamespace(
        prefill=lambda context: Cost(0, context),
        decode=lambda rows, read: Cost(1000 * rows + read, 0),
        decode_seconds=lambda chip, rows, read: 12.0,
    )
    received = {weights: 5.0, programs["apply"]: 90.0, prefill: 7.0}
    parts = [footprint.ProgramFootprint(one, one.name, Cost(0, 0), 0) for one in (*programs.values(), weights, prefill)]
    for part in parts:
        part.sent = {"all-gather": Traffic(1, received.get(part.program, 0)), "all-reduce over DCN": Traffic(1, 7.0)}
    sizes = SimpleNamespace(page_size=16, parts=1, pages=13)
    return footprint.Footprint(
        config=whole_runs.settings(**settings | fields),
        chip=Chip("a chip", hbm_bytes=1e3, flops=100, bandwidth=10, links=2),
        mesh=None,
        cfg=None,
        learner=SimpleNamespace(**programs, packer=SimpleNamespace(shapes=shapes)),
        engine=SimpleNamespace(groups=4, sizes=sizes, shard_slots=8),
        sampler=SimpleNamespace(costs=costs, prefill=prefill, decode=decode, chunks=[16, 48]),
        syncs=[SyncProgram(weights, calls=3, held=0)],
        longest_prompt=100,
        programs=parts,
    )


def test_the_least_time_of_a_step_by_hand():
    """6 prompts of 32 tokens, and of 100 with drafts; on each of 4 shards 2 of them, 13 pages of 16 tokens, 8 slots."""
    made = hand_made()
    # A draft holds half a prompt and itself, so that 2 of 3 are decoded at once, twice 64 tokens; of 6 refinements 1,
    # which holds a quarter of a prompt, 6 pages and a half, and the page that is its own.
    assert made.step() == {
        "weights": (3 * 5 / 2, "links"),
        "prefill of drafts": (7 * 2 / 2, "links"),  # in two chunks of 48 tokens
        "decoding of drafts": (2 * 64 * (2000 + 32 + 32) / 100, "compute"),
        "prefill of refinements": (2 * 100 / 10, "memory"),
        "decoding of refinements": (6 * 64 * 12, "compute"),  # with the reductions; work alone takes 11.3 s a token
        # 6 units of a prefix of 99 tokens and 4 completions of 64 fill packed sequences of 3 x 355 tokens twice.
        "gradients": (2 * 2 * 355 / 100, "compute"),
        # Of the policy before the update, which makes four steps, and of the reference.
        "log-probs": (2 * 2 * (355 + 44) / 100, "compute"),
        "optimizer": (4 * 90 / 2, "links"),
    }
    assert made.over_dcn == 7 * (3 + 4 + 4 + 4)
    # At a quarter of the lengths 4 of 6 are decoded at once, and the others as soon as one of them ends.
    assert made.step(0.25)["decoding of refinements"][0] == pytest.approx(6 / 4 * 16 * (4000 + 49 + 8) / 100)
    alone = hand_made(**{"algorithm.num_iterations": 1, "learner.minibatches": 1, "algorithm.beta": 0.0})
    assert "log-probs" not in alone.step() and alone.over_dcn == 7 * (3 + 2 + 1)


def test_what_is_used_at_the_fullest():
    """A program of two shapes has its machine code twice, each as large as the largest that was compiled."""
    made = hand_made()
    apply = made.programs[2]
    apply.program.shapes = [(1,), (2,)]
    apply.code, apply.beside, apply.arguments, apply.temporaries, apply.output = 30, 100, 200, 400, 240
    assert made.fullest is apply and apply.total == 940 and made.code == 60
    assert made.fits and made.used_fraction == 1
    apply.code += 1
    assert not made.fits
    made.programs.append(dataclasses.replace(apply, code=5))
    assert made.code == 62
    made.programs[0].refused = "too much"
    assert made.fullest is made.programs[0]


@pytest.mark.parametrize(("least", "said"), [(9, "at most about 9 (0.0 MiB each)"), (10, "fewer, or 0 for")])
def test_how_many_pages_would_fit(least, said):
    """Of 13 pages of 32 bytes 9, where 100 bytes are too many, if they hold one sequence."""
    made = hand_made(**{"rollout.pages": 13})
    made.programs[0].beside = 1100
    made.sampler.costs.token_bytes, made.engine.sizes.least_pages, made.engine.tensor = 2, least, 1
    assert aot._advise_rollout(made)[0].startswith(f"rollout.pages = 13: {said}")


@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4", "v5p:4x4x4", "v5e:2x4"])
@pytest.mark.parametrize("sizes", [(1, -1, 1), (1, -1, 2), (1, -1, 4), (2, -1, 2), (-1, 4, 1)])
def test_a_process_has_whole_replicas(name, sizes):
    """JAX's own arrangement follows the torus, tears processes to pieces, and refuses some of these."""
    devices = aot.topology(name)
    mesh = sharding.make_mesh(config.MeshConfig(*sizes), devices)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    for process in np.unique(owners):
        places = [np.unique(axis) for axis in np.nonzero(owners == process)]
        assert (owners[np.ix_(*places)] == process).all()
        assert len(places[2]) == mesh.shape["tensor"]


@pytest.mark.parametrize("name", ["v5p:2x2x2", "v5p:2x2x4", "v5e:4x4", "v6e:4x4", "v5e:2x4", "v5e:4x8", "v5p:4x4x4"])
@pytest.mark.parametrize("sizes", [(1, -1, 1), (2, -1, 1), (4, -1, 1), (-1, 4, 1), (1, -1, 2)])
def test_groups_to_sample_in_are_neighbours_within_a_host(name, sizes):
    mesh = sharding.make_mesh(config.MeshConfig(*sizes), aot.topology(name))
    assert {1, 2, 4} <= set(teams.tensors(mesh))
    for group in teams.sampler_mesh(mesh, 4).devices.reshape(-1, 4):
        assert len({device.process_index for device in group}) == 1
        assert np.ptp([device.coords for device in group], axis=0).max() == 1  # 2 x 2 chips


@pytest.mark.parametrize(
    ("name", "spread"), [("v5p:2x2x2", (1, 1, 1)), ("v6e:4x4", (3, 1, 0)), ("v5p:4x4x4", (1, 1, 1))]
)
def test_a_group_of_two_hosts_is_one_team_of_neighbours(name, spread):
    mesh = sharding.make_mesh(config.MeshConfig(), aot.topology(name))
    whole = teams.sampler_mesh(mesh, 8)
    for group in whole.devices.reshape(-1, 8):
        assert len({device.process_index for device in group}) == 2
        assert sorted(np.ptp([device.coords for device in group], axis=0)) == sorted(spread)
    team = teams.team_of(whole)
    assert (team.number, team.count, len(team.processes)) == (0, mesh.size // 8, 2)
    assert teams.team_mesh(whole, team).size == 8


@pytest.mark.slow
def test_a_team_that_is_a_part_of_the_slice(monkeypatch):
    """libtpu aborts the process where it gets the chips of a team as a part of a larger slice."""
    made = footprint.prepare(whole_runs.settings(**SETTINGS), aot.topology("v5e:4x4"))
    assert made.engine.mesh.size == 4 < made.mesh.size
    assert made.sampler is not made.engine.programs
    assert collectives(made.sampler.fork.compile().as_text(), 4)
    more = lambda programs: programs.resized(dataclasses.replace(programs.sizes, pages=77))
    monkeypatch.setattr(page_count, "fitted", more)
    fitted = footprint.fitted(made)
    assert fitted.sampler.sizes == fitted.engine.sizes == dataclasses.replace(made.engine.sizes, pages=77)
    assert fitted.sampler.mesh == made.sampler.mesh and fitted.engine.mesh == made.engine.mesh


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "drafted"),
    [
        ({}, 24 + 9),  # a draft of the longest completion, and what stands around it
        ({"algorithm.num_drafts": 0}, 0),
        ({"refine.max_draft_length": 200}, 24 + 9),  # no draft is longer than a completion
        ({"refine.max_draft_length": 5}, 5 + 9),
    ],
)
def test_the_longest_prompt_is_that_with_a_draft(fields, drafted):
    made = footprint.prepare(whole_runs.settings(**{"mesh.fsdp": 1, **fields}), aot.topology("v5e:2x2")[:1])
    assert made.longest_prompt == 32 + drafted == made.engine.sizes.longest_prompt


def test_between_slices_goes_the_gradient_alone():
    """With a weight that is split within each of two slices, and a batch over both: one float32 sum of its shards."""
    mesh = sharding.make_mesh(config.MeshConfig(data=2), aot.topology("v5e:2x2", 2))
    weights, batch = NamedSharding(mesh, PartitionSpec("fsdp")), sharding.batch_sharding(mesh)
    loss = lambda w, x: jnp.sum((x @ w) ** 2)
    step = jax.jit(jax.grad(loss), in_shardings=(weights, batch), out_shardings=weights)
    shapes = [jax.ShapeDtypeStruct((1024, 512), jnp.float32), jax.ShapeDtypeStruct((256, 1024), jnp.float32)]
    sent = collectives(step.lower(*shapes).compile().as_text(), 8)
    assert sent.pop("all-reduce over DCN").bytes == 1024 * 512 / 4 * 4
    assert sent and not any("DCN" in kind for kind in sent)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--topology", "v9:2x2"], "--topology v9:2x2: "),
        (["--topology", "v5e:3x5"], "--topology v5e:3x5: "),
        (["--slices", "2"], "--slices 2: needs --topology"),
        (["--slices", "0"], "--slices 0: must be a whole number, 1 or more"),
        (["--slices=-1"], "--slices -1: must be a whole number, 1 or more"),
        (["--topology="], '--topology "": is empty .*; give it a value'),
        (["--topology", "v5e:1000x1000"], "--topology v5e:1000x1000: a slice of v5e has at most 256 chips; give a"),
        (["--topology", "v5p:2x2"], "--topology v5p:2x2: a slice of v5p has 3 dimensions; give one such as v5p:2x2x2"),
        (["--topology", "v5e:2x2", "--slices", "2"], "config.mesh.data = 1: must be a multiple of the 2 slices"),
        (["--config.rollout.slots=8"], "--topology: no published figures of 'cpu'"),
        (
            ["--topology", "v5e:2x2", "--config.model.path=nobody/nothing", START],
            "config.model.path = 'nobody/nothing'",
        ),
        (["--topology", "v5e:2x2", "--config.mesh.tensor=3"], "config.mesh"),
    ],
)
def test_bad_input(file, argv, said):
    with pytest.raises(InputError, match=said.replace("(", "\\(")):
        aot.main(["aot", "--config", file, *argv])


def test_a_libtpu_of_another_jax_is_named():
    """The newest compiles some programs in words that an older jaxlib does not know."""

    class Compiled:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update should have 1 operands but sees 3\nmore")

    with pytest.raises(InputError, match=r"libtpu [\d.]+ writes .* cannot read .*sees 3\).* \"jax\[tpu\]==\d"):
        building._text(Compiled())


def test_a_public_model_is_described_without_a_download():
    tree = config.default()
    tree.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    described = footprint.describe(config.freeze(tree).model)
    assert described.num_params == pytest.approx(7.62e9, rel=0.01)


@pytest.mark.proof
@pytest.mark.slow
def test_gradients_of_weights_are_not_left_to_the_end():
    """What they are products of would wait for them: of each of 6 layers 4,096 tokens x 2,048, three times."""
    device = jax.sharding.SingleDeviceSharding(aot.topology("v5e:2x2")[0])
    c = config.BuiltinModelConfig(hidden_size=128, num_layers=6, num_heads=1, num_kv_heads=1, intermediate_size=2048)
    cfg = footprint.describe(config.ModelConfig(builtin=c))
    put = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
    params = {path: put(shape, jnp.bfloat16) for path, shape in decoder.shapes(cfg).items()}
    tokens = put((32, 128), jnp.int32)

    def loss(params, tokens):
        places = jnp.broadcast_to(jnp.arange(128), tokens.shape)
        return decoder.apply(cfg, params, tokens, places, remat="full")[0].astype(jnp.float32).sum()

    memory = jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis()
    layer = 32 * 128 * 2048 * 2  # bytes of one such
    assert memory.temp_size_in_bytes < 6 * layer
