"""Which mesh to begin with, by model and slice: what lies on each chip before programs are compiled.

    python benchmarks/meshes.py --config configs/tpu_v5p.py --models deepseek-ai/DeepSeek-R1-Distill-Qwen-7B \\
        --slices v5p:2x2x1,v5p:2x2x2,v6e:4x4

The figures are those that `python -m igrpo_jax.aot` prints first: training state, weights to sample with and cache,
with --slots slots per chip. They take seconds, because nothing is compiled. Of the values 1, 2, 4 and 8 of mesh.tensor
the smallest is named with which they take at most --most of HBM, else the one with which they take least. mesh.data is
1, and mesh.fsdp takes the other chips. The number after the slash is how many chips share weights to sample with, as
the run chooses it. It prints a Markdown table for docs/scaling.md, and one JSON object as the last line with all
values. What programs and their code need comes on top: only aot, which compiles them, says whether a run fits.
"""

import argparse
import json

from igrpo_jax.aot import __main__ as aot
from igrpo_jax.aot import footprint
from igrpo_jax.errors import InputError
from igrpo_jax.loading import load_config

TENSOR = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--models", required=True, help="names that aot knows, with commas between them")
    parser.add_argument("--slices", required=True, help="with commas between them")
    parser.add_argument("--slots", type=int, default=8, help="per chip")
    parser.add_argument("--most", type=float, default=0.55, help="fraction of HBM")
    args = parser.parse_args()
    slices = args.slices.split(",")
    print(f"| {' | '.join(['model', *slices])} |\n{'|---' * (len(slices) + 1)}|")
    every = {}
    for model in args.models.split(","):
        every[model] = {name: measured(args.config, model, name, args.slots) for name in slices}
        cells = [cell(meshes, args.most) for meshes in every[model].values()]
        print(f"| {' | '.join([model.rpartition('/')[2], *cells])} |", flush=True)
    print(json.dumps(every))


def measured(config: str, model: str, topology: str, slots: int) -> dict[str, dict[str, float]]:
    """Returns for each mesh, by its sizes, the GiB that lie on each chip by what they are for, and the share of HBM.

    Meshes that divide neither the model nor the chips of a host are left out.

    Raises:
        InputError: no mesh can be used.
    """
    devices, found, refused = aot.topology(topology), {}, None
    for tensor in TENSOR:
        fields = {"model.path": model, "rollout.slots": slots * len(devices), "mesh.tensor": tensor, "mesh.fsdp": -1}
        try:
            run = footprint.prepare(load_config(config, fields), devices)
        except InputError as error:
            refused = error
            continue
        sizes = {name: round(count / 2**30, 2) for name, count in run.resident.items()}
        share = sum(run.resident.values()) / run.chip.hbm_bytes
        found["x".join(map(str, run.mesh.shape.values()))] = sizes | {
            "share": round(share, 3),
            "sampling_tensor": run.engine.tensor,
        }
    if not found:
        assert refused is not None
        raise refused
    return found


def cell(meshes: dict[str, dict[str, float]], most: float) -> str:
    """Returns the mesh to begin with and the share of HBM that is taken: the first of `meshes` with at most `most`."""
    small = [mesh for mesh, figures in meshes.items() if figures["share"] <= most]
    mesh = small[0] if small else min(meshes, key=lambda mesh: meshes[mesh]["share"])
    share = meshes[mesh]["share"]
    layout = f"{mesh} / {meshes[mesh]['sampling_tensor']}"
    return "too small" if share > 1 else f"{layout}: {share:.0%}" + ("" if small else ", tight")


if __name__ == "__main__":
    main()
