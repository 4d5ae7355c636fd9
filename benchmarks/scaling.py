"""One configuration on slices of different sizes, by the compiler of TPUs: bytes per chip and what the chips send.

    python benchmarks/scaling.py --config configs/tpu_v5p.py --topologies v5p:2x2x1,v5p:2x2x2,v5p:4x4x4,v5p:8x8x16

runs `python -m igrpo_jax.aot` for each, one after the other (minutes each), and prints a Markdown table for
docs/scaling.md and one JSON object as the last line: what aot printed, by slice. The work of a chip stays the same:
slots and prompts of a step grow with the slice. Weights are split over --fsdp chips at most, and replicated beyond.
GB that a chip receives are those of one micro-batch, of gathering the weights for a step, and of one decoded token.
"""

import argparse
import json
import math
import subprocess
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topologies", required=True, help="with commas between them")
    parser.add_argument("--slots", type=int, default=16, help="per chip")
    parser.add_argument("--prompts", type=int, default=4, help="of a step, per chip")
    parser.add_argument("--fsdp", type=int, default=64)
    args = parser.parse_args()
    print(HEAD, flush=True)
    figures_by_slice = {}
    for name in args.topologies.split(","):
        chips = math.prod(map(int, name.partition(":")[2].split("x")))
        fields = {"rollout.slots": args.slots * chips, "prompts_per_step": args.prompts * chips}
        fields |= {"mesh.fsdp": min(args.fsdp, chips), "mesh.data": -1}
        figures_by_slice[name] = measured(
            args.config, name, [f"--config.{field}={value}" for field, value in fields.items()]
        )
        print(row(name, figures_by_slice[name]), flush=True)
    print(json.dumps(figures_by_slice))


def measured(config: str, topology: str, settings: list[str]) -> dict:
    """Returns the JSON object of one run of aot."""
    command = [sys.executable, "-m", "igrpo_jax.aot", "--config", config, "--topology", topology, *settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}: {done.stdout[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


TITLES = "slice, chips, data x fsdp x tensor, chips that share sampling weights, fullest program, GiB per chip, of HBM"
TITLES += ", GB received: micro-batch, weights, token"
HEAD = f"| {TITLES.replace(',', ' |')} |\n{'|---' * (TITLES.count(',') + 1)}|"


def row(name: str, figures: dict) -> str:
    """Returns a line of the table."""
    programs = figures["programs"]
    # Of several programs of a kind, the one that receives most.
    received = {part["kind"]: part["received"] for part in sorted(programs, key=lambda part: part["received"])}
    cells = [
        name,
        figures["devices"],
        " x ".join(map(str, figures["mesh"].values())),
        figures["sampling_tensor"],
        figures["fullest"],
        f"{figures['share'] * figures['hbm_bytes'] / 2**30:.1f}",
        f"{figures['share']:.1%}" + ("" if figures["fits"] else " (does not fit)"),
        *(f"{count / 1e9:.3g}" for count in (received["accumulate"], figures["weights_received"], received["decode"])),
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
