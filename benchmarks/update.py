"""The update alone: gradient and AdamW step of one rollout, beside plain torch on the same rows.

    python benchmarks/update.py --shape smollm2-135m --groups 2 --group 8 --prefix 64 --completion 64 --torch eager
    python benchmarks/update.py --shape qwen2-small --groups 16 --lengths lognormal --completion 256 \\
      --tokens-per-microbatch 8192 --torch eager

Rows are random tokens of fixed or lognormal lengths with random advantages, on policy, one optimizer step, beta 0. With
--idle the advantages of that fraction of the groups are zero, so that they have no gradient. The torch peer is a
transformers model with SDPA: forward, backward, a norm clip and fused AdamW over the same rows, padded as
`update_torch` says, its head on the positions before completion tokens only. On a GPU it recomputes layers as ours
does, and bfloat16 means float32 weights under autocast. Each runs in a process of its own, one after the other. The
last line is one JSON object:

    update_seconds        median over --steps updates after two that do not count
    tokens_per_second     completion tokens over update_seconds
    real_tokens           tokens of prompts, each once, and of completions; idle groups count too. The same for torch
    seconds_per_token     update_seconds over real_tokens
    programs              sizes of micro-batches for which these settings compile a program of the gradient
    compile_seconds       time to compile these programs and that of the optimizer step, before the first update, and
                          those that --remat auto tries; this command does not read compiled programs from the disk
    recompiles            programs compiled after the first update, which must be 0
    recomputed            what the backward pass recomputes: --remat, or what "auto" chose
    idle_fraction         share of groups without a gradient
    mfu                   FLOPs of the model (perf/update_flops: matmuls and attention, forward and backward, without
                          recomputation; what the group shares is counted once where it is run once) per second and
                          device, over those of a large matmul measured in the same run
    predicted_memory_bytes   of the largest program with the training state, by the compiler's count, on each device
    peak_memory_bytes     the most that the allocator of a GPU or TPU held; elsewhere the prediction
    extra_memory_bytes    resident memory of the process at its peak, beyond that before a step and the gradients: what
                          activations and temporaries need (CPU only)
    padding_fraction      share of the positions run that are padding
    loss, grad_norm       of the first update; with --model torch has the same weights, and thus the same figures
    torch_...             the same of the torch peers, where it has a meaning, and `ratio`: update_seconds over the best
                          torch peer's
"""

import argparse
import json
import subprocess
import sys
import time

import models
import update_rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command line, or of `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_model(parser)
    update_rows.add_rows(parser)
    parser.add_argument("--shared-prefix", choices=("on", "off"), default="on")
    parser.add_argument("--remat", default="full", help="learner.remat")
    parser.add_argument("--attention", default="auto", help="learner.attention")
    parser.add_argument("--tokens-per-microbatch", type=int, default=1 << 20)
    sizes = "learner.microbatch_sizes"
    parser.add_argument("--microbatch-sizes", type=float, nargs="+", default=(1.0, 0.5, 0.125), help=sizes)
    parser.add_argument("--logprob-chunk", type=int, default=None, help="positions of a row; default: the package's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--torch", nargs="*", choices=("eager", "compile"), default=[], help="peers to run beside it")
    parser.add_argument("--peer", choices=("eager", "compile"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def settings(args: argparse.Namespace):
    """Returns the configuration of a run that makes such an update."""
    from igrpo_jax import config

    tree = config.default()
    tree.prompts_per_step = args.groups
    tree.algorithm.num_generations = args.group
    tree.algorithm.num_drafts = 0
    tree.rollout.max_completion_length = args.completion
    tree.rollout.temperature = 1.0
    tree.model.dtype = args.dtype
    tree.learner.remat = args.remat
    tree.learner.attention = args.attention
    tree.learner.tokens_per_microbatch = args.tokens_per_microbatch
    tree.learner.microbatch_sizes = tuple(args.microbatch_sizes)
    tree.learner.shared_prefix = args.shared_prefix == "on"
    if args.logprob_chunk:
        tree.learner.logprob_chunk = args.logprob_chunk
    return config.freeze(tree)


class Bench:
    """A learner with its training state, and rows to train on."""

    def __init__(self, args: argparse.Namespace):
        import jax

        from igrpo_jax.learning.learner import Learner
        from igrpo_jax.learning.programs import LearnerPrograms
        from igrpo_jax.models.config import from_hf

        cfg = from_hf(models.raw_config(args), args.model or args.shape)
        self.mesh = models.make_mesh()
        self.cfg = models.with_attention(cfg, args, self.mesh, args.attention)
        self.rows = update_rows.make_rows(args, cfg.vocab_size)
        self.groups = self.rows.groups()
        with jax.set_mesh(self.mesh):
            sizes = {"longest_prompt": args.prefix, "total_steps": 100}
            programs = LearnerPrograms(settings(args), self.cfg, self.mesh, **sizes)
            self.learner = Learner(programs, frozen={}, reference=None)
            self.state = self.learner.init(self._load(args))

    def _load(self, args: argparse.Namespace):
        if not args.model:
            return models.random_params(self.cfg, self.mesh)
        from igrpo_jax.models import hf_read

        return hf_read.load_params(args.model, self.cfg, self.mesh)

    def compile(self) -> float:
        """Compiles all programs that an update may call, and returns the seconds that it took."""
        from igrpo_jax.distributed.compiling import compile_all

        began = time.perf_counter()
        compile_all(self.learner.programs.program_shapes)
        return time.perf_counter() - began

    def step(self) -> dict:
        """Makes one update and returns its metrics."""
        import jax

        with jax.set_mesh(self.mesh):
            self.state, metrics = self.learner.update(self.state, self.groups, self.rows.advantages, 1)
            jax.block_until_ready(self.state.params)
        return metrics


def ours(args: argparse.Namespace) -> dict:
    """Measures the package's update."""
    import jax

    from igrpo_jax.distributed.programs import compilations

    bench, updates = Bench(args), []
    compile_seconds = bench.compile()
    with compilations() as compiled:
        step = lambda: updates.append(bench.step() | {"compiled": len(compiled)})
        figures = models.step_figures(step, args.steps, 4 * bench.cfg.num_params)
    first, last = updates[0], updates[-1]
    predicted, measured = bench.learner.programs.predicted_bytes(), models.peak_bytes()
    per_second = last["perf/update_flops"] / figures["update_seconds"] / bench.mesh.size
    figures |= bench.rows.rates(figures["update_seconds"])
    return figures | {
        "programs": len(bench.learner.programs.accumulate.shapes),
        "compile_seconds": round(compile_seconds, 2),
        "recomputed": bench.learner.programs.remat,
        "recompiles": last["compiled"] - first["compiled"],
        "idle_fraction": round(float(bench.rows.idle.mean()), 4),
        "peak_memory_bytes": measured or predicted,
        "predicted_memory_bytes": predicted,
        "mfu": round(per_second / models.matmul_peak(args.dtype), 3),
        "padding_fraction": round(last["perf/padding_frac"], 4),
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
        "device": jax.devices()[0].device_kind,
        "devices": bench.mesh.size,
        "attention": bench.cfg.attention,
        **models.machine("optax"),
    }


def main() -> None:
    args = parse()
    if args.peer:
        import update_torch

        models.finish(update_torch.peer(args))
        return
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # compile_seconds is the time to compile, not to read
    figures = ours(args)
    print(f"ours: {figures['update_seconds']} s, {figures['extra_memory_bytes'] / 2**20:.0f} MiB extra")
    peers = {}
    for name in args.torch:
        command = [sys.executable, __file__, *sys.argv[1:], "--peer", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        peers[name] = json.loads(done.stdout.splitlines()[-1])
        extra = peers[name]["extra_memory_bytes"] / 2**20
        print(f"torch {name}: {peers[name]['update_seconds']} s, {extra:.0f} MiB extra")
        figures |= {f"torch_{name}_{key}": value for key, value in peers[name].items()}
    if peers:
        best = min(peers.values(), key=lambda figures: figures["update_seconds"])
        figures["ratio"] = round(figures["update_seconds"] / best["update_seconds"], 3)
        figures["memory_ratio"] = round(figures["extra_memory_bytes"] / best["extra_memory_bytes"], 3)
    models.finish(vars(args) | figures)


if __name__ == "__main__":
    main()
