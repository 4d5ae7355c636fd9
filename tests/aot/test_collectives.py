"""Collectives read from compiled text: how often they run, what one device receives; and what the head of the model
sends, once and not in every chunk of its loop."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from igrpo_jax import config
from igrpo_jax.aot.collectives import collectives
from igrpo_jax.distributed import sharding

# A TPU's compiled text, cut: a loop of 5 trips around a fusion that adds and scatters, one that counts to 3, a gather
# of pairs, a sum of two arrays over all 8 devices, a permutation that is only started, and a sum of one device's own.
TEXT = """
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.3 (input: f32[64,8]) -> f32[8,8] {
  %input = f32[64,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.9 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), replica_groups=[1,8]<=[8], to_apply=%add.1
}

%body (carry: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %fusion.1 = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
}

%cond (carry: (s32[], f32[64,8])) -> pred[] {
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%count (carry: (s32[], f32[64,8])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(3), metadata={op_name="x"}
  %at = s32[]{:T(128)} get-tuple-element(%carry), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%at, %constant.7), direction=LT, metadata={op_name="x"}
}

%inner (carry: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %all-to-all.1 = f32[8,8]{1,0} all-to-all(%x), replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main.4 (p: f32[64,8]) -> f32[] {
  %while.1 = (s32[], f32[64,8]) while(%s), condition=%count, body=%inner, metadata={op_name="x"}
  %while.2 = (s32[], f32[64,8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %all-gather.1 = bf16[16,4]{1,0:T(8,128)(2,1)} all-gather(%c), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %all-reduce.2 = (f32[3]{0}, /*index=1*/pred[2]{0}) all-reduce(%d, %e), replica_groups={}, to_apply=%add.1
  %start = (bf16[16]{0}, bf16[16]{0}, u32[], u32[]) collective-permute-start(%f), source_target_pairs={{0,1},{1,0}}
  %done = bf16[16]{0} collective-permute-done(%start)
  %own = f32[9]{0} all-reduce(%g), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add.1
}
"""


def test_what_a_text_says():
    found = {kind: (traffic.count, traffic.bytes) for kind, traffic in collectives(TEXT, 8).items()}
    assert found == {
        "reduce-scatter": (5, 5 * 7 / 8 * 64 * 8 * 4),  # of an all-reduce it would be twice that
        "all-gather": (1, 1 / 2 * 16 * 4 * 2),
        "all-to-all": (3, 3 * 7 / 8 * 8 * 8 * 4),  # a count from 0 to 3
        "all-reduce": (1, 2 * 7 / 8 * (3 * 4 + 2)),
        "collective-permute": (1, 16 * 2 + 4),  # of (sent, received, 2 x 4 bytes) one half
    }


CONDITIONAL = """
%plain (p: f32[8]) -> f32[8] {
  %all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%filtered (p: f32[8]) -> f32[8] {
  %all-reduce.2 = f32[16]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  %all-gather.2 = f32[8]{0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %x = f32[8]{0} conditional(%branch, %p, %p), branch_computations={%filtered, %plain}
  %y = f32[8]{0} conditional(%branch, %p, %p), true_computation=%plain, false_computation=%filtered
}
"""


def test_of_the_branches_of_a_conditional_the_least_counts():
    found = collectives(CONDITIONAL, 2)
    assert found.keys() == {"all-reduce"} and (found["all-reduce"].count, found["all-reduce"].bytes) == (2, 2 * 32)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", 4),
        ("replica_groups={{0,2,4},{1,3,5}}", 3),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("replica_groups={}", 8),
    ],
)
def test_how_many_take_part(groups, size):
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} all-gather(%p), {groups}\n}}"
    assert collectives(text, 8)["all-gather"].bytes == 32 * (size - 1) / size


@pytest.mark.parametrize(
    ("instruction", "kind", "received"),
    [
        ("f32[8]{0} reduce-scatter(%p)", "reduce-scatter", 3 * 32),  # from each of the others what it keeps
        ("(f32[8]{0}, f32[32]{0}) all-gather-start(%p)", "all-gather", 3 * 32),
        ("(f32[32]{0}, f32[8]{0}) reduce-scatter-start(%p)", "reduce-scatter", 3 * 32),
        ("f32[32]{0} all-reduce-start(%p)", "all-reduce", 2 * 3 * 32),
    ],
)
def test_what_one_of_four_devices_receives(instruction, kind, received):
    """A start names its operands too, except that of a sum."""
    text = (
        f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %a = {instruction}, replica_groups=[1,4]<=[4], dimensions={{0}}\n}}"
    )
    found = collectives(text, 4)
    assert found.keys() == {kind} and (found[kind].count, found[kind].bytes) == (1, pytest.approx(received))


def test_a_real_program():
    """A gather before a loop of 6 trips with a sum in it."""
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=4), jax.devices()[:4])

    def run(x):
        def body(total, _):
            return jnp.tanh(jax.lax.psum(total, "fsdp")), None

        return jax.lax.scan(body, jax.lax.all_gather(x, "fsdp", tiled=True), None, length=6)[0]

    spec = PartitionSpec("fsdp")
    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False))
    found = collectives(program.lower(jnp.zeros(32)).compile().as_text(), 4)
    assert found["all-gather"].bytes == 3 / 4 * 32 * 4
    assert (found["all-reduce"].count, found["all-reduce"].bytes) == (6, 6 * 2 * 3 / 4 * 32 * 4)


# Also cut from a TPU's compiled text: a sum over two slices, inside of a loop of 5 trips, and one over four.
BETWEEN_SLICES = """
%body (carry: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %send = (f32[16,8]{1,0:T(8,128)}, u32[], token[]) send(%a, %b), _xla_megascale_transfer_type="ALL_REDUCE"
  %recv = (f32[16,8]{1,0:T(8,128)}, u32[], token[]) recv(%b), is_host_transfer=true, frontend_attributes={\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[16,8]{1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
}

ENTRY %main (x: f32[64,8]) -> f32[64,8] {
  %while.1 = (s32[], f32[64,8]) while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %recv.2 = (bf16[4]{0}, u32[], token[]) recv(%y), frontend_attributes={\
_xla_megascale_target="{1:4}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


def test_what_goes_between_slices():
    (kind, sent), *rest = collectives(BETWEEN_SLICES, 16).items()
    assert kind == "all-reduce over DCN" and not rest
    assert (sent.count, sent.bytes) == (6, 5 * 2 * (1 / 2) * 512 + 2 * (3 / 4) * 8)
